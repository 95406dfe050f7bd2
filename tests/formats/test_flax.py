"""Official checkpoints: Flax's own file is read, names and layouts go there and back, foreign files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from ensdistill.formats.flax import (
    find_variables,
    flatten,
    official_from_state_dict,
    read_flax_checkpoint,
    wide_resnet_from_official,
)
from ensdistill.models import Classifier, build
from ensdistill.models.wide_resnet import WideResNet
from ensdistill.runtime.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
RUNS = ("sgd", "kd", "latentbe", "latentbe_tdiv_sdiv")
FLAX_FILE = GOLDEN / "official_teacher0.msgpack"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "official_wrn10x1_m4.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def pack_array(value: Any) -> bytes:
    value = np.asarray(value)
    return msgpack.packb((value.shape, value.dtype.name, value.tobytes("C")), use_bin_type=True)


def to_bytes(tree: Any) -> bytes:
    """What flax.serialization.to_bytes writes for nested dicts of arrays."""

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return msgpack.ExtType(1, pack_array(value))
        if isinstance(value, np.generic):
            return msgpack.ExtType(3, pack_array(value))
        if isinstance(value, complex):
            return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))
        raise TypeError(type(value))

    return msgpack.packb(tree, default=encode, strict_types=True)


def random_state_dict(network: torch.nn.Module, seed: int, E: int = 0) -> dict[str, torch.Tensor]:
    """Every entry moved off its start; with E, factors beside each conv and linear weight."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        state_dict[key] = torch.rand(value.shape, generator=generator) + 0.25
        if E and key.endswith(".weight") and (value.ndim == 4 or key == "linear.weight"):
            for factor, channels in (("rho_r", value.shape[1]), ("rho_s", value.shape[0])):
                # Multiples of 2^-20 in ±½: there 1 + ρ and r − 1 are exact.
                bits = torch.randint(-(2**19), 2**19, (E, channels), generator=generator)
                state_dict[key.replace("weight", factor)] = bits / 2**20
    return state_dict


# ------------------------------------------------------------------------------------------------ reading Flax's files


