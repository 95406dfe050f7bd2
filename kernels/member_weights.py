"""The members' weights of a BatchEnsemble layer, in the layout that the convolutions read, and back.

    w[e, kh, kw, ci, co] = W[co, ci, kh, kw] · r[e, ci] · s[e, co]
    dW[co, ci, kh, kw] = Σ_e dw[e, kh, kw, ci, co] · r[e, ci] · s[e, co]
    dr[e, ci] = Σ_{kh, kw, co} dw · W · s[e, co]        ds[e, co] = Σ_{kh, kw, ci} dw · W · r[e, ci]

s ∘ (W * (r ∘ x)) is the convolution of x with w (Wen, Tran and Ba, "BatchEnsemble", ICLR 2020): the factors multiply
weights, which are megabytes, and not activations, which are gigabytes. W (CO, CI, k, k) or (CO, CI), fp32, of any
strides; r (E, CI) and s (E, CO) are the factors themselves (1 at the start), fp32, None for ones; w (E, k, k, CI, CO)
bf16 or fp32, CO fastest; dw fp32.

Each kernel reads and writes everything once, n = k·k·CI·CO: forward 4·n + 2·E·n bytes (bf16), backward 4·E·n + 8·n; some
6·E·n FLOP, which is nothing. At E = 4 and 3×3×256×256: 7.1 MB and 14.2 MB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import INTERPRETED, MAX_INTERPRETED_PROGRAMS, MAX_TILE, cdiv, check, launch, power_of_2


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
    w_KKIO = _four(weight).permute(2, 3, 1, 0)
    w_EKKIO = w_KKIO.expand(E, *w_KKIO.shape)
    if r_E_CI is not None:
        w_EKKIO = w_EKKIO * r_E_CI[:, None, None, :, None]
    if s_E_CO is not None:
        w_EKKIO = w_EKKIO * s_E_CO[:, None, None, None, :]
    return w_EKKIO.to(dtype).contiguous()


def member_weights_gradient_ref(
    dw_EKKIO: Tensor, weight: Tensor, r_E_CI: Tensor | None = None, s_E_CO: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition of the gradients: (dW, dr, ds), None where there is no factor. float64 in, float64 out."""
    E, CI, CO = dw_EKKIO.shape[0], dw_EKKIO.shape[3], dw_EKKIO.shape[4]
    r = dw_EKKIO.new_ones((E, CI)) if r_E_CI is None else r_E_CI
    s = dw_EKKIO.new_ones((E, CO)) if s_E_CO is None else s_E_CO
    w_KKIO = _four(weight).permute(2, 3, 1, 0)
    dweight = torch.einsum("ehwio,ei,eo->oihw", dw_EKKIO, r, s).reshape(weight.shape)
    dr = torch.einsum("ehwio,hwio,eo->ei", dw_EKKIO, w_KKIO, s) if r_E_CI is not None else None
    ds = torch.einsum("ehwio,hwio,ei->eo", dw_EKKIO, w_KKIO, r) if s_E_CO is not None else None
    return dweight, dr, ds


