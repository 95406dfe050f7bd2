"""Official checkpoints: Flax's msgpack files and the official names, to our modules and back.

Nothing in a file is executed: msgpack holds numbers, text and arrays. The names are those of giung2-jax, on which the
official code of Nam et al. 2022 is built; its arrays are NHWC, conv weights HWIO, linear weights (in, out).

| official | ours |
|---|---|
| `backbone/FirstBlock_0/Conv2d_0` | `stem` |
| `backbone/BasicBlock_i/{BatchNorm2d_j, Conv2d_j}` | `blocks.i.{norm, conv}{j + 1}` |
| `backbone/BasicBlock_i/ProjectionShortcut_0/Conv2d_0` | `blocks.i.shortcut` |
| `backbone/LastBlock_0/BatchNorm2d_0` | `norm` |
| `classifier/Linear_0` | `linear` |
| `Conv2d_BatchEnsemble_j`, `Linear_BatchEnsemble_0`: `r`, `s` | the same layers: `rho_r` = r − 1, `rho_s` = s − 1 |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from ensdistill.models.wide_resnet import WideResNet
from ensdistill.runtime.errors import UserError, first_names

# Format of flax.serialization: extension types of arrays and numbers, and the mark of an array that is cut into chunks.
_EXT_ARRAY, _EXT_COMPLEX, _EXT_SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_MAX_BYTES = 4 << 30  # WRN-28-10 with its momentum is 0.3 GB
_MAX_ITEMS = 1 << 16  # of one map or list: a header alone must not make us allocate
_MAX_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class Variables:
    """One network of a checkpoint, under flat official names such as `backbone/FirstBlock_0/Conv2d_0/w`."""

    params: dict[str, np.ndarray]
    """Weights, in the official layout."""
    stats: dict[str, np.ndarray]
    """BatchNorm's running statistics, `m` and `v`."""
    pixel_mean: tuple[float, ...] | None
    """Mean (C,) of images in [0, 1]; None where the checkpoint does not say."""
    pixel_std: tuple[float, ...] | None
    """Standard deviation (C,) of images in [0, 1]; None where the checkpoint does not say."""


class OfficialNetwork(NamedTuple):
    """A network of ours, read from official arrays."""

    name: str
    """Name for `models.build`, such as `wrn28x4`."""
    num_classes: int
    in_channels: int
    state_dict: dict[str, Tensor]
    """Tensors in float32, for strict loading; layers of a BatchEnsemble have `rho_r` (E, in), `rho_s` (E, out)."""


def read_flax_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the tree of a file that `flax.serialization.to_bytes` (or `flax.training.checkpoints`) wrote.

    Returns:
        Nested dicts whose leaves are NumPy arrays and scalars, numbers, text or None. bfloat16 becomes float32, which
        holds it exactly.

    Raises:
        UserError: the file cannot be read, is truncated, or is something else.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: larger than {_MAX_BYTES >> 30} GiB; expected a Flax checkpoint of one network")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a Flax checkpoint") from error
    try:
        tree = msgpack.unpackb(
            data,
            ext_hook=_extension,
            raw=False,
            strict_map_key=True,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_str_len=_MAX_ITEMS,
        )
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, not a map")
        return _join_chunks(tree)
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path}: no whole Flax checkpoint ({reason}); "
            "expected the msgpack file of flax.serialization.to_bytes, copy it again"
        ) from error


def _extension(code: int, data: bytes) -> Any:
    if code == _EXT_ARRAY:
        return _array(data)
    if code == _EXT_SCALAR:
        return _array(data)[()]
    if code == _EXT_COMPLEX:
        real, imaginary = msgpack.unpackb(data)
        return complex(real, imaginary)
    raise ValueError(f"unknown msgpack extension type {code}")


def _array(data: bytes) -> np.ndarray:
    shape, name, buffer = msgpack.unpackb(data, raw=True, max_array_len=_MAX_DEPTH)
    if not (isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)):
        raise ValueError("an array whose shape is no list of sizes")
    if not (isinstance(name, bytes) and isinstance(buffer, bytes)):
        raise ValueError("an array without its type or its bytes")
    dtype_name = name.decode("ascii")
    if dtype_name != "bfloat16" and dtype_name not in _DTYPES:
        raise ValueError(f"an array of the unknown type '{dtype_name}'")
    dtype = np.dtype("uint16" if dtype_name == "bfloat16" else dtype_name)
    if len(buffer) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {tuple(shape)} and type {dtype_name} with {len(buffer)} bytes")
    array = np.frombuffer(buffer, dtype=dtype.newbyteorder("<")).reshape(shape)
    if dtype_name == "bfloat16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _join_chunks(tree: Any, depth: int = 0) -> Any:
    if not isinstance(tree, dict):
        return tree
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    if _CHUNKED not in tree:
        return {key: _join_chunks(value, depth + 1) for key, value in tree.items()}
    parts: list[list[Any]] = []
    for name in ("shape", "chunks"):
        part = tree.get(name)
        if not isinstance(part, dict) or set(part) != {str(i) for i in range(len(part))}:
            raise ValueError(f"a chunked array without its {name}")
        parts.append([part[str(i)] for i in range(len(part))])
    shape, chunks = parts
    if not chunks or not all(isinstance(chunk, np.ndarray) for chunk in chunks):
        raise ValueError("a chunked array without its chunks")
    flat = np.concatenate([chunk.reshape(-1) for chunk in chunks])
    return flat.reshape([int(n) for n in shape])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Flatten the arrays of a nested tree under names joined by `/`; leaves that are no numbers are left out."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray | np.generic | int | float | complex):
            flat[f"{prefix}{key}"] = np.asarray(value)
    return flat


