"""A loop of one's own: the numbers of fast_train, bit for bit; resumed as unbroken; what does not fit is refused."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from recorded_graph import RecordedGraph
from torch import Tensor, nn

from ensdistill import Distiller, UserError, fast_train
from ensdistill.engine.cpu.crew import Crew
from ensdistill.engine.cpu.side_by_side import SideBySideNetworks
from ensdistill.own_loop import distiller as module
from ensdistill.run.job import Job, Run
from ensdistill.run.trainer import Trainer
from ensdistill.runtime.errors import run_main

B, K, STEPS = 6, 5, 6
SMALL = (
    "--members 2 --train-images 100 --teacher.epochs 1 --teacher.warmup-epochs 0 --student.epochs 1 "
    "--student.warmup-epochs 0.4 --teacher.batch-size 50 --student.batch-size 20 --log-every 1 --monitor-every 0 "
    "--threads 1 --methods latentbe+tdiv-sdiv kd+ods"
)


def network(seed: int = 0, *, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(32, K),
    )  # fmt: skip


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(B, 3, 8, 8, generator=generator), torch.randint(0, K, (B,), generator=generator))
        for _ in range(count)
    ]


def distiller(student: Any = None, *, teachers: int = 3, steps: int = STEPS, **options: Any) -> Distiller:
    own = [network(t + 1) for t in range(teachers)]
    return Distiller(own, student or network(), steps=steps, device="cpu", precision="fp32", **{"lr": 0.05, **options})


def weights(trained: Distiller) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.student.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_in(job: Job, run: Run) -> dict[str, Tensor]:
    """Train `run` in a loop of one's own, on the batches that it had; the weights of what ships."""
    teachers, training = job.load_teachers(), run.training
    feed = job.train_feed(training.batch_size, run.seed)
    own = Distiller(
        [teacher.network for teacher in teachers.classifiers],  # type: ignore[misc]
        job.make_classifier(run.seed).network,
        steps=training.epochs * feed.num_steps,
        method=str(run.method),
        lr=training.lr,
        warmup_steps=round(training.warmup_epochs * feed.num_steps),
        weight_decay=training.weight_decay,
        mean=job.data.pixel_mean,
        std=job.data.pixel_std,
        pad=job.config.pad,
        flip=job.config.flip,
        tau=job.config.tau,
        alpha=job.config.alpha,
        factor_rate=job.config.factor_rate,
        seed=run.seed,
        device="cpu",
    )
    for epoch in range(training.epochs):
        with feed.epoch(epoch) as loader:
            for images_BHWC, labels in loader:
                own.step(images_BHWC.permute(0, 3, 1, 2), labels)
    return own.average().state_dict()


def test_gives_the_weights_of_fast_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    in_stages = fast_train.in_stages

    def trained(job: Job, report: object) -> None:
        jobs.append(job)
        in_stages(job, lambda job: None)

    monkeypatch.setattr(fast_train, "in_stages", trained)
    monkeypatch.setattr(sys, "argv", ["fast_train", *SMALL.split(), "--out", str(tmp_path / "runs" / "digits")])
    before = torch.get_num_threads()
    try:
        assert run_main(fast_train.main) == 0
        (job,) = jobs
        assert torch.get_num_threads() == 1 and job.crew is None
        for run in job.student_runs():
            shipped = safetensors.torch.load_file(run.folder / "last.safetensors")
            assert same(as_in(job, run), shipped), run.title

        # side by side on two threads, as the job does it where layers are larger
        torch.set_num_threads(2)
        job.crew, trainer, run = Crew(2), Trainer(job), job.student_runs()[0]
        plan = trainer._alone(run, job.load_teachers())
        assert isinstance(plan.networks, SideBySideNetworks)
        state = trainer._state(plan)
        stepper = trainer._stepper(plan, state)
        stepper.prepare(first_row=0)
        for epoch in range(run.training.epochs):
            with stepper.inputs.epoch(epoch) as batches:
                for _ in batches:
                    stepper.advance()
        beside = state.student.shipped().network.state_dict()
        assert same(as_in(job, run), beside)
        assert not same(beside, safetensors.torch.load_file(run.folder / "last.safetensors"))  # other sums
    finally:
        torch.set_num_threads(before)


