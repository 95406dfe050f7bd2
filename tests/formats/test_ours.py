"""The exported file: what comes back, what other programs read, and every error message."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from ensdistill.formats import ours
from ensdistill.formats.ours import (
    DIGEST_KEY,
    FORMAT_KEY,
    NetworkInfo,
    is_safetensors,
    load_network,
    load_student,
    read_info,
    save_network,
    ship,
    student_path,
)
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.models.students import BatchEnsembleStudent
from ensdistill.runtime.errors import UserError

BUILDER = f"{__name__}:build_foreign"


def build_foreign(width: int, classes: int) -> nn.Module:
    """Somebody else's network, with tied weights and a weight that is not contiguous."""
    network = nn.Sequential(nn.Conv2d(2, width, 3), nn.Flatten(), nn.Linear(width * 3 * 5, classes))
    network.add_module("tied", nn.Identity())
    network.tied.weight = network[2].weight
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def info_of(**changes: Any) -> NetworkInfo:
    values: dict[str, Any] = {
        "architecture": "wrn10x1",
        "class_names": ("cat", "dog", "Käfer"),
        "image_shape": (5, 7, 2),
        "pixel_mean": (0.3, 0.6),
        "pixel_std": (0.2, 0.4),
        "method": "latentbe+tdiv-sdiv",
        "temperature": 1.37,
        "recipe": "digits",
        "measures": {"test_acc": 0.875, "test_nll": 0.4},
        "commit": "0123abcd",
        "versions": {"torch": "2.13.0"},
    }
    return NetworkInfo(**(values | changes))


def test_an_average_over_time_is_named_and_nothing_is_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_network(path, network_of(), info_of(averaged="EMA 0.999"))
    assert read_info(path) == info_of(averaged="EMA 0.999")
    assert read_info(path).trained_by == "latentbe+tdiv-sdiv, EMA 0.999"
    save_network(path, network_of(), info_of())
    with safe_open(path, framework="pt") as file:
        assert "averaged" not in file.metadata()
    assert read_info(path).averaged == "" and read_info(path).trained_by == "latentbe+tdiv-sdiv"


