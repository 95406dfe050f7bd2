"""Cost of one forward of any network, layer by layer, traced on `meta` tensors: nothing is computed or copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One convolution or matrix product of the forward of one image."""

    name: str
    """Name of the module that runs it, `layer1.0.conv1`; a module that runs several has several entries."""
    shape: str
    """`conv 3x3/2 32→64 @ 16x16` (kernel, stride, channels, size of the output) or `matmul 64→10`."""
    macs: int
    """Multiply-accumulates of an image."""
    inputs: int
    """Elements that the layer reads, weights excepted."""
    outputs: int
    """Elements that the layer writes: its activations."""
    in_head: bool
    """True for a layer of the head that `split_head` gives."""


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Cost of one forward of a network."""

    layers: tuple[LayerCost, ...]
    """Layers in the order in which they run."""
    params: int
    """Number of parameters."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_a_layer(self) -> float:
        """Multiply-accumulates an image of an average layer."""
        return self.macs / max(1, len(self.layers))

    @property
    def activations(self) -> int:
        """Elements that convolutions and linear layers write, an image."""
        return sum(layer.outputs for layer in self.layers)


class _LayerTrace(TorchDispatchMode):
    """Collects every convolution and matrix product that runs below it."""

    def __init__(self) -> None:
        super().__init__()
        self.path = [""]
        self.layers: list[tuple[str, str, int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        aten = torch.ops.aten
        if packet in (aten.convolution, aten._convolution):
            x, weight, stride, transposed = args[0], args[1], args[3], args[6]
            # A transposed conv spreads each input element over the kernel; an ordinary one gathers each output element.
            macs = (x if transposed else out).numel() * weight[0].numel()
            kernel, size = ("x".join(map(str, dims)) for dims in (weight.shape[2:], out.shape[2:]))
            shape = f"conv {kernel}/{stride[0]} {x.shape[1]}→{out.shape[1]} @ {size}"
            self.layers.append((self.path[-1], shape, macs, x.numel(), out.numel()))
        elif packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            x = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
            shape = f"matmul {x.shape[-1]}→{out.shape[-1]}"
            self.layers.append((self.path[-1], shape, out.numel() * x.shape[-1], x.numel(), out.numel()))
        return out


@contextmanager
def _on_meta(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Evaluation mode for the time being, and the network's state without its values, for `functional_call`."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        tensors = [*network.named_parameters(), *network.named_buffers()]
        yield {
            name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
            for name, tensor in tensors
        }
    finally:
        for module, mode in modes.items():
            module.training = mode


def network_cost(network: nn.Module, *, in_channels: int, image_size: int | tuple[int, int]) -> NetworkCost:
    """Trace one forward of one image (in_channels, H, W) without computing or copying anything.

    `image_size` is (H, W), or the side of a square.

    `network` is a plain one (a student's members differ by weights alone, which cost nothing an image). It is left as
    it was.
    """
    trace = _LayerTrace()

    def enter(name: str) -> Any:
        return lambda module, inputs: trace.path.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        trace.path.pop()

    hooks = []
    for name, module in network.named_modules():
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave, always_call=True)]
    try:
        with _on_meta(network) as state, torch.no_grad():
            H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
            x_BCHW = torch.empty(1, in_channels, H, W, device="meta")
            with trace:
                torch.func.functional_call(network, state, (x_BCHW,))
    finally:
        for hook in hooks:
            hook.remove()
    split_head: Any = getattr(network, "split_head", None)
    head = {id(module) for module in split_head()[1].modules()} if split_head else set()
    in_head = {name for name, module in network.named_modules() if id(module) in head}
    layers = tuple(
        LayerCost(name=name, shape=shape, macs=macs, inputs=inputs, outputs=outputs, in_head=name in in_head)
        for name, shape, macs, inputs, outputs in trace.layers
    )
    assert layers, f"{type(network).__name__} ran no convolution and no linear layer"
    return NetworkCost(layers=layers, params=sum(parameter.numel() for parameter in network.parameters()))
