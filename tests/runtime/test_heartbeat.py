"""Signs of life of several processes, played by threads with one store."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from ensdistill.runtime.rank_guards.heartbeat import Heartbeat, Steps, _Silence

MAX_SILENCE = 1.0


class Stopping:
    """A connection to a store; once `stopped`, whoever calls it waits, as all threads of a stopped process do."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.stopped = store, threading.Event()
        self.go_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if self.stopped.is_set():
            self.go_on.wait(20)
        return getattr(self.store, name)


class Played:
    """Processes of which each says and ends into a list."""

    def __init__(
        self,
        stack: ExitStack,
        size: int,
        *,
        keeper: int | None = None,
        missing: int | None = None,
        steps: dict[int, Steps] | None = None,
    ) -> None:
        master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stack.callback(lambda: master)  # lives as long
        self.said: list[tuple[int, str]] = []
        self.ended: dict[int, str | None] = {}
        self.stores = []
        for _ in range(size):
            store = dist.TCPStore(
                "127.0.0.1", master.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)
            )
            self.stores.append(Stopping(store))
        for rank, store in enumerate(self.stores):
            if rank != missing:
                heart = Heartbeat(
                    store,  # type: ignore[arg-type]
                    rank=rank,
                    size=size,
                    max_silence=MAX_SILENCE,
                    keeper=keeper,
                    say=lambda line, rank=rank: self.said.append((rank, line)),  # type: ignore[misc]
                    end=lambda line, rank=rank: self.ended.setdefault(rank, line),  # type: ignore[misc]
                    steps=steps[rank] if steps else Steps(),
                )
                stack.enter_context(heart.beating())

        stack.callback(lambda: [store.go_on.set() for store in self.stores])

    def wait(self, until: Any, seconds: float = 6.0) -> None:
        start = time.monotonic()
        while not until():
            assert time.monotonic() < start + seconds, (self.said, self.ended)
            time.sleep(0.02)


def test_one_that_is_stopped_is_named_half_way_and_ends_the_others():
    with ExitStack() as stack:
        played = Played(stack, 3)
        time.sleep(2 * MAX_SILENCE)
        assert not played.said and not played.ended  # nobody is silent
        start = time.monotonic()
        played.stores[1].stopped.set()
        played.wait(lambda: {0, 2} <= played.ended.keys())
        assert time.monotonic() - start < 2 * MAX_SILENCE
    ((speaker, named),) = [(rank, line) for rank, line in played.said if "process 1 of 3" in line]
    assert speaker == 0
    assert named.startswith(f"warning: process 1 of 3 (pid {os.getpid()} on ") and "the run ends after 1 s" in named
    assert played.ended[2] is None  # the first says it for all
    assert (
        "error: process 1 of 3 (pid" in played.ended[0] and "--max-silence 1): go on with --resume" in played.ended[0]
    )


def test_the_second_speaks_where_the_first_is_silent_and_one_that_comes_back_is_said_to():
    with ExitStack() as stack:
        played = Played(stack, 2)
        time.sleep(MAX_SILENCE / 2)
        played.stores[0].stopped.set()
        played.wait(lambda: any(rank == 1 and "warning: process 0 of 2 (pid" in line for rank, line in played.said))
        played.stores[0].stopped.clear()
        played.stores[0].go_on.set()
        played.wait(lambda: (1, "process 0 of 2 is back") in played.said)


def test_one_that_has_not_started_is_named_and_waited_for():
    with ExitStack() as stack:
        played = Played(stack, 2, missing=1)
        time.sleep(2.5 * MAX_SILENCE)
        assert [line for _, line in played.said] == ["warning: process 1 of 2 has not started yet"] and not played.ended


@pytest.mark.parametrize("keeper, name", [(None, "torchrun"), (0, "process 0 of 2")])
def test_a_store_that_does_not_answer_is_silent_too(keeper, name):
    with ExitStack() as stack:
        played = Played(stack, 2, keeper=keeper)
        time.sleep(MAX_SILENCE / 2)
        for store in played.stores:
            store.stopped.set()
        played.wait(lambda: played.ended.keys() == {0, 1})
    speaker = 0 if keeper is None else 1
    assert f"error: {name}, which keeps the processes' store, has given no sign of life" in played.ended[speaker]
    assert played.ended[1 - speaker] is None or keeper == 0  # who was stopped itself is not heard


def test_time_in_which_one_was_stopped_itself_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    silence = _Silence()
    for now[0], sign, expected in [(5, 1, 0), (10, 1, 5), (3600, 1, 15), (3605, 1, 20), (3610, 2, 0)]:
        silence.look(sign, 10)
        assert silence.seconds == expected


def test_a_step_that_never_ends_is_silence_and_nothing_else_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    steps = Steps()

    def after(seconds: float) -> bool:
        now[0] += seconds
        return steps.go_on(5.0)

    assert after(86400)  # data, compilation
    with steps.expected():
        assert after(3600)  # the first step compiles
        steps.done()
        assert after(60)
        with steps.waiting():  # for others, at the end of the backward
            assert after(3600)
        steps.done()
        assert after(600) and not after(1)  # ten times the longest
        with steps.waiting():
            assert after(3600)
        assert after(600)
    assert after(86400)  # validation


def test_one_whose_step_never_ends_is_named_and_ends_the_others():
    steps = {rank: Steps() for rank in range(3)}
    with ExitStack() as stack:
        played = Played(stack, 3, steps=steps)
        for each in steps.values():
            stack.enter_context(each.expected())
        for _ in range(20):
            for each in steps.values():
                each.done()
            time.sleep(0.1)
        assert not played.said and not played.ended
        for rank in (0, 2):
            stack.enter_context(steps[rank].waiting())  # for the first, in a collective
        played.wait(lambda: {0, 2} <= played.ended.keys())
    assert any("warning: process 1 of 3 (pid" in line for _, line in played.said)
    assert "hangs" in played.ended[0]
