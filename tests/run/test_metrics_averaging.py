"""The averaging gap: measured on members, their ensemble and the average, and said when it opens."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from ensdistill.run.display import Screen
from ensdistill.run.metrics import accuracy, averaging_gap, ensemble_log_probs, member_values, nll


def test_member_values_are_the_mean_and_the_ensemble():
    logits, labels = torch.randn(50, 3, 4), torch.randint(0, 4, (50,))
    values = member_values(logits, labels)
    singles = [ensemble_log_probs(logits[:, [m]]) for m in range(3)]
    assert values["members_acc"] == pytest.approx(sum(accuracy(s, labels) for s in singles) / 3)
    assert values["members_nll"] == pytest.approx(sum(nll(s, labels) for s in singles) / 3)
    assert values["ensemble_acc"] == accuracy(ensemble_log_probs(logits), labels)
    assert values["ensemble_nll"] == nll(ensemble_log_probs(logits), labels) < values["members_nll"]


def test_a_gap_is_said_with_what_to_change():
    text = averaging_gap({"acc": 0.3, "members_acc": 0.92})
    assert text is not None and "0.300" in text and "0.920" in text
    for option in ("--student.warmup-epochs", "--factor-rate", "--student.lr", "--recalibrate-bn"):
        assert option in text
    assert averaging_gap({"acc": 0.88, "members_acc": 0.92}) is None
    assert averaging_gap({"acc": 0.88}) is None and averaging_gap({"acc": 0.95, "members_acc": 0.5}) is None


def screen(**options) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, **options)), out


def test_a_pipe_gets_plain_lines_and_wide_ones():
    show, out = screen()
    show.warn("the averaging gap is open " + "x" * 200)
    with show.training("kd", epochs=3, steps=12, first_step=4) as display:
        display.stepped(epoch=1, step=4, values={"loss": 1.25, "images_per_s": 1234.5})
        display.validated(epoch=1, values={"acc": 0.5, "nll": 0.7, "members_acc": 0.4, "members_nll": 0.8,
                                           "ensemble_acc": 0.45, "ensemble_nll": 0.75})  # fmt: skip
        display.validated(epoch=2, values={"acc": 0.5, "nll": 0.7})  # too soon after the last line
        display.validated(epoch=3, values={"acc": 0.6, "nll": 0.7})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("WARNING: the averaging gap is open") and len(lines[0]) > 200
    assert lines[1] == "kd: going on at step 4 of 12"
    assert lines[2] == (
        "kd: epoch 1/3  loss 1.2500  1,234 images/s  val acc 0.5000 nll 0.700 | members 0.4000 0.800 | "
        "their ensemble 0.4500 0.750"
    )
    assert lines[3].startswith("kd: epoch 3/3") and len(lines) == 4


def test_a_terminal_gets_a_bar():
    show, out = screen(force_terminal=True, width=140)
    with show.training("kd", epochs=3, steps=12, first_step=0) as display:
        display.stepped(epoch=2, step=6, values={"loss": math.pi, "images_per_s": 99.0})
        display.validated(epoch=2, values={"acc": 0.5, "nll": 0.7})
        display.stepped(epoch=2, step=9, values={"loss": math.pi, "images_per_s": 99.0})
    text = out.getvalue()
    assert "epoch 2/3  loss 3.142  99 images/s  val 0.500" in text and "75%" in text
    with show.counting("digits") as counter:
        counter(3, 4)
    assert "digits" in out.getvalue()
