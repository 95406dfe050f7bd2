"""The parts of `make gpu-check`: what each runs, and what it keeps of that.

Raw reports and everything large go to `work` (build/gpu-check), tables and logs to `out`.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.check_results import (
    Row,
    benchmark_rows,
    races_headline,
    read_csv,
    test_rows,
    tests_headline,
    times_headline,
    training_headline,
    training_rows,
    write_table,
)
from bench.check_runner import Command, Found, Part
from ensdistill.recipes import RECIPES, find_recipe

LIMITS: dict[str, float] = {
    "environment": 25,
    "aot": 45,
    "tests": 90,
    "tuning": 85,
    "kernels": 80,
    "networks": 40,
    "step": 50,
    "run": 125,
    "speed": 540,
    "kernel-tests": 540,
}
"""Seconds. The default parts together have 540, the 9 minutes that a first look may take."""
OPTIONAL = ("speed", "kernel-tests")
PROVIDERS = (
    "modules", "reference", "library", "eager", "triton", "auto",
    "official-order", "official-order-tf32", "official-order-amp", "pruned",
)  # fmt: skip
"""Those that are timed by default; what torch.compile makes takes seconds a kernel and minutes a network."""
METHOD = "latentbe+tdiv-sdiv"
SHORT_STEPS, TEACHER_STEPS = 100, 10
PYTEST_NOTHING_SELECTED = 5
_SPEED_TESTS, _INTERPRETER_TESTS = "tests/gpu/test_speed.py", "tests/kernels/test_interpreter.py"
_MAX_AUTOTUNE_TESTS = "tests/test_rivals.py::test_on_a_gpu_two_steps_are_the_definition[compiled"
"""What their names begin with; minutes each."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the parts have in common. The sizes are CIFAR-100's; tests take smaller ones."""

    root: Path
    """The checkout."""
    out: Path
    """Gets tables and logs."""
    work: Path
    """Gets everything else; kept between checks."""
    identity: Mapping[str, Any]
    """Columns in front of every row."""
    capability: int
    """Of the GPU, 90 for 9.0."""
    networks: tuple[str, ...]
    """What is tuned, benchmarked, trained."""
    providers: tuple[str, ...]
    """Who is timed."""
    data: Path | None = None
    """What the real run trains on; None: random pixels."""
    images: int = 50_000
    """Of random pixels."""
    image_size: int = 32
    """Their side."""
    classes: int = 100
    """K."""
    batch_size: int = 128
    """Images a step."""
    run_seconds: float = 36
    """What the real run's epochs are chosen for, by the speed of a short run before it."""

    @property
    def cache(self) -> Path:
        """Triton's, of everything that this check runs."""
        return self.work / "aot" / "cache"

    def command(self, *arguments: str | Path, good: Sequence[int] = (0,), **environment: str) -> Command:
        """`python ARGUMENTS` with the cache."""
        argv = (sys.executable, *map(str, arguments))
        return Command(argv, {"TRITON_CACHE_DIR": str(self.cache), **environment}, frozenset(good))

    def write(self, name: str, rows: Sequence[Row], key: Sequence[str]) -> None:
        """A table of `out`.

        Raises:
            ValueError: there is no row.
        """
        if not rows:
            raise ValueError("it came to no result; its log says how far it got")
        write_table(self.out, name, rows, self.identity, key)


def make_part(name: str, setting: Setting, limit: float) -> Part:
    """The part called `name`, one of `LIMITS` but the environment."""
    about, make = _PARTS[name]
    commands, collect = make(setting)
    return Part(name=name, about=about, limit=limit, commands=commands, collect=collect)


_Make = Callable[[Setting], tuple[Callable[[], Iterator[Command]], Callable[[], Found]]]


# ---- tests ---------------------------------------------------------------------------------------------------------


def selected_tests(name: str, root: Path) -> list[str]:
    """pytest's arguments for `tests`, `speed` or `kernel-tests`. None of them needs Triton's interpreter."""
    places = [*(root / "tests").glob("*/"), *(root / "tests").glob("test_*.py")]
    places = [place for place in places if place.suffix or any(place.glob("test_*.py"))]
    everything = sorted(str(place.relative_to(root)) for place in places)
    everything.sort(key=lambda place: place not in ("tests/kernels", "tests/gpu"))  # if the time is up, the rest lacks
    return {
        "tests": [
            *("-m", "gpu"),
            *everything,
            f"--ignore={_SPEED_TESTS}",
            f"--ignore={_INTERPRETER_TESTS}",
            f"--deselect={_MAX_AUTOTUNE_TESTS}",
        ],
        "speed": ["-m", "gpu", "-s", _SPEED_TESTS, "tests/test_rivals.py"],
        "kernel-tests": ["tests/kernels", f"--ignore={_INTERPRETER_TESTS}"],
    }[name]


