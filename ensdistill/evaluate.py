"""Measuring networks: `python -m ensdistill.evaluate FILE… --data PATH`.

Files are those that `ensdistill.formats.ours` wrote; a run's folder stands for its teachers and students. The
temperature of cNLL and cECE is fitted on the data's validation images. `--corruptions` and `--ood` measure away from
the training data, with those temperatures; the results are kept as JSON (`ensdistill.run.away.results`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.table import Table

from ensdistill.data.corruptions.made import MadeCorruptions
from ensdistill.data.corruptions.stored import StoredCorruptions
from ensdistill.data.dataset import DataSet
from ensdistill.data.feed import Feed
from ensdistill.formats.class_order import match_classes
from ensdistill.formats.ours import NetworkInfo
from ensdistill.report.records import REPORT_FILE
from ensdistill.run.away.corruptions import Corrupted, measure_corruptions
from ensdistill.run.away.data import feed_of, in_words, open_data, shared_classes
from ensdistill.run.away.detection import measure_detection
from ensdistill.run.away.networks import Loaded, find_networks, load_networks
from ensdistill.run.away.results import AWAY_FILE, digests_of, means_by_name, merged, plain, require_place, save_results
from ensdistill.run.away.tables import detection_table, in_a_sentence, kind_table, severity_table
from ensdistill.run.display import PIPE_WIDTH, Screen
from ensdistill.run.kept import draw
from ensdistill.run.metrics import Measures, fit_temperature, measures_at
from ensdistill.run.predict import images_per_second, predict
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.environment import Precision, choose_device, choose_precision, commit
from ensdistill.runtime.errors import UserError, run_main

_WIDE = 110
"""Columns from which on a table has room for Brier score and adaptive calibration error."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure networks that ensdistill exported: accuracy, likelihood, calibration, speed.

    For example: python -m ensdistill.evaluate runs/digits --data digits --corruptions --ood fashion-mnist
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """The networks: .safetensors files of a run folder, or the folder itself for all of its teachers and students."""
    data: str
    """The images: a .beton, a folder of class folders, of .npy files or of prepared data, CIFAR's archive …; or digits
    or fashion-mnist, which need no path."""
    source: str | None = None
    """Kind of data at --data, where it is not recognised: cifar10, tiny-imagenet, imagenet, folder, npy, beton …"""
    folder: Path = Path("runs/data")
    """Folder of the data as .beton, each source in one of its own: written there, or found already written."""
    split: Literal["test", "valid", "train"] = "test"
    """The images to measure on."""
    corruptions: tuple[Path, ...] | None = None
    """Measure on corrupted images too: on CIFAR-10-C's where its folder of .npy files is given, else on the images of
    the split, corrupted in twelve ways at five severities."""
    ood: tuple[str, ...] = ()
    """Measure how well uncertainty tells the images from those of other data, each given as --data is."""
    seed: int = 0
    """Key of what is drawn for corruptions."""
    per_corruption: bool = False
    """Print accuracy by kind of corruption too."""
    save: Path | None = None
    """File for the results of --corruptions and --ood, as JSON. Default: away.json in the run folder, where one alone
    is given; else none."""
    batch_size: int = 256
    """Images of a forward pass."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of convolutions. auto: bf16 where the device has it, as in training, else fp32."""
    device: str | None = None
    """Device to compute on: cpu, cuda, cuda:1. Default: a GPU where there is one."""
    builder: str | None = None
    """The function package.module:function that a file may call to build its network, where that is not one of ours."""
    json: bool = False
    """Print JSON in place of the tables."""

    @property
    def is_away(self) -> bool:
        """True where more is measured than the images of the split."""
        return self.corruptions is not None or bool(self.ood)

    @property
    def results(self) -> Path | None:
        """The file that the results away from the training data are kept in; None for none."""
        if self.save is None and len(self.files) == 1 and self.files[0].is_dir():
            return self.files[0] / AWAY_FILE
        return self.save


