"""Whole runs of `make gpu-check`, in the seconds that it gives: `python -m bench.gpu_run --data cifar10-jpeg.tar.xz`.

Without --data the teachers of random pixels for a moment, then one student, fed by FFCV from the file at every epoch:
what it takes does not depend on what the images show. With --data an archive or a folder of class folders
(train/CLASS/*.jpg, test/CLASS/*.jpg), turned once into arrays, shuffled by a fixed seed, a tenth of every class of
train held out; then the official schedule of 200 epochs, or, by the speed of a short run before, as many as fit.

OUT/NAME-run.csv has a row a training, OUT/NAME.csv the table of accuracies. Both have what was finished before a cut.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from bench.harness.rows import write_table
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.environment import choose_device, commit, device_name, versions
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.files import read_json, require_digest
from ensdistill.training.loop import Progress, validation_epochs

T = TypeVar("T")

EPOCHS, WARM_UP = 200, 5
"""Epochs of the official schedule, and of its warm-up."""
_TRAIN, _OTHERS, _SIZE = 12_800, 1_280, 32
_SHORT_EPOCHS = 2
_SPARE = 1.1
"""Factor by which a run may take longer than was computed for it."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train on random pixels, or on the images of an archive for as many epochs as fit."""

    seconds: float
    """Seconds for everything, until the last row is written."""
    data: Path | None = None
    """Archive or folder of train/CLASS/*.jpg and test/CLASS/*.jpg. Default: random pixels."""
    name: str = ""
    """Name of the tables. Default: what the data are called, or `pixels`."""
    network: str = "wrn28x4"
    """Network of teachers and students."""
    methods: tuple[str, ...] = ("latentbe+tdiv-sdiv",)
    """Methods by which students are distilled."""
    backend: str = "tuned"
    """Backend, as `--backend` of fast_train takes it."""
    out: Path = Path("build/gpu-check/out")
    """Folder that the tables are written to."""
    work: Path = Path("build/gpu-check")
    """Folder of arrays and runs."""
    limit_images: int | None = None
    """Take so many images of each class of an archive alone, to try it out."""
    most_epochs: int = EPOCHS
    """Most epochs that a run on an archive has."""
    options: str = ""
    """More arguments for fast_train, such as --options='--device=cpu --members=2'."""


# ---- images ---------------------------------------------------------------------------------------------------------


