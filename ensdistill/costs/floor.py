"""The floor of one training step as objects: layers, how often a step runs them, and what that takes at least.

`ensdistill.roofline` says how it is counted and prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensdistill.config.methods import Method
from ensdistill.config.updates import SGD, Updates
from ensdistill.costs.network import LayerCost, NetworkCost
from ensdistill.runtime.devices import Device

FORWARD_PASSES = 2.5


INPUT_BACKWARD_PASSES = 2.5


BACKWARD_PASSES = 8.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Passes of a step through some layers of a network."""

    layers: tuple[LayerCost, ...]
    """Layers that the passes run through."""
    network_macs: int
    """MACs of the whole network that the layers belong to: what 1 F is."""
    forward: float = 0
    """Number of forwards; an expected value where the step draws a teacher."""
    input_backward: float = 0
    """Number of backwards for the gradient of the images alone."""
    backward: float = 0
    """Number of full backwards."""

    def _times(self) -> tuple[tuple[float, float, float], ...]:
        """(number, F each, passes over the activations each) of forwards, input-only and full backwards."""
        return (
            (self.forward, 1, FORWARD_PASSES),
            (self.input_backward, 1, INPUT_BACKWARD_PASSES),
            (self.backward, 2, BACKWARD_PASSES),
        )

    @property
    def F(self) -> float:
        """Arithmetic in forwards of the whole network."""
        return sum(n * f for n, f, _ in self._times()) * sum(layer.macs for layer in self.layers) / self.network_macs

    def flops(self, B: int) -> float:
        """FLOPs over a batch of B images."""
        return 2 * B * self.F * self.network_macs

    def bytes(self, B: int, element_bytes: int) -> float:
        """Bytes moved over a batch of B images."""
        return (
            sum(n * passes for n, _, passes in self._times()) * B * element_bytes * sum(x.outputs for x in self.layers)
        )

    def floor(self, B: int, device: Device) -> float:
        """Seconds that a batch of B images takes at least."""
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
    """Purpose: `tdiv: teachers a and b`."""
    work: tuple[Work, ...] = ()
    """Passes through networks."""
    update_bytes: float = 0
    """Bytes that the optimizer moves."""

    @property
    def F(self) -> float:
        """Arithmetic in forwards of one network over the batch."""
        return sum(work.F for work in self.work)

    def flops(self, B: int) -> float:
        """FLOPs over a batch of B images."""
        return sum(work.flops(B) for work in self.work)

    def bytes(self, B: int, element_bytes: int) -> float:
        """Bytes moved over a batch of B images."""
        return self.update_bytes + sum(work.bytes(B, element_bytes) for work in self.work)

    def floor(self, B: int, device: Device) -> float:
        """Seconds that a batch of B images takes at least."""
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
    """Work of a student, whose passes count members; Hydra's members share one trunk."""
    if method.student != "hydra":
        return (whole(cost, forward=forward, input_backward=input_backward, backward=backward),)
    heads = tuple(layer for layer in cost.layers if layer.in_head)
    trunk = tuple(layer for layer in cost.layers if not layer.in_head)
    once = {"forward": min(forward, 1), "input_backward": min(input_backward, 1), "backward": min(backward, 1)}
    return (
        Work(layers=trunk, network_macs=cost.macs, **once),
        Work(layers=heads, network_macs=cost.macs, forward=forward, input_backward=input_backward, backward=backward),
    )


def step_parts(
    student: NetworkCost, teachers: Sequence[NetworkCost], method: Method, updates: Updates = SGD
) -> list[Part]:
    """Parts of one step, in order: shown data, teachers, student, update.

    Args:
        student: the plain network that the student is made of.
        teachers: E of them, of any architecture; the ones that a step draws count as their mean. `ce` needs none.
        updates: optimizer and averages over time.
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
    parts.append(Part(name="update", update_bytes=updates.bytes_moved * student.params))
    return parts


def step_floor(
    student: NetworkCost,
    teachers: Sequence[NetworkCost],
    method: Method,
    B: int,
    device: Device,
    updates: Updates = SGD,
) -> dict[str, float]:
    """Seconds that each part of a step over B images takes at least on `device`; the floor of the step is their sum."""
    return {part.name: part.floor(B, device) for part in step_parts(student, teachers, method, updates)}
