"""Hub folders: what comes back, and that what others wrote into one is never followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_networks import BUILDER, CLASSES, save_tiny, tiny

import ensdistill
from ensdistill.formats.hub import CONFIG_FILE, WEIGHTS_FILE, config_of, load_network, network_file
from ensdistill.formats.ours import read_info, save_network
from ensdistill.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A hub folder of a tiny network."""
    path = tmp_path / "hub"
    path.mkdir()
    file = save_tiny(path / WEIGHTS_FILE)
    (path / CONFIG_FILE).write_text(json.dumps(config_of(read_info(file))))
    return path


def change(folder: Path, **values: Any) -> None:
    """Write values into what `config.json` says of the network."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["ensdistill"] |= values
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_a_file_and_a_folder_give_the_network_and_what_is_known_of_it(folder: Path) -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = tiny().eval()((images - 0.3) / 0.2)
        for path in (folder, folder / WEIGHTS_FILE, str(folder)):
            network, info = ensdistill.load_network(path, builder=BUILDER)
            assert not network.training and not network.network.training
            torch.testing.assert_close(network(images), expected)
            assert info.class_names == CLASSES and info.temperature == 1.37 and info.image_shape == (8, 8, 1)


def test_a_builder_is_called_only_where_the_caller_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(**arguments: Any) -> None:
        raise AssertionError("the builder was called")

    monkeypatch.setattr("saved_networks.tiny", called)
    for builder in (None, "os:system"):
        with pytest.raises(UserError, match=r"model.safetensors: its network is built by saved_networks:tiny, .* give"):
            load_network(folder, builder=builder)
    change(folder, architecture="os:system", arguments={"command": "touch hacked"})
    with pytest.raises(UserError, match=r"config.json: 'ensdistill.architecture' is \"os:system\", the metadata of"):
        load_network(folder, builder="os:system")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: cannot be read"),
        ("[]", "no object 'ensdistill' in it"),
        ('{"ensdistill": 3}', "no object 'ensdistill' in it"),
        ("[" * 100_000, "nested too deep"),
        ('{"ensdistill": {}}', "'library_name' is null, the metadata of model.safetensors beside it have"),
    ],
)
def test_a_config_that_is_none_is_one_line(folder: Path, content: str, message: str) -> None:
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_network(folder, builder=BUILDER)
    assert "\n" not in str(raised.value)


def test_parts_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    change(folder, temperature=2.0)
    with pytest.raises(UserError, match=r"'ensdistill.temperature' is 2.0, .* have 1.37; one of them was changed"):
        load_network(folder, builder=BUILDER)
    change(folder, temperature=1.37)
    load_network(folder, builder=BUILDER)
    names, two = ("cat", "dog"), {"classes": 2}
    save_tiny(folder / WEIGHTS_FILE, class_names=names, arguments=two)
    with pytest.raises(UserError, match=r"'num_labels' is 3, the metadata of model.safetensors beside it have 2"):
        load_network(folder, builder=BUILDER)
    save_network(folder / WEIGHTS_FILE, tiny(2), read_info(save_tiny(tmp_path / "three.safetensors")))
    with pytest.raises(UserError, match=r"model.safetensors: 5.bias has shape \(2,\), its architecture has \(3,\)"):
        load_network(folder, builder=BUILDER)


def test_changed_weights_and_missing_parts_are_refused(folder: Path, tmp_path: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(UserError, match="the file is damaged, or was changed"):
        load_network(folder, builder=BUILDER)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=r"hub: no config.json in this folder; expected one that"):
        network_file(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=r"no model.safetensors and no config.json in this folder"):
        network_file(folder)
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        load_network(tmp_path / "nowhere")