def find_variables(tree: Mapping[str, Any], where: str = "checkpoint") -> Variables:
    """Find the network in a checkpoint, wherever its train state nests `params`, `batch_stats`, `image_stats`.

    Of several `params` the outermost is taken that holds a `backbone`. A leading axis of devices (a state saved without
    `unreplicate`) is removed: the first replica's weights and, as the official code does, the mean of their statistics.

    Args:
        where: the file's name in error messages.

    Raises:
        UserError: there is no such network, or there are two at the same depth.
    """
    nodes: list[tuple[str, Mapping[str, Any]]] = [("", tree)]
    found: list[tuple[str, Mapping[str, Any]]] = []
    while nodes and not found:
        found = [(at, node) for at, node in nodes if _is_network(node.get("params"))]
        nodes = [(f"{at}{k}/", v) for at, node in nodes for k, v in node.items() if isinstance(v, Mapping)]
    if not found:
        raise UserError(
            f"{where}: no params/backbone in it, found {', '.join(map(str, tree)) or 'nothing'}; "
            "expected a train state of an official PreResNet with params and batch_stats"
        )
    if len(found) > 1:
        places = ", ".join(f"{at}params" for at, _ in found)
        raise UserError(
            f"{where}: more than one network in it ({places}); expected one, save the one you mean by itself"
        )
    at, node = found[0]
    # Beside the params, or one level below (`model_state/batch_stats`).
    beside = [node, *(value for value in node.values() if isinstance(value, Mapping))]
    trees = {key: value for place in reversed(beside) for key, value in place.items() if isinstance(value, Mapping)}
    if not trees.get("batch_stats"):
        raise UserError(f"{where}: no {at}batch_stats beside {at}params; expected BatchNorm's running statistics there")
    params, stats, images = (
        flatten(node["params"]),
        flatten(trees["batch_stats"]),
        flatten(trees.get("image_stats", {})),
    )
    if any(re.fullmatch(r"backbone/FirstBlock_0/Conv2d\w*_0/w", key) and w.ndim == 5 for key, w in params.items()):
        params = {key: value[0] for key, value in params.items()}
        stats = {key: value.mean(axis=0) for key, value in stats.items()}
        images = {key: value[0] for key, value in images.items()}
    pixels = {key: tuple(float(v) for v in value.reshape(-1)) for key, value in images.items()}
    return Variables(params=params, stats=stats, pixel_mean=pixels.get("m"), pixel_std=pixels.get("s"))


def _is_network(params: Any) -> bool:
    return isinstance(params, Mapping) and isinstance(params.get("backbone"), Mapping)


def wide_resnet_from_official(
    params: Mapping[str, Any], stats: Mapping[str, Any], where: str = "checkpoint"
) -> OfficialNetwork:
    """Translate official arrays to those of our `WideResNet`, plain or BatchEnsemble.

    Depth, width and classes come from the arrays' shapes. What shapes cannot show is taken as the paper has it: ReLU,
    BatchNorm's ε 1e-5, strides 1, 2, 2.

    Args:
        params, stats: official names without `params/` and `batch_stats/`, flat or nested.
        where: the file's name in error messages.

    Raises:
        UserError: an array is missing, of another shape, or belongs to another architecture.
    """
    rest = {f"params/{k}": v for k, v in flatten(params).items()}
    rest |= {f"batch_stats/{k}": v for k, v in flatten(stats).items()}
    depth, width, num_classes, in_channels = _sizes(rest, where)
    with torch.device("meta"):  # names and shapes without the memory
        expected = WideResNet(depth, width, num_classes, in_channels).state_dict()
    names = frozenset(rest)
    E = next((len(v) for k, v in rest.items() if k.endswith("/r") and v.ndim == 2), 0)
    state_dict: dict[str, Tensor] = {}
    for key, like in expected.items():
        layer, _, entry = key.rpartition(".")
        if entry == "num_batches_tracked":  # old PyTorch had none: loading fills it in
            continue
        has_factors = _official_name(f"{layer}.rho_r", batch_ensemble=True) in names
        state_dict[key] = _take(rest, _official_name(key, batch_ensemble=has_factors), like.shape, where)
        if has_factors and entry == "weight":
            for factor, channels in (("rho_r", like.shape[1]), ("rho_s", like.shape[0])):
                name = _official_name(f"{layer}.{factor}", batch_ensemble=True)
                state_dict[f"{layer}.{factor}"] = _take(rest, name, (E, channels), where) - 1
    if rest:
        raise UserError(
            f"{where}: {first_names(sorted(rest))} not in a pre-activation WRN-{depth}-{width}; "
            "expected official PreResNet names (basic blocks, BatchNorm, projection shortcuts)"
        )
    return OfficialNetwork(f"wrn{depth}x{width}", num_classes, in_channels, state_dict)


