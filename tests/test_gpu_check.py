"""`make gpu-check` without a GPU: its runner, its tables, and those of its parts that a CPU can run, made small."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import check_parts, gpu_check, gpu_facts  # noqa: E402
from bench.check_parts import LIMITS, OPTIONAL, Setting, make_part, selected_tests  # noqa: E402
from bench.check_results import (  # noqa: E402
    benchmark_rows,
    races_headline,
    read_csv,
    read_table,
    times_headline,
    training_headline,
    training_rows,
    write_table,
)
from bench.check_runner import Command, Found, Part, run_part  # noqa: E402
from ensdistill import tune, tuner  # noqa: E402
from ensdistill.conv_key import Key  # noqa: E402
from ensdistill.errors import UserError, run_main  # noqa: E402
from ensdistill.gpu_readings import GpuNames  # noqa: E402
from ensdistill.measuring import Outcome  # noqa: E402
from ensdistill.measuring_process import MeasuringProcess  # noqa: E402
from ensdistill.roofline import DEVICES  # noqa: E402
from ensdistill.tuner import Tuner  # noqa: E402
from ensdistill.tuning import Candidate, Measured, TuningTable  # noqa: E402

IDENTITY = {
    "device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0+cu130", "triton": "3.6.0",
    "python": "3.12.3", "commit": "abc",
}  # fmt: skip


FOUND = Found("found")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started here is not part of the `make test ARGS=…` or of the parallel run that starts it."""
    for name in ("ARGS", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


def python(code: str, *arguments: object) -> Command:
    return Command((sys.executable, "-c", code, *map(str, arguments)))


def part(*commands: Command, limit: float = 60.0, found: Found | ValueError = FOUND, name: str = "one") -> Part:
    def collect() -> Found:
        if isinstance(found, ValueError):
            raise found
        return found

    return Part(name=name, about="about", limit=limit, commands=lambda: iter(commands), collect=collect)


def make_setting(tmp_path: Path, **changes: Any) -> Setting:
    fields: dict[str, Any] = {"root": ROOT, "out": tmp_path / "out", "work": tmp_path / "work", "identity": IDENTITY}
    fields |= {"capability": 90, "networks": ("wrn10x1",), "providers": ("modules", "library")}
    return Setting(**fields | changes)


def pytest_report(folder: Path, source: str, *options: str) -> tuple[str, Path]:
    """(status, log) of pytest as a part on a file of its own."""
    file, log = folder / "test_some.py", folder / "log"
    file.write_text(source)
    (folder / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    command = Command((sys.executable, "-m", "pytest", file.name, "-v", "-p", "no:cacheprovider", *options))
    return run_part(part(command, limit=120), log, cwd=folder).status, log


# ---- the runner ----------------------------------------------------------------------------------------------------


def test_commands_run_in_turn_and_a_failing_one_stops_none(tmp_path: Path) -> None:
    commands = [python("print('first')"), python("import sys; print('second'); sys.exit(3)"), python("print('third')")]
    outcome = run_part(part(*commands), tmp_path / "logs" / "log", cwd=tmp_path)
    assert (outcome.status, outcome.headline) == ("failed", "found")
    log = (tmp_path / "logs" / "log").read_text()
    assert log.index("first") < log.index("[exit code 0]") < log.index("[exit code 3]") < log.index("third")
    assert outcome.lines[-1] == "[exit code 0]"  # the end of the log, for there is nothing better to show


def test_some_exit_codes_are_no_failure(tmp_path: Path) -> None:
    command = Command((sys.executable, "-c", "import sys; sys.exit(5)"), good=frozenset({0, 5}))
    assert run_part(part(command), tmp_path / "log", cwd=tmp_path).status == "ok"
    assert run_part(part(Command(("/no/such/program",))), tmp_path / "log", cwd=tmp_path).status == "failed"


def test_nothing_to_collect_is_a_failure(tmp_path: Path) -> None:
    outcome = run_part(part(python("pass"), found=ValueError("nothing here")), tmp_path / "log", cwd=tmp_path)
    assert (outcome.status, outcome.headline) == ("failed", "nothing here")


def test_a_command_is_asked_for_when_the_one_before_has_ended(tmp_path: Path) -> None:
    def commands():
        yield python("open('made', 'w').write('by the first')")
        yield python("import sys; print(sys.argv[1])", (tmp_path / "made").read_text())

    run_part(
        Part(name="one", about="", limit=60, commands=commands, collect=lambda: Found("")),
        tmp_path / "log",
        cwd=tmp_path,
    )
    assert "\nby the first\n" in (tmp_path / "log").read_text()


def test_the_limit_interrupts_and_what_was_written_counts(tmp_path: Path) -> None:
    code = (
        "import time\ntry:\n    print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    open('report', 'w').write('whole')"
    )
    start = time.monotonic()
    outcome = run_part(part(python(code), python("open('later', 'w')"), limit=3), tmp_path / "log", cwd=tmp_path)
    assert outcome.status == "cut off" and outcome.headline == "found"
    assert time.monotonic() - start < 10
    assert (tmp_path / "report").read_text() == "whole" and not (tmp_path / "later").exists()


def test_the_limit_interrupts_what_runs_in_the_background_too(tmp_path: Path) -> None:
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open('report', 'w').write('whole')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does with a job that it starts by &
    try:
        run_part(part(python(code), limit=3), tmp_path / "log", cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "report").read_text() == "whole"


def test_the_limit_kills_the_whole_group(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import os, signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(os.getpid(), subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True)\ntime.sleep(60)"
    )
    outcome = run_part(part(python(code, child), limit=2), tmp_path / "log", cwd=tmp_path)
    assert outcome.status == "cut off" and outcome.seconds < 10
    line = next(line for line in (tmp_path / "log").read_text().splitlines() if line.replace(" ", "").isdigit())
    for pid in map(int, line.split()):
        assert not is_running(pid), pid


def is_running(pid: int) -> bool:
    """Whether it still is after 5 s: who was killed needs a moment."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        if state == "Z":  # it has ended, and nobody asked how
            return False
        time.sleep(0.05)
    return True


def test_children_that_outlive_their_process_are_ended(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)"
    )
    assert run_part(part(python(code)), tmp_path / "log", cwd=tmp_path).status == "ok"
    pid = next(line for line in (tmp_path / "log").read_text().splitlines() if line.isdigit())
    assert not is_running(int(pid))


# ---- a whole check -------------------------------------------------------------------------------------------------


def run_check(parts: list[Part], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    facts = IDENTITY | {"power_limit_w": 700.0, "sm_max_mhz": 1980, "other_processes": 0, "clock_limits": ""}
    before = [gpu_check.environment_outcome(facts, 3.0, 25.0)]
    code = gpu_check.check(parts, before, out, IDENTITY, Console(highlight=False, width=160))
    return code, capsys.readouterr().out


def test_a_check_writes_each_part_as_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []

    def commands():
        seen.append([row["part"] for row in read_table(tmp_path / "summary.json")])
        yield python("pass")

    last = Part(name="last", about="", limit=60, commands=commands, collect=lambda: Found("9 [of] 9"))
    shown = Found("1 failed", ("test_it[a]: 2 != 3",))
    parts = [
        part(python("exit(1)"), found=shown),
        part(python("import time; time.sleep(60)"), limit=1, name="two"),
        last,
    ]
    code, out = run_check(parts, tmp_path, capsys)
    assert code == 1
    assert seen == [["environment", "one", "two"]]
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["status"] for row in rows] == ["ok", "failed", "cut off", "ok"]
    assert list(rows[0])[: len(IDENTITY)] == list(IDENTITY) and rows[3]["headline"] == "9 [of] 9"
    assert float(rows[2]["seconds"]) < float(rows[2]["limit"]) + 5
    assert "[2/4] one: about; at most 60 s" in out and "| test_it[a]: 2 != 3" in out
    table = out[out.rindex("part ") :]
    assert "NVIDIA H100 80GB HBM3: driver 580.1, CUDA 13.0, torch 2.11.0+cu130, 700 W, 1980 MHz" in table
    assert "9 [of] 9" in table and "cut off" in table
    assert (tmp_path / "logs" / "two.log").exists()


def test_a_check_in_which_all_is_well_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check([part(python("pass"))], tmp_path, capsys)[0] == 0


def test_ctrl_c_ends_the_part_and_prints_what_there_is(tmp_path: Path) -> None:
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom rich.console import Console\n"
        "from bench import gpu_check\nfrom bench.check_runner import *\nfrom ensdistill.errors import run_main\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "def make(name, code):\n"
        "    command = Command((sys.executable, '-c', code))\n"
        "    commands = lambda: iter([command])\n"
        "    return Part(name=name, about='', limit=60, commands=commands, collect=lambda: Found(name))\n"
        "sleep = 'import os, time; os.symlink(str(os.getpid()), \\'begun\\'); time.sleep(60)'\n"
        "out = Path(sys.argv[2])\ngpu_check.ROOT = out\n"
        "parts = [make('quick', 'pass'), make('slow', sleep)]\n"
        "sys.exit(run_main(lambda: gpu_check.check(parts, [], out, {'device': 'x'}, Console())))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").is_symlink():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "quick" in out[out.rindex("part ") :]
    assert [row["part"] for row in read_table(tmp_path / "summary.json")] == ["quick"]
    assert not is_running(int(os.readlink(tmp_path / "begun")))


def test_without_a_gpu_it_says_so_and_ends_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--parts", "tests"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: gpu-check: PyTorch {torch.__version__} sees no NVIDIA GPU")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tets"], "--parts: there is no 'tets' (did you mean 'tests'?)"),
        (["--parts", ","], "--parts: got ',', expected names separated by commas"),
        (["--limits", "tests=0"], "--limits tests=0: expected PART=SECONDS, such as tests=120"),
        (["--limits", "tests"], "--limits tests: expected PART=SECONDS"),
        (["--limits", "tests=inf"], "--limits tests=inf: expected PART=SECONDS"),
        (["--limits", "benches=3"], "--limits: there is no 'benches'"),
        (["--networks", ""], "--networks: got ''"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "find_facts", lambda limit: pytest.fail("it looked for a GPU"))
    assert run_main(lambda: gpu_check.main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1


def test_the_default_parts_fit_into_nine_minutes() -> None:
    defaults = gpu_check.Arguments().parts.split(",")
    assert defaults == [name for name in LIMITS if name not in OPTIONAL]
    assert sum(LIMITS[name] for name in defaults) <= 540
    assert gpu_check.read_limits("tests=120, run=90.5") == LIMITS | {"tests": 120.0, "run": 90.5}


def test_the_command_puts_everything_where_it_was_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with facts that are made up, and one part that is a tiny process."""
    facts = IDENTITY | {"capability": 90, "power_limit_w": None, "other_processes": 2, "clock_limits": "power cap"}
    settings: list[Setting] = []

    def tiny(name: str, setting: Setting, limit: float) -> Part:
        settings.append(setting)
        return part(python("pass"), limit=limit, name=name)

    monkeypatch.setattr(gpu_check, "find_facts", lambda limit: (dict(facts), 1.0))
    monkeypatch.setattr(gpu_check, "make_part", tiny)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--parts", "environment,run,aot", "--out", str(tmp_path), "--commit", "deadbeef", "--networks", "a,b"]
    assert gpu_check.main([*arguments, "--limits", "run=7"]) == 0
    assert "TRITON_INTERPRET" not in os.environ
    assert settings[0].networks == ("a", "b") and settings[0].out == tmp_path
    rows = read_table(tmp_path / "summary.json")
    assert [(row["part"], row["limit"]) for row in rows] == [
        ("environment", LIMITS["environment"]), ("run", 7.0), ("aot", LIMITS["aot"]),
    ]  # fmt: skip
    assert {row["commit"] for row in rows} == {"deadbeef"}
    (environment,) = read_table(tmp_path / "environment.json")
    assert environment["capability"] == 90 and environment["power_limit_w"] is None
    assert "2 other processes on it, clocks held down: power cap" in capsys.readouterr().out
    assert gpu_check.slug(facts["device"]) == "nvidia-h100-80gb-hbm3"


def test_make_passes_the_variables_on() -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}

    def command(*variables: str) -> list[str]:
        done = subprocess.run(
            ["make", "-n", "gpu-check", *variables], cwd=ROOT, env=inherited, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1].split()

    bare = [".venv/bin/python", "-m", "bench.gpu_check"]
    names = ["PARTS", "NETWORKS", "PROVIDERS", "LIMITS", "OUT", "DATA", "COMMIT"]
    assert command(*(f"{name}=" for name in names)) == bare
    options = [word for name in names for word in (f"--{name.lower()}", f'"{name}-given"')]
    assert command(*(f"{name}={name}-given" for name in names)) == bare + options


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_table_keeps_rows_of_the_same_commit_alone(tmp_path: Path) -> None:
    write_table(tmp_path, "some", [{"name": "a", "us": 1}, {"name": "b", "us": 2}], IDENTITY, ["name"])
    write_table(tmp_path, "some", [{"name": "b", "us": 3, "more": "x, y"}], IDENTITY, ["name"])
    rows = read_csv(tmp_path / "some.csv")
    assert [(row["name"], row["us"], row["more"]) for row in rows] == [("a", "1", ""), ("b", "3", "x, y")]
    assert list(rows[0]) == [*IDENTITY, "name", "us", "more"]
    assert read_table(tmp_path / "some.json")[0] == {**IDENTITY, "name": "a", "us": 1}
    write_table(tmp_path, "some", [{"name": "c", "us": 4}], IDENTITY | {"commit": "def"}, ["name"])
    assert [row["name"] for row in read_csv(tmp_path / "some.csv")] == ["c"]
    (tmp_path / "some.json").write_text("{")
    write_table(tmp_path, "some", [{"name": "d", "us": 4}], IDENTITY, ["name"])
    assert [row["name"] for row in read_csv(tmp_path / "some.csv")] == ["d"]


def test_half_a_csv_row_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "half.csv").write_text("a,b,c\n1,2,3\n4,5")
    assert read_csv(tmp_path / "half.csv") == [{"a": "1", "b": "2", "c": "3"}]
    assert read_csv(tmp_path / "none.csv") == []