def _tests(name: str) -> _Make:
    def make(setting: Setting) -> tuple[Callable[[], Iterator[Command]], Callable[[], Found]]:
        junit, log = setting.out / "logs" / f"{name}.xml", setting.out / "logs" / f"{name}.log"

        def commands() -> Iterator[Command]:
            junit.unlink(missing_ok=True)
            options = ["-v", "-p", "no:cacheprovider", "--durations=15", "--continue-on-collection-errors"]
            yield setting.command("-m", "pytest", *selected_tests(name, setting.root), *options, f"--junitxml={junit}")

        def collect() -> Found:
            rows = test_rows(junit, log)
            setting.write(name, rows, ["test"])
            bad = [row for row in rows if row["outcome"] in ("failed", "error")]
            return Found(tests_headline(rows), tuple(f"{row['test']}: {row['message']}" for row in bad))

        return commands, collect

    return make


# ---- compiled ahead of time ----------------------------------------------------------------------------------------


def _aot(setting: Setting) -> tuple[Callable[[], Iterator[Command]], Callable[[], Found]]:
    built, log = setting.root / "build" / "aot" / "cache", setting.out / "logs" / "aot.log"
    recipes = [name for name in RECIPES if find_recipe(name).network in setting.networks]

    def commands() -> Iterator[Command]:
        if not recipes:
            return
        shutil.rmtree(setting.cache, ignore_errors=True)  # with all that earlier checks compiled into it
        if built.is_dir():
            shutil.copytree(built, setting.cache)
        else:
            yield setting.command(
                *("-m", "ensdistill.aot", "--archs", str(setting.capability)),
                *("--cache", str(setting.cache), "--recipes", *recipes),
            )
        yield setting.command("-m", "ensdistill.aot", "--check", setting.cache, "--recipes", *recipes)

    def collect() -> Found:
        if not recipes:
            raise ValueError(f"no recipe has {' or '.join(setting.networks)}; nothing is compiled ahead of time for it")
        text = log.read_text(encoding="utf-8", errors="replace")
        checked = re.search(r"^sm_(\d+): (\d+) variants launched, (\d+) compiled$", text, re.MULTILINE)
        if checked is None:
            raise ValueError("the cache was not checked; its log says how far it got")
        arch, variants, compiled = map(int, checked.groups())
        where = "make aot" if built.is_dir() else "here, a moment before"
        row = {
            "recipes": " ".join(recipes),
            "arch": arch,
            "variants": variants,
            "compiled": compiled,
            "filled by": where,
        }
        setting.write("aot", [row], ["recipes"])
        return Found(f"{variants} variants launched, {compiled} had to be compiled; cache filled by {where}")

    return commands, collect


# ---- tuning and benchmarks -----------------------------------------------------------------------------------------


def _tuning(setting: Setting) -> tuple[Callable[[], Iterator[Command]], Callable[[], Found]]:
    files = {network: setting.work / f"tuning-{network}.csv" for network in setting.networks}

    def commands() -> Iterator[Command]:
        for network, file in files.items():
            file.unlink(missing_ok=True)
            sizes = ("--batch-size", str(setting.batch_size), "--image-size", str(setting.image_size))
            options = (*sizes, "--num-classes", str(setting.classes), "--csv", file)
            yield setting.command("-m", "ensdistill.tune", "--network", network, *options)

    def collect() -> Found:
        rows = [row for file in files.values() for row in read_csv(file)]
        setting.write("tuning", rows, ["network", "layer", "operation", "candidate"])
        chosen = [row for row in rows if row["is_chosen"] == "1"]
        ours = sum(row["provider"] == "triton" for row in chosen)
        text = f"{len(chosen)} convolutions, Triton's kernel chosen for {ours}"
        if shares := sorted(float(row["floor_share"]) for row in chosen if row["floor_share"]):
            text += f", median {shares[len(shares) // 2]:.0%} of the floor"
        return Found(text)

    return commands, collect


def kernel_benchmarks(root: Path) -> list[Path]:
    """The files of operations; convolutions, which take longest, at the end."""
    files = sorted((root / "bench").glob("bench_*.py"))
    files = [file for file in files if (root / "kernels" / file.name.removeprefix("bench_")).exists()]
    return sorted(files, key=lambda file: file.name.startswith("bench_member_conv"))


