"""The form of `member_conv` and its input gradient with a producer warp: its source run by an emulator, its tiles.

It is Gluon, which Triton does not interpret. `gluon_emulator` runs partitions, barriers, copies and products in drawn
orders; what the compiler makes of it is in test_aot.py, and a GPU runs the cases marked `gpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_checks import check_forward, check_gradient, make

from ensdistill.engine.launch_key import Key
from ensdistill.engine.tuning.candidates import candidates
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.arguments import ForwardOptions
from ensdistill.kernels.conv.forward import choose_tile, member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.tiles import PERSISTENT, Tile, persistent_rings
from ensdistill.kernels.epilogue import pack_bits_ref
from ensdistill.kernels.launch import recording

if tiles.persistent_missing():
    pytest.skip(tiles.persistent_missing(), allow_module_level=True)

from gluon_emulator import Deadlock, emulate

from ensdistill.kernels.conv.forms import persistent

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
TWO, ONE = Tile(PERSISTENT, 256, 128, 64, 8, 2), Tile(PERSISTENT, 128, 64, 64, 4, 2)
CPU = torch.device("cpu")
bf16 = torch.bfloat16

SHAPES = [
    # M, B, H, W, read, columns, k, tile
    (2, 3, 2, 5, 16, 24, 3, ONE),  # one column beyond the image, few images and channels
    (1, 70, 1, 3, 72, 72, 3, ONE),  # two boxes of images, two blocks of channels, two of columns with a rest
    (1, 2, 3, 9, 64, 136, 3, TWO),  # two warpgroups, three boxes of columns
    (3, 5, 2, 4, 200, 64, 1, TWO._replace(BLOCK_N=64, num_stages=4)),  # one tap
    (1, 64, 2, 4, 128, 128, 3, TWO._replace(num_stages=3)),  # nothing to mask
]
CASES = pytest.mark.parametrize("shape", SHAPES, ids=str)


@contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch, programs: int = 2, **options: Any) -> Iterator[None]:
    """Launches run in the emulator, as of a GPU of that many multiprocessors, so that programs have many tiles each."""
    monkeypatch.setattr(persistent, "multiprocessors", lambda device: programs)
    seed = options.pop("seed", 0)
    with recording(lambda *launch: emulate(*launch, seed=seed, **options)):
        yield


def everything_forward(shape: Any, device: torch.device) -> None:
    M, B, H, W, read, columns, k, tile = shape
    out = (M, B, H, W, columns)
    check_forward(
        make((M, B, H, W, read), bf16, device),
        make((M, k, k, read, columns), bf16, device, 0.2),
        tile,
        bias=make((M, columns), torch.float32, device),
        residual=make(out, bf16, device),
        relu=True,
        second=(make((M, columns), torch.float32, device), make((M, columns), torch.float32, device)),
        sums=True,
        bits=1,
    )


def everything_gradient(shape: Any, device: torch.device) -> None:
    M, B, H, W, read, columns, k, tile = shape
    out = (M, B, H, W, columns)
    check_gradient(
        make((M, B, H, W, read), bf16, device),
        make((M, k, k, columns, read), bf16, device, 0.2),
        tile,
        before=make(out, bf16, device),
        bits=pack_bits_ref(make(out, bf16, device)),
        norm=(make(out, bf16, device), *(make((M, columns), torch.float32, device) for _ in range(2))),
        scale=make((M, columns), torch.float32, device),
        after=make(out, bf16, device),
    )


@CASES
def test_emulated_plain(shape, monkeypatch):
    M, B, H, W, read, columns, k, tile = shape
    x = make((M, B, H, W, read), bf16, CPU)
    with emulated(monkeypatch, programs=1):
        check_forward(x, make((M, k, k, read, columns), bf16, CPU, 0.2), tile)
        check_gradient(x, make((M, k, k, columns, read), bf16, CPU, 0.2), tile)


@CASES
def test_emulated_with_everything(shape, monkeypatch):
    with emulated(monkeypatch, programs=3, seed=1):
        everything_forward(shape, CPU)
        everything_gradient(shape, CPU)


@pytest.mark.parametrize("name", ["relu", "residual", "z alone", "sums", "bits", "fp32 out"])
def test_emulated_forward_options_alone(name, monkeypatch):
    M, B, H, W, read, columns, k, tile = SHAPES[0]
    options: dict[str, Any] = {
        "relu": {"relu": True},
        "residual": {"residual": make((M, B, H, W, columns), bf16, CPU)},
        "z alone": {"second": (make((1, columns), torch.float32, CPU),) * 2, "keep_y": False},
        "sums": {"sums": True},
        "bits": {"bits": M},
        "fp32 out": {"out_dtype": torch.float32},
    }
    x, w = make((M, B, H, W, read), bf16, CPU), make((M, k, k, read, columns), bf16, CPU, 0.2)
    with emulated(monkeypatch):
        check_forward(x, w, tile, **options[name])


@pytest.mark.parametrize("name", ["before", "bits", "norm", "scale", "after"])
def test_emulated_gradient_options_alone(name, monkeypatch):
    M, B, H, W, read, columns, k, tile = SHAPES[0]
    like = make((M, B, H, W, columns), bf16, CPU)
    vectors = [make((1, columns), torch.float32, CPU) for _ in range(2)]
    value: dict[str, Any] = {"bits": pack_bits_ref(like), "norm": (like, *vectors), "scale": vectors[0]}
    with emulated(monkeypatch):
        dy, w = make((M, B, H, W, read), bf16, CPU), make((M, k, k, columns, read), bf16, CPU, 0.2)
        check_gradient(dy, w, tile, **{name: value.get(name, like)})


@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
def test_emulated_members_are_read_on_the_device(shared, monkeypatch):
    E, M, (_, B, H, W, read, columns, k, tile) = 3, 4, SHAPES[0]
    members = torch.tensor([2, 0, 2, 1])
    x = make((B, H, W, read) if shared else (M, B, H, W, read), bf16, CPU)
    bias = make((E, columns), torch.float32, CPU)
    with emulated(monkeypatch):
        w = make((E, k, k, read, columns), bf16, CPU, 0.2)
        check_forward(x, w, tile, members=members, bias=bias, sums=True, bits=2)
        if not shared:
            w = make((E, k, k, columns, read), bf16, CPU, 0.2)
            check_gradient(x, w, tile, members=members, scale=bias)


@pytest.mark.parametrize("seed", range(8))
def test_emulated_in_many_orders(seed, monkeypatch):
    M, B, H, W, read, columns, k, tile = 1, 2, 2, 5, 128, 64, 3, TWO._replace(BLOCK_N=64)
    with emulated(monkeypatch, programs=1, seed=seed):
        x, w = make((M, B, H, W, read), bf16, CPU), make((M, k, k, read, columns), bf16, CPU, 0.2)
        check_forward(x, w, tile)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_outstanding=2", "num_outstanding=4"),  # tiles given back while they are read
        ("num_outstanding=0", "num_outstanding=2"),  # sums taken before the last product
        ("mbarrier.wait(w_full", "(lambda *_: None)(w_full"),  # weights read before they came
        ("mbarrier.wait(x_full", "(lambda *_: None)(x_full"),
        ("mbarrier.wait(w_empty", "(lambda *_: None)(w_empty"),  # overwritten while they are read
        ("mbarrier.wait(x_empty", "(lambda *_: None)(x_empty"),
        ("(i_step // X_STAGES & 1) ^ 1", "i_step // X_STAGES & 1"),  # the first round waits for a second
        ("pred=i_row > 0", "pred=True"),  # given back twice
        ("2 * BLOCK_N * BLOCK_K)", "4 * BLOCK_N * BLOCK_K)"),  # bytes that never come
        ("2 * BLOCK_N * BLOCK_K)", "BLOCK_N * BLOCK_K)"),  # a phase over before all bytes came
        ("count=CONSUMERS", "count=1"),  # given back by the first of two that read
        ("X_STAGES * (TW + K - 1), 1", "0 * X_STAGES + TW + K - 1, 1"),
    ],
)  # fmt: skip
def test_a_wrong_protocol_is_found(old, new, monkeypatch):
    x, w = make((1, 2, 2, 5, 128), bf16, CPU), make((1, 3, 3, 128, 64), bf16, CPU, 0.2)

    def fails(seed: int) -> bool:
        tile = TWO._replace(num_stages=2 + seed % 2)  # with three, weights have fewer stages than three rows of taps
        with emulated(monkeypatch, programs=1, seed=seed, edits={old: new}):
            try:
                check_forward(x, w, tile)
            except AssertionError:
                return True
        return False

    assert any(fails(seed) for seed in range(8))


@pytest.mark.parametrize("name", ["X_STAGES", "W_STAGES"])
def test_rings_of_one_stage_would_deadlock(name, monkeypatch):
    M, B, H, W, read, columns, k, tile = SHAPES[0]
    monkeypatch.setattr(persistent, "multiprocessors", lambda device: 1)
    x, w = make((M, B, H, W, read), bf16, CPU), make((M, k, k, read, columns), bf16, CPU)
    with (
        pytest.raises(Deadlock),
        recording(lambda kernel, grid, args, options: emulate(kernel, grid, args, {**options, name: 1}, seed=0)),
    ):
        member_conv(x, w, tile=tile)


ON_A_GPU = [
    (4, 128, 16, 16, 128, 128, 3, TWO),
    (4, 128, 16, 16, 128, 128, 3, TWO._replace(num_stages=3)),
    (4, 128, 8, 8, 256, 256, 3, TWO),
    (4, 128, 8, 8, 256, 256, 3, TWO._replace(BLOCK_M=128, num_warps=4)),
    (4, 128, 32, 32, 64, 64, 3, TWO._replace(BLOCK_N=64)),
    (4, 128, 32, 32, 64, 64, 3, ONE),
    (4, 128, 16, 16, 64, 128, 1, TWO._replace(num_stages=4)),
    (3, 100, 7, 9, 72, 200, 3, TWO),
    (2, 63, 5, 3, 136, 72, 3, ONE),
    (1, 1, 1, 1, 64, 64, 3, TWO),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ON_A_GPU, ids=str)
def test_on_a_gpu(shape, device):
    if PERSISTENT not in tiles.limits(device)[1]:
        pytest.skip("compute capability 9.0 has the instructions of this form")
    M, B, H, W, read, columns, k, tile = shape
    x = make((M, B, H, W, read), bf16, device)
    check_forward(x, make((M, k, k, read, columns), bf16, device, 0.2), tile)
    check_gradient(x, make((M, k, k, columns, read), bf16, device, 0.2), tile)
    everything_forward(shape, device)
    everything_gradient(shape, device)


@pytest.fixture
def compiled_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles as a GPU of 9.0 has them, not the interpreter's."""
    for cached in (tiles.forward_tiles, tiles.input_gradient_tiles):
        cached.cache_clear()
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    yield
    for cached in (tiles.forward_tiles, tiles.input_gradient_tiles):
        cached.cache_clear()


