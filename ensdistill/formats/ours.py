"""Our own file of a network: one safetensors file that needs nothing of the training code.

The tensors have exactly the names of the plain network's `state_dict()`, so that
`network.load_state_dict(safetensors.torch.load_file(path))` is all that another program needs. The header's metadata,
one JSON value a key, say everything else: architecture, classes, pixel mean and std, fitted temperature, how to
predict, where the network comes from, and the digest of it all, which is compared when the file is read. An ensemble
that is shipped as such has the names `members.{m}.…`, and `members` says how many. `ship` writes what a student ships,
and the student itself beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ensdistill.config.configs import MAX_IMAGE_SIDE
from ensdistill.formats.pytorch import call_builder
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.models.students import Student
from ensdistill.runtime.errors import UserError, first_names
from ensdistill.runtime.files import atomic_write

FORMAT_KEY = "ensdistill_format"
FORMAT = 1
DIGEST_KEY = "ensdistill_sha256"
"""Key of the digest in the metadata; files of earlier versions have none."""
_STUDENT_ENDING = "-student.safetensors"
_EXPECTED = "expected a .safetensors file that ensdistill wrote"
_MAX_HEADER = 100 << 20  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """Everything that a network's file says about the network.

    Raises:
        UserError: the fields contradict each other.
    """

    architecture: str
    """A name that `models.build` knows, or the import path `package.module:function` of somebody else's builder."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The builder's keyword arguments, JSON values. Empty with a name: classes and image shape say the rest."""
    class_names: tuple[str, ...]
    """A name for each of the K classes, in the order of the logits."""
    image_shape: tuple[int, int, int]
    """Shape (H, W, C) of the images that it was trained on."""
    pixel_mean: tuple[float, ...]
    """Mean (C,) of pixels in [0, 1], subtracted before the network."""
    pixel_std: tuple[float, ...]
    """Standard deviation (C,) of pixels in [0, 1], divided by before the network."""
    method: str
    """Method of its training: `ce`, `kd`, `latentbe+tdiv-sdiv`, …"""
    averaged: str = ""
    """Average over time that its weights are: `EMA 0.999`, `SWA 5`; nothing for those of one moment."""
    members: int = 1
    """Networks in the file whose probabilities are averaged; 1 for a plain network."""
    temperature: float | None = None
    """Fitted on validation images, see `metrics.fit_temperature`; None where it was not."""
    recipe: str = ""
    """Name of the recipe that it was trained by."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Measured values by name: `test_acc`, `valid_nll`, …"""
    commit: str = ""
    """Commit of ensdistill that wrote the file."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that it was trained with."""

    def __post_init__(self) -> None:
        channels, most = self.image_shape[2], sys.float_info.max  # whole numbers may be beyond floats
        for name, values in (("pixel_mean", self.pixel_mean), ("pixel_std", self.pixel_std)):
            if len(values) != channels or not all(-most <= value <= most for value in values):
                raise UserError(f"{name}: got {list(values)}, expected {channels} finite numbers, one a channel")
        if min(self.pixel_std) <= 0:
            raise UserError(f"pixel_std: got {list(self.pixel_std)}, expected positive numbers")
        if min(self.image_shape) < 1 or max(self.image_shape[:2]) > MAX_IMAGE_SIDE:
            raise UserError(
                f"image_shape: got {list(self.image_shape)}, expected positive height, width and channels, "
                f"of at most {MAX_IMAGE_SIDE} pixels a side"
            )
        if len(self.class_names) < 2:
            raise UserError(f"class_names: got {list(self.class_names)}, expected at least two classes")
        if self.members < 1:
            raise UserError(f"members: got {self.members}, expected at least 1")
        if self.temperature is not None and not 0 < self.temperature <= most:
            raise UserError(f"temperature: got {self.temperature}, expected a positive number or none")
        if self.arguments and not self.is_foreign:
            raise UserError(
                f"arguments: got {dict(self.arguments)} for '{self.architecture}', expected none with a name"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def trained_by(self) -> str:
        """Method, and average over time, in words."""
        return f"{self.method}, {self.averaged}" if self.averaged else self.method

    @property
    def is_foreign(self) -> bool:
        """True where a function outside ensdistill builds the network."""
        return ":" in self.architecture

    @property
    def build_arguments(self) -> Mapping[str, Any]:
        """Keyword arguments that build the network."""
        if self.is_foreign:
            return self.arguments
        H, _, C = self.image_shape
        return {"num_classes": self.num_classes, "in_channels": C, "image_size": H}


def save_network(path: str | Path, network: nn.Module, info: NetworkInfo) -> None:
    """Write `network`, which takes normalised images and gives logits, and what `info` says about it.

    Args:
        network: a plain network, or `MemberNetworks` where `info.members` is above 1. Without its `Classifier`.

    Raises:
        UserError: `path` cannot be written. What was there before is then still whole.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(network_bytes(network, info))


def network_bytes(network: nn.Module, info: NetworkInfo, more: Mapping[str, str] | None = None) -> bytes:
    """Make the bytes of the file that `save_network` writes.

    Args:
        more: metadata for other readers, which we do not read.
    """
    assert not isinstance(network, Classifier), "the normalisation belongs into `info`"
    assert info.members == (len(network.members) if isinstance(network, MemberNetworks) else 1)
    # clone: safetensors refuses tensors that share memory (tied weights) and those that are not contiguous
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in network.state_dict().items()
    }
    return _bytes(tensors, {**(more or {}), **to_metadata(info)})


def _bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    digest = {DIGEST_KEY: json.dumps(_digest(metadata, tensors))}
    return safetensors.torch.save(dict(tensors), metadata={**metadata, **digest})


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Hash everything that a file says, but for the digest itself; the order in the file does not matter."""
    digest = hashlib.sha256()
    texts = sorted((key, value) for key, value in metadata.items() if key != DIGEST_KEY)
    digest.update(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_network(path: str | Path, *, builder: str | None = None) -> tuple[Classifier, NetworkInfo]:
    """Read the classifier that `save_network` wrote, on the CPU, in evaluation mode; `hub` reads folders too.

    Args:
        builder: a file whose network somebody else's function builds names that function, and loading calls it: it is
            called only where it is the one given here.

    Raises:
        UserError: not such a file, cut short, metadata missing or damaged, an unknown architecture, a builder that was
            not allowed, or tensors that do not fit the network.
    """
    path = Path(path)
    saved = read_saved(path)
    return saved.build(path, builder), saved.info


def read_info(path: str | Path) -> NetworkInfo:
    """Read the metadata of a file that `save_network` wrote, without any tensor.

    Raises:
        UserError: as `load_network`, for everything that is not about tensors and building.
    """
    return read_saved(Path(path), with_tensors=False).info


class SavedNetwork(NamedTuple):
    """The content of a file of ours, before its network is built."""

    info: NetworkInfo
    tensors: Mapping[str, Tensor]
    """Tensors by name, the network's `state_dict()`."""

    def build(self, path: Path, builder: str | None) -> Classifier:
        """Build the classifier; `path` and `builder`: see `load_network`."""
        info = self.info
        prefixes = [""]
        if info.members > 1:
            found = len({key.split(".")[1] for key in self.tensors if re.match(r"members\.\d+\.", key)})
            if found != info.members:
                raise UserError(
                    f"{path}: tensors of {found} members, its metadata say {info.members}; "
                    "the file is damaged: export the network again"
                )
            prefixes = [f"members.{m}." for m in range(info.members)]
        if not info.is_foreign:  # metadata are anybody's: no memory for what the file cannot fill
            with torch.device("meta"):
                _require_fitting(_build(info, path, builder), prefixes, self.tensors, path)
        networks = [_build(info, path, builder) for _ in prefixes]
        if info.is_foreign:
            _require_fitting(networks[0], prefixes, self.tensors, path)
        network = MemberNetworks(networks) if info.members > 1 else networks[0]
        network.load_state_dict(self.tensors)
        return Classifier(network, info.pixel_mean, info.pixel_std).eval()


def read_saved(path: Path, *, with_tensors: bool = True) -> SavedNetwork:
    """Read a file that `save_network` wrote.

    Raises:
        UserError: not such a file, cut short, or metadata missing or damaged.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
        metadata, tensors = read_safetensors(path, with_tensors=with_tensors)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {_EXPECTED}") from error
    except SafetensorError as error:
        if is_safetensors(head):
            raise UserError(
                f"{path}: the file is cut short or damaged ({error!s:.200}); copy or export it again"
            ) from error
        raise UserError(f"{path}: not a safetensors file ({error!s:.200}); {_EXPECTED}") from error
    return SavedNetwork(info_of(metadata, path), tensors)


def is_safetensors(head: bytes) -> bool:
    """Recognise safetensors by a file's first nine bytes: the length of a JSON header, then the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_HEADER


def read_safetensors(path: Path, *, with_tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of anybody's safetensors file.

    Raises:
        UserError: the file has a digest of ours, which is not that of its content.
    """
    with safe_open(path, framework="pt") as file:
        keys = file.keys() if with_tensors else []
        metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in keys}
    if with_tensors and DIGEST_KEY in metadata and metadata[DIGEST_KEY] != json.dumps(_digest(metadata, tensors)):
        raise UserError(
            f"{path}: the file is damaged, or was changed: its content has another digest than the {DIGEST_KEY} in its "
            "metadata; copy or export it again (who changed it on purpose leaves that key out)"
        )
    return metadata, tensors


def _how_to_predict(info: NetworkInfo) -> str:
    H, W, C = info.image_shape
    network = "network((x - pixel_mean) / pixel_std)"
    if info.members == 1:
        probs = f"p = softmax({network})"
    else:
        probs = f"p = mean over m < {info.members} of softmax({network}), the network with the tensors members.{{m}}.…"
    text = f"x: float images ({C}, {H}, {W}) in [0, 1]; {probs}"
    return text + "; calibrated: softmax(log(p + 1e-8) / temperature)" if info.temperature is not None else text


def to_metadata(info: NetworkInfo) -> dict[str, str]:
    """Make the metadata that say what `info` does: one JSON value a key. `info_of` reads them."""
    values: dict[str, Any] = {
        FORMAT_KEY: FORMAT,
        "architecture": info.architecture,
        "arguments": dict(info.build_arguments),
        "class_names": info.class_names,
        "image_shape": info.image_shape,
        "pixel_mean": info.pixel_mean,
        "pixel_std": info.pixel_std,
        "method": info.method,
        "members": info.members,
        "temperature": info.temperature,
        "prediction": _how_to_predict(info),
        "recipe": info.recipe,
        # JSON has no nan and no infinity
        "measures": {name: value if math.isfinite(value) else None for name, value in info.measures.items()},
        "commit": info.commit,
        "versions": dict(info.versions),
    }
    if info.averaged:
        values["averaged"] = info.averaged
    return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in values.items()}


# By key: the type of its JSON value, and that in words.
_METADATA: dict[str, tuple[Any, str]] = {
    "architecture": (str, "a text"),
    "arguments": (dict[str, Any], "an object"),
    "class_names": (tuple[str, ...], "a list of texts"),
    "image_shape": (tuple[int, int, int], "three whole numbers"),
    "pixel_mean": (tuple[int | float, ...], "a list of numbers"),
    "pixel_std": (tuple[int | float, ...], "a list of numbers"),
    "method": (str, "a text"),
    "averaged": (str, "a text"),
    "members": (int, "a whole number"),
    "temperature": (int | float | None, "a number or null"),
    "recipe": (str, "a text"),
    "measures": (dict[str, int | float | None], "an object of numbers"),
    "commit": (str, "a text"),
    "versions": (dict[str, str], "an object of texts"),
}

_OPTIONAL = {"averaged"}  # which most files and those of earlier versions have nothing to say about


def info_of(metadata: Mapping[str, str], path: Path) -> NetworkInfo:
    """Parse the metadata of the file at `path`.

    Raises:
        UserError: they are another program's, another version's, incomplete or damaged.
    """
    if FORMAT_KEY not in metadata:
        if path.name.endswith(_STUDENT_ENDING):
            shipped = path.name.removesuffix(_STUDENT_ENDING) + ".safetensors"
            raise UserError(
                f"{path}: the tensors of a student in training, with its members; give the network that was made of "
                f"them, {shipped} beside it"
            )
        raise UserError(f"{path}: no '{FORMAT_KEY}' in its metadata, another program wrote it; {_EXPECTED}")
    if metadata[FORMAT_KEY] != str(FORMAT):
        raise UserError(f"{path}: of format {metadata[FORMAT_KEY]}, this version reads {FORMAT}; update ensdistill")
    values: dict[str, Any] = {}
    for key, (kind, expected) in _METADATA.items():
        if key in _OPTIONAL and key not in metadata:
            continue
        if key not in metadata:
            raise UserError(f"{path}: its metadata lack '{key}', {expected}; the file is damaged: export it again")
        try:
            values[key] = msgspec.json.decode(metadata[key], type=kind)
        except msgspec.DecodeError as error:
            raise UserError(
                f"{path}: '{key}' in its metadata is {metadata[key][:80]}, expected {expected}; the file is damaged: "
                "export it again"
            ) from error
    if ":" not in values["architecture"]:
        values["arguments"] = {}
    try:
        values["measures"] = {k: math.nan if v is None else float(v) for k, v in values["measures"].items()}
        return NetworkInfo(**values)
    except (UserError, OverflowError) as error:
        raise UserError(f"{path}: {error}; the file is damaged: export it again") from error


def _build(info: NetworkInfo, path: Path, builder: str | None) -> nn.Module:
    if info.is_foreign and info.architecture != builder:
        raise UserError(
            f"{path}: its network is built by {info.architecture}, which is not part of ensdistill; "
            f"give --builder {info.architecture} (in training --teacher-builder) if you trust the file to call it"
        )
    try:
        if info.is_foreign:
            return call_builder(info.architecture, info.arguments)
        return build(info.architecture, **info.build_arguments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _require_fitting(network: nn.Module, prefixes: Sequence[str], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that `tensors` are those of `network`, once for each of the prefixes of their names."""
    state = network.state_dict()
    expected = {prefix + key: value.shape for prefix in prefixes for key, value in state.items()}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    if missing or unexpected:
        raise UserError(
            f"{path}: its tensors do not fit its architecture: missing {first_names(sorted(missing), 'none')}, "
            f"unexpected {first_names(sorted(unexpected), 'none')}; export the network again with this version"
        )
    for key, value in tensors.items():
        if value.shape != expected[key]:
            raise UserError(
                f"{path}: {key} has shape {tuple(value.shape)}, its architecture has {tuple(expected[key])}; "
                "export the network again with this version"
            )


def ship(student: Student, path: Path, info: NetworkInfo) -> None:
    """Write what `student` ships to `path`; beside it, where it has members, the student itself (`student_path`)."""
    network = student.shipped().network
    members = len(network.members) if isinstance(network, MemberNetworks) else 1
    save_network(path, network, replace(info, members=members))
    if student.E > 1:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
        with atomic_write(student_path(path)) as temporary:
            temporary.write_bytes(_bytes(tensors, {}))


def student_path(path: Path) -> Path:
    """Name the file of the student whose shipped network lies at `path`."""
    return path.with_name(path.stem + _STUDENT_ENDING)


def load_student(student: Student, path: Path) -> Student:
    """Load into `student` the one whose shipped network lies at `path`, and return it.

    Raises:
        UserError: the file beside `path` is missing, damaged or another network's.
    """
    file = student_path(path)
    try:
        student.load_state_dict(read_safetensors(file)[1])
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{file}: not the student of this run ({first}); delete {path.parent} to train it again"
        ) from error
    return student
