"""The floor of one training step: what arithmetic and memory alone take, for any network, E, batch and device.

Counted in F, one forward of one network over the batch: an input-only backward costs 1 F, a full backward 2 F. An F is
2 · MACs · B FLOPs. Activations are the outputs of convolutions and linear layers, in bf16 on a GPU; a layer's forward
moves them 2.5 times (input, output, a residual every second layer), and so does an input-only backward of a frozen
network, which keeps one bit an activation; a full backward moves them 4 times for the gradient of the input and 4 times
for that of the weight. A layer takes at least the larger of arithmetic and memory, and layers wait for each other:

    floor = Σ over passes and layers of max(FLOPs / peak rate, bytes / memory rate).

Element-wise work rides on the convolutions, and weights stay in cache, but for the update, which reads and writes
parameters and momentum. `python -m ensdistill.roofline --help` prints the table for a network by name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from ensdistill.config.methods import Method
from ensdistill.costs.floor import Part, Work, step_parts, whole
from ensdistill.costs.network import LayerCost, NetworkCost, network_cost
from ensdistill.models import build
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.devices import Device, find_device
from ensdistill.runtime.errors import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class RooflineCommand:
    """Print the floor of one training step, part by part."""

    network: str = "wrn28x4"
    """Teachers and student: wrn{depth}x{width}, resnet{20,32,44,56,110}[x{width}], resnet18, resnet34, resnet50."""
    classes: int = 100
    """Number of classes K."""
    channels: int = 3
    """Number of channels of an image."""
    image_size: int = 32
    """Side of an image in pixels."""
    members: int = 4
    """Number of teachers, and of the student's members, E."""
    batch_size: int = 128
    """Number of images a step."""
    method: str = "latentbe+tdiv-sdiv"
    """student[+data shown]: ce, kd, latentbe, be, hydra; clean, gaussian, ods, confods, tdiv, tdiv-sdiv."""
    device: str = "H100"
    """H100, H200, A100-80GB, L40S, L4, or cpu, which is measured."""
    layers: bool = False
    """Also print every layer shape of the network with its share of a forward."""


def _check(arguments: RooflineCommand) -> None:
    for name in ("classes", "channels", "image_size", "members", "batch_size"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"{option}: got {getattr(arguments, name)}, expected at least 1; give a positive number")


def step_table(parts: Sequence[Part], B: int, device: Device) -> Table:
    """One row a part, and their sum."""
    element_bytes = device.element_bytes
    table = Table(box=None, header_style="bold")
    table.add_column("part", no_wrap=True)
    for column in ("F", "GFLOP", "GB", "arithmetic ms", "memory ms", "floor ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    total = sum(part.floor(B, device) for part in parts)

    def row(name: str, some: Sequence[Part], style: str = "") -> None:
        flops = sum(part.flops(B) for part in some)
        moved = sum(part.bytes(B, element_bytes) for part in some)
        floor = sum(part.floor(B, device) for part in some)
        cells = [f"{sum(part.F for part in some):.3g}", f"{flops / 1e9:.1f}", f"{moved / 1e9:.2f}"]
        seconds = [flops / device.flops, moved / device.bandwidth, floor]
        table.add_row(name, *cells, *(f"{1e3 * value:.3f}" for value in seconds), f"{floor / total:.1%}", style=style)

    for part in parts:
        row(part.name, [part])
    row("step", parts, style="bold")
    return table


def layer_table(cost: NetworkCost, B: int, device: Device) -> Table:
    """One row a layer shape: how many layers have it, and their part of one forward over B images."""
    groups: dict[str, list[LayerCost]] = {}
    for layer in cost.layers:
        groups.setdefault(layer.shape, []).append(layer)
    table = Table(box=None, header_style="bold")
    table.add_column("layer shape", no_wrap=True)
    for column in ("layers", "arithmetic µs", "memory µs", "floor µs", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    total = whole(cost, forward=1).floor(B, device)
    for shape, layers in groups.items():
        work = Work(layers=tuple(layers), network_macs=cost.macs, forward=1)
        floor = work.floor(B, device)
        seconds = [work.flops(B) / device.flops, work.bytes(B, device.element_bytes) / device.bandwidth, floor]
        table.add_row(shape, str(len(layers)), *(f"{1e6 * value:.1f}" for value in seconds), f"{floor / total:.1%}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print the floor that the arguments ask for."""
    arguments = parse_arguments(RooflineCommand, "ensdistill.roofline", argv)
    _check(arguments)
    method = Method.parse(arguments.method)
    device = find_device(arguments.device)
    with torch.device("meta"):
        network = build(
            arguments.network,
            num_classes=arguments.classes,
            in_channels=arguments.channels,
            image_size=arguments.image_size,
        )
    cost = network_cost(network, in_channels=arguments.channels, image_size=arguments.image_size)
    parts = step_parts(cost, [cost] * arguments.members, method)
    console = plain_console()
    console.width = max(console.width, 100)  # a narrower terminal wraps lines; rich would cut columns off
    size = f"{arguments.image_size}x{arguments.image_size}"
    console.print(
        f"{arguments.network} at {size}: {cost.macs / 1e6:.1f} MMAC and {cost.activations / 1e6:.3f} M activations "
        f"an image, {cost.params:,} parameters"
    )
    console.print(f"{method}, E = {arguments.members}, B = {arguments.batch_size}")
    console.print(f"{device.name}: {device.rates}\n")
    console.print(step_table(parts, arguments.batch_size, device))
    if arguments.layers:
        console.print("\nOne forward of one network:")
        console.print(layer_table(cost, arguments.batch_size, device))


if __name__ == "__main__":
    sys.exit(run_main(main))
