"""Members' weights of all layers of a network in one launch, in the layout that the convolutions read.

    w[e, kh, kw, ci, co] = W[co, ci, kh, kw] · r[e, ci] · s[e, co] [· a[co]]        r = 1 + ρ_r, s = 1 + ρ_s
    bias[e, co] = b[co]·s[e, co], or with a norm a·y + b' of the layer's output a[co]·b[co]·s[e, co] + b'[co]

s ∘ (W * (r ∘ x)) is the convolution of x with w (Wen, Tran and Ba, "BatchEnsemble", ICLR 2020): the factors multiply
weights, which are megabytes, and not activations, which are gigabytes. A norm in evaluation mode folds in likewise; a
second one is given as its two vectors. W, ρ and vectors are the parameters themselves, found through a table of their
addresses (layout.py), so that a layer costs no launch of its own. Everything is read and written once: a layer
of n = k·k·CI·CO moves 4·n + 2·E·n bytes (bf16) and computes 2·E·n FLOP; WRN-28-4 at E = 4 moves 70 MB. The backward is
in gradient.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import begin, check
from ensdistill.kernels.operation import compiled, operation
from ensdistill.kernels.weights.layout import (
    Layer,
    Network,
    NormVectors,
    Room,
    Table,
    Tables,
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

Folded = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]
"""w (E, k, k, CI, CO); the bias and the second norm's a and b, (E, CO) each, where there are any."""


def member_weights_ref(layer: Layer, *, E: int, dtype: torch.dtype) -> Folded:
    """Define one layer's weights and vectors, computed in the parameters' type; w is of type `dtype`."""
    weight, rho_r, rho_s, bias, norm, second = layer
    w_KKIO = as_conv(weight).permute(2, 3, 1, 0)
    w_EKKIO = w_KKIO.expand(E, *w_KKIO.shape)
    if rho_r is not None:
        w_EKKIO = w_EKKIO * (1 + rho_r)[:, None, None, :, None]
    s = None if rho_s is None else 1 + rho_s
    bias_EC = None if bias is None else (bias if s is None else bias * s).expand(E, -1)
    if norm is not None:
        a, b = _affine(norm)
        s = a.expand(E, -1) if s is None else s * a
        bias_EC = b.expand(E, -1) if bias_EC is None else a * bias_EC + b
    if s is not None:
        w_EKKIO = w_EKKIO * s[:, None, None, None, :]
    vectors = None
    if second is not None:
        a, b = _affine(second)
        vectors = a.expand(E, -1), b.expand(E, -1)
    return w_EKKIO.to(dtype).contiguous(), bias_EC, vectors


def _affine(norm: NormVectors) -> tuple[Tensor, Tensor]:
    a = norm.gamma * (norm.var + norm.eps).rsqrt()
    return a, norm.beta - a * norm.mean


class WeightSlots:
    """Room for the weights and vectors of `slots` members of a network, side by side in two buffers.

    `weights`: (slots, k, k, CI, CO) of each layer. `bias`, and `second` (a, b): (slots, CO), None where there are none.
    """

    def __init__(self, network: Network, slots: int, *, dtype: torch.dtype) -> None:
        self.slots, self.dtype = slots, dtype
        room, vectors_room = Room(), Room()
        self.weights_from: list[int] = []
        self.vectors_from: list[tuple[int, int, int]] = []
        shapes = []
        for layer in network:
            CO, CI, k, _ = as_conv(layer.weight).shape
            shapes.append((slots, k, k, CI, CO))
            self.weights_from.append(room.take(slots * layer.weight.numel()))
            has_bias, has_second = layer.bias is not None or layer.norm is not None, layer.second is not None
            bias, a, b = (vectors_room.take(slots * CO, wanted) for wanted in (has_bias, has_second, has_second))
            self.vectors_from.append((bias, a, b))
        some = network[0].weight
        self.flat = some.new_empty(room.size, dtype=dtype)
        self.vectors = some.new_empty(vectors_room.size, dtype=torch.promote_types(dtype, torch.float32))
        self.weights = [view(self.flat, o, shape) for o, shape in zip(self.weights_from, shapes, strict=True)]
        self.bias: list[Tensor | None] = []
        self.second: list[tuple[Tensor, Tensor] | None] = []
        for (bias, a, b), (*_, CO) in zip(self.vectors_from, shapes, strict=True):
            self.bias.append(None if bias < 0 else view(self.vectors, bias, (slots, CO)))
            two = None if a < 0 else (view(self.vectors, a, (slots, CO)), view(self.vectors, b, (slots, CO)))
            self.second.append(two)


