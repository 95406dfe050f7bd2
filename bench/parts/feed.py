"""How fast batches arrive, by who brings them: ours, and PyTorch's DataLoader as people use it.

**What is measured.** A pass over all images of a folder, in batches of B, from its first request to the last batch on
the device that computes (on a GPU it is waited for); nothing else runs. Two problems: 32 px images stored as they are,
and JPEGs of 256 px whose random-resized crops are brought to 224 px. `p50_ms` is a batch, `images_per_s` the machine's;
`images_per_s_core` is images over the CPU seconds that all threads and worker processes spent on them.

| provider | |
|---|---|
| `ffcv` | our feed, decoding in every epoch |
| `ffcv-cached` | our feed, decoded once and kept in the host's memory |
| `resident` | all images on the device as uint8, indexed there; read by FFCV before the clock runs |
| `dataloader-N` | torch.utils.data.DataLoader with N workers, which stay alive between passes; 0: in this process |

On a GPU ours come by `StagedInputs`, those of the DataLoader page-locked (`pin_memory`) and copied without waiting. The
DataLoader's data set holds the decoded arrays in memory, or opens JPEG files with PIL, cuts the same boxes and resizes
them bilinearly; it gives uint8 as ours does, which spares it the conversion that people have there.

**Checked before it is timed.** The first pass, which also warms up: images and labels of 32 px must be those of the
truth, bit by bit and in our order; of JPEGs the labels, and pixels by `JPEG_BOUND`, for two decoders and two ways to
resize are not the same. Who differs is not timed. Then passes in turns, forwards and backwards.

**What it does not say.** How long a step waits for data: a run's `data wait` says that. Files are in the page cache, as
they are from the second epoch on where memory allows; a disk's speed is not in these numbers. Images are random (32 px)
or random blobs with noise (JPEG).
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bench.harness.context import WRONG, Context, percentile_columns
from bench.harness.rows import Row
from bench.harness.turns import Timing
from ensdistill.data.beton_file import write_arrays, write_images
from ensdistill.data.feed import Feed, random_boxes
from ensdistill.data.ffcv_guards import num_cores
from ensdistill.data.image_files import Stored
from ensdistill.data.inputs import HostInputs, Inputs, ResidentInputs, StagedInputs
from ensdistill.runtime.timing import clock

Batch = tuple[Tensor, Tensor]
"""uint8 (B, H, W, C) and int64 (B,)."""

SEED = 0
ARRAY_SIZE, CROP_SIZE, JPEG_SIZE = 32, 224, (256, 341)
JPEG_BOUND = 4.0
"""Mean absolute difference of a batch's pixels, of 255, by FFCV and by PIL: 1.2 at most was measured, and 66 at least
where the boxes are others."""
MIN_ROUNDS, TURN_SECONDS = 3, 0.2


@dataclass(frozen=True)
class Amounts:
    """Number of images in a pass."""

    arrays: int
    """Images of 32 px, stored as they are."""
    jpegs: int
    """JPEGs of 256 px."""


FULL, QUICK = Amounts(arrays=50_000, jpegs=1_024), Amounts(arrays=1_024, jpegs=32)


class Loader(Protocol):
    """Brings the batches of an epoch to the device."""

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Yield batches, each of which is good until the next one is asked for."""


# ---- who brings them ---------------------------------------------------------------------------------------------


class OfInputs:
    """Brings our batches, as a step finds them."""

    def __init__(self, inputs: Inputs, num_steps: int, device: torch.device) -> None:
        self.inputs = inputs
        self._steps = torch.arange(num_steps, device=device).unbind()

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """See `Loader`."""
        with self.inputs.epoch(epoch) as batches:
            for step, _ in zip(self._steps, batches, strict=True):
                yield self.inputs.batch(step)


class ArrayDataset(Dataset[tuple[Tensor, int]]):
    """Gives decoded images that lie in memory."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> None:
        self.images_NHWC, self.labels_N = images_NHWC, labels_N

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images_NHWC[i]), int(self.labels_N[i])


class FileDataset(Dataset[tuple[Tensor, int]]):
    """JPEG files, decoded by PIL: item (index, top, left, height, width) is that box of that image at `size` px."""

    def __init__(self, files: Sequence[Path], labels_N: np.ndarray, size: int) -> None:
        self.files, self.labels_N, self.size = files, labels_N, size

    def __getitem__(self, item: tuple[int, int, int, int, int]) -> tuple[Tensor, int]:
        i, top, left, height, width = item
        with Image.open(self.files[i]) as image:
            cut = image.convert("RGB").crop((left, top, left + width, top + height))
        resized = cut.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)), int(self.labels_N[i])


class Items(Sampler[Any]):
    """Lists what a data set is asked for in the epoch that was set last."""

    def __init__(self, items: Callable[[int], Sequence[Any]]) -> None:
        self.items, self.epoch = items, 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items(self.epoch))


class OfDataLoader:
    """Brings the batches of PyTorch's DataLoader over `dataset`, in the order of `items(epoch)`."""

    def __init__(
        self, dataset: Dataset[Any], items: Callable[[int], Sequence[Any]], B: int, workers: int, device: torch.device
    ) -> None:
        self.items, self.device = Items(items), device
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=B,
            sampler=self.items,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """See `Loader`."""
        self.items.epoch = epoch
        for images_BHWC, labels_B in self.loader:
            yield images_BHWC.to(self.device, non_blocking=True), labels_B.to(self.device, non_blocking=True)


