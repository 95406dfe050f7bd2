"""Work beside other work: what is held until when, and what of a step runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from ensdistill.runtime import streams
from ensdistill.runtime.streams import LAG, SideStream

ROOT = Path(__file__).resolve().parents[2]

META = torch.device("meta")
FUSED_UPDATE = 4
"""Launches of PyTorch's fused SGD for WRN-28-4, which has no kernel on `meta`: as captured, counted on a driver."""


def test_without_a_gpu_a_fork_is_the_work_itself():
    side, x = SideStream(torch.device("cpu")), torch.zeros(3)
    with side.fork(x):
        assert streams.lane == 0
    assert not side._pending
    side.join()


def test_what_a_fork_reads_is_held_until_it_has_been_waited_for():
    side, alive = SideStream(META), []
    for _ in range(LAG + 2):
        x = torch.empty(3, device=META)
        alive.append(weakref.ref(x))
        with side.fork(x):
            assert streams.lane == 1
        del x
    assert streams.lane == 0
    assert [ref() is not None for ref in alive] == [False] * 2 + [True] * LAG
    side.join()
    assert not any(ref() is not None for ref in alive)


def test_meta_can_stand_for_a_cpu():
    side = SideStream(META)
    with streams.meta_as("cpu"), side.fork(torch.empty(3, device=META)):
        assert streams.lane == 0
    assert not side._pending and streams.meta_stands_for == "cuda"


def test_a_fork_that_fails_leaves_the_lane_and_holds_nothing():
    side = SideStream(META)
    with pytest.raises(ValueError, match="in a fork"), side.fork(torch.empty(3, device=META)):
        raise ValueError("in a fork")
    assert streams.lane == 0 and not side._pending


@pytest.fixture(scope="module")
def step():
    """The nodes of one step of the paper's recipe, kernels' and PyTorch's: how many of a name on each lane."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/helpers/step_launches.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [{(name, lane): count for name, lane, count in rows} for rows in (found["kernels"], found["aten"])]


def test_a_step_has_few_nodes(step):
    kernels, aten = step
    nodes = sum(kernels.values()) + sum(aten.values()) + FUSED_UPDATE
    assert nodes <= 260, (nodes, kernels, aten)


def test_teachers_and_weight_gradients_run_beside_the_rest(step):
    kernels, _ = step
    beside = {name for name, lane in kernels if lane == 1}
    assert {"weight_gradient_kernel", "weight_gradient_rows_kernel"} <= beside
    assert not any(name.startswith("weight_gradient") for name, lane in kernels if lane == 0)
    convs = [kernels["member_conv_boxes_kernel", lane] + kernels["member_conv_rows_kernel", lane] for lane in (0, 1)]
    assert 0 < convs[1] < convs[0]  # the teachers' at x', beside the student's and the perturbation's