def network_of(seed: int = 3) -> nn.Module:
    """A WRN-10-1 with every parameter and statistic off its initial value, in evaluation mode."""
    network = build("wrn10x1", num_classes=3, in_channels=2, image_size=5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return network.eval()


def images(seed: int = 5) -> torch.Tensor:
    return torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "averaged.safetensors"
    save_network(path, network_of(), info_of())
    return path


def rewrite(path: Path, *, drop: str = "", tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    """Write the file again with other metadata or tensors, and no digest, as an earlier version did."""
    with safe_open(path, framework="pt") as opened:
        values = opened.metadata() | metadata
    values.pop(DIGEST_KEY, None)
    values.pop(drop, None)
    safetensors.torch.save_file(tensors or safetensors.torch.load_file(path), path, metadata=values)


def test_what_is_saved_comes_back(file: Path) -> None:
    classifier, info = load_network(file)
    assert info == info_of() == read_info(file)
    expected = Classifier(network_of(), (0.3, 0.6), (0.2, 0.4)).eval()
    assert torch.equal(classifier(images()), expected(images()))
    assert not classifier.training


def test_the_file_alone_fills_a_plain_network(file: Path) -> None:
    network = build("wrn10x1", num_classes=3, in_channels=2, image_size=5, seed=11)
    network.load_state_dict(safetensors.torch.load_file(file))
    assert torch.equal(network.eval()(images()), network_of()(images()))


def test_the_metadata_are_readable_json(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        raw = opened.metadata()
    values = {key: json.loads(value) for key, value in raw.items()}
    assert values[FORMAT_KEY] == 1
    assert (values["architecture"], values["arguments"]) == (
        "wrn10x1",
        {"num_classes": 3, "in_channels": 2, "image_size": 5},
    )
    assert values["class_names"] == ["cat", "dog", "Käfer"] and "Käfer" in raw["class_names"]
    assert (values["pixel_mean"], values["pixel_std"]) == ([0.3, 0.6], [0.2, 0.4])
    assert values["measures"] == {"test_acc": 0.875, "test_nll": 0.4}
    assert "(2, 5, 7) in [0, 1]" in values["prediction"] and "/ temperature" in values["prediction"]


def test_a_measure_that_does_not_exist_is_null_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_network(path, network_of(), info_of(measures={"dee": math.inf, "acc": 0.5}, temperature=None))
    with safe_open(path, framework="pt") as opened:
        assert json.loads(opened.metadata()["measures"]) == {"dee": None, "acc": 0.5}
        assert "temperature" not in json.loads(opened.metadata()["prediction"])
    info = read_info(path)
    assert math.isnan(info.measures["dee"]) and info.measures["acc"] == 0.5 and info.temperature is None


def test_an_ensemble_is_one_file_and_predicts_the_mean_of_probabilities(tmp_path: Path) -> None:
    members = [network_of(seed) for seed in (1, 2, 3)]
    path = tmp_path / "be.safetensors"
    save_network(path, MemberNetworks(members), info_of(method="be", members=3))
    assert set(safetensors.torch.load_file(path)) == {
        f"members.{m}.{k}" for m in range(3) for k in members[0].state_dict()
    }
    classifier, info = load_network(path)
    assert info.members == 3
    x = (images() - torch.tensor([0.3, 0.6]).view(2, 1, 1)) / torch.tensor([0.2, 0.4]).view(2, 1, 1)
    expected = torch.stack([member(x).softmax(dim=1) for member in members]).mean(dim=0)
    torch.testing.assert_close(classifier(images()).exp(), expected)


def test_a_foreign_network_is_built_by_the_function_that_the_caller_allows(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    network = build_foreign(4, 3)
    save_network(path, network, info_of(architecture=BUILDER, arguments={"width": 4, "classes": 3}))
    classifier, info = load_network(path, builder=BUILDER)
    assert info.arguments == {"width": 4, "classes": 3}
    assert torch.equal(classifier.network(images()), network(images()))
    for builder in (None, "os:system"):
        with pytest.raises(UserError, match=f"built by {BUILDER}, which is not part of ensdistill; give --builder"):
            load_network(path, builder=builder)


def test_a_file_that_names_any_function_does_not_call_it(file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    rewrite(file, architecture='"os:mkdir"', arguments=json.dumps({"path": str(victim)}))
    with pytest.raises(UserError, match="os:mkdir"):
        load_network(file)
    assert not victim.exists()


def test_a_builder_that_fails_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_network(path, build_foreign(4, 3), info_of(architecture=BUILDER, arguments={"width": 4, "wrong": 3}))
    with pytest.raises(UserError, match=r"foreign.safetensors: .*build_foreign.*wrong"):
        load_network(path, builder=BUILDER)


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left"):
        save_network(file, network_of(9), info_of())
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(range(200)), b"hello world, this is text"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other.bin: not a safetensors file \(.*\); expected a .safetensors file that"):
        load_network(path)


@pytest.mark.parametrize("keep", [-1, -5000, 400])
def test_a_file_that_is_cut_short_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"averaged.safetensors: the file is cut short or damaged \(.*\); copy or export"
    ):
        load_network(file)


def test_safetensors_are_known_by_their_first_bytes() -> None:
    assert is_safetensors((500).to_bytes(8, "little") + b"{")
    assert not is_safetensors((500).to_bytes(8, "little") + b"[")
    assert not is_safetensors(b"\x81\xa6params{")  # a length of 10^18
    assert not is_safetensors(b"")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(
            UserError, match=r"cannot be read \(.*\); expected a .safetensors file that ensdistill wrote"
        ):
            load_network(path)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.rand(3)}, path, metadata=metadata)
        with pytest.raises(UserError, match=f"no '{FORMAT_KEY}' in its metadata, another program wrote it"):
            load_network(path)


def test_a_newer_format_is_refused(file: Path) -> None:
    rewrite(file, **{FORMAT_KEY: "2"})
    with pytest.raises(UserError, match="of format 2, this version reads 1; update ensdistill"):
        load_network(file)


@pytest.mark.parametrize(
    "key",
    [
        "architecture",
        "arguments",
        "class_names",
        "image_shape",
        "pixel_mean",
        "pixel_std",
        "method",
        "members",
        "temperature",
        "recipe",
        "measures",
        "commit",
        "versions",
    ],
)
def test_metadata_that_are_missing_or_of_another_type_are_refused(file: Path, key: str) -> None:
    for wrong in ("[[true]]", "not JSON"):
        rewrite(file, **{key: wrong})
        with pytest.raises(UserError) as caught:
            load_network(file)
        assert str(caught.value).startswith(f"{file}: '{key}' in its metadata is {wrong}, expected ")
    rewrite(file, drop=key)
    with pytest.raises(UserError, match=f"its metadata lack '{key}'"):
        load_network(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_mean": "[0.5]"}, r"pixel_mean: got \[0.5\], expected 2 finite numbers"),
        ({"pixel_std": "[0.5, 0]"}, r"pixel_std: got \[0.5, 0\], expected positive numbers"),
        ({"image_shape": "[0, 7, 2]"}, "image_shape: got .*, expected positive"),
        ({"class_names": '["one"]'}, "class_names: got .*, expected at least two"),
        ({"members": "0"}, "members: got 0, expected at least 1"),
        ({"temperature": "-1.5"}, "temperature: got -1.5, expected a positive number"),
    ],
)
def test_metadata_that_contradict_each_other_are_refused(file: Path, changes: dict[str, str], message: str) -> None:
    rewrite(file, **changes)
    with pytest.raises(UserError, match=f"averaged.safetensors: {message}.*; the file is damaged"):
        load_network(file)


def test_arguments_do_not_go_with_a_name() -> None:
    with pytest.raises(UserError, match=r"arguments: got .* for 'wrn10x1', expected none with a name"):
        info_of(arguments={"depth": 10})


def test_an_unknown_architecture_is_refused(file: Path) -> None:
    rewrite(file, architecture='"wrn11x1"')
    with pytest.raises(UserError, match=r"averaged.safetensors: network 'wrn11x1': no such network; expected one of"):
        load_network(file)


def test_tensors_that_do_not_match_are_named(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    renamed = {key.replace("linear.weight", "fc.weight"): value for key, value in tensors.items()}
    rewrite(file, tensors=renamed)
    with pytest.raises(UserError, match=r"missing linear.weight, unexpected fc.weight; export the network again"):
        load_network(file)
    rewrite(file, tensors={"stem.weight": tensors["stem.weight"]})
    with pytest.raises(UserError, match=r"missing (\S+, ){2}\S+ and \d+ more, unexpected none"):
        load_network(file)


def test_a_shape_that_differs_is_named(file: Path) -> None:
    rewrite(file, class_names='["a", "b", "c", "d"]')
    with pytest.raises(UserError, match=r"linear\.\w+ has shape \(3.*\), its architecture has \(4.*\)"):
        load_network(file)


def test_a_number_of_members_that_the_tensors_do_not_have_is_refused(file: Path) -> None:
    rewrite(file, members="1000000000")
    with pytest.raises(UserError, match="tensors of 0 members, its metadata say 1000000000; the file is damaged"):
        load_network(file)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": '"wrn10x40"'}, "missing .*blocks.0.shortcut.weight"),
        ({"architecture": '"wrn100x1"'}, "missing .*blocks.10.conv1.weight"),
        ({"class_names": json.dumps(["a"] * 100_000)}, r"linear\.\w+ has shape \(3.*\), its architecture has \(100000"),
        ({"image_shape": "[5, 7, 5000]", "pixel_mean": f"{[0.5] * 5000}", "pixel_std": f"{[0.5] * 5000}"}, "has shape"),
    ],
)
def test_nothing_is_built_that_the_file_cannot_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: int, changes: dict[str, str], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    network = network_of() if members == 1 else MemberNetworks([network_of(m) for m in range(members)])
    save_network(path, network, info_of(members=members))
    rewrite(path, **changes)
    made: list[nn.Module] = []

    def recorded(*args: Any, **options: Any) -> nn.Module:
        made.append(build(*args, **options))
        return made[-1]

    monkeypatch.setattr(ours, "build", recorded)
    with pytest.raises(UserError, match=message):
        load_network(path)
    assert made and all(parameter.is_meta for one in made for parameter in one.parameters())


