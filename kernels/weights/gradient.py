"""Backward of the members' weights: the gradients of all layers' parameters from those of all members' weights.

    dW[co, ci, kh, kw] = Σ_e dw[e, kh, kw, ci, co] · r[e, ci] · s[e, co]        dw = Σ over splits of its partial sums
    dr[e, ci] = Σ_{kh, kw, co} dw · W · s[e, co]        ds[e, co] = Σ_{kh, kw, ci} dw · W · r[e, ci] + b[co] · db[e, co]
    db[co] = Σ_e db[e, co] · s[e, co]                   db[e, co]: dy, summed over images and pixels

Names are those of member_weights.py. The convolutions leave dw as partial sums (splits, E, k, k, CI, CO), see
`GradientParts`; they are added here, where they are read, in their order, and dw itself is never in memory. A program
goes over members and splits with its tile of W and of dW in registers and leaves one partial sum of dr a row and of ds
a column, which a second kernel adds in a fixed order. Two launches for all layers: a table says what is whose
(layout.py). A layer of n = k·k·CI·CO with S splits moves 4·E·S·n + 8·n bytes and computes some (8 + S)·E·n FLOP:
510 MB for WRN-28-4 with E = 4 and B = 128.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import INTERPRETED, begin, cdiv, check, launch, power_of_2
from ensdistill.kernels.operation import compiled, operation
from ensdistill.kernels.weights.layout import (
    Layer,
    Network,
    Room,
    Table,
    Tables,
    Tile,
    address,
    all_layers,
    as_conv,
    cached,
    check_shapes,
    is_aligned,
    make_table,
    number,
    offsets_in_weight,
    place,
    pointer,
    rows_of,
    tile_of,
    view,
)


class Gradients(NamedTuple):
    """Gradients of a layer's parameters, of several networks if they have a leading axis; None where there is none."""

    weight: Tensor
    rho_r: Tensor | None
    rho_s: Tensor | None
    bias: Tensor | None


class GradientParts:
    """Buffer in which a backward pass leaves its results for `member_weights_gradient`, until its end.

    `weights`: partial sums of dw, (splits, M, k, k, CI, CO), of each layer. `bias`: dy summed over each member's images
    and pixels, (M, CO), None where a layer has no bias. With M members of n parameters it takes 4·M·Σ splits·n bytes:
    460 MB for WRN-28-4 with M = 4 and B = 128, of 2.6 GB that its step takes: they come when activations are the most.
    """

    def __init__(self, network: Network, M: int, splits: Sequence[int], *, dtype: torch.dtype) -> None:
        """`dtype`: fp32, or fp64 for the definitions."""
        self.splits, self.M = tuple(splits), M
        room = Room()
        shapes, self.weights_from, self.bias_from = [], [], []
        for layer, S in zip(network, splits, strict=True):
            CO, CI, k, _ = as_conv(layer.weight).shape
            shapes.append((S, M, k, k, CI, CO))
            self.weights_from.append(room.take(S * M * layer.weight.numel()))
            self.bias_from.append(room.take(M * CO, layer.bias is not None))
        self.flat = network[0].weight.new_empty(room.size, dtype=dtype)
        self.weights = [view(self.flat, start, shape) for start, shape in zip(self.weights_from, shapes, strict=True)]
        self.bias = [
            None if start < 0 else view(self.flat, start, (M, shape[-1]))
            for start, shape in zip(self.bias_from, shapes, strict=True)
        ]


def member_weights_gradient_ref(dw_EKKIO: Tensor, db_EC: Tensor | None, layer: Layer) -> Gradients:
    """Define one layer's gradients, in the types of the arguments."""
    weight, rho_r, rho_s, bias = layer[:4]
    dr = ds = None
    if rho_r is None or rho_s is None:
        dweight = (dw_EKKIO.sum(0) if len(dw_EKKIO) > 1 else dw_EKKIO[0]).permute(3, 2, 0, 1)
    else:
        r, s, w_KKIO = 1 + rho_r, 1 + rho_s, as_conv(weight).permute(2, 3, 1, 0)
        dweight = torch.einsum("ehwio,ei,eo->oihw", dw_EKKIO, r, s)
        dr = torch.einsum("ehwio,hwio,eo->ei", dw_EKKIO, w_KKIO, s)
        ds = torch.einsum("ehwio,hwio,ei->eo", dw_EKKIO, w_KKIO, r)
    dbias = None
    if bias is not None:
        assert db_EC is not None
        dbias = (db_EC if rho_s is None else (1 + rho_s) * db_EC).sum(0)
        ds = None if ds is None else ds + bias * db_EC
    return Gradients(dweight.reshape(weight.shape), dr, ds, dbias)


