"""What leaves a training: what a student ships, the student itself beside it, and a network recalibrated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from ensdistill.formats.ours import NetworkInfo, save_network
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.models.students import Student
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write


def ship(student: Student, path: Path, info: NetworkInfo) -> None:
    """Write what `student` ships to `path`; beside it, where it has members, the student itself (`student_path`)."""
    network = student.shipped().network
    members = len(network.members) if isinstance(network, MemberNetworks) else 1
    save_network(path, network, replace(info, members=members))
    if student.E > 1:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
        with atomic_write(student_path(path)) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors))


def student_path(path: Path) -> Path:
    """Where the student lies whose shipped network lies at `path`."""
    return path.with_name(f"{path.stem}-student.safetensors")


def load_student(student: Student, path: Path) -> Student:
    """Load into `student` the one whose shipped network lies at `path`, and return it.

    Raises:
        UserError: the file beside `path` is missing, damaged or another network's.
    """
    file = student_path(path)
    try:
        student.load_state_dict(safetensors.torch.load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{file}: not the student of this run ({first}); delete {path.parent} to train it again"
        ) from error
    return student