def worker_counts() -> list[int]:
    """List the DataLoader's numbers of workers: none, one, one a core."""
    return sorted({0, 1, num_cores()})


# ---- the two problems ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Images, and who brings them."""

    size: int
    """Side in pixels of what arrives."""
    num_steps: int
    """Number of batches in a pass."""
    about: str
    """Description for the notes."""
    loaders: dict[str, Loader]
    """Loader of each provider."""
    wrong: Callable[[Batch, int], str | None]
    """Function that describes what is wrong with the n-th batch of epoch 0; None where nothing is."""


def array_problem(folder: Path, images: int, context: Context) -> Problem:
    """Make the problem of 32 px images stored as they are."""
    draw = np.random.default_rng(SEED)
    images_NHWC = draw.integers(0, 256, (images, ARRAY_SIZE, ARRAY_SIZE, 3), dtype=np.uint8)
    labels_N = draw.integers(0, context.classes, images)
    path = folder / "arrays.beton"
    write_arrays(path, images_NHWC, labels_N, images_NHWC.shape[1:], lambda: None)
    B, device = context.B, context.device
    feeds = {"ffcv": our_feed(path, context, cache="none"), "ffcv-cached": our_feed(path, context, cache="host")}
    feed = feeds["ffcv"]
    loaders: dict[str, Loader] = {
        name: OfInputs(_inputs(one, device), feed.num_steps, device) for name, one in feeds.items()
    }
    loaders["resident"] = OfInputs(ResidentInputs(feed, device), feed.num_steps, device)
    dataset = ArrayDataset(images_NHWC, labels_N)
    for workers in worker_counts():
        loaders[f"dataloader-{workers}"] = OfDataLoader(
            dataset, lambda epoch: feed.order(epoch).tolist(), B, workers, device
        )
    order = feed.order(0)

    def wrong(batch: Batch, n: int) -> str | None:
        rows = order[n * B : (n + 1) * B]
        if not np.array_equal(batch[1].cpu().numpy(), labels_N[rows]):
            return f"batch {n} has other labels"
        return None if np.array_equal(batch[0].cpu().numpy(), images_NHWC[rows]) else f"batch {n} has other pixels"

    return Problem(
        size=ARRAY_SIZE,
        num_steps=feed.num_steps,
        about=f"{images:,} images of {ARRAY_SIZE} px as they are",
        loaders=loaders,
        wrong=wrong,
    )


def jpeg_problem(folder: Path, images: int, context: Context) -> Problem:
    """Make the problem of JPEGs, cut anew in every epoch."""
    draw = np.random.default_rng(SEED)
    labels_N = draw.integers(0, context.classes, images)
    jpegs = [blobs(draw) for _ in range(images)]
    path = folder / "jpegs.beton"
    write_images(path, jpegs, labels_N, lambda: None)
    files = [folder / f"{i}.jpg" for i in range(images)]
    for file, jpeg in zip(files, jpegs, strict=True):
        file.write_bytes(jpeg.data)
    B, device = context.B, context.device
    feed = our_feed(path, context, cache="none", crop="random-resized", image_size=CROP_SIZE)
    heights_N, widths_N = (np.full(images, side) for side in JPEG_SIZE)

    def items(epoch: int) -> list[Any]:
        order = feed.order(epoch)
        boxes = random_boxes(heights_N[order], widths_N[order], indices_B=order, seed=SEED, epoch=epoch)
        rows: list[Any] = np.column_stack([order, boxes]).tolist()
        return rows

    dataset = FileDataset(files, labels_N, CROP_SIZE)
    loaders: dict[str, Loader] = {"ffcv": OfInputs(_inputs(feed, device), feed.num_steps, device)}
    for workers in worker_counts():
        loaders[f"dataloader-{workers}"] = OfDataLoader(dataset, items, B, workers, device)
    expected = items(0)

    def wrong(batch: Batch, n: int) -> str | None:
        cut = [dataset[item] for item in expected[n * B : (n + 1) * B]]
        if batch[1].tolist() != [label for _, label in cut]:
            return f"batch {n} has other labels"
        truth_BHWC = torch.stack([image for image, _ in cut]).float()
        difference = float((batch[0].cpu().float() - truth_BHWC).abs().mean())
        return None if difference <= JPEG_BOUND else f"batch {n} differs by {difference:.1f} of 255"

    kilobytes = sum(len(jpeg.data) for jpeg in jpegs) / images / 1e3
    return Problem(
        size=CROP_SIZE,
        num_steps=feed.num_steps,
        about=f"{images:,} JPEGs of {JPEG_SIZE[0]}x{JPEG_SIZE[1]} px, {kilobytes:.0f} kB each, crops to {CROP_SIZE} px",
        loaders=loaders,
        wrong=wrong,
    )