_WEIGHT, _RHO_R, _RHO_S, _CI, _CO, _TAPS, _ALIGNED, _PARTS, _SPLITS, _STEP, _TO, _TO_R, _TO_S = (
    tl.constexpr(i) for i in range(13)
)
_FIELDS = tl.constexpr(13)


@triton.jit
def _tile(
    p_row,
    p_parts,
    p_gradients,
    p_scratch,
    i_tile,
    E: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    CI = number(p_row, _CI, ALIGNED)
    CO = number(p_row, _CO, ALIGNED)
    TAPS = number(p_row, _TAPS, False)
    ROWS = TAPS * CI
    tiles_o = tl.cdiv(CO, BLOCK_O)
    i_tile_r, i_tile_o = i_tile // tiles_o, i_tile % tiles_o
    o_row, o_ci, o_tap_ci = rows_of(i_tile_r * BLOCK_R, CI, TAPS, ORDER, BLOCK_R)
    o_co = i_tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_row, m_co = o_row < ROWS, o_co < CO
    mask = m_row[:, None] & m_co[None, :]
    has_factors = tl.load(p_row + _RHO_R) != 0
    p_r = pointer(p_row, _RHO_R, ALIGNED) + o_ci
    p_s = pointer(p_row, _RHO_S, ALIGNED) + o_co
    o_weight = offsets_in_weight(o_row, o_co, ROWS, CO, ORDER)
    b_weight = tl.load(pointer(p_row, _WEIGHT, ALIGNED) + o_weight, mask=mask & has_factors, other=0.0)
    splits, step = number(p_row, _SPLITS, False), place(p_row, _STEP, ALIGNED)
    p_part = p_parts + place(p_row, _PARTS, ALIGNED)
    p_to_r = p_scratch + tl.load(p_row + _TO_R) + i_tile_o * ROWS + o_tap_ci
    p_to_s = p_scratch + tl.load(p_row + _TO_S) + i_tile_r * CO + o_co
    o_w = o_tap_ci[:, None] * CO + o_co[None, :]
    UNROLL: tl.constexpr = 4 if ALIGNED else 8
    b_dweight = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    for i_e in range(E):
        b_dw = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
        for i_split in tl.range(0, splits, loop_unroll_factor=UNROLL):  # so many loads on their way at once
            b_dw += tl.load(p_part + (i_split * step + i_e * (ROWS * CO)) + o_w, mask=mask, other=0.0)
        b_r = 1.0 + tl.load(p_r + i_e * CI, mask=m_row & has_factors, other=0.0)
        b_s = 1.0 + tl.load(p_s + i_e * CO, mask=m_co & has_factors, other=0.0)
        b_g = b_dw * b_weight
        b_dr = tl.sum(b_g * b_s[None, :], axis=1)
        b_ds = tl.sum(b_g * b_r[:, None], axis=0)
        tl.store(p_to_r + i_e * (tiles_o * ROWS), b_dr, mask=m_row & has_factors)
        tl.store(p_to_s + i_e * (tl.cdiv(ROWS, BLOCK_R) * CO), b_ds, mask=m_co & has_factors)
        b_dweight += b_dw * b_s[None, :] * b_r[:, None]
    tl.store(p_gradients + place(p_row, _TO, ALIGNED) + o_weight, b_dweight, mask=mask)


@triton.jit
def member_weights_gradient_kernel(
    p_programs,
    p_rows,
    p_parts,
    p_gradients,
    p_scratch,
    E: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NARROW_R: tl.constexpr,
):
    begin()
    p_program = p_programs + 2 * tl.program_id(0)
    p_row = p_rows + tl.load(p_program) * _FIELDS
    i_tile = tl.load(p_program + 1)
    if tl.load(p_row + _ALIGNED) != 0:
        _tile(p_row, p_parts, p_gradients, p_scratch, i_tile, E, ORDER, BLOCK_R, BLOCK_O, True)
    else:
        _tile(p_row, p_parts, p_gradients, p_scratch, i_tile, E, ORDER, NARROW_R, BLOCK_O, False)


_FROM, _COUNT, _C, _SIZE, _RHO, _BIAS, _DB, _OUT, _OF_BIAS = (tl.constexpr(i) for i in range(9))
_VECTOR_FIELDS = tl.constexpr(9)


@triton.jit
def vector_gradients_kernel(
    p_programs, p_rows, p_parts, p_gradients, p_scratch, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[e, c] = Σ_t from[e, t, c] · (1 + ρ[e, t, c]) + b[c]·db[e, c], for rows of (e, c) flattened.

    dr and ds have no ρ and take their parts from the scratch; for db of a bias t is the member, from is db[e, c].
    """
    begin()
    p_program = p_programs + 2 * tl.program_id(0)
    p_row = p_rows + tl.load(p_program) * _VECTOR_FIELDS
    count, C = tl.load(p_row + _COUNT).to(tl.int32), tl.load(p_row + _C).to(tl.int32)
    o_ec = tl.load(p_program + 1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_ec = o_ec < tl.load(p_row + _SIZE).to(tl.int32)
    o_c = o_ec % C
    o_from = o_ec // C * (count * C) + o_c
    if tl.load(p_row + _OF_BIAS) != 0:  # noqa: SIM108 (which Triton does not have for pointers)
        p_from = p_parts + tl.load(p_row + _FROM)
    else:
        p_from = p_scratch + tl.load(p_row + _FROM)
    p_rho, has_rho = pointer(p_row, _RHO, False), tl.load(p_row + _RHO) != 0
    b_sum = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for i_t in range(0, count, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        mask = (o_t < count)[:, None] & m_ec[None, :]
        o = o_from[None, :] + o_t[:, None] * C
        b_rho = tl.load(p_rho + o, mask=mask & has_rho, other=0.0)
        b_sum += tl.load(p_from + o, mask=mask, other=0.0) * (1.0 + b_rho)
    m_bias = m_ec & (tl.load(p_row + _BIAS) != 0)
    b_bias = tl.load(pointer(p_row, _BIAS, False) + o_c, mask=m_bias, other=0.0)
    b_db = tl.load(p_parts + tl.load(p_row + _DB) + o_ec, mask=m_bias, other=0.0)
    tl.store(p_gradients + tl.load(p_row + _OUT) + o_ec, tl.sum(b_sum, axis=0) + b_bias * b_db, mask=m_ec)


class _Places(NamedTuple):
    """Places of results in the buffers of a pass, in elements."""

    gradients: list[tuple[int, int, int, int]]
    """Starts of the stacked gradients of each layer's weight, ρ_r, ρ_s and bias; −1 where there is none."""
    size: int
    """Length of the gradients' buffer."""
    scratch: list[tuple[int, int]]
    """Starts of every layer's partial sums of dr (E, tiles, taps · CI) and ds (E, tiles, CO)."""
    scratch_size: int
    """Length of the partial sums' buffer."""


def _places(networks: Sequence[Network], E: int, tile: Tile) -> _Places:
    room, scratch_room = Room(), Room()
    gradients, scratch = [], []
    for layer in networks[0]:
        sizes = [0 if v is None else len(networks) * v.numel() for v in layer[:4]]
        to, to_r, to_s, to_bias = (room.take(size, size > 0) for size in sizes)
        gradients.append((to, to_r, to_s, to_bias))
    for _, _, layer in all_layers(networks):
        members = E if layer.rho_r is not None else 0
        from_r = scratch_room.take(members * tile.columns(layer) * layer.weight[0].numel())
        from_s = scratch_room.take(members * tile.rows(layer) * len(layer.weight))
        scratch.append((from_r, from_s))
    return _Places(gradients, room.size, scratch, scratch_room.size)


class _Tables(NamedTuple):
    weights: Table
    vectors: tuple[Tensor, Tensor] | None
    """Programs and rows of `vector_gradients_kernel`; None without vectors."""
    BLOCK_C: int
    places: _Places


def _make_tables(parts: GradientParts, networks: Sequence[Network], E: int) -> _Tables:
    tile = tile_of(networks)
    places = _places(networks, E, tile)
    layers = all_layers(networks)
    BLOCK_C = 32 if not INTERPRETED else power_of_2(max(E * max(layer.weight.shape[:2]) for _, _, layer in layers))
    vectors: list[list[int]] = []

    def row(i_row: int, weight: Tensor) -> list[int]:
        n, i, layer = layers[i_row]
        (CO, CI), size, (to_r, to_s) = weight.shape[:2], weight.numel(), places.scratch[i_row]
        to, *to_vectors = places.gradients[i]
        bias = [address(layer.bias), parts.bias_from[i] + n * E * CO] if layer.bias is not None else [0, 0]
        if layer.rho_r is not None and layer.rho_s is not None:
            taps_o, out_r, out_s = tile.columns(layer) * size // (CO * CI), *to_vectors[:2]
            vectors.append([to_r, taps_o, CI, E * CI, 0, 0, 0, out_r + n * E * CI, 0])
            vectors.append([to_s, tile.rows(layer), CO, E * CO, 0, *bias, out_s + n * E * CO, 0])
        if layer.bias is not None:
            vectors.append([bias[1], E, CO, CO, address(layer.rho_s), 0, 0, to_vectors[2] + n * CO, 1])
        aligned = is_aligned(layer)
        own = [address(v) for v in (weight, layer.rho_r, layer.rho_s)]
        parts_from = parts.weights_from[i] + n * E * size
        to += n * size
        return [*own, CI, CO, size // (CI * CO), aligned, parts_from, parts.splits[i], parts.M * size, to, to_r, to_s]

    work = [parts.splits[i] for _, i, _ in layers]
    weights = make_table([layer for _, _, layer in layers], tile, row, work)
    if not vectors:
        return _Tables(weights, None, BLOCK_C, places)
    tiles = [(i, i_tile) for i, v in enumerate(vectors) for i_tile in range(cdiv(v[_SIZE.value], BLOCK_C))]
    device = weights.rows.device
    programs = torch.tensor(tiles, dtype=torch.int32).to(device), torch.tensor(vectors, dtype=torch.int64).to(device)
    return _Tables(weights, programs, BLOCK_C, places)


def _check(parts: GradientParts, networks: Sequence[Network], E: int) -> None:
    check_shapes(networks, parts.weights)
    check(E * len(networks) == parts.M, "E", f"{parts.M} members of {len(networks)} networks", E)


@torch.no_grad()
def member_weights_gradient_by_layers(
    parts: GradientParts,
    networks: Sequence[Network],
    *,
    E: int,
    tables: Tables | None = None,
    definition: Callable[..., Gradients] = member_weights_gradient_ref,
) -> list[Gradients]:
    """Compute `member_weights_gradient` layer by layer, by `definition` and in any type."""
    _check(parts, networks, E)
    gradients = []
    for i, layers in enumerate(zip(*networks, strict=True)):
        dw_MKKIO = parts.weights[i][0] if parts.splits[i] == 1 else parts.weights[i].sum(0)
        db_MC = parts.bias[i]
        db_of = [None] * len(networks) if db_MC is None else db_MC.split(E)
        of_each = [definition(dw, db, layer) for dw, db, layer in zip(dw_MKKIO.split(E), db_of, layers, strict=True)]
        if len(of_each) > 1:
            stacks: Any = (None if vs[0] is None else torch.stack(vs) for vs in zip(*of_each, strict=True))
            gradients.append(Gradients(*stacks))
        else:
            gradients.append(of_each[0])
    return gradients


@operation(
    definition=member_weights_gradient_by_layers,
    library=functools.partial(
        member_weights_gradient_by_layers, definition=functools.partial(compiled, member_weights_gradient_ref)
    ),
)
@torch.no_grad()
def member_weights_gradient(
    parts: GradientParts, networks: Sequence[Network], *, E: int, tables: Tables | None = None
) -> list[Gradients]:
    """Compute the gradients of all layers' parameters, with the same bits every time.

    Args:
        parts: complete, fp32, its members those of the networks one after another.
        networks, E, tables: what `member_weights` was given; the norms count for nothing here.

    Returns:
        Views into one buffer for every layer: of one network like the parameters, of several stacks of them. Weights
        have their strides, where these are dense.

    Raises:
        ValueError: shapes or types are not those.
    """
    _check(parts, networks, E)
    check(parts.flat.dtype == torch.float32, "parts", "fp32", parts.flat.dtype)
    own = cached(tables, "gradients", networks, E, lambda: _make_tables(parts, networks, E), parts.splits)
    places = own.places
    flat, scratch = parts.flat.new_empty(places.size), parts.flat.new_empty(places.scratch_size)
    own.weights.launch(member_weights_gradient_kernel, parts.flat, flat, scratch, E=E)
    if own.vectors is not None:
        launch(
            vector_gradients_kernel, (len(own.vectors[0]),), *own.vectors, parts.flat, flat, scratch,
            BLOCK_T=32, BLOCK_C=own.BLOCK_C, num_warps=4,
        )  # fmt: skip
    N = len(networks)

    def gradient(v: Tensor | None, strides: tuple[int, ...] | None, start: int) -> Any:
        if v is None or strides is None:
            return None
        shape = v.shape if N == 1 else (N, *v.shape)
        return flat.as_strided(shape, strides if N == 1 else (v.numel(), *strides), start)

    gradients = []
    for layer, stride, starts in zip(
        networks[0], own.weights.strides[: len(networks[0])], places.gradients, strict=True
    ):
        strides = stride, *(None if v is None else v.stride() for v in layer[1:4])
        gradients.append(Gradients(*map(gradient, layer[:4], strides, starts)))
    return gradients
