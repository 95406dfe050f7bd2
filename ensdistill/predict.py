"""Classes of pictures: `python -m ensdistill.predict FILE IMAGES…`.

FILE is a .safetensors file of a run folder, or a hub folder. Pictures are decoded and cut, and probabilities computed,
as `ensdistill.evaluate` does; they are calibrated by the file's own temperature. Pictures are read a batch at a time.

A picture that cannot be read is named on stderr, and the others are done; the exit code is then 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ensdistill.data.image_files import parallel_map
from ensdistill.data.sources.arrays import load_npy
from ensdistill.data.sources.base import check_images
from ensdistill.data.sources.walk import Walk
from ensdistill.deploy.pictures import read_picture
from ensdistill.formats.hub import load_network
from ensdistill.formats.ours import NetworkInfo
from ensdistill.models import Classifier
from ensdistill.run.display import Screen
from ensdistill.run.metrics import probabilities
from ensdistill.run.predict import batch_logits
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.environment import choose_device, choose_precision, usable_cores
from ensdistill.runtime.errors import UserError, one_line, run_main

SOME_UNREADABLE = 3
"""Exit code where pictures could not be read, and the others were done."""
_MAX_NAME = 60
"""Letters of a table's longest column on a terminal; longer names are folded."""


@dataclass(frozen=True, kw_only=True)
class PredictCommand:
    """Name the classes of pictures, with calibrated probabilities.

    For example: python -m ensdistill.predict runs/digits/students/kd-seed0/best.safetensors one.png folder --top 3
    """

    file: tyro.conf.Positional[Path]
    """The network: a .safetensors file of a run folder, or a folder of `ensdistill.export --to hub`."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, folders of them, or .npy files of uint8 (N, H, W) or (N, H, W, C)."""
    top: int = 5
    """Classes to name for each picture, the most probable first."""
    json: bool = False
    """Print one JSON object a line for each picture, in place of a table."""
    batch_size: int = 256
    """Images of a forward pass, and pictures in memory at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of convolutions. auto: bf16 where the device has it, as in training and evaluation, else fp32."""
    device: str | None = None
    """Device to compute on: cpu, cuda, cuda:1. Default: a GPU where there is one."""
    builder: str | None = None
    """The function package.module:function that the file may call to build its network, where it is not one of ours."""


class Picture(NamedTuple):
    """One picture that was asked about."""

    name: str
    """Its path; of an array, with the number of the image."""
    read: Callable[[], np.ndarray]
    """Function that reads it as uint8 (H, W, C)."""


class Prediction(NamedTuple):
    """What the network says of a picture."""

    name: str
    """Its path; of an array, with the number of the image."""
    probs_K: torch.Tensor | None
    """Probability of each class, float64 (K,); None where it could not be read."""
    error: str
    """Why it could not be read."""


class Inputs:
    """The pictures that a command names, listed and checked before any is read."""

    def __init__(self, paths: Sequence[Path], info: NetworkInfo) -> None:
        """List them.

        Raises:
            UserError: nothing at a path, a folder without pictures, or an array of another type or shape.
        """
        self.shape = info.image_shape
        self._groups: list[tuple[Path, np.ndarray] | list[Path]] = [self._group(Path(path)) for path in paths]
        self.has_files = any(isinstance(group, list) for group in self._groups)
        if self.has_files and self.shape[2] not in (1, 3):
            raise UserError(
                f"{paths[0]}: pictures have 1 or 3 channels, the network takes {self.shape[2]}; give a .npy of those"
            )

    def _group(self, path: Path) -> tuple[Path, np.ndarray] | list[Path]:
        if path.is_dir():
            return Walk().images(path)
        if path.suffix.lower() != ".npy":
            if not path.is_file():
                what = "neither file nor folder" if path.exists() else "no such file or folder"
                raise UserError(f"{path}: {what}; expected pictures, folders of them, or .npy files")
            return [path]
        images = load_npy(path)
        images = images[..., None] if images.ndim == 3 else images
        check_images(images, str(path))
        if images.shape[1:] != self.shape:
            raise UserError(
                f"{path}: images of shape {tuple(images.shape[1:])}; expected {self.shape}, (H, W, C) of the network"
            )
        return path, images

    def __iter__(self) -> Iterator[Picture]:
        for group in self._groups:
            if isinstance(group, list):
                for path in group:
                    yield Picture(str(path), partial(read_picture, path, self.shape))
            else:
                path, images = group
                for i in range(len(images)):
                    yield Picture(f"{path}[{i}]", partial(np.array, images[i]))

    @property
    def longest_name(self) -> int:
        """Letters of the longest name."""
        files = [len(str(path)) for group in self._groups if isinstance(group, list) for path in group]
        arrays = [len(f"{g[0]}[{len(g[1]) - 1}]") for g in self._groups if not isinstance(g, list)]
        return max(files + arrays, default=0)


