"""From a feed to where the step reads its batch: tensors that stay in place, filled while the step before still runs.

`HostInputs`      the batch as it was fed: the CPU
`StagedInputs`    page-locked batches, copied to the GPU on a stream of their own, a few steps ahead
`ResidentInputs`  the whole split on the device as uint8; the step indexes it by the epoch's permutation
`GivenInputs`     batches that a loop of somebody else's gives, one at a time

The first three give the same batches. A page-locked batch is written again only after its copy has run: PyTorch's
allocator of page-locked memory keeps an event for every copy from it. A slot on the GPU is written again only after the
step has taken it, for which the host waits: so it runs at most `SLOTS` steps ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ensdistill.runtime.errors import UserError
from ensdistill.runtime.rank_guards.heartbeat import steps

if TYPE_CHECKING:
    from ensdistill.data.feed import Feed

SLOTS = 4
"""Number of batches on their way to the GPU, and of steps that the host is ahead of it."""

Ready = torch.cuda.Event | None
"""Event of a batch's arrival on the device; None: it never had to, or the host waited for it."""


class Inputs(Protocol):
    """Holds the batch that a step reads."""

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return images uint8 (B, H, W, C) and labels int64 (B,) of `step`, int64 (), the run's step, on the device."""

    def fill(self) -> None:
        """Let `batch` give something to try a step on, noise or images of the set, until an epoch is started."""

    def epoch(self, epoch: int, first_step: int = 0) -> AbstractContextManager[Iterator[Ready]]:
        """Start the batches that are left of an epoch: `batch` gives the one that was iterated to last."""


def _noise(feed: Feed) -> Tensor:
    """Make images of random pixels, uint8 (B, H, W, C)."""
    shape = (feed.rows, *feed.image_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class HostInputs:
    """Gives the batch as `feed` gave it."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self._batch: tuple[Tensor, Tensor] | None = None

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the images and labels of `step`."""
        assert self._batch is not None, "no batch yet"
        return self._batch

    def fill(self) -> None:
        """Make a batch of noise; its labels are the first class."""
        self._batch = _noise(self.feed), torch.zeros(self.feed.rows, dtype=torch.int64)

    @contextmanager
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[Ready]]:
        """Iterate over the batches that are left of an epoch."""

        def each() -> Iterator[Ready]:
            for self._batch in batches:
                yield None

        with self.feed.epoch(epoch, first_step) as batches:
            yield each()


class GivenInputs:
    """Holds the batch that was given last, in tensors that stay where the first batch came to lie."""

    def __init__(self, images_BCHW: Tensor, labels_B: Tensor, device: torch.device) -> None:
        B, C, H, W = images_BCHW.shape
        self._images_BHWC = torch.empty(B, H, W, C, dtype=images_BCHW.dtype, device=device)
        self._labels_B = torch.empty(B, dtype=torch.int64, device=device)
        self.give(images_BCHW, labels_B)

    def give(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        """Take a batch of the first one's shape and type, from any device; from page-locked memory nobody waits."""
        self._images_BHWC.copy_(images_BCHW.permute(0, 2, 3, 1), non_blocking=True)
        self._labels_B.copy_(labels_B, non_blocking=True)

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the images and labels of the batch."""
        return self.held

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, C), in the type that they came in, and labels."""
        return self._images_BHWC, self._labels_B

    def fill(self) -> None:
        """Keep the batch that is there, on which a step can be tried."""

    def epoch(self, epoch: int, first_step: int = 0) -> AbstractContextManager[Iterator[Ready]]:
        """Refuse: the loop is somebody else's."""
        raise NotImplementedError("batches are given one at a time")


@dataclass(frozen=True)
class _Slot:
    images_BHWC: Tensor
    labels_B: Tensor
    taken: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class StagedInputs:
    """Copies the batches of `feed`, which must be page-locked (`Feed(pin=True)`), to the GPU `device`."""

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self.feed, self.device = feed, device
        B, shape = feed.rows, feed.image_shape

        def images() -> Tensor:
            return torch.zeros((B, *shape), dtype=torch.uint8, device=device)

        def labels() -> Tensor:
            return torch.zeros(B, dtype=torch.int64, device=device)

        self._batch = images(), labels()
        self._slots = [_Slot(images(), labels()) for _ in range(SLOTS)]
        self._stream = torch.cuda.Stream(device)

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the images and labels of `step`."""
        return self._batch

    def fill(self) -> None:
        """Put noise into the batch; its labels are the first class."""
        self._batch[0].copy_(_noise(self.feed))

    @contextmanager
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[Ready]]:
        """Iterate over the batches that are left of an epoch."""

        def each() -> Iterator[Ready]:
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)  # the slots' zeros, and whatever had their memory before
            for n, (images_BHWC, labels_B) in enumerate(batches):
                slot = self._slots[n % SLOTS]
                with steps.waiting():
                    slot.taken.synchronize()
                ready = torch.cuda.Event(enable_timing=True)
                with torch.cuda.stream(self._stream):
                    slot.images_BHWC.copy_(images_BHWC, non_blocking=True)
                    slot.labels_B.copy_(labels_B, non_blocking=True)
                    ready.record()
                current.wait_event(ready)
                self._batch[0].copy_(slot.images_BHWC)
                self._batch[1].copy_(slot.labels_B)
                slot.taken.record(current)
                yield ready

        with self.feed.epoch(epoch, first_step) as batches:
            yield each()


class ResidentInputs:
    """Keeps all images of `feed` on `device`, which has room for them: read by FFCV once, copied once.

    `beside`: other inputs of the same images, which are then shared.
    """

    def __init__(self, feed: Feed, device: torch.device, beside: ResidentInputs | None = None) -> None:
        self.feed, self.device = feed, device
        self._images_NHWC: Tensor
        self._labels_N: Tensor
        if beside is not None:
            self._images_NHWC, self._labels_N = beside._images_NHWC, beside._labels_N
        else:
            self._images_NHWC, self._labels_N = (torch.from_numpy(array).to(device) for array in feed.all_images())
        self._order_TB = torch.zeros((feed.num_steps, feed.rows), dtype=torch.int64, device=device)
        self._taken = [torch.cuda.Event() for _ in range(SLOTS)] if device.type == "cuda" else []

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the images and labels of `step`; an epoch's steps are the run's modulo the steps an epoch."""
        order_B = self._order_TB.index_select(0, (step % len(self._order_TB)).view(1))[0]
        return self._images_NHWC.index_select(0, order_B), self._labels_N.index_select(0, order_B)

    def fill(self) -> None:
        """Let the batches be those of the first epoch."""
        self._order_TB.copy_(torch.from_numpy(self.feed.order(0)).view(self._order_TB.shape))

    @contextmanager
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[Ready]]:
        """Iterate over the batches that are left of an epoch."""
        order_TB = torch.from_numpy(self.feed.order(epoch)).view(self._order_TB.shape)
        # behind the steps of the epoch before, and page-locked so that the host need not wait for them
        self._order_TB.copy_(order_TB.pin_memory() if self._taken else order_TB, non_blocking=True)

        def each() -> Iterator[Ready]:
            for n in range(self.feed.num_steps - first_step):
                if self._taken:  # not further ahead than staged inputs are: a log line tells of now
                    with steps.waiting():
                        self._taken[n % SLOTS].synchronize()
                yield None
                if self._taken:
                    self._taken[n % SLOTS].record(torch.cuda.current_stream(self.device))

        yield each()


