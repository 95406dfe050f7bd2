"""The loop that every evaluation uses: logits of a whole split, and images per second."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ensdistill.data.feed import Batch, Feed
from ensdistill.engine.cpu.crew import Crew
from ensdistill.runtime.environment import Precision, autocast
from ensdistill.runtime.ranks import ALONE, Ranks
from ensdistill.runtime.timing import seconds_of
from ensdistill.training.module_draws import seed_modules

Classify = Callable[[Tensor], Tensor]


_TIMED_SECONDS = 0.5


_TIMED_RUNS = 3


def predict(
    classify: Classify,
    feed: Feed,
    *,
    device: torch.device,
    precision: Precision,
    ranks: Ranks = ALONE,
    crew: Crew | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits of every image of `feed`, in its order.

    Args:
        classify: images (B, C, H, W) float32 in [0, 1], channels-last, on `device` -> logits (B, K), or (M, B, K) of M
            members. In evaluation mode already.
        feed: unshuffled, with its incomplete batch; the same on every rank.
        ranks: who shares the work: each takes consecutive batches, as they would be without the others, and reads no
            more than those (a feed that is kept in memory has been read whole).
        crew: on a CPU: who computes parts of a batch beside each other.

    Returns:
        Logits (N, M, K) in float32, M = 1 for a single network, and labels (N,) int64, both on the CPU and of all
        ranks' images.
    """
    logits_NMK: list[Tensor] = []
    labels_N: list[Tensor] = []
    with torch.inference_mode(), _own_batches(feed, ranks) as batches:
        for step, (images_BHWC, labels_B) in batches:
            logits_NMK.append(batch_logits(classify, images_BHWC, step, device=device, precision=precision, crew=crew))
            labels_N.append(labels_B)
    # Outside of inference mode, so that what leaves is an ordinary tensor
    logits, labels = (torch.cat(rows) if rows else None for rows in (logits_NMK, labels_N))
    return ranks.gather_rows(logits), ranks.gather_rows(labels)


def batch_logits(
    classify: Classify,
    images_BHWC: Tensor,
    step: int,
    *,
    device: torch.device,
    precision: Precision,
    crew: Crew | None = None,
) -> Tensor:
    """Logits (B, M, K) in float32, on `device`, of one uint8 batch, the batch number `step`; see `predict`."""
    with torch.inference_mode():
        seed_modules(0, step, 0, device)  # modules that draw in evaluation mode too: the same in every evaluation
        return _logits(classify, images_BHWC.to(device, non_blocking=True), precision, crew)


@contextlib.contextmanager
def _own_batches(feed: Feed, ranks: Ranks) -> Iterator[Iterator[tuple[int, Batch]]]:
    """This rank's share of the batches, with their numbers; none where there are fewer of them than ranks."""
    if ranks.size == 1:
        with feed.epoch(0) as batches:
            yield enumerate(batches)
        return
    steps = ranks.part(feed.num_steps)
    with feed.epoch(0, steps.start) as batches:
        yield zip(steps, batches, strict=False)  # as many as its steps


@torch.inference_mode()
def images_per_second(
    classify: Classify,
    images_BHWC: Tensor,
    *,
    device: torch.device,
    precision: Precision,
    seconds: float = _TIMED_SECONDS,
) -> float:
    """Speed of `classify` on one uint8 batch that lies on the device already: no decoding, no copying.

    The median of at least three runs and so many seconds, after one to warm up.
    """
    images_BHWC = images_BHWC.to(device)
    times: list[float] = []
    while len(times) < 1 + _TIMED_RUNS or sum(times[1:]) < seconds:
        times.append(seconds_of(lambda: _logits(classify, images_BHWC, precision), device))
    return len(images_BHWC) / statistics.median(times[1:])


def _logits(classify: Classify, images_BHWC: Tensor, precision: Precision, crew: Crew | None = None) -> Tensor:
    """Logits (B, M, K) in float32 of one uint8 batch."""
    if crew is not None and crew.threads > 1:

        def part(images_BHWC: Tensor) -> Tensor:
            with torch.inference_mode():  # a thread's own
                return _logits(classify, images_BHWC, precision)

        return torch.cat(
            crew.run([partial(part, rows) for rows in images_BHWC.tensor_split(crew.threads) if len(rows)])
        )
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
    with autocast(x_BCHW.device, precision):
        logits = classify(x_BCHW)
    return (logits.unsqueeze(1) if logits.ndim == 2 else logits.transpose(0, 1)).float()