def predictions(
    classifier: Classifier, info: NetworkInfo, inputs: Iterable[Picture], command: PredictCommand
) -> Iterator[list[Prediction]]:
    """Predict batch by batch, in the order of the inputs.

    Args:
        classifier: on its device, in evaluation mode.

    Raises:
        UserError: the network gives values that are not finite.
    """
    device = classifier.pixel_mean.device
    precision = choose_precision(command.precision, device)

    def ready(batch: list[tuple[str, np.ndarray | UserError]], step: int) -> list[Prediction]:
        readable = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
        found = iter(())
        if readable:
            images_BHWC = torch.from_numpy(np.stack(readable))
            logits_BMK = batch_logits(classifier, images_BHWC, step, device=device, precision=precision).cpu()
            if not bool(logits_BMK.isfinite().all()):
                first = int((~logits_BMK.isfinite()).flatten(1).any(dim=1).nonzero()[0])
                name = [name for name, pixels in batch if isinstance(pixels, np.ndarray)][first]
                raise UserError(
                    f"{command.file}: gives values that are not finite for {name}; the network has diverged (or "
                    "overflows in bf16: try --precision fp32)"
                )
            found = iter(probabilities(logits_BMK, info.temperature))
        return [
            Prediction(name, next(found), "") if isinstance(pixels, np.ndarray) else Prediction(name, None, str(pixels))
            for name, pixels in batch
        ]

    batch: list[tuple[str, np.ndarray | UserError]] = []
    num_readable = step = 0
    for name, pixels in parallel_map(_read, inputs, usable_cores()):
        batch.append((name, pixels))
        num_readable += isinstance(pixels, np.ndarray)
        if num_readable == command.batch_size or len(batch) >= 4 * command.batch_size:
            yield ready(batch, step)
            batch, num_readable, step = [], 0, step + 1
    if batch:
        yield ready(batch, step)


def _read(picture: Picture) -> tuple[str, np.ndarray | UserError]:
    try:
        return picture.name, picture.read()
    except UserError as error:
        return picture.name, UserError(one_line(str(error)))


