"""The loop: an interrupted run is the unbroken one, bit for bit; a broken one keeps what it had."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from networks import small_batch, small_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ensdistill.config.updates import SGD, Updates
from ensdistill.data.inputs import HostInputs
from ensdistill.kernels.philox import epoch_order
from ensdistill.monitor.cpu import CpuSource
from ensdistill.monitor.memory import Peak, Prediction
from ensdistill.monitor.monitor import Monitor
from ensdistill.monitor.readings import Reading
from ensdistill.runtime.errors import RunFailed, UserError
from ensdistill.runtime.stop import Stop, Stopped
from ensdistill.training import loop as loop_module
from ensdistill.training.checkpoint import save_checkpoint
from ensdistill.training.log import Log, NoLog
from ensdistill.training.loop import Loop, Progress, Trainee, validation_epochs
from ensdistill.training.optimizer import Schedule
from ensdistill.training.stepper import Stepper

EPOCHS, B = 3, 5
OTHER = Updates(optimizer="adamw", ema=0.9, swa=2)


class MemoryFeed:
    """What a Feed is to the loop, over random images."""

    def __init__(self, batches: int):
        self.images, self.labels = small_batch(B * batches)
        self.num_steps = batches

    @contextmanager
    def epoch(self, epoch, first_step=0):
        order = torch.from_numpy(epoch_order(len(self.images), 5, epoch))
        yield ((self.images[i], self.labels[i]) for i in order.split(B)[first_step:])


class Stepping(Stepper):
    """Calls `after` with the number of updates done after each."""

    def __call__(self, ready=None):
        super().__call__(ready)
        self.after(self.state.step)


class Silent:
    def stepped(self, **_):
        pass

    def validated(self, **_):
        pass


def make_monitor(opening=CpuSource, interval=0.001):
    return Monitor(opening, say=lambda text: None, warn=lambda text: None, interval=interval)


def make_loop(
    folder,
    method="latentbe+tdiv-sdiv",
    *,
    stop=None,
    lr=0.05,
    accuracies=None,
    stop_after=None,
    monitor=None,
    batches=4,
    updates=SGD,
):
    state, config = small_state(method, moved=False, updates=updates)
    feed = MemoryFeed(batches)
    accuracies = iter(accuracies) if accuracies is not None else None

    def validate():
        return {"acc": next(accuracies) if accuracies is not None else 0.5, "nll": 1.0}

    stop = stop or Stop()
    shipped = []

    schedule = Schedule(peak=lr, warmup_steps=2, total_steps=EPOCHS * feed.num_steps)

    def stop_in_time(step):
        if step == stop_after:  # the signal comes while this step is computed
            stop._handle(signal.SIGTERM, None)

    def ship(path):
        shipped.append((path.name, state.step))
        path.write_text(str(state.step))

    trainee = Trainee(folder=folder, validate=validate, ship=ship)
    if updates.ema is not None:
        trainee = replace(trainee, ema=trainee)
    if updates.swa is not None:
        trainee = replace(trainee, ship_swa=ship)
    stepper = Stepping(
        state,
        config,
        inputs=HostInputs(feed),
        rates=[schedule(step) for step in range(schedule.total_steps)],
        device=torch.device("cpu"),
        rows=100,
    )
    stepper.after = stop_in_time
    loop = Loop(
        state=state,
        stepper=stepper,
        trainees=(trainee,),
        epochs=EPOCHS,
        num_steps=feed.num_steps,
        rows=B,
        folder=folder,
        display=Silent(),
        monitor=monitor or make_monitor(),
        memory=Peak(torch.device("cpu")),
        prediction=Prediction(parameters=1, state=2, step=3, allowance=4),
        stop=stop,
        say=lambda text: None,
        log_every=1,
    )
    return loop, shipped


def everything(loop):
    swa = loop.state.swa
    return loop.state.tensors() + ([] if swa is None else [*swa.student.parameters(), *swa.student.buffers()])


def lines(folder):
    keep = ("kind", "step", "epoch", "loss", "loss_kd", "lr", "acc1", "acc")
    return [
        {k: v for k, v in json.loads(line).items() if k in keep}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] != "device"
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    loop, _ = make_loop(folder)
    loop.run()
    return loop, folder


# In an epoch, at its last step, at its first, and twice in a row.
@pytest.mark.parametrize("stops", [[3], [4], [5], [8, 9]])
def test_a_stopped_and_resumed_run_is_the_unbroken_one(tmp_path, unbroken, stops):
    for step in stops:
        loop, _ = make_loop(tmp_path, stop_after=step)
        with pytest.raises(Stopped):
            loop.run()
        assert loop.state.step == step and (tmp_path / "checkpoint.pt").exists()
    loop, _ = make_loop(tmp_path)
    (progress,) = loop.run()
    assert all(torch.equal(a, b) for a, b in zip(everything(loop), everything(unbroken[0]), strict=True))
    assert lines(tmp_path) == lines(unbroken[1])
    assert (progress.epochs, progress.images) == (EPOCHS, EPOCHS * 4 * B)
    assert not (tmp_path / "checkpoint.pt").exists() and (tmp_path / "outcome.json").exists()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """An unbroken run by AdamW, with both averages, and its weights after each epoch."""
    loop, shipped = make_loop(tmp_path_factory.mktemp("averaged"), "latentbe", updates=OTHER)
    weights = []

    def keep(step):
        if step % loop.num_steps == 0:
            weights.append([value.detach().clone() for value in loop.state.student.parameters()])

    loop.stepper.after = keep
    (progress,) = loop.run()
    return loop, shipped, weights, progress


def test_averages_are_validated_and_shipped_beside_the_network(averaged):
    loop, shipped, weights, progress = averaged
    assert shipped == [
        *[("best.safetensors", 4), ("best-ema.safetensors", 4)],
        *[(f"{name}.safetensors", 12) for name in ("last", "last-ema", "swa")],
    ]
    assert (progress.ema.epoch, progress.ema.acc) == (1, 0.5)
    assert json.loads((loop.folder / "outcome.json").read_text())["ema"] == {"epoch": 1, "acc": 0.5}
    rows = [json.loads(line) for line in (loop.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["ema_acc"] == 0.5 for row in rows if row["kind"] == "valid")
    assert loop.state.ema.updates.item() == 12 and loop.state.swa.taken == 2
    for mean, second, third in zip(loop.state.swa.student.parameters(), *weights[1:], strict=True):
        torch.testing.assert_close(mean, (second + third) / 2)


# In an epoch, at its last step, at the last of all; an exception where it is validated.
@pytest.mark.parametrize("stop", [5, 8, 12, "validation"])
def test_averages_of_a_resumed_run_are_the_unbroken_ones(tmp_path, averaged, stop):
    loop, _ = make_loop(tmp_path, "latentbe", updates=OTHER, stop_after=stop)
    if stop == "validation":

        def lost():
            if loop.state.step == 8:
                raise Killed
            return {"acc": 0.5, "nll": 1.0}

        loop = replace(loop, trainees=(replace(loop.trainees[0], validate=lost),))
    with pytest.raises((Stopped, Killed)):
        loop.run()
    loop, _ = make_loop(tmp_path, "latentbe", updates=OTHER)
    (progress,) = loop.run()
    assert all(torch.equal(a, b) for a, b in zip(everything(loop), everything(averaged[0]), strict=True))
    assert progress.ema == averaged[3].ema and loop.state.swa.taken == 2


def test_a_checkpoint_of_other_updates_is_refused(tmp_path):
    loop, _ = make_loop(tmp_path, "ce", stop_after=3)
    with pytest.raises(Stopped):
        loop.run()
    for updates in (Updates(optimizer="adamw"), Updates(ema=0.9), Updates(swa=1)):
        with pytest.raises(UserError, match=r"checkpoint.pt: belongs to another network \(.*\); choose another --out"):
            make_loop(tmp_path, "ce", updates=updates)[0].run()


def test_a_lost_process_goes_on_from_the_last_finished_epoch(tmp_path, unbroken):
    loop, _ = make_loop(tmp_path)
    feed = loop.stepper.inputs.feed
    original = feed.epoch

    def lost(epoch, first_step=0):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(epoch, first_step)

    feed.epoch = lost
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "lo')  # the half line that a lost process leaves
    loop, _ = make_loop(tmp_path)
    loop.run()
    assert all(torch.equal(a, b) for a, b in zip(everything(loop), everything(unbroken[0]), strict=True))
    assert lines(tmp_path) == lines(unbroken[1])


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Disk:
    """Kills at the given call of those that change files, and at all that come after it; keeps what was synced."""

    def __init__(self, monkeypatch, dies_at):
        self.dies_at, self.calls, self.synced = dies_at, 0, {}
        monkeypatch.setattr(os, "fsync", self.sync)
        for owner, name in ((os, "replace"), (os, "unlink"), (Log, "write"), (pathlib.Path, "write_bytes")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def count(self):
        self.calls += 1
        if self.calls >= self.dies_at:
            raise Killed

    def counted(self, function):
        def call(*args, **kwargs):
            self.count()
            return function(*args, **kwargs)

        return call

    def sync(self, descriptor):
        self.count()
        self.synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def lose_what_was_not_synced(self, folder):
        for path in (folder / "metrics.jsonl", *folder.glob("*tfevents*")):
            if path.exists():
                os.truncate(path, self.synced.get(path.stat().st_ino, 0))


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    timed = {"train/images_per_s", "train/data_wait"}
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("device")} - timed
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_the_log_of_a_run_that_was_killed_anywhere_is_the_unbroken_one_s(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "validation_epochs", lambda epochs: {1, epochs})  # and an epoch without
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no machine is lost here

    def run(folder):
        make_loop(folder, "ce", batches=1, monitor=make_monitor(interval=0))[0].run()

    run(tmp_path / "whole")
    expected = lines(tmp_path / "whole"), scalars(tmp_path / "whole")
    assert [line["step"] for line in expected[0]] == [1, 1, 2, 3, 3]
    for calls in itertools.count(1):
        folder = tmp_path / str(calls)
        with monkeypatch.context() as patch:
            disk = Disk(patch, calls)
            try:
                run(folder)
            except Killed:
                pass
            else:
                break  # it has lived through all of its calls
        if calls % 2:  # the machine was lost, not the process alone
            disk.lose_what_was_not_synced(folder)
        if not (folder / "outcome.json").exists():
            run(folder)
        assert (lines(folder), scalars(folder)) == expected, calls
    assert calls > 40


def test_a_signal_between_two_lines_of_the_loop_loses_no_step(tmp_path):
    class Late(Stop):
        """Asked for the third time, and from then on, it says yes."""

        asked = 0

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 2

        def check(self):
            if self.asked > 2:
                raise Stopped(signal.SIGTERM)

    loop, _ = make_loop(tmp_path, "ce", stop=Late())
    with pytest.raises(Stopped):
        replace(loop, log_every=100).run()
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"][0]
    assert progress["images"] == loop.state.step * B == 3 * B
    assert lines(tmp_path)[-1]["step"] == 3


def test_a_signal_after_an_epoch_s_last_step_stops_before_the_next(tmp_path, unbroken):
    loop, _ = make_loop(tmp_path)

    def validate():
        loop.stop._requested = signal.SIGTERM
        return {"acc": 0.5, "nll": 1.0}

    with pytest.raises(Stopped):
        replace(loop, trainees=(replace(loop.trainees[0], validate=validate),)).run()
    assert loop.state.step == 4
    loop, _ = make_loop(tmp_path)
    loop.run()
    assert all(torch.equal(a, b) for a, b in zip(everything(loop), everything(unbroken[0]), strict=True))


def test_the_first_best_is_kept_and_the_last_stands_beside_it(tmp_path):
    loop, shipped = make_loop(tmp_path, "ce", accuracies=[0.3, 0.7, 0.7])
    (progress,) = loop.run()
    assert shipped == [("best.safetensors", 4), ("best.safetensors", 8), ("last.safetensors", 12)]
    assert (progress.best_epoch, progress.best_acc, progress.last_acc) == (2, 0.7, 0.7)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["best_epoch"], outcome["predicted_bytes"]) == (2, 6)


class Metered:
    """A GPU that has used 36 J more whenever it is asked."""

    def __init__(self):
        self.notes, self.joules = [], 0.0

    def read(self):
        self.joules += 36.0
        return Reading(device="GPU", utilisation=0.5, power_w=100.0, limits=("power cap",), energy_j=self.joules)

    def close(self):
        pass


def test_the_device_is_in_the_log_and_in_the_outcome_and_a_resumed_run_adds_to_it(tmp_path):
    loop, _ = make_loop(tmp_path, stop_after=6, monitor=make_monitor(Metered))
    with pytest.raises(Stopped):
        loop.run()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"][0]["device"]
    assert saved["samples"] > 0 and saved["energy_wh"] == pytest.approx(0.01 * saved["samples"])
    loop, _ = make_loop(tmp_path, monitor=make_monitor(Metered))
    figures = loop.run()[0].device
    assert figures.samples > saved["samples"] and figures.energy_wh == pytest.approx(0.01 * figures.samples)
    assert (figures.utilisation, figures.throttled, figures.shared) == (pytest.approx(0.5), pytest.approx(1.0), None)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert Progress.from_values(outcome).device == figures
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    on_device = [line for line in read if line["kind"] == "device"]
    steps = [line["step"] for line in read if line["kind"] == "train"]
    assert on_device and {line["step"] for line in on_device} <= set(steps)
    assert all((line["power_w"], line["throttled"], line["clock_mhz"]) == (100.0, 1.0, None) for line in on_device)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "device/power_w" in events.Tags()["scalars"] and "device/clock_mhz" not in events.Tags()["scalars"]


def test_a_monitor_that_fails_changes_nothing_of_the_run(tmp_path, unbroken):
    def broken():
        raise OSError("no driver")

    loop, _ = make_loop(tmp_path, monitor=make_monitor(broken))
    (progress,) = loop.run()
    assert all(torch.equal(a, b) for a, b in zip(everything(loop), everything(unbroken[0]), strict=True))
    assert lines(tmp_path) == lines(unbroken[1])
    assert progress.device.energy_wh is None and progress.device.utilisation is None


def test_a_checkpoint_of_before_the_figures_goes_on_without_them(tmp_path, unbroken):
    loop, _ = make_loop(tmp_path, stop_after=6)
    with pytest.raises(Stopped):
        loop.run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    content["progress"] = content["progress"][0]
    del content["progress"]["device"]
    torch.save(content, tmp_path / "checkpoint.pt")
    loop, _ = make_loop(tmp_path, monitor=make_monitor(Metered))
    figures = loop.run()[0].device
    assert lines(tmp_path) == lines(unbroken[1])
    assert figures.energy_wh is None and figures.seconds > content["progress"]["seconds"]  # a part of it is not known


def test_validation_at_epoch_1_every_tenth_and_the_last_tenth():
    assert validation_epochs(200) == {1, *range(20, 181, 20), *range(181, 201)}
    assert validation_epochs(3) == {1, 2, 3}
    assert validation_epochs(60) == {1, *range(6, 55, 6), *range(55, 61)}


def test_a_loss_that_is_not_finite_stops_with_the_values_that_led_there(tmp_path):
    loop, _ = make_loop(tmp_path, "ce", lr=1e25)
    with pytest.raises(
        RunFailed, match=r"the loss is (nan|inf) at step \d+ .*last good checkpoint: .*; try a lower learning rate"
    ) as failure:
        loop.run()
    failed = json.loads((tmp_path / "failure.json").read_text())
    assert failed["what"] in str(failure.value) and {"step", "lr", "loss", "loss_ce"} <= set(failed["last_steps"][0])
    assert not (tmp_path / "outcome.json").exists()


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    loop, _ = make_loop(tmp_path, "ce")
    loop.run()
    state = loop.state
    before = (tmp_path / "outcome.json").read_bytes()
    with torch.no_grad():
        next(state.student.parameters()).fill_(float("nan"))
    with pytest.raises(RunFailed, match="a parameter is not finite after step 11"):
        loop._save([Progress()], [NoLog()])
    assert not (tmp_path / "checkpoint.pt").exists() and (tmp_path / "outcome.json").read_bytes() == before


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    loop, _ = make_loop(tmp_path, "ce")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, loop.state, [{}])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"checkpoint.pt: not a readable checkpoint \(.*\); delete it"):
        loop.run()
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="not a checkpoint of format 1"):
        loop.run()
    path.write_bytes(whole)
    other, _ = make_loop(tmp_path, "hydra")
    with pytest.raises(UserError, match="belongs to another network"):
        other.run()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    loop, _ = make_loop(tmp_path, "ce")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, loop.state, [{}])
    whole = path.read_bytes()
    first = next(iter(loop.state.student.state_dict().values()))
    at = whole.index(bytes(first.untyped_storage().tolist()))  # a weight, which would be another number
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert not torch.equal(next(iter(torch.load(path)["student"].values())), first)
    with pytest.raises(UserError, match=r"checkpoint.pt: not a readable checkpoint \(.*\); delete it"):
        loop.run()


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"format": 1, "step": Trap()}, tmp_path / "checkpoint.pt")
    loop, _ = make_loop(tmp_path, "ce")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        loop.run()


def test_a_file_that_may_not_grow_keeps_the_previous_checkpoint(tmp_path):
    loop, _ = make_loop(tmp_path, "ce")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, loop.state, [{"epochs": 0}])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint.pt: larger than a file may be here; raise the limit"):
            save_checkpoint(path, replace(loop.state, step=9), [{}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
