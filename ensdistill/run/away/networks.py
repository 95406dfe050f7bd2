"""The networks that `evaluate` measures: of a file one; of a run folder teachers, students, and what they are part of.

A run folder stands for its teachers each by itself and their ensemble, and for its students: the network that each
ships and, where that is an average of members, the ensemble of those members beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.data.feed import Batch
from ensdistill.formats.class_order import in_order
from ensdistill.formats.load import natural_order
from ensdistill.formats.ours import NetworkInfo, load_network, load_student, read_info
from ensdistill.models import Classifier
from ensdistill.models.ensembles import MemberNetworks, Teachers
from ensdistill.models.students import build_student
from ensdistill.run.predict import predict_each
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import read_json


@dataclass(frozen=True, kw_only=True)
class Found:
    """One network to measure, or one ensemble, before it is loaded."""

    key: str
    """Its own name, in tables and results; no two share one."""
    name: str
    """Name of what it is one of: seeds of one method, teachers of one run."""
    file: Path
    """Its file; of the teachers' ensemble the folder."""
    info: NetworkInfo
    """What its file says; of the teachers' ensemble the first's."""
    parts: tuple[str, ...] = ()
    """Keys of the networks whose probabilities it averages: the teachers' ensemble."""
    members: int = 1
    """Number of networks that predict together."""
    is_student: bool = False
    """True for the members of a student, whose file ships their average."""

    @property
    def method(self) -> str:
        """Method of its training, in words, and what of it this is."""
        if self.parts:
            return f"ensemble of {len(self.parts)}"
        return f"{self.info.trained_by}, {self.members} members" if self.is_student else self.info.trained_by


def find_networks(paths: Sequence[Path], say: Callable[[str], None]) -> list[Found]:
    """Find the networks of files and run folders, in the order given.

    Raises:
        UserError: no path, a file that is none of ours, a folder without a trained network, or a path given twice.
    """
    if not paths:
        raise UserError("no file given; expected one or more .safetensors files, or the folder of a run")
    several = len(paths) > 1
    found: list[Found] = []
    for path in paths:
        if path.is_dir():
            found += _of_run(path, f"{path}: " if several else "", say)
        else:
            info = read_info(path)
            found.append(Found(key=str(path), name=str(path), file=path, info=info, members=info.members))
    keys = [one.key for one in found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"{twice}: given twice; give each network once")
    return found


def _of_run(run: Path, prefix: str, say: Callable[[str], None]) -> list[Found]:
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no run's folder (it has no config.json); expected one, or .safetensors files")
    found = []
    teachers = _trained(run / "teachers", say)
    for place, file in enumerate(teachers, start=1):
        key = f"{prefix}single teacher" + (f" {place}" if len(teachers) > 1 else "")
        found.append(Found(key=key, name=f"{prefix}single teacher", file=file, info=read_info(file)))
    if len(teachers) > 1:
        name, keys = f"{prefix}teacher ensemble", tuple(one.key for one in found)
        info = found[0].info
        found.insert(0, Found(key=name, name=name, file=run / "teachers", info=info, parts=keys, members=len(teachers)))
    elif not teachers:
        say(f"{run}: has no teachers of its own; give their files too to see them beside its students")
    files = _trained(run / "students", say)
    infos = [read_info(file) for file in files]
    for file, info in zip(files, infos, strict=True):
        seeds = sum(other.trained_by == info.trained_by for other in infos)
        name = f"{prefix}{info.trained_by}"
        key = name + (f" {file.parent.name.rpartition('-')[2]}" if seeds > 1 else "")
        found.append(Found(key=key, name=name, file=file, info=info, members=info.members))
        if Method.parse(info.method).student == "latentbe":
            found.append(
                Found(
                    key=f"{key}, members",
                    name=f"{name}, members",
                    file=file,
                    info=info,
                    members=_members_of(run),
                    is_student=True,
                )
            )
    if not found:
        raise UserError(f"{run}: no network is trained to the end here; go on with its training (--resume)")
    return found


