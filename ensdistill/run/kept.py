"""What a run keeps for its report, and drawing it: predictions on the test images, and images as students saw them.

Nothing here draws from a training's numbers: the images are fixed ones of the test split, and what is drawn for them is
keyed by (seed, step, row) as in a step, at the first step after the training's last.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ensdistill.costs.network import NetworkCost
from ensdistill.data.feed import Feed
from ensdistill.engine.networks import Networks
from ensdistill.formats.ours import load_network
from ensdistill.kernels.philox import counter_of
from ensdistill.models.ensembles import Teachers
from ensdistill.report.records import (
    MAX_SHOWN,
    PREDICTIONS_FILE,
    REPORT_FILE,
    SHOWN_FILE,
    Predictions,
    Shown,
    ShownImages,
    write_predictions,
    write_shown,
)
from ensdistill.run.display import Screen
from ensdistill.run.job import Job, Run
from ensdistill.run.metrics import ensemble_log_probs, pairwise_kld, scaled_log_probs
from ensdistill.run.predict import Classify, images_per_second
from ensdistill.runtime.errors import one_line
from ensdistill.training.module_draws import seed_modules
from ensdistill.training.step import show

_TIMED_SECONDS = 0.05


def predictions(logits_NEK: Tensor, labels_N: Tensor, temperature: float) -> Predictions:
    """What each image is taken for, as `metrics.measures_at` measures it. Logits (N, E, K), E = 1 for one network."""
    log_probs_NK = ensemble_log_probs(logits_NEK)
    scaled_NK = scaled_log_probs(log_probs_NK, temperature)

    def of(log_probs_NK: Tensor) -> tuple[np.ndarray, np.ndarray]:
        top_N = log_probs_NK.amax(dim=-1).exp().clamp(max=1)
        nll_N = -log_probs_NK.gather(1, labels_N.long()[:, None])[:, 0]
        return top_N.numpy().astype(np.float32), nll_N.numpy().astype(np.float32)

    (top_N, nll_N), (scaled_top_N, scaled_nll_N) = of(log_probs_NK), of(scaled_NK)
    return Predictions(
        predicted_N=log_probs_NK.argmax(dim=-1).numpy().astype(np.uint16),
        top_N=top_N,
        nll_N=nll_N,
        scaled_top_N=scaled_top_N,
        scaled_nll_N=scaled_nll_N,
    )


def inference(
    job: Job, teachers: Teachers, teacher_costs: Sequence[NetworkCost], student_cost: NetworkCost
) -> dict[str, dict[str, float]]:
    """Multiply-accumulates of an image, and images a second at the batch size of training, by name in the tables.

    Networks of one architecture are timed once: a difference between them would be the clock's.
    """
    with job.eval_feed("test").epoch(0) as batches:
        images_BHWC, _ = next(batches)

    def cost(classify: Classify, macs: float) -> dict[str, float]:
        how: dict[str, Any] = {"device": job.device, "precision": job.precision, "seconds": _TIMED_SECONDS}
        return {"macs": macs, "images_per_s": images_per_second(classify, images_BHWC, **how)}

    E, heads = job.config.members, sum(layer.macs for layer in student_cost.layers if layer.in_head)
    more = {"plain": 0, "be": (E - 1) * student_cost.macs, "hydra": (E - 1) * heads}
    alike: dict[str, dict[str, float]] = {}
    if not job.config.teachers:  # they are of the students' architecture
        alike["plain"] = cost(teachers.classifiers[0].eval(), float(student_cost.macs))
    macs = [float(cost.macs) for cost in teacher_costs]
    found = {
        "teacher ensemble": cost(teachers.eval(), sum(macs)),
        "single teacher": alike.get("plain") or cost(teachers.classifiers[0].eval(), statistics.fmean(macs)),
    }
    for run in job.student_runs():
        kind = run.method.student if run.method.student in more else "plain"
        if run.is_done and kind not in alike:
            classifier, _ = load_network(run.folder / "best.safetensors", builder=job.config.builder)
            alike[kind] = cost(classifier.to(job.device).eval(), float(student_cost.macs + more[kind]))
        if run.is_done:
            found[str(run.method)] = alike[kind]
    return found


def keep(job: Job, teachers: Teachers, test_labels_N: Tensor, named: Sequence[tuple[str, Predictions]]) -> None:
    """Write the files that the report of `job` reads.

    Args:
        test_labels_N: labels of the test images, in the order of its feed.
        named: the predictions of every row of the results, by its name.
    """
    write_predictions(job.out / PREDICTIONS_FILE, test_labels_N.numpy(), named)
    runs: dict[str, Run] = {}
    for run in job.student_runs():
        if run.is_done and run.method.shown != "clean":
            runs.setdefault(str(run.method), run)  # the first seed
    if not runs:
        (job.out / SHOWN_FILE).unlink(missing_ok=True)
        return
    positions = _one_a_class(test_labels_N.numpy())
    images_nHWC = _images(job.eval_feed("test"), positions)
    x_nCHW = images_nHWC.to(job.device).permute(0, 3, 1, 2).to(torch.float32) / 255
    teachers = teachers.eval()
    kl_n, classes_nE = _teachers_at(
        x_nCHW, Networks(teachers, job.make_student(next(iter(runs.values()))), job.precision)
    )
    shown = ShownImages(
        images_nHWC=images_nHWC.numpy(),
        labels_n=test_labels_N.numpy()[positions],
        kl_n=kl_n,
        classes_nE=classes_nE,
        methods={name: _shown(job, run, teachers, x_nCHW) for name, run in runs.items()},
    )
    write_shown(job.out / SHOWN_FILE, shown)


def draw(out: Path, screen: Screen, keep: Callable[[], None] | None = None) -> None:
    """Draw the report of the run in `out`, after `keep` where that is given, which writes what it reads.

    The run is complete without: what goes wrong is one line.
    """
    page = out / REPORT_FILE
    try:
        if keep is not None:
            keep()
        from ensdistill.report.page import write_report  # matplotlib takes its time

        write_report([out], page)
    except Exception as error:  # a library's own kinds too
        text = one_line(str(error) or type(error).__name__)
        screen.warn(f"{page}: not drawn ({text}); all else is kept: python -m ensdistill.report {out}")
    else:
        screen.say(f"the report is {page}")


def cells_of(table: Table) -> dict[str, Any]:
    """The text of a table, as it is printed: its title, headings, and a list for each line."""
    columns = [list(column.cells) for column in table.columns]
    return {
        "title": str(table.title),
        "columns": [str(column.header) for column in table.columns],
        "rows": [list(map(str, cells)) for cells in zip(*columns, strict=True)],
    }


def _shown(job: Job, run: Run, teachers: Teachers, x_nCHW: Tensor) -> Shown:
    """What the finished student of `run` would be shown of the images: the training's own definition."""
    student = job.make_student(run)
    if run.method.has_members:  # others are shown what does not hang on them
        student = job.load_student(run, run.folder / "best.safetensors")
    networks = Networks(teachers, student.eval(), job.precision)
    config = job.step_config(run)
    step = run.training.epochs * job.train_feed(run.training.batch_size, run.seed).num_steps
    counter = counter_of(run.seed, step, 0, x_nCHW.device)
    seed_modules(run.seed, step, 0, x_nCHW.device)
    draws = {"seed": run.seed, "step": step, "counter": counter, "tau": config.tau}
    shown_nCHW, _ = show(run.method.shown, x_nCHW, networks, **draws)  # type: ignore[arg-type]
    kl_n, classes_nE = _teachers_at(shown_nCHW, networks)
    steps_nHWC = (shown_nCHW - x_nCHW).detach().permute(0, 2, 3, 1).cpu().numpy().astype(np.float16)
    return Shown(steps_nHWC=steps_nHWC, kl_n=kl_n, classes_nE=classes_nE)