def test_floats_are_taken_as_they_are_and_uint8_is_augmented() -> None:
    pictures = [((255 * images).round().to(torch.uint8), labels) for images, labels in batches(3)]
    whole, floats, cropped = distiller(pad=0, flip=False), distiller(), distiller(pad=2)
    for images, labels in pictures:
        whole.step(images, labels)
        floats.step(images / torch.tensor(255.0), labels)
        cropped.step(images, labels)
    assert same(weights(whole), weights(floats))
    assert not same(weights(whole), weights(cropped))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_loop_ends_in_the_same_numbers(optimizer: Any) -> None:
    student = network(dropout=0.3)
    options: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01, "seed": 7}
    unbroken, first = distiller(student, **options), distiller(student, **options)
    given = batches()
    for batch in given:
        unbroken.step(*batch)
    for batch in given[:3]:
        first.step(*batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = distiller(student, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(99)  # whatever else the program drew
    assert second.step_count == 3
    measures = [second.step(*batch) for batch in given[3:]]
    assert same(weights(second), weights(unbroken))
    assert all(value.dtype == torch.float64 and value.isfinite() for value in measures[0].values())
    assert list(measures[0]) == ["loss", "loss_ce", "loss_kd", "loss_wd", "acc1"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tau": 2.0}, r"tau 4.0, here 2.0"),
        ({"lr": 0.02}, r"lr 0.05, here 0.02; schedule"),
        ({"method": "latentbe"}, r"method 'latentbe\+tdiv-sdiv', here 'latentbe'"),
        ({"teachers": 2}, "members 3, here 2"),
    ],
)
def test_a_state_of_other_arguments_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"state: is of other arguments: .*{what}"):
        distiller(**options).load_state_dict(distiller().state_dict())


def test_a_state_of_other_teachers_or_another_student_is_refused() -> None:
    state = distiller().state_dict()
    with pytest.raises(UserError, match="of other arguments: teachers"):
        Distiller([network(9)] * 3, network(), steps=STEPS, lr=0.05, precision="fp32").load_state_dict(state)
    with pytest.raises(UserError, match="state: belongs to another student"):
        distiller(nn.Sequential(nn.Flatten(), nn.Linear(192, K))).load_state_dict(state)
    begun = distiller()
    begun.step(*batches()[0])
    with pytest.raises(UserError, match="has done a step; make a new one"):
        begun.load_state_dict(state)


def test_leaves_the_programs_draws_modes_and_student_alone() -> None:
    student = network(dropout=0.5)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trained = distiller(student)
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index, union-attr]
    for batch in batches(2):
        trained.step(*batch)
    after = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index, union-attr]
    assert states == after
    assert same(student.state_dict(), before) and student.training


def test_autocast_and_no_grad_around_it_change_nothing() -> None:
    plain, wrapped = distiller(), distiller()
    for batch in batches(2):
        plain.step(*batch)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode():
            wrapped.step(*batch)
    assert same(weights(plain), weights(wrapped))


def test_measures_of_a_step_stay_what_they_are() -> None:
    trained, given = distiller(), batches(2)
    first = trained.step(*given[0])
    kept = {name: value.item() for name, value in first.items()}
    second = trained.step(*given[1])
    assert {name: value.item() for name, value in first.items()} == kept
    assert second["loss"].item() != kept["loss"]


def test_a_captured_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CudaGraph", lambda device: RecordedGraph())
    plain, captured = distiller(backend="reference"), distiller(backend="reference")
    captured._capture = True
    for batch in batches(4):
        ours, theirs = plain.step(*batch), captured.step(*batch)
        assert {name: value.item() for name, value in ours.items()} == {
            name: value.item() for name, value in theirs.items()
        }
    assert captured._begun is not None and captured._begun[1].is_captured
    assert any("captured as one CUDA graph" in note for note in captured.notes)
    assert same(weights(plain), weights(captured))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "kd+ods"])
def test_captured_on_a_gpu_is_launched_one_by_one(method: str) -> None:
    found = []
    for capture in (True, False):
        own = [network(t + 1) for t in range(3)]
        trained = Distiller(own, network(), steps=STEPS, method=method, lr=0.05, capture=capture, compile="no")
        for batch in batches():
            trained.step(*batch)
        trained.check()
        found.append(weights(trained))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["kd", "latentbe", "be", "ce"])
def test_ships_what_the_student_was(method: str) -> None:
    trained = distiller(method=method, teachers=0 if method == "ce" else 2)
    images, labels = batches(1)[0]
    trained.step(images, labels)
    shipped = trained.average()
    assert shipped(images).shape == (B, K) and not shipped.training
    if method != "be":
        assert shipped.state_dict().keys() == network().state_dict().keys()
        assert type(shipped) is nn.Sequential and type(shipped[0]) is nn.Conv2d
    shipped.load_state_dict({name: torch.zeros_like(value) for name, value in shipped.state_dict().items()})
    assert not same(trained.average().state_dict(), shipped.state_dict())  # a copy


