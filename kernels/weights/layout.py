"""Layout of the parameters behind members' weights, and the tables by which one launch covers all layers.

W (CO, CI, k, k), or a linear layer's (CO, CI), holds k·k·CI contiguous values for each output channel: the rows of its
tiles, in the order (ci, kh, kw), or (kh, kw, ci) where the memory format is channels-last; or it lies as the members'
weights (k, k, CI, CO) do, CO fastest. A launch covers the layers of one such order, as a rule all of a network: a
table on the device has a row of addresses, sizes and places for each layer, and every program reads which layer and
which tile are its own. The table is made on the host, where parameters have their addresses, once: see `Tables`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import INTERPRETED, MAX_INTERPRETED_PROGRAMS, MAX_TILE, cdiv, check, launch, power_of_2

CHANNELS_LAST, TAPS_INNER, CO_FASTEST = range(3)
"""Orders of W in memory: (CO, kh, kw, CI), (CO, CI, kh, kw), (kh, kw, CI, CO)."""
ALIGNMENT = 128
"""Elements at a multiple of which every tensor in a shared buffer starts."""


class NormVectors(NamedTuple):
    """Vectors (C,) of a norm in evaluation mode: a·y + b with a = γ / √(var + ε), b = β − a·mean."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float


class Layer(NamedTuple):
    """A convolution or linear layer: what its members' weights and vectors are made of, fp32 for kernels."""

    weight: Tensor
    """Weight W (CO, CI, k, k) or (CO, CI)."""
    rho_r: Tensor | None = None
    """Factor r less 1, (E, CI); None for r = 1. There are both factors or none."""
    rho_s: Tensor | None = None
    """Factor s less 1, (E, CO)."""
    bias: Tensor | None = None
    """Bias (CO,), if any."""
    norm: NormVectors | None = None
    """Norm of the layer's output that is folded into weight and bias."""
    second: NormVectors | None = None
    """Norm whose a and b are wanted as vectors."""


Network = Sequence[Layer]


def as_conv(weight: Tensor) -> Tensor:
    """View a linear layer's weight as a 1×1 convolution's."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight


def all_layers(networks: Sequence[Network]) -> list[tuple[int, int, Layer]]:
    """List every layer with the numbers of its network and of its place there."""
    return [(n, i, layer) for n, network in enumerate(networks) for i, layer in enumerate(network)]


class Room:
    """Hands out places in a buffer, one after another, each at a multiple of `ALIGNMENT`."""

    def __init__(self) -> None:
        self.size = 0
        """Number of elements taken so far."""

    def take(self, n: int, wanted: bool = True) -> int:
        """Take `n` elements and give their start; −1, and nothing taken, if they are not `wanted`."""
        start = self.size
        self.size += cdiv(n, ALIGNMENT) * ALIGNMENT if wanted else 0
        return start if wanted else -1


def view(flat: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """View the elements of `flat` from `start` on as a tensor of `shape`."""
    return flat.narrow(0, start, torch.Size(shape).numel()).view(shape)


def check_shapes(networks: Sequence[Network], weights: Sequence[Tensor]) -> None:
    """Raise ValueError unless the networks' layers have the shapes of `weights` (…, k, k, CI, CO)."""
    sizes = [[as_conv(layer.weight).shape for layer in network] for network in networks]
    shapes = [torch.Size((w.shape[-1], w.shape[-2], *w.shape[-4:-2])) for w in weights]
    check(all(some == shapes for some in sizes), "networks", f"layers of {shapes}", sizes)