def _teachers_at(x_nCHW: Tensor, networks: Networks) -> tuple[np.ndarray, np.ndarray]:
    """Disagreement of the teachers at each image, and the classes that they name."""
    logits_nEK = networks.teacher_logits(x_nCHW).transpose(0, 1).float().cpu()
    many = logits_nEK.shape[1] > 1
    kl_n = [pairwise_kld(one_1EK) if many else 0.0 for one_1EK in logits_nEK.split(1)]
    return np.array(kl_n, dtype=np.float32), logits_nEK.argmax(dim=-1).numpy().astype(np.uint16)


def _one_a_class(labels_N: np.ndarray) -> np.ndarray:
    """Places of the first image of each class, of `MAX_SHOWN` classes evenly spaced where there are more."""
    classes, first = np.unique(labels_N, return_index=True)
    chosen = np.unique(np.linspace(0, len(classes) - 1, min(MAX_SHOWN, len(classes))).round().astype(int))
    return first[chosen]


def _images(feed: Feed, positions: np.ndarray) -> Tensor:
    """The images at `positions` of an unshuffled feed, uint8 (n, H, W, C); batches without any are not decoded."""
    images = []
    for position in positions.tolist():
        step, row = divmod(position, feed.rows)
        with feed.epoch(0, step) as batches:
            images_BHWC, _ = next(batches)
            images.append(images_BHWC[row].clone())
    return torch.stack(images)