def forms_of(key: Key) -> list[int]:
    return [one.tile[0] for one in candidates(key, CPU) if one.provider == "triton"]


@pytest.mark.usefixtures("compiled_tiles")
@pytest.mark.parametrize("layer", [(16, 128, 3), (8, 256, 3), (32, 64, 3), (16, 128, 1)], ids=str)
def test_a_candidate_and_never_the_default(layer):
    W, C, k = layer
    key = Key(
        op="forward", E=4, M=4, B=128, H=W, W=W, CI=C, CO=C, k=k, stride=1, dtype="bf16", out_dtype="bf16"
    )  # fmt: skip
    for op in ("forward", "input gradient"):
        forms = forms_of(replace(key, op=op))
        assert PERSISTENT in forms and forms[0] != PERSISTENT
        for other in ({"stride": 2}, {"dtype": "fp32"}, {"CO": 32}, {"B": 8}):
            assert PERSISTENT not in forms_of(replace(key, op=op, **other)), other
    assert PERSISTENT not in forms_of(replace(key, present=("prologue",)))
    assert PERSISTENT not in forms_of(replace(key, op="input gradient", shared=True))
    x = torch.empty(4, 128, W, W, C, dtype=bf16, device="meta")
    w = torch.empty(4, k, k, C, C, dtype=bf16, device="meta")
    assert choose_tile(x, w, ForwardOptions()).form != PERSISTENT
    assert "triton persistent 256x" in " ".join(map(str, candidates(key, CPU)))


