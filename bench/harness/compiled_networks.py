"""What torch.compile makes of the passes that the kernels fuse: the rivals of speed tests and benchmarks.

Everything runs in bf16, by autocast or, inside vmap, because all tensors are bf16 already. Each
pass is one graph, gradient included; nobody pays for weight gradients that are not wanted. The mode is max-autotune
without CUDA graphs of its own: whoever times it captures it, which is less work a call than the mode's own copies.
COMPILE_MODE in the environment names another, such as `default`, which compiles in seconds where this takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ensdistill.kernels.loss.seeds import divergence_seeds_ref
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.environment import Precision, autocast

Images = Callable[[Tensor], Tensor]
MODE = os.environ.get("COMPILE_MODE", "max-autotune-no-cudagraphs")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` as one graph of fixed shapes, every choice of inductor's measured."""
    return torch.compile(function, mode=MODE, fullgraph=True, dynamic=False)


def loop_forward(teachers: Teachers, precision: Precision = "bf16") -> Images:
    """Make a function that gives logits (E, B, K) by the modules, one after the other."""

    def forward(x_BCHW: Tensor) -> Tensor:
        with torch.no_grad(), autocast(x_BCHW.device, precision):
            return teachers(x_BCHW)

    return forward


def vmap_forward(teachers: Teachers, dtype: torch.dtype = torch.bfloat16) -> Images:
    """Make a function that gives logits (E, B, K) by one network over stacked parameters.

    All teachers normalise as the first does.
    """
    first: Any = teachers.classifiers[0]
    networks: list[Any] = [classifier.network for classifier in teachers.classifiers]
    parameters, buffers = torch.func.stack_module_state(networks)
    # Autocast does not reach inside vmap, and norms there take one type alone.
    parameters, buffers = (
        {name: x.detach().to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        for tensors in (parameters, buffers)
    )

    def member(own: dict[str, Tensor], statistics: dict[str, Tensor], z_BCHW: Tensor) -> Tensor:
        return torch.func.functional_call(networks[0], (own, statistics), (z_BCHW,))

    def forward(x_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            z_BCHW = ((x_BCHW - first.pixel_mean) / first.pixel_std).to(dtype)
            return torch.vmap(member, in_dims=(0, 0, None))(parameters, buffers, z_BCHW)

    return forward


def divergence_gradient(teachers: Teachers, student: Student, pair: tuple[int, int], precision: Precision) -> Images:
    """Make one function of `Networks.divergence_gradient` with the student, which is put in evaluation mode."""
    a, b = pair
    student.eval()

    def term(first: Images, second: Images, x_BCHW: Tensor) -> Tensor:
        logits_BK, pull = torch.func.vjp(first, x_BCHW)
        return pull(divergence_seeds_ref(logits_BK, second(x_BCHW)).to(logits_BK.dtype))[0]

    def gradient(x_BCHW: Tensor) -> Tensor:
        with torch.no_grad(), autocast(x_BCHW.device, precision):
            of_teachers = term(lambda x: teachers.member(a, x), lambda x: teachers.member(b, x), x_BCHW)
            of_student = term(lambda x: student(x, members=(a,))[0], lambda x: student(x, members=(b,))[0], x_BCHW)
            return of_teachers - of_student

    return gradient
