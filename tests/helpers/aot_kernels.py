"""Four small kernels and their ahead-of-time compilation, for test_aot.py, which runs this file as a program.

Pytest's own process interprets kernels where it has no GPU; here they are compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ensdistill.aot import __main__ as aot
from ensdistill.aot.trace import compiling_for, trace
from ensdistill.costs.dry_run import Program
from ensdistill.kernels.launch import launch


@triton.jit
def add_kernel(p_x, p_y, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_x + o)
    if p_y is not None:
        b += tl.load(p_y + o) * n
    tl.store(p_x + o, b)


@triton.jit
def matrix_kernel(p_a, p_b, p_c, K, N: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, 128), tl.arange(0, N), tl.arange(0, 64)
    b_acc = tl.zeros((128, N), tl.float32)
    for i_k in range(0, K, 64):
        b_a = tl.load(p_a + o_m[:, None] * K + i_k + o_k[None, :])
        b_b = tl.load(p_b + (i_k + o_k[:, None]) * N + o_n[None, :])
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision="ieee")
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], b_acc)


@triton.jit
def box_kernel(d_x, p_y, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b = d_x.load([tl.program_id(0) * SIZE, 0])
    tl.store(p_y + o[:, None] * SIZE + o[None, :], b)


@triton.jit
def unused_kernel(p_x, BLOCK: tl.constexpr):
    tl.store(p_x + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


def _launch_add(x: Tensor, n: int) -> Tensor:
    launch(add_kernel, (8,), x, x if n else None, n, ROWS=len(x), BLOCK=1024)
    return torch.empty_like(x)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def good() -> Iterator[Program]:
    # 32 and 48 are both multiples of 16: one variant
    yield lambda: _launch_add(_launch_add(empty(8192), 32), 48)
    yield lambda: _launch_add(empty(8192), 3)
    yield lambda: _launch_add(empty(8200)[8:], 32)
    yield lambda: _launch_add(empty(8193)[1:], 32)
    yield lambda: _launch_add(empty(8192), 1)
    yield lambda: _launch_add(empty(8192), 0)
    for dtype in (torch.bfloat16, torch.float32):
        yield lambda dtype=dtype: launch(
            matrix_kernel,
            (1,),
            empty(128, 256, dtype=dtype),
            empty(256, 64, dtype=dtype),
            empty(128, 64, dtype=torch.float32),
            256,
            N=64,
            num_stages=1 if dtype == torch.float32 else 3,
            num_warps=8,
        )
    yield lambda: launch(
        box_kernel, (4,), TensorDescriptor.from_tensor(empty(256, 64), [64, 64]), empty(64, 64), SIZE=64
    )


def bad() -> Iterator[Program]:
    arguments = (empty(128, 256), empty(256, 256), empty(128, 256, dtype=torch.float32), 256)
    yield lambda: launch(matrix_kernel, (1,), *arguments, N=256, num_warps=4)  # 256 registers a thread of sums alone
    yield lambda: launch(matrix_kernel, (1,), *arguments, N=256, num_stages=8, num_warps=8)  # 8 x 48 KB
    yield lambda: launch(unused_kernel, (1,), empty(64), BLOCK=63)  # not a power of 2


def main(cache: str, what: str, arch: str = "90") -> None:
    aot.use_cache(Path(cache))
    with compiling_for(int(arch)):
        variants = trace([("first", good() if what != "bad" else bad()), ("second", good() if what != "bad" else ())])
        if what == "check":
            found = aot.missing_from_cache(int(arch), variants)
        elif what == "changed":
            extra = trace([("third", [lambda: launch(unused_kernel, (1,), empty(64), BLOCK=64)])])
            found = aot.missing_from_cache(90, [*variants, *extra])
    rows = []
    if what == "launch":
        found = aot.missing_from_cache(int(arch), variants)
    if what in ("good", "bad"):
        outcomes = aot.compile_all(int(arch), variants, jobs=2)
        rows, found = aot.report(int(arch), variants, outcomes)
    texts = [[variant.name, variant.text, variant.recipes] for variant in variants]
    print(json.dumps({"variants": texts, "rows": [asdict(row) for row in rows], "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