@pytest.mark.parametrize("shape", ["[100000, 100000, 2]", "[5, 1000000000000, 2]"])
def test_images_larger_than_any_are_refused(file: Path, shape: str) -> None:
    rewrite(file, image_shape=shape)
    with pytest.raises(UserError, match=r"image_shape: got \[.*, of at most 8192 pixels a side; the file is damaged"):
        read_info(file)


@pytest.mark.parametrize("name", ["wrn28x10000000000000000000", "wrn600000004x1", "resnet20x99999999999", "wrn28x0"])
def test_names_of_giants_are_no_names(file: Path, name: str) -> None:
    rewrite(file, architecture=json.dumps(name))
    with pytest.raises(UserError, match=f"network '{name}': no such network; expected one of .* below 10,000"):
        load_network(file)


def flipped(path: Path, num: int, seed: int = 0) -> list[Path]:
    """Copies of a file, in each of which one byte is another."""
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(seed)
    copies = []
    for i, at in enumerate(torch.randint(0, len(whole), (num,), generator=generator).tolist()):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << i % 8
        copies.append(path.with_name(f"{i}.safetensors"))
        copies[-1].write_bytes(damaged)
    return copies


def test_damage_that_keeps_the_length_is_refused(file: Path) -> None:
    for copy in flipped(file, 40):
        try:
            classifier, info = load_network(copy)
        except UserError as error:
            assert str(error).startswith(f"{copy}: ") and "\n" not in str(error)
        else:  # the name of the digest itself
            assert info == info_of() and torch.equal(classifier.network(images()), network_of()(images()))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"averaged.safetensors: the file is damaged, or was changed: .*; copy"):
        load_network(file)