class StackedInputs:
    """Stacks a batch of each of several inputs, side by side: images (E, B, H, W, C), labels (E, B)."""

    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self.inputs = inputs

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the images and labels of `step`."""
        images, labels = zip(*(each.batch(step) for each in self.inputs), strict=True)
        return torch.stack(images), torch.stack(labels)

    def fill(self) -> None:
        """Fill each of the inputs."""
        for each in self.inputs:
            each.fill()

    @contextmanager
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[Ready]]:
        """Iterate over the batches that are left of an epoch."""
        with ExitStack() as stack:
            epochs = [stack.enter_context(each.epoch(epoch, first_step)) for each in self.inputs]
            yield (ready[-1] for ready in zip(*epochs, strict=True))


_RESIDENT_SHARE = 0.25
"""Share of the GPU's free memory that `auto` gives to a data set."""


def is_resident(feed: Feed, device: torch.device, cache: str) -> bool:
    """Decide whether a training keeps all images of `feed` on `device`; `cache`: `--cache`.

    `auto` does so on a GPU where the images are the same in every epoch and take at most a quarter of the free memory.

    Raises:
        UserError: `gpu` is asked for and cannot be.
    """
    if cache not in ("auto", "gpu"):
        return False
    if cache == "auto":
        if device.type != "cuda" or feed.crop == "random-resized":
            return False
        return feed.num_bytes <= _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    if feed.crop == "random-resized":
        raise UserError(
            "--cache gpu: random-resized crops differ in every epoch and cannot be kept; choose auto or none"
        )
    if device.type != "cuda":
        raise UserError(
            f"--cache gpu: there is no GPU to keep images on, the device is {device}; choose auto, host or none"
        )
    if feed.num_bytes > (free := torch.cuda.mem_get_info(device)[0]):
        raise UserError(
            f"--cache gpu: the training images are {feed.num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on "
            f"{device}; choose auto, host or none"
        )
    return True


def make_inputs(feed: Feed, device: torch.device, *, resident: bool, seeds: Sequence[int] = ()) -> Inputs:
    """Make the inputs of a training on `device`.

    Args:
        resident: keep the images on the device, as `is_resident` decided.
        seeds: of several networks that train together, each with images in an order of its own.
    """
    if resident:
        first = ResidentInputs(feed, device)
        if not seeds:
            return first
        return StackedInputs([ResidentInputs(feed.with_seed(seed), device, first) for seed in seeds])
    feed.load()  # before the clock of the training runs
    kind: Callable[[Feed], Inputs] = (
        functools.partial(StagedInputs, device=device) if device.type == "cuda" else HostInputs
    )
    return StackedInputs([kind(feed.with_seed(seed)) for seed in seeds]) if seeds else kind(feed)
