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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from ensdistill.config.methods import Method
from ensdistill.costs.network import LayerCost, NetworkCost, network_cost
from ensdistill.models import build
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.errors import UserError, nearest, run_main

FORWARD_PASSES = 2.5
INPUT_BACKWARD_PASSES = 2.5
BACKWARD_PASSES = 8.0
# fp32 parameter and momentum read and written, fp32 gradient read.
UPDATE_BYTES = 20


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a processor gives at best."""

    name: str
    """As `--device` has it."""
    flops: float
    """FLOP/s of dense products in the type that `element_bytes` implies."""
    bandwidth: float
    """Bytes/s of main memory."""
    source: str
    """Where the two rates come from: `measured`, by a product of two random 8192x8192 matrices in bf16 and by a copy
    within the device (reads and writes counted), or `data sheet`, which programs stay some 10 to 20 % below."""
    element_bytes: int = 2
    """Bytes an activation: 2 in bf16, 4 in fp32."""
    torch_names: tuple[str, ...] = ()
    """What `torch.cuda.get_device_name` calls it."""

    @property
    def rates(self) -> str:
        """Both rates and where they come from: `788 TFLOP/s, 4.3 TB/s (measured)`."""
        return f"{self.flops / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e12:.3g} TB/s ({self.source})"


DEVICES = {
    device.name: device
    for device in (
        Device(name="H100", flops=800e12, bandwidth=3.0e12, source="measured", torch_names=("NVIDIA H100 80GB HBM3",)),
        Device(name="H200", flops=788e12, bandwidth=4.3e12, source="measured", torch_names=("NVIDIA H200",)),
        Device(
            name="A100-80GB",
            flops=312e12,
            bandwidth=2.039e12,
            source="data sheet",
            torch_names=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ),
        Device(name="L40S", flops=362e12, bandwidth=0.864e12, source="data sheet", torch_names=("NVIDIA L40S",)),
        Device(name="L4", flops=121e12, bandwidth=0.3e12, source="data sheet", torch_names=("NVIDIA L4",)),
    )
}


def find_device(name: str) -> Device:
    """The device called `name`; `cpu` is measured now, in fp32 (0.4 s).

    Raises:
        UserError: no rates are known for it.
    """
    if name.lower() == "cpu":
        return measure_cpu("fp32")
    for device in DEVICES.values():
        if device.name.lower() == name.lower():
            return device
    known = ["cpu", *DEVICES]
    raise UserError(
        f"device '{name}': its rates are not known{nearest(name.upper(), known)}; expected one of {', '.join(known)}"
    )


def installed_gpu() -> Device | None:
    """The table's entry for the GPU that PyTorch sees, if there is one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((device for device in DEVICES.values() if name in device.torch_names), None)


def measure_cpu(precision: Literal["fp32", "bf16"]) -> Device:
    """This machine's CPU, at the threads PyTorch uses: its best convolution and its best copy (0.4 s).

    A convolution, because on some processors a matrix product goes to a library that gives half of what they can. The
    copy fits in the cache, as a small network's activations do, so that the floor stays below what can be reached.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Large enough for the peak, short enough to fall between other programs' turns.
    B, size, C = 16, 14, 128
    x_BCHW = torch.randn(B, C, size, size).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(C, C, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    source = torch.randn(1 << 18)
    copy = torch.empty_like(source)
    conv_seconds = _best_seconds(lambda: torch.conv2d(x_BCHW, weight, padding=1), budget=0.3)
    copy_seconds = _best_seconds(lambda: copy.copy_(source), budget=0.05)
    return Device(
        name="cpu",
        flops=2 * x_BCHW.numel() * weight[0].numel() / conv_seconds,
        bandwidth=2 * source.nbytes / copy_seconds,
        source=f"measured now, {torch.get_num_threads()} threads, {precision}",
        element_bytes=dtype.itemsize,
    )


def _best_seconds(function: Callable[[], object], budget: float) -> float:
    function()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True, kw_only=True)
class Work:
    """How often a step runs some layers of a network over the batch."""

    layers: tuple[LayerCost, ...]
    """The layers."""
    network_macs: int
    """MACs of the whole network that they belong to: what 1 F is."""
    forward: float = 0
    """Forwards; an expected value where the step draws a teacher."""
    input_backward: float = 0
    """Backwards for the gradient of the images alone."""
    backward: float = 0
    """Full backwards."""

    def _times(self) -> tuple[tuple[float, float, float], ...]:
        """(how often, F each, passes each) of the three kinds."""
        return (
            (self.forward, 1, FORWARD_PASSES),
            (self.input_backward, 1, INPUT_BACKWARD_PASSES),
            (self.backward, 2, BACKWARD_PASSES),
        )

    @property
    def F(self) -> float:
        """In forwards of the whole network."""
        return sum(n * f for n, f, _ in self._times()) * sum(layer.macs for layer in self.layers) / self.network_macs

    def flops(self, B: int) -> float:
        """Over a batch of B images."""
        return 2 * B * self.F * self.network_macs

    def bytes(self, B: int, element_bytes: int) -> float:
        """Moved over a batch of B images."""
        return (
            sum(n * passes for n, _, passes in self._times()) * B * element_bytes * sum(x.outputs for x in self.layers)
        )

    def floor(self, B: int, device: Device) -> float:
        """Seconds over a batch of B images."""
        seconds = 0.0
        for layer in self.layers:
            arithmetic = 2 * B * layer.macs / device.flops
            memory = B * layer.outputs * device.element_bytes / device.bandwidth
            seconds += sum(n * max(f * arithmetic, passes * memory) for n, f, passes in self._times())
        return seconds


@dataclass(frozen=True, kw_only=True)
class Part:
    """One line of a step's account."""

    name: str
    """What it is for."""
    work: tuple[Work, ...] = ()
    """What runs."""
    update_bytes: float = 0
    """Bytes that the optimizer moves."""

    @property
    def F(self) -> float:
        """In forwards of one network over the batch."""
        return sum(work.F for work in self.work)

    def flops(self, B: int) -> float:
        """Over a batch of B images."""
        return sum(work.flops(B) for work in self.work)

    def bytes(self, B: int, element_bytes: int) -> float:
        """Moved over a batch of B images."""
        return self.update_bytes + sum(work.bytes(B, element_bytes) for work in self.work)

    def floor(self, B: int, device: Device) -> float:
        """Seconds over a batch of B images."""
        return self.update_bytes / device.bandwidth + sum(work.floor(B, device) for work in self.work)