def official_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Translate ours back to `params/…` and `batch_stats/…` under their official names, in the official layout.

    `state_dict` is that of a `WideResNet`, plain or converted to a BatchEnsemble. float16 and bfloat16 become float32.
    """
    arrays: dict[str, np.ndarray] = {}
    for key, tensor in state_dict.items():
        layer, _, entry = key.rpartition(".")
        if entry == "num_batches_tracked":
            continue
        tensor = tensor.detach().cpu()
        array = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif entry == "weight" and array.ndim == 2:
            array = array.T
        elif entry in ("rho_r", "rho_s"):
            array = 1 + array
        arrays[_official_name(key, batch_ensemble=f"{layer}.rho_r" in state_dict)] = np.ascontiguousarray(array)
    return arrays


def _sizes(arrays: Mapping[str, np.ndarray], where: str) -> tuple[int, int, int, int]:
    """Read (depth, width, K, C) off the shapes of the first and last layers and the number of blocks."""
    blocks = {m[1] for key in arrays if (m := re.match(r"params/backbone/BasicBlock_(\d+)/", key))}
    shapes = []
    for key, ndim in (("stem.weight", 4), ("blocks.0.conv1.weight", 4), ("linear.weight", 2)):
        names = [_official_name(key, batch_ensemble=flavour) for flavour in (False, True)]
        name = next((name for name in names if name in arrays), names[0])
        if name not in arrays:
            raise UserError(f"{where}: {name} is missing; expected an official PreResNet with basic blocks")
        if arrays[name].ndim != ndim:
            raise UserError(f"{where}: {name} has shape {arrays[name].shape}, expected {ndim} axes")
        shapes.append(arrays[name].shape)
    stem, conv, linear = shapes
    if len(blocks) % 3 or conv[3] % 16 or conv[3] == 0:
        raise UserError(
            f"{where}: {len(blocks)} basic blocks, the first of {conv[3]} channels; "
            "expected 3 groups of equally many blocks, the first of 16k channels"
        )
    return 2 * len(blocks) + 4, conv[3] // 16, linear[1], stem[2]


_ENTRIES = {"weight": "w", "bias": "b", "rho_r": "r", "rho_s": "s", "running_mean": "m", "running_var": "v"}


def _official_name(key: str, *, batch_ensemble: bool) -> str:
    layer, _, entry = key.rpartition(".")
    flavour = "_BatchEnsemble" if batch_ensemble else ""
    if match := re.fullmatch(r"blocks\.(\d+)\.(norm1|conv1|norm2|conv2|shortcut)", layer):
        index = {"1": "0", "2": "1"}.get(match[2][-1])
        kinds = {"norm": f"BatchNorm2d_{index}", "conv": f"Conv2d{flavour}_{index}"}
        place = kinds.get(match[2][:-1], f"ProjectionShortcut_0/Conv2d{flavour}_0")
        name = f"backbone/BasicBlock_{match[1]}/{place}"
    else:
        name = {
            "stem": f"backbone/FirstBlock_0/Conv2d{flavour}_0",
            "norm": "backbone/LastBlock_0/BatchNorm2d_0",
            "linear": f"classifier/Linear{flavour}_0",
        }[layer]
    return f"{'batch_stats' if entry.startswith('running') else 'params'}/{name}/{_ENTRIES[entry]}"


def _take(rest: dict[str, np.ndarray], name: str, shape: Sequence[int], where: str) -> Tensor:
    """Take `name` out of `rest`: float32, in our layout, in which `shape` is given."""
    if name not in rest:
        raise UserError(f"{where}: {name} is missing; expected every array of an official PreResNet with basic blocks")
    array = rest.pop(name)
    # OIHW from HWIO, (out, in) from (in, out); factors (E, channels) and vectors are as they are.
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), (0,)) if name.endswith("/w") else tuple(range(len(shape)))
    expected = tuple(shape[order.index(i)] for i in range(len(shape)))
    if array.shape != expected:
        raise UserError(
            f"{where}: {name} has shape {array.shape}, expected {expected} in a WRN of these blocks and widths"
        )
    return torch.from_numpy(np.array(array.transpose(order), dtype=np.float32, order="C"))