@triton.jit
def _rows(i_row, CI: tl.constexpr, TAPS: tl.constexpr, TAPS_INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of W in its own memory order, (kh, kw, ci) or (ci, kh, kw): offset in W, input channel, row of w."""
    o_row = i_row + tl.arange(0, BLOCK)
    if TAPS_INNER:
        o_ci = o_row // TAPS
        o_tap_ci = o_row % TAPS * CI + o_ci
    else:
        o_ci = o_row % CI
        o_tap_ci = o_row
    return o_row, o_ci, o_tap_ci


@triton.jit
def member_weights_kernel(
    p_weight,
    p_r,
    p_s,
    p_w,
    E: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    ROWS: tl.constexpr = TAPS * CI
    o_row, o_ci, o_tap_ci = _rows(tl.program_id(0) * BLOCK_R, CI, TAPS, TAPS_INNER, BLOCK_R)
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


@triton.jit
def member_weights_gradient_kernel(
    p_dw,
    p_weight,
    p_r,
    p_s,
    p_dweight,
    p_dr_parts,
    p_ds_parts,
    E: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    ROWS: tl.constexpr = TAPS * CI
    tiles_r = tl.num_programs(0)
    tiles_o = tl.num_programs(1)
    o_row, o_ci, o_tap_ci = _rows(tl.program_id(0) * BLOCK_R, CI, TAPS, TAPS_INNER, BLOCK_R)
    o_co = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_row, m_co = o_row < ROWS, o_co < CO
    mask = m_row[:, None] & m_co[None, :]
    o_weight = o_co[None, :] * ROWS + o_row[:, None]
    o_w = o_tap_ci[:, None] * CO + o_co[None, :]
    if p_r is not None or p_s is not None:
        b_weight = tl.load(p_weight + o_weight, mask=mask, other=0.0)
    b_dweight = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    for i_e in tl.static_range(E):
        b_dw = tl.load(p_dw + i_e * (ROWS * CO) + o_w, mask=mask, other=0.0)
        if p_r is not None or p_s is not None:
            b_g = b_dw * b_weight
        if p_s is not None:
            b_s = tl.load(p_s + i_e * CO + o_co, mask=m_co, other=0.0)[None, :]
            b_dw = b_dw * b_s
        if p_r is not None:
            b_r = tl.load(p_r + i_e * CI + o_ci, mask=m_row, other=0.0)[:, None]
            b_dr = tl.sum(b_g * b_s if p_s is not None else b_g, axis=1)
            tl.store(p_dr_parts + (i_e * tiles_o + tl.program_id(1)) * ROWS + o_tap_ci, b_dr, mask=m_row)
            b_dw = b_dw * b_r
        if p_s is not None:
            b_ds = tl.sum(b_g * b_r if p_r is not None else b_g, axis=0)
            tl.store(p_ds_parts + (i_e * tiles_r + tl.program_id(0)) * CO + o_co, b_ds, mask=m_co)
        b_dweight += b_dw
    tl.store(p_dweight + o_weight, b_dweight, mask=mask)


@triton.jit
def _add_parts(p_parts, p_sum, i_c, PARTS: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum (C,) = parts (PARTS, C) added up over its first axis."""
    o_c = i_c + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for i_part in range(0, PARTS, BLOCK_T):
        o_part = i_part + tl.arange(0, BLOCK_T)
        mask = (o_part < PARTS)[:, None] & (o_c < C)[None, :]
        b_sum += tl.load(p_parts + o_part[:, None] * C + o_c[None, :], mask=mask, other=0.0)
    tl.store(p_sum + o_c, tl.sum(b_sum, axis=0), mask=o_c < C)


@triton.jit
def factor_gradients_kernel(
    p_dr_parts,
    p_ds_parts,
    p_dr,
    p_ds,
    PARTS_R: tl.constexpr,
    PARTS_S: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs of the first axis take dr's channels, then ds's; the second axis is the member."""
    i_e = tl.program_id(1)
    TILES_R: tl.constexpr = (CI + BLOCK_C - 1) // BLOCK_C if p_dr is not None else 0
    i_c = tl.program_id(0) * BLOCK_C
    if p_dr is not None:  # noqa: SIM102 (known when compiling; the other is not)
        if tl.program_id(0) < TILES_R:
            _add_parts(p_dr_parts + i_e * (PARTS_R * CI), p_dr + i_e * CI, i_c, PARTS_R, CI, BLOCK_T, BLOCK_C)
    if p_ds is not None:  # noqa: SIM102
        if tl.program_id(0) >= TILES_R:
            i_c -= TILES_R * BLOCK_C
            _add_parts(p_ds_parts + i_e * (PARTS_S * CO), p_ds + i_e * CO, i_c, PARTS_S, CO, BLOCK_T, BLOCK_C)


def _four(weight: Tensor) -> Tensor:
    """A linear layer's weight is a 1×1 convolution's."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight


def _members(r_E_CI: Tensor | None, s_E_CO: Tensor | None, E: int | None) -> int:
    counts = {t.shape[0] for t in (r_E_CI, s_E_CO) if t is not None} | ({E} if E is not None else set())
    check(len(counts) == 1, "E", "given once, or the same number of rows of r and s", sorted(counts))
    return counts.pop()


def _dense(weight: Tensor) -> tuple[Tensor, bool]:
    """`weight` (CO, CI, k, k), a copy if its memory is neither (CO, CI, k, k) nor (CO, k, k, CI); whether it is the first."""
    weight = _four(weight)
    if weight.is_contiguous():  # a 1×1 weight is both: take it as the second, whose rows are w's
        return weight, weight.shape[2] * weight.shape[3] > 1
    if weight.permute(0, 2, 3, 1).is_contiguous():
        return weight, False
    return weight.contiguous(), weight.shape[2] * weight.shape[3] > 1


def _blocks(rows: int, CO: int) -> tuple[int, int]:
    BLOCK_R, BLOCK_O = min(32, power_of_2(rows)), min(64, power_of_2(CO))
    if INTERPRETED:
        BLOCK_O = min(power_of_2(CO), 512)
        while cdiv(rows, BLOCK_R) * cdiv(CO, BLOCK_O) > MAX_INTERPRETED_PROGRAMS and BLOCK_R * BLOCK_O < MAX_TILE:
            BLOCK_R *= 2
    return BLOCK_R, BLOCK_O


def _launch_forward(out_EKKIO: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> None:
    (E, k, _, CI, CO), (weight, taps_inner) = out_EKKIO.shape, _dense(weight)
    BLOCK_R, BLOCK_O = _blocks(k * k * CI, CO)
    launch(
        member_weights_kernel, (cdiv(k * k * CI, BLOCK_R), cdiv(CO, BLOCK_O)), weight, r, s, out_EKKIO,
        E=E, CI=CI, CO=CO, TAPS=k * k, TAPS_INNER=taps_inner, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O, num_warps=4,
    )  # fmt: skip


def _launch_gradient(
    dw_EKKIO: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (E, k, _, CI, CO), (dense, taps_inner) = dw_EKKIO.shape, _dense(weight)
    BLOCK_R, BLOCK_O = _blocks(k * k * CI, CO)
    grid = cdiv(k * k * CI, BLOCK_R), cdiv(CO, BLOCK_O)
    dweight = torch.empty_like(dense)
    dr, ds = (dw_EKKIO.new_empty((0,) if t is None else t.shape) for t in (r, s))
    dr_parts = None if r is None else dw_EKKIO.new_empty((E, grid[1] * k * k, CI))
    ds_parts = None if s is None else dw_EKKIO.new_empty((E, grid[0], CO))
    launch(
        member_weights_gradient_kernel, grid, dw_EKKIO, dense, r, s, dweight, dr_parts, ds_parts,
        E=E, CI=CI, CO=CO, TAPS=k * k, TAPS_INNER=taps_inner, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O, num_warps=4,
    )  # fmt: skip
    if r is not None or s is not None:
        BLOCK_C = 32 if not INTERPRETED else power_of_2(max(CI, CO))
        tiles = (0 if r is None else cdiv(CI, BLOCK_C)) + (0 if s is None else cdiv(CO, BLOCK_C))
        launch(
            factor_gradients_kernel, (tiles, E), dr_parts, ds_parts, None if r is None else dr, None if s is None else ds,
            PARTS_R=grid[1] * k * k, PARTS_S=grid[0], CI=CI, CO=CO, BLOCK_T=32, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return dweight.view(weight.shape) if weight.dim() == 2 else dweight, dr, ds


@torch.library.custom_op("ensdistill::member_weights", mutates_args=())
def _operation(weight: Tensor, r: Tensor | None, s: Tensor | None, E: int, dtype: torch.dtype) -> Tensor:
    out_EKKIO = _empty(weight, E, dtype)
    _launch_forward(out_EKKIO, weight, r, s)
    return out_EKKIO


@_operation.register_fake
def _(weight: Tensor, r: Tensor | None, s: Tensor | None, E: int, dtype: torch.dtype) -> Tensor:
    return _empty(weight, E, dtype)


def _empty(weight: Tensor, E: int, dtype: torch.dtype) -> Tensor:
    CO, CI, k, _ = _four(weight).shape
    return weight.new_empty((E, k, k, CI, CO), dtype=dtype)


@torch.library.custom_op("ensdistill::member_weights_gradient", mutates_args=())
def _gradient_operation(
    dw: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_gradient(dw, weight, r, s)


@_gradient_operation.register_fake
def _(dw: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty_like(_dense(weight)[0]).view(weight.shape)
    return dweight, *(dw.new_empty((0,) if t is None else t.shape) for t in (r, s))


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


def _check(weight: Tensor, r_E_CI: Tensor | None, s_E_CO: Tensor | None, E: int) -> None:
    square = weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2] == weight.shape[3])
    check(square and weight.dtype == torch.float32, "weight", "fp32 (CO, CI, k, k) or (CO, CI)", weight)
    check(weight.numel() > 0 and E > 0, "weight", "at least one member and one element", weight)
    for name, factor, channels in (("r", r_E_CI, weight.shape[1]), ("s", s_E_CO, weight.shape[0])):
        if factor is not None:
            fits = factor.shape == (E, channels) and factor.is_contiguous() and factor.dtype == torch.float32
            check(fits and factor.device == weight.device, name, f"contiguous fp32 ({E}, {channels}) beside W", factor)


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
    _check(weight, r_E_CI, s_E_CO, E)
    check(dtype in (torch.bfloat16, torch.float32), "dtype", "bf16 or fp32", dtype)
    return _operation(weight, r_E_CI, s_E_CO, E, dtype)


def member_weights_into(
    out_EKKIO: Tensor, weight: Tensor, r_E_CI: Tensor | None = None, s_E_CO: Tensor | None = None
) -> None:
    """`member_weights` written into `out_EKKIO`, which may be some members' slice of a larger tensor; no autograd.

    Raises:
        ValueError: as `member_weights`, or out is not contiguous (E, k, k, CI, CO) in bf16 or fp32.
    """
    _check(weight, r_E_CI, s_E_CO, out_EKKIO.shape[0])
    CO, CI, k, _ = _four(weight).shape
    fits = out_EKKIO.shape[1:] == (k, k, CI, CO) and out_EKKIO.is_contiguous() and out_EKKIO.device == weight.device
    check(fits, "out", f"contiguous (E, {k}, {k}, {CI}, {CO}) beside W", out_EKKIO)
    check(out_EKKIO.dtype in (torch.bfloat16, torch.float32), "out", "bf16 or fp32", out_EKKIO)
    with torch.no_grad():
        _into_operation(out_EKKIO, weight, r_E_CI, s_E_CO)


def member_weights_gradient(
    dw_EKKIO: Tensor, weight: Tensor, r_E_CI: Tensor | None = None, s_E_CO: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dW, dr, ds) from the gradient of the members' weights, which is read once; the same bits every time.

    Args:
        dw_EKKIO: contiguous fp32 (E, k, k, CI, CO).
        weight, r_E_CI, s_E_CO: what `member_weights` was given.

    Returns:
        dW like weight, dr (E, CI) and ds (E, CO), None where there is no factor; all fp32.

    Raises:
        ValueError: shapes or types are not those.
    """
    _check(weight, r_E_CI, s_E_CO, dw_EKKIO.shape[0])
    CO, CI, k, _ = _four(weight).shape
    fits = dw_EKKIO.shape[1:] == (k, k, CI, CO) and dw_EKKIO.is_contiguous() and dw_EKKIO.dtype == torch.float32
    check(
        fits and dw_EKKIO.device == weight.device, "dw", f"contiguous fp32 (E, {k}, {k}, {CI}, {CO}) beside W", dw_EKKIO
    )
    dweight, dr, ds = _gradient_operation(dw_EKKIO, weight, r_E_CI, s_E_CO)
    return dweight, None if r_E_CI is None else dr, None if s_E_CO is None else ds
