"""What a run folder was trained on: `data.json`, compared with what a later command is given.

The configuration names data and teachers by their place; what lies there may change between a stop and `--resume`, or
between the teachers and a later student, and the same may come to lie elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch

from ensdistill.config.configs import Config
from ensdistill.data.dataset import DataSet
from ensdistill.data.prepare import source_key
from ensdistill.data.sources.base import Source
from ensdistill.formats.ours import read_info
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, read_json

RECORD_FILE = "data.json"
_ADVICE = "choose another --out, or give the {} of before"


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data, and teachers that were given, of all that was trained in a run folder."""

    source_key: str
    """`DataSet.source_key`: it changes with names, labels and bytes of the data."""
    class_names: tuple[str, ...]
    """A name for each label, in order."""
    counts: Mapping[str, int]
    """Number of images in each split."""
    teachers: str | None
    """Hash of the teachers of `--teachers`; None where they are trained here."""


def compared_fields(out: Path, config: Config) -> set[str]:
    """Fields of the configuration that are places, of which what lies there is compared: it may have moved."""
    record = _read(out) if _holds_training(out) else None
    if record is None:
        return set()
    return {"data"} | ({"teachers"} if config.teachers and record.teachers is not None else set())


def require_same_data(out: Path, source: Source, image_size: int | None, say: Callable[[str], None]) -> None:
    """Check that what was trained in `out`, if anything was, was trained on `source`; before it is written.

    Raises:
        UserError: it was trained on other data.
    """
    if not _holds_training(out):
        return
    record = _read(out)
    if record is None:  # of a version that kept none
        for file in sorted(out.glob("*/*/best.safetensors")):
            if (difference := _other_names(read_info(file).class_names, source.class_names)) is not None:
                raise _refusal(out, f"other data ({difference})", "data")
        say(f"{out}: keeps no key of the data that it was trained on: whether they changed since cannot be checked")
    elif record.source_key != source_key(source, image_size):
        raise _refusal(out, f"other data ({_difference(record, source)})", "data")


def require_same_teachers(out: Path, teachers: Teachers) -> None:
    """Check that the students in `out`, if there are any, learned from these very `teachers`.

    Raises:
        UserError: they learned from others.
    """
    record = _read(out) if _holds_training(out) else None
    if record is not None and record.teachers != _hash(teachers):
        raise _refusal(out, "other teachers (the files of --teachers changed since)", "teachers")


def write_record(out: Path, data: DataSet, teachers: Teachers | None) -> None:
    """Write what the run in `out` is trained on, before anything is; afterwards the record stays as it is."""
    if _holds_training(out):
        return
    record = Record(
        source_key=data.source_key,
        class_names=data.class_names,
        counts=data.counts,
        teachers=None if teachers is None else _hash(teachers),
    )
    with atomic_write(out / RECORD_FILE) as temporary:
        temporary.write_text(json.dumps(msgspec.to_builtins(record), indent=1) + "\n", encoding="utf-8")


def _holds_training(out: Path) -> bool:
    names = ("metrics.jsonl", "checkpoint.pt", "outcome.json")
    return any(any(out.glob(f"*/*/{name}")) for name in names)


def _read(out: Path) -> Record | None:
    path = out / RECORD_FILE
    if not path.exists():
        return None
    try:
        return msgspec.convert(read_json(path), Record)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable ({error}); expected what a run wrote of its data: choose another --out, or "
            "delete it to go on without the comparison"
        ) from error


def _refusal(out: Path, what: str, kind: str) -> UserError:
    return UserError(f"{out}: holds a run on {what}; {_ADVICE.format(kind)}")


def _difference(record: Record, source: Source) -> str:
    if (difference := _other_names(record.class_names, source.class_names)) is not None:
        return difference
    for name, split in source.splits.items():
        if (there := record.counts.get(name)) != len(split.labels):
            return f"{there:,} {name} images there, {len(split.labels):,} here"
    return "as many images of the same classes, but images, labels, names or their order are others"


def _other_names(there: tuple[str, ...], here: tuple[str, ...]) -> str | None:
    """Say the first difference between class names, None where there is none."""
    if len(there) != len(here):
        return f"{len(there):,} classes there, {len(here):,} here"
    for k, (theirs, ours) in enumerate(zip(there, here, strict=True)):
        if theirs != ours:
            return f"class {k} is called '{theirs}' there, '{ours}' here"
    return None


def _hash(teachers: Teachers) -> str:
    """Hash what the teachers compute with: weights, statistics, normalisation; not their files, which gain measures."""
    digest = hashlib.sha256()
    for classifier in teachers.classifiers:
        assert isinstance(classifier, Classifier)
        pixels = {"pixel_mean": classifier.pixel_mean, "pixel_std": classifier.pixel_std}
        for name, tensor in (classifier.state_dict() | pixels).items():
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
