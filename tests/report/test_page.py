"""The page: self-contained, small, safe with anybody's class names, and sane for every kind of run."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest
from small_run import write_run

from ensdistill.report.__main__ import main
from ensdistill.report.folder import read_run
from ensdistill.report.group import groups_of
from ensdistill.report.page import make_page
from ensdistill.report.prediction_figures import corruptions
from ensdistill.report.svg import Canvas, Marks
from ensdistill.runtime.errors import UserError, run_main

HOSTILE = ("<script>alert(1)</script>", "$x^2$", "a\x07b\nc", '"><img src=x>', "Ω" * 80, "{{ 7 * 7 }}", "&amp;", "8")


def page_of(*paths) -> str:
    page, _ = make_page(paths, paths[0] / "report.html")
    check(page)
    return page


def check(page: str) -> None:
    """What holds of every page."""
    assert len(page.encode()) < 3_000_000
    assert "<script" not in page and "{{" not in re.sub(r"\{\{ 7 \* 7 \}\}", "", page)
    links = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) or link.endswith("report.html") for link in links)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)
    ids = Counter(re.findall(r'\bid="([^"]*)"', page))
    assert [name for name, count in ids.items() if count > 1] == []
    for name in re.findall(r'(?:href="#|url\(#)([^")]+)', page) + re.findall(r'aria-labelledby="(\S+) ', page):
        assert name in ids, name
    assert not re.search(r"#0[0-9a-b]0d0c", page)  # every mark became a variable of the style
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title") and root[0].text and root[1].tag.endswith("desc") and root[1].text
    assert all(re.search(r'\balt="[^"]+"', image) for image in re.findall(r"<img [^>]*>", page))


def test_a_whole_run(tmp_path):
    run = write_run(tmp_path / "a", methods=("ce", "kd", "latentbe+tdiv-sdiv", "hydra+ods"), seeds=2)
    page = page_of(run.path)
    for name in ("curves", "members", "reliability", "cost", "diversity", "classes", "confusions", "shown", "device"):
        assert f'<section id="{name}">' in page and f'href="#{name}"' in page, name
    assert "Not on this page" not in page
    acc = 100 * sum(measured.acc for measured in run.measures["latentbe+tdiv-sdiv"]) / 2
    assert f'<span class="acc">{acc:.2f}<small>' in page and "a table" in page and "versions.torch" in page


def test_class_names_are_text(tmp_path):
    run = write_run(tmp_path / "a", K=8, class_names=HOSTILE, absent=2)
    page = page_of(run.path)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7 * 7 }}" in page and "$x^2$" in page
    assert "One class has no test image." in page and "\x07" not in page


def test_a_thousand_classes_and_large_pictures(tmp_path):
    methods = ("kd+ods", "kd+gaussian", "latentbe+tdiv-sdiv")
    page = page_of(write_run(tmp_path / "a", methods=methods, K=1000, N=300, E=2, side=224).path)
    assert "the 20 of 1,000 classes" in page and "classes have no test image" in page
    assert len(page) < 1_500_000 and "data:image/jpeg" in page


@pytest.mark.parametrize("methods", [("kd",), (), ("latentbe", "ce+gaussian")])
def test_runs_of_other_kinds(tmp_path, methods):
    page = page_of(write_run(tmp_path / "a", methods=methods, E=2).path)
    assert ('id="shown"' in page) == any("+" in method for method in methods)
    assert ('id="members"' in page) == any(method.startswith(("be", "latentbe")) for method in methods)


def test_one_teacher_and_one_image(tmp_path):
    page_of(write_run(tmp_path / "a", methods=("kd",), E=1, N=1).path)


def test_a_run_that_kept_nothing(tmp_path):
    run = write_run(tmp_path / "a")
    for name in ("predictions.npz", "shown.npz", "environment.json", "data.json"):
        (run.path / name).unlink()
    for log in run.path.glob("*/*/metrics.jsonl"):
        log.unlink()
    results = json.loads((run.path / "results.json").read_text())
    for name in ("tables", "inference"):
        del results[name]
    (run.path / "results.json").write_text(json.dumps(results))
    (run.path / "results.txt").write_text("the <old> table")
    page = page_of(run.path)
    assert "Not on this page" in page and "fast_train … --stage evaluate" in page and "the &lt;old&gt; table" in page
    assert 'id="curves"' not in page and 'id="reliability"' not in page


def test_away_is_drawn_where_it_was_measured(tmp_path):
    run = write_run(tmp_path / "a")
    table = [[0.9, 0.8, 0.7], [0.8, 0.7, 0.6]]
    networks = {name: {"accuracy": table, "nll": table, "ece": None} for name in ("kd", "teacher ensemble")}
    ood = {"other": {"kd": {"entropy": {"auroc": 0.9, "aupr": 0.8, "fpr95": "nan"}}}}
    away = {"corruptions": {"names": ["fog", "<b>"], "severities": [1, 2, 3], "networks": networks}, "ood": ood}
    (run.path / "away.json").write_text(json.dumps(away))
    page = page_of(run.path)
    assert 'id="corruptions"' in page and "kd: 85 to 65" in page and "0.900" in page and "&lt;b&gt;" in page
    for damaged in ("[]", '{"corruptions": {"networks": {"kd": 3}}, "ood": [1]}', "{"):
        (run.path / "away.json").write_text(damaged)
        group = groups_of([read_run(run.path)])[0][0]
        assert corruptions(Canvas([group])) is None


def test_several_runs_side_by_side(tmp_path):
    seeds = [write_run(tmp_path / f"seed{seed}", seed=seed).path for seed in (0, 1)]
    other = write_run(tmp_path / "other <tau>", seed=0, config={"tau": 2.0}).path
    (other / "report.html").touch()
    page, notes = make_page([*seeds, other], tmp_path / "comparison.html")
    check(page)
    assert notes == [] and "2 configurations" in page and "<td>2.0</td>" in page and "other &lt;tau&gt;" in page
    assert 'href="other &lt;tau&gt;/report.html"' in page and page.count("<h1>") == 2
    pooled = page_of(*seeds)  # one configuration: one report
    assert (
        "n = 2 students, against 6 on labels and 2 of kd" in pooled.replace("\u00a0", " ")
        and "seed1: a table" in pooled
    )
    with pytest.raises(UserError, match="given twice"):
        make_page([seeds[0], seeds[0]], tmp_path / "comparison.html")


def test_networks_have_marks_of_their_own():
    students = [f"{student}{shown}" for student in ("ce", "kd", "latentbe") for shown in ("", "+gaussian", "+ods")]
    names = ["teacher ensemble", "single teacher", *students]
    marks = Marks(names, "latentbe")
    assert marks.variable("latentbe") == "c1" and marks.variable("kd") == "c2"
    assert len({(marks.variable(name), marks.symbol(name)) for name in names}) == len(names)


def test_the_command(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        return run_main(main), *capsys.readouterr()

    assert command(run.path) == (0, f"{run.path / 'report.html'}\n", "")
    assert (run.path / "report.html").read_text().startswith("<!doctype html>")
    other = write_run(tmp_path / "b", config={"tau": 1.0})
    assert command(run.path, other.path) == (0, "comparison.html\n", "")
    for arguments, words in (
        ((), "no run given"),
        ((tmp_path / "nowhere",), "no results of a run"),
        ((run.path, run.path), "given twice"),
        ((run.path, "--to", tmp_path), "a folder; give the name of the file"),
        ((run.path, "--too", "x"), "--to"),
    ):
        code, printed, error = command(*arguments)
        assert code == 2 and printed == "" and words in error and error.count("\n") == 1
    (run.path / "predictions.npz").unlink()
    code, _, error = command(run.path)
    assert code == 0 and error.startswith("left out: predictions.npz")
