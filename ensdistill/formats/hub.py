"""A network as a folder in the layout of model hubs: `model.safetensors`, `config.json`, `README.md`.

`model.safetensors` is a file of ours (`ours`) and holds all that is to be known; its digest is compared. `config.json`
says the same for other programs, and `README.md` for people. Such folders are exchanged: `config.json` is compared
with the metadata of `model.safetensors` and never followed, and a builder is called only where the caller names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensdistill.formats import ours
from ensdistill.formats.ours import NetworkInfo, read_info, to_metadata
from ensdistill.models import Classifier
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import read_json

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


def load_network(path: str | Path, *, builder: str | None = None) -> tuple[Classifier, NetworkInfo]:
    """Load a network from a .safetensors file of a run, or from a folder of `ensdistill.export --to hub`.

    Args:
        builder: the `package.module:function` that a file may name to build its network, where that is somebody else's:
            it is called only where it is the one given here. Nothing else in a file is executed.

    Returns:
        The classifier, a module in evaluation mode on the CPU, from images (B, C, H, W) in [0, 1] to logits (B, K): it
        normalises them itself, and its `network` is the plain network, which takes normalised images. And what the file
        says: `class_names`, `image_shape`, `pixel_mean`, `pixel_std`, `temperature`, `measures` and more. Calibrated
        probabilities are softmax(log(softmax(logits) + 1e-8) / temperature).

    Raises:
        UserError: no such file or folder, damaged, of another program, its parts contradict each other, or a builder
            that was not named.
    """
    return ours.load_network(network_file(Path(path)), builder=builder)


def network_file(path: Path) -> Path:
    """Return the file of the network at `path`: itself, or of a hub folder its weights, once `config.json` agrees.

    Raises:
        UserError: the folder lacks one of them, or they say different things.
    """
    if not path.is_dir():
        return path
    weights, config = path / WEIGHTS_FILE, path / CONFIG_FILE
    missing = [file.name for file in (weights, config) if not file.is_file()]
    if missing:
        raise UserError(
            f"{path}: no {' and no '.join(missing)} in this folder; expected one that `ensdistill.export --to hub` "
            "wrote whole, or a .safetensors file of a run folder"
        )
    _require_same(config, config_of(read_info(weights)))
    return weights


def config_of(info: NetworkInfo) -> dict[str, Any]:
    """Make the values of `config.json`: what programs for such folders look for, and under `ensdistill` all of ours."""
    return {
        "library_name": "ensdistill",
        "num_labels": info.num_classes,
        "id2label": {str(k): name for k, name in enumerate(info.class_names)},
        "ensdistill": {key: json.loads(value) for key, value in to_metadata(info).items()},
    }


def _require_same(file: Path, expected: Mapping[str, Any]) -> None:
    try:
        found = read_json(file)
        if not isinstance(found, dict) or not isinstance(found.get("ensdistill"), dict):
            raise ValueError("no object 'ensdistill' in it")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); expected what `ensdistill.export --to hub` wrote"
        ) from error
    for theirs, ours_, where in ((found, expected, ""), (found["ensdistill"], expected["ensdistill"], "ensdistill.")):
        for key, value in ours_.items():
            if key != "ensdistill" and theirs.get(key) != value:
                raise UserError(
                    f"{file}: '{where}{key}' is {json.dumps(theirs.get(key))[:80]}, the metadata of {WEIGHTS_FILE} "
                    f"beside it have {json.dumps(value)[:80]}; one of them was changed: export the folder again"
                )