def _trained(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Files of the networks of one folder that are trained to the end."""
    files = natural_order(list(folder.glob("*/best.safetensors")))
    done = [file for file in files if file.with_name("outcome.json").is_file()]
    if left := [file.parent.name for file in files if file not in done]:
        say(f"{folder}: not trained to the end, and left out: {', '.join(left)}")
    return done


def _members_of(run: Path) -> int:
    members = read_json(run / "config.json").get("members")
    if not isinstance(members, int) or members < 1:
        raise UserError(f"{run / 'config.json'}: members is {members!r}; expected a whole number of at least 1")
    return members


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network, ready to be shown images (B, C, H, W) in [0, 1]."""

    found: Found
    """What it is."""
    network: nn.Module
    """Gives logits (B, K), or (M, B, K) of M members whose probabilities are averaged."""
    members: nn.Module | None
    """Gives logits (M, B, K) of its members, M ≥ 2; None of a single network."""

    def to(self, device: torch.device) -> Loaded:
        """Move it."""
        for module in filter(None, (self.network, self.members)):
            module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self


def load_networks(
    found: Sequence[Found], orders: Mapping[str, Sequence[int] | None], builder: str | None
) -> dict[str, Loaded]:
    """Load networks by their key, each with its logits in the data's order of classes, in evaluation mode.

    Args:
        orders: by key, the place of each class of the data among the network's; None where they are the same.
        builder: see `formats.ours.load_network`.

    Raises:
        UserError: a file that is damaged, or not what its folder says.
    """
    loaded: dict[str, Loaded] = {}
    for one in found:
        if one.parts:
            continue
        order = orders[one.key]
        classifier, _ = load_network(one.file, builder=builder)
        if one.is_student:
            blank = build_student(Method.parse(one.info.method), _copies_of(classifier), E=one.members, seed=0)
            student: nn.Module = load_student(blank, one.file).eval()
            if order is not None:
                student = in_order(student, order)
            loaded[one.key] = Loaded(found=one, network=student, members=student)
            continue
        if order is not None:
            classifier.network = in_order(classifier.network, order)
        loaded[one.key] = Loaded(found=one, network=classifier, members=_members_in(classifier, one.info.num_classes))
    for one in found:
        if one.parts:
            parts = [loaded[key].network for key in one.parts]
            ensemble = Teachers([part for part in parts if isinstance(part, Classifier)], one.info.num_classes)
            loaded[one.key] = Loaded(found=one, network=ensemble, members=ensemble)
    return {one.key: loaded[one.key] for one in found}


def logits_of_each(
    networks: Mapping[str, Loaded],
    batches: Iterable[Batch],
    *,
    by_member: bool,
    device: torch.device,
    precision: Precision,
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (N, M, K) of each network by its key, and labels (N,), of images that are shown to each in turn.

    Args:
        batches: of uint8 images (B, H, W, C) and labels; gone through once.
        by_member: of what is shipped as an ensemble the members' logits, not those of their mean, which are as good
            but for what the members differ in.

    Raises:
        UserError: a network gives a value that is not finite.
    """
    alone = {key: one for key, one in networks.items() if not one.found.parts}
    classifies = {key: one.members if by_member and one.members else one.network for key, one in alone.items()}
    logits, labels_N = predict_each(classifies, batches, device=device, precision=precision)
    for key, logits_NMK in logits.items():
        if not bool(logits_NMK.isfinite().all()):
            raise UserError(
                f"{key}: gives a value that is not finite; the network has diverged (or overflows in bf16: try fp32)"
            )
    for key, one in networks.items():
        if one.found.parts:
            logits[key] = torch.cat([logits[part] for part in one.found.parts], dim=1)
    return {key: logits[key] for key in networks}, labels_N


def _copies_of(classifier: Classifier) -> Callable[[int], Classifier]:
    return lambda seed: copy.deepcopy(classifier)


def _members_in(classifier: Classifier, num_classes: int) -> nn.Module | None:
    """The members of what is shipped as an ensemble, sharing its tensors."""
    if not isinstance(classifier.network, MemberNetworks):
        return None
    return Teachers([classifier.around(member) for member in classifier.network.members], num_classes)