@dataclass(frozen=True, kw_only=True)
class FileRow:
    """Measures of one file."""

    file: str
    """Path of the file, as it was given; of the teachers' ensemble the folder."""
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


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a command measured."""

    rows: list[FileRow]
    """One a network, on the images of the split."""
    names: dict[str, str]
    """Of each network by its key in `away`, what it is one of."""
    digests: dict[str, list[str]]
    """Digests of the files of each network; where nothing is `away`, none."""
    away: dict[str, Any] = field(default_factory=dict)
    """Sections of `away.json` that were measured, see `run.away.results`."""


def evaluate(command: EvaluateCommand, screen: Screen) -> list[FileRow]:
    """Measure every network of the command on the images of the split; see `evaluate_all`."""
    return evaluate_all(command, screen).rows


def evaluate_all(command: EvaluateCommand, screen: Screen) -> Evaluated:
    """Measure every network of the command, all checked before the first is run.

    Raises:
        UserError: a file cannot be loaded, its classes or image shape are not those of the data, or corrupted images or
            other data cannot be used.
    """
    if command.batch_size < 1:
        raise UserError(f"--batch-size: got {command.batch_size}, expected at least 1")
    _check_away(command)
    if command.is_away and command.results is not None:
        require_place(command.results)
    device = choose_device(command.device)
    networks = find_networks(command.files, screen.say)
    first = networks[0]
    for one in networks:
        if one.info.image_shape != first.info.image_shape:
            raise UserError(
                f"{one.file}: takes images of {in_words(one.info.image_shape)}, {first.file} of "
                f"{in_words(first.info.image_shape)}; measure them in two runs"
            )
    shape = first.info.image_shape
    data = open_data(command.data, command.source, command.folder, shape, screen)
    if data.note:
        screen.say(f"{data.name}: {data.note}")
    orders = {one.key: _order_of_classes(one.file, one.info, data, screen) for one in networks if not one.parts}
    # A temperature fitted on the very images that are measured flatters: there the file's own is taken.
    fitted_on = "valid" if "valid" in data.splits and command.split != "valid" else None
    with contextlib.ExitStack() as stack:

        def feed(of: DataSet, split: str) -> Feed:
            return stack.enter_context(feed_of(of, split, shape[0], command.batch_size))

        feeds = {split: feed(data, split) for split in {command.split, fitted_on or command.split}}
        for split, each in feeds.items():
            if each.image_shape != shape:
                raise UserError(
                    f"{data.splits[split].path}: images are {in_words(each.image_shape)}, {first.file} takes "
                    f"{in_words(shape)}; give the data that it was trained for"
                )
        corrupted = _corrupted(command, data, feeds[command.split], screen)
        outside = {given: _open_outside(given, data, command, shape, screen) for given in command.ood}
        outside_feeds = {given: feed(other, command.split) for given, (other, _) in outside.items()}
        for given, each in outside_feeds.items():
            if outside[given][0].image_shape is None:
                screen.say(f"--ood {given}: of each image the central square, brought to {in_words(each.image_shape)}")
            if each.image_shape != shape:
                screen.say(f"--ood {given}: images of {in_words(each.image_shape)}, brought to {in_words(shape)}")
        loaded = load_networks(networks, orders, command.builder)
        rows = []
        for network in loaded.values():
            rows.append(_measure(network.to(device), feeds, command, fitted_on, device))
            network.to(torch.device("cpu"))  # room on the device for the next
        names, digests = {one.key: one.name for one in networks}, {}
        away: dict[str, Any] = {}
        if command.is_away:
            digests = digests_of({one.key: one for one in networks})
            measured_on = {
                "data": data.name,
                "split": command.split,
                "num_images": feeds[command.split].num_images,
                "device": str(device),
                "precision": rows[0].precision,
                "commit": commit(),
                "networks": digests,
            }
            where: dict[str, Any] = {"device": device, "precision": rows[0].precision}
            for network in loaded.values():
                network.to(device)
        if outside:  # first, for it takes less
            with screen.counting("out-of-distribution") as counter:
                found, known = measure_detection(loaded, feeds[command.split], outside_feeds, **where, progress=counter)
            away["ood"] = {given: means_by_name(each, names) for given, each in found.items()}
            away["ood_of"] = {
                given: measured_on
                | {"num_outside": outside_feeds[given].num_images, "shared_classes": shared}
                | {"known_images": known[given], "each": found[given]}
                for given, (other, shared) in outside.items()
            }
            for given, (other, _) in outside.items():
                if known[given] and other.source_key != data.source_key:
                    count = f"{known[given]:,} of its images are"
                    screen.warn(f"--ood {given}: {count} among those that are measured as --data, pixel by pixel")
        if corrupted is not None:
            clean = {key: row.measures for key, row in zip(loaded, rows, strict=True)}
            with screen.counting("corrupted images") as counter:
                away["corruptions"] = measure_corruptions(
                    loaded, corrupted, clean, **where, progress=counter, warn=screen.warn
                )
            away["corruptions_of"] = measured_on | ({} if command.corruptions else {"seed": command.seed})
    return Evaluated(rows=rows, names=names, digests=digests, away=away)


def keep(command: EvaluateCommand, evaluated: Evaluated, screen: Screen) -> None:
    """Write what was measured away from the training data to its file, if it has one, and draw the run's report anew.

    Raises:
        UserError: the file cannot be written.
    """
    if (path := command.results) is None or not evaluated.away:
        return
    save_results(path, merged(path, evaluated.away, evaluated.digests, screen.say))
    screen.say(f"results: {path}")
    if path.name == AWAY_FILE and (path.parent / REPORT_FILE).is_file():
        draw(path.parent, screen)


def _check_away(command: EvaluateCommand) -> None:
    """Refuse what is asked of `--corruptions` and `--ood` in contradiction, before anything is read."""
    if command.corruptions is not None and len(command.corruptions) > 1:
        raise UserError(
            f"--corruptions: got {len(command.corruptions)} folders, expected one or none; give networks before options"
        )
    if command.corruptions and command.split != "test":
        raise UserError(
            f"--corruptions {command.corruptions[0]}: its images are of the test split, --split is {command.split}; "
            "leave one of the two out"
        )
    if not 0 <= command.seed < 1 << 64:
        raise UserError(f"--seed: got {command.seed}, expected a number from 0 to 2**64 - 1")
    for option, asked in (("--save", command.save is not None), ("--per-corruption", command.per_corruption)):
        if asked and not (command.is_away if option == "--save" else command.corruptions is not None):
            raise UserError(f"{option}: nothing to {option[2:].partition('-')[0]}; give --corruptions with it")
    if twice := next((given for given in command.ood if command.ood.count(given) > 1), None):
        raise UserError(f"--ood: got {twice} twice; give each once")


def _corrupted(command: EvaluateCommand, data: DataSet, feed: Feed, screen: Screen) -> Corrupted | None:
    if command.corruptions is None:
        return None
    if not command.corruptions:
        return MadeCorruptions(feed, command.seed)
    return StoredCorruptions(
        command.corruptions[0],
        image_shape=feed.image_shape,
        class_names=data.class_names,
        batch_size=command.batch_size,
        say=screen.say,
        warn=screen.warn,
    )


def _open_outside(
    given: str, data: DataSet, command: EvaluateCommand, shape: tuple[int, int, int], screen: Screen
) -> tuple[DataSet, list[str]]:
    """Data that should be out-of-distribution, and the names of classes that they share with `data`."""
    outside = open_data(given, None, command.folder, shape, screen)
    if outside.note:
        screen.say(f"--ood {given}: {outside.note}")
    if outside.source_key == data.source_key:
        screen.warn(f"--ood {given}: is --data itself, which nothing can tell apart (AUROC 50 %)")
        return outside, list(data.class_names)
    return outside, shared_classes(data, outside, given, screen)


def _measure(
    loaded: Loaded,
    feeds: Mapping[str, Feed],
    command: EvaluateCommand,
    fitted_on: str | None,
    device: torch.device,
) -> FileRow:
    found, classifier = loaded.found, loaded.network
    precision = choose_precision(command.precision, device)
    feed = feeds[command.split]
    logits_NMK, labels_N = predict(classifier, feed, device=device, precision=precision)
    is_one_file = not found.parts and not found.is_student  # what else is shown has no temperature of its own
    own = found.info.temperature if is_one_file else None
    temperature = math.nan if own is None else own
    try:
        if fitted_on is not None:
            temperature = fit_temperature(*predict(classifier, feeds[fitted_on], device=device, precision=precision))
        measured = measures_at(logits_NMK, labels_N, temperature)
    except UserError as error:
        raise UserError(f"{found.file}: {error}") from error
    with feed.epoch(0) as batches:
        images_BHWC, _ = next(batches)
    return FileRow(
        file=str(found.file),
        method=found.method,
        members=found.members,
        split=command.split,
        num_images=len(labels_N),
        measures=measured,
        temperature_from="valid" if fitted_on is not None else "none" if math.isnan(temperature) else "file",
        images_per_s=images_per_second(classifier, images_BHWC, device=device, precision=precision),
        device=str(device),
        precision=precision,
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


def table_of(rows: list[FileRow], width: int = PIPE_WIDTH) -> Table:
    """Table of one line a network, for so many columns."""
    first = rows[0]
    title = f"{first.num_images:,} {first.split} images, {first.precision} on {first.device}"
    if any(row.temperature_from != "valid" for row in rows):
        title += "; temperatures are the files' own"
    folder, names = _below([row.file for row in rows])
    table = Table(title=f"{folder}: {title}" if folder not in ("", ".") else title)
    table.add_column("file", overflow="fold")
    table.add_column("method")
    more = {"Brier": "brier", "aECE": "aece"} if width >= _WIDE else {}
    columns = {"NLL": "nll", "ECE": "ece", "cNLL": "cnll", "cECE": "cece"} | more
    for name in ("ACC", *columns, "T", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, name in zip(rows, names, strict=True):
        m = row.measures
        shown = [getattr(m, name) for name in columns.values()]
        values = [f"{100 * m.acc:.2f}", *("-" if math.isnan(value) else f"{value:z.4f}" for value in shown)]
        values += ["-" if math.isnan(m.temperature) else f"{m.temperature:z.3f}", f"{row.images_per_s:,.0f}"]
        table.add_row(name, row.method, *values)
    return table


def _below(files: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all files lie in, none for a single one, and what is left of their names."""
    shorter = [file.removesuffix("/best.safetensors") for file in files]
    if len(set(files)) < 2 or len(set(shorter)) < len(set(files)):
        return "", list(files)
    folder = os.path.commonpath(map(os.path.abspath, shorter))
    if folder in map(os.path.abspath, shorter):
        folder = os.path.dirname(folder)
    given = os.path.relpath(folder)
    return given if len(given) < len(folder) else folder, [os.path.relpath(name, folder) for name in shorter]


