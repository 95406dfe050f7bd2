"""Training one network: step, log, validate, save, and nothing else.

The loop goes through (epoch, step) from wherever the checkpoint stands. Everything random is a function of those two,
so a run that was stopped and resumed in the middle of an epoch computes what an unbroken one computes.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ensdistill.checkpoint import load_checkpoint, save_checkpoint
from ensdistill.data.feed import Feed
from ensdistill.errors import RunFailed
from ensdistill.files import atomic_write
from ensdistill.log import Log
from ensdistill.monitor import Monitor
from ensdistill.readings import Figures, Reading
from ensdistill.schedule import Schedule
from ensdistill.step import State, StepConfig, train_step
from ensdistill.stop import Stop

_REMEMBERED_STEPS = 8  # values that led to a loss that is not finite


class Display(Protocol):
    """What shows the loop's progress to a person."""

    def stepped(self, *, epoch: int, step: int, values: dict[str, float], device: Reading | None) -> None:
        """`step` updates are done, in `epoch` (from 1); the values of the latest. `device`: if there is news of it."""

    def validated(self, *, epoch: int, values: dict[str, float]) -> None:
        """What the validation after `epoch` measured."""


@dataclass(kw_only=True)
class Progress:
    """What a checkpoint keeps beside the state."""

    epochs: int = 0
    """Epochs done, their validation included."""
    best_epoch: int = 0
    """The epoch (from 1) of the best validation accuracy; the first of equals."""
    best_acc: float = -1.0
    """Its validation accuracy."""
    last_acc: float = -1.0
    """The validation accuracy of the latest validation."""
    seconds: float = 0.0
    """Spent in steps, without validation and saving."""
    waited: float = 0.0
    """Of these, spent waiting for data."""
    images: int = 0
    """Images trained on."""
    device: Figures | None = None
    """What it took of the device; None where that was not recorded."""

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Progress:
        """What `dataclasses.asdict` made of one, or of one that an earlier version wrote."""
        device = values.get("device")
        return cls(**values | {"device": None if device is None else Figures(**device)})


