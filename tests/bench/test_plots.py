"""bench/plots.py: what is drawn is what the rows say, and all of it can be read."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from bench import plots
from bench.harness.drawing import GREY, SETTINGS, colour
from bench.harness.rows import Row, write_rows
from ensdistill.config.methods import SHOWN, STUDENTS
from ensdistill.runtime.errors import UserError

PROBLEM: dict[str, Any] = {
    "network": "wrn28x4",
    "method": "latentbe+tdiv-sdiv",
    "E": 4,
    "B": 128,
    "size": 32,
    "precision": "bf16",
    "device": "NVIDIA H100 80GB HBM3",
    "versions": "python 3.12.3, torch 2.11.0+cu130, triton 3.6.0, driver 580.1",
    "commit": "0123456789ab+",
}
STEP = {"official-order": 61.0, "pruned": 27.0, "compiled": 17.5, "library": 14.0, "auto": 11.6}
TOO_LONG = "wrong numbers: Agreement(shown=0.7, loss=0.1, parameters=1.0, statistics=0.3) from the fp32 definition"


def row(part: str, provider: str, ms: float | None = None, **values: Any) -> Row:
    times = {} if ms is None else {"n": 15, "p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.25 * ms}
    return Row(part=part, provider=provider, **(PROBLEM | times | values))


def step_rows() -> list[Row]:
    rows = [row("step", name, ms, floor_share=7.8 / ms) for name, ms in STEP.items()]
    return [rows[-1], row("step", "compiled-vmap", note=TOO_LONG), *rows[:-1]]


def methods_rows() -> list[Row]:
    names = ["ce", *(f"{student}+{shown}" for student in STUDENTS for shown in SHOWN)]
    timed = [
        row("methods", "auto", 2.0 + i, method=name, vs_ce=1 + i / 2, peak_gb=1.5 + i, wh_per_million=3.0 + i)
        for i, name in enumerate(names)
    ]
    return [*timed, row("methods", "auto", method="hydra+other", note="failed")]


def job_rows() -> list[Row]:
    note = "cifar100-wrn28x4: 200 epochs of 45,000 images"
    parts = {("data", ""): 3e4, ("teachers", "ce"): 6e5, ("student", "ce"): 1.5e5, ("student", "kd"): 3e5}
    rows = [row("job", provider, ms, method=method, note=note) for (provider, method), ms in parts.items()]
    return [*rows, row("job", "job", 1.8e5, method="ce", note=note), row("job", "job", 9.3e5, method="kd", note=note)]


def scaling_rows() -> list[Row]:
    changes: list[dict[str, Any]] = [{}, {"E": 1, "method": "latentbe"}, {"E": 2}, {"B": 32}, {"B": 256}, {"size": 64}]
    changes += [{"network": "wrn28x1"}, {"network": "wrn28x10"}]
    timed = [row("scaling", "auto", 11.6 + i, floor_share=0.5, **change) for i, change in enumerate(changes)]
    return [
        *timed,
        row("scaling", "auto", B=512, peak_gb=93.0, note="does not fit: needs about 95 GB of 80 GB"),
        row("scaling", "auto", B=1024, peak_gb=186.0, note="does not fit: needs about 190 GB of 80 GB"),
        row("scaling", "auto", size=224, note="would take about 99 s"),
    ]


def feed_rows() -> list[Row]:
    rates = {"resident": (1.4e7, 9e6), "ffcv-cached": (3e6, 1.7e6), "ffcv": (6.5e5, 4.2e5), "dataloader-16": (9e4, 6e3)}
    rows = [
        row("feed", name, 128e3 / rate, images_per_s=rate, images_per_s_core=a_core, note="raw")
        for name, (rate, a_core) in rates.items()
    ]
    return [*rows, row("feed", "dataloader-0", note="not timed: batch 0 has other pixels", size=224)]


def startup_rows() -> list[Row]:
    return [row("start-up", name, 1e3 * s) for name, s in (("cold", 131.0), ("ahead-of-time", 31.0), ("warm", 14.2))]


FIGURES = {
    "step": (plots.step_figure, step_rows),
    "methods": (plots.methods_figure, methods_rows),
    "job": (plots.job_figure, job_rows),
    "scaling": (plots.scaling_figure, scaling_rows),
    "feed": (plots.feed_figure, feed_rows),
    "startup": (plots.startup_figure, startup_rows),
}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with rc_context(SETTINGS):
        yield


def figure_of(name: str, rows: list[Row] | None = None) -> Figure:
    make, example = FIGURES[name]
    figure = make(example() if rows is None else rows)
    assert figure is not None
    return figure


def write_nll(path: Path, rows: list[tuple[str, float, float, float | str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("method", "nll", "acc", "cost"), *rows])
    return path


def nll_file(folder: Path) -> Path:
    points: list[tuple[str, float, float, float | str]] = [
        (name, 1.0 - 0.1 * i, 0.8, 1.0 + i) for i, name in enumerate(["ce", "kd+ods", "latentbe+tdiv-sdiv", "hydra"])
    ]
    points += [("kd+ods", 0.8, 0.8, 3.0), ("teacher ensemble", 0.5, 0.8, 4.0), ("single teacher", 0.9, 0.8, "")]
    return write_nll(folder / "nll.csv", points)


def folder_of_all(folder: Path) -> Path:
    for name in ("step", "scaling", "feed", "startup"):
        write_rows(folder / f"{name}.csv", FIGURES[name][1]())
    write_rows(folder / "methods.csv", [*methods_rows(), *job_rows()])
    nll_file(folder)
    return folder


def names_of(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def widths_of(axes: Axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


# ---- all of them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = folder_of_all(tmp_path_factory.mktemp("rows"))
    return plots.draw(folder, folder / "plots")


def test_every_csv_becomes_a_png_and_an_svg(drawn):
    stems = ["step", "methods", "job", "scaling", "feed", "startup", "nll"]
    assert [path.name for path in drawn] == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    for path in drawn:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 20
        else:
            assert "<svg" in path.read_text()


def test_the_same_rows_give_the_same_bytes(drawn, tmp_path):
    write_rows(tmp_path / "step.csv", step_rows())
    again = plots.draw(tmp_path, tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn if path.stem == "step"]


def test_plots_say_what_they_were_measured_on(drawn):
    texts = [path.read_text() for path in drawn if path.suffix == ".svg" and path.stem != "nll"]
    assert len(texts) == 6
    for text in texts:
        for fact in (PROBLEM["device"], PROBLEM["versions"], PROBLEM["commit"], "n = 15"):
            assert fact in text


def test_rows_of_two_machines_name_both():
    other = replace(step_rows()[0], device="another", n=3, throttled=0.25)
    text = figure_of("step", [*step_rows(), other]).get_supxlabel()
    assert PROBLEM["device"] in text and "another" in text and "n = 3 to 15" in text and "25%" in text


@pytest.mark.parametrize("name", [*FIGURES, "nll"])
def test_nothing_that_is_written_is_cut_off(tmp_path, name):
    figure = plots.nll_figure(nll_file(tmp_path)) if name == "nll" else figure_of(name)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, whole = figure.get_tightbbox(canvas.get_renderer()), figure.bbox_inches
    assert min(drawn.x0, drawn.y0) >= -0.01 and drawn.x1 <= whole.x1 + 0.01 and drawn.y1 <= whole.y1 + 0.01


def test_a_provider_has_one_colour():
    assert colour("dataloader-0") == colour("dataloader-16") != GREY
    assert colour("official-order") == colour("nobody") == GREY
    rivals = [colour(name) for name in ("auto", "triton", "library", "pruned", "compiled", "compiled-vmap")]
    assert len(set(rivals)) == len(rivals)
    (axes,) = figure_of("step").axes
    names = [name.split()[0] for name in names_of(axes)][: len(axes.patches)]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [colour(name).lower() for name in names]


# ---- each ---------------------------------------------------------------------------------------------------------


def test_steps_are_bars_from_the_slowest_to_who_was_not_timed():
    (axes,) = figure_of("step").axes
    assert widths_of(axes) == sorted(STEP.values(), reverse=True)
    assert names_of(axes)[0] == "official-order bf16" and names_of(axes)[-1] == "compiled-vmap bf16"
    whisker, floor = axes.lines[:2]
    assert list(whisker.get_xdata()) == [0.9 * 61, 1.25 * 61] and floor.get_xdata()[0] == pytest.approx(7.8)
    note = axes.texts[-1].get_text()
    assert note.startswith("wrong numbers") and len(note) <= plots.NOTE_LENGTH


def test_methods_stand_in_units_of_ce():
    rows = methods_rows()
    panels = figure_of("methods", rows).axes
    assert [axes.get_title(loc="left").split()[0] for axes in panels] == ["time", "memory", "energy"]
    assert widths_of(panels[0]) == [row.vs_ce for row in rows[:-1]]
    assert widths_of(panels[1]) == [row.peak_gb / 1.5 for row in rows[:-1]]
    assert list(panels[0].lines[0].get_xdata()) == [0.9, 1.25]  # of ce's own time
    assert panels[0].texts[-1].get_text() == "–"


def test_what_is_not_known_of_ce_has_no_panel():
    rows = [replace(row, wh_per_million=None) for row in methods_rows()]
    assert len(figure_of("methods", rows).axes) == 2
    assert plots.methods_figure([row for row in rows if row.method != "ce"]) is None


def test_a_job_is_the_sum_of_its_parts():
    (axes,) = figure_of("job").axes
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert names_of(axes) == ["ce", "kd"]
    assert ends == pytest.approx([0.5, 0.5, 3.0, 0.5, 10.5, 15.5])  # minutes; ce needs no teachers
    assert [text.get_text() for text in axes.texts] == ["3 min", "15.5 min"]


@pytest.mark.parametrize(("name", "num_panels"), [("methods", 6), ("job", 2), ("step", 2), ("startup", 2)])
def test_two_networks_have_panels_of_their_own(name, num_panels):
    rows = FIGURES[name][1]()
    other = [replace(row, network="wrn28x1", p50_ms=row.p50_ms and 2 * row.p50_ms) for row in rows]
    assert len(figure_of(name, rows + other).axes) == num_panels


def test_a_line_is_what_differs_along_its_axis_alone():
    rows = scaling_rows()
    (members,), (batches,), (widths,) = (plots.lines_of(rows, axis) for axis in ("E", "B", "width"))
    assert [row.E for row in members] == [1, 2, 4]
    assert [row.B for row in batches] == [32, 128, 256, 512, 1024]
    assert [row.network for row in widths] == ["wrn28x1", "wrn28x4", "wrn28x10"]
    assert plots.lines_of(rows[:1], "E") == []


def test_scaling_draws_times_the_floor_and_where_memory_ends():
    panels = {axes.get_xlabel(): axes for axes in figure_of("scaling").axes}
    assert len(panels) == 4 and all(axes.get_xscale() == axes.get_yscale() == "log" for axes in panels.values())
    measured, floor, *ends = panels["images a step B"].lines
    assert list(measured.get_xdata()) == [32, 128, 256]
    assert list(floor.get_ydata()) == [y / 2 for y in measured.get_ydata()]
    assert [list(end.get_xdata()) for end in ends] == [[512], [1024]]
    assert [text.get_text() for text in panels["images a step B"].texts] == ["needs 93 GB"]
    # one member is another method
    measured, floor, *alone = panels["members E"].lines
    assert list(measured.get_xdata()) == [2, 4] and {line.get_xdata()[0] for line in alone} == {1}
    # what only would take long is no end of memory
    assert [len(line.get_xdata()) for line in panels["side of an image, pixels"].lines] == [2, 2]


def test_two_problems_are_two_lines():
    other = [replace(row, network=row.network.replace("28", "16")) for row in scaling_rows()]
    panels = figure_of("scaling", scaling_rows() + other).axes
    assert len(panels) == 4 and len(plots.lines_of(scaling_rows() + other, "E")) == 2
    assert panels[0].get_title(loc="left") == PROBLEM["method"]


def test_the_feed_shows_the_machine_and_a_core():
    rows = feed_rows()
    assert [row.images_per_s_core for row in rows] == [9e6, 1.7e6, 4.2e5, 6e3, None]
    first, second = figure_of("feed", rows).axes
    points = [line.get_xdata()[0] for line in first.lines if len(line.get_xdata()) == 1]
    assert points == [1.4e7, 9e6, 3e6, 1.7e6, 6.5e5, 4.2e5, 9e4, 6e3]
    assert not second.lines and second.texts[0].get_text() == "not timed: batch 0 has other pixels"


def test_starts_are_seconds():
    (axes,) = figure_of("startup").axes
    assert widths_of(axes) == [131.0, 31.0, 14.2] and names_of(axes) == ["cold", "ahead-of-time", "warm"]


def test_seeds_of_a_method_are_one_point(tmp_path):
    figure = plots.nll_figure(nll_file(tmp_path))
    assert figure is not None
    (axes,) = figure.axes
    points = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 1]
    assert points == [(1, 1), (2.5, pytest.approx(0.85)), (3, pytest.approx(0.8)), (4, pytest.approx(0.7)), (4, 0.5)]
    assert [text.get_text() for text in axes.texts] == ["teacher ensemble"]
    assert "n = 1 to 2" in figure.get_supxlabel()


# ---- what users do wrong ------------------------------------------------------------------------------------------


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing to draw; expected some of step\.csv.*python -m bench"):
        plots.draw(tmp_path, tmp_path)


def test_rows_without_a_single_time_are_nothing_to_draw(tmp_path):
    write_rows(tmp_path / "scaling.csv", [row("scaling", "auto", note="failed")])
    with pytest.raises(UserError, match="nothing to draw"):
        plots.draw(tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "method,nll,cost\nce,low,1\n"])
@pytest.mark.parametrize("name", ["step.csv", "nll.csv"])
def test_another_csv_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        plots.draw(tmp_path, tmp_path)


def test_without_matplotlib_the_user_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.draw(folder_of_all(tmp_path), tmp_path)