def _decode(content: bytes) -> np.ndarray:
    from PIL import Image  # in the workers

    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _files(data: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of every file of an archive, which is read in one go, or of a folder."""
    if data.is_dir():
        yield from ((str(path), path.read_bytes()) for path in data.glob("**/*.jpg"))
        return
    with tarfile.open(data) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                yield member.name, file.read()


def read_images(data: Path, limit: int | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read images (N, H, W, 3) uint8 and labels (N,) of train/CLASS/*.jpg and test/CLASS/*.jpg, in the order of names.

    Raises:
        UserError: there are none, or there is no such file.
    """
    if not data.exists():
        raise UserError(f"--data {data}: not there; expected an archive or a folder of train/CLASS/*.jpg")
    parts: dict[str, dict[str, list[bytes]]] = {"train": {}, "test": {}}
    for name, content in sorted(_files(data)):
        if found := re.search(r"\b(train|test)/([^/]+)/[^/]+\.jpg$", name):
            parts[found[1]].setdefault(found[2], []).append(content)
    splits = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        for part, classes in parts.items():
            if not classes:
                raise UserError(f"--data {data}: holds no {part}/CLASS/*.jpg; expected class folders of JPEG files")
            contents = [files[:limit] for files in classes.values()]
            images = list(workers.map(_decode, itertools.chain(*contents), chunksize=256))
            splits[part] = np.stack(images), np.repeat(np.arange(len(contents)), [len(files) for files in contents])
    return splits


def shuffled_splits(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rows of (train, valid), each in random order: a tenth of every class is valid."""
    draw = np.random.default_rng(seed)
    rows = draw.permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)  # the place of a row among those of its class
    for label in np.unique(labels):
        own = rows[labels[rows] == label]
        ranks[own] = np.arange(len(own)) * 10 // len(own)
    # drawn again: in `rows` each class begins with its own tenth, and the first rows of train would be of few classes
    return draw.permutation(rows[ranks[rows] > 0]), draw.permutation(rows[ranks[rows] == 0])


def write_archive(data: Path, folder: Path, limit: int | None = None) -> None:
    """Turn an archive, or a folder, of JPEG files into pairs of .npy files, train, valid and test, in `folder`."""
    if (folder / "test_labels.npy").exists():
        return
    found = read_images(data, limit)
    images, labels = found["train"]
    rows = dict(zip(("train", "valid"), shuffled_splits(labels), strict=True))
    splits = {name: (images[own], labels[own]) for name, own in rows.items()}
    order = np.random.default_rng(1).permutation(len(found["test"][1]))
    _save(folder, splits | {"test": (found["test"][0][order], found["test"][1][order])})


def write_pixels(folder: Path) -> None:
    """Write random images of CIFAR-100's shape."""
    draw = np.random.default_rng(0)
    shapes = {"train": _TRAIN, "valid": _OTHERS, "test": _OTHERS}
    images = {name: draw.integers(0, 256, (N, _SIZE, _SIZE, 3), dtype=np.uint8) for name, N in shapes.items()}
    _save(folder, {name: (x_NHWC, np.arange(len(x_NHWC)) % 100) for name, x_NHWC in images.items()})


def _save(folder: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in splits.items():
        np.save(folder / f"{name}_images.npy", images)
        np.save(folder / f"{name}_labels.npy", labels)


# ---- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a short run, all its trainings together."""

    step_seconds: float
    """Seconds of the steps of an epoch."""
    validation_seconds: float
    """Seconds of a validation, with what is saved then."""
    other_seconds: float
    """Seconds that do not depend on the epochs: start, capture, evaluation."""

    def of_run(self, epochs: int) -> float:
        """Predict the seconds of a run of so many epochs."""
        steps = epochs * self.step_seconds + len(validation_epochs(epochs)) * self.validation_seconds
        return _SPARE * steps + self.other_seconds

    def epochs_in(self, seconds: float) -> int:
        """Find the most epochs, from 1 to the official 200, of a run that takes no longer than `seconds`."""
        return max((n for n in range(1, EPOCHS + 1) if self.of_run(n) <= seconds), default=1)


def speed_of(run: Path, seconds: float, epochs: int, images: int, whole: int) -> Speed:
    """Compute the speed of a finished `run` of `seconds` and `epochs` over `images`, for epochs over `whole` many."""
    found = [outcome for _, outcome in outcomes(run)]
    steps = sum(one.seconds for one in found)
    watched = sum(one.device.seconds if one.device else one.seconds for one in found)
    return Speed(
        step_seconds=steps / epochs * whole / images,
        validation_seconds=(watched - steps) / len(validation_epochs(epochs)),
        other_seconds=max(0.0, seconds - watched),
    )


# ---- what a run left ------------------------------------------------------------------------------------------------


def outcomes(run: Path) -> Iterator[tuple[str, Progress]]:
    """Yield (folder in the run, how it went) of every training that was finished."""
    for path in sorted(run.rglob("outcome.json")):
        progress = _checked(path, lambda values: Progress.from_values(require_digest(values)))
        yield str(path.parent.relative_to(run)), progress


def training_rows(run: Path) -> list[dict[str, Any]]:
    """Make a row of each finished training: speed, waiting, how busy the GPU was, energy.

    Teachers that train together share them.
    """
    rows = []
    for name, one in outcomes(run):
        device, seconds = one.device, max(one.seconds, 1e-9)
        rows.append(
            {
                "training": name,
                "epochs": one.epochs,
                "images": one.images,
                "seconds": round(one.seconds, 2),
                "images_per_s": round(one.images / seconds, 1),
                "data_wait_share": round(one.waited / seconds, 5),
                "graph_busy_share": "" if one.busy is None else round(one.busy / seconds, 4),
                "utilisation": _rounded(device and device.utilisation),
                "wh": _rounded(device and device.energy_wh),
                "throttled_share": _rounded(device and device.throttled),
                "peak_gb": _rounded(one.peak_bytes and one.peak_bytes / 1e9),
                "best_valid_acc": round(one.best_acc, 4),
            }
        )
    return rows


def quality_rows(run: Path) -> list[dict[str, Any]]:
    """Make a row of each network in the run's table: its measures on the test images."""
    path = run / "results.json"
    if not path.exists():
        return []

    def named(values: Any) -> list[dict[str, Any]]:
        rows = values["rows"]
        return [{"network of": row["name"], **row["measures"], "dee": row["dee"], "cost": row["cost"]} for row in rows]

    return _checked(path, named)


def _checked(path: Path, take: Callable[[Any], T]) -> T:
    try:
        return take(read_json(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not what a run wrote ({error!r:.200}); run it again in another folder") from error


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments, started = parse_arguments(Arguments, "bench.gpu_run", argv), time.monotonic()
    name = arguments.name or (arguments.data.name.split(".")[0] if arguments.data else "pixels")
    data = arguments.work / f"{name}-arrays"
    if arguments.data is None:
        write_pixels(data)
    else:
        write_archive(arguments.data, data, arguments.limit_images)
    whole = len(np.load(data / "train_labels.npy", mmap_mode="r"))
    print(f"{name}: {whole:,} training images, arrays after {time.monotonic() - started:.0f} s", flush=True)
    train = _trainer(arguments, data)
    short, run, code = arguments.work / f"{name}-short", arguments.work / f"{name}-run", 0
    if arguments.data is None:
        epochs = 15  # of 100 steps: some 15 s at 10 ms a step
        start = ("--teacher.epochs=1", "--teacher.warmup-epochs=0.5", "--cache=none")
    else:
        few, began = min(_TRAIN, whole), time.monotonic()
        lengths = [f"--{who}.epochs={_SHORT_EPOCHS}" for who in ("teacher", "student")]
        lengths += [f"--{who}.warmup-epochs=1" for who in ("teacher", "student")]
        code = train(short, *lengths, f"--train-images={few}", arguments.seconds / 2)
        if code:
            return code
        speed = speed_of(short, time.monotonic() - began, _SHORT_EPOCHS, few, whole)
        epochs = min(arguments.most_epochs, speed.epochs_in(arguments.seconds - (time.monotonic() - started)))
        print(f"{speed}: {epochs} of {EPOCHS} epochs, {speed.of_run(epochs):.0f} s", flush=True)
        start = (f"--teacher.epochs={epochs}", f"--teacher.warmup-epochs={WARM_UP * epochs / EPOCHS}")
    warm_up = f"--student.warmup-epochs={WARM_UP * epochs / EPOCHS}"
    try:
        code = train(
            run, *start, f"--student.epochs={epochs}", warm_up, arguments.seconds - (time.monotonic() - started)
        )
    finally:  # not before: this process's own context on the GPU would be somebody else's to the run
        rows, problem = training_rows(run), _problem(arguments, name) | {"epochs_of_200": epochs}
        write_table(arguments.out / f"{name}-run.csv", [problem | row for row in rows])
        if arguments.data is not None:
            write_table(arguments.out / f"{name}.csv", [problem | row for row in quality_rows(run)])
    print(_headline(problem, rows))
    return code


def _trainer(arguments: Arguments, data: Path) -> Callable[..., int]:
    """Make a function that runs fast_train in a new folder with options, for at most the seconds that come last."""

    def train(out: Path, *options: Any) -> int:
        shutil.rmtree(out, ignore_errors=True)
        recipe = "cifar10-wrn28x1" if arguments.data is not None else "cifar100-wrn28x4"
        common = ["--recipe", recipe, "--data", str(data), "--network", arguments.network, "--out", str(out)]
        common += ["--methods", *arguments.methods, "--backend", arguments.backend, "--teachers-together", "yes"]
        command = [
            sys.executable,
            "-m",
            "ensdistill.fast_train",
            *common,
            *options[:-1],
            *shlex.split(arguments.options),
        ]
        print("$", " ".join(command), flush=True)
        try:
            return subprocess.run(command, timeout=max(1.0, options[-1])).returncode
        except subprocess.TimeoutExpired:
            print(f"cut off after {options[-1]:.0f} s")
            return 1

    return train


def _problem(arguments: Arguments, name: str) -> dict[str, Any]:
    device, found = choose_device(None), versions()
    text = f"torch {found['torch']}, triton {found['triton']}, CUDA {torch.version.cuda}, ffcv {found['ffcv']}"
    shown = {"cifar10-jpeg": "CIFAR-10 as JPEG", "pixels": "random pixels"}.get(name, name)
    where = {"device": device_name(device), "versions": text, "commit": commit()}
    return where | {"data": shown, "network": arguments.network, "backend": arguments.backend}


def _headline(problem: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Write `CIFAR-10 as JPEG, 200 epochs: kd 61,250 images/s, 0.1% waiting for data, graph busy 98.9%, 4 Wh; …`."""
    parts = []
    for row in rows:
        if row["training"].startswith("teachers") and not row["training"].endswith("0"):
            continue  # together they took the same
        text = f"{row['training']} {row['images_per_s']:,.0f} images/s, {row['data_wait_share']:.1%} waiting for data"
        if row["graph_busy_share"] != "":
            text += f", graph busy {row['graph_busy_share']:.1%}"
        parts.append(text + (f", {row['wh']:.3g} Wh" if row["wh"] != "" else ""))
    return f"{problem['data']}, {problem['epochs_of_200']} epochs: {'; '.join(parts) or 'no training was finished'}"


if __name__ == "__main__":
    sys.exit(run_main(main))
