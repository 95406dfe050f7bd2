"""The log is cut to what the checkpoint counts; damage is said and costs one line."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ensdistill.training.log import Log


def make_log(folder, steps):
    log = Log(folder, 0)
    for step in steps:
        log.write("train", step, {"loss": step / 2, "unknown": None, "endless": float("inf")})
    place = log.sync()
    log.write("train", steps[-1], {"loss": -1.0})  # not counted
    log.close()
    return place


def go_on(folder, step, place):
    log = Log(folder, step, place)
    log.write("train", step + 1, {"loss": (step + 1) / 2})
    log.close()
    return log.notes


def steps(folder):
    found = []
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            found.append(None)
    return found


def events(folder):
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def test_it_is_cut_to_the_byte(tmp_path):
    place = make_log(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()[: place["bytes"]]
    assert go_on(tmp_path, 3, place) == []
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before) and steps(tmp_path) == [1, 2, 3, 4]
    assert json.loads(before.splitlines()[0]) == {
        "kind": "train", "step": 1, "loss": 0.5, "unknown": None, "endless": None,
    }  # fmt: skip
    assert events(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("edited", [True, False])
def test_a_damaged_line_is_said_and_the_later_ones_are_kept(tmp_path, counted, edited):
    place = make_log(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = b"edited, which changes its length" if edited else b"\0" * 9 + lines[1][9:]
    if not counted:  # the step alone says how far it goes
        lines[3] = lines[3].replace(b'"step": 3', b'"step": 4')
    path.write_bytes(b"\n".join([*lines, b'{"kind": "tr']))
    assert go_on(tmp_path, 3, place if counted else None) == [f"{path}: damaged and left as it is: line 2"]
    assert steps(tmp_path) == [1, None, 3, 4]


def test_lines_and_events_that_are_missing_are_said(tmp_path):
    place = make_log(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: place["bytes"] - 5])
    next(tmp_path.glob("*tfevents*")).write_bytes(b"")
    lines, points = go_on(tmp_path, 3, place)
    assert lines == f"{path}: 2 lines of the 3 that the checkpoint counts"
    assert "not what the checkpoint counts; made of metrics.jsonl again" in points
    assert steps(tmp_path) == [1, 2, 4] and events(tmp_path) == [(1, 0.5), (2, 1.0), (4, 2.0)]


def test_a_log_of_an_earlier_version_goes_on_from_the_step(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("train/loss", step / 2, step)
    rows = [{"kind": "train", "step": step, "loss": step / 2} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go_on(tmp_path, 3, None) == []
    assert steps(tmp_path) == [1, 2, 3, 4] and events(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


WRONG = ('{"kind": "train", "step": "2"}', '{"kind": 1, "step": 2}', '{"kind": "train", "step": 2, "loss": "x"}', '[2]',
    '{"kind": "train", "step": 2, "loss": 1e999}', '{"kind": "train", "step": 2, "loss": 1' + "0" * 400 + "}",
    '{"kind": "train", "step": 2, "loss": [1]}', '{"kind": "train", "step": true}', '{"kind": "\\ud800", "step": 2}',
    '{"kind": "train", "step": 1' + "0" * 30 + "}", "[" * 100_000)  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
@pytest.mark.parametrize("is_counted", [True, False])
def test_a_line_of_wrong_types_is_damaged(tmp_path, line, is_counted):
    rows = ['{"kind": "train", "step": 1, "loss": 0.5}', line, '{"kind": "train", "step": 3, "loss": 1}']
    text = "".join(row + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    place = {"lines": 3, "bytes": len(text), "event_bytes": 0} if is_counted else None
    notes = go_on(tmp_path, 3, place)
    assert notes and "damaged and left as it is: line 2" in notes[0]
    assert events(tmp_path)[:2] == [(1, 0.5), (3, 1.0)]
