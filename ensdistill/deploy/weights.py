"""Weights of a network: one safetensors file under the field's usual names, or a folder for a model hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ensdistill.deploy.card import model_card
from ensdistill.deploy.check import check
from ensdistill.deploy.interface import Interface
from ensdistill.formats.hub import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, config_of, load_network
from ensdistill.formats.ours import network_bytes
from ensdistill.models import Classifier
from ensdistill.runtime.files import atomic_write


def write_safetensors(
    path: Path,
    classifier: Classifier,
    interface: Interface,
    metadata: Mapping[str, str],
    where: str,
    builder: str | None,
    beside: Mapping[str, str] | None = None,
) -> float:
    """Write the plain network's `state_dict()` and the metadata, and return the largest |Δp| of what is read back.

    Args:
        metadata: texts by name for other programs; ours are written beside them.
        where: the network's file, for messages.
        builder: the function that may be called to build the network, where it is somebody else's.
        beside: contents of files by name, which are written beside it once it is compared, before it gets its name.

    Raises:
        UserError: what is read back does not compute what the network does.
    """
    more = {"format": "pt", **metadata}  # `format`: what other readers of safetensors files ask for
    with atomic_write(path) as temporary:
        temporary.write_bytes(network_bytes(classifier.network, interface.info, more))
        loaded, _ = load_network(temporary, builder=builder)
        worst = check(where, loaded.network, classifier, interface)
        for name, text in (beside or {}).items():
            with atomic_write(path.with_name(name)) as other:
                other.write_text(text, encoding="utf-8")
        return worst


def write_hub(
    folder: Path,
    classifier: Classifier,
    interface: Interface,
    metadata: Mapping[str, str],
    where: str,
    builder: str | None,
    *,
    source: Path,
    licence: str | None,
) -> float:
    """Write a hub folder, the weights last, for without them it is none; return the largest |Δp| of what is read back.

    Args:
        source: the network's file, in whose run folder the model card looks for facts.
        licence: of the weights; None: the card says that it is not stated.
        Others, and errors: as `write_safetensors`.
    """
    texts = {
        CARD_FILE: model_card(folder, source, interface, licence),
        CONFIG_FILE: json.dumps(config_of(interface.info), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    return write_safetensors(folder / WEIGHTS_FILE, classifier, interface, metadata, where, builder, texts)
