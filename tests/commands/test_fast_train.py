"""The main job as a user runs it: the whole of it on a few digits, stopped and resumed, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ensdistill import evaluate, fast_train
from ensdistill.config.configs import read_config
from ensdistill.formats.ours import load_network, read_info
from ensdistill.models import build
from ensdistill.monitor.readings import Reading
from ensdistill.runtime.errors import run_main

SMALL = (
    "--members 2 --train-images 100 --teacher.epochs 4 --teacher.warmup-epochs 1 --student.epochs 4 "
    "--student.warmup-epochs 1 --teacher.batch-size 25 --student.batch-size 25 --precision fp32 --log-every 1"
)


HABIT = ["--network", "networks:small_foreign_network", "--network-args"]


def run(*arguments: object) -> int:
    """The command in this process (FFCV takes seconds to import); what it prints is captured."""
    before = sys.argv
    sys.argv = ["fast_train", *SMALL.split(), *map(str, arguments)]
    try:
        return run_main(fast_train.main)
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of every kind of student, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run(
            "--out", out, "--methods", "kd", "latentbe+tdiv-sdiv", "be", "hydra+tdiv-sdiv", "ce", "--recalibrate-bn"
        )
    assert code == 0
    return out, printed.getvalue()


def test_the_table_has_every_row_and_column(finished):
    _, printed = finished
    for row in (
        "teacher ensemble",
        "single teacher (n = 2)",
        "kd",
        "latentbe+tdiv-sdiv",
        "be",
        "hydra+tdiv-sdiv",
        "ce",
    ):
        assert re.search(rf"^ +{re.escape(row)} +\d+\.\d\d +\d+\.\d{{3}} ", printed, re.M), row
    assert re.search(r"ACC +NLL +ECE +cNLL +cECE +DEE +ACC last +time +cost *$", printed, re.MULTILINE)
    assert re.search(r"images/s +of the floor +data wait +GB +predicted +utilisation +Wh *$", printed, re.MULTILINE)
    assert re.search(r"members +members +ensemble +ensemble +shipped +shipped +own BN +own BN", printed)
    assert "…" not in printed  # nothing is cut off in a pipe
    assert re.search(r"latentbe\+tdiv-sdiv: epoch 4/4 .* \| members 0\.\d+ .* \| their ensemble 0\.\d+", printed)


def test_the_run_folder_holds_what_the_job_did(finished):
    out, printed = finished
    config = read_config(out / "config.json")
    assert config.recipe == "digits" and config.members == 2 and config.recalibrate_bn
    facts = json.loads((out / "environment.json").read_text())
    assert {"python", "cpu", "device", "precision", "commit", "versions"} <= set(facts) and facts["versions"]["torch"]
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]].count("single teacher") == 2
    text = (out / "results.txt").read_text()
    assert text.splitlines()[-2] in printed
    report = (out / "report.html").read_text()
    assert report.startswith("<!doctype html>") and "Not on this page" not in report and "not drawn" not in printed
    assert "WARNING" not in printed or "averaging gap" in printed
    folder = out / "students" / "latentbe+tdiv-sdiv-seed0"
    assert {p.name for p in folder.iterdir() if "tfevents" not in p.name} == {
        "best.safetensors", "best-student.safetensors", "last.safetensors", "last-student.safetensors", "metrics.jsonl",
        "outcome.json", "recalibrated.safetensors",
    }  # fmt: skip
    device = json.loads((folder / "outcome.json").read_text())["device"]
    assert device["samples"] >= 1 and 0 < device["utilisation"] <= 1 and device["throttled"] is None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 17))
    assert {"loss", "loss_kd", "loss_ce", "loss_wd", "acc1", "lr", "images_per_s"} <= set(lines[0])
    assert {"acc", "nll", "members_acc", "ensemble_nll"} <= set(lines[-1])
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("train/loss")) == 16 and "valid/acc" in events.Tags()["scalars"]
    assert not list(out.glob("**/*.tmp")) and not list(out.glob("**/checkpoint.pt"))


def test_the_averaged_student_loads_with_nothing_of_the_training_code(finished):
    path = finished[0] / "students" / "latentbe+tdiv-sdiv-seed0" / "best.safetensors"
    network = build("wrn10x1", num_classes=10, in_channels=1, image_size=8)
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    info = read_info(path)
    assert (info.architecture, info.num_classes, info.recipe, info.method) == (
        "wrn10x1",
        10,
        "digits",
        "latentbe+tdiv-sdiv",
    )
    assert info.temperature and 0 < info.measures["test_acc"] <= 1 and len(info.pixel_mean) == 1
    x = torch.rand(3, 1, 8, 8)
    classifier, _ = load_network(path)
    torch.testing.assert_close(network.eval()((x - info.pixel_mean[0]) / info.pixel_std[0]), classifier(x))


def test_ensembles_ship_all_their_members(finished):
    for method in ("be", "hydra+tdiv-sdiv"):
        assert read_info(finished[0] / "students" / f"{method}-seed0" / "best.safetensors").members == 2


def test_evaluate_measures_the_files_as_the_run_did(finished, monkeypatch, capsys):
    out = finished[0]
    rows = {row["name"]: row["measures"] for row in json.loads((out / "results.json").read_text())["rows"]}
    for method in ("latentbe+tdiv-sdiv", "be"):
        path = out / "students" / f"{method}-seed0" / "best.safetensors"
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "evaluate",
                str(path),
                "--data",
                "digits",
                "--folder",
                str(out.parent / "data"),
                "--json",
                "--precision",
                "fp32",
            ],
        )
        assert run_main(evaluate.main) == 0
        measured = json.loads(capsys.readouterr().out)[0]
        for name in ("acc", "nll", "ece", "cnll", "cece", "temperature"):
            assert measured[name] == pytest.approx(rows[method][name], rel=1e-4, abs=1e-6), (method, name)


def test_what_is_trained_is_reused(finished, capsys):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/metrics.jsonl")}
    assert run("--out", out, "--recalibrate-bn", "--methods", "kd", "latentbe") == 0
    printed = capsys.readouterr().out
    assert printed.count("already trained") == 3 and re.search("^ +latentbe +[0-9]", printed, re.M)
    assert all(p.stat().st_mtime_ns == time_ for p, time_ in before.items())


@pytest.mark.parametrize("begun", [False, True])
def test_a_second_run_in_one_folder_is_refused(tmp_path, capsys, begun):
    if begun:  # refused before anything is said of what the first has left so far
        (tmp_path / "config.json").touch()
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on another-host\n")
        file.flush()
        assert run("--out", tmp_path, "--resume") == 2
    expected = f"{tmp_path}: another run is at work in this folder (process 12 on another-host); wait until it ends"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_what_killed_processes_left_and_nobody_would_write_again_is_deleted(finished, capsys):
    out, _ = finished
    name = f".best.safetensors.{'0' * 16}.tmp"
    left = [
        out / "students" / "ods-seed0" / name,  # of a method that is no longer asked for
        out.parent / "data" / "digits-00000000" / name,
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert run("--out", out, "--recalibrate-bn", "--stage", "teachers") == 0
    assert not any(path.exists() for path in left)


def test_a_checkpoint_that_a_finished_network_left_is_no_unfinished_run(finished, capsys):
    leftover = finished[0] / "teachers" / "0" / "checkpoint.pt"
    leftover.touch()
    assert run("--out", finished[0], "--recalibrate-bn", "--methods", "kd") == 0
    assert not leftover.exists()


def test_many_teachers_leave_the_equivalent_out(finished, capsys, monkeypatch):
    monkeypatch.setattr("ensdistill.run.report.MAX_DEE_TEACHERS", 1)
    assert run("--out", finished[0], "--recalibrate-bn", "--methods", "kd", "--stage", "evaluate") == 0
    assert re.search(r"^ +teacher ensemble( +\d+\.\d+){5} +– ", capsys.readouterr().out, re.MULTILINE)


def test_seeds_are_repeated_and_spread_is_shown(finished, capsys):
    assert run("--out", finished[0], "--recalibrate-bn", "--methods", "kd", "--seeds", "2") == 0
    assert re.search(r" kd \(n = 2\) +\d+\.\d\d .*\n +±\d+\.\d\d +±\d", capsys.readouterr().out)


def test_teachers_of_another_run_serve(finished, tmp_path, capsys):
    assert run("--out", tmp_path / "x", "--teachers", finished[0], "--methods", "kd", "--student.epochs", "2") == 0
    printed = capsys.readouterr().out
    assert (
        "teacher 1/2" not in printed
        and not (tmp_path / "x" / "teachers").exists()
        and re.search("^ +kd +[0-9]", printed, re.M)
    )
    assert run("--out", tmp_path / "y", "--teachers", finished[0], "--members", "3") == 2
    assert "members: got 3, but --teachers gives 2" in capsys.readouterr().err


def test_a_network_of_somebody_else_s(tmp_path, capsys):
    network = ["--network", "networks:foreign_network", "--network-args", '{"width": 6}']
    methods = ["--methods", "latentbe+tdiv-sdiv", "be", "kd+tdiv"]
    assert run("--out", tmp_path / "x", *network, *methods) == 0
    printed = capsys.readouterr().out
    assert re.search("^ +latentbe.tdiv-sdiv +[0-9]", printed, re.MULTILINE)
    path = tmp_path / "x" / "students" / "latentbe+tdiv-sdiv-seed0" / "best.safetensors"
    info = read_info(path)
    assert (info.architecture, info.arguments) == ("networks:foreign_network", {"width": 6})
    plain = networks.foreign_network(6)
    plain.load_state_dict(safetensors.torch.load_file(path))
    assert run("--out", tmp_path / "x", *network, *methods, "--stage", "evaluate") == 0
    assert run("--out", tmp_path / "y", *network, "--plan") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "networks:mixing_network"], "mix"),
        (["--network", "networks:nothing"], "networks:nothing"),
        ([*HABIT, '{"habit": "softmax"}'], "gives probabilities"),
        ([*HABIT, '{"habit": "softmax in evaluation"}'], "gives probabilities"),
        ([*HABIT, '{"habit": "momentum"}'], "BatchNorm2d '2' has momentum=None"),
        ([*HABIT, '{"habit": "values"}'], "cannot be run on tensors without values"),
        (["--network", "networks:foreign_network"], "width"),
        (["--network-args", '{"width": 6}'], "network-args: wrn10x1 takes none"),
        (["--network", "a:b", "--network-args", "{"], "is no JSON"),
        (
            ["--network", "networks:foreign_network", "--network-args", '{"width": 6}', "--methods", "hydra"],
            "split_head",
        ),
    ],
)
def test_networks_that_cannot_serve_are_refused_before_any_training(tmp_path, capsys, arguments, message):
    assert run("--out", tmp_path / "x", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "x" / "teachers").exists()


class ThrottledGpu:
    """A shared GPU at its power cap that has used 36 kJ more whenever it is asked."""

    def __init__(self):
        self.notes, self.joules = ["temperature (Not Supported)"], 0.0

    def read(self):
        self.joules += 36e3
        return Reading(
            device="GPU", utilisation=0.83, limits=("power cap",), other_processes=1, energy_j=self.joules
        )  # fmt: skip

    def close(self):
        pass


def test_a_device_that_spoils_the_measurement_is_a_loud_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ensdistill.run.trainer.source_of", lambda device: ThrottledGpu)
    out = tmp_path / "x"
    few = ["--out", out, "--stage", "teachers", "--teacher.epochs", "2", "--monitor-every", "0.01"]
    assert run(*few) == 0
    training, table = capsys.readouterr().out.split("evaluating on the test images")
    assert training.count("GPU figures that are not known: temperature (Not Supported)") == 1
    for t in ("1/2", "2/2"):
        assert training.count(f"WARNING: teacher {t}: the GPU is throttled (power cap)") == 1
        assert training.count(f"WARNING: teacher {t}: 1 other process on this GPU") == 1
    assert re.search(r"GPU 83 %  throttled", training)
    assert "WARNING: single teacher: the GPU was throttled in 100 % of the samples (power cap 100 %)" in table
    assert "WARNING: single teacher: other processes computed on the GPU in 100 % of the samples" in table
    assert table.count("WARNING") == 2
    energies = []
    for t in range(2):
        path = out / "teachers" / str(t) / "outcome.json"
        outcome = json.loads(path.read_text())
        device = outcome.pop("device")
        del outcome["sha256"]
        assert device["energy_wh"] == pytest.approx(10 * device["samples"]) and device["limits"] == {"power cap": 1.0}
        energies.append(device["energy_wh"])
        path.write_text(json.dumps(outcome))
    for name, energy in (("teacher ensemble", sum(energies)), ("single teacher", sum(energies) / 2)):
        shown = re.search(rf"^ +{name} .* 83% +([\d.,]+) *$", table, re.MULTILINE)
        assert shown and float(shown[1].replace(",", "")) == pytest.approx(energy, rel=0.01)
    assert run(*few) == 0  # with outcomes of before the figures
    printed = capsys.readouterr().out
    assert "WARNING" not in printed and re.search(r"^ +teacher ensemble .* – +– *$", printed, re.MULTILINE)


def test_what_does_not_fit_is_refused_at_once_with_the_largest_batch(tmp_path, capsys, monkeypatch):
    few = ["--methods", "latentbe+tdiv-sdiv"]
    monkeypatch.setattr("ensdistill.run.job.capacity", lambda device: 5_000_000)
    assert run("--out", tmp_path / "x", *few) == 2
    error = capsys.readouterr().err
    found = re.search(
        r"student\.batch-size: 25 images a step .* need about .* the largest batch that fits is (\d+)", error
    )
    assert found and not (tmp_path / "x" / "teachers").exists()
    largest = int(found[1])
    assert 2 <= largest < 25
    stages = ["--stage", "teachers", "--teacher.epochs", "2", "--student.batch-size", str(largest)]
    assert run("--out", tmp_path / "y", *few, *stages) == 0
    monkeypatch.setattr("ensdistill.run.job.capacity", lambda device: 1_000_000)
    assert run("--out", tmp_path / "z", *few) == 2
    assert "teacher.batch-size: 25 images a step of ce" in capsys.readouterr().err


def test_stages(finished, tmp_path, capsys):
    assert run("--out", tmp_path / "s", "--stage", "distill") == 2
    assert "this teacher is not trained yet; run --stage teachers first" in capsys.readouterr().err
    assert run("--out", tmp_path / "s", "--stage", "teachers") == 0
    assert "single teacher" in capsys.readouterr().out and not (tmp_path / "s" / "students").exists()
    assert run("--out", finished[0], "--recalibrate-bn", "--stage", "evaluate", "--methods", "be", "be+ods") == 0
    printed = capsys.readouterr().out
    assert re.search("^ +be +[0-9]", printed, re.M) and "not trained yet, and not in the table: be+ods" in printed


def test_another_backend_trains_the_same_networks_and_says_what_it_leaves_out(finished, tmp_path, capsys):
    """The library computes what the modules compute, in another order: a short run ends within rounding of theirs."""
    out = tmp_path / "digits"
    methods = ("kd", "latentbe+tdiv-sdiv", "hydra+tdiv-sdiv")
    assert run("--out", out, "--methods", *methods, "--backend", "library") == 0
    printed = capsys.readouterr().out
    assert "no kernels for" not in printed
    for name in ("teachers/0", *(f"students/{method}-seed0" for method in methods)):
        ours, theirs = (json.loads((folder / name / "outcome.json").read_text()) for folder in (out, finished[0]))
        assert abs(ours["best_acc"] - theirs["best_acc"]) < 0.05, name
        # the first step is the same to rounding, later ones drift apart as short runs at a high rate do
        first, right = (
            json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0]) for folder in (out, finished[0])
        )
        assert first["loss"] == pytest.approx(right["loss"], rel=1e-4), name


def test_kernels_without_a_gpu_are_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ensdistill.kernels.launch.INTERPRETED", False)
    assert run("--out", tmp_path / "x", "--backend", "triton", "--device", "cpu") == 2
    assert "--backend triton: the kernels need an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.batch-size", "101"], "batch"),
        (["--train-images", "5000"], "train-images: got 5000, but there are"),
        (["--network", "wrn28x9999"], "network: 2 of wrn28x9999, of "),
        (["--pad", "8"], "pad: got 8, expected less than the side of the images, 8"),
        (["--network", "wrn11x1"], "network 'wrn11x1': no such network"),
        (["--device", "cuda:9"], "--device cuda:9: this machine has"),
        (["--crop", "random-resized"], "image-size: not given"),
        (["--source", "cifar10"], "cifar-10-binary.tar.gz"),
        (["--teachers", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2_before_any_training(tmp_path, capsys, arguments, message):
    assert run("--out", tmp_path / "x", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "x" / "teachers").exists()


def test_the_record_of_a_finished_training_is_read_before_any_other(finished, tmp_path, capsys):
    out = tmp_path / "x"
    shutil.copytree(finished[0], out)
    for content in ("[]", "5", '{"seconds": "long"}', "[" * 100_000, "{half"):
        (out / "teachers" / "1" / "outcome.json").write_text(content)
        assert run("--out", out, "--recalibrate-bn", "--methods", "kd") == 2
        error = capsys.readouterr().err
        assert "teachers/1/outcome.json: not the end of a training (" in error and error.count("\n") == 1, content
    assert (out / "students" / "kd-seed0" / "outcome.json").exists()


@pytest.mark.parametrize(
    ("splits", "outs"),
    [
        ((".",), ("data/run", "data/a/b/run", "link/runs/x", "run1")),
        (("train", "test"), ("data/train/run", "link/test/x")),
    ],
)
def test_a_run_does_not_write_among_classes(tmp_path, capsys, splits, outs):
    for name in [f"{split}/{name}" for split in splits for name in "ab"]:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    before = sorted(tmp_path.glob("**/*"))
    for out in outs:  # the data go to data/ beside the last
        assert run("--data", tmp_path / "data", "--out", tmp_path / out) == 2
        assert re.search(r"--out .*: would write .* into the folder of the images, .*/data", capsys.readouterr().err)
    assert sorted(tmp_path.glob("**/*")) == before


@pytest.mark.parametrize("more", [[], ["--plan"]])
@pytest.mark.parametrize("option", ["--student.batch-size", "--teacher.batch-size"])
def test_one_image_a_step_has_no_variance_on_a_map_of_one_pixel(tmp_path, capsys, option, more):
    assert run("--out", tmp_path / "x", *HABIT, '{"habit": "none"}', option, "1", *more) == 2
    error = capsys.readouterr().err
    assert f"{option[2:]}: got 1, but images of 8x8 pixels leave a norm" in error and error.count("\n") == 1


def test_a_disk_without_room_is_refused_before_any_training(finished, capsys, monkeypatch):
    tmp_path = finished[0].parent  # where the data are written already
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ensdistill.run.preflight.shutil.disk_usage", lambda path: usage._replace(free=1_000_000))
    assert run("--out", tmp_path / "x") == 2
    assert re.search(r"x: 1 MB are free on this disk, the run needs [1-9]\d* MB; free some", capsys.readouterr().err)
    assert not (tmp_path / "x" / "teachers").exists()


def test_a_folder_of_another_configuration_is_refused(finished, capsys):
    assert run("--out", finished[0], "--tau", "2") == 2
    assert "holds a run of another configuration" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_data_only(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    out = tmp_path / "runs" / "x"
    labels, place = np.arange(200) % 4, ["--data", tmp_path / "in", "--out", out]
    (tmp_path / "in").mkdir()

    def write(images, labels):
        np.save(tmp_path / "in" / "images.npy", images)
        np.save(tmp_path / "in" / "labels.npy", labels)

    write(images, labels)
    assert run(*place, "--stage", "teachers") == 0
    changes = (
        (images, (labels + 1) % 4, "as many images of the same classes"),
        (images[::-1], labels[::-1], "as many images of the same classes"),
        (images[:160], labels[:160], "train images there"),
        (images, labels % 3, "4 classes there, 3 here"),
    )
    for stage, change in zip(("all", "distill", "evaluate", "teachers"), changes, strict=True):
        write(*change[:2])
        capsys.readouterr()
        assert run(*place, "--stage", stage, "--resume") == 2
        error = capsys.readouterr().err
        assert "x: holds a run on other data (" in error and change[2] in error and error.count("\n") == 1
    assert len(list((tmp_path / "runs" / "data").iterdir())) == 1  # refused before anything was written
    write(images, labels)
    assert run(*place, "--stage", "evaluate") == 0 and "cannot be checked" not in capsys.readouterr().out
    kept = (out / "config.json").read_text()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    np.save(tmp_path / "other" / "labels.npy", (labels + 1) % 4)
    assert run("--data", tmp_path / "other", *place[2:], "--stage", "evaluate") == 2
    assert "x: holds a run on other data (" in capsys.readouterr().err
    assert (out / "config.json").read_text() == kept  # a refused command leaves no trace
    assert run("--data", tmp_path / "link", *place[2:], "--stage", "evaluate") == 0  # the same at another place
    assert read_config(out / "config.json").data == tmp_path / "link"
    (out / "data.json").unlink()  # of a run that kept no key
    assert run(*place, "--stage", "evaluate") == 2
    assert "holds a run of another configuration (data is " in capsys.readouterr().err


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--out", tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_plan_writes_nothing(tmp_path, capsys):
    assert run("--out", tmp_path / "x", "--plan", "--seeds", "3") == 0
    printed = capsys.readouterr().out
    for text in ("2 teachers", "latentbe+tdiv-sdiv", "total", "memory", "disk", "floor", "predicted"):
        assert text in printed
    assert not list(tmp_path.iterdir())


def test_the_plan_refuses_probabilities_as_a_run_does(tmp_path, capsys):
    for more in ([], ["--plan"]):
        assert run("--out", tmp_path / "x", *HABIT, '{"habit": "softmax in evaluation"}', *more) == 2
        assert "probabilities" in capsys.readouterr().err


def test_under_torchrun_one_process_prints_the_plan(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run("--plan") == 0 and not capsys.readouterr().out


def test_a_student_that_needs_no_teachers_has_them_beside_it(finished):
    teacher, student = (
        json.loads((finished[0] / folder / "outcome.json").read_text())["predicted_bytes"]
        for folder in ("teachers/0", "students/ce-seed0")
    )
    weights = sum(p.numel() for p in build("wrn10x1", num_classes=10, in_channels=1, image_size=8).parameters())
    assert student - teacher >= 2 * 4 * weights


def test_a_plan_without_the_data_takes_the_published_size(capsys):
    sys_arguments = ["--recipe", "cifar100-wrn28x4", "--network", "wrn10x1", "--plan"]
    before, sys.argv = sys.argv, ["fast_train", *sys_arguments]
    try:
        assert run_main(fast_train.main) == 0
    finally:
        sys.argv = before
    assert "cifar100: not at hand, planned with its published size" in capsys.readouterr().out


def test_sigterm_writes_a_checkpoint_and_resume_ends_where_an_unbroken_run_does(finished, tmp_path):
    """In a process of its own, stopped in the middle of a student; the teachers are there already."""
    arguments = ["--methods", "latentbe+tdiv-sdiv", "--student.epochs", "40"]
    folders = [tmp_path / name / "digits" for name in ("unbroken", "broken")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "teachers").symlink_to(finished[0] / "teachers")
        (folder.parent / "data").symlink_to(finished[0].parent / "data")
    unbroken, out = folders
    assert run("--out", unbroken, *arguments) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "ensdistill.fast_train", *SMALL.split(), *arguments, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = out / "students" / "latentbe+tdiv-sdiv-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "stopped by SIGTERM; everything up to the last step is kept: go on with --resume" in printed
    assert "Traceback" not in printed and log.with_name("checkpoint.pt").exists()
    assert run("--out", out, *arguments) == 2  # not without --resume
    assert run("--out", out, *arguments, "--resume") == 0
    ours = safetensors.torch.load_file(log.with_name("last.safetensors"))
    theirs = safetensors.torch.load_file(unbroken / "students" / "latentbe+tdiv-sdiv-seed0" / "last.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