def test_hydra_draws_its_heads_from_seeds() -> None:
    from networks import small_classifier

    drawn: list[int] = []

    def draw(seed: int) -> nn.Module:
        drawn.append(seed)
        return small_classifier(seed).network

    teachers = [small_classifier(t).network for t in (1, 2)]
    trained = Distiller(teachers, draw, steps=2, method="hydra+tdiv-sdiv", lr=0.01, device="cpu")
    trained.step(torch.rand(4, 3, 9, 9), torch.tensor([0, 1, 2, 3]))
    assert len(set(drawn)) == 2
    assert trained.average()(torch.rand(4, 3, 9, 9)).shape == (4, 7)
    with pytest.raises(UserError, match="hydra draws a head for every teacher; give a function"):
        Distiller(teachers, draw(0), steps=2, method="hydra")


def test_the_rate_is_a_schedule_or_ones_own() -> None:
    assert distiller(steps=100, lr=1.0).rates[:4] == [0.0, 0.5, 1.0, pytest.approx(0.99974, abs=1e-5)]
    assert distiller(steps=3, lr=lambda step: 1 / (step + 1)).rates == [1.0, 0.5, 1 / 3]
    with pytest.raises(UserError, match="warmup_steps: got one beside lr as a function"):
        distiller(lr=lambda step: 0.1, warmup_steps=2)


IMAGES, LABELS = batches(1)[0]
BAD_BATCHES: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "normalised": (
        lambda: (IMAGES * 4 - 2, LABELS),
        r"images: .* outside \[0, 1\].* leave Normalize out of the loader",
    ),
    "no numbers": (lambda: (IMAGES * float("nan"), LABELS), r"images: a batch has values outside \[0, 1\]"),
    "half": (lambda: (IMAGES.half(), LABELS), r"images: got torch.float16 \(6, 3, 8, 8\), expected \(B, C, H, W\)"),
    "one image": (lambda: (IMAGES[0], LABELS), "images: got torch.float32"),
    "one-hot": (lambda: (IMAGES, torch.eye(K)[LABELS]), r"labels: got torch.float32 \(6, 5\), expected int64 \(6,\)"),
    "no class": (lambda: (IMAGES, LABELS + K), "labels: a batch has labels outside 0 … 4"),
}


@pytest.mark.parametrize("bad", BAD_BATCHES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(bad: str, begun: bool) -> None:
    make, message = BAD_BATCHES[bad]
    trained, untouched = distiller(), distiller()
    for one in (trained, untouched) if begun else ():
        one.step(IMAGES, LABELS)
    with pytest.raises(UserError, match=message):
        trained.step(*make())
    for one in (trained, untouched):
        one.step(IMAGES, LABELS)
    assert same(weights(trained), weights(untouched))


def test_a_smaller_last_batch_and_a_step_too_many_are_refused() -> None:
    trained = distiller(steps=1)
    trained.step(IMAGES, LABELS)
    with pytest.raises(UserError, match="steps: all 1 are done"):
        trained.step(IMAGES, LABELS)
    trained = distiller()
    trained.step(IMAGES, LABELS)
    with pytest.raises(UserError, match=r"got torch.float32 \(5, 3, 8, 8\) after .*drop_last=True"):
        trained.step(IMAGES[:5], LABELS[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": 0}, r"teachers: got none, but latentbe\+tdiv-sdiv learns from them"),
        ({"teachers": 1}, "members: .*got members = 1"),
        ({"method": "latentbee"}, r"no student is called 'latentbee' \(did you mean 'latentbe'\?\)"),
        ({"optimizer": "adam"}, "optimizer: got 'adam', expected one of sgd, adamw"),
        ({"steps": 0}, "steps: got 0"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"tau": 0.0}, "tau: got 0.0, expected a positive number"),
        ({"mean": [0.5] * 3}, "mean, std: got one of the two"),
        ({"device": "tpu"}, "not a device"),
        ({"student": nn.ReLU()}, "no conv or linear layer that can take factors"),
        ({"student": 3}, "student: got a int, expected a network"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    count, student = options.pop("teachers", 3), options.pop("student", network())
    arguments = {"steps": STEPS, "device": "cpu", **options}
    with pytest.raises(UserError, match=message):
        Distiller([network(t) for t in range(count)], student, **arguments)


def test_networks_that_do_not_fit_each_other_or_the_images_are_refused() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, K + 1))
    with pytest.raises(UserError, match=r"teacher 1: gave logits \(6, 6\) for a batch of 6, the student \(6, 5\)"):
        Distiller([network(1), other], network(), steps=1, device="cpu").step(IMAGES, LABELS)
    with pytest.raises(UserError, match="mean: got 2 values, but images have 3 channels"):
        distiller(mean=[0.5, 0.5], std=[1, 1]).step(IMAGES, LABELS)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"processes: got 2, .*fast_train under torchrun"):
        distiller()