def _benchmarks(
    name: str, files: Callable[[Setting], list[Path]], headline: Callable[[list[Row]], str], *options: str
) -> _Make:
    """A table of the benchmarks in `files`, a process a file, for those of networks one a network too."""

    def make(setting: Setting) -> tuple[Callable[[], Iterator[Command]], Callable[[], Found]]:
        networks = ("",) if name == "kernels" else setting.networks
        runs = {
            (network, file): setting.work / f"{name}-{network}-{file.stem}.json"
            for network in networks
            for file in files(setting)
        }
        providers = "" if "all" in setting.providers else ",".join(setting.providers)

        def commands() -> Iterator[Command]:
            setting.work.mkdir(parents=True, exist_ok=True)
            for report in runs.values():
                report.unlink(missing_ok=True)
            for (network, file), report in runs.items():
                sizes = {"BATCH": str(setting.batch_size), "SIZE": str(setting.image_size)}
                problem = {"NETWORK": network, **sizes} if network else {}
                yield setting.command(
                    *("-m", "pytest", str(file), "--benchmark-only", f"--benchmark-json={report}", "-v", *options),
                    *("-p", "no:cacheprovider"),
                    good=(0, PYTEST_NOTHING_SELECTED),
                    PROVIDERS=providers,
                    **problem,
                )

        def collect() -> Found:
            rows = [
                ({"network": network} if network else {}) | row
                for (network, _), report in runs.items()
                for row in benchmark_rows(report)
            ]
            setting.write(name, rows, ["network", "file", "benchmark", "problem", "provider"])
            return Found(headline(rows))

        return commands, collect

    return make


# ---- a real run ----------------------------------------------------------------------------------------------------


def write_images(folder: Path, images: int, size: int, classes: int) -> None:
    """images.npy and labels.npy of random pixels, as `--data` takes them; what is there already stays."""
    if (folder / "labels.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    np.save(folder / "images.npy", draw.integers(0, 256, (images, size, size, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(images) % classes)


def _run(setting: Setting) -> tuple[Callable[[], Iterator[Command]], Callable[[], Found]]:
    folders = {network: setting.work / f"run-{network}" for network in setting.networks}
    data = setting.data or setting.work / f"pixels-{setting.images}x{setting.image_size}"

    def train(network: str, out: Path, *options: str | Path) -> Command:
        common = ("--recipe", "cifar100-wrn28x4", "--data", data, "--network", network, "--methods", METHOD)
        batches = [f"--{who}.batch-size={setting.batch_size}" for who in ("teacher", "student")]
        warm_up = [f"--{who}.warmup-epochs=0.5" for who in ("teacher", "student")]
        return setting.command("-m", "ensdistill.fast_train", *common, *batches, *warm_up, "--out", out, *options)

    def commands() -> Iterator[Command]:
        if setting.data is None:
            write_images(data, setting.images, setting.image_size, setting.classes)
        for network, folder in folders.items():
            shutil.rmtree(folder, ignore_errors=True)
            few = f"--train-images={TEACHER_STEPS * setting.batch_size}"
            plain = ("--stage", "teachers", "--backend", "reference", "--teacher.epochs=1", few)
            yield train(network, folder / "teachers", *plain)
            teachers = sorted((folder / "teachers").glob("teachers/*/best.safetensors"))
            if not teachers:
                continue
            few = f"--train-images={SHORT_STEPS * setting.batch_size}"
            yield train(network, folder / "short", "--teachers", *teachers, "--student.epochs=1", few)
            rates = [row["images_per_s"] for row in training_rows(folder / "short") if row["images_per_s"]]
            if not rates:
                continue
            # A fifth at most is held out for validation and test.
            epochs = max(1, math.ceil(setting.run_seconds * rates[0] / (0.8 * setting.images)))
            yield train(network, folder / "long", "--teachers", *teachers, f"--student.epochs={epochs}")

    def collect() -> Found:
        rows = [
            {"network": network, "data": data.name, "batch_size": setting.batch_size, "run": run.name, **row}
            for network, folder in folders.items()
            for run in sorted(folder.glob("*"))
            for row in training_rows(run)
        ]
        setting.write("run", rows, ["network", "run", "training"])
        long = [row for row in rows if row["run"] == "long"]
        if not long:
            raise ValueError("the run itself did not begin; see what came before it in its log")
        return Found("; ".join(f"{row['network']}: {training_headline(row)}" for row in long))

    return commands, collect


def _file(name: str) -> Callable[[Setting], list[Path]]:
    return lambda setting: [setting.root / "bench" / name]


_PARTS: dict[str, tuple[str, _Make]] = {
    "aot": ("does what `make aot` compiles load without compiling", _aot),
    "tests": ("the tests that need a GPU, but those of speed", _tests("tests")),
    "tuning": ("every convolution of a training step, every candidate", _tuning),
    "kernels": (
        "benchmarks of operations",
        _benchmarks("kernels", lambda setting: kernel_benchmarks(setting.root), races_headline),
    ),
    "networks": ("passes over whole networks", _benchmarks("networks", _file("bench_networks.py"), times_headline)),
    "step": (
        "the training step",
        _benchmarks("steps", _file("bench_step.py"), times_headline, "-k", "tdiv-sdiv and (bf16 or official)"),
    ),
    "run": ("training, fed by FFCV, and what the device does meanwhile", _run),
    "speed": ("the tests of speed, max-autotune among the rivals", _tests("speed")),
    "kernel-tests": ("the kernels' tests that run in the interpreter elsewhere", _tests("kernel-tests")),
}