def validation_epochs(epochs: int) -> set[int]:
    """Epochs (from 1) after which to validate: the first, every tenth of the run, and every epoch of the last tenth."""
    tenths = {math.ceil(i * epochs / 10) for i in range(1, 11)}
    return {1} | tenths | set(range(math.floor(0.9 * epochs) + 1, epochs + 1))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One network in training. `run` goes from the checkpoint in `folder`, if there is one, to the end."""

    state: State
    """What the steps change."""
    config: StepConfig
    """What a step computes."""
    schedule: Schedule
    """The learning rate of each step."""
    feed: Feed
    """The training images."""
    epochs: int
    """Passes over `feed`."""
    folder: Path
    """Gets checkpoint.pt, metrics.jsonl, events, best.safetensors, last.safetensors and, at the end, outcome.json."""
    validate: Callable[[], dict[str, float]]
    """Measures the network as it is; the value `acc` decides which epoch is the best."""
    ship: Callable[[Path], None]
    """Writes the network as it is to a path."""
    display: Display
    """Shows how far it is."""
    monitor: Monitor
    """Watches the device meanwhile."""
    stop: Stop
    """Says whether to end early."""
    device: torch.device
    """Where the batches go."""
    log_every: int
    """Steps between two lines of the log."""

    def run(self) -> Progress:
        """Train to the end.

        Raises:
            Stopped: a signal came; the checkpoint holds everything up to the last step.
            RunFailed: a loss or a parameter is not finite; the checkpoint is the last good one.
        """
        state, num_steps = self.state, self.feed.num_steps
        values = load_checkpoint(self._checkpoint, state) if self._checkpoint.exists() else {}
        progress = Progress.from_values(values)
        before = progress.device or Figures(seconds=progress.seconds)
        with self.monitor.watching(before), closing(Log(self.folder, state.step)) as log:
            for epoch in range(progress.epochs, self.epochs):
                first_step = state.step - epoch * num_steps
                if first_step < num_steps:
                    self._train_epoch(epoch, first_step, progress, log)
                if epoch + 1 in validation_epochs(self.epochs):
                    self._save(progress)
                    self._validate(epoch + 1, progress, log)
                progress.epochs = epoch + 1
                self._save(progress)
                self.stop.check()  # a signal that came after the last step of the epoch
        self.ship(self.folder / "last.safetensors")
        progress.device = self.monitor.figures()
        with atomic_write(self.folder / "outcome.json") as temporary:
            temporary.write_text(json.dumps(asdict(progress), indent=2) + "\n")
        self._checkpoint.unlink()
        return progress

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _train_epoch(self, epoch: int, first_step: int, progress: Progress, log: Log) -> None:
        state, num_steps = self.state, self.feed.num_steps
        pending: deque[tuple[int, float, dict[str, Tensor]]] = deque()
        history: deque[dict[str, float]] = deque(maxlen=_REMEMBERED_STEPS)
        with self.stop.deferred(), self.feed.epoch(epoch, first_step) as batches:
            clock = time.perf_counter()
            images = 0
            waiting = time.perf_counter()
            for images_BHWC, labels_B in batches:
                progress.waited += time.perf_counter() - waiting
                images_BHWC = images_BHWC.to(self.device, non_blocking=True)
                labels_B = labels_B.to(self.device, non_blocking=True)
                lr = self.schedule(state.step)
                pending.append((state.step, lr, train_step(state, self.config, images_BHWC, labels_B, lr)))
                images += len(labels_B)
                stopping = self.stop.requested  # asked once: a signal may come at any line
                if stopping or state.step % self.log_every == 0 or state.step == (epoch + 1) * num_steps:
                    values = self._fetch(pending, history)
                    now = time.perf_counter()
                    progress.seconds += now - clock
                    progress.images += images
                    values |= {"images_per_s": images / (now - clock), "epoch": epoch + 1}
                    log.write("train", state.step, values)
                    if reading := self.monitor.poll():
                        log.write("device", state.step, reading.values())
                    self.display.stepped(epoch=epoch + 1, step=state.step, values=values, device=reading)
                    clock, images = time.perf_counter(), 0
                if stopping:
                    log.flush()
                    self._save(progress)
                    self.stop.check()
                waiting = time.perf_counter()

    def _fetch(
        self, pending: deque[tuple[int, float, dict[str, Tensor]]], history: deque[dict[str, float]]
    ) -> dict[str, float]:
        """The pending measures, in one transfer; returns the latest and leaves the last few in `history`."""
        names = list(pending[-1][2])
        table = torch.stack([torch.stack([measures[name] for name in names]) for _, _, measures in pending]).tolist()
        for (step, lr, _), row in zip(pending, table, strict=True):
            history.append({"step": step, "lr": lr} | dict(zip(names, row, strict=True)))
            if not math.isfinite(history[-1]["loss"]):
                self._fail(f"the loss is {history[-1]['loss']} at step {step}", list(history))
        pending.clear()
        return {name: value for name, value in history[-1].items() if name != "step"}

    def _validate(self, epoch: int, progress: Progress, log: Log) -> None:
        values = self.validate()
        progress.last_acc = values["acc"]
        if values["acc"] > progress.best_acc:
            progress.best_acc, progress.best_epoch = values["acc"], epoch
            self.ship(self.folder / "best.safetensors")
        log.write("valid", self.state.step, values | {"epoch": epoch})
        log.flush()
        self.display.validated(epoch=epoch, values=values)

    def _save(self, progress: Progress) -> None:
        norms = torch.stack(torch._foreach_norm(list(self.state.student.parameters())))
        if not math.isfinite(norms.detach().sum().item()):
            self._fail(f"a parameter is not finite after step {self.state.step - 1}", [])
        progress.device = self.monitor.figures()
        save_checkpoint(self._checkpoint, self.state, asdict(progress))

    def _fail(self, what: str, history: list[dict[str, float]]) -> None:
        """Leave the values that led here in failure.json, and raise."""
        path = self.folder / "failure.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"what": what, "last_steps": history}, indent=2) + "\n")
        losses = ", ".join(f"{values['loss']:.4g}" for values in history)
        last_good = self._checkpoint if self._checkpoint.exists() else "none yet"
        raise RunFailed(
            f"{self.folder.name}: {what} (losses: {losses or 'finite'}; values in {path}); "
            f"last good checkpoint: {last_good}; "
            "try a lower learning rate or a longer warm-up in a new --out"
        )
