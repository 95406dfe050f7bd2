"""The verdict: its differences, intervals and words, against computations of their own."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats
from small_run import write_run

from ensdistill.report.folder import read_run
from ensdistill.report.group import groups_of
from ensdistill.report.verdict import basis, compare, paired_half, sentence, welch_half


def group_of(*paths):
    (group,), _ = groups_of([read_run(path) for path in paths])
    return group


def change_rows(path, change) -> None:
    results = json.loads((path / "results.json").read_text())
    change(results["rows"])
    (path / "results.json").write_text(json.dumps(results))


def test_welch_is_that_of_scipy():
    a, b = [0.91, 0.93, 0.90], [0.88, 0.86, 0.89, 0.90]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert welch_half(a, b) == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)
    assert welch_half([0.5], b) is None and welch_half([0.5, 0.5], [0.5, 0.5]) == 0


def test_the_paired_interval_is_that_of_a_bootstrap():
    draw = np.random.default_rng(0)
    differences = draw.choice([-1.0, 0.0, 1.0], size=400, p=[0.08, 0.8, 0.12])
    means = draw.choice(differences, size=(4000, 400)).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert paired_half(differences, of_shares=False) == pytest.approx((high - low) / 2, rel=0.06)
    assert paired_half(differences, of_shares=True) > paired_half(differences, of_shares=False)
    assert paired_half(np.zeros(400), of_shares=True) == pytest.approx(1.96 * math.sqrt(2) / 400)
    assert math.isnan(paired_half(np.zeros(1), of_shares=True))


def test_one_seed_is_judged_on_test_images(tmp_path):
    run = write_run(tmp_path / "a", methods=("kd", "latentbe", "latentbe+tdiv-sdiv"))
    group = group_of(run.path)
    assert group.target == "latentbe+tdiv-sdiv" and group.baselines == ["single teacher", "kd"]
    one = compare(group, "latentbe+tdiv-sdiv", "kd")
    ours, theirs = (run.logits[name][0][:, 0].argmax(-1) == run.labels_N for name in ("latentbe+tdiv-sdiv", "kd"))
    assert one.acc.value == pytest.approx((ours.double() - theirs.double()).mean().item())
    assert one.discordant == (int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))
    assert one.p_value == pytest.approx(stats.binomtest(one.discordant[0], sum(one.discordant)).pvalue)
    measured = [run.measures[name][0] for name in ("latentbe+tdiv-sdiv", "kd")]
    assert one.nll.value == pytest.approx(measured[0].nll - measured[1].nll)
    assert one.cnll.value == pytest.approx(measured[0].cnll - measured[1].cnll)
    assert one.acc.by == "test images" and one.n == (1, 1)
    text = sentence(group)
    assert text.startswith("Over one network on labels, the averaged network (latentbe+tdiv-sdiv) ")
    assert "; over kd it " in text and "n = 1 student, against 3 on labels and 1 of kd; 200 test images" in text
    assert basis(group).startswith("One student:") and "say nothing about what another seed would give" in basis(group)


def test_several_seeds_are_judged_by_the_wider_interval(tmp_path):
    run = write_run(tmp_path / "a", seeds=4)
    group = group_of(run.path)
    one = compare(group, "latentbe+tdiv-sdiv", "kd")
    accs = [[m.acc for m in run.measures[name]] for name in ("latentbe+tdiv-sdiv", "kd")]
    right = [np.mean([(x[:, 0].argmax(-1) == run.labels_N).numpy() for x in run.logits[name]], axis=0)
             for name in ("latentbe+tdiv-sdiv", "kd")]  # fmt: skip
    halves = welch_half(*accs), paired_half(right[0] - right[1], of_shares=True)
    assert one.acc.half == pytest.approx(max(halves)) and one.discordant is None
    assert "n = 4 students, against 3 on labels and 4 of kd" in sentence(group)
    assert "same teachers" in basis(group)


@pytest.mark.parametrize(
    ("accs", "cnlls", "words"),
    [
        ([0.95, 0.951, 0.949], [0.2, 0.201, 0.199], "over kd it gains 5.00 ± "),
        ([0.85, 0.851, 0.849], [0.2, 0.201, 0.199], "over kd it loses 5.00 ± "),
        (
            [0.95, 0.951, 0.949],
            [0.4, 0.401, 0.399],
            "points of accuracy but raises cNLL by 0.100",
        ),
        ([0.90, 0.91, 0.89], [0.2, 0.201, 0.199], "gains no accuracy that can be told from chance (+0.00 ± "),
        ([0.90, 0.91, 0.89], [0.29, 0.31, 0.30], "over kd it gains nothing that can be told from chance"),
    ],
)
def test_its_words_are_those_of_its_intervals(tmp_path, accs, cnlls, words):
    run = write_run(tmp_path / "a", seeds=3)
    (run.path / "predictions.npz").unlink()

    def change(rows):
        own, kd = iter(zip(accs, cnlls, strict=True)), iter([(0.899, 0.299), (0.9, 0.3), (0.901, 0.301)])
        for row in rows:
            if row["name"] in ("kd", "latentbe+tdiv-sdiv"):
                row["measures"]["acc"], row["measures"]["cnll"] = next(kd if row["name"] == "kd" else own)

    change_rows(run.path, change)
    assert words in sentence(group_of(run.path))


def test_without_predictions_one_seed_has_no_spread(tmp_path):
    run = write_run(tmp_path / "a")
    (run.path / "predictions.npz").unlink()
    group = group_of(run.path)
    assert "of which no spread is known" in sentence(group) and "no interval is known" in basis(group)
    assert "±" not in sentence(group)


def test_seeds_of_several_runs_are_pooled_once(tmp_path):
    paths = [write_run(tmp_path / str(seed), seed=seed, methods=("kd", "latentbe")).path for seed in (0, 1, 2)]
    again = write_run(tmp_path / "again", seed=1, methods=("kd", "latentbe")).path
    (group,), notes = groups_of([read_run(path) for path in (*paths, again)])
    assert len(group.rows("latentbe")) == 3 and len(group.rows("single teacher")) == 9
    assert len(notes) == 1 and "not counted as a further seed" in notes[0] and str(again) in notes[0]
    assert "n = 3 students, against 9 on labels" in sentence(group) and "same teachers" not in basis(group)
    other = write_run(tmp_path / "other", seed=5, config={"tau": 2.0}).path
    groups, _ = groups_of([read_run(path) for path in (*paths, other)])
    assert [len(group.runs) for group in groups] == [3, 1]


@pytest.mark.parametrize(
    ("methods", "target", "words"),
    [
        (("kd",), "kd", "Over one network on labels, the student (kd) "),
        (("ce", "kd", "hydra"), "hydra", "the student's ensemble (hydra)"),
        (("ce",), None, "no student yet"),
        ((), None, "no student yet"),
    ],
)
def test_runs_without_an_averaged_network(tmp_path, methods, target, words):
    group = group_of(write_run(tmp_path / "a", methods=methods).path)
    assert group.target == target and words in sentence(group)