def test_reads_what_flax_wrote(golden: dict[str, np.ndarray]) -> None:
    tree = read_flax_checkpoint(FLAX_FILE)
    assert tree["step"] == 0
    extra = tree["extra"]
    assert (extra["best_acc1"], extra["z"], extra["note"], extra["none"]) == (0.625, 1.5 - 2j, "any", None)
    assert extra["rng"].dtype == np.uint32 and extra["rng"].tolist() == [0, 3]

    variables = find_variables(tree)
    truth = below(golden, "teacher0/params/")
    assert variables.params.keys() == truth.keys()
    rounded = 0
    for name, value in variables.params.items():
        assert value.dtype == np.float32
        if name.startswith("backbone/BasicBlock_2/") and value.ndim == 4:  # bfloat16 in the file
            expected = torch.from_numpy(truth[name]).bfloat16().float().numpy()
            rounded += 1
        else:
            expected = truth[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert rounded == 3
    truth = below(golden, "teacher0/batch_stats/")
    assert variables.stats.keys() == truth.keys()
    assert all(np.array_equal(variables.stats[name], truth[name]) for name in truth)
    assert variables.pixel_mean == pytest.approx(golden["pixel_mean"].tolist())
    assert variables.pixel_std == pytest.approx(golden["pixel_std"].tolist())


def official_log_probs(params: dict[str, Any], stats: dict[str, Any], golden: dict[str, np.ndarray]) -> np.ndarray:
    name, num_classes, in_channels, state_dict = wide_resnet_from_official(params, stats)
    network = build(name, num_classes=num_classes, in_channels=in_channels, image_size=32)
    network.load_state_dict(state_dict)
    classifier = Classifier(network, golden["pixel_mean"].tolist(), golden["pixel_std"].tolist()).eval()
    with torch.inference_mode():
        x_BCHW = torch.from_numpy(golden["images"][0]).permute(0, 3, 1, 2)
        return classifier(x_BCHW).log_softmax(-1).numpy()


def test_networks_classify_as_in_the_official_code(golden: dict[str, np.ndarray]) -> None:
    expected = golden["teacher_log_confidences_clean"][0]
    for t in range(4):
        params, stats = below(golden, f"teacher{t}/params/"), below(golden, f"teacher{t}/batch_stats/")
        np.testing.assert_allclose(official_log_probs(params, stats, golden), expected[t], atol=5e-5)
    variables = find_variables(read_flax_checkpoint(FLAX_FILE))
    # Three of its layers were rounded to bfloat16: 0.02 away; another teacher is 17 away.
    np.testing.assert_allclose(official_log_probs(variables.params, variables.stats, golden), expected[0], atol=0.05)


def test_every_dtype_round_trips(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {
        name: (rng.normal(size=(3, 1, 5)) * 9).astype(name)
        for name in ("bool", "int8", "int64", "uint16", "float16", "float32", "float64")
    }
    tree["empty"] = np.empty((0, 4), np.float32)
    tree["scalar"] = np.float64(rng.normal())
    (tmp_path / "x").write_bytes(to_bytes({"deep": tree}))
    read = read_flax_checkpoint(tmp_path / "x")["deep"]
    assert read.keys() == tree.keys()
    for name, value in tree.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_unknown_leaves_are_left_out_of_flat_names() -> None:
    flat = flatten({"a": {"b": np.arange(3), "c": "text", "d": None}, "e": 2})
    assert flat.keys() == {"a/b", "e"} and flat["a/b"].tolist() == [0, 1, 2] and flat["e"] == 2


def array_ext(*parts: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(parts))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": array_ext([3], "float32", b"1234")}, r"shape \(3,\) and type float32 with 4 bytes"),
        ({"a": array_ext([-1], "float32", b"1234")}, "shape is no list of sizes"),
        ({"a": array_ext([0, 2**63], "int8", b"")}, ""),
        ({"a": array_ext([0, 2**64 - 1], "int8", b"")}, ""),
        ({"a": array_ext([1], "object", b"12345678")}, "unknown type 'object'"),
        ({"a": array_ext([1], "float32")}, "not enough values to unpack"),
        ({"a": array_ext([1], 7, b"1234")}, "without its type or its bytes"),
        ({"a": msgpack.ExtType(9, b"x")}, "unknown msgpack extension type 9"),
        ({"a": {"__msgpack_chunked_array__": True}}, "without its shape"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": 3}}}, "without its chunks"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": 3}}}, "without its chunks"),
        (
            {
                "a": {
                    "__msgpack_chunked_array__": True,
                    "shape": {"0": 3},
                    "chunks": {"0": array_ext([2], "int8", b"ab")},
                }
            },
            "cannot reshape",
        ),
        ([1, 2], "it holds a list, not a map"),
        ({1: 2}, "int is not allowed for map key"),
        ({"a": "x" * 70_000}, "exceeds max_str_len"),
    ],
)
def test_foreign_or_broken_content_is_refused(tmp_path: Path, tree: Any, message: str) -> None:
    path = tmp_path / "ckpt"
    path.write_bytes(msgpack.packb(tree))
    with pytest.raises(UserError, match=f"ckpt: no whole Flax checkpoint .*{message}") as caught:
        read_flax_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = FLAX_FILE.read_bytes()
    for size in (0, 1, 30, 57, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "x").write_bytes(data[:size])
        with pytest.raises(UserError, match="no whole Flax checkpoint"):
            read_flax_checkpoint(tmp_path / "x")
    (tmp_path / "x").write_bytes(data + b"\x01")
    with pytest.raises(UserError, match="extra data"):
        read_flax_checkpoint(tmp_path / "x")


def test_corrupt_bytes_give_a_tree_or_a_user_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    data = bytearray(to_bytes({"params": {"w": rng.normal(size=(2, 3)), "n": 1 + 2j, "s": np.float32(3)}, "step": 4}))
    refused = 0
    for _ in range(400):
        corrupt = data.copy()
        for place in rng.integers(len(data), size=2):
            corrupt[place] = rng.integers(256)
        (tmp_path / "x").write_bytes(corrupt)
        try:
            assert isinstance(read_flax_checkpoint(tmp_path / "x"), dict)
        except UserError:
            refused += 1
    assert 80 < refused < 400


def test_deep_nesting_is_refused_and_not_followed(tmp_path: Path) -> None:
    for depth in (100, 100_000):
        (tmp_path / "x").write_bytes(b"\x81\xa1a" * depth + b"\x80")
        with pytest.raises(UserError, match="no whole Flax checkpoint"):
            read_flax_checkpoint(tmp_path / "x")


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x01" * 99)
    with pytest.raises(UserError, match="exceeds max_array_len"):
        read_flax_checkpoint(tmp_path / "x")


