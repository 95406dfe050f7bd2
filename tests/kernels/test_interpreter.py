"""The repair of bf16 in Triton's interpreter, against PyTorch's conversions and float64 products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ensdistill.kernels.interpreter import bf16_bits, from_bf16_bits, repair_bf16
from ensdistill.kernels.launch import INTERPRETED, launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="nothing is interpreted where there is a GPU")
SIZE = 1024


@triton.jit
def convert_kernel(p_in, p_out, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    tl.store(p_out + offset, tl.load(p_in + offset).to(p_out.dtype.element_ty))


@triton.jit
def arithmetic_kernel(p_a, p_b, p_out, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    b_a, b_b = tl.load(p_a + offset).to(tl.float32), tl.load(p_b + offset).to(tl.float32)
    tl.store(p_out + offset, (b_a * b_b + 1.0).to(tl.bfloat16))


@triton.jit
def dot_kernel(p_a, p_b, p_c, p_out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.trans(tl.load(p_b + o_n[:, None] * K + o_k[None, :]))
    b_c = tl.load(p_c + o_m[:, None] * N + o_n[None, :])
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], tl.dot(b_a, b_b, b_c, input_precision="ieee"))


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    convert_kernel[(1,)](x, out, SIZE=x.numel())
    return out


def assert_same_bits(x: torch.Tensor, y: torch.Tensor) -> None:
    """Equal bit by bit, except that every NaN is as good as another."""
    assert x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan())
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    assert torch.equal(x.nan_to_num(0).view(integer), y.nan_to_num(0).view(integer))


def random_bits(seed: int) -> torch.Tensor:
    """Floats of random bits: all magnitudes, subnormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, (SIZE,), generator=generator, dtype=torch.int64).int().view(torch.float32)


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 3.4028235e38, -3.4028235e38, 3.3895314e38]
)


def ties() -> torch.Tensor:
    """Halfway between two bf16, a bit below and a bit above, over even and odd neighbours."""
    upper = torch.arange(0x3F80, 0x3F80 + SIZE // 4, dtype=torch.int32) << 16
    return torch.cat([(upper + low).view(torch.float32) for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF)])


def subnormals() -> torch.Tensor:
    return (torch.arange(SIZE, dtype=torch.int32) * 8191 + 1).view(torch.float32)


@pytest.mark.parametrize(
    "x", [random_bits(0), random_bits(1), ties(), -ties(), subnormals(), SPECIAL.repeat(128)[:SIZE]]
)
def test_float32_to_bf16_and_back(x):
    narrow = convert(x, torch.bfloat16)
    assert_same_bits(narrow, x.bfloat16())
    assert_same_bits(convert(narrow, torch.float32), x.bfloat16().float())


def test_every_bf16_to_float32():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(convert(x, torch.float32), x.float())
    assert torch.equal(torch.from_numpy(from_bf16_bits(x.view(torch.int16).numpy().view(np.uint16))).isnan(), x.isnan())


def test_other_floats_to_bf16_and_back():
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    assert_same_bits(convert(x.half(), torch.bfloat16), x.half().bfloat16())
    assert_same_bits(convert(x.bfloat16(), torch.float16), x.bfloat16().half())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_integers_to_bf16_and_back(dtype):
    low, high = (0, 256) if dtype == torch.uint8 else (-70000, 70000)
    x = torch.randint(low, high, (SIZE,), generator=torch.Generator().manual_seed(3)).to(dtype)
    narrow = convert(x, torch.bfloat16)
    assert_same_bits(narrow, x.float().bfloat16())
    if dtype != torch.uint8:  # 256 and above are no uint8
        assert torch.equal(convert(narrow, dtype), narrow.float().to(dtype))


def test_the_bits_themselves():
    x = random_bits(4)
    bits = bf16_bits(x.numpy())
    assert bits.dtype == np.uint16 and np.array_equal(bits, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert bf16_bits(np.float32([1.0])[0]).item() == 0x3F80


def test_arithmetic_in_float32():
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(SIZE, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, out, SIZE=SIZE)
    assert_same_bits(out, (a.float() * b.float() + 1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M,N,K", [(16, 16, 16), (64, 16, 32), (16, 32, 128)])
def test_dot_against_float64(M, N, K, dtype):
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(n, K, generator=generator).to(dtype) for n in (M, N))
    c, out = torch.randn(M, N, generator=generator), torch.empty(M, N)
    dot_kernel[(1,)](a, b, c, out, M=M, N=N, K=K)
    truth = a.double() @ b.double().T + c.double()
    assert (out - truth).abs().max() < 1e-6 * K  # measured: 0.1 to 0.3 of that


def test_a_second_repair_does_nothing():
    from triton.runtime import interpreter

    before = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    repair_bf16()
    assert before == (interpreter._convert_float, interpreter.InterpreterBuilder.create_dot)


@triton.jit
def padded_kernel(x_descriptor, p_y, N: tl.constexpr, C: tl.constexpr):
    b_x = x_descriptor.load([-1, 0]).to(tl.float32)
    tl.store(p_y + tl.arange(0, N)[:, None] * C + tl.arange(0, C)[None, :], tl.maximum(b_x, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_boxes_padded_with_nan_are_zero_behind_a_maximum(dtype, device):
    x = torch.randn(14, 8, device=device).to(dtype)
    y = torch.full((16, 8), 7.0, device=device)
    launch(padded_kernel, (1,), TensorDescriptor(x, [14, 8], [8, 1], [16, 8], padding="nan"), y, N=16, C=8)
    assert torch.equal(y, torch.nn.functional.pad(x.float().relu(), (0, 0, 1, 1)))
