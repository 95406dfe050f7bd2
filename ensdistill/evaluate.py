"""Measuring networks: `python -m ensdistill.evaluate FILE… --data PATH`.

Files are those that `ensdistill.formats.ours` wrote. The temperature of cNLL and cECE is fitted on the data's
validation images.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.table import Table

from ensdistill.data.dataset import DATASET_FILE, DataSet, load_dataset
from ensdistill.data.feed import Feed
from ensdistill.data.prepare import folder_for, image_size_for, prepare, refuse_within
from ensdistill.data.sources.registry import SOURCES, open_source, recognise
from ensdistill.formats.class_order import in_order, match_classes
from ensdistill.formats.ours import NetworkInfo, load_network, read_info
from ensdistill.models import Classifier
from ensdistill.run.display import Screen
from ensdistill.run.metrics import Measures, fit_temperature, measures_at
from ensdistill.run.predict import images_per_second, predict
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.environment import Precision, choose_device, choose_precision
from ensdistill.runtime.errors import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure networks that ensdistill exported: accuracy, likelihood, calibration, speed.

    For example: python -m ensdistill.evaluate runs/digits/students/*/best.safetensors --data digits
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """The networks: .safetensors files of a run folder."""
    data: str
    """The images: a .beton, a folder of class folders, of .npy files or of prepared data, CIFAR's archive …; or digits
    or fashion-mnist, which need no path."""
    source: str | None = None
    """Kind of data at --data, where it is not recognised: cifar10, tiny-imagenet, imagenet, folder, npy, beton …"""
    folder: Path = Path("runs/data")
    """Folder of the data as .beton, each source in one of its own: written there, or found already written."""
    split: Literal["test", "valid", "train"] = "test"
    """The images to measure on."""
    batch_size: int = 256
    """Images of a forward pass."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of convolutions. auto: bf16 where the device has it, as in training, else fp32."""
    device: str | None = None
    """Device to compute on: cpu, cuda, cuda:1. Default: a GPU where there is one."""
    builder: str | None = None
    """The function package.module:function that a file may call to build its network, where that is not one of ours."""
    json: bool = False
    """Print JSON in place of the table."""


@dataclass(frozen=True, kw_only=True)
class FileRow:
    """Measures of one file."""

    file: str
    """Path of the file, as it was given."""
    method: str
    """Method that its network was trained by, and the average over time that it is."""
    members: int
    """Number of networks that predict together."""
    split: str
    """Split that it was measured on."""
    num_images: int
    """Number of those images."""
    measures: Measures
    """Accuracy, likelihood and calibration."""
    temperature_from: Literal["valid", "file", "none"]
    """Origin of the temperature: fitted on the data's validation images, the file's own, or there is none."""
    images_per_s: float
    """Speed of the network alone, see `images_per_second`."""
    device: str
    """Device that it was computed on."""
    precision: Precision
    """Type that convolutions computed in."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the measures among them by name; null for what there is not."""
        values = asdict(self)
        values |= values.pop("measures")
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def evaluate(command: EvaluateCommand, screen: Screen) -> list[FileRow]:
    """Measure every file of the command, all checked before the first is run.

    Raises:
        UserError: a file cannot be loaded, or its classes or image shape are not those of the data.
    """
    if not command.files:
        raise UserError("no file given; expected one or more .safetensors files of a run folder")
    if command.batch_size < 1:
        raise UserError(f"--batch-size: got {command.batch_size}, expected at least 1")
    device = choose_device(command.device)
    infos = {file: read_info(file) for file in command.files}
    first = infos[command.files[0]]
    for file, info in infos.items():
        if info.image_shape != first.image_shape:
            raise UserError(
                f"{file}: takes images of {_text(info.image_shape)}, {command.files[0]} of {_text(first.image_shape)}; "
                "measure them in two runs"
            )
    data = _open_data(command, first, screen)
    if data.note:
        screen.say(f"{data.name}: {data.note}")
    orders = {file: _order_of_classes(file, info, data, screen) for file, info in infos.items()}
    # A temperature fitted on the very images that are measured flatters: there the file's own is taken.
    fitted_on = "valid" if "valid" in data.splits and command.split != "valid" else None
    with contextlib.ExitStack() as stack:
        feeds = {
            split: stack.enter_context(_feed(data, split, first, command.batch_size))
            for split in {command.split, fitted_on or command.split}
        }
        for split, feed in feeds.items():
            if feed.image_shape != first.image_shape:
                raise UserError(
                    f"{data.splits[split].path}: images are {_text(feed.image_shape)}, {command.files[0]} takes "
                    f"{_text(first.image_shape)}; give the data that it was trained for"
                )
        classifiers = {file: load_network(file, builder=command.builder)[0] for file in command.files}
        rows = []
        for file, classifier in classifiers.items():
            if (order := orders[file]) is not None:
                classifier.network = in_order(classifier.network, order)
            classifier = classifier.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            rows.append(_measure(file, infos[file], classifier, feeds, command, fitted_on, device))
            classifier.cpu()  # room on the device for the next
    return rows