_WEIGHT, _RHO_R, _RHO_S, _BIAS, _NORM, _EPS, _SECOND, _EPS_2, _CI, _CO, _TAPS, _ALIGNED, _TO, _TO_BIAS, _TO_A, _TO_B = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 4, 8, 9, 13, 14, 15, 16, 17, 18, 19, 20, 21)
)
_FIELDS = tl.constexpr(22)


@triton.jit
def _norm(p_row, FIELD: tl.constexpr, EPS: tl.constexpr, o_co, m_co, ALIGNED: tl.constexpr):
    """a and b of the norm whose four vectors are at FIELD: 1 and 0 where there is none."""
    m = m_co & (tl.load(p_row + FIELD) != 0)
    eps = tl.load(p_row + EPS).to(tl.int32).to(tl.float32, bitcast=True)
    b_var = tl.load(pointer(p_row, FIELD + 3, ALIGNED) + o_co, mask=m, other=1.0)
    b_a = tl.load(pointer(p_row, FIELD, ALIGNED) + o_co, mask=m, other=1.0) * tl.div_rn(1.0, tl.sqrt_rn(b_var + eps))
    b_a = tl.where(m, b_a, 1.0)
    b_mean = tl.load(pointer(p_row, FIELD + 2, ALIGNED) + o_co, mask=m, other=0.0)
    return b_a, tl.load(pointer(p_row, FIELD + 1, ALIGNED) + o_co, mask=m, other=0.0) - b_a * b_mean