def check_layers(networks: Sequence[Network], E: int) -> None:
    """Raise ValueError unless the kernels can read these layers of networks with E members each."""
    for _, _, layer in all_layers(networks):
        weight = layer.weight
        square = weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2] == weight.shape[3])
        check(square and weight.dtype == torch.float32, "weight", "fp32 (CO, CI, k, k) or (CO, CI)", weight)
        check(weight.numel() > 0 and E > 0, "weight", "at least one member and one element", weight)
        CO, CI = weight.shape[:2]
        check((layer.rho_r is None) == (layer.rho_s is None), "rho_r, rho_s", "both or neither", "one")
        vectors = [("rho_r", layer.rho_r, (E, CI)), ("rho_s", layer.rho_s, (E, CO)), ("bias", layer.bias, (CO,))]
        for name, norm in (("norm", layer.norm), ("second", layer.second)):
            vectors += [] if norm is None else [(f"{name}'s {f}", getattr(norm, f), (CO,)) for f in norm._fields[:4]]
        for name, v, shape in vectors:
            if v is not None:
                fits = v.shape == shape and v.is_contiguous() and v.dtype == torch.float32 and v.device == weight.device
                check(fits, name, f"contiguous fp32 {shape} beside W", v)


# ---- tables --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows (kh, kw, ci) and columns (co) of W that a program takes."""

    BLOCK_R: int
    BLOCK_O: int
    NARROW_R: int
    """Rows where accesses must be narrow: such layers are small, and few programs would take long over their splits."""

    def count(self, layer: Layer) -> int:
        """Count the programs over `layer`."""
        return self.rows(layer) * self.columns(layer)

    def rows(self, layer: Layer) -> int:
        """Count the tiles over the rows of its W."""
        return cdiv(layer.weight[0].numel(), self.BLOCK_R if is_aligned(layer) else self.NARROW_R)

    def columns(self, layer: Layer) -> int:
        """Count the tiles over the columns of its W."""
        return cdiv(layer.weight.shape[0], self.BLOCK_O)


def tile_of(networks: Sequence[Network]) -> Tile:
    """Choose the tile of a launch over these layers; the interpreter's is so large that programs are few."""
    if not INTERPRETED:
        return Tile(16, 64, 8)
    layers = [layer for _, _, layer in all_layers(networks)]
    tile = Tile(32, min(power_of_2(max(len(layer.weight) for layer in layers)), 512), 32)
    most = max(MAX_INTERPRETED_PROGRAMS, len(layers))
    while sum(map(tile.count, layers)) > most and 2 * tile.BLOCK_R * tile.BLOCK_O <= MAX_TILE:
        tile = tile._replace(BLOCK_R=2 * tile.BLOCK_R, NARROW_R=2 * tile.NARROW_R)
    return tile


class Table(NamedTuple):
    """Table on the device in which the programs of a pass look up their layer and tile."""

    tile: Tile
    """Rows and columns of W that a program takes."""
    rows: Tensor
    """Addresses, sizes and places, int64 (layers, fields)."""
    programs: dict[int, Tensor]
    """Row and tile of each program, int32 (programs, 2), for each order in memory."""
    strides: list[tuple[int, ...]]
    """Strides of each weight, as kernels read it."""
    copies: tuple[list[Tensor], list[Tensor]]
    """Dense copies of weights that lie in no order that kernels read, and those weights; most networks have none."""

    def launch(self, kernel: Any, *args: Any, E: int) -> None:
        """Launch `kernel` over every program, once for each order in memory; the copies are brought up to date."""
        if self.copies[0]:
            torch._foreach_copy_(*self.copies)
        tile = self.tile._asdict()
        for order, programs in self.programs.items():
            launch(kernel, (len(programs),), programs, self.rows, *args, E=E, ORDER=order, **tile, num_warps=4)


Tables = dict[Any, Any]
"""Tables of one owner's launches, keyed by the addresses that are in them. A parameter that was replaced by another
has another address and gets another table; in a captured graph nothing may be replaced."""


T = TypeVar("T")


def cached(
    tables: Tables | None, kind: str, networks: Sequence[Network], E: int, make: Callable[[], T], *more: Any
) -> T:
    """Look up the tables of `networks`; check the layers and `make` them if there are none yet.

    Looking up costs some 0.1 µs a tensor. Without `tables` they are made anew.
    """
    tables = {} if tables is None else tables
    key = (kind, E, *more, *_addresses(networks))
    if key not in tables:
        check_layers(networks, E)
        tables[key] = make()
    found: T = tables[key]
    return found