def predict(command: PredictCommand, screen: Screen, console: Console | None = None) -> int:
    """Print what the network says of every picture; return the number of those that could not be read.

    Args:
        screen: for notes and for what cannot be read.
        console: for the result. Default: stdout, of the width that the table needs where that is no terminal.

    Raises:
        UserError: an option, the network or an input cannot be used; nothing was printed by then, but where the network
            gives values that are not finite.
    """
    if not command.images:
        raise UserError("no picture given; expected pictures, folders of them, or .npy files")
    if command.top < 1:
        raise UserError(f"--top: got {command.top}, expected at least 1")
    if command.batch_size < 1:
        raise UserError(f"--batch-size: got {command.batch_size}, expected at least 1")
    device = choose_device(command.device)
    classifier, info = load_network(command.file, builder=command.builder)
    inputs = Inputs(command.images, info)
    if info.temperature is None:
        screen.say(f"{command.file}: has no fitted temperature: probabilities are the network's own, not calibrated")
    if inputs.has_files and info.image_shape[2] == 1:
        screen.say(f"{command.file}: takes images of one channel: colours are turned into grey")
    classifier = classifier.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    table = _Tables(info, inputs.longest_name, command.top, console or plain_console())
    num_unreadable = 0
    for batch in predictions(classifier, info, inputs, command):
        for prediction in batch:
            if prediction.probs_K is None:
                num_unreadable += 1
                screen.console.print(f"error: {prediction.error}", soft_wrap=True)
        if command.json:
            for prediction in batch:
                print(json.dumps(_to_json(prediction, info, command.top), ensure_ascii=False), flush=True)
        else:
            table.show(batch)
    if num_unreadable:
        screen.say(f"{num_unreadable:,} of the pictures could not be read")
    return num_unreadable


def _ranked(probs_K: torch.Tensor, top: int) -> list[tuple[int, float]]:
    """The most probable classes and their probabilities; of equals the first."""
    order = probs_K.sort(descending=True, stable=True)
    return list(zip(order.indices[:top].tolist(), order.values[:top].tolist(), strict=True))


def _to_json(prediction: Prediction, info: NetworkInfo, top: int) -> dict[str, object]:
    if prediction.probs_K is None:
        return {"image": prediction.name, "error": prediction.error}
    classes = [
        {"class": info.class_names[k], "index": k, "probability": p} for k, p in _ranked(prediction.probs_K, top)
    ]
    return {"image": prediction.name, "classes": classes, "temperature": info.temperature}


class _Tables:
    """One table in parts, a part a batch, so that thousands of rows wait nowhere."""

    def __init__(self, info: NetworkInfo, longest_name: int, top: int, console: Console) -> None:
        self.info, self.console, self.is_first = info, console, True
        self.top = min(top, info.num_classes)
        most = _MAX_NAME if console.is_terminal else longest_name
        self.name_width = max(len("image"), min(longest_name, most))
        self.class_width = max(len("class"), min(max(map(len, info.class_names)), _MAX_NAME // 2))
        self.rest_width = max(len("then"), (self.top - 1) * (self.class_width + 9) - 2) if self.top > 1 else 0
        if not console.is_terminal:  # it has no width, and rich would fold what does not fit into 80 columns
            console.width = self.name_width + self.class_width + self.rest_width + 20

    def show(self, batch: Sequence[Prediction]) -> None:
        """Print the rows of a batch; those that could not be read have none."""
        known = [(prediction.name, prediction.probs_K) for prediction in batch if prediction.probs_K is not None]
        if not known:
            return
        table = Table(box=SIMPLE_HEAD, show_edge=False, show_header=self.is_first)
        if self.is_first:
            T = self.info.temperature
            table.title = "probabilities, " + ("not calibrated" if T is None else f"calibrated at temperature {T:.3f}")
            table.title_justify = "left"
        table.add_column("image", width=self.name_width, overflow="fold")
        table.add_column("class", width=self.class_width, overflow="fold")
        table.add_column("p", width=6, justify="right", no_wrap=True)
        if self.top > 1:
            table.add_column("then", width=self.rest_width, overflow="fold")
        for name, probs_K in known:
            (first, p), *rest = _ranked(probs_K, self.top)
            cells = [name, self.info.class_names[first], f"{p:.4f}"]
            if self.top > 1:
                cells.append(", ".join(f"{self.info.class_names[k]} {p:.4f}" for k, p in rest))
            table.add_row(*cells)
        self.console.print(table)
        self.is_first = False


def main() -> int:
    """Print the predictions."""
    command = parse_arguments(PredictCommand, "ensdistill.predict")
    # Notes and errors go to stderr: stdout holds the result alone.
    return SOME_UNREADABLE if predict(command, Screen(plain_console(stderr=True, soft_wrap=True))) else 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