def test_fewer_images_or_channels_than_a_tile_are_left_out():
    assert tiles.persistent_tiles(128, 16, 32, 128, 3) == [] == tiles.persistent_tiles(128, 16, 128, 32, 3)
    assert tiles.persistent_tiles(40, 16, 128, 128, 3) == [] and tiles.persistent_tiles(100, 16, 128, 128, 3) != []
    assert {tile.BLOCK_N for tile in tiles.persistent_tiles(128, 16, 160, 160, 3)} == {64}
    assert [tile.BLOCK_M for tile in tiles.persistent_tiles(128, 2, 64, 64, 3)] == [128]


def test_rings_fit_the_shared_memory():
    for k in (1, 3):
        for tile in tiles.persistent_tiles(128, 32, 64, 64, k) + tiles.persistent_tiles(128, 32, 128, 128, k):
            programs = tiles.persistent_programs(tile)
            x_stages, w_stages = persistent_rings(tile, k)
            row = 2 * 64 * 64 * (tile.BLOCK_M // 64 + k - 1)
            taken = x_stages * row + w_stages * 2 * 64 * tile.BLOCK_N + tiles.PERSISTENT_SCRATCH * tile.num_warps // 4
            assert programs * (taken + 1024) <= tiles.SHARED_PER_MULTIPROCESSOR and taken <= tiles.SHARED_LIMIT[90]
            assert min(x_stages, w_stages) >= 2
    assert persistent_rings(TWO, 3) == (2, 6) and persistent_rings(TWO._replace(num_stages=3), 3) == (3, 4)


@pytest.mark.parametrize(
    ("options", "tile", "message"),
    [
        ({}, Tile(PERSISTENT, 64, 64, 64, 4, 2), "PERSISTENT 256"),
        ({}, Tile(PERSISTENT, 256, 64, 64, 4, 2), "PERSISTENT 256"),
        ({}, Tile(PERSISTENT, 256, 128, 64, 8, 5), "two stages of each ring"),
        ({}, Tile(PERSISTENT, 256, 128, 64, 8, 1), "two stages of each ring"),
        ({"stride": 2}, TWO, "a stride of 2"),
        ({"prologue": (torch.ones(1, 64), torch.ones(1, 64))}, TWO, "a prologue"),
        ({"dtype": torch.float32}, TWO, "bfloat16"),
        ({"read": 12}, TWO, "POINTERS"),
    ],
)
def test_tiles_that_do_not_fit(options, tile, message):
    options = dict(options)
    dtype, read = options.pop("dtype", bf16), options.pop("read", 64)
    with pytest.raises(ValueError, match=message), recording(lambda *launch: None):
        member_conv(make((1, 1, 8, 8, read), dtype, CPU), make((1, 3, 3, read, 64), dtype, CPU), tile=tile, **options)


def test_a_triton_without_gluon_is_told_and_has_no_such_candidate(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensdistill.kernels.conv.forms.persistent", None)
    tiles.persistent_missing.cache_clear()
    try:
        with pytest.warns(UserWarning, match="PERSISTENT form are left out"):
            assert "has no Gluon as it is needed" in tiles.persistent_missing()
        assert PERSISTENT not in tiles.limits(CPU)[1]
    finally:
        tiles.persistent_missing.cache_clear()


def test_recorded_on_meta():
    x = torch.empty(4, 128, 16, 16, 128, dtype=bf16, device="meta")
    w = torch.empty(4, 3, 3, 128, 128, dtype=bf16, device="meta")
    launches: list[Any] = []
    with recording(lambda *launch: launches.append(launch)):
        for tile in (TWO, TWO._replace(BLOCK_M=128, num_warps=4)):
            sums = member_conv(x, w, sums=True, tile=tile).sums
            member_conv_input_gradient(x, w, size=(16, 16), tile=tile)
            assert sums is not None and sums.shape == (4, 256, 2, 128)
    assert [grid for _, grid, _, _ in launches] == [(132,), (132,), (264,), (264,)]
    assert [options["maxnreg"] for *_, options in launches] == [168, 168, 128, 128]
    assert all(options["num_warps"] == 4 for *_, options in launches)
