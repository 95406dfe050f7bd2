"""Kinds of records: configurations, what a run says of itself, logs, caches, tables."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from corruption import Kind, SetAside, other_json, other_json_line, signed_json
from data_sets import array_source
from networks import small_classifier

from bench.gpu_run import quality_rows, training_rows
from bench.harness.rows import Row, read_rows, write_rows
from ensdistill.aot.__main__ import use_cache
from ensdistill.config.configs import Config, require_same_config, write_config
from ensdistill.config.methods import Method
from ensdistill.config.recipes import RECIPES, find_recipe
from ensdistill.data.prepare import prepare
from ensdistill.engine.launch_key import Key
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.table import Choice, Failure, Measured, TuningTable
from ensdistill.formats.load import parse_builder_args
from ensdistill.models.ensembles import Teachers
from ensdistill.monitor.readings import Figures
from ensdistill.run.job import Run
from ensdistill.run.preflight import require_outcomes
from ensdistill.run.report import _data_wait, _device, _duration, _most, _rate
from ensdistill.run.trained_on import require_same_data, require_same_teachers, write_record
from ensdistill.run.trainer import _in_words
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import with_digest
from ensdistill.training.log import Log
from ensdistill.training.loop import Progress


def recipe(folder: Path) -> Kind:
    write_config(folder / "config.json", RECIPES["tiny-imagenet-resnet18"]())

    def read(at: Path) -> Any:
        """Take it as a recipe, and write it into a run folder."""
        config = find_recipe(str(at / "config.json"))
        write_config(at / "again.json", config)
        return config.to_json()

    files = {"config.json": (folder / "config.json").read_bytes()}
    return Kind(files=files, damaged=tuple(files), read=read, has_digest=False, forged=(other_json,))


def config_of_run(folder: Path) -> Kind:
    config = RECIPES["digits"]()
    write_config(folder / "config.json", config)
    files = {"config.json": (folder / "config.json").read_bytes(), "teachers/0/metrics.jsonl": b""}

    def read(at: Path) -> Any:
        require_same_config(at, config)

    return Kind(files=files, damaged=("config.json",), read=read, has_digest=True, forged=(other_json,))


def data_json(folder: Path) -> Kind:
    source = array_source()
    teachers = Teachers([small_classifier(t) for t in range(2)], 7)
    write_record(folder / "run", prepare(source, folder / "data"), teachers)
    files = {"data.json": (folder / "run" / "data.json").read_bytes(), "teachers/0/metrics.jsonl": b""}

    def read(at: Path) -> Any:
        said: list[str] = []
        require_same_data(at, source, None, said.append)
        require_same_teachers(at, teachers)
        return said

    return Kind(files=files, damaged=("data.json",), read=read, has_digest=True, forged=(other_json,))


def outcome_json(folder: Path) -> Kind:
    figures = Figures(seconds=9.0, samples=8, utilisation=0.5, energy_wh=1.5, throttled=0.0, limits={"power": 0.1})
    outcome = Progress(
        epochs=2, best_epoch=1, best_acc=0.5, last_acc=0.4, seconds=8.5, waited=0.5, images=70, device=figures,
        peak_bytes=10**8, predicted_bytes=10**8,
    )  # fmt: skip
    config = RECIPES["digits"]()

    def read(at: Path) -> Any:
        """Check it before the work, and show it in the tables at the end."""
        folder = at / "teachers" / "0"
        run = Run(
            title="t", method=Method.parse("ce"), training=config.teacher, seed=0, folder=folder, is_student=False
        )
        job: Any = SimpleNamespace(teacher_runs=lambda: [run], student_runs=list)
        require_outcomes(job)
        found = run.outcome()
        words = f"{_in_words(found, 2)} {_duration(found.seconds)}" if found.seconds else ""
        shown = _rate([found, found]), _data_wait([found]), _most([found.peak_bytes, found.predicted_bytes])
        return found, words, shown, _device([found, found]), json.dumps(asdict(found))

    data = (json.dumps(with_digest(asdict(outcome)), indent=2) + "\n").encode()
    files = {"teachers/0/outcome.json": data}
    return Kind(files=files, damaged=tuple(files), read=read, has_digest=True, forged=(other_json, signed_json))


def log_files(folder: Path) -> Kind:
    log = Log(folder, 0)
    for step in range(1, 9):
        log.write("train", step, {"loss": 2.0 / step, "images_per_s": 10.0, "none": None, "epoch": 1})
        if step % 4 == 0:
            log.write("valid", step, {"acc": 0.1 * step})
    place = log.sync()
    log.close()
    whole = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    # for a checkpoint that counts the lines, and for one of an earlier version
    files = {f"{way}/{name}": data for way in ("counted", "by step") for name, data in whole.items()}

    def read(at: Path) -> Any:
        """Go on with the logs."""
        kept, notes = [], []
        for way, counted in (("counted", place), ("by step", None)):
            found = Log(at / way, 8, counted)
            found.write("train", 9, {"loss": 0.5})
            found.sync()
            found.close()
            notes += found.notes
            kept.append((at / way / "metrics.jsonl").read_bytes())
        if notes:
            raise SetAside("; ".join(notes))
        return kept

    lines = tuple(name for name in files if name.endswith(".jsonl"))
    return Kind(files=files, damaged=lines, read=read, has_digest=False, forged=(other_json_line,))


def event_files(folder: Path) -> Kind:
    kind = log_files(folder)
    return replace(kind, damaged=tuple(sorted(set(kind.files).difference(kind.damaged))), forged=())


def results_json(folder: Path) -> Kind:
    row = {"name": "kd", "measures": {"acc": 0.5, "nll": 1.5}, "dee": None, "cost": 1.0}
    files = {
        "run/results.json": json.dumps({"rows": [row, row]}).encode(),
        "run/teachers/0/outcome.json": json.dumps(asdict(Progress(epochs=2, seconds=2.5, images=9))).encode(),
    }
    return Kind(
        files=files, damaged=tuple(files), read=lambda at: (quality_rows(at / "run"), training_rows(at / "run")),
        has_digest=False, forged=(other_json,),
    )  # fmt: skip


# ---- caches and tables ----------------------------------------------------------------------------------------------

_IDENTITY = {"device": "a device", "driver": "1", "torch": "2", "triton": "3", "sources": "abc", "tf32": False}


def _key(CI: int) -> Key:
    return Key(op="forward", E=4, M=4, B=8, H=16, W=16, CI=CI, CO=16, k=3, stride=1, dtype="bf16", out_dtype="bf16")


def tuning_table(folder: Path) -> Kind:
    path = folder / "table.json"
    table = TuningTable(path, _IDENTITY)
    tiles = [Candidate(provider="triton", tile=(0, 64, 64, 32, 4, 3)), Candidate(provider="library")]
    for CI in (16, 32):
        times = [Measured(candidate=one, microseconds=10.0 + i, spread=1.0) for i, one in enumerate(tiles)]
        table.put(_key(CI), Choice.of(_key(CI), times, None))
    table.put_failure(
        _key(16), Candidate(provider="triton", tile=(1, 128, 64, 32, 4, 3)), Failure(reason="no", crashed=True)
    )
    files = {"table.json": path.read_bytes()}

    def read(at: Path) -> Any:
        """Look choices up and write a new one beside them."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = TuningTable(at / "table.json", _IDENTITY)
            known = [found.get(_key(16)), found.get(_key(32)), found.failure(_key(16), tiles[0])]
            found.put_failure(_key(32), tiles[0], Failure(reason="no"))
        if said:
            raise SetAside(str(said[0].message))
        return known

    return Kind(files=files, damaged=tuple(files), read=read, has_digest=True, forged=(signed_json,))


