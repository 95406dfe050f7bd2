"""Independent pieces of work side by side on the cores of a CPU, each on one thread.

PyTorch cuts every operation into as many parts as it has threads, and waits for the last part before the next operation
begins: some thousand waits a step, each for the slower core. A `Crew` runs whole networks, or the rows of one, beside
each other instead. What these have to tell each other, sums of a batch norm, goes through the pass that they share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from ensdistill.models.layers import NormGroup
from ensdistill.runtime.ranks import ALONE

Result = TypeVar("Result")

_MOST_TASKS = 1024


class _Broken(RuntimeError):
    """Another task of the pass failed, whose error counts."""


class Crew:
    """Runs tasks, at most `threads` of them at any moment, each with one thread of PyTorch's own."""

    def __init__(self, threads: int) -> None:
        assert threads > 0, "a crew has a thread"
        self.threads = threads
        self._permits = threading.Semaphore(threads)
        self._here = threading.local()
        # Threads start when they are needed; a pass needs one for each of its tasks. The count is a thread's own, and
        # that of all which begin after it: those of loaders and monitors, which need no more.
        self._pool = ThreadPoolExecutor(
            _MOST_TASKS, thread_name_prefix="crew", initializer=torch.set_num_threads, initargs=(1,)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Crew:
        return self  # networks hold it and are copied; threads cannot be

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run all of `tasks` and give their results, in their order; begins with the first. One thread is the caller's.

        Raises:
            What the first task raised that failed, after all have ended.
        """
        return [task() for task in tasks] if self.threads == 1 else self._run(tasks, None)

    def run_together(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run all of `tasks` as one pass, whose tasks exchange values (`NormsOfCrew`): each of them as often."""
        return self.run(tasks) if len(tasks) == 1 else self._run(tasks, _Exchange(len(tasks), self._permits))

    def exchange(self) -> tuple[_Exchange, int] | None:
        """The pass that the calling thread takes part in, and the number of its task; None outside of one."""
        return getattr(self._here, "exchange", None)

    def _run(self, tasks: Sequence[Callable[[], Result]], exchange: _Exchange | None) -> list[Result]:
        def work(number: int, task: Callable[[], Result]) -> Result:
            with self._permits:
                self._here.exchange = None if exchange is None else (exchange, number)
                try:
                    return task()
                except BaseException:
                    if exchange is not None:
                        exchange.give_up()
                    raise
                finally:
                    self._here.exchange = None

        futures = [self._pool.submit(work, number, task) for number, task in enumerate(tasks)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _Broken)):
            raise error
        return [future.result() for future in futures]


class _Exchange:
    """Values that the tasks of one pass tell each other: each waits until all have come, without holding a core."""

    def __init__(self, size: int, permits: threading.Semaphore) -> None:
        self.size = size
        self._permits = permits
        self._changed = threading.Condition()
        self._given: list[Any] = [None] * size
        self._count = self._round = 0
        self._found: Any = None
        self._is_broken = False

    def __call__(self, task: int, value: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """`combine` of all tasks' values in their order, computed once, for all of them to read."""
        with self._changed:
            self._given[task] = value
            self._count += 1
            round = self._round
            if self._count == self.size:
                self._found = combine(self._given)
                self._count, self._round = 0, round + 1
                self._changed.notify_all()
                return self._found
        self._permits.release()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._round > round or self._is_broken)
                if self._round == round:
                    raise _Broken("another task of the pass failed")
                return self._found  # nobody begins the next round before all have left this one
        finally:
            self._permits.acquire()

    def give_up(self) -> None:
        """Release those who wait for a task that failed."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()


class NormsOfCrew:
    """Those who normalise their rows together, for the norms of a network: tasks of a pass, and processes behind them.

    Outside of a pass it is what `processes` is.
    """

    def __init__(self, crew: Crew, processes: NormGroup = ALONE) -> None:
        self._crew, self._processes = crew, processes

    def __deepcopy__(self, memo: dict[int, Any]) -> NormsOfCrew:
        return self

    @property
    def size(self) -> int:
        """Number of those who have rows."""
        here = self._crew.exchange()
        return self._processes.size * (1 if here is None else here[0].size)

    @property
    def tracks(self) -> bool:
        """True for the one of a process that writes the running statistics."""
        here = self._crew.exchange()
        return here is None or here[1] == 0

    @property
    def is_precise(self) -> bool:
        """False in a pass."""
        return self._crew.exchange() is None and self._processes.is_precise

    @torch.no_grad()
    def gather(self, tensor: Tensor) -> Tensor:
        """Everyone's `tensor`, (size, …); to be read, not written."""
        here = self._crew.exchange()
        if here is None:
            return self._processes.gather(tensor)
        exchange, task = here
        return exchange(task, tensor, lambda given: self._processes.gather(torch.stack(given)).flatten(0, 1))

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the sum of everyone's."""
        here = self._crew.exchange()
        if here is None:
            return self._processes.sum_(tensor)
        exchange, task = here
        return tensor.copy_(
            exchange(task, tensor.clone(), lambda given: self._processes.sum_(torch.stack(given).sum(0)))
        )
