"""Operations of a network's passes: one name for kernel, plain definition, and what a library makes of it.

A file of a kernel family ends in its launcher, which `operation` registers:

    @operation(definition=global_pool_ref)
    def global_pool(x_MBHWC: Tensor, ...) -> Tensor: ...

The launcher stays callable as before. Whoever runs a network asks its provider for the operation,
`operations(global_pool)(x)`, and gets the kernel or the library's form; nothing else need know of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")


Arguments = tuple[Any, ...]
Options = dict[str, Any]


class Operation(Generic[P, R]):
    """Launcher of a kernel, with the other ways to compute the same and what it moves."""

    def __init__(
        self,
        kernel: Callable[P, R],
        definition: Callable[..., R],
        library: Callable[..., R] | None = None,
        tensors: Callable[[Arguments, Options, Any], list[Tensor]] | None = None,
        shape: Callable[[Arguments, Options, Any], str] | None = None,
    ) -> None:
        functools.update_wrapper(self, kernel)
        self.name = kernel.__name__
        self.kernel = kernel
        self.definition = definition
        """Plain PyTorch with the kernel's arguments and results, which the kernel is tested against."""
        self.library: Callable[P, R] = library or functools.partial(compiled, definition)
        """Form by PyTorch and cuDNN at their best; by default the definition, compiled on a GPU."""
        self.tensors = tensors or all_tensors
        """Tensors that a call reads or writes, of its arguments, its options and its result."""
        self.shape = shape or images_shape
        """Shape of a call in a table, of the same three."""

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        """Launch the kernel."""
        return self.kernel(*args, **options)


def operation(
    definition: Callable[..., R],
    *,
    library: Callable[..., R] | None = None,
    tensors: Callable[[Arguments, Options, Any], list[Tensor]] | None = None,
    shape: Callable[[Arguments, Options, Any], str] | None = None,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Register the decorated launcher under its own name.

    Args:
        definition: plain PyTorch, with the launcher's arguments and results.
        library: the library's form, where that is more than `definition` compiled.
        tensors: which tensors a call reads and writes, where they are not its arguments and results.
        shape: what a table calls the shape of a call that has no images.
    """
    return lambda kernel: Operation(kernel, definition, library, tensors, shape)


def all_tensors(args: Arguments, options: Options, out: Any) -> list[Tensor]:
    """List every tensor that a call is given or gives."""
    return [x for x in tree_leaves((args, options, out)) if isinstance(x, Tensor)]


def images_shape(args: Arguments, options: Options, out: Any) -> str:
    """Shape of the first images (M, B, H, W, C) that a call is given or gives, `C @ HxW`; else the first's channels."""
    images = [x for x in all_tensors(args, {}, out) if x.ndim == 5]
    if not images:
        return str(args[0].shape[-1])
    _, _, H, W, C = images[0].shape
    return f"{C} @ {H}x{W}"


# Every layer shape and epilogue is compiled for itself; torch.compile's own limit is 8, past which it stops compiling.
_MAX_VARIANTS = 4096


def compiled(definition: Callable[..., R], first: Tensor | Sequence[Any], *args: Any, **options: Any) -> R:
    """Run `definition`, compiled where its first argument, or the first tensor in it, is on a GPU."""
    if (first if isinstance(first, Tensor) else first[0]).device.type != "cuda":
        return definition(first, *args, **options)
    limits = {"recompile_limit": _MAX_VARIANTS, "accumulated_recompile_limit": _MAX_VARIANTS}
    with torch._dynamo.config.patch(limits):
        result: R = _compiled(definition)(first, *args, **options)
    return result


@functools.cache
def _compiled(definition: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(definition, fullgraph=True, dynamic=False)
