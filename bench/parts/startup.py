"""Seconds from the command to the first step that is done: fresh processes, with caches empty, filled ahead, and warm.

**What is measured.** `python -m ensdistill.fast_train` distils a student from teachers that lie in files, from images
whose .beton lies there too. The clock runs from just before the process starts to the line of its log that tells of its
first step, whose values have then come from the device: the line is also a TensorBoard event, which carries the time of
its writing. So Python, imports, FFCV, the memory's prediction, tuning, compiling and capturing are all in it. An epoch
has one step here, so that the line does not wait for a second one. The process then validates and ends, untimed.

| provider | caches |
|---|---|
| `cold` | of Triton, TorchInductor and CUDA, and the tuning table: all empty |
| `ahead-of-time` | the same, but for Triton's, which is a copy of what `make aot` made (only on a GPU) |
| `warm` | all as an earlier start left them |

Starts take turns, forwards and backwards, after one that is not timed and fills the warm caches. `p50_ms` is a start,
`images_per_s` is left empty.

**What it does not say.** How long a machine takes that has read nothing from its disk yet: libraries are in the page
cache. Nor what it takes to write the .beton or to train the teachers. On a CPU nothing is compiled ahead, and cold and
warm differ by little more than chance.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench.harness.context import FAILED, ROOT, Context, percentile_columns
from bench.harness.rows import Row
from bench.harness.turns import Timing
from ensdistill.data.prepare import folder_for, prepare
from ensdistill.data.sources.registry import open_source
from ensdistill.formats.ours import NetworkInfo, save_network
from ensdistill.models import build

METHOD, RECIPE = "latentbe+tdiv-sdiv", "cifar100-wrn28x4"
AOT_CACHE = ROOT / "build" / "aot" / "cache"
ROUNDS, QUICK_ROUNDS = 3, 1
LIMIT_SECONDS = 600.0
"""Seconds after which a start has failed."""
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "ENSDISTILL_CACHE": "ensdistill",
}
"""Environment variables, and the folders that they shall name."""


class StartFailed(RuntimeError):
    """Raised where a start comes to no step; says why."""


@dataclass(frozen=True)
class Starts:
    """Everything that starts need, in a folder of their own."""

    folder: Path
    """Folder that gets data, teachers, caches and runs."""
    context: Context
    """Context that says what is trained."""

    def prepare(self) -> None:
        """Write images of random pixels, their .beton and the teachers' files."""
        context, size, K = self.context, self.context.size, self.context.classes
        draw = np.random.default_rng(0)
        self.data.mkdir(parents=True)
        for split, images in (("train", max(context.B, K)), ("valid", K), ("test", K)):
            pixels = draw.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
            np.save(self.data / f"{split}_images.npy", pixels)
            np.save(self.data / f"{split}_labels.npy", np.arange(images) % K)
        source = open_source("npy", self.data)
        prepare(source, folder_for(self.runs / "data", source, None))
        for t, path in enumerate(self.teachers):
            info = NetworkInfo(
                architecture=context.network,
                class_names=tuple(map(str, range(K))),
                image_shape=(size, size, 3),
                pixel_mean=(0.5,) * 3,
                pixel_std=(0.25,) * 3,
                method="ce",
            )
            save_network(path, build(context.network, num_classes=K, image_size=size, seed=t), info)

    @property
    def data(self) -> Path:
        """Folder of the images."""
        return self.folder / "images"

    @property
    def runs(self) -> Path:
        """Folder of what starts leave."""
        return self.folder / "runs"

    @property
    def teachers(self) -> list[Path]:
        """Files of the E teachers."""
        return [self.folder / f"teacher{t}.safetensors" for t in range(self.context.E)]

    def caches(self, kind: str) -> Path:
        """Name the folder of the caches of `kind`."""
        return self.folder / "caches" / kind

    def command(self, out: Path) -> list[str]:
        """Make the command that is started."""
        context = self.context
        options = {
            "--recipe": RECIPE,
            "--data": self.data,
            "--out": out,
            "--network": context.network,
            "--members": context.E,
            "--methods": METHOD,
            "--stage": "distill",
            "--student.epochs": 1,
            "--student.warmup-epochs": 0,
            "--student.batch-size": context.B,
            "--teacher.batch-size": context.B,  # no teacher is trained, but it is checked
            "--precision": context.precision,
            "--threads": context.threads,
            "--device": context.device,
            "--log-every": 1,
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [sys.executable, "-m", "ensdistill.fast_train", *words, "--teachers", *map(str, self.teachers)]

    def environment(self, kind: str) -> dict[str, str]:
        """Make the environment of a start: ours, with the caches of `kind`, and with kernels that are compiled."""
        caches = {variable: str(self.caches(kind) / name) for variable, name in CACHES.items()}
        return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | caches

    def seconds(self, kind: str) -> float:
        """Time one start with the caches of `kind`, as they are.

        Raises:
            StartFailed: it did not end well.
        """
        out = self.runs / kind
        shutil.rmtree(out, ignore_errors=True)
        start = time.time()
        try:
            done = subprocess.run(
                self.command(out),
                cwd=ROOT,
                env=self.environment(kind),
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise StartFailed(f"took more than {LIMIT_SECONDS:.0f} s") from None
        if done.returncode:
            raise StartFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return first_step(out / "students" / f"{METHOD}-seed0") - start

    def mend_ahead_of_time(self) -> None:
        """Copy what `make aot` made, and write the copy's paths into it."""
        copy, kept = self.caches("ahead-of-time") / CACHES["TRITON_CACHE_DIR"], self.folder / "kept"
        shutil.copytree(AOT_CACHE, copy)
        command = [sys.executable, "-m", "ensdistill.aot", "--check", str(copy), "--recipes", RECIPE]
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LIMIT_SECONDS)  # what lacks is compiled later
        shutil.copytree(copy, kept)

    def empty_caches(self, kind: str) -> None:
        """Empty the caches as `kind` shall find them; `warm` stays."""
        if kind == "warm":
            return
        shutil.rmtree(self.caches(kind), ignore_errors=True)
        if kind == "ahead-of-time":
            shutil.copytree(self.folder / "kept", self.caches(kind) / CACHES["TRITON_CACHE_DIR"])


def first_step(folder: Path) -> float:
    """Read when the log in `folder` told of its first step, in seconds since the epoch."""
    events = EventAccumulator(str(folder))
    events.Reload()
    first = events.Scalars("train/loss")[0]
    if first.step != 1:
        raise StartFailed(f"the log begins with step {first.step}, expected 1")
    return float(first.wall_time)


def rows(context: Context) -> Iterator[Row]:
    """Yield a row for each state of the caches."""
    kinds = ["cold", "warm"]
    if context.device.type == "cuda":
        if AOT_CACHE.is_dir():
            kinds.insert(1, "ahead-of-time")
        else:
            yield _row(context, "ahead-of-time", note=f"no {AOT_CACHE.relative_to(ROOT)}: run `make aot` first")
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        starts = Starts(Path(folder), context)
        starts.prepare()
        if "ahead-of-time" in kinds:
            starts.mend_ahead_of_time()
        yield from timed_rows(starts, kinds)


def timed_rows(starts: Starts, kinds: list[str]) -> Iterator[Row]:
    """Start in turns, and tell what came of it; a kind that fails once is not started again."""
    context = starts.context
    timings, failures = {kind: Timing() for kind in kinds}, dict[str, str]()
    for j in range(-1, QUICK_ROUNDS if context.quick else ROUNDS):
        order = ["warm"] if j < 0 else kinds if j % 2 == 0 else kinds[::-1]
        for kind in (kind for kind in order if kind not in failures):
            starts.empty_caches(kind)
            try:
                seconds = starts.seconds(kind)
            except StartFailed as error:
                failures[kind] = str(error)
                continue
            context.say(f"start-up: {kind}, {seconds:.1f} s{' (not counted)' if j < 0 else ''}")
            if j >= 0:
                timings[kind].seconds.append(seconds)
    for kind, timing in timings.items():
        if kind in failures:
            yield _row(context, kind, note=f"{FAILED}: {failures[kind]}")
        else:
            yield _row(context, kind, **percentile_columns(timing))


def _row(context: Context, provider: str, **values: object) -> Row:
    return context.row(part="start-up", provider=provider, method=METHOD, **values)
