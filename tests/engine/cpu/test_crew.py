"""Tasks side by side: order, number at once, errors, and what they exchange."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ensdistill.engine.cpu.crew import Crew, NormsOfCrew
from ensdistill.runtime.ranks import ALONE


def test_results_come_in_order_of_the_tasks():
    def task(number: int):
        def run() -> int:
            time.sleep(0.002 * (4 - number))
            return number

        return run

    assert Crew(3).run([task(number) for number in range(4)]) == [0, 1, 2, 3]


def test_as_many_at_once_as_threads_and_each_with_one_of_pytorch():
    running, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2)

    def run() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(timeout=60)  # who were alone here would wait for ever
        with lock:
            running -= 1
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert set(Crew(2).run([run] * 6)) == {1}
    assert most == 2
    assert torch.get_num_threads() == before


def test_one_thread_is_the_callers():
    assert Crew(1).run([threading.get_ident]) == [threading.get_ident()]


def test_an_error_of_one_task_is_raised_and_releases_those_who_wait_for_it():
    crew = Crew(2)
    group = NormsOfCrew(crew)

    def waits() -> None:
        group.gather(torch.zeros(1))

    def fails() -> None:
        raise ValueError("no memory for it")

    for tasks in ([waits, waits, fails], [fails, waits, waits]):
        with pytest.raises(ValueError, match="no memory for it"):
            crew.run_together(tasks)
    assert crew.run([lambda: 3] * 2) == [3, 3]  # and the crew works on


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tasks_exchange_values_as_processes_do(threads: int):
    crew = Crew(threads)
    group = NormsOfCrew(crew)

    def task(number: int):
        def run() -> list[object]:
            found: list[object] = [group.size, group.tracks]
            for round in range(20):
                own = torch.tensor([float(number), float(round)])
                found += [group.gather(own).tolist(), group.sum_(own.clone()).tolist()]
            return found

        return run

    expected = [
        value for round in range(20) for value in ([[float(n), float(round)] for n in range(3)], [3.0, 3.0 * round])
    ]
    for number, found in enumerate(crew.run_together([task(number) for number in range(3)])):
        assert found == [3, number == 0, *expected]
    assert group.size == 1 and group.tracks  # outside of a pass


def test_processes_stand_behind_the_tasks():
    class Doubled:
        """Two processes whose values are alike."""

        size, tracks = 2, True

        def gather(self, tensor):
            return torch.stack([tensor, tensor])

        def sum_(self, tensor):
            return tensor.mul_(2)

    crew = Crew(2)
    group = NormsOfCrew(crew, Doubled())  # type: ignore[arg-type]  # what norms ask of Ranks

    def task(number: int):
        return lambda: (group.size, group.gather(torch.tensor([number])).tolist(), group.sum_(torch.tensor(1)).item())

    assert crew.run_together([task(0), task(1)]) == [(4, [[0], [1], [0], [1]], 4)] * 2
    assert NormsOfCrew(crew, ALONE).size == 1
