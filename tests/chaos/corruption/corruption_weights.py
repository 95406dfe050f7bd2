"""Kinds of weights: our networks and students, others' in three forms, checkpoints, golden files."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import safetensors.torch
import torch
from corruption import (
    DAMAGE,
    JSON_VALUES,
    Damage,
    Kind,
    Rng,
    SetAside,
    inside_zip,
    other_array,
    other_json,
    zip_that_claims,
)
from networks import foreign_network, move_, small_classifier, small_state
from small_golden import small_golden

from ensdistill.formats import ours
from ensdistill.formats.golden import Golden
from ensdistill.formats.load import load_teachers
from ensdistill.formats.ours import NetworkInfo, load_network, load_student, read_info, save_network, ship
from ensdistill.training.checkpoint import checkpoint_step, save_checkpoint
from ensdistill.training.log import Log
from ensdistill.training.loop import Loop
from ensdistill.verify import Replay

ROOT = Path(__file__).parents[3]
_ZIPPED = inside_zip({".npy": (other_array, *DAMAGE)})
_TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


def _odd_tensor(tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    change = int(rng.integers(5)) if tensor.is_floating_point() and tensor.ndim else 0
    if change == 0:
        return tensor.to(_TYPES[int(rng.integers(len(_TYPES)))])
    if change == 1:
        return tensor.reshape(-1)[: max(0, tensor.numel() - int(rng.integers(3)))]
    if change == 2:
        return tensor[None]
    if change == 3:
        return tensor.new_zeros(()).expand(1 << 31, 4) if rng.random() < 0.3 else tensor[..., :0]
    odd = tensor.clone()
    odd.view(-1)[:1] = (float("nan"), float("inf"), 1e30)[int(rng.integers(3))]
    return odd


# ---- ours -----------------------------------------------------------------------------------------------------------


def _info(**more: Any) -> NetworkInfo:
    return NetworkInfo(
        architecture="wrn10x1", class_names=tuple("abcdefg"), image_shape=(9, 9, 3), pixel_mean=(0.4,) * 3,
        pixel_std=(0.3,) * 3, method="ce", temperature=1.5, measures={"test_acc": 0.5}, versions={"torch": "2"}, **more,
    )  # fmt: skip


def _forged_ours(data: bytes, rng: Rng) -> bytes:
    """A file of ours with other metadata or tensors, and the digest of just that, or none."""
    tensors = safetensors.torch.load(data)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    del metadata[ours.DIGEST_KEY]
    if rng.random() < 0.7 and metadata:
        key = list(metadata)[int(rng.integers(len(metadata)))]
        change = rng.random()
        if change < 0.8:
            try:
                metadata[key] = other_json(metadata[key].encode(), rng).decode()
            except ValueError:
                metadata[key] = "{"
        elif change < 0.9:
            del metadata[key]
        else:
            metadata[key] = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
    else:
        name = list(tensors)[int(rng.integers(len(tensors)))]
        tensors[name] = _odd_tensor(tensors[name], rng)
        if tensors[name].numel() > 1 << 20:
            tensors[name] = tensors[name][:1].clone()
        if rng.random() < 0.2:
            tensors[f"{name}x"] = tensors.pop(name)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if rng.random() < 0.8:
        metadata[ours.DIGEST_KEY] = json.dumps(ours._digest(metadata, tensors))
    return safetensors.torch.save(tensors, metadata=metadata)


def _forged_header(data: bytes, rng: Rng) -> bytes:
    """Safetensors whose header says something else: types, shapes, places."""
    size = int.from_bytes(data[:8], "little")
    head = other_json(data[8 : 8 + size], rng)
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def _in_order(data: bytes) -> bytes:
    """The same safetensors with its metadata sorted, which the library writes in another order each time."""
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    head["__metadata__"] = dict(sorted(head.get("__metadata__", {}).items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :] if len(text) <= size else data


def our_network(folder: Path) -> Kind:
    save_network(folder / "best.safetensors", small_classifier(1).network, _info())

    def read(at: Path) -> Any:
        path = at / "best.safetensors"
        read_info(path)
        classifier, info = load_network(path)
        return classifier.state_dict(), info

    files = {"best.safetensors": _in_order((folder / "best.safetensors").read_bytes())}
    return Kind(
        files=files,
        damaged=tuple(files),
        read=read,
        has_digest=True,
        forged=(_forged_ours, _forged_ours, _forged_header),
    )


def our_student(folder: Path) -> Kind:
    state, _ = small_state("latentbe", E=2)
    ship(state.student, folder / "best.safetensors", _info())

    def read(at: Path) -> Any:
        return load_student(copy.deepcopy(state.student), at / "best.safetensors").state_dict()

    file = "best-student.safetensors"
    return Kind(
        files={file: _in_order((folder / file).read_bytes())}, damaged=(file,), read=read, has_digest=True,
        forged=(_forged_ours, _forged_header),
    )  # fmt: skip


# ---- others', as teachers -------------------------------------------------------------------------------------------


def _teacher(file: str, *, official: bool = False) -> Callable[[Path], Any]:
    """Read the file as `--teachers` does."""

    def read(at: Path) -> Any:
        how: dict[str, Any] = (
            {} if official else {"builder": "networks:foreign_network", "builder_args": '{"width": 4}'}
        )
        channels = 3 if official else 1
        teachers = load_teachers(
            [at / file], num_classes=10, image_shape=(8, 8, channels), pixel_mean=[0.4] * channels,
            pixel_std=[0.3] * channels, class_names=tuple("0123456789"), **how,
        )  # fmt: skip
        return [teacher.state_dict() for teacher in teachers.classifiers]

    return read


def _their_tensors() -> dict[str, torch.Tensor]:
    network = foreign_network(4)
    move_(network, 5)
    return network.state_dict()


def their_safetensors(folder: Path) -> Kind:
    data = safetensors.torch.save(_their_tensors(), metadata={"format": "pt"})

    def other_tensors(data: bytes, rng: Rng) -> bytes:
        tensors = safetensors.torch.load(data)
        name = list(tensors)[int(rng.integers(len(tensors)))]
        odd = _odd_tensor(tensors[name], rng)
        tensors[name] = odd.contiguous() if odd.numel() < 1 << 20 else odd[:1].contiguous()
        return safetensors.torch.save(tensors)

    return Kind(
        files={"t.safetensors": data}, damaged=("t.safetensors",), read=_teacher("t.safetensors"), has_digest=False,
        forged=(_forged_header, other_tensors),
    )  # fmt: skip


def _saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 40, 10**30, float("nan"), float("inf"), "", "x", "\ud800", b"x", [], [[]], {}, {"a": 1},
    (1, 2), torch.zeros(0), torch.ones(3), torch.tensor(2.5), torch.zeros(2, 3, 4), torch.tensor([1j]),
)  # fmt: skip


def _other_saved(data: bytes, rng: Rng) -> bytes:
    """The same file with one value of another type: what another version or another program may have saved."""
    value = torch.load(io.BytesIO(data), weights_only=True)
    holder: Any = [value]
    key: Any = 0
    while rng.random() < 0.75:
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, keys[int(rng.integers(len(keys)))]
    if isinstance(holder[key], torch.Tensor) and rng.random() < 0.6:
        holder[key] = _odd_tensor(holder[key], rng)
    else:
        holder[key] = _VALUES[int(rng.integers(len(_VALUES)))]
    value = holder[0] if holder.__class__ is list and key == 0 and len(holder) == 1 else value
    return _saved(value)


def their_zip(folder: Path) -> Kind:
    data = _saved({"epoch": 3, "state_dict": _their_tensors(), "best": 0.5})
    return Kind(
        files={"t.pt": data}, damaged=("t.pt",), read=_teacher("t.pt"), has_digest=True,
        forged=(_other_saved, _ZIPPED, zip_that_claims),
    )  # fmt: skip


def their_pickle(folder: Path) -> Kind:
    data = _saved(_their_tensors(), _use_new_zipfile_serialization=False)
    return Kind(files={"t.pth": data}, damaged=("t.pth",), read=_teacher("t.pth"), has_digest=False)


def _other_msgpack(data: bytes, rng: Rng) -> bytes:
    """Valid msgpack with another value, array or name at some place."""
    tree = msgpack.unpackb(data)
    holder, key = {0: tree}, 0
    while rng.random() < 0.9 and isinstance(holder[key], dict) and holder[key]:
        holder = holder[key]
        key = list(holder)[int(rng.integers(len(holder)))]
    found = holder[key]
    if isinstance(found, msgpack.ExtType) and found.code == 1 and rng.random() < 0.7:
        shape, kind, values = msgpack.unpackb(found.data, raw=True)
        part = int(rng.integers(3))
        if part == 0:
            shape = ([], [-1], [1 << 62, 4], [0], shape[::-1], [*shape, 1], "x", [1.5], [None])[int(rng.integers(9))]
        elif part == 1:
            kind = (b"float16", b"object", b"bfloat16", b"x", b"int8", b"complex64", 1, b"")[int(rng.integers(8))]
        else:
            values = DAMAGE[int(rng.integers(len(DAMAGE)))](values, rng)
        holder[key] = msgpack.ExtType(found.code, msgpack.packb((shape, kind, values)))
    elif rng.random() < 0.2:
        holder[f"{key}x"] = holder.pop(key)
    else:
        deep: Any = 1
        for _ in range(400):
            deep = {"a": deep}
        values = (
            None, 1, -1.5, True, "x", b"x", [], [1], {}, {"a": 1}, {"backbone": {}}, msgpack.ExtType(1, b""), deep,
            msgpack.ExtType(3, b"\x93"), msgpack.ExtType(9, b"x"), msgpack.Timestamp(3),
            {"__msgpack_chunked_array__": 1},
        )  # fmt: skip
        holder[key] = values[int(rng.integers(len(values)))]
    return msgpack.packb(tree)


def flax(folder: Path) -> Kind:
    data = (ROOT / "tests" / "golden" / "official_teacher0.msgpack").read_bytes()
    return Kind(
        files={"t": data}, damaged=("t",), read=_teacher("t", official=True), has_digest=False, forged=(_other_msgpack,)
    )


# ---- what runs write ------------------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Kind:
    state, _ = small_state("latentbe", E=2)
    with_log = Log(folder, 0)
    with_log.write("train", 3, {"loss": 1.5})
    place = with_log.sync()
    with_log.close()
    state.step = 3
    empty, _ = small_state("latentbe", E=2, moved=False)
    progress = {"epochs": 1, "best_epoch": 1, "best_acc": 0.5, "seconds": 2.5, "images": 15, "log": place}
    save_checkpoint(folder / "checkpoint.pt", state, [progress])

    def read(at: Path) -> Any:
        """Go on from it, as a training does."""
        path = at / "checkpoint.pt"
        fresh = copy.deepcopy(empty)
        checkpoint_step(path)
        loop: Any = SimpleNamespace(trainees=[None], _checkpoint=path, state=fresh)
        reached, places = Loop._load(loop)
        log = Log(at, fresh.step, places[0])
        log.close()
        if log.notes:
            raise SetAside("; ".join(log.notes))
        return fresh.step, fresh.student.state_dict(), fresh.optimizer.state_dict()["state"], reached

    names = ("checkpoint.pt", "metrics.jsonl", "events.out.tfevents.training")
    return Kind(
        files={name: (folder / name).read_bytes() for name in names}, damaged=("checkpoint.pt",), read=read,
        has_digest=True, forged=(_other_saved, _other_saved, _ZIPPED, zip_that_claims),
    )  # fmt: skip


def golden(folder: Path) -> Kind:
    small_golden(ROOT / "tests" / "golden" / "official_wrn10x1_m4.npz", folder / "golden.npz")

    def read(at: Path) -> Any:
        """Begin a replay as the command does; its networks, images and numbers."""
        found = Golden(at / "golden.npz")
        replay = Replay(found)
        return found.arrays, replay.x_SBCHW, replay.labels_SB, replay.teachers.state_dict()

    files = {"golden.npz": (folder / "golden.npz").read_bytes()}
    forged: tuple[Damage, ...] = (_ZIPPED, _ZIPPED, zip_that_claims)
    return Kind(files=files, damaged=tuple(files), read=read, has_digest=True, forged=forged)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "our safetensors": our_network,
    "our students": our_student,
    "others' safetensors": their_safetensors,
    "others' PyTorch zip": their_zip,
    "others' PyTorch pickle": their_pickle,
    "Flax msgpack": flax,
    "checkpoint.pt": checkpoint,
    "golden .npz": golden,
}
