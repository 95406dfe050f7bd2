"""Record of a step's measures: one row of a table on the device, which then counts the step.

    table[step mod T, n, i] = values_i[n],      step ← step + 1          step = counter[1]

The table (T, N, I) is fp64: T steps, N networks that train side by side, I measures, each a scalar or (N,). Some bytes:
it costs its launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import begin, check, launch, use_kernel
from ensdistill.kernels.philox import check_counter

MOST = 5
"""Most measures that one launch can take."""


def record_ref(table_TNI: Tensor, counter: Tensor, values: Sequence[Tensor]) -> None:
    """Define the record in PyTorch's own operations."""
    step = counter[1]
    row = torch.stack([value.to(table_TNI.dtype) for value in values], dim=-1).view_as(table_TNI[:1])
    table_TNI.index_copy_(0, (step % len(table_TNI)).view(1), row)
    step += 1  # a view: the counter itself


@triton.jit(do_not_specialize=["T"])
def record_kernel(p_table, p_counter, p_0, p_1, p_2, p_3, p_4, T, N, VALUES: tl.constexpr):
    begin()
    step = tl.load(p_counter + 1)
    p_row = p_table + step % T * (N * VALUES)
    for n in range(N):
        tl.store(p_row + n * VALUES, tl.load(p_0 + n).to(tl.float64))
        if VALUES > 1:
            tl.store(p_row + n * VALUES + 1, tl.load(p_1 + n).to(tl.float64))
        if VALUES > 2:
            tl.store(p_row + n * VALUES + 2, tl.load(p_2 + n).to(tl.float64))
        if VALUES > 3:
            tl.store(p_row + n * VALUES + 3, tl.load(p_3 + n).to(tl.float64))
        if VALUES > 4:
            tl.store(p_row + n * VALUES + 4, tl.load(p_4 + n).to(tl.float64))
    tl.store(p_counter + 1, step + 1)


def record(table_TNI: Tensor, counter: Tensor, values: Sequence[Tensor], *, kernel: bool | None = None) -> None:
    """Write `values` into the row of the counter's step, and add 1 to the step.

    Args:
        table_TNI: contiguous fp64 (T, N, I).
        counter: int64 (3,), from `philox.counter_of`.
        values: I tensors of N values each; up to five.
        kernel: see `use_kernel`.

    Raises:
        ValueError: numbers, shapes or types are not those.
    """
    T, N, num_values = table_TNI.shape
    check(table_TNI.dtype == torch.float64 and table_TNI.is_contiguous(), "table", "contiguous float64", table_TNI)
    check_counter(counter)
    check(0 < num_values == len(values) <= MOST, "values", f"{num_values} of at most {MOST}", len(values))
    for value in values:
        check(value.numel() == N, "values", f"{N} values each", value)
    if not use_kernel(kernel, *values):
        return record_ref(table_TNI, counter, values)
    pointers = [value.contiguous() for value in values] + [None] * (MOST - num_values)
    launch(record_kernel, (1,), table_TNI, counter, *pointers, T, N, VALUES=num_values, num_warps=1)
    return None
