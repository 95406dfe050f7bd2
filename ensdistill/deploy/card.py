"""The model card of a hub folder: what the network's file and its run folder say, and nothing else.

What neither says stands in the card as not known.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdistill.config.methods import Method
from ensdistill.deploy.interface import Interface
from ensdistill.formats.hub import WEIGHTS_FILE
from ensdistill.formats.ours import NetworkInfo
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import read_json

UNKNOWN = "not known: neither the network's file nor its run folder says"
_MEASURES = {
    "acc": "accuracy",
    "nll": "negative log-likelihood (nats)",
    "ece": "expected calibration error, 15 bins",
    "cnll": "negative log-likelihood, calibrated",
    "cece": "expected calibration error, calibrated",
}
_PAPER = (
    "Nam, Lee, Heo and Lee, *Improving Ensemble Distillation With Weight Averaging and Diversifying Perturbation* "
    "(ICML 2022)"
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the folder of a run says of a network in it, as far as it can be read."""

    config: dict[str, Any]
    """The values of `config.json`."""
    epochs: int | None
    """Passes over the training images that the network was trained for."""
    counts: dict[str, Any]
    """Number of images of each split."""
    device: str | None
    """Device that it was trained on."""


def run_facts(file: Path, info: NetworkInfo) -> RunFacts | None:
    """Read what the run folder says in which `file` lies, as `students/NAME/best.safetensors` does; None if none fits.

    A folder fits whose recipe, network and classes are those of the file: a file that was copied elsewhere has none.
    """
    folders = file.resolve().parents
    if len(folders) < 3 or folders[1].name not in ("students", "teachers"):
        return None
    config, data, machine = (_object(folders[2] / f"{name}.json") for name in ("config", "data", "environment"))
    fits = (
        config.get("recipe") == info.recipe
        and config.get("network") == info.architecture
        and data.get("class_names") == list(info.class_names)
    )
    if not fits:
        return None
    counts, device = data.get("counts"), machine.get("device")
    training = config.get(folders[1].name.removesuffix("s"))
    epochs = training.get("epochs") if isinstance(training, dict) else None
    return RunFacts(
        config=config,
        epochs=epochs if isinstance(epochs, int) else None,
        counts=counts if isinstance(counts, dict) else {},
        device=device if isinstance(device, str) else None,
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def model_card(folder: Path, file: Path, interface: Interface, licence: str | None) -> str:
    """Write the README.md of a hub folder.

    Args:
        folder: it, whose name is the card's title.
        file: the network's file.
        interface: what the weights take and give.
        licence: of the weights, as their owner states it; None: not stated.
    """
    info, facts = interface.info, run_facts(file, interface.info)
    title = folder.resolve().name
    sections = {
        "What it is": _what(info),
        "Use": _use(info, title),
        "Input and output": _interface(interface),
        "Measures": _measures(info),
        "Data": _data(facts),
        "Method": _method(info, facts),
        "Licence": f"Of the weights: {licence}." if licence else "Of the weights: not stated.",
        "Limits": _limits(info),
    }
    text = "\n\n".join(f"## {name}\n\n{content}" for name, content in sections.items())
    return f"{_front_matter(licence)}\n# {_plain(title)}\n\n{text}\n"


def check_licence(licence: str | None) -> None:
    """Check that a licence is the name of one, in one line.

    Raises:
        UserError: it is empty, or longer.
    """
    if licence is not None and (not licence.isprintable() or not 0 < len(licence.strip()) <= 100):
        raise UserError(f"--licence: got {licence[:50]!r}, expected its name in one line, such as mit or cc-by-4.0")


def _front_matter(licence: str | None) -> str:
    """Make the YAML block that hubs read; values are JSON, which is YAML too."""
    values: dict[str, Any] = {
        "library_name": "ensdistill",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "ensemble-distillation"],
    }
    if licence and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        values["license"] = licence
    elif licence:  # hubs know identifiers alone
        values |= {"license": "other", "license_name": licence}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def _plain(text: str) -> str:
    """Show a text of a file as it is in Markdown, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", "".join(c if c.isprintable() else "?" for c in text))


def _code(text: str) -> str:
    """Show a text of a file as code in Markdown, in one line."""
    return f"`{''.join(c if c.isprintable() and c != '`' else '?' for c in text)}`"


def _what(info: NetworkInfo) -> str:
    H, W, C = info.image_shape
    several = f"{info.members} networks whose probabilities are averaged, each" if info.members > 1 else "One"
    return (
        f"{several} {_code(info.architecture)}: an image of {H}x{W} pixels and {C} channel{'s' if C > 1 else ''} to "
        f"one of {info.num_classes} classes. Written by ensdistill, which distils an ensemble of image classifiers "
        "into one network."
    )


def _use(info: NetworkInfo, title: str) -> str:
    builder = f", builder={info.architecture!r}" if info.is_foreign else ""
    trust = (
        f"\n\nIts network is built by {_code(info.architecture)}, which is not part of ensdistill and has to be "
        "installed: naming it lets ensdistill call it."
        if info.is_foreign
        else ""
    )
    return (
        "```python\n"
        "import ensdistill\n\n"
        f"network, info = ensdistill.load_network({title!r}{builder})\n"
        "logits = network(images)  # float32 (batch, channels, height, width) in [0, 1]; it normalises them itself\n"
        "```\n\n"
        f"`{WEIGHTS_FILE}` holds the plain network's `state_dict()`, for `safetensors.torch.load_file`; the tensors "
        f"take normalised images.{trust}"
    )


def _interface(interface: Interface) -> str:
    info = interface.info
    names = ", ".join(f"{k} {_plain(name)}" for k, name in enumerate(info.class_names[:20]))
    more = f" and {info.num_classes - 20} more, in `config.json`" if info.num_classes > 20 else ""
    return (
        f"- The weights take: {interface.input_in_words}\n- They give: {interface.output_in_words}\n"
        f"- Classes: {names}{more}"
    )


def _measures(info: NetworkInfo) -> str:
    if not info.measures:
        return f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}."
    rows = []
    for key, value in info.measures.items():
        split, _, name = key.partition("_")
        shown = f"{100 * value:.2f} %" if name == "acc" else "not known" if value != value else f"{value:.4f}"
        rows.append(f"| {_plain(_MEASURES.get(name, key))} | {_plain(split)} images | {shown} |")
    head = "| measure | on | value |\n|---|---|---:|\n"
    where = "\n\nMeasured on the images of its own data set, one training; calibrated: at the temperature "
    fitted = f"{info.temperature:.4g}, fitted on validation images." if info.temperature is not None else "not known."
    return head + "\n".join(rows) + where + fitted


def _data(facts: RunFacts | None) -> str:
    if facts is None or not isinstance(facts.config.get("source"), str):
        return f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}."
    counts = ", ".join(f"{n:,} {_plain(name)}" for name, n in facts.counts.items() if isinstance(n, int))
    subset = facts.config.get("train_images")
    used = f", of which {subset:,} were trained on" if isinstance(subset, int) else ""
    return f"Source {_code(facts.config['source'])}: images {counts or UNKNOWN}{used}. Their licence: {UNKNOWN}."


def _method(info: NetworkInfo, facts: RunFacts | None) -> str:
    averaged = f", {_plain(info.averaged)} of its weights over time" if info.averaged else ""
    members = facts.config.get("members") if facts else None
    teachers = "none: it learned from labels alone" if info.method == "ce" else members or UNKNOWN
    versions = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in info.versions.items())
    known = {
        "Method": f"{_plain(info.method)}{averaged}" + (f" ({_PAPER})" if _is_papers(info.method) else ""),
        "Teachers": teachers,
        "Recipe": _plain(info.recipe) or UNKNOWN,
        "Epochs": facts.epochs if facts and facts.epochs else UNKNOWN,
        "Device": _plain(facts.device) if facts and facts.device else UNKNOWN,
        "Commit of ensdistill": _plain(info.commit) or UNKNOWN,
        "Versions": versions or UNKNOWN,
    }
    return "\n".join(f"- {name}: {value}" for name, value in known.items())


def _is_papers(method: str) -> bool:
    try:
        return Method.parse(method).student in ("latentbe", "be")
    except UserError:
        return False


def _limits(info: NetworkInfo) -> str:
    H, W, _ = info.image_shape
    return (
        f"- Images of {H}x{W} pixels, prepared as in training; others give probabilities too, which say nothing.\n"
        f"- It knows {info.num_classes} classes and gives one of them for every image, whatever is on it.\n"
        "- Nothing is known of images from elsewhere than its data set: no measure here was taken on any.\n"
        "- Intended uses, and checks for bias: not stated."
    )
