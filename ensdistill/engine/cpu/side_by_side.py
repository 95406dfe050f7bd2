"""Teachers and student by their modules on a CPU, networks and members beside each other: `Networks` by a `Crew`.

What it computes is what `Networks` does. Frozen passes are independent, network by network and row by row. A student
in training is cut into a piece a thread, members first, then rows; batch norms tell each other their sums, forward and
backward, and nothing else is waited for. Members' factors go to their weights, which are smaller than activations.
Gradients are added in the order of the pieces, so that the numbers do not depend on which thread is faster; they do, in
the last bits, on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensdistill.engine.cpu.crew import Crew, NormsOfCrew
from ensdistill.engine.modules.passes import Member
from ensdistill.engine.networks import Networks, Pair, make_networks
from ensdistill.engine.operations import Backend
from ensdistill.kernels.loss.seeds import divergence_seeds, ods_seeds
from ensdistill.models.ensembles import Teachers
from ensdistill.models.layers import BatchNorm2d
from ensdistill.models.students import BatchEnsembleStudent, Student
from ensdistill.models.synced_norm import synchronise_norms
from ensdistill.runtime.environment import Precision, autocast
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.ranks import ALONE

Classify = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-3


def crew_for(backend: str, device: torch.device, threads: int, *, tiny: bool) -> Crew | None:
    """The crew by which `device`, a CPU, computes what `backend` names; None: PyTorch's threads, or kernels.

    `tiny`: layers so small that Python's part of each counts; on one thread these run whole.
    """
    by_modules = device.type == "cpu" and backend in ("auto", "tuned")
    return Crew(threads) if by_modules and (threads > 1 or not tiny) else None


def make_step_networks(
    backend: Backend,
    teachers: Teachers | None,
    student: Student,
    precision: Precision,
    device: torch.device,
    *,
    crew: Crew | None,
    rows: int,
    image_shape: tuple[int, int, int],
) -> Networks:
    """Choose how the networks of a training are computed: by `crew` where there is one, else as `backend` says.

    Args:
        rows: images of a step, in this process.
        image_shape: (H, W, C).
    """
    if crew is None:
        return make_networks(backend, teachers, student, precision, device)
    H, W, C = image_shape
    images = torch.rand(rows, C, H, W, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    return SideBySideNetworks(teachers, student, precision, crew, images)


class _Frozen(NamedTuple):
    """A frozen network that a pass runs."""

    classify: Classify
    """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
    goes_back: bool
    """True where its gradient to the images is wanted."""


class _Piece(NamedTuple):
    """What one thread computed of a network: rows and, where the pass goes back, their graph."""

    x_BCHW: Tensor
    logits_BK: Tensor


