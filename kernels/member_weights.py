"""The members' weights of a BatchEnsemble layer, in the layout that the convolutions read.

    w[e, kh, kw, ci, co] = W[co, ci, kh, kw] · r[e, ci] · s[e, co]

s ∘ (W * (r ∘ x)) is the convolution of x with w (Wen, Tran and Ba, "BatchEnsemble", ICLR 2020): the factors multiply
weights, which are megabytes, and not activations, which are gigabytes. W (CO, CI, k, k) or (CO, CI), fp32, of any
strides; r (E, CI) and s (E, CO) are the factors themselves (1 at the start), fp32, None for ones; w (E, k, k, CI, CO)
bf16 or fp32, CO fastest. Everything is read and written once: with n = k·k·CI·CO it moves 4·n + 2·E·n bytes (bf16) and
computes 2·E·n FLOP; at E = 4 and 3×3×256×256 that is 7.1 MB. The backward is in member_weights_gradient.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import cdiv, check, launch
from ensdistill.kernels.member_weights_gradient import member_weights_gradient as member_weights_gradient
from ensdistill.kernels.member_weights_gradient import member_weights_gradient_ref as member_weights_gradient_ref
from ensdistill.kernels.weight_layout import as_conv, blocks, check_factors, dense, rows_of


def member_weights_ref(
    weight: Tensor,
    r_E_CI: Tensor | None = None,
    s_E_CO: Tensor | None = None,
    *,
    E: int | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition, differentiable in all three; computed in weight's type. Shapes as in `member_weights`."""
    E = _members(r_E_CI, s_E_CO, E)
    w_KKIO = as_conv(weight).permute(2, 3, 1, 0)
    w_EKKIO = w_KKIO.expand(E, *w_KKIO.shape)
    if r_E_CI is not None:
        w_EKKIO = w_EKKIO * r_E_CI[:, None, None, :, None]
    if s_E_CO is not None:
        w_EKKIO = w_EKKIO * s_E_CO[:, None, None, None, :]
    return w_EKKIO.to(dtype).contiguous()


@triton.jit
def member_weights_kernel(
    p_weight,
    p_r,
    p_s,
    p_w,
    CI,
    CO,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    ROWS = TAPS * CI
    o_row, o_ci, o_tap_ci = rows_of(tl.program_id(0) * BLOCK_R, CI, TAPS, TAPS_INNER, BLOCK_R)
    o_co = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_row, m_co = o_row < ROWS, o_co < CO
    mask = m_row[:, None] & m_co[None, :]
    # loaded along the rows, which are contiguous in W, and stored along CO, which is in w
    b_weight = tl.load(p_weight + (o_co[None, :] * ROWS + o_row[:, None]), mask=mask, other=0.0)
    for i_e in tl.static_range(E):
        b_w = b_weight
        if p_r is not None:
            b_w = b_w * tl.load(p_r + i_e * CI + o_ci, mask=m_row, other=0.0)[:, None]
        if p_s is not None:
            b_w = b_w * tl.load(p_s + i_e * CO + o_co, mask=m_co, other=0.0)[None, :]
        o_w = o_tap_ci[:, None] * CO + o_co[None, :]
        tl.store(p_w + i_e * (ROWS * CO) + o_w, b_w.to(p_w.dtype.element_ty), mask=mask)


def _members(r_E_CI: Tensor | None, s_E_CO: Tensor | None, E: int | None) -> int:
    counts = {t.shape[0] for t in (r_E_CI, s_E_CO) if t is not None} | ({E} if E is not None else set())
    check(len(counts) == 1, "E", "given once, or the same number of rows of r and s", sorted(counts))
    return counts.pop()


def _launch_forward(out_EKKIO: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> None:
    (E, k, _, CI, CO), (weight, taps_inner) = out_EKKIO.shape, dense(weight)
    BLOCK_R, BLOCK_O = blocks(k * k * CI, CO)
    launch(
        member_weights_kernel, (cdiv(k * k * CI, BLOCK_R), cdiv(CO, BLOCK_O)), weight, r, s, out_EKKIO, CI, CO,
        E=E, TAPS=k * k, TAPS_INNER=taps_inner, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("ensdistill::member_weights", mutates_args=())
def _operation(weight: Tensor, r: Tensor | None, s: Tensor | None, E: int, dtype: torch.dtype) -> Tensor:
    out_EKKIO = _empty(weight, E, dtype)
    _launch_forward(out_EKKIO, weight, r, s)
    return out_EKKIO


@_operation.register_fake
def _(weight: Tensor, r: Tensor | None, s: Tensor | None, E: int, dtype: torch.dtype) -> Tensor:
    return _empty(weight, E, dtype)


def _empty(weight: Tensor, E: int, dtype: torch.dtype) -> Tensor:
    CO, CI, k, _ = as_conv(weight).shape
    return weight.new_empty((E, k, k, CI, CO), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, dw_EKKIO: Tensor) -> tuple[Tensor | None, ...]:
    weight, r, s = ctx.saved_tensors
    dweight, dr, ds = member_weights_gradient(dw_EKKIO.float().contiguous(), weight, r, s)
    return dweight, dr, ds, None, None


_operation.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ensdistill::member_weights_into", mutates_args=("out",))
def _into_operation(out: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> None:
    _launch_forward(out, weight, r, s)


@_into_operation.register_fake
def _(out: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> None:
    pass


def member_weights(
    weight: Tensor,
    r_E_CI: Tensor | None = None,
    s_E_CO: Tensor | None = None,
    *,
    E: int | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The weights W ∘ r sᵀ of all E members, differentiable in all three.

    Args:
        weight: (CO, CI, k, k) or (CO, CI), fp32, of any strides (a copy is made unless CI or the taps are contiguous).
        r_E_CI, s_E_CO: the factors, contiguous fp32; None for ones.
        E: members; may be left out where there are factors.
        dtype: of the result, bf16 or fp32.

    Returns:
        (E, k, k, CI, CO), contiguous; k = 1 for a linear weight.

    Raises:
        ValueError: shapes or types are not those, or nothing says how many members there are.
    """
    E = _members(r_E_CI, s_E_CO, E)
    check_factors(weight, r_E_CI, s_E_CO, E)
    check(dtype in (torch.bfloat16, torch.float32), "dtype", "bf16 or fp32", dtype)
    return _operation(weight, r_E_CI, s_E_CO, E, dtype)


def member_weights_into(
    out_EKKIO: Tensor, weight: Tensor, r_E_CI: Tensor | None = None, s_E_CO: Tensor | None = None
) -> None:
    """`member_weights` written into `out_EKKIO`, which may be some members' slice of a larger tensor; no autograd.

    Raises:
        ValueError: as `member_weights`, or out is not contiguous (E, k, k, CI, CO) in bf16 or fp32.
    """
    check_factors(weight, r_E_CI, s_E_CO, out_EKKIO.shape[0])
    CO, CI, k, _ = as_conv(weight).shape
    fits = out_EKKIO.shape[1:] == (k, k, CI, CO) and out_EKKIO.is_contiguous() and out_EKKIO.device == weight.device
    check(fits, "out", f"contiguous (E, {k}, {k}, {CI}, {CO}) beside W", out_EKKIO)
    check(out_EKKIO.dtype in (torch.bfloat16, torch.float32), "out", "bf16 or fp32", out_EKKIO)
    with torch.no_grad():
        _into_operation(out_EKKIO, weight, r_E_CI, s_E_CO)