def whole(cost: NetworkCost, *, forward: float = 0, input_backward: float = 0, backward: float = 0) -> Work:
    """Work of the whole network."""
    return Work(
        layers=cost.layers,
        network_macs=cost.macs,
        forward=forward,
        input_backward=input_backward,
        backward=backward,
    )


def _student(
    cost: NetworkCost, method: Method, *, forward: int, input_backward: int, backward: int
) -> tuple[Work, ...]:
    """`forward` … of so many members. Hydra's members share one trunk."""
    if method.student != "hydra":
        return (whole(cost, forward=forward, input_backward=input_backward, backward=backward),)
    heads = tuple(layer for layer in cost.layers if layer.in_head)
    trunk = tuple(layer for layer in cost.layers if not layer.in_head)
    once = {"forward": min(forward, 1), "input_backward": min(input_backward, 1), "backward": min(backward, 1)}
    return (
        Work(layers=trunk, network_macs=cost.macs, **once),
        Work(layers=heads, network_macs=cost.macs, forward=forward, input_backward=input_backward, backward=backward),
    )


def step_parts(student: NetworkCost, teachers: Sequence[NetworkCost], method: Method) -> list[Part]:
    """What one step runs, in order: shown data, teachers, student, update.

    Args:
        student: the plain network that the student is made of.
        teachers: E of them, of any architecture; the ones that a step draws count as their mean. `ce` needs none.
    """
    E = len(teachers)
    parts = []

    def drawn(forward: int, input_backward: int) -> tuple[Work, ...]:
        kinds = {id(cost): cost for cost in teachers}
        shares = {key: sum(id(cost) == key for cost in teachers) / E for key in kinds}
        return tuple(
            whole(cost, forward=forward * shares[key], input_backward=input_backward * shares[key])
            for key, cost in kinds.items()
        )

    if method.shown in ("ods", "confods"):
        parts.append(Part(name=f"{method.shown}: one teacher", work=drawn(1, 1)))
    if method.shown in ("tdiv", "tdiv-sdiv"):
        parts.append(Part(name="tdiv: teachers a and b", work=drawn(2, 1)))
    if method.shown == "tdiv-sdiv":
        work = _student(student, method, forward=2, input_backward=1, backward=0)
        parts.append(Part(name="sdiv: members a and b", work=work))
    if method.needs_teachers:
        parts.append(Part(name="teachers", work=drawn(E, 0)))
    M = E if method.has_members else 1
    parts.append(Part(name="student forward", work=_student(student, method, forward=M, input_backward=0, backward=0)))
    parts.append(Part(name="student backward", work=_student(student, method, forward=0, input_backward=0, backward=M)))
    parts.append(Part(name="update", update_bytes=UPDATE_BYTES * student.params))
    return parts


def step_floor(
    student: NetworkCost, teachers: Sequence[NetworkCost], method: Method, B: int, device: Device
) -> dict[str, float]:
    """Seconds that each part of a step over B images takes at least on `device`; the floor of the step is their sum."""
    return {part.name: part.floor(B, device) for part in step_parts(student, teachers, method)}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Print the floor of one training step, part by part."""

    network: str = "wrn28x4"
    """Teachers and student: wrn{depth}x{width}, resnet{20,32,44,56,110}[x{width}], resnet18, resnet34, resnet50."""
    classes: int = 100
    """K."""
    channels: int = 3
    """Channels of an image."""
    image_size: int = 32
    """Side of an image in pixels."""
    members: int = 4
    """E."""
    batch_size: int = 128
    """Images a step."""
    method: str = "latentbe+tdiv-sdiv"
    """student[+data shown]: ce, kd, latentbe, be, hydra; clean, gaussian, ods, confods, tdiv, tdiv-sdiv."""
    device: str = "H100"
    """H100, H200, A100-80GB, L40S, L4, or cpu, which is measured."""
    layers: bool = False
    """Also print every layer shape of the network with its share of a forward."""


def _check(arguments: Arguments) -> None:
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
    """The command `python -m ensdistill.roofline`."""
    arguments = parse_arguments(Arguments, "ensdistill.roofline", argv)
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
    console = Console(highlight=False)
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
