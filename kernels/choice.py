"""Whether an operation runs as its kernel or as its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ensdistill.kernels import launch

KERNEL_TYPES = (torch.float32, torch.bfloat16)
"""What kernels read and write; float64 belongs to the references."""


def use_kernel(kernel: bool | None, *tensors: Tensor | None) -> bool:
    """`kernel` as the caller wants it; None: the kernel on CUDA where it knows every type, the reference elsewhere.

    Launches that are recorded count as CUDA's.

    Raises:
        ValueError: the kernel is asked for where it cannot run.
    """
    given = [x for x in tensors if x is not None]
    known = all(x.dtype in KERNEL_TYPES for x in given if x.is_floating_point())
    if kernel is None:
        return known and given[0].is_cuda
    if kernel:
        launch.check(known, "kernel", "float32 or bfloat16 tensors", [x.dtype for x in given])
        runs = given[0].device.type != "cpu" or launch.INTERPRETED
        launch.check(runs, "kernel", "tensors on a GPU, or Triton's interpreter", given[0])
    return kernel