def kernel_cache(folder: Path) -> Kind:
    whole = {"child_paths": {"a.cubin": "/elsewhere/x/a.cubin", "a.json": "/elsewhere/x/a.json"}}
    files = {
        "cache/x/__grp__a.json": json.dumps(whole).encode(), "cache/x/a.cubin": b"cubin", "cache/x/a.json": b"{}"
    }  # fmt: skip

    def read(at: Path) -> Any:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            use_cache(at / "cache")
        if said:
            raise SetAside(str(said[0].message))
        paths = json.loads((at / "cache/x/__grp__a.json").read_text())["child_paths"]
        return {name: Path(path).name for name, path in paths.items()}

    return Kind(files=files, damaged=("cache/x/__grp__a.json",), read=read, has_digest=False, forged=(other_json,))


def rows(folder: Path) -> Kind:
    write_rows(
        folder / "rows.csv",
        [Row(part="step", provider="a", E=4, B=8, p50_ms=1.5 + i, n=3, commit="abc") for i in range(4)],
    )
    files = {"rows.csv": (folder / "rows.csv").read_bytes()}
    return Kind(files=files, damaged=tuple(files), read=lambda at: read_rows(at / "rows.csv"), has_digest=False)


def arguments(folder: Path) -> Kind:
    files = {"args.json": json.dumps({"num_classes": 10, "width": 4, "names": ["a"]}).encode()}

    def read(at: Path) -> Any:
        """Take the text as the value of --network-args and of --teacher-args."""
        text = (at / "args.json").read_bytes().decode(errors="surrogateescape").replace("\0", "")
        try:
            config = Config(recipe="r", source="digits", network="a.b:c", network_args=text)
            return config.builder_arguments(), parse_builder_args(text)
        except UserError as error:
            raise UserError(f"{at}: {error}") from error  # the option stands for the file

    return Kind(files=files, damaged=tuple(files), read=read, has_digest=False, forged=(other_json,))


KINDS: dict[str, Callable[[Path], Kind]] = {
    "recipe .json": recipe,
    "config.json of a run": config_of_run,
    "data.json": data_json,
    "outcome.json": outcome_json,
    "results.json": results_json,
    "metrics.jsonl": log_files,
    "events": event_files,
    "tuning table": tuning_table,
    "compiled kernels' lists": kernel_cache,
    "benchmark rows": rows,
    "arguments in JSON": arguments,
}