# ---- pytest and pytest-benchmark -----------------------------------------------------------------------------------

BENCHMARKS = """
import os, signal, time, pytest

@pytest.mark.parametrize("provider", ["triton", "eager"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 4)], ids=str)
def test_pass(benchmark, shape, provider):
    benchmark.extra_info["GB/s"] = 5.0
    benchmark.pedantic(time.sleep, args=(1e-3 if provider == "triton" else 3e-3,), rounds=5)

def test_last(benchmark):
    benchmark.pedantic({last}, rounds=1)
"""


def test_rows_of_benchmarks(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    status, _ = pytest_report(tmp_path, BENCHMARKS.replace("{last}", "time.time"), f"--benchmark-json={report}")
    assert status == "ok"
    rows = benchmark_rows(report)
    assert len(rows) == 5
    row = rows[0]
    assert (row["file"], row["benchmark"], row["provider"]) == ("test_some.py", "test_pass", "triton")
    assert row["problem"] in ("shape (1, 2)", "shape [1, 2]") and (row["rounds"], row["calls_a_round"]) == (5, 1)
    assert 1e3 <= row["min_us"] <= row["q1_us"] <= row["us"] <= row["q3_us"] <= row["max_us"]
    assert row["GB/s"] == 5.0
    assert races_headline(rows) == "5 timings; triton is the fastest in 2 of 2 problems"
    assert times_headline([row | {"network": "net", "us": 1234.5, "roofline": 0.5}]) == (
        "net test_pass: triton 1.23 ms (50% of the floor)"
    )
    assert benchmark_rows(tmp_path / "none.json") == []


def test_benchmarks_that_are_cut_off_keep_what_was_timed(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    source = BENCHMARKS.replace("{last}", "os.kill, args=(os.getpid(), signal.SIGINT)")  # as at the limit
    status, _ = pytest_report(tmp_path, source, f"--benchmark-json={report}")
    assert status == "failed"
    assert len(benchmark_rows(report)) == 4


TESTS = """
import os, signal, time, pytest

def test_passes(): pass

@pytest.mark.parametrize("x", ["a b", "c"])
def test_fails(x): assert x == "c", "more\\nlines"

@pytest.mark.skip(reason="no such device")
def test_skipped(): pass

@pytest.fixture
def broken(): raise ValueError("broken")

def test_error(broken): pass
"""


def test_rows_of_tests_by_junit_and_by_the_log(tmp_path: Path) -> None:
    junit = tmp_path / "report.xml"
    status, log = pytest_report(tmp_path, TESTS, f"--junitxml={junit}")
    assert status == "failed"
    rows = check_parts.test_rows(junit, log)
    found = {row["test"]: (row["outcome"], row["message"]) for row in rows}
    assert found["test_some::test_passes"] == ("passed", "")
    assert (
        found["test_some::test_fails[a b]"][0] == "failed"
        and "AssertionError" in found["test_some::test_fails[a b]"][1]
    )
    assert found["test_some::test_skipped"] == ("skipped", "no such device")
    assert found["test_some::test_error"][0] == "error"
    assert check_parts.tests_headline(rows) == "2 passed, 1 failed, 1 error, 1 skipped"
    by_log = check_parts.test_rows(tmp_path / "none.xml", log)
    assert {row["test"]: row["outcome"] for row in by_log} == {row["test"]: row["outcome"] for row in rows}


def test_tests_that_are_cut_off_keep_what_was_tested(tmp_path: Path) -> None:
    junit = tmp_path / "report.xml"

    def headline(signal_: str) -> str:
        last = f"\ndef test_last():\n    os.kill(os.getpid(), signal.{signal_})\n    time.sleep(100)\n"
        status, log = pytest_report(tmp_path, TESTS + last, f"--junitxml={junit}")
        assert status == "failed" and "test_last" in log.read_text()
        return check_parts.tests_headline(check_parts.test_rows(junit, log))

    assert headline("SIGINT") == "2 passed, 1 failed, 1 error, 1 skipped"
    junit.unlink()
    assert headline("SIGKILL") == "2 passed, 1 failed, 1 error, 1 skipped"  # a kernel that never ends: by the log
    assert not junit.exists()


def test_the_tests_part_shows_what_failed(tmp_path: Path) -> None:
    setting = make_setting(tmp_path)
    logs = setting.out / "logs"
    logs.mkdir(parents=True)
    pytest_report(tmp_path, TESTS, f"--junitxml={logs / 'tests.xml'}")
    found = make_part("tests", setting, 60).collect()
    assert found.headline == "2 passed, 1 failed, 1 error, 1 skipped"
    assert [line.split(": ")[0] for line in found.lines] == ["test_some::test_fails[a b]", "test_some::test_error"]
    assert [row["outcome"] for row in read_csv(setting.out / "tests.csv")].count("passed") == 2


def test_no_test_of_the_interpreter_is_selected() -> None:
    """Triton 3.6's interpreter does not work with the NumPy of newer machines."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *selected_tests("tests", ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0, done.stdout[-2000:]
    assert len(tests) > 100 and len(set(tests)) == len(tests)
    folders = {line.split("::")[0] for line in tests}
    assert {"tests/gpu/test_networks_on_gpu.py", "tests/kernels/test_pool.py", "tests/test_tune.py"} <= folders
    assert "tests/kernels/test_interpreter.py" not in folders and "tests/gpu/test_speed.py" not in folders
    assert not [line for line in tests if "rivals" in line and "[compiled" in line]
    assert tests[0].startswith(("tests/gpu/", "tests/kernels/"))
    everything = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(everything, cwd=ROOT, capture_output=True, text=True, timeout=170)
    left_out = {line for line in done.stdout.splitlines() if "::" in line} - set(tests)
    assert left_out and all(line.startswith((check_parts._SPEED_TESTS, "tests/test_rivals.py")) for line in left_out)
    for path in (check_parts._SPEED_TESTS, check_parts._INTERPRETER_TESTS):
        assert (ROOT / path).exists()


# ---- the parts -----------------------------------------------------------------------------------------------------


def test_the_benchmarks_of_networks_on_a_cpu(tmp_path: Path) -> None:
    setting = make_setting(tmp_path, providers=("modules",), batch_size=2, image_size=8)
    outcome = run_part(make_part("networks", setting, 150), tmp_path / "log", cwd=ROOT)
    assert outcome.status == "ok", (tmp_path / "log").read_text()[-2000:]
    assert outcome.headline.startswith("wrn10x1 teachers: modules ")
    rows = read_csv(setting.out / "networks.csv")
    assert {row["benchmark"] for row in rows} == {"bench_teachers", "bench_perturbation", "bench_student"}
    assert {(row["provider"], row["network"], row["commit"]) for row in rows} == {("modules", "wrn10x1", "abc")}
    assert all(float(row["q1_us"]) <= float(row["us"]) <= float(row["q3_us"]) for row in rows)


def test_operations_are_benchmarked_by_file() -> None:
    files = [file.name for file in check_parts.kernel_benchmarks(ROOT)]
    assert {"bench_pool.py", "bench_augment.py", "bench_distil.py"} <= set(files)
    assert not {"bench_step.py", "bench_networks.py"} & set(files)
    assert files[-1].startswith("bench_member_conv") and not files[0].startswith("bench_member_conv")


def test_a_real_run_on_a_cpu(tmp_path: Path) -> None:
    setting = make_setting(
        tmp_path, images=600, image_size=8, classes=3, batch_size=4, run_seconds=0.1, providers=("auto",)
    )  # 486 images are left to train on
    outcome = run_part(make_part("run", setting, 170), tmp_path / "log", cwd=tmp_path)
    assert outcome.status == "ok", (tmp_path / "log").read_text()[-3000:]
    assert "images/s for" in outcome.headline and "waiting for data" in outcome.headline
    rows = {(row["run"], row["training"]): row for row in read_csv(setting.out / "run.csv")}
    student = f"students/{check_parts.METHOD}-seed0"
    assert {("teachers", "teachers/0"), ("short", student), ("long", student)} <= set(rows)
    long = rows["long", student]
    assert long["finished"] == "1" and long["network"] == "wrn10x1"
    assert float(long["images_per_s_q1"]) <= float(long["images_per_s"]) <= float(long["images_per_s_q3"])
    assert 0 <= float(long["data_wait_share"]) < 1 and int(long["images"]) % 484 == 0
    assert training_headline(training_rows(setting.work / "run-wrn10x1" / "long")[0]) in outcome.headline


def test_a_run_that_was_cut_off_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "students" / "kd-seed0"
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "images_per_s": rate} for step, rate in ((20, 10.0), (40, 300.0), (60, 500.0))
    ]
    reading = {"clock_mhz": 1755, "power_w": 651.5, "memory_gb": 9.5, "throttled": 0.0}
    lines.append({"kind": "device", "step": 60, "utilisation": 0.97, **reading})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tra')
    (row,) = training_rows(tmp_path)
    assert (row["images_per_s"], row["log_lines"], row["utilisation_p10"], row["clock_mhz"]) == (400.0, 2, 0.97, 1755)
    assert row["utilisation"] == "" and row["wh"] == ""
    assert training_headline(row) == "400 images/s, not finished"
    device = {"utilisation": 0.966, "energy_wh": 6.04, "throttled": 0.25, "shared": 0.0}
    outcome = {"seconds": 36.2, "waited": 0.18, "images": 14000, "device": device}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    (row,) = training_rows(tmp_path)
    assert training_headline(row) == (
        "400 images/s for 36 s, utilisation 97%, 0.5% waiting for data, 6.04 Wh, throttled in 25% of the samples"
    )


def test_the_cache_that_was_filled_elsewhere_is_checked(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "build" / "aot" / "cache" / "some").mkdir(parents=True)
    setting = make_setting(tmp_path, root=root, networks=("wrn28x4",))
    (setting.cache / "stale").mkdir(parents=True)
    found = make_part("aot", setting, 60)
    (command,) = found.commands()
    assert command.argv[-4:] == ("--check", str(setting.cache), "--recipes", "cifar100-wrn28x4")
    assert (setting.cache / "some").exists() and not (setting.cache / "stale").exists()
    log = setting.out / "logs" / "aot.log"
    log.parent.mkdir(parents=True)
    log.write_text("sm_90: 153 variants of 14 kernels\nsm_90: 153 variants launched, 2 compiled\n")
    assert found.collect().headline == "153 variants launched, 2 had to be compiled; cache filled by make aot"
    assert read_csv(setting.out / "aot.csv")[0]["compiled"] == "2"
    log.write_text("sm_90: 153 variants of 14 kernels\n")
    with pytest.raises(ValueError, match="not checked"):
        found.collect()


def test_without_a_cache_it_is_filled_first(tmp_path: Path) -> None:
    setting = make_setting(tmp_path, root=tmp_path, networks=("wrn28x1", "resnet18"))
    fill, check = make_part("aot", setting, 60).commands()
    recipes = ["--recipes", "cifar10-wrn28x1", "tiny-imagenet-resnet18"]
    assert list(fill.argv[3:]) == ["--archs", "90", "--cache", str(setting.cache), *recipes]
    assert list(check.argv[3:]) == ["--check", str(setting.cache), *recipes]
    nothing = make_part("aot", make_setting(tmp_path, networks=("resnet20",)), 60)
    assert list(nothing.commands()) == []
    with pytest.raises(ValueError, match="no recipe has resnet20"):
        nothing.collect()


# ---- tuning as a table ---------------------------------------------------------------------------------------------


def tuned(monkeypatch: pytest.MonkeyPatch, fails_after: int | None = None) -> None:
    """A GPU and a clock that are made up."""
    count = 0

    def made_up(self: Tuner, key: Key, left: list[Candidate], deadline: float | None) -> Outcome:
        nonlocal count
        count += 1
        if count == fails_after:
            raise RuntimeError("the machine is gone")
        times = {"triton": (100.0, 0.4), "library": (120.0, 1.5)}
        return Outcome(
            measured=[
                Measured(candidate=one, microseconds=times[one.provider][0], spread=times[one.provider][1])
                for one in left
            ]
        )

    monkeypatch.setattr(Tuner, "_outcome", made_up)
    monkeypatch.setattr(MeasuringProcess, "start", lambda self: None)
    found = [Candidate(provider="triton", tile=(1, 128, 64, 64, 4, 3)), Candidate(provider="library")]
    monkeypatch.setattr(tuner, "candidates", lambda key, device: found)
    for module in (tune, tuner):
        monkeypatch.setattr(module, "installed_gpu", lambda: DEVICES["H100"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table = TuningTable(None, {})
    monkeypatch.setattr(TuningTable, "of_device", classmethod(lambda cls, device, fresh: table))


SMALL = ["--network", "wrn10x1", "--image-size", "8", "--batch-size", "2"]


def test_tuning_writes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned(monkeypatch)
    setting = make_setting(tmp_path)
    tune.main([*SMALL, "--csv", str(setting.work / "tuning-wrn10x1.csv")])
    rows = read_csv(setting.work / "tuning-wrn10x1.csv")
    first, second = rows[:2]
    assert (first["device"], first["network"], first["precision"]) == ("NVIDIA H100 80GB HBM3", "wrn10x1", "bf16")
    assert first["torch"] and first["triton"] and first["commit"]
    assert (first["candidate"], first["us"], first["spread_us"], first["is_chosen"]) == (
        "triton boxes 128x64x64 4w 3s", "100.0", "0.4", "1",
    )  # fmt: skip
    assert (second["candidate"], second["us"], second["is_chosen"]) == ("library loop", "120.0", "0")
    assert float(first["floor_share"]) == pytest.approx(float(first["floor_us"]) / 100, abs=1e-4)
    headline = make_part("tuning", setting, 60).collect().headline
    assert headline.startswith(f"{len(rows) // 2} convolutions, Triton's kernel chosen for {len(rows) // 2}, median ")
    kept = read_csv(setting.out / "tuning.csv")
    assert len(kept) == len(rows) and kept[0]["commit"] == "abc" and kept[0]["driver"] == "580.1"


def test_a_table_of_tuning_that_was_cut_off_has_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuned(monkeypatch, fails_after=4)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        tune.main([*SMALL, "--csv", str(tmp_path / "table.csv")])
    assert len(read_csv(tmp_path / "table.csv")) == 3


def test_the_list_is_a_table_too(tmp_path: Path) -> None:
    tune.main(["--list", *SMALL, "--csv", str(tmp_path / "list.csv"), "--json", str(tmp_path / "list.json")])
    rows, entries = read_csv(tmp_path / "list.csv"), json.loads((tmp_path / "list.json").read_text())
    assert len(rows) == len(entries) and rows[0]["device"] == "H100"
    assert sum(int(row["flops"]) for row in rows) == sum(entry["flops"] for entry in entries)
    with pytest.raises(UserError, match=r"--csv /dev/null/x.csv: cannot be written"):
        tune.main(["--list", *SMALL, "--csv", "/dev/null/x.csv"])


# ---- the GPU -------------------------------------------------------------------------------------------------------


class PretendedNvml:
    """What `gpu_facts` asks of pynvml, of a GPU whose ECC and application clocks are not told."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.is_open = False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:
        if address != "00000000:01:00.0":
            raise self.NVMLError("Not Found")
        return address

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: str) -> int:
        return 700_000

    def nvmlDeviceGetEccMode(self, gpu: str) -> list[int]:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetMigMode(self, gpu: str) -> list[int]:
        return [0, 0]

    def nvmlDeviceGetClockInfo(self, gpu: str, clock: int) -> int:
        return {1: 1755, 2: 2619}[clock]

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[Any]:
        return [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)]


@pytest.mark.parametrize(
    "names", [GpuNames(uuids=("MIG-1", "GPU-1"), pci=None), GpuNames(uuids=("x",), pci="00000000:01:00.0")]
)
def test_settings_of_the_board(names: GpuNames) -> None:
    nvml = PretendedNvml()
    found = gpu_facts.board_settings(names, nvml)
    assert (found["driver"], found["power_limit_w"], found["mig"]) == ("580.65.06", 700.0, False)
    assert (found["sm_mhz"], found["memory_mhz"], found["other_processes"]) == (1755, 2619, 1)
    assert found["ecc"] is None and found["sm_application_mhz"] is None
    assert not nvml.is_open


def test_a_board_that_nvml_does_not_know() -> None:
    found = gpu_facts.board_settings(GpuNames(uuids=("x",), pci="y"), PretendedNvml())
    assert found == {"driver": None, "nvml": "does not know this GPU (Not Found)"}


@pytest.mark.gpu
def test_facts_of_a_real_gpu() -> None:
    facts, _ = gpu_check.find_facts(60.0)
    assert facts["device"] == torch.cuda.get_device_name() and facts["driver"] and facts["sm_max_mhz"] > 0
