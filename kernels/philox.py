"""Counter-based random numbers: the same on every machine, device, number of workers and after every resume.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a counter into
four 32-bit words; nothing is drawn "next", so nothing has a state to save. It is the generator behind Triton's
`tl.philox`, which gives the same words for the same key and counter.

Every draw of the program has the key `seed` and the counter (row, step, stream, block):

- `row`     global row of the image in the batch (or index of the image in the data set, for the order of an epoch)
- `step`    optimizer steps since the start of the run (or the epoch, for the order)
- `stream`  what is drawn, one of the constants below
- `block`   which four words of that draw, where it needs more than four

Where a captured graph must serve every step, the numbers (seed, step, first row) are read on the device from a
`counter`, int64 (3,): see `counter_of`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import begin, check, launch, use_kernel

STREAM_ORDER = 0
STREAM_CROP_FLIP = 1
STREAM_PAIR = 2
STREAM_NOISE = 3
STREAM_ODS = 4
STREAM_RESIZED_CROP = 5
STREAM_MODULES = 6

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85

Word = TypeVar("Word", int, np.ndarray, Tensor)


def philox(
    seed: int | Tensor, row: Word, step: int | Tensor, stream: int, block: Word | int = 0
) -> tuple[Word, Word, Word, Word]:
    """Draw four 32-bit words for each counter.

    Args:
        seed: the key, below 2**64; as an int64 tensor its bits.
        row, block: a Python int, or an int64 array or tensor of any shape; what broadcasts together is drawn together.
        step, stream: see the module's docstring. A tensor `step` or `seed` wants a tensor `row`.

    Returns:
        Four ints, arrays or tensors in [0, 2**32) of the broadcast shape (int64: PyTorch computes with no unsigned
        words).
    """
    # A 32 x 32-bit product needs 64 bits; int64 wraps, and the arithmetic shift's sign bits are masked off again.
    counter: Any = (row & _MASK, step & _MASK, stream, block)  # ints mix with what `row` and `block` are
    c0, c1, c2, c3 = counter
    k0: Any = seed & _MASK
    k1: Any = (seed >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """Turn words into float32 in (0, 1): the exact middle of the word's 2**-23 wide bin, never 0 and never 1."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def below(word: Word, n: int) -> Word:
    """Turn words into integers in [0, n), n < 2**31, by the high half of the product (bias below n / 2**32)."""
    return (word * n) >> 32


def normal(seed: int | Tensor, rows: Tensor, step: int | Tensor, stream: int, size: int) -> Tensor:
    """Draw (len(rows), size) standard normal float32 numbers, row by row (Box-Muller on pairs of words)."""
    blocks = torch.arange((size + 3) // 4, device=rows.device)
    words = philox(seed, rows[:, None], step, stream, blocks[None, :])
    u0, u1, u2, u3 = (uniform(word) for word in words)
    radius_a, radius_b = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    angle_a, angle_b = 2 * torch.pi * u1, 2 * torch.pi * u3
    z = [radius_a * angle_a.cos(), radius_a * angle_a.sin(), radius_b * angle_b.cos(), radius_b * angle_b.sin()]
    return torch.stack(z, dim=-1).flatten(1)[:, :size]


def draw_pair(seed: int, step: int, E: int) -> tuple[int, int]:
    """Draw on the host the step's ordered pair (a, b) of members, a ≠ b, uniform over the E (E − 1) pairs."""
    return _pair(philox(seed, 0, step, STREAM_PAIR), E)


def _pair(words: tuple[Word, Word, Word, Word], E: int) -> tuple[Word, Word]:
    a = below(words[0], E)
    return a, (a + 1 + below(words[1], E - 1)) % E


def counter_of(seed: int, step: int, first_row: int, device: torch.device) -> Tensor:
    """Put (seed, step, first_row), int64 (3,), on `device` without waiting; a seed of 2**63 and more by its bits."""
    bits = seed & ((1 << 64) - 1)
    values = [bits - (1 << 64) if bits >> 63 else bits, step, first_row]
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int64, pin_memory=cuda).to(device, non_blocking=cuda)


