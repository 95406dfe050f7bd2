"""Every layer of a step measured before the first step, so that no measurement falls into training.

The step's passes run once on tensors without values and say which convolutions they are made of.
"""

from __future__ import annotations

import copy

import torch

from ensdistill.config.methods import Method
from ensdistill.engine.launch_key import Key
from ensdistill.engine.networks import KernelNetworks, Networks
from ensdistill.engine.operations import RecordingOperations, TunedOperations
from ensdistill.formats.load import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.precision import Precision
from ensdistill.training.teachers_step import TeacherNetworks


def record_step(
    teachers: Teachers | None,
    student: Student,
    method: Method,
    *,
    B: int,
    image_shape: tuple[int, int, int],
    precision: Precision,
) -> RecordingOperations:
    """The convolutions of one training step (`keys`), how often each runs, the `passes` between them, and `notes`.

    Args:
        teachers, student: copied without their values, and left alone.
        B: images a step.
        image_shape: (H, W, C).
    """
    teachers = None if teachers is None else copy.deepcopy(teachers).to("meta")
    operations = RecordingOperations()
    networks = KernelNetworks(teachers, copy.deepcopy(student).to("meta"), precision, operations)
    operations.notes = networks.notes
    operations.clear()  # the teachers' weights are laid out once a run
    H, W, C = image_shape
    with torch.device("meta"):
        x_BCHW = torch.empty(B, C, H, W)
        # what has no kernels runs through the modules: there is nothing of it to record
        if networks.frozen is not None and teachers is not None:
            if method.shown in ("tdiv", "tdiv-sdiv"):
                with_student = method.shown == "tdiv-sdiv" and networks.frozen_student is not None
                networks.divergence_gradient(x_BCHW, (0, teachers.E - 1), with_student=with_student)
            elif method.shown in ("ods", "confods"):
                networks.ods_gradient(x_BCHW, 0, torch.empty(B, teachers.num_classes), 4.0)
            networks.teacher_logits(x_BCHW)
        if networks.training is not None:
            networks.student_logits(x_BCHW).sum().backward()
    return operations


def record_teachers_step(
    networks: TeacherNetworks, *, B: int, image_shape: tuple[int, int, int]
) -> RecordingOperations:
    """The same of a step of teachers that train together, `B` images each; `networks` is left alone."""
    operations = RecordingOperations()
    classifiers = [networks.together.classifier(m) for m in range(networks.together.E)]
    copied = TeacherNetworks(classifiers, networks.precision, operations, torch.device("meta"))
    operations.notes = copied.notes
    operations.clear()
    H, W, C = image_shape
    if copied.training is not None:
        x_EBCHW = torch.empty(len(classifiers), B, C, H, W, device="meta")
        with torch.device("meta"):
            copied.student_logits(x_EBCHW).sum().backward()
    return operations


def unmeasured(
    networks: Networks, method: Method, *, B: int, image_shape: tuple[int, int, int]
) -> tuple[TunedOperations, list[Key]] | None:
    """What a step of `networks` runs and nobody has measured on this device yet, and where to measure it.

    None where nothing is, or where nothing has to be: all but `--backend auto` on a GPU.
    """
    tuned = getattr(networks, "operations", None)
    if not isinstance(tuned, TunedOperations) or not tuned.measures:
        return None
    if isinstance(networks, TeacherNetworks):
        recorded = record_teachers_step(networks, B=B, image_shape=image_shape)
    else:
        recorded = record_step(
            networks.teachers, networks.student, method, B=B, image_shape=image_shape, precision=networks.precision
        )
    keys = [key for key in recorded.keys if tuned.table.get(key) is None]
    return (tuned, keys) if keys else None
