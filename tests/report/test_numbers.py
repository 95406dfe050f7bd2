"""The numbers that figures draw: those of the run's tables, and of computations of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_run import write_run

from ensdistill.report.folder import read_run
from ensdistill.report.group import groups_of
from ensdistill.report.numbers import (
    changed_confusions,
    class_accuracies,
    device_use,
    diversity_of,
    mean_curve,
    num_classes,
    reliabilities,
    reliability,
)
from ensdistill.run.metrics import diversity, ece


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("report") / "small", seeds=2, absent=3)
    (group,), _ = groups_of([read_run(run.path)])
    assert not group.first.missing
    return run, group


def test_reliability_gives_the_ece_of_the_tables(small):
    run, group = small
    for name in ("teacher ensemble", "kd"):
        for row, measured in zip(group.rows(name), run.measures[name], strict=True):
            assert row.measure("ece") == measured.ece
            correct_N = row.predictions.predicted_N == run.labels_N.numpy()
            assert reliability(row.predictions.top_N, correct_N).ece == pytest.approx(measured.ece, abs=1e-6)
            assert reliability(row.predictions.scaled_top_N, correct_N).ece == pytest.approx(measured.cece, abs=1e-6)
            assert row.predictions.nll_N.mean(dtype=float) == pytest.approx(measured.nll, abs=1e-6)
            assert row.predictions.scaled_nll_N.mean(dtype=float) == pytest.approx(measured.cnll, abs=1e-6)
    before, after = reliabilities(group, "teacher ensemble")
    assert before.share_b.sum() == pytest.approx(1) and after.ece == pytest.approx(
        run.measures["teacher ensemble"][0].cece, abs=1e-6
    )


def test_bins_end_where_the_tables_end_them():
    top = np.array([0.2, 1.0, 3 / 15, 4 / 15, 1 / 15], dtype=np.float64)
    right = np.array([True, False, True, True, False])
    logp = torch.tensor(np.stack([top, np.zeros(5)], axis=1)).log()
    labels = torch.tensor([0 if r else 1 for r in right])
    assert reliability(top, right).ece == pytest.approx(ece(logp, labels), abs=1e-12)


def test_accuracy_by_class_and_confusions(small):
    run, group = small
    assert num_classes(group) == 10
    accs = class_accuracies(group, "kd")
    predicted = [x[:, 0].argmax(-1) for x in run.logits["kd"]]
    for k in range(10):
        of_k = run.labels_N == k
        if k == 3:
            assert np.isnan(accs[k])
        else:
            assert accs[k] == pytest.approx(np.mean([(p[of_k] == k).double().mean().item() for p in predicted]))
    found = changed_confusions(group, "kd", "latentbe+tdiv-sdiv", 5)

    def counts(name):
        table = torch.zeros(10, 10)
        for x in run.logits[name]:
            for label, guess in zip(run.labels_N, x[:, 0].argmax(-1), strict=True):
                table[label, guess] += (label != guess) / 2
        return table

    change = (counts("latentbe+tdiv-sdiv") - counts("kd")).abs()
    assert (
        len(found) == 5
        and [abs(one.after - one.before) for one in found] == sorted(change.flatten().tolist(), reverse=True)[:5]
    )
    for one in found:
        assert counts("kd")[one.label, one.predicted] == one.before != one.after


def test_diversity_of_members_is_the_metric_s(small):
    run, group = small
    teachers = diversity(run.logits["teacher ensemble"][0])
    assert diversity_of(group.rows("teacher ensemble")[0]) == pytest.approx(
        {"kld": teachers.kld, "disagreement": 1 - teachers.agreement, "cka": teachers.cka}
    )
    assert diversity_of(group.rows("kd")[0]) == {}


def test_curves_and_the_device_s_time(small):
    _, group = small
    at, values = mean_curve(group.trainings("kd"), "valid", "acc")
    assert at.tolist() == list(range(1, 11)) and values[-1] == pytest.approx(0.95)
    assert mean_curve(group.trainings("kd"), "valid", "members_acc")[0].size == 0
    use = device_use(group.first.trainings)
    assert use.minutes_T[-1] == pytest.approx(7 * 50 * 20 / 400 / 60) and set(use.values) == {"utilisation"}
    assert len(use.starts) == 7 and use.starts[-1][0] == pytest.approx(6 * 50 * 20 / 400 / 60)
    assert (np.diff(use.minutes_T) >= 0).all()


def test_what_is_missing_or_another_s_is_said(tmp_path):
    run = write_run(tmp_path / "a")
    assert read_run(run.path).missing == []
    (run.path / "shown.npz").unlink()
    (run.path / "environment.json").write_text("[")
    (run.path / "predictions.npz").write_bytes((run.path / "predictions.npz").read_bytes()[:-40])
    found = read_run(run.path)
    assert found.shown is None and found.labels_N is None and found.environment == {}
    assert [line.split(",")[0].split(":")[0] for line in found.missing] == [
        "environment.json", "predictions.npz", "shown.npz"
    ]  # fmt: skip
    other = write_run(tmp_path / "b", seed=1)
    (run.path / "predictions.npz").write_bytes((other.path / "predictions.npz").read_bytes())
    assert "of another evaluation than results.json" in read_run(run.path).missing[1]


def test_old_results_give_what_they_have(tmp_path):
    run = write_run(tmp_path / "a", methods=("kd",))
    results = json.loads((run.path / "results.json").read_text())
    results = {"rows": [{"name": row["name"], "measures": row["measures"], "dee": "-inf"} for row in results["rows"]]}
    (run.path / "results.json").write_text(json.dumps(results))
    (run.path / "predictions.npz").unlink()
    found = read_run(run.path)
    assert [row.name for row in found.rows][-1] == "kd" and found.config["network"] == "wrn10x1"
    assert len(found.missing) == 1 and "predictions.npz" in found.missing[0]