def _measure(
    file: Path,
    info: NetworkInfo,
    classifier: Classifier,
    feeds: Mapping[str, Feed],
    command: EvaluateCommand,
    fitted_on: str | None,
    device: torch.device,
) -> FileRow:
    precision = choose_precision(command.precision, device)
    feed = feeds[command.split]
    logits_NMK, labels_N = predict(classifier, feed, device=device, precision=precision)
    temperature = math.nan if info.temperature is None else info.temperature
    try:
        if fitted_on is not None:
            temperature = fit_temperature(*predict(classifier, feeds[fitted_on], device=device, precision=precision))
        measured = measures_at(logits_NMK, labels_N, temperature)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    with feed.epoch(0) as batches:
        images_BHWC, _ = next(batches)
    return FileRow(
        file=str(file),
        method=info.trained_by,
        members=info.members,
        split=command.split,
        num_images=len(labels_N),
        measures=measured,
        temperature_from="valid" if fitted_on is not None else "none" if math.isnan(temperature) else "file",
        images_per_s=images_per_second(classifier, images_BHWC, device=device, precision=precision),
        device=str(device),
        precision=precision,
    )


def _open_data(command: EvaluateCommand, info: NetworkInfo, screen: Screen) -> DataSet:
    path = Path(command.data)
    if (path / DATASET_FILE).is_file():
        return load_dataset(path)
    # A source's name stands for the source, unless data of that name lie here: in runs/ it is a run's folder.
    is_name = command.data in SOURCES and (not path.exists() or (path / "config.json").is_file())
    name = command.source or (command.data if is_name else recognise(path))
    refuse_within(None if is_name else path, name, command.folder, f"--folder {command.folder}")
    source = open_source(name, None if is_name else path)
    size = image_size_for(source, info.image_shape[:2])
    with screen.counting(f"{name}: writing .beton") as counter:
        return prepare(source, folder_for(command.folder, source, size), image_size=size, progress=counter)


def _feed(data: DataSet, split: str, info: NetworkInfo, batch_size: int) -> Feed:
    stored = data.splits[split]
    varies = data.image_shape is None
    return Feed(
        stored.path,
        indices=stored.indices,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        drop_last=False,
        image_size=info.image_shape[0] if varies else None,
        crop="center" if varies else "none",
    )


def _order_of_classes(file: Path, info: NetworkInfo, data: DataSet, screen: Screen) -> list[int] | None:
    if info.num_classes != data.num_classes:
        raise UserError(
            f"{file}: knows {info.num_classes} classes, the data '{data.name}' have {data.num_classes}; "
            "give the data that it was trained for"
        )
    order, note = match_classes(info.class_names, data.class_names, str(file))
    if note:
        (screen.warn if order is None else screen.say)(f"{file}: {note}")
    return order


def _text(shape: tuple[int, int, int]) -> str:
    H, W, C = shape
    return f"{H}x{W} pixels, {C} channel{'s' if C > 1 else ''}"


def table_of(rows: list[FileRow]) -> Table:
    """Table of one line a file."""
    first = rows[0]
    title = f"{first.num_images:,} {first.split} images, {first.precision} on {first.device}"
    if any(row.temperature_from != "valid" for row in rows):
        title += "; temperatures are the files' own"
    table = Table(title=title)
    table.add_column("file", overflow="fold")
    table.add_column("method")
    for name in ("ACC", "NLL", "ECE", "cNLL", "cECE", "T", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        m = row.measures
        values = [f"{100 * m.acc:.2f}"]
        values += ["-" if math.isnan(value) else f"{value:z.4f}" for value in (m.nll, m.ece, m.cnll, m.cece)]
        values += ["-" if math.isnan(m.temperature) else f"{m.temperature:z.3f}", f"{row.images_per_s:,.0f}"]
        table.add_row(row.file, row.method, *values)
    return table


def main() -> None:
    """Measure the files and print what was measured."""
    command = parse_arguments(EvaluateCommand, "ensdistill.evaluate")
    # Progress and warnings go to stderr: stdout holds the result alone.
    rows = evaluate(command, Screen(plain_console(stderr=True, soft_wrap=True)))
    if command.json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        console = plain_console()
        # A pipe has no width: rich would take 80 columns and fold every number
        (console if console.is_terminal else plain_console(width=140)).print(table_of(rows))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