@triton.jit
def _tile(
    p_row,
    p_w,
    p_vectors,
    i_tile,
    first,
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
    i_row = i_tile // tiles_o * BLOCK_R
    o_row, o_ci, o_tap_ci = rows_of(i_row, CI, TAPS, ORDER, BLOCK_R)
    o_co = i_tile % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_row, m_co = o_row < ROWS, o_co < CO
    mask = m_row[:, None] & m_co[None, :]
    has_factors = tl.load(p_row + _RHO_R) != 0
    p_r = pointer(p_row, _RHO_R, ALIGNED) + o_ci
    p_s = pointer(p_row, _RHO_S, ALIGNED) + o_co
    b_a, b_b = _norm(p_row, _NORM, _EPS, o_co, m_co, ALIGNED)
    # loaded along the rows where they are contiguous in W, and stored along CO, which is in w
    o_weight = offsets_in_weight(o_row, o_co, ROWS, CO, ORDER)
    b_weight = tl.load(pointer(p_row, _WEIGHT, ALIGNED) + o_weight, mask=mask, other=0.0)
    p_to = p_w + (place(p_row, _TO, ALIGNED) + first.to(tl.int64) * (ROWS * CO))
    o_w = o_tap_ci[:, None] * CO + o_co[None, :]
    for i_e in tl.static_range(E):
        b_r = 1.0 + tl.load(p_r + i_e * CI, mask=m_row & has_factors, other=0.0)
        b_s = 1.0 + tl.load(p_s + i_e * CO, mask=m_co & has_factors, other=0.0)
        b_w = b_weight * b_r[:, None] * (b_s * b_a)[None, :]
        tl.store(p_to + i_e * (ROWS * CO) + o_w, b_w.to(p_w.dtype.element_ty), mask=mask)
    if i_row == 0:  # one of the tiles over these columns writes their vectors
        m_bias = m_co & (tl.load(p_row + _BIAS) != 0)
        b_bias = tl.load(pointer(p_row, _BIAS, ALIGNED) + o_co, mask=m_bias, other=0.0)
        b_a2, b_b2 = _norm(p_row, _SECOND, _EPS_2, o_co, m_co, ALIGNED)
        to_bias, to_a, to_b = place(p_row, _TO_BIAS, False), place(p_row, _TO_A, False), place(p_row, _TO_B, False)
        for i_e in tl.static_range(E):
            b_s = 1.0 + tl.load(p_s + i_e * CO, mask=m_co & has_factors, other=0.0)
            o_e = (first + i_e) * CO + o_co
            tl.store(p_vectors + to_bias + o_e, b_a * (b_bias * b_s) + b_b, mask=m_co & (to_bias >= 0))
            tl.store(p_vectors + to_a + o_e, b_a2, mask=m_co & (to_a >= 0))
            tl.store(p_vectors + to_b + o_e, b_b2, mask=m_co & (to_b >= 0))


@triton.jit(do_not_specialize=["first"])
def member_weights_kernel(
    p_programs,
    p_rows,
    p_w,
    p_vectors,
    first,
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
        _tile(p_row, p_w, p_vectors, i_tile, first, E, ORDER, BLOCK_R, BLOCK_O, True)
    else:
        _tile(p_row, p_w, p_vectors, i_tile, first, E, ORDER, NARROW_R, BLOCK_O, False)


def _make_table(out: WeightSlots, networks: Sequence[Network], E: int) -> Table:
    layers = all_layers(networks)

    def row(i_row: int, weight: Tensor) -> list[int]:
        n, i, layer = layers[i_row]
        (CO, CI), size = weight.shape[:2], weight.numel()
        norms: list[Any] = []
        for norm in (layer.norm, layer.second):
            eps = 0 if norm is None else struct.unpack("<i", struct.pack("<f", norm.eps))[0]
            norms += [*(map(address, norm[:4] if norm is not None else [None] * 4)), eps]
        aligned = is_aligned(layer)
        vectors_to = [-1 if to < 0 else to + n * E * CO for to in out.vectors_from[i]]
        own = [address(v) for v in (weight, *layer[1:4])]
        return [*own, *norms, CI, CO, size // (CI * CO), aligned, out.weights_from[i] + n * E * size, *vectors_to]

    return make_table([layer for _, _, layer in layers], tile_of(networks), row, [1] * len(layers))


def _check(out: WeightSlots, networks: Sequence[Network], first: int, E: int) -> None:
    check_shapes(networks, out.weights)
    fits = first >= 0 and first + E * len(networks) <= out.slots
    check(fits, "first", f"{len(networks)} · {E} members from there on in {out.slots} slots", first)


@torch.no_grad()
def member_weights_by_layers(
    out: WeightSlots,
    networks: Sequence[Network],
    *,
    E: int,
    first: int = 0,
    tables: Tables | None = None,
    definition: Callable[..., Folded] = member_weights_ref,
) -> None:
    """Compute `member_weights` layer by layer, by `definition` and in any type."""
    _check(out, networks, first, E)
    for n, network in enumerate(networks):
        slots = slice(first + n * E, first + (n + 1) * E)
        for i, layer in enumerate(network):
            w_EKKIO, bias, second = definition(layer, E=E, dtype=out.dtype)
            targets = [
                (out.weights[i], w_EKKIO),
                (out.bias[i], bias),
                *zip(out.second[i] or (), second or (), strict=True),
            ]
            for target, value in targets:
                if target is not None and value is not None:
                    target[slots] = value


@operation(
    definition=member_weights_by_layers,
    library=functools.partial(member_weights_by_layers, definition=functools.partial(compiled, member_weights_ref)),
)
@torch.no_grad()
def member_weights(
    out: WeightSlots, networks: Sequence[Network], *, E: int, first: int = 0, tables: Tables | None = None
) -> None:
    """Write weights and vectors of the members of `networks` into the slots from `first` on; no autograd.

    Kernels read the parameters at their addresses. With tables that have been made the call is one launch and can be
    captured, as long as no parameter is replaced.

    Args:
        out: in bf16 or fp32, made for such layers.
        networks: layers of each; their parameters fp32 on one device.
        E: members of each network, as many as their factors have; of one without factors all are equal.
        first: the slot of the first member of the first network.
        tables: the caller's, of these `out` and `E`, kept from call to call.

    Raises:
        ValueError: shapes or types are not those.
    """
    _check(out, networks, first, E)
    check(out.dtype in (torch.bfloat16, torch.float32), "out", "bf16 or fp32", out.dtype)
    table = cached(tables, "weights", networks, E, lambda: _make_table(out, networks, E))
    table.launch(member_weights_kernel, out.flat, out.vectors, first, E=E)