def check_counter(counter: Tensor) -> None:
    """Raise ValueError unless `counter` is int64 (3,), as `counter_of` makes it."""
    check(counter.dtype == torch.int64 and counter.shape == (3,), "counter", "an int64 tensor (3,)", counter)


@triton.jit
def draw_pair_kernel(p_counter, p_pair, E: tl.constexpr, BESIDE: tl.constexpr, STREAM: tl.constexpr):
    begin()
    seed, step = tl.load(p_counter), tl.load(p_counter + 1).to(tl.uint32)
    word_a, word_b, _, _ = tl.philox(seed, step * 0, step, STREAM, 0)
    a = (word_a.to(tl.uint64) * E) >> 32
    b = (a + 1 + ((word_b.to(tl.uint64) * (E - 1)) >> 32)) % E
    if BESIDE == 0:
        tl.store(p_pair, a.to(tl.int64))
        tl.store(p_pair + 1, b.to(tl.int64))
    else:
        tl.store(p_pair, a.to(tl.int64))
        tl.store(p_pair + 1, a.to(tl.int64) + BESIDE)
        tl.store(p_pair + 2, b.to(tl.int64))
        tl.store(p_pair + 3, b.to(tl.int64) + BESIDE)


def draw_pair_on_device(counter: Tensor, E: int, *, beside: int = 0, kernel: bool | None = None) -> Tensor:
    """Draw `draw_pair` of the counter's seed and step on the counter's device: int64 (2,), a and b.

    Args:
        counter: int64 (3,), from `counter_of`.
        E: members, at least 2.
        beside: if not 0, a, a + beside, b, b + beside: the same pair of two networks whose members lie so far apart.
        kernel: see `use_kernel`.

    Raises:
        ValueError: `counter` is no int64 tensor (3,), E is below 2 or `beside` below 0.
    """
    check_counter(counter)
    check(E >= 2, "E", "at least 2 members", E)
    check(beside >= 0, "beside", "no negative number", beside)
    if use_kernel(kernel, counter):
        pair = counter.new_empty(4 if beside else 2)
        launch(draw_pair_kernel, (1,), counter, pair, E=E, BESIDE=beside, STREAM=STREAM_PAIR, num_warps=1)
        return pair
    a, b = _pair(philox(counter[0], torch.zeros_like(counter[0]), counter[1], STREAM_PAIR), E)
    return torch.stack([a, a + beside, b, b + beside] if beside else [a, b])


def draw_teacher(seed: int, step: int, E: int) -> int:
    """Draw on the host the step's one teacher of E (ods, confods)."""
    return below(philox(seed, 0, step, STREAM_PAIR)[2], E)


@triton.jit
def draw_teacher_kernel(p_counter, p_teacher, E: tl.constexpr, STREAM: tl.constexpr):
    begin()
    seed, step = tl.load(p_counter), tl.load(p_counter + 1).to(tl.uint32)
    _, _, word, _ = tl.philox(seed, step * 0, step, STREAM, 0)
    tl.store(p_teacher, ((word.to(tl.uint64) * E) >> 32).to(tl.int64))


def draw_teacher_on_device(counter: Tensor, E: int, *, kernel: bool | None = None) -> Tensor:
    """Draw `draw_teacher` of the counter's seed and step on the counter's device: int64 (1,).

    Args:
        counter: int64 (3,), from `counter_of`.
        E: teachers, at least 1.
        kernel: see `use_kernel`.

    Raises:
        ValueError: `counter` is no int64 tensor (3,), or E is below 1.
    """
    check_counter(counter)
    check(E >= 1, "E", "at least 1 teacher", E)
    if use_kernel(kernel, counter):
        teacher = counter.new_empty(1)
        launch(draw_teacher_kernel, (1,), counter, teacher, E=E, STREAM=STREAM_PAIR, num_warps=1)
        return teacher
    return below(philox(counter[0], torch.zeros_like(counter[:1]), counter[1], STREAM_PAIR)[2], E)


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the order of an epoch, an int64 permutation of range(num_images), by sorting one 64-bit draw an image."""
    high, low, _, _ = philox(seed, np.arange(num_images, dtype=np.int64), epoch, STREAM_ORDER)
    return np.argsort((high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64), kind="stable")
