"""PyTorch state_dicts of others: read without executing anything, fitted by name, refused by name."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensdistill.formats.pytorch import _Bounded, call_builder, load_state_dict, read_state_dict, require_trainable
from ensdistill.runtime.errors import UserError


def plain(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 9, 4))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("form", ["plain", "legacy", "state_dict", "model_state_dict", "model", "deep"])
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    state_dict = plain(1).state_dict()
    path = tmp_path / "net"
    if form == "legacy":
        torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    else:
        nested: dict[str, Any] = {
            "plain": state_dict,
            "deep": {"model": {"state_dict": state_dict, "epoch": 3}},
        }.get(form, {form: state_dict, "epoch": 3, "optimizer": {"lr": 0.1}})
        torch.save(nested, path)
    assert same(read_state_dict(path), state_dict)


@pytest.mark.parametrize("crc", [True, False])
def test_a_damaged_weight_is_refused_where_there_are_checksums(tmp_path: Path, crc: bool) -> None:
    state_dict, path = plain(1).state_dict(), tmp_path / "net.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(state_dict, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_state_dict(path), state_dict)
    data = bytearray(path.read_bytes())
    data[data.index(state_dict["3.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    if crc:
        with pytest.raises(UserError, match=r"net.pt: .*the bytes of \S+/data/\d+ are not those that were written"):
            read_state_dict(path)
    else:
        assert not same(read_state_dict(path), state_dict)


class Payload:
    """Makes a folder when it is unpickled by somebody careless."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(tmp_path: Path, legacy: bool) -> None:
    path, folder = tmp_path / "net.pt", tmp_path / "executed"
    for content in (plain(), {"state_dict": Payload(folder)}, Payload(folder)):  # a whole module is Python too
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=r"net.pt: no state_dict can be read .*holds tensors alone") as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value) and not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists()  # the trap works


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    torch.save(plain().state_dict(), tmp_path / "a.pt")
    torch.save(plain().state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        data = (tmp_path / name).read_bytes()
        for size in (3, 30, len(data) // 3, len(data) - 8):
            (tmp_path / name).write_bytes(data[:size])
            with pytest.raises(UserError, match=f"{name}: no state_dict can be read"):
                read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "weights": [1, 2]}, "found epoch, weights; expected"),
        ({"state_dict": {"a": torch.ones(2), "b": 7}}, "found state_dict; expected"),
        ({}, "found nothing; expected"),
        ([torch.ones(3)], "found list; expected"),
        (torch.ones(3), "found Tensor; expected"),
    ],
)
def test_files_without_named_tensors_are_refused(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(UserError, match=f"net.pt: no tensors by name in it, {found} a state_dict, by itself or under"):
        read_state_dict(tmp_path / "net.pt")


# ----------------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "model.", "module.model.net."])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    trained, fresh = plain(1), plain(2)
    load_state_dict(fresh, {prefix + key: value for key, value in trained.state_dict().items()}, "f")
    assert same(fresh.state_dict(), trained.state_dict())


def test_a_part_that_was_compiled_is_found() -> None:
    trained, fresh = nn.Sequential(plain(1), nn.Linear(4, 3)), nn.Sequential(plain(2), nn.Linear(4, 3))
    state_dict = {key.replace("0.", "0._orig_mod.", 1): value for key, value in trained.state_dict().items()}
    assert "0._orig_mod.0.weight" in state_dict
    load_state_dict(fresh, state_dict, "f")
    assert same(fresh.state_dict(), trained.state_dict())


def test_old_files_without_batch_counts_are_loaded() -> None:
    trained, fresh = plain(1), plain(2)
    state_dict = {k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_state_dict(fresh, state_dict, "f")
    assert same(fresh.state_dict(), trained.state_dict())


def test_half_precision_is_widened() -> None:
    trained, fresh = plain(1), plain(2)
    load_state_dict(fresh, {key: value.half() for key, value in trained.state_dict().items()}, "f")
    assert fresh[0].weight.dtype == torch.float32  # type: ignore[index]
    assert torch.allclose(fresh.state_dict()["0.weight"], trained.state_dict()["0.weight"], atol=1e-3)


def test_keys_that_do_not_fit_are_named() -> None:
    state_dict = plain().state_dict()
    renamed = {key.replace("3.", "head."): value for key, value in state_dict.items()}
    with pytest.raises(
        UserError, match=r"^f: missing 3.weight, 3.bias; unexpected head.weight, head.bias; expected the"
    ):
        load_state_dict(plain(), renamed, "f")
    with pytest.raises(UserError, match=r"^f: missing 0.weight, 0.bias, 1.weight and 5 more; unexpected a, x.b; "):
        load_state_dict(plain(), {"a": torch.ones(1), "x.b": torch.ones(1)}, "f")
    with pytest.raises(UserError, match="missing nothing; unexpected ema"):
        load_state_dict(plain(), state_dict | {"ema": torch.ones(1)}, "f")
    with pytest.raises(
        UserError, match=r"^f: 0.weight has shape \(6, 3, 3, 3\) in the file, \(5, 3, 3, 3\) in the network"
    ):
        load_state_dict(plain(), plain(width=6).state_dict(), "f")


# ---------------------------------------------------------------------------------------------------------- builders


@pytest.fixture
def builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\n"
        "class Zoo:\n    linear = nn.Linear\n"
        "def convolution(width, groups=1):\n    return nn.Conv2d(4, width, 1, groups=groups)\n"
        "def text():\n    return 'net'\n"
        "not_callable = 3\n"
    )
    (tmp_path / "failing_nets.py").write_text("raise RuntimeError('operator is absent\\nand more')\n")
    (tmp_path / "broken_nets.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_nets", None)


def test_builder_is_called_with_its_arguments(builders: None) -> None:
    module = call_builder("their_nets:convolution", {"width": 6, "groups": 2})
    assert isinstance(module, nn.Conv2d) and module.out_channels == 6 and module.groups == 2
    assert isinstance(call_builder("their_nets:Zoo.linear", {"in_features": 2, "out_features": 3}), nn.Linear)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        ("timm.create_model", {}, "'timm.create_model': expected package.module:function"),
        ("their_nets:", {}, "'their_nets:': expected package.module:function"),
        ("absent_nets:f", {}, r"'absent_nets:f': cannot be imported \(No module named 'absent_nets'\)"),
        ("broken_nets:f", {}, "No module named 'a_package_that_is_absent'"),
        ("failing_nets:f", {}, r"cannot be imported \(operator is absent\); expected package.module:function"),
        ("their_nets:f", {}, "has no attribute 'f'"),
        (
            "their_nets:convolution",
            {"size": 2},
            r"failed with the arguments \(size=2\): TypeError: .*unexpected keyword",
        ),
        ("their_nets:convolution", {"width": 5, "groups": 2}, r"failed .*ValueError: .*divisible by groups"),
        ("their_nets:not_callable", {}, "failed .*not callable"),
        ("their_nets:text", {}, "gives a str, expected an nn.Module"),
    ],
)
def test_builders_that_do_not_build(builders: None, builder: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^builder .*{message}") as caught:
        call_builder(builder, arguments)
    assert "\n" not in str(caught.value)


class Versioned(nn.Sequential):
    """Keeps something beside its tensors."""

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_cannot_be_trained_is_refused() -> None:
    require_trainable(plain(), "their:net")
    average = plain()
    average[1].momentum = None
    with pytest.raises(UserError, match=r"their:net: BatchNorm2d '1' has momentum=None, .*give it a number"):
        require_trainable(average, "their:net")
    average[1].track_running_stats = False  # nothing is averaged
    require_trainable(average, "their:net")
    with pytest.raises(UserError, match=r"their:net: '1._extra_state' of its state is a dict, expected a tensor"):
        require_trainable(nn.Sequential(nn.ReLU(), Versioned(nn.Linear(2, 2))), "their:net")
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(UserError, match=r"their:net: '0.weight' of a lazy module has no values yet; run one batch"):
        require_trainable(lazy, "their:net")
    lazy(torch.zeros(1, 3, 4, 4))
    require_trainable(lazy, "their:net")


def test_a_file_of_python_objects_is_refused_in_one_plain_line(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1), "state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"it holds argparse\.Namespace, whose loading may run code") as raised:
        read_state_dict(tmp_path / "a.pth")
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_no_room_is_made_for_more_than_the_file_has(tmp_path: Path) -> None:
    asked: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(-1 if size is None else size)
            return super().read(size)

    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02" + b"X" + (1 << 31).to_bytes(4, "little") + b"abc.")  # a text of two gigabytes
    with pytest.raises(UserError, match="no state_dict can be read"):
        read_state_dict(path)
    with contextlib.suppress(Exception):
        torch.load(Counted(path.read_bytes()), weights_only=True)
    with _Bounded(io.FileIO(path)) as stream:
        assert max(asked) >= 1 << 31 and len(stream.read(max(asked))) == path.stat().st_size and stream.read() == b""