class SideBySideNetworks(Networks):
    """Teachers and student by their modules, each on one thread of `crew`.

    `images_BCHW`, (B, C, H, W) in [0, 1], as many as in a step and of any content, show on the spot whether the student
    in training can be cut up; where not (a module draws numbers, or mixes the rows of a batch) it runs whole, and
    `notes` say why.
    """

    def __init__(
        self, teachers: Teachers | None, student: Student, precision: Precision, crew: Crew, images_BCHW: Tensor
    ) -> None:
        super().__init__(teachers, student, precision)
        self.crew = crew
        why = self._why_whole(images_BCHW)
        self.is_cut = why is None
        if why is not None:
            self.notes.append(f"{type(student).__name__} in training uses PyTorch's threads: {why}")

    def why_not_compiled(self) -> str | None:
        if self.crew.threads == 1:
            return None
        # measured with two: compiling the frozen passes alone saves nothing
        return "threads compute them side by side, each eagerly; --compile yes compiles, for PyTorch's own threads"

    def teacher_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        pieces = self._run([_Frozen(classify, goes_back=False) for classify in self._teachers()], x_BCHW)
        return torch.stack([_joined(own) for own in pieces])

    def student_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        if not self.is_cut or self.passes.compiled:
            return super().student_logits(x_BCHW)
        self.student.train()
        return _Cut.apply(self, x_BCHW, *self.student.parameters())

    def divergence_gradient(
        self, x_BCHW: Tensor, pair: Pair, *, with_student: bool, z_BHWC: Tensor | None = None
    ) -> Tensor:
        assert not isinstance(pair, Tensor), "modules are chosen by the host"
        teachers = self._teachers()
        networks, signs = [[teachers[m] for m in pair]], [1.0]
        if with_student:
            self.student.eval()
            networks.append([partial(self._member, m) for m in pair])
            signs.append(-1.0)
        # those that go back first: they take longest
        asked = [_Frozen(own[i], goes_back=i == 0) for i in (0, 1) for own in networks]
        pieces = self._run(asked, x_BCHW)
        first, second = pieces[: len(networks)], pieces[len(networks) :]
        seeds = [
            divergence_seeds(_joined(a)[None], _joined(b)[None], (sign,), kernel=self.kernel)[0]
            for a, b, sign in zip(first, second, signs, strict=True)
        ]
        return sum(self._go_back(first, seeds))  # type: ignore[return-value]  # there is one at least

    def ods_gradient(
        self, x_BCHW: Tensor, j: Member, w_BK: Tensor, tau: float, *, z_BHWC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(j, int), "modules are chosen by the host"
        pieces = self._run([_Frozen(self._teachers()[j], goes_back=True)], x_BCHW)
        seeds_BK, confidence_B = ods_seeds(_joined(pieces[0]), w_BK, tau, kernel=self.kernel)
        return self._go_back(pieces, [seeds_BK])[0], confidence_B

    def _autocast(self, x: Tensor) -> Any:
        # threads share the cache of cast weights, and with it graphs
        return autocast(x.device, self.precision, cache=False)

    def _teachers(self) -> list[Classify]:
        assert self.teachers is not None, "no teachers"
        if self.passes.compiled:
            return [partial(self.passes.teacher, m) for m in range(self.teachers.E)]
        return list(self.teachers.classifiers)

    def _member(self, m: int, x_BCHW: Tensor) -> Tensor:
        return self.passes.member(m, x_BCHW) if self.passes.compiled else self.student.side_by_side(x_BCHW, (m,))[0]

    def _run(self, networks: Sequence[_Frozen], x_BCHW: Tensor) -> list[list[_Piece]]:
        """Forwards of frozen networks, each cut into rows until there is work for every thread."""
        ending = sum(network.goes_back for network in networks) or len(networks)
        parts = x_BCHW.detach().tensor_split(_num_parts(len(x_BCHW), self.crew.threads, ending))

        def task(network: _Frozen, x_BCHW: Tensor) -> Callable[[], _Piece]:
            def run() -> _Piece:
                # of its own for each network: a gradient to it is that network's
                own = x_BCHW.detach().requires_grad_(network.goes_back)
                with torch.set_grad_enabled(network.goes_back), self._autocast(own):
                    return _Piece(own, network.classify(own))

            return run

        pieces = self.crew.run([task(network, x_BCHW) for network in networks for x_BCHW in parts])
        return [pieces[i : i + len(parts)] for i in range(0, len(pieces), len(parts))]

    def _go_back(self, networks: Sequence[Sequence[_Piece]], seeds: Sequence[Tensor]) -> list[Tensor]:
        """Gradients (B, C, H, W) to the images, a network each, from the gradients to their logits."""

        def task(piece: _Piece, seeds_BK: Tensor) -> Callable[[], Tensor]:
            # asking for x alone makes autograd skip every weight gradient
            return lambda: torch.autograd.grad(piece.logits_BK, piece.x_BCHW, seeds_BK.to(piece.logits_BK.dtype))[0]

        tasks = [
            task(piece, seeds_BK)
            for pieces, whole in zip(networks, seeds, strict=True)
            for piece, seeds_BK in zip(pieces, whole.tensor_split(len(pieces)), strict=True)
        ]
        gradients, length = self.crew.run(tasks), len(networks[0])
        return [torch.cat(gradients[i : i + length]) for i in range(0, len(gradients), length)]

    # ---- the student in training -------------------------------------------------------------------------------------

    def _train(self, x_BCHW: Tensor) -> list[list[Tensor]]:
        """Logits (M', B', K) of the student in training mode, by members and, of these, by rows."""
        student, threads = self.student, self.crew.threads
        E = student.E if isinstance(student, BatchEnsembleStudent) else 1
        groups = max(n for n in range(1, E + 1) if E % n == 0 and n <= threads)
        parts = x_BCHW.tensor_split(_num_parts(len(x_BCHW), threads, groups, even=True))
        members = torch.arange(student.E).chunk(groups)
        is_recorded = torch.is_grad_enabled()

        def task(members: list[int], x_BCHW: Tensor) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with torch.set_grad_enabled(is_recorded), self._autocast(x_BCHW):
                    return student.side_by_side(x_BCHW, members)

            return run

        logits = self.crew.run_together([task(own.tolist(), x_BCHW) for own in members for x_BCHW in parts])
        return [logits[i : i + len(parts)] for i in range(0, len(logits), len(parts))]

    def _why_whole(self, images_BCHW: Tensor) -> str | None:
        """Say why the student in training cannot be cut up, by trying; None where it can. Leaves no trace."""
        student = self.student
        hooked = (m for m in student.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
        if (module := next(hooked, None)) is not None:
            return f"{type(module).__name__} has hooks"
        groups = [module.ranks for module in student.modules() if isinstance(module, BatchNorm2d)]
        try:
            synchronise_norms(student, NormsOfCrew(self.crew, groups[0] if groups else ALONE))
        except UserError:
            return "a norm keeps statistics of the batch in a way that is not known here"
        state, buffers = torch.get_rng_state(), [(b, b.clone()) for b in student.buffers()]
        precision, self.precision = self.precision, "fp32"
        student.train()
        try:
            with torch.no_grad():
                whole_MBK = super().student_logits(images_BCHW)
                drew = not torch.equal(state, torch.get_rng_state())
                cut_MBK = whole_MBK if drew else _stacked(self._train(images_BCHW))
        finally:
            self.precision = precision
            torch.set_rng_state(state)
            for buffer, before in buffers:
                buffer.copy_(before)
        if drew:
            return "a module draws numbers"
        difference = (whole_MBK - cut_MBK).abs().max()
        if not difference <= _TOLERANCE * whole_MBK.abs().max():
            return "it mixes the rows of a batch"
        return None


class _Cut(torch.autograd.Function):
    """Logits (M, B, K) of a student that was cut up, differentiable in its parameters."""

    @staticmethod
    def forward(ctx: Any, networks: SideBySideNetworks, x_BCHW: Tensor, *parameters: nn.Parameter) -> Tensor:
        with torch.enable_grad():
            ctx.pieces = networks._train(x_BCHW.detach())
        ctx.networks, ctx.parameters = networks, parameters
        return _stacked(ctx.pieces).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pieces, ctx.pieces = ctx.pieces, None
        assert pieces is not None, "a training forward can be gone back through once"
        wanted = [p for p in ctx.parameters if p.requires_grad]

        def task(logits: Tensor, gradient: Tensor) -> Callable[[], tuple[Tensor | None, ...]]:
            return lambda: torch.autograd.grad(logits, wanted, gradient, allow_unused=True)

        tasks = [
            task(logits, gradient)
            for own, rows in zip(pieces, grads[0].tensor_split(len(pieces)), strict=True)
            for logits, gradient in zip(own, rows.tensor_split(len(own), dim=1), strict=True)
        ]
        found = ctx.networks.crew.run_together(tasks)
        gradients = iter([_sum([g for g in of_one if g is not None]) for of_one in zip(*found, strict=True)])
        return None, None, *(next(gradients) if p.requires_grad else None for p in ctx.parameters)


def _num_parts(rows: int, threads: int, networks: int, *, even: bool = False) -> int:
    """Parts of a batch of so many rows, of which `networks` times as many are work for every thread."""
    parts = min(rows, -(-threads // networks))
    while even and rows % parts:
        parts -= 1
    return parts


def _joined(pieces: Sequence[_Piece]) -> Tensor:
    return torch.cat([piece.logits_BK.detach() for piece in pieces])


def _stacked(pieces: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(list(own), dim=1) for own in pieces])


def _sum(gradients: Sequence[Tensor]) -> Tensor | None:
    """Sum in order, into the first."""
    if not gradients:
        return None
    total = gradients[0]
    for gradient in gradients[1:]:
        total.add_(gradient)
    return total
