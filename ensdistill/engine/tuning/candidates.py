"""Candidates to compute a convolution: Triton's kernel with each tile that fits, and the library in two forms.

A kernel whose result is not the library's, up to rounding, is no candidate (`difference`). `measuring.py` times them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.engine.launch_key import Key
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.weight_gradient_tiles import rows_width, weight_gradient_tiles
from ensdistill.kernels.launch import cdiv

# Relative, in the norm of the whole tensor: both round their results to the type, the library's epilogue once more.
_TOLERANCE = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 5e-3, "fp64": 1e-9}
_MAX_DIFFERENT_BITS = 1e-2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Way to compute a convolution."""

    provider: str
    """Who computes it, `triton` or `library`."""
    tile: tuple[int, ...] = ()
    """Triton's tile, as the operation takes it; empty is the default of the shape."""
    grouped: bool = False
    """Form of the library: one call for all members, or one a member."""

    def __str__(self) -> str:
        if self.provider == "library":
            return "library grouped" if self.grouped else "library loop"
        if not self.tile:
            return "triton"
        form, m, n, k, warps, stages, *splits = self.tile
        name = ("pointers", "boxes", "rows", "tap rows", "persistent", "patches")[form]
        return f"triton {name} {m}x{n}x{k} {warps}w {stages}s" + "".join(f" /{split}" for split in splits)

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        """Compute `key`: the operation's two tensors and its keyword arguments."""
        if self.provider == "library":
            return key.convolution.library(*tensors, **options, grouped=self.grouped)
        return key.convolution.kernel(*tensors, **options, tile=self.tile)


def candidates(key: Key, device: torch.device) -> list[Candidate]:
    """Everything that may compute `key` on `device`."""
    shared_limit, forms = tiles.limits(device)
    if "prologue" in key.present:
        forms = tuple(form for form in forms if form != tiles.PERSISTENT)
    shape = (key.CI, key.CO, key.k, key.stride, key.torch_dtype)
    found: Sequence[Sequence[int]]
    if key.op == "forward":
        found = tiles.forward_tiles(key.M, key.B, key.OH, key.OW, *shape, shared_limit=shared_limit, forms=forms)
    elif key.op == "input gradient":
        M = 1 if key.shared else key.M
        forms = (tiles.POINTERS,) if key.shared else forms  # only pointers add members up
        beside = (name if name in key.present else None for name in ("before", "bits", "norm", "after"))
        patches = tiles.fit_patches(key.CI, key.k, key.stride, beside)
        found = tiles.input_gradient_tiles(
            M, key.B, key.H, key.W, *shape, shared_limit=shared_limit, forms=forms, patches=patches
        )
    else:
        folded = key.shared and key.M > 1  # members that read one input are columns side by side
        groups, columns = (1, key.M * key.CO) if folded else (key.M, key.CO)
        width = 0 if folded else rows_width(device, key.k, key.stride, key.W)
        pixels, rows = key.B * key.OH * key.OW, key.k**2 * key.CI
        found = weight_gradient_tiles(
            groups, pixels, rows, columns, key.torch_dtype, width=width, shared_limit=shared_limit
        )
    of_triton = [Candidate(provider="triton", tile=tuple(tile)) for tile in found]
    return [*of_triton, Candidate(provider="library"), Candidate(provider="library", grouped=True)]


def arguments(key: Key, device: torch.device, seed: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Random arguments of `key`'s operation: its two tensors, and its keyword arguments."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = key.torch_dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    def vector(C: int) -> Tensor:
        return normal(1 if key.shared or key.op == "weight gradient" else key.E, C, dtype=torch.float32)

    inputs = ((key.B,) if key.shared else (key.M, key.B)) + (key.H, key.W, key.CI)
    outputs = (key.M, key.B, key.OH, key.OW, key.CO)
    fan_in = key.k**2 * (key.CI if key.op == "forward" else key.CO)
    options: dict[str, Any] = {"stride": key.stride}
    present = set(key.present)
    if "prologue" in present:
        options["prologue"] = (vector(key.CI), vector(key.CI))
    if key.op == "weight gradient":
        return (normal(*inputs), normal(*outputs)), options | {"kernel": key.k}
    weights = normal(key.E, key.k, key.k, key.CI, key.CO, scale=fan_in**-0.5)
    if key.members:
        options["members"] = torch.arange(key.M, device=device) % key.E
    options["out_dtype"] = key.torch_out_dtype
    if key.op == "forward":
        options |= {name: name in present for name in ("relu", "sums")}
        options |= {"keep_y": "no y" not in present, "keep_z": "no z" not in present, "bits": key.bits}
        if "bias" in present:
            options["bias"] = vector(key.CO)
        if "residual" in present:
            options["residual"] = normal(*outputs)
        if "second" in present:
            options["second"] = (vector(key.CO), vector(key.CO))
        return (normal(*inputs), weights), options
    options |= {"size": (key.H, key.W), "shared": key.shared}
    for name in ("before", "after"):
        if name in present:
            options[name] = normal(*inputs)
    if "bits" in present:
        shape = (*inputs[:-1], cdiv(key.CI, 8))
        options["bits"] = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    if "norm" in present:
        options["norm"] = (normal(*inputs), vector(key.CI), vector(key.CI))
    if "scale" in present:
        options["scale"] = vector(key.CI)
    return (normal(*outputs), weights), options


def difference(result: Any, truth: Any, key: Key) -> str | None:
    """Say what is wrong with a `result`, against another implementation's; None where it is rounding alone."""
    if isinstance(truth, Tensor) or truth is None:
        result, truth = (result,), (truth,)
    for one, other in zip(result, truth, strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None:
            return "another number of results"
        if one.dtype == torch.uint8:
            wrong = sum(((one ^ other) >> bit & 1).sum() for bit in range(8)) / (8 * one.numel())
            if wrong > _MAX_DIFFERENT_BITS:
                return f"{wrong:.1%} of the bits differ"
            continue
        if one.ndim == 4 and one.shape[2:] == other.shape[2:] and one.shape != other.shape:  # sums, by tiles
            one, other = one.sum(1), other.sum(1)
        error = torch.linalg.vector_norm(one.float() - other.float())
        relative = float(error / torch.linalg.vector_norm(other.float()).clamp_min(1e-30))
        if not relative <= _TOLERANCE[key.dtype]:
            return f"relative error {relative:.2g}"
    return None
