"""Backward of the members' weights: one layer's gradients from those of all its members' weights.

    dW[co, ci, kh, kw] = Σ_e dw[e, kh, kw, ci, co] · r[e, ci] · s[e, co]
    dr[e, ci] = Σ_{kh, kw, co} dw · W · s[e, co]        ds[e, co] = Σ_{kh, kw, ci} dw · W · r[e, ci]

Shapes are those of member_weights.py. dw is read once: a program goes over the members with its tile of W and of dW in
registers and leaves one partial sum of dr a row and of ds a column, which a second kernel adds in a fixed order. With
n = k·k·CI·CO it moves 4·E·n + 8·n bytes and computes some 8·E·n FLOP: at E = 4 and 3×3×256×256 14.2 MB.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import INTERPRETED, cdiv, check, launch, power_of_2
from ensdistill.kernels.weight_layout import as_conv, blocks, check_factors, dense, rows_of


def member_weights_gradient_ref(
    dw_EKKIO: Tensor, weight: Tensor, r_E_CI: Tensor | None = None, s_E_CO: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition of the gradients: (dW, dr, ds), None where there is no factor. float64 in, float64 out."""
    E, CI, CO = dw_EKKIO.shape[0], dw_EKKIO.shape[3], dw_EKKIO.shape[4]
    r = dw_EKKIO.new_ones((E, CI)) if r_E_CI is None else r_E_CI
    s = dw_EKKIO.new_ones((E, CO)) if s_E_CO is None else s_E_CO
    w_KKIO = as_conv(weight).permute(2, 3, 1, 0)
    dweight = torch.einsum("ehwio,ei,eo->oihw", dw_EKKIO, r, s).reshape(weight.shape)
    dr = torch.einsum("ehwio,hwio,eo->ei", dw_EKKIO, w_KKIO, s) if r_E_CI is not None else None
    ds = torch.einsum("ehwio,hwio,ei->eo", dw_EKKIO, w_KKIO, r) if s_E_CO is not None else None
    return dweight, dr, ds


@triton.jit
def member_weights_gradient_kernel(
    p_dw,
    p_weight,
    p_r,
    p_s,
    p_dweight,
    p_dr_parts,
    p_ds_parts,
    CI,
    CO,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    ROWS = TAPS * CI
    tiles_r = tl.num_programs(0)
    tiles_o = tl.num_programs(1)
    o_row, o_ci, o_tap_ci = rows_of(tl.program_id(0) * BLOCK_R, CI, TAPS, TAPS_INNER, BLOCK_R)
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
def _add_parts(p_parts, p_sum, i_c, parts, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum (C,) = parts (parts, C) added up over its first axis."""
    o_c = i_c + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for i_part in range(0, parts, BLOCK_T):
        o_part = i_part + tl.arange(0, BLOCK_T)
        mask = (o_part < parts)[:, None] & (o_c < C)[None, :]
        b_sum += tl.load(p_parts + o_part[:, None] * C + o_c[None, :], mask=mask, other=0.0)
    tl.store(p_sum + o_c, tl.sum(b_sum, axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=["parts_r", "parts_s"])
def factor_gradients_kernel(
    p_dr_parts,
    p_ds_parts,
    p_dr,
    p_ds,
    parts_r,
    parts_s,
    CI,
    CO,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs of the first axis take dr's channels, then ds's; the second axis is the member."""
    i_e = tl.program_id(1)
    TILES_R = (CI + BLOCK_C - 1) // BLOCK_C if p_dr is not None else 0
    i_c = tl.program_id(0) * BLOCK_C
    if p_dr is not None:  # noqa: SIM102 (known when compiling; the other is not)
        if tl.program_id(0) < TILES_R:
            _add_parts(p_dr_parts + i_e * (parts_r * CI), p_dr + i_e * CI, i_c, parts_r, CI, BLOCK_T, BLOCK_C)
    if p_ds is not None:  # noqa: SIM102
        if tl.program_id(0) >= TILES_R:
            i_c -= TILES_R * BLOCK_C
            _add_parts(p_ds_parts + i_e * (parts_s * CO), p_ds + i_e * CO, i_c, parts_s, CO, BLOCK_T, BLOCK_C)


def _launch(dw_EKKIO: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (E, k, _, CI, CO), (w, taps_inner) = dw_EKKIO.shape, dense(weight)
    BLOCK_R, BLOCK_O = blocks(k * k * CI, CO)
    grid = cdiv(k * k * CI, BLOCK_R), cdiv(CO, BLOCK_O)
    dweight = torch.empty_like(w)
    dr, ds = (dw_EKKIO.new_empty((0,) if t is None else t.shape) for t in (r, s))
    dr_parts = None if r is None else dw_EKKIO.new_empty((E, grid[1] * k * k, CI))
    ds_parts = None if s is None else dw_EKKIO.new_empty((E, grid[0], CO))
    launch(
        member_weights_gradient_kernel, grid, dw_EKKIO, w, r, s, dweight, dr_parts, ds_parts, CI, CO,
        E=E, TAPS=k * k, TAPS_INNER=taps_inner, BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O, num_warps=4,
    )  # fmt: skip
    if r is not None or s is not None:
        BLOCK_C = 32 if not INTERPRETED else power_of_2(max(CI, CO))
        tiles = (0 if r is None else cdiv(CI, BLOCK_C)) + (0 if s is None else cdiv(CO, BLOCK_C))
        launch(
            factor_gradients_kernel, (tiles, E), dr_parts, ds_parts,
            None if r is None else dr, None if s is None else ds,
            grid[1] * k * k, grid[0], CI, CO, BLOCK_T=32, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return dweight.view(weight.shape) if weight.dim() == 2 else dweight, dr, ds


@torch.library.custom_op("ensdistill::member_weights_gradient", mutates_args=())
def _operation(dw: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(dw, weight, r, s)


@_operation.register_fake
def _(dw: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty_like(dense(weight)[0]).view(weight.shape)
    dr, ds = (dw.new_empty((0,) if t is None else t.shape) for t in (r, s))
    return dweight, dr, ds


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
    check_factors(weight, r_E_CI, s_E_CO, dw_EKKIO.shape[0])
    CO, CI, k, _ = as_conv(weight).shape
    fits = dw_EKKIO.shape[1:] == (k, k, CI, CO) and dw_EKKIO.is_contiguous() and dw_EKKIO.dtype == torch.float32
    check(
        fits and dw_EKKIO.device == weight.device, "dw", f"contiguous fp32 (E, {k}, {k}, {CI}, {CO}) beside W", dw_EKKIO
    )
    dweight, dr, ds = _operation(dw_EKKIO, weight, r_E_CI, s_E_CO)
    return dweight, None if r_E_CI is None else dr, None if s_E_CO is None else ds