def our_feed(path: Path, context: Context, **settings: Any) -> Feed:
    """Open a feed of shuffled full batches, as training has them."""
    pin = context.device.type == "cuda"
    return Feed(path, batch_size=context.B, seed=SEED, shuffle=True, drop_last=True, pin=pin, **settings)


def _inputs(feed: Feed, device: torch.device) -> Inputs:
    feed.load()
    return StagedInputs(feed, device) if device.type == "cuda" else HostInputs(feed)


def blobs(draw: np.random.Generator) -> Stored:
    """Draw a JPEG of random blobs with noise, some 30 kB, as a photograph of that size has."""
    height, width = JPEG_SIZE
    coarse = Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = draw.normal(0, 6, (height, width, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return Stored(buffer.getvalue(), height, width)


# ---- timing -------------------------------------------------------------------------------------------------------


@dataclass
class Passes:
    """Times of one provider's passes."""

    a_turn: int
    """Passes that make a turn."""
    timing: Timing = field(default_factory=Timing)
    """Seconds of a batch, one a turn; `calls` counts passes."""
    cpu_seconds: float = 0.0
    """CPU seconds of all turns, all threads and processes."""


def cpu_seconds() -> float:
    """CPU time of this process, of all its threads, and of its children, those that are alive included."""
    times = os.times()  # of this process they are hundredths of a second
    total = time.process_time() + times.children_user + times.children_system
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()  # from the third on
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def first_wrong(problem: Problem, loader: Loader) -> str | None:
    """Describe what is wrong with epoch 0 as `loader` brings it, after a look at all of it."""
    count = 0
    for n, batch in enumerate(loader(0)):
        if wrong := problem.wrong(batch, n):
            return wrong
        count += 1
    return None if count == problem.num_steps else f"{count} batches came, expected {problem.num_steps}"


def timed(problem: Problem, names: Sequence[str], context: Context) -> dict[str, Passes]:
    """Time passes of `names` in turns, each of at least `TURN_SECONDS`."""

    def seconds_of(name: str, first_epoch: int, passes: int) -> float:
        start = clock(context.device)
        for epoch in range(first_epoch, first_epoch + passes):
            for _ in problem.loaders[name](epoch):
                pass
        return clock(context.device) - start

    found = {name: Passes(a_turn=max(1, math.ceil(TURN_SECONDS / seconds_of(name, 1, 1)))) for name in names}
    end = time.perf_counter() + context.seconds
    for j in range(max(MIN_ROUNDS, context.rounds)):
        for name in names if j % 2 == 0 else reversed(names):
            one, before = found[name], cpu_seconds()
            seconds = seconds_of(name, 2 + one.timing.calls, one.a_turn)
            one.cpu_seconds += cpu_seconds() - before
            one.timing.seconds.append(seconds / one.a_turn / problem.num_steps)
            one.timing.calls += one.a_turn
        if j + 1 >= MIN_ROUNDS and time.perf_counter() > end:
            break
    return found


def rows(context: Context) -> Iterator[Row]:
    """Yield a row for each provider and problem."""
    amounts = QUICK if context.quick else FULL
    for make, images in ((array_problem, amounts.arrays), (jpeg_problem, amounts.jpegs)):
        with tempfile.TemporaryDirectory(prefix="bench-feed-") as folder:
            yield from problem_rows(make(Path(folder), max(images, context.B), context), context)


def problem_rows(problem: Problem, context: Context) -> Iterator[Row]:
    """Check everybody, then time those that are right."""
    values: dict[str, Any] = {"part": "feed", "network": "", "E": None, "size": problem.size, "precision": ""}
    right = []
    for name, loader in problem.loaders.items():
        context.say(f"feed: checking {name}, {problem.about}")
        if wrong := first_wrong(problem, loader):
            yield context.row(**values, provider=name, note=f"{WRONG}: {wrong}")
        else:
            right.append(name)
    images = problem.num_steps * context.B
    for name, one in timed(problem, right, context).items():
        middle = one.timing.quantile_ms(0.5)
        a_core = one.timing.calls * images / one.cpu_seconds
        yield context.row(
            **values,
            provider=name,
            **percentile_columns(one.timing),
            images_per_s=1e3 * context.B / middle,
            images_per_s_core=a_core,
            note=problem.about,
        )
