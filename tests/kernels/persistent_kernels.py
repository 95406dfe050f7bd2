"""Ahead-of-time compilation of the persistent convolution, for test_aot.py, which runs this file as a program.

Pytest's own process interprets kernels where it has no GPU, and this one cannot be interpreted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ensdistill.aot import __main__ as aot
from ensdistill.aot.trace import compiling_for, trace
from ensdistill.costs.dry_run import Program
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.tiles import PERSISTENT, Tile


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def programs(M: int, B: int, W: int, CI: int, CO: int, k: int, tile: Tile) -> Iterator[Program]:
    """A forward and an input gradient with everything that their epilogues can do."""

    def vector(C: int) -> Tensor:
        return empty(M, C, dtype=torch.float32)

    def forward() -> None:
        member_conv(
            empty(M, B, W, W, CI),
            empty(M, k, k, CI, CO),
            bias=vector(CO),
            residual=empty(M, B, W, W, CO),
            relu=True,
            second=(vector(CO), vector(CO)),
            sums=True,
            bits=M,
            tile=tile,
        )

    def input_gradient() -> None:
        like = empty(M, B, W, W, CI)
        member_conv_input_gradient(
            empty(M, B, W, W, CO),
            empty(M, k, k, CI, CO),
            size=(W, W),
            before=like,
            bits=torch.empty(M, B, W, W, -(-CI // 8), dtype=torch.uint8, device="meta"),
            norm=(like, vector(CI), vector(CI)),
            scale=vector(CI),
            after=like,
            tile=tile,
        )

    yield forward
    yield input_gradient


CASES = [
    (4, 128, 16, 128, 128, 3, Tile(PERSISTENT, 256, 128, 64, 8, 2)),
    (4, 100, 15, 200, 136, 3, Tile(PERSISTENT, 128, 64, 64, 4, 2)),  # masks, two programs a multiprocessor
]


def main(cache: str) -> None:
    aot.use_cache(Path(cache))
    with compiling_for(90):
        variants = trace([("test", (program for case in CASES for program in programs(*case)))])
        outcomes = aot.compile_all(90, variants, jobs=2)
        rows, found = aot.report(90, variants, outcomes)
        found += aot.missing_from_cache(90, variants)
    print(json.dumps({"rows": [asdict(row) for row in rows], "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
