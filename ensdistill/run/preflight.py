"""Checks of a job before anything is trained: whatever can be refused is refused here, with what to do about it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ensdistill.config.configs import Config
from ensdistill.config.methods import Method
from ensdistill.costs.dry_run import require_variance
from ensdistill.costs.memory import require_fitting
from ensdistill.data.prepare import many_sizes
from ensdistill.data.sources.content_hash import file_hash
from ensdistill.formats.load import check_both_modes, find_files
from ensdistill.models.batch_ensemble import check_members
from ensdistill.models.students import BatchEnsembleStudent
from ensdistill.monitor.memory import Prediction
from ensdistill.runtime.errors import UserError

if TYPE_CHECKING:
    from ensdistill.run.job import Job


def rates_in_words(config: Config) -> str:
    """Learning rate and weight decay of students and, where they are trained, of teachers."""
    trained = ({} if config.teachers else {"teachers": config.teacher}) | {"students": config.student}
    return "; ".join(
        f"learning rate {one.lr:g}, weight decay {one.weight_decay:g} ({who})" for who, one in trained.items()
    )


def refuse_unfinished(out: Path) -> None:
    """Refuse a run folder with an unfinished training: for a command without `--resume`."""
    checkpoints = sorted(out.glob("*/*/checkpoint.pt"))
    unfinished = [path for path in checkpoints if not path.with_name("outcome.json").exists()]
    if unfinished:
        raise UserError(
            f"{unfinished[0].parent}: holds an unfinished run; add --resume to go on with it, or choose another --out"
        )


def require_same_files(job: Job) -> None:
    """Check that the same images, and teachers of `--teachers`, lie on the machines of all processes.

    Raises:
        UserError: on every process, the first file that differs.
    """
    if job.ranks.size == 1:
        return
    files = [split.path for split in job.data.splits.values()]
    files += find_files(job.config.teachers) if job.config.teachers else []
    job.ranks.require_same({str(path): _content(path) for path in files})


def _content(path: Path) -> str:
    try:
        return f"sha256 {file_hash(path)[:12]}"
    except UserError:
        return "no file"  # others may have it: all say so


def require_image_size(config: Config, *, vary: bool) -> None:
    """Check that images which `vary` in size, or are cut at random, are given one size.

    `vary`: False where that is not known yet.
    """
    if config.image_size is None and (vary or config.crop == "random-resized"):
        raise many_sizes(config.source)


def require_fitting_images(job: Job) -> None:
    """Check that the images have a size, and that the random crop suits it."""
    config = job.config
    require_image_size(config, vary=job.data.image_shape is None)
    H, W, _ = job.image_shape
    if config.crop == "pad" and config.pad >= min(H, W):
        raise UserError(f"pad: got {config.pad}, expected less than the side of the images, {min(H, W)} pixels")


def require_fitting_network(job: Job) -> None:
    """Check that the network takes the images, gives their classes and can train, and that its members stay apart."""
    config, shape = job.config, job.image_shape
    classifier = job.make_classifier(0)
    check_both_modes(classifier, config.network, num_classes=job.data.num_classes, image_shape=shape)
    trainings = {"student.batch-size": config.student}
    if not config.teachers:
        trainings["teacher.batch-size"] = config.teacher
    for option, training in trainings.items():
        rows = training.batch_size if config.sync_bn else len(job.ranks.share(training.batch_size))
        require_variance(classifier, rows, shape, option)
    if config.builder is None or job.command.stage == "teachers":
        return
    H, W, C = shape
    for run in job.student_runs():
        student = job.make_student(run)
        if isinstance(student, BatchEnsembleStudent):  # somebody else's may mix what belongs to the members
            check_members(student.classifier.network, torch.rand(2, C, H, W, device=job.device))


def require_outcomes(job: Job) -> None:
    """Check that the record of every training that is finished can be read: the tables at the end need them."""
    for run in (*job.teacher_runs(), *job.student_runs()):
        if run.is_done:
            run.outcome()


def require_space(job: Job) -> None:
    """Check that the disk has room for the exported files of every run, the members beside them, and two checkpoints.

    There are two checkpoints while one replaces the other.
    """
    network_bytes = 4 * sum(p.numel() for p in job.make_classifier(0).parameters())
    updates = job.config.updates
    needed = 2 * updates.copies * network_bytes
    for run in (*job.teacher_runs(), *job.student_runs()):
        shipped = job.config.members if run.method.student in ("be", "hydra") else 1
        needed += 0 if run.is_done else updates.files * network_bytes * (shipped + run.method.has_members)
    free = shutil.disk_usage(job.out).free
    if free < needed:
        raise UserError(
            f"{job.out}: {free / 1e6:,.0f} MB are free on this disk, the run needs {needed / 1e6:,.0f} MB; "
            "free some, or choose another --out"
        )


def require_memory(job: Job) -> dict[tuple[Method, int, bool], Prediction]:
    """Check that the device has what every training that is to come takes of it.

    Returns: the predictions, by `Run.memory_key`.
    """
    stages = {"teachers": job.teacher_runs(), "distill": job.student_runs(), "evaluate": []}
    predictions: dict[tuple[Method, int, bool], Prediction] = {}
    for run in stages.get(job.command.stage, [*job.teacher_runs(), *job.student_runs()]):
        key = run.memory_key
        if not run.is_done and key not in predictions:
            option = f"{'student' if run.is_student else 'teacher'}.batch-size"
            rows = len(job.ranks.share(run.training.batch_size))
            predictions[key] = require_fitting(job.workload(run), rows, capacity=job.room(run), option=option)
    return predictions