@pytest.mark.parametrize("metadata", [{"pixel_mean": "[0.2, 0.6]"}, {"class_names": '["dog", "cat", "x"]'}])
def test_metadata_that_were_changed_are_refused(file: Path, metadata: dict[str, str]) -> None:
    with safe_open(file, framework="pt") as opened:
        values = opened.metadata() | metadata
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=values)
    with pytest.raises(UserError, match=f"has another digest than the {DIGEST_KEY} in its metadata"):
        load_network(file)


def test_a_file_of_an_earlier_version_has_no_digest_and_is_read(file: Path) -> None:
    rewrite(file)
    with safe_open(file, framework="pt") as opened:
        assert DIGEST_KEY not in opened.metadata()
    assert torch.equal(load_network(file)[0].network(images()), network_of()(images()))


def test_a_damaged_student_is_refused(tmp_path: Path) -> None:
    student = BatchEnsembleStudent(Classifier(network_of(), (0.3, 0.6), (0.2, 0.4)), 2, average=True)
    path = tmp_path / "best.safetensors"
    ship(student, path, info_of())
    load_student(student, path)
    data = bytearray(student_path(path).read_bytes())
    data[-5] ^= 1
    student_path(path).write_bytes(data)
    with pytest.raises(UserError, match=r"best-student.safetensors: the file is damaged"):
        load_student(student, path)