def test_missing_huge_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot be read \(No such file"):
        read_flax_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        read_flax_checkpoint(tmp_path)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate((4 << 30) + 1)  # sparse: takes no room
    with pytest.raises(UserError, match="huge: larger than 4 GiB"):
        read_flax_checkpoint(tmp_path / "huge")


# ------------------------------------------------------------------------------------------- finding the network in it


def plain_tree(golden: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    return nest(below(golden, "teacher1/params/")), nest(below(golden, "teacher1/batch_stats/"))


@pytest.mark.parametrize("place", ["top", "model", "twice", "model_state", "beside an average"])
def test_network_is_found_wherever_it_is_nested(golden: dict[str, np.ndarray], place: str) -> None:
    params, stats = plain_tree(golden)
    other = nest(below(golden, "teacher2/params/"))
    trees: dict[str, dict[str, Any]] = {
        "top": {"step": 3, "params": params, "batch_stats": stats, "opt_state": {"0": {"trace": params}}},
        "model": {"model": {"params": params, "batch_stats": stats}, "epoch": 7},
        "twice": {"params": {"params": params, "batch_stats": stats}},
        "model_state": {"params": params, "model_state": {"batch_stats": stats}},
        "beside an average": {"params": params, "batch_stats": stats, "ema": {"params": other, "batch_stats": {}}},
    }
    variables = find_variables(trees[place])
    truth = below(golden, "teacher1/params/")
    assert variables.params.keys() == truth.keys()
    assert all(np.array_equal(variables.params[key], truth[key]) for key in truth)
    assert variables.stats.keys() == below(golden, "teacher1/batch_stats/").keys()
    assert variables.pixel_mean is None and variables.pixel_std is None


def test_axis_of_devices_is_removed(golden: dict[str, np.ndarray]) -> None:
    params, stats = below(golden, "teacher1/params/"), below(golden, "teacher1/batch_stats/")
    replicated = {key: np.stack([value, value]) for key, value in params.items()}
    apart = {key: np.stack([value + 1, value - 1]) for key, value in stats.items()}
    images = {"m": np.tile(golden["pixel_mean"], (2, 1)), "s": np.tile(golden["pixel_std"], (2, 1))}
    variables = find_variables({"params": nest(replicated), "batch_stats": nest(apart), "image_stats": images})
    assert all(np.array_equal(variables.params[key], params[key]) for key in params)
    assert all(np.allclose(variables.stats[key], stats[key], atol=1e-5) for key in stats)
    assert variables.pixel_mean == pytest.approx(golden["pixel_mean"].tolist())
    assert wide_resnet_from_official(variables.params, variables.stats).name == "wrn10x1"


def test_no_network_two_networks_no_statistics(golden: dict[str, np.ndarray]) -> None:
    params, stats = plain_tree(golden)
    with pytest.raises(UserError, match=r"f: no params/backbone in it, found encoder, step; expected"):
        find_variables({"encoder": {"w": np.ones(3)}, "step": 1}, "f")
    with pytest.raises(UserError, match="found nothing"):
        find_variables({}, "f")
    with pytest.raises(UserError, match=r"f: more than one network in it \(a/params, b/params\)"):
        find_variables({"a": {"params": params, "batch_stats": stats}, "b": {"params": params}}, "f")
    with pytest.raises(UserError, match="f: no a/batch_stats beside a/params"):
        find_variables({"a": {"params": params}}, "f")


# ------------------------------------------------------------------------------------------------------ names, layouts


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_golden_runs_go_there_and_back(golden: dict[str, np.ndarray], run: str, when: str) -> None:
    arrays = below(golden, f"{run}/{when}/")
    name, num_classes, in_channels, state_dict = wide_resnet_from_official(
        below(arrays, "params/"), below(arrays, "batch_stats/")
    )
    assert (name, num_classes, in_channels) == ("wrn10x1", 10, 3)
    factors = {key for key in state_dict if key.rpartition(".")[2] in ("rho_r", "rho_s")}
    # stem, 6 convs of 3 blocks, 2 shortcuts, linear
    assert len(factors) == (2 * 10 if run.startswith("latentbe") else 0)
    assert all(len(state_dict[key]) == 4 for key in factors)
    back = official_from_state_dict(state_dict)
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        assert back[key].dtype == np.float32 and back[key].flags.c_contiguous
        # r − 1 loses the last bit of an r below ½.
        np.testing.assert_allclose(
            back[key], value, rtol=0, atol=2**-24 if key[-2:] in ("/r", "/s") else 0, err_msg=key
        )


@pytest.mark.parametrize("E", [0, 3])
@pytest.mark.parametrize(("depth", "width", "num_classes", "in_channels"), [(10, 2, 7, 1), (16, 1, 100, 3)])
def test_other_sizes_come_from_the_shapes(depth: int, width: int, num_classes: int, in_channels: int, E: int) -> None:
    network = WideResNet(depth, width, num_classes, in_channels)
    state_dict = random_state_dict(network, seed=depth, E=E)
    arrays = official_from_state_dict(state_dict)
    official = wide_resnet_from_official(nest(below(arrays, "params/")), nest(below(arrays, "batch_stats/")))
    assert official[:3] == (f"wrn{depth}x{width}", num_classes, in_channels)
    assert official.state_dict.keys() == state_dict.keys()
    assert all(torch.equal(official.state_dict[key], value) for key, value in state_dict.items())
    if not E:
        network.load_state_dict(official.state_dict)


def test_layers_without_factors_stay_plain() -> None:
    state_dict = random_state_dict(WideResNet(10, 1, 4), seed=3, E=2)
    del state_dict["linear.rho_r"], state_dict["linear.rho_s"]
    arrays = official_from_state_dict(state_dict)
    assert (
        "params/classifier/Linear_0/w" in arrays and "params/backbone/FirstBlock_0/Conv2d_BatchEnsemble_0/r" in arrays
    )
    read = wide_resnet_from_official(below(arrays, "params/"), below(arrays, "batch_stats/")).state_dict
    assert read.keys() == state_dict.keys()


def test_wide_types_are_kept_and_narrow_ones_widened() -> None:
    state_dict = random_state_dict(WideResNet(10, 1, 4), seed=5)
    wide = official_from_state_dict({key: value.double() for key, value in state_dict.items()})
    narrow = official_from_state_dict({key: value.bfloat16() for key, value in state_dict.items()})
    assert {value.dtype.name for value in wide.values()} == {"float64"}
    assert {value.dtype.name for value in narrow.values()} == {"float32"}
    assert max(np.abs(wide[key] - narrow[key]).max() for key in wide) < 2**-8


def drop(arrays: dict[str, Any], key: str) -> None:
    del arrays[key]


STEM, LINEAR = "params/backbone/FirstBlock_0/Conv2d_0/w", "params/classifier/Linear_0/w"
FIRST = "params/backbone/BasicBlock_0/Conv2d_0/w"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: drop(a, STEM), f"{STEM} is missing"),
        (lambda a: drop(a, LINEAR), f"{LINEAR} is missing"),
        (lambda a: drop(a, "params/classifier/Linear_0/b"), "params/classifier/Linear_0/b is missing"),
        (
            lambda a: drop(a, "batch_stats/backbone/LastBlock_0/BatchNorm2d_0/v"),
            "LastBlock_0/BatchNorm2d_0/v is missing",
        ),
        (lambda a: a.update({LINEAR: np.ones(3)}), rf"{LINEAR} has shape \(3,\), expected 2 axes"),
        (lambda a: a.update({LINEAR: np.ones((65, 10))}), rf"{LINEAR} has shape \(65, 10\), expected \(64, 10\)"),
        (
            lambda a: a.update({FIRST: np.ones((3, 3, 16, 24))}),
            "3 basic blocks, the first of 24 channels; expected 3 groups",
        ),
        (
            lambda a: a.update({FIRST: np.ones((3, 3, 16, 32))}),
            r"BatchNorm2d_1/w has shape \(16,\), expected \(32,\)",
        ),
        (lambda a: a.update({FIRST.replace("0/Conv2d", "7/Conv2d"): np.ones(3)}), "4 basic blocks"),
        (
            lambda a: a.update({"params/backbone/FirstBlock_0/BatchNorm2d_0/w": np.ones(16)}),
            "FirstBlock_0/BatchNorm2d_0/w not in a pre-activation WRN-10-1",
        ),
        (
            lambda a: a.update({f"params/backbone/BasicBlock_1/BottleNeck_{i}/w": np.ones(16) for i in range(5)}),
            "BottleNeck_2/w and 2 more not in",
        ),
    ],
)
def test_other_architectures_are_refused_by_name(golden: dict[str, np.ndarray], change: Any, message: str) -> None:
    arrays = below(golden, "teacher0/")
    change(arrays)
    with pytest.raises(UserError, match=f"^f: .*{message}") as caught:
        wide_resnet_from_official(below(arrays, "params/"), below(arrays, "batch_stats/"), "f")
    assert "\n" not in str(caught.value)


def test_members_that_differ_in_number_are_refused() -> None:
    arrays = official_from_state_dict(random_state_dict(WideResNet(10, 1, 4), seed=3, E=2))
    key = "params/classifier/Linear_BatchEnsemble_0/s"
    arrays[key] = np.concatenate([arrays[key], arrays[key]])
    with pytest.raises(UserError, match=rf"{key} has shape \(4, 4\), expected \(2, 4\)"):
        wide_resnet_from_official(below(arrays, "params/"), below(arrays, "batch_stats/"))
