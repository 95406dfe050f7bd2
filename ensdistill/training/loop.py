"""Training one network: step, log, validate, save, and nothing else.

The loop goes through (epoch, step) from wherever the checkpoint stands. Everything random is a function of those two,
so a run that was stopped and resumed in the middle of an epoch computes what an unbroken one computes.
Measures go to the log (training/log.py), which every checkpoint counts.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from ensdistill.models.synced_norm import averaged_statistics
from ensdistill.monitor.memory import Peak, Prediction
from ensdistill.monitor.monitor import Monitor
from ensdistill.monitor.readings import Figures, Reading, across_devices
from ensdistill.runtime.errors import RunFailed, UserError
from ensdistill.runtime.files import atomic_write, with_digest, writing
from ensdistill.runtime.rank_guards.heartbeat import steps
from ensdistill.runtime.stop import Stop, Stopped
from ensdistill.training.checkpoint import load_checkpoint, save_checkpoint
from ensdistill.training.log import Log, NoLog, Place
from ensdistill.training.step import State
from ensdistill.training.stepper import Mark, Stepper

_REMEMBERED_STEPS = 8  # values that led to a loss that is not finite


class Display(Protocol):
    """Shows the loop's progress to a person."""

    def stepped(self, *, epoch: int, step: int, values: dict[str, float], device: Reading | None) -> None:
        """Show that `step` updates are done, in `epoch` (from 1), and the values of the latest.

        `device`: a new reading, if there is one.
        """

    def validated(self, *, epoch: int, values: dict[str, float]) -> None:
        """Show what the validation after `epoch` measured."""


@dataclass(kw_only=True)
class Best:
    """Progress of an average that is validated beside the network."""

    epoch: int = 0
    """Epoch (from 1) of its best validation accuracy; the first of equals."""
    acc: float = -1.0
    """Validation accuracy of its best epoch."""


@dataclass(kw_only=True)
class Progress:
    """Progress of one network: what a checkpoint keeps beside the state, and outcome.json in the end."""

    epochs: int = 0
    """Number of epochs done, their validation included."""
    best_epoch: int = 0
    """Epoch (from 1) of the best validation accuracy; the first of equals."""
    best_acc: float = -1.0
    """Validation accuracy of the best epoch."""
    last_acc: float = -1.0
    """Validation accuracy of the latest validation."""
    ema: Best | None = None
    """The same of the moving average of its weights; None where there is none."""
    seconds: float = 0.0
    """Seconds spent in steps, without validation and saving."""
    waited: float = 0.0
    """Seconds of these spent waiting for data: on a GPU, the time that it stood still for them."""
    busy: float | None = 0.0
    """Seconds of these in captured steps, by the GPU's clock; None where steps were not captured."""
    images: int = 0
    """Number of images trained on."""
    device: Figures | None = None
    """Device's utilisation, energy and throttling so far; None where they were not recorded."""
    peak_bytes: int | None = None
    """Peak memory that the training took: see `monitor.memory.Peak`."""
    predicted_bytes: int | None = None
    """Peak memory of its tensors as predicted."""

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Progress:
        """Read what `dataclasses.asdict` made of one, of this version or an earlier one, which knew less.

        Raises:
            ValueError: a value has another type.
        """
        known = msgspec.convert({"busy": None if values else 0.0} | values, cls)
        if (wrong := _no_number(asdict(known))) is not None:
            raise ValueError(f"{wrong} is no number that is measured")
        return known

    def of_one(self, networks: int) -> Progress:
        """Share of one of so many networks that trained together."""
        if networks == 1:
            return self
        return replace(
            self,
            seconds=self.seconds / networks,
            waited=self.waited / networks,
            busy=None if self.busy is None else self.busy / networks,
            device=None if self.device is None else self.device.of_one(networks),
            # the memory stays: they had it at the same time
        )


def _no_number(value: Any) -> Any:
    """Find the first number in nested dicts that no training has: not finite, below −1, or too large for 64 bits."""
    if isinstance(value, dict):
        return next((wrong for item in value.values() if (wrong := _no_number(item)) is not None), None)
    # comparing takes numbers of any size, where functions of floats do not
    return value if isinstance(value, int | float) and not -1 <= value < 1 << 63 else None