def _addresses(networks: Sequence[Network]) -> Iterator[Any]:
    for network in networks:
        for weight, rho_r, rho_s, bias, norm, second in network:
            yield weight.data_ptr(), weight.stride(), weight.device
            for v in (rho_r, rho_s, bias, *(norm or ()), *(second or ())):
                yield address(v) if v is None or isinstance(v, Tensor) else v


def address(v: Tensor | None) -> int:
    """Address of a tensor; 0 where there is none."""
    return 0 if v is None else v.data_ptr()


def make_table(
    layers: Sequence[Layer], tile: Tile, row: Callable[[int, Tensor], Sequence[int]], work: Sequence[int]
) -> Table:
    """Make a table of `row(i, weight)` for every layer, and programs in the order of the `work` of a tile, most first.

    `row` is given the weight as kernels read it: itself, or a dense copy.
    """
    weights = [layer.weight for layer in layers]
    orders = [_orders(weight) for weight in weights]
    counts = Counter(order for some in orders for order in some)
    dense = [weight if some else weight.contiguous() for weight, some in zip(weights, orders, strict=True)]
    places: dict[int, list[tuple[int, int]]] = {}
    for i in sorted(range(len(weights)), key=lambda i: -work[i]):  # the longest must not start last
        order = max(orders[i], key=counts.__getitem__, default=TAPS_INNER)
        places.setdefault(order, []).extend((i, i_tile) for i_tile in range(tile.count(layers[i])))
    rows = torch.tensor([row(i, weight) for i, weight in enumerate(dense)], dtype=torch.int64)
    device = weights[0].device
    copies = [(copy, weight) for copy, weight in zip(dense, weights, strict=True) if copy is not weight]
    return Table(
        tile,
        rows.to(device),
        {order: torch.tensor(some, dtype=torch.int32).to(device) for order, some in places.items()},
        [weight.stride() for weight in dense],
        ([copy for copy, _ in copies], [weight.detach() for _, weight in copies]),
    )


def _orders(weight: Tensor) -> list[int]:
    w_OIKK = as_conv(weight)
    permuted = {CHANNELS_LAST: (0, 2, 3, 1), TAPS_INNER: (0, 1, 2, 3), CO_FASTEST: (2, 3, 1, 0)}
    return [order for order, axes in permuted.items() if w_OIKK.permute(axes).is_contiguous()]


def is_aligned(layer: Layer) -> bool:
    """Tell whether channels and addresses are all multiples of 16, so that accesses may be wide."""
    CO, CI = layer.weight.shape[:2]
    vectors = (*layer[:4], *(layer.norm or ())[:4], *(layer.second or ())[:4])
    return CI % 16 == 0 and CO % 16 == 0 and all(address(v) % 16 == 0 for v in vectors)


# ---- in kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def number(p_row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A size in a table's row, which is a multiple of 16 with ALIGNED."""
    n = tl.load(p_row + FIELD).to(tl.int32)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    return n


@triton.jit
def place(p_row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A place in a buffer; a negative one stands for nothing."""
    n = tl.load(p_row + FIELD)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    return n


@triton.jit
def pointer(p_row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A parameter's address as a pointer to fp32; maybe to nothing."""
    p = tl.load(p_row + FIELD).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def rows_of(i_row, CI, TAPS, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of W in its own memory order: their number in W, input channel, row (kh, kw, ci) of w."""
    o_row = i_row + tl.arange(0, BLOCK)
    if ORDER == 1:  # TAPS_INNER
        o_ci = o_row // TAPS
        o_tap_ci = o_row % TAPS * CI + o_ci
    else:
        o_ci = o_row % CI
        o_tap_ci = o_row
    return o_row, o_ci, o_tap_ci


@triton.jit
def offsets_in_weight(o_row, o_co, ROWS, CO, ORDER: tl.constexpr):
    """Where a tile of rows and columns lies in W."""
    if ORDER == 2:  # CO_FASTEST
        return o_row[:, None] * CO + o_co[None, :]
    return o_co[None, :] * ROWS + o_row[:, None]
