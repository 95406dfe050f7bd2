"""Loss whose gradient weight decay is: ½ Σ over tensors t of scale_t · ‖θ_t‖².

Tensors are fp32, dense, of any number and size. Every value is read once, 4 bytes and 2 FLOP each: 23 MB for WRN-28-4.
They are cut into chunks; a table on the device says where each begins, how long it is and what its scale is, so that
one launch serves them all. A program adds its chunks' squares in fp32, and one sum adds the programs', in an order that
depends on the sizes alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch as launching
from ensdistill.kernels.launch import begin, check, launch

CHUNK = 8192
"""Values of a chunk, 64 a thread."""
PROGRAMS = 264
"""Programs of a launch at most: two a multiprocessor of an H100."""


def half_squares_ref(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Define the loss, a scalar of the tensors' type."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return (norms.square() * _on(norms, scales)).sum() / 2


def _on(x: Tensor, values: Sequence[float]) -> Tensor:
    """`values` beside x, and no copy from the host, which would wait: equal ones are filled in where they lie."""
    parts, start = [], 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            parts.append(x.new_full((end - start,), values[start]))
            start = end
    return torch.cat(parts)


@triton.jit
def half_squares_kernel(p_places, p_scales, p_sums, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    begin()
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), chunks, tl.num_programs(0)):
        p_x = tl.load(p_places + 2 * i).to(tl.pointer_type(tl.float32))
        size = tl.load(p_places + 2 * i + 1)
        b_chunk = tl.zeros([BLOCK], tl.float32)
        for j in range(0, CHUNK, BLOCK):
            o = j + tl.arange(0, BLOCK)
            b_x = tl.load(p_x + o, mask=o < size, other=0.0)
            b_chunk += b_x * b_x
        b_sum += 0.5 * tl.load(p_scales + i) * b_chunk
    tl.store(p_sums + tl.program_id(0), tl.sum(b_sum))


class HalfSquares:
    """Computes ½ Σ scale · ‖θ‖² of tensors that stay where they are, in a launch and a sum."""

    def __init__(self, tensors: Sequence[Tensor], scales: Sequence[float]) -> None:
        """Keep the tensors; the table of their chunks is made here.

        Raises:
            ValueError: a tensor is not dense fp32, or on another device.
        """
        self.tensors, self.scales = list(tensors), list(scales)
        device = self.tensors[0].device
        for x in self.tensors:
            dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
            check(x.dtype == torch.float32 and dense and x.device == device, "tensors", f"dense fp32 on {device}", x)
        self.places = [0 if x.is_meta else x.data_ptr() for x in self.tensors]
        rows: list[tuple[int, int]] = []
        of_chunk: list[float] = []
        for x, place, scale in zip(self.tensors, self.places, self.scales, strict=True):
            for start in range(0, x.numel(), CHUNK):
                rows.append((place + 4 * start, min(CHUNK, x.numel() - start)))
                of_chunk.append(scale)
        self._places = torch.tensor(rows, dtype=torch.int64).to(device)
        self._scales = torch.tensor(of_chunk, dtype=torch.float32).to(device)

    def __call__(self) -> Tensor:
        """Compute the loss of the present values, a scalar fp32."""
        chunks = len(self._scales)
        programs = min(chunks, 1 if launching.INTERPRETED else PROGRAMS)
        sums = torch.empty(programs, dtype=torch.float32, device=self._scales.device)
        block = CHUNK if launching.INTERPRETED else 1024
        launch(half_squares_kernel, (programs,), self._places, self._scales, sums, chunks, CHUNK=CHUNK, BLOCK=block)
        return sums.sum()

    def has_moved(self) -> bool:
        """Tell whether a tensor's values have moved, so that the table must be made anew."""
        return any(not x.is_meta and x.data_ptr() != place for x, place in zip(self.tensors, self.places, strict=True))