def validation_epochs(epochs: int) -> set[int]:
    """Epochs (from 1) after which to validate: the first, every tenth of the run, and every epoch of the last tenth."""
    tenths = {math.ceil(i * epochs / 10) for i in range(1, 11)}
    return {1} | tenths | set(range(math.floor(0.9 * epochs) + 1, epochs + 1))


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A network in training: its folder, its validation, its file."""

    folder: Path
    """Gets metrics.jsonl, events, best.safetensors, last.safetensors and, at the end, outcome.json."""
    validate: Callable[[], dict[str, float]]
    """Measures the network as it is; the value `acc` decides which epoch is the best."""
    ship: Callable[[Path], None]
    """Writes the network as it is to a path."""
    ema: Trainee | None = None
    """Moving average of the network, in the same folder: `best-ema.safetensors`, `last-ema.safetensors`."""
    ship_swa: Callable[[Path], None] | None = None
    """Writes the mean of the network over the last epochs to a path, once it is trained: `swa.safetensors`."""


@dataclass
class _Window:
    """The steps since the last line of the log."""

    start: float = field(default_factory=time.perf_counter)
    images: int = 0


@dataclass(frozen=True)
class _Pending:
    """A line of the log whose values are on their way from the device."""

    mark: Mark
    step: int
    images: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One training: of one network, or of several that share every step. `run` goes from the checkpoint to the end."""

    state: State
    """State that the steps change."""
    stepper: Stepper
    """Runs one training step per call."""
    prepared: Callable[[], None] = lambda: None
    """Called once the stepper is prepared, before the first step."""
    trainees: tuple[Trainee, ...]
    """Networks of `state`, by files."""
    epochs: int
    """Passes over the training images."""
    num_steps: int
    """Steps an epoch."""
    rows: int
    """Images a step, of each network."""
    folder: Path
    """Folder of checkpoint.pt while it trains."""
    display: Display
    """Shows how far the training is."""
    monitor: Monitor
    """Watches the device while it trains."""
    memory: Peak
    """Tracks this training's peak memory."""
    prediction: Prediction
    """Peak memory as predicted."""
    stop: Stop
    """Says whether a signal asked to end early."""
    say: Callable[[str], None]
    """Shows a note to a person."""
    log_every: int
    """Steps between two lines of the log."""

    def run(self) -> list[Progress]:
        """Train to the end.

        Returns:
            What was reached, by trainee.

        Raises:
            Stopped: a signal came; the checkpoint holds everything up to the last step.
            RunFailed: a loss or a parameter is not finite; the checkpoint is the last good one.
        """
        progress, places = self._load()
        before = progress[0].device or Figures(seconds=progress[0].seconds)
        if not self.state.ranks.is_first:
            before = Figures()  # the first counts what all have used
        self.stepper.prepare(first_row=self.state.ranks.rank * self.rows)
        if self.stepper.note is not None:
            self.say(self.stepper.note)
        self.prepared()
        with ExitStack() as stack:
            if self.state.ranks.size > 1:  # one that leaves a validation would leave the others waiting in it
                stack.enter_context(self.stop.deferred())
            stack.enter_context(self.monitor.watching(before))
            logs = [
                stack.enter_context(closing(self._open_log(one, place)))
                for one, place in zip(self.trainees, places, strict=True)
            ]
            for epoch in range(progress[0].epochs, self.epochs):
                is_validated = epoch + 1 in validation_epochs(self.epochs)
                with self.stop.deferred():  # until the checkpoint holds the steps of the epoch
                    first_step = self.state.step - epoch * self.num_steps
                    if first_step < self.num_steps:
                        self._train_epoch(epoch, first_step, progress, logs)
                    self._take_in(epoch)
                    self._save_after(epoch if is_validated else epoch + 1, progress, logs)
                self._stop_if_asked()  # a signal that came after the last step of the epoch
                if is_validated:
                    self._validate(epoch + 1, progress, logs)
                    with self.stop.deferred():
                        self._save_after(epoch + 1, progress, logs)
                    self._stop_if_asked()
        return self._finish(progress)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _load(self) -> tuple[list[Progress], list[Place | None]]:
        """The progress of every trainee, and where its log ends, as far as that is known."""
        values: list[dict[str, Any]] = [{} for _ in self.trainees]
        if self._checkpoint.exists():
            values = load_checkpoint(self._checkpoint, self.state)
        self.state.ranks.require_same({f"{self._checkpoint}: step": self.state.step})  # in a folder that all share
        try:
            if len(values) != len(self.trainees):
                raise ValueError(f"of {len(values)} networks, not {len(self.trainees)}")
            progress = [Progress.from_values(one) for one in values]
            return progress, [msgspec.convert(one.get("log"), Place | None) for one in values]
        except ValueError as error:
            raise UserError(
                f"{self._checkpoint}: not the progress of this training ({error}); delete it to start this network anew"
            ) from error

    def _open_log(self, trainee: Trainee, place: Place | None) -> Log | NoLog:
        if not self.state.ranks.is_first:
            return NoLog()
        log = Log(trainee.folder, self.state.step, place)
        for note in log.notes:
            self.say(note)
        return log

    def _train_epoch(
        self, epoch: int, first_step: int, progress: Sequence[Progress], logs: Sequence[Log | NoLog]
    ) -> None:
        state, stepper = self.state, self.stepper
        history: deque[dict[str, float]] = deque(maxlen=_REMEMBERED_STEPS)
        pending: _Pending | None = None
        with self.stop.deferred(), steps.expected(), stepper.inputs.epoch(epoch, first_step) as batches:
            window = _Window()
            for ready in stepper.batches(batches):
                stepper(ready)
                steps.done()
                window.images += self.rows * state.ranks.size
                if pending is not None:  # the device has the next step to work on while its line is written
                    self._write(epoch, pending, progress, logs, history)
                    pending = None
                is_last = state.step == (epoch + 1) * self.num_steps
                is_due = is_last or state.step % self.log_every == 0
                stopping = self._is_asked_to_stop(is_due)
                if is_due or stopping:
                    mark = stepper.mark()
                    if is_last or stopping:
                        with steps.waiting():
                            mark.read()  # the host is some steps ahead, which the next line would make up for
                    now = time.perf_counter()
                    pending = _Pending(mark, state.step, window.images, now - window.start)
                    window = _Window(now)
                if pending is not None and (is_last or stopping):
                    self._write(epoch, pending, progress, logs, history)
                    pending = None
                if stopping:
                    with steps.waiting():
                        self._save(progress, logs)
                    state.ranks.barrier()  # torchrun ends them all as soon as one has ended: not while the first writes
                    self._stop()

    def _write(
        self,
        epoch: int,
        pending: _Pending,
        progress: Sequence[Progress],
        logs: Sequence[Log | NoLog],
        history: deque[dict[str, float]],
    ) -> None:
        """The log's lines of some steps, and what the display shows of them."""
        with steps.waiting():  # on a GPU for what the others have not done yet
            measured, seconds = pending.mark.read(), pending.seconds
        for rows in measured.rows:
            for values in rows:
                history.append(values)
                if not math.isfinite(values["loss"]):
                    self._fail(f"the loss is {values['loss']} at step {values['step']:.0f}", list(history))
        reading = self.monitor.poll()
        rates: dict[str, float] = {"images_per_s": pending.images / seconds, "data_wait": measured.waited / seconds}
        if measured.busy is not None:
            rates["graph_busy"] = measured.busy / seconds
        for one, log, values in zip(progress, logs, measured.rows[-1], strict=True):
            one.seconds += seconds
            one.images += pending.images
            one.waited += measured.waited
            one.busy = None if one.busy is None or measured.busy is None else one.busy + measured.busy
            line = {name: value for name, value in values.items() if name != "step"}
            log.write("train", pending.step, line | rates | {"epoch": epoch + 1})
            if reading:
                log.write("device", pending.step, reading.values())
        shown = {name: sum(values[name] for values in measured.rows[-1]) / len(logs) for name in measured.rows[-1][0]}
        self.display.stepped(epoch=epoch + 1, step=pending.step, values=shown | rates, device=reading)

    def _take_in(self, epoch: int) -> None:
        """Take the weights after `epoch`, if it is one of the last, into their mean, unless they are in it already."""
        swa = self.state.swa
        if swa is not None and swa.taken < epoch + 1 - (self.epochs - swa.epochs):
            swa.update(self.state.student)

    def _validate(self, epoch: int, progress: Sequence[Progress], logs: Sequence[Log | NoLog]) -> None:
        for trainee, one, log in zip(self.trainees, progress, logs, strict=True):
            with averaged_statistics(self.state.student, self.state.ranks):
                values = trainee.validate()
                one.last_acc = values["acc"]
                if values["acc"] > one.best_acc:
                    one.best_acc, one.best_epoch = values["acc"], epoch
                    self._ship(trainee, "best")
            if trainee.ema is not None:
                values = values | self._validate_ema(trainee.ema, epoch, one)
            log.write("valid", self.state.step, values | {"epoch": epoch})
            log.flush()
            self.display.validated(epoch=epoch, values=values)

    def _validate_ema(self, trainee: Trainee, epoch: int, progress: Progress) -> dict[str, float]:
        """What the validation of a moving average measured, as `ema_acc`, …; its best one is written."""
        assert self.state.ema is not None
        progress.ema = best = progress.ema or Best()
        with averaged_statistics(self.state.ema.student, self.state.ranks):
            values = trainee.validate()
            if values["acc"] > best.acc:
                best.acc, best.epoch = values["acc"], epoch
                self._ship(trainee, "best-ema")
        return {f"ema_{name}": value for name, value in values.items()}

    def _save_after(self, epochs: int, progress: Sequence[Progress], logs: Sequence[Log | NoLog]) -> None:
        """Write a checkpoint in which so many epochs have ended."""
        for one in progress:
            one.epochs = epochs
        self._save(progress, logs)

    def _save(self, progress: Sequence[Progress], logs: Sequence[Log | NoLog]) -> None:
        norms = torch.stack(torch._foreach_norm(list(self.state.student.parameters())))
        if not math.isfinite(norms.detach().sum().item()):
            self._fail(f"a parameter is not finite after step {self.state.step - 1}", [])
        figures = self._figures()
        for one in progress:
            one.device = figures
        # in this order: a checkpoint counts no line that may be lost
        places = [log.sync() for log in logs]
        values = [asdict(one) | {"log": place} for one, place in zip(progress, places, strict=True)]
        save_checkpoint(self._checkpoint, self.state, values)

    def _finish(self, progress: Sequence[Progress]) -> list[Progress]:
        figures, peak, predicted = self._figures(), self.memory.bytes, self.prediction.tensors
        whole = [replace(one, device=figures, peak_bytes=peak, predicted_bytes=predicted) for one in progress]
        outcomes = [one.of_one(len(progress)) for one in whole]
        with averaged_statistics(self.state.student, self.state.ranks):
            for trainee in self.trainees:
                self._ship(trainee, "last")
        if self.state.ema is not None:
            with averaged_statistics(self.state.ema.student, self.state.ranks):
                for trainee in self.trainees:
                    if trainee.ema is not None:
                        self._ship(trainee.ema, "last-ema")
        for trainee in self.trainees:
            if trainee.ship_swa is not None and self.state.ranks.is_first:
                trainee.ship_swa(trainee.folder / "swa.safetensors")
        if self.state.ranks.is_first:
            for trainee, outcome in zip(self.trainees, outcomes, strict=True):
                with atomic_write(trainee.folder / "outcome.json") as temporary:
                    temporary.write_text(json.dumps(with_digest(asdict(outcome)), indent=2) + "\n")
            with writing(self._checkpoint):
                self._checkpoint.unlink()
        self.state.ranks.barrier()  # whoever looks for these files finds them
        return outcomes

    def _figures(self) -> Figures:
        """Figures of all processes' devices; a CPU's are its machine's, whoever asks."""
        figures = self.monitor.figures()
        if self.stepper.device.type != "cuda":
            return figures
        return across_devices(self.state.ranks.gather_objects(figures))

    def _ship(self, trainee: Trainee, name: str) -> None:
        if self.state.ranks.is_first:
            trainee.ship(trainee.folder / f"{name}.safetensors")

    def _is_asked_to_stop(self, is_due: bool) -> bool:
        """True where a signal waits at any process: they agree where all of them write a line of the log."""
        requested = self.stop.requested  # asked once: a signal may come at any line
        if self.state.ranks.size == 1:
            return requested
        return is_due and self.state.ranks.any(requested)

    def _stop_if_asked(self) -> None:
        if self._is_asked_to_stop(True):
            self._stop()

    def _stop(self) -> None:
        self.stop.check()
        raise Stopped(signal.SIGTERM)  # the signal was another process's

    def _fail(self, what: str, history: list[dict[str, float]]) -> None:
        """Leave the values that led here in failure.json, and raise."""
        path = self.folder / "failure.json"
        if self.state.ranks.is_first:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps({"what": what, "last_steps": history}, indent=2) + "\n")
        losses = ", ".join(f"{values['loss']:.4g}" for values in history)
        last_good = self._checkpoint if self._checkpoint.exists() else "none yet"
        raise RunFailed(
            f"{self.folder.name}: {what} (losses: {losses or 'finite'}; values in {path}); "
            f"last good checkpoint: {last_good}; "
            "try a lower learning rate or a longer warm-up in a new --out"
        )
