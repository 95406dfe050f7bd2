"""Networks for other programs: `python -m ensdistill.export FILE --to onnx FOLDER`.

FILE is a .safetensors file of a run folder, or a hub folder. What is written is loaded again, compared with the network
on batches of several sizes, and refused where a probability differs by more than 1e-4.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from ensdistill import __version__
from ensdistill.deploy.card import check_licence
from ensdistill.deploy.check import BATCH_SIZES
from ensdistill.deploy.graphs import DEFAULT_OPSET, require_onnx, write_onnx, write_pt2
from ensdistill.deploy.interface import Gives, Interface, Takes
from ensdistill.deploy.weights import write_hub, write_safetensors
from ensdistill.formats.hub import load_network, network_file
from ensdistill.formats.ours import NetworkInfo, to_metadata
from ensdistill.models import Classifier
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.files import writing

Format = Literal["onnx", "pt2", "safetensors", "hub"]
_WEIGHTS_ALONE = ("safetensors", "hub")
_FILE_NAMES = {
    "onnx": "model.onnx",
    "pt2": "model.pt2",
    "safetensors": "model.safetensors",
    "hub": "model.safetensors, config.json and README.md",
}


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a network for other programs, once what is written gives the network's probabilities.

    For example: python -m ensdistill.export runs/digits/students/kd-seed0/best.safetensors --to onnx exported
    """

    file: tyro.conf.Positional[Path]
    """The network: a .safetensors file of a run folder, or a folder that --to hub wrote."""
    folder: tyro.conf.Positional[Path]
    """The folder to write into; it must be empty, or not there yet."""
    to: Format
    """onnx: a graph for onnxruntime and others; pt2: PyTorch's own exported program; safetensors: the weights and what
    they need; hub: a folder as model hubs have it, with a model card."""
    input: Takes | None = None
    """What a graph takes: float (images in [0, 1], normalised inside; the default), uint8 (0 to 255) or normalised
    (outside). Weights alone take normalised images."""
    output: Gives | None = None
    """What a graph gives: probabilities (calibrated, where a temperature is known; the default) or logits (temperature
    and softmax outside). Weights alone give logits."""
    opset: int | None = None
    """ONNX's version of operators. Default: 18."""
    licence: str | None = None
    """Licence of the weights, for the model card of --to hub: mit, cc-by-4.0 … Default: the card says: not stated."""
    builder: str | None = None
    """The function package.module:function that the file may call to build its network, where it is not one of ours."""


def export(command: ExportCommand) -> str:
    """Write what the command asks for, and return a line that says what it takes and gives.

    Raises:
        UserError: an option does not fit the format, the folder is not empty, the file cannot be loaded, or what was
            written does not give the network's probabilities: there is then no file.
    """
    _check_options(command)
    info, classifier = _load(command)
    interface = _interface(command, info)
    with torch.random.fork_rng(devices=[]):
        return _write(command, classifier, interface)


def _check_options(command: ExportCommand) -> None:
    to, folder = command.to, command.folder
    if to in _WEIGHTS_ALONE:
        for option, found, only in (("input", command.input, "normalised"), ("output", command.output, "logits")):
            if found not in (None, only):
                raise UserError(
                    f"--{option} {found}: --to {to} writes weights alone, which have {only} there (normalisation and "
                    "temperature are in the metadata); leave it out, or use --to onnx or pt2"
                )
    if command.opset is not None and to != "onnx":
        raise UserError(f"--opset {command.opset}: --to {to} has none; leave it out, or use --to onnx")
    if command.opset is not None and command.opset < DEFAULT_OPSET:
        raise UserError(f"--opset {command.opset}: expected {DEFAULT_OPSET} or more, which PyTorch's exporter writes")
    if command.licence is not None and to != "hub":
        raise UserError(f"--licence: --to {to} has no model card; leave it out, or use --to hub")
    check_licence(command.licence)
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a file; expected a folder to write {_FILE_NAMES[to]} into: name another")
        if folder.is_dir() and (there := sorted(path.name for path in folder.iterdir())):
            raise UserError(
                f"{folder}: not empty ({there[0]}{f' and {len(there) - 1} more' if len(there) > 1 else ''}); nothing "
                "is overwritten: name another folder, or empty it"
            )
    if to == "onnx":
        require_onnx()


def _load(command: ExportCommand) -> tuple[NetworkInfo, Classifier]:
    classifier, info = load_network(command.file, builder=command.builder)
    if info.members > 1 and command.to == "safetensors":
        raise UserError(
            f"{command.file}: holds {info.members} networks whose probabilities are averaged ({info.method}), and no "
            "averaged network; export the whole ensemble by --to onnx, pt2 or hub, or train latentbe, which ships one"
        )
    return info, classifier.requires_grad_(False).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _interface(command: ExportCommand, info: NetworkInfo) -> Interface:
    weights_alone = command.to in _WEIGHTS_ALONE
    return Interface(
        takes=command.input or ("normalised" if weights_alone else "float"),
        gives=command.output or ("logits" if weights_alone else "probabilities"),
        info=info,
    )


def _write(command: ExportCommand, classifier: Classifier, interface: Interface) -> str:
    to, folder, where, info = command.to, command.folder, str(command.file), interface.info
    opset = command.opset or DEFAULT_OPSET
    metadata = {
        "input": interface.input_in_words,
        "output": interface.output_in_words,
        "source": f"{_what(info)}, exported by ensdistill {__version__}",
    }
    path = folder if to == "hub" else folder / _FILE_NAMES[to]
    was_there = folder.exists()
    try:
        if to == "onnx":
            kind = f"ONNX, opset {opset}"
            metadata |= {"opset": str(opset), "torch": torch.__version__}
            worst = write_onnx(path, classifier, interface, _graph_metadata(metadata, info), opset, where)
        elif to == "pt2":
            kind = f"PyTorch {torch.__version__}'s exported program"
            metadata |= {"torch": torch.__version__}
            worst = write_pt2(path, classifier, interface, _graph_metadata(metadata, info), where)
        elif to == "safetensors":
            kind = "weights"
            worst = write_safetensors(path, classifier, interface, metadata, where, command.builder)
        else:
            kind = "weights, config.json and model card"
            source, licence = network_file(command.file), command.licence
            worst = write_hub(
                folder, classifier, interface, metadata, where, command.builder, source=source, licence=licence
            )
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    *first, last = map(str, BATCH_SIZES)
    return (
        f"{path}: {kind} of {_what(info)}; takes {interface.input_in_words}, any batch; gives "
        f"{interface.output_in_words}; {info.num_classes} class names in it; largest |Δp| to the network {worst:.1e}, "
        f"on batches of {', '.join(first)} and {last}; {num_bytes:,} bytes"
    )


def _what(info: NetworkInfo) -> str:
    if info.members > 1:
        return f"{info.members} networks of {info.architecture} ({info.trained_by}), probabilities averaged"
    averaged = "the averaged network" if info.method.split("+")[0] == "latentbe" else "one network"
    return f"{averaged}, {info.architecture} ({info.trained_by})"


def _graph_metadata(metadata: dict[str, str], info: NetworkInfo) -> dict[str, str]:
    """Add what our own files say, but how to predict with them: a graph has its own input and output."""
    own = {key: value for key, value in to_metadata(info).items() if key not in ("ensdistill_format", "prediction")}
    return own | metadata | {"class_names": json.dumps(info.class_names, ensure_ascii=False)}


def main() -> None:
    """Export the network and print the line."""
    print(export(parse_arguments(ExportCommand, "ensdistill.export")))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
