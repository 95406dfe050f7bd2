"""Display of a run: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ensdistill.monitor.readings import Reading
from ensdistill.runtime.cli import plain_console

PIPE_WIDTH = 140
_SECONDS_BETWEEN_LINES = 20.0
_SECONDS_BETWEEN_VALIDATIONS = 1.0  # short epochs would fill a log


class Screen:
    """Prints for a command: lines, warnings, tables, bars. `console`, a `plain_console`, is for everything else."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or plain_console()
        if not self.console.is_terminal:
            self.console.width = PIPE_WIDTH  # a pipe has no width: rich would fold every table to 80 columns

    def show(self, *tables: Table) -> None:
        """Print one table after another."""
        for table in tables:
            self.console.print(table)

    def say(self, text: str) -> None:
        """Print one plain line."""
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line that nobody overlooks."""
        self.console.print(f"WARNING: {text}", style="bold red", markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def counting(self, title: str) -> Iterator[Counter]:
        """Show progress of a job that counts: `counter(done, total)`."""
        with self._bar() as progress:
            yield Counter(self, progress, title)

    @contextmanager
    def training(self, title: str, *, epochs: int, steps: int, first_step: int) -> Iterator[TrainingDisplay]:
        """Show one network in training: a `loop.Display`."""
        if first_step:
            self.say(f"{title}: going on at step {first_step} of {steps}")
        with self._bar() as progress:
            yield TrainingDisplay(self, progress, title, epochs=epochs, steps=steps, first_step=first_step)

    @contextmanager
    def _bar(self) -> Iterator[Progress | None]:
        if not self.console.is_terminal:
            yield None
            return
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[values]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=8) as progress:
            yield progress


class Counter:
    """`counter(done, total)` moves the bar, or prints a line now and then."""

    def __init__(self, screen: Screen, progress: Progress | None, title: str) -> None:
        self._screen, self._progress, self._title = screen, progress, title
        self._task = progress.add_task(title, total=None, values="") if progress else None
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._screen.say(f"{self._title}: {done} of {total}")
            self._last_line = time.monotonic()


class TrainingDisplay:
    """One network in training; see `loop.Display`."""

    def __init__(
        self, screen: Screen, progress: Progress | None, title: str, *, epochs: int, steps: int, first_step: int
    ) -> None:
        self._screen, self._progress, self._title = screen, progress, title
        self._epochs, self._steps = epochs, steps
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(title, total=steps, completed=first_step, values="")
        self._values: dict[str, float] = {}
        self._acc = ""
        self._device = ""
        self._last_line = time.monotonic()

    def stepped(self, *, epoch: int, step: int, values: dict[str, float], device: Reading | None = None) -> None:
        """Move the bar, or print a line now and then."""
        self._values = values
        if device is not None:
            self._device = f"  {device.line()}"
        if self._progress is not None and self._task is not None:
            text = f"epoch {epoch}/{self._epochs}  loss {values['loss']:.3f}  {self._speed()}{self._acc}{self._device}"
            self._progress.update(self._task, completed=step, values=text)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line(epoch, "")

    def validated(self, *, epoch: int, values: dict[str, float]) -> None:
        """Show the validation; where a student has members that are averaged, all three views of it."""
        self._acc = f"  val {values['acc']:.3f}"
        text = f"val acc {values['acc']:.4f} nll {values['nll']:.3f}"
        if "members_acc" in values:
            text += f" | members {values['members_acc']:.4f} {values['members_nll']:.3f}"
            text += f" | their ensemble {values['ensemble_acc']:.4f} {values['ensemble_nll']:.3f}"
            self._acc += f" (members {values['members_acc']:.3f})"
        is_due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_VALIDATIONS
        if self._progress is None and (is_due or epoch in (1, self._epochs)):
            self._line(epoch, text)

    def _speed(self) -> str:
        """Images/s, and what of the time went by waiting for data, and in captured steps."""
        speed = f"{self._values.get('images_per_s', 0.0):,.0f} images/s"
        if "data_wait" in self._values:
            speed += f"  data wait {self._values['data_wait']:.1%}"
        return speed + (f"  graph {self._values['graph_busy']:.1%}" if "graph_busy" in self._values else "")

    def _line(self, epoch: int, text: str) -> None:
        loss, speed = self._values.get("loss", float("nan")), f"{self._speed()}{self._device}"
        self._screen.say(f"{self._title}: epoch {epoch}/{self._epochs}  loss {loss:.4f}  {speed}  {text}".rstrip())
        self._last_line = time.monotonic()