def away_tables(evaluated: Evaluated, *, per_corruption: bool = False) -> list[Table]:
    """Tables of what was measured away from the training data."""
    away, tables = evaluated.away, []
    if "corruptions" in away:
        section, of = away["corruptions"], away["corruptions_of"]
        title = f"{of['data']}, {section['description']}"
        tables.append(severity_table(section, title))
        if per_corruption:
            tables.append(kind_table(section, title))
            if "extra" in section:
                tables.append(kind_table(section["extra"], "no part of any mean"))
    for given, of in away.get("ood_of", {}).items():
        title = f"{of['num_outside']:,} images, beside {of['num_images']:,} of {of['data']}"
        tables.append(detection_table(of["each"], evaluated.names, given, title))
    return tables


def main() -> None:
    """Measure the networks and print what was measured."""
    command = parse_arguments(EvaluateCommand, "ensdistill.evaluate")
    # Progress and warnings go to stderr: stdout holds the result alone.
    screen = Screen(plain_console(stderr=True, soft_wrap=True))
    evaluated = evaluate_all(command, screen)
    if command.json:
        rows = [row.to_json() for row in evaluated.rows]
        print(json.dumps(plain({"networks": rows} | evaluated.away) if command.is_away else rows, indent=2))
    else:
        console = plain_console()
        if not console.is_terminal:  # a pipe has no width: rich would take 80 columns and fold every number
            console = plain_console(width=PIPE_WIDTH)
        console.print(table_of(evaluated.rows, console.width))
        for table in away_tables(evaluated, per_corruption=command.per_corruption):
            console.print(table)
        if "corruptions" in evaluated.away:
            console.print(in_a_sentence(evaluated.away["corruptions"]), soft_wrap=True)
    keep(command, evaluated, screen)  # last: what the disk refuses was shown


if __name__ == "__main__":
    raise SystemExit(run_main(main))
