"""Every way from the feed to the step gives the same batches; shares of several processes are those of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ensdistill.data.beton_file import write_arrays
from ensdistill.data.feed import Feed
from ensdistill.data.inputs import HostInputs, Inputs, ResidentInputs, StagedInputs, is_resident, make_inputs
from ensdistill.runtime.errors import UserError

N, B = 41, 6  # six batches and five images that are dropped
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("inputs") / "images.beton"
    images_NHWC = rng.integers(0, 256, (N, 5, 7, 3), dtype=np.uint8)
    write_arrays(path, images_NHWC, rng.integers(0, 9, N), (5, 7, 3), lambda: None)
    return path


def make_feed(path: Path, **settings: object) -> Feed:
    defaults: dict = {"batch_size": B, "seed": 11, "shuffle": True, "drop_last": True}
    return Feed(path, **(defaults | settings))


def epoch_of(inputs: Inputs, epoch: int, first_step: int = 0, num_steps: int = N // B) -> list[tuple[Tensor, Tensor]]:
    """Copies of what the step would see."""
    taken = []
    with inputs.epoch(epoch, first_step) as batches:
        for n, _ in enumerate(batches, start=epoch * num_steps + first_step):
            images, labels = inputs.batch(torch.tensor(n, device=getattr(inputs, "device", CPU)))
            taken.append((images.cpu().clone(), labels.cpu().clone()))
    return taken


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize(("epoch", "first_step"), [(0, 0), (3, 0), (3, 4)])
def test_images_on_the_device_come_in_the_feed_s_order(path, cache, epoch, first_step):
    fed = make_feed(path, cache=cache)
    with fed.epoch(epoch, first_step) as batches:
        expected = list(batches)
    assert len(expected) == N // B - first_step
    assert same(epoch_of(HostInputs(fed), epoch, first_step), expected)
    resident = ResidentInputs(make_feed(path), CPU)
    epoch_of(resident, 1)
    assert same(epoch_of(resident, epoch, first_step), expected)


@pytest.mark.parametrize("kind", [HostInputs, lambda feed: ResidentInputs(feed, CPU)])
def test_a_batch_to_try_a_step_on_is_gone_when_an_epoch_starts(path, kind):
    inputs, untouched = kind(make_feed(path)), kind(make_feed(path))
    inputs.fill()
    images, labels = inputs.batch(torch.tensor(0))
    assert images.shape == (B, 5, 7, 3) and images.dtype == torch.uint8 and images.float().std() > 1
    assert labels.shape == (B,) and labels.dtype == torch.int64 and 0 <= int(labels.min()) <= int(labels.max()) < 9
    assert same(epoch_of(inputs, 1, 2), epoch_of(untouched, 1, 2))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("cache", ["host", "none", "gpu"])
def test_shares_of_a_batch_are_its_rows(path, ranks, cache):
    whole = epoch_of(HostInputs(make_feed(path)), 2, 1)
    shares = []
    for rank in range(ranks):
        rows = range(rank * B // ranks, (rank + 1) * B // ranks)
        host = "none" if cache == "gpu" else cache
        inputs = make_inputs(make_feed(path, share=rows, cache=host), CPU, resident=cache == "gpu")
        shares.append(epoch_of(inputs, 2, 1))
        assert all(len(labels) == B // ranks for _, labels in shares[-1])
    together = [tuple(torch.cat([share[n][i] for share in shares]) for i in range(2)) for n in range(len(whole))]
    assert same(together, whole)


@pytest.mark.parametrize("cache", ["host", "none", "gpu"])
def test_networks_that_train_together_have_each_its_own_order(path, cache):
    together = epoch_of(make_inputs(make_feed(path), CPU, resident=cache == "gpu", seeds=(11, 12, 13)), 1, 2)
    for m, seed in enumerate((11, 12, 13)):
        alone = epoch_of(HostInputs(make_feed(path, seed=seed)), 1, 2)
        assert same([(images[m], labels[m]) for images, labels in together], alone)
    assert not torch.equal(together[0][0][0], together[0][0][1])


def test_a_cache_that_cannot_be_is_refused_with_what_to_do(path):
    with pytest.raises(UserError, match=r"--cache gpu: .* no GPU .* choose auto, host or none"):
        is_resident(make_feed(path), CPU, "gpu")
    random = make_feed(path)
    random.crop = "random-resized"
    with pytest.raises(UserError, match="--cache gpu: random-resized crops differ in every epoch"):
        is_resident(random, torch.device("cuda"), "gpu")
    for cache in ("auto", "none", "host"):
        assert not is_resident(make_feed(path), CPU, cache)


@pytest.mark.values
@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["host", "none"])
def test_a_slot_is_kept_until_its_batch_is_taken(path, device, cache):
    """The host runs ahead of a GPU that is busy: batches must not be written over before they were copied."""
    expected = epoch_of(HostInputs(make_feed(path, batch_size=2)), 1, num_steps=N // 2)
    inputs = StagedInputs(make_feed(path, batch_size=2, pin=True, cache=cache), device)
    for _ in range(3):
        taken = []
        with inputs.epoch(1) as batches:
            for _ in batches:
                torch.cuda._sleep(20_000_000)  # some 10 ms of the stream that the step runs on
                taken.append(tuple(x.clone() for x in inputs.batch(torch.zeros((), device=device))))
        assert same([(images.cpu(), labels.cpu()) for images, labels in taken], expected)


@pytest.mark.values
@pytest.mark.gpu
def test_resident_images_give_the_same_while_the_gpu_is_behind(path, device):
    expected = [epoch_of(HostInputs(make_feed(path)), epoch) for epoch in range(3)]
    inputs = ResidentInputs(make_feed(path), device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    for epoch in range(3):
        taken = []
        with inputs.epoch(epoch) as batches:
            for _ in batches:
                torch.cuda._sleep(20_000_000)
                taken.append(tuple(x.clone() for x in inputs.batch(step)))
                step += 1
        assert same([(images.cpu(), labels.cpu()) for images, labels in taken], expected[epoch])
