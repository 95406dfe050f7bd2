"""Teachers and student as a step sees them: logits, and the image gradients of the perturbation.

`Networks` asks the modules themselves (modules/passes.py), by autograd: the definition, and the path of whatever has no
kernels.
`KernelNetworks` runs what the member-batched kernels can express through them and leaves the rest to the modules; its
`notes` say what, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.engine.frozen import FrozenNetworks, Kept
from ensdistill.engine.member_training import MemberTraining, trunk_and_heads
from ensdistill.engine.modules.passes import Member, ModulePasses
from ensdistill.engine.operations import Backend, Operations, make_operations
from ensdistill.engine.structure import NotExpressible, Structure, shape_of, structure_of
from ensdistill.kernels.loss.seeds import divergence_seeds, ods_seeds
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import BatchEnsembleStudent, HydraStudent, PlainStudent, Student
from ensdistill.runtime.environment import Precision, autocast
from ensdistill.runtime.streams import SideStream

Pair = tuple[int, int] | Tensor
"""Members (a, b): numbers, or int64 on the device for networks that select there: (2,), or a, a + n, b, b + n for
networks that have teachers and student in slots n apart (`beside`)."""


class Networks:
    """Teachers and student by their modules. Images are (B, C, H, W) in [0, 1]; gradients have their shape.

    An image gradient is up to a factor an image. The perturbation sees every network in evaluation mode. `z_BHWC`,
    where a method takes it, is the same images as `normalise` wants them, if they have been normalised already.
    """

    kernel: bool | None = False
    """Choice of kernels for the work on images and logits (see `kernels.launch.use_kernel`)."""
    normalise: tuple[Tensor, Tensor] | None = None
    """Shared (mean_C, std_C), where all networks take images (B, H, W, C) that are normalised by it; or None."""
    dtype = torch.float32
    """Type of images that are already normalised."""

    def __init__(self, teachers: Teachers | None, student: Student, precision: Precision) -> None:
        self.teachers, self.student, self.precision = teachers, student, precision
        self.passes = ModulePasses(teachers, student)
        """How modules are run, as far as they are."""
        self.notes: list[str] = []
        """Reasons why networks run through their modules although kernels were asked for."""
        self.side: SideStream | None = None
        """Stream for the teachers' logits beside the student's; None: nothing may run beside it."""

    def selects_on_device(self, shown: str) -> bool:
        """Say whether the perturbation `shown` is told its members by a tensor; else the host has to name them."""
        return self.passes.on_device or not self._perturbs_by_modules(shown)

    def beside(self, shown: str) -> int:
        """Distance in slots from a teacher to the student's member where the perturbation `shown` runs both in one
        pass; else 0."""
        return 0

    def asks_modules(self, shown: str) -> bool:
        """Say whether modules compute a part of a step with the perturbation `shown`: they may draw, and do anything.

        A step without them can be captured as it is; one with them is tried (engine/modules/rehearsal.py).
        """
        return True

    def why_not_captured(self, shown: str) -> str | None:
        """Say why no CUDA graph can hold a step with the perturbation `shown`; None where it can be tried."""
        return self.passes.why_host() if shown not in ("clean", "gaussian") else None

    def why_not_compiled(self) -> str | None:
        """Say why torch.compile does not reach the modules; None where it does."""
        return None

    def teacher_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        """Logits (E, B, K) of the teachers, without a graph of autograd's."""
        assert self.teachers is not None, "no teachers"
        with self._autocast(x_BCHW), torch.no_grad():
            return self.passes.all_teachers(x_BCHW)

    def student_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        """Logits (M, B, K) of the student in training mode, differentiable in its parameters."""
        self.student.train()
        with self._autocast(x_BCHW):
            return self.passes.student(x_BCHW)

    def divergence_gradient(
        self, x_BCHW: Tensor, pair: Pair, *, with_student: bool, z_BHWC: Tensor | None = None
    ) -> Tensor:
        """Gradient ∂L/∂x of CE(teacher a under b) − CE(member a under b), without the student of the first alone."""
        teachers = self._teacher_divergence(x_BCHW, pair, z_BHWC)
        return teachers + self._student_divergence(x_BCHW, pair, z_BHWC) if with_student else teachers

    def ods_gradient(
        self, x_BCHW: Tensor, j: Member, w_BK: Tensor, tau: float, *, z_BHWC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient ∂/∂x of Σ w · softmax(t_j / τ), and the confidence max softmax(t_j / τ) (B,)."""
        assert self.teachers is not None, "no teachers"
        x_BCHW = x_BCHW.detach().requires_grad_()
        with self._autocast(x_BCHW), torch.enable_grad():
            t_BK = self.passes.teacher(j, x_BCHW)
        seeds_BK, confidence_B = ods_seeds(t_BK.detach(), w_BK, tau, kernel=self.kernel)
        return _input_gradient(t_BK, x_BCHW, seeds_BK), confidence_B

    def _perturbs_by_modules(self, shown: str) -> bool:
        return True

    def _teacher_divergence(self, x_BCHW: Tensor, pair: Pair, z_BHWC: Tensor | None) -> Tensor:
        assert self.teachers is not None, "no teachers"
        a, b = _two(pair)
        x_BCHW = x_BCHW.detach().requires_grad_()
        with self._autocast(x_BCHW):
            with torch.enable_grad():
                t_BK = self.passes.teacher(a, x_BCHW)
            with torch.no_grad():
                other_BK = self.passes.teacher(b, x_BCHW)
        return _input_gradient(t_BK, x_BCHW, divergence_seeds(t_BK[None], other_BK[None], kernel=self.kernel)[0])

    def _student_divergence(self, x_BCHW: Tensor, pair: Pair, z_BHWC: Tensor | None) -> Tensor:
        a, b = _two(pair)
        self.student.eval()
        x_BCHW = x_BCHW.detach().requires_grad_()
        with self._autocast(x_BCHW):
            with torch.enable_grad():
                s_BK = self.passes.member(a, x_BCHW)
            with torch.no_grad():
                other_BK = self.passes.member(b, x_BCHW)
        seeds_1BK = divergence_seeds(s_BK[None], other_BK[None], (-1.0,), kernel=self.kernel)
        return _input_gradient(s_BK, x_BCHW, seeds_1BK[0])

    def _autocast(self, x: Tensor) -> Any:
        # A context of its own for each pass: autocast caches the cast weights of one, and a cast made for the frozen
        # perturbation must not serve the training pass.
        return autocast(x.device, self.precision)


def _input_gradient(logits: Tensor, x: Tensor, seeds: Tensor) -> Tensor:
    # Asking for x alone makes autograd skip every weight gradient: an input-only backward.
    (gradient,) = torch.autograd.grad(logits, x, seeds.to(logits.dtype))
    return gradient


class KernelNetworks(Networks):
    """Teachers and student through the member-batched kernels, as far as they can be expressed.

    Where teachers and student have one shape, the perturbation runs both as one pass of four members. The teachers are
    folded here, once: what changes in them later is not seen. The student's newest weights always are.
    """

    def __init__(
        self, teachers: Teachers | None, student: Student, precision: Precision, operations: Operations
    ) -> None:
        super().__init__(teachers, student, precision)
        self.operations, self.kernel = operations, operations.kernel
        self.dtype = dtype_of(precision)
        self.side = SideStream(next(student.parameters()).device)
        self.frozen: FrozenNetworks | None = None
        self.frozen_student: FrozenNetworks | None = None
        self._first_member = 0
        self._how: dict[str, Any] = {"dtype": self.dtype, "operations": operations}
        self._student_classifier: Classifier
        """Normalisation of the student's images."""
        self._student_networks: list[nn.Module]
        """Network of the student, or each head's behind the one trunk."""
        self.training = self._express_student()
        if teachers is not None:
            self._express_teachers(teachers)
        if self.frozen_student is None and self.training is not None and teachers is not None:
            try:
                self.frozen_student = self._freeze_student(self.training)
            except NotExpressible as error:
                self.notes.append(f"the student in evaluation mode: {error}")
        self._share_normalisation(teachers)

    def _share_normalisation(self, teachers: Teachers | None) -> None:
        if self.training is None or (teachers is not None and self.frozen is None):
            return
        pixels = SlotNormalisation([self._student_classifier, *(teachers.classifiers if teachers is not None else [])])
        if pixels.is_shared:
            self.normalise = pixels.mean_SC[0], pixels.std_SC[0]

    def _express_student(self) -> MemberTraining | None:
        student: Student = self.student
        try:
            if isinstance(student, HydraStudent):
                self._student_classifier, trunk = student.trunk, student.trunk.network
                self._student_networks = [nn.Sequential(trunk, head) for head in student.heads]
                training = trunk_and_heads(self._student_networks, **self._how)
            elif isinstance(student, PlainStudent | BatchEnsembleStudent):
                self._student_classifier, self._student_networks = student.classifier, [student.classifier.network]
                training = MemberTraining(student.classifier.network, student.E, **self._how)
            else:
                raise NotExpressible(f"{type(student).__name__} is none that has kernels")
        except NotExpressible as error:
            self.notes.append(f"the student: {error}")
            return None
        self.training_pixels = SlotNormalisation([self._student_classifier])
        return training

    def _slots(self, network: nn.Module, slots: int, structure: Structure, **trunk: Any) -> FrozenNetworks:
        return FrozenNetworks(network, slots, structure=structure, **self._how, **trunk)

    def _freeze_student(self, training: MemberTraining) -> FrozenNetworks:
        network, trunk = self._student_networks[0], None
        if training.trunk is not None:
            trunk = self._slots(network, 1, training.trunk.structure)
        return self._slots(network, self.student.E, training.structure, trunk=trunk)

    def _express_teachers(self, teachers: Teachers) -> None:
        classifiers: list[Any] = list(teachers.classifiers)
        networks = [classifier.network for classifier in classifiers]
        try:
            structures = [structure_of(network) for network in networks]
            shapes = [shape_of(n, s) for n, s in zip(networks, structures, strict=True)]
            if any(shape != shapes[0] for shape in shapes):
                raise NotExpressible("their layers differ")
            joins = (
                self.training is not None
                and isinstance(self.student, BatchEnsembleStudent)
                and shape_of(self._student_networks[0], self.training.structure) == shapes[0]
            )
            members = [self._student_classifier] * self.student.E if joins else []
            self.frozen = self._slots(networks[0], len(networks) + len(members), structures[0])
        except NotExpressible as error:
            self.notes.append(f"the teachers: {error}")
            return
        self.pixels = SlotNormalisation([*classifiers, *members])
        self.frozen.load(networks, 0)
        # named even where they are all there are: one variant of every kernel for all methods
        self._all_teachers = torch.arange(teachers.E, device=self.pixels.mean_SC.device)
        if joins:
            self.frozen_student, self._first_member = self.frozen, teachers.E

    def beside(self, shown: str) -> int:
        joined = shown == "tdiv-sdiv" and self.frozen is not None and self.frozen_student is self.frozen
        return self._first_member if joined else 0

    def _perturbs_by_modules(self, shown: str) -> bool:
        return self.frozen is None or (shown == "tdiv-sdiv" and self.frozen_student is None)

    def asks_modules(self, shown: str) -> bool:
        return self.training is None or (self.teachers is not None and self._perturbs_by_modules(shown))

    def why_not_captured(self, shown: str) -> str | None:
        return super().why_not_captured(shown) if self.frozen is None else None

    def teacher_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        if self.frozen is None or self.teachers is None:
            return super().teacher_logits(x_BCHW)
        members = self._all_teachers
        return self.frozen.forward(self.pixels.images(x_BCHW, z_BHWC, members), members)[0]

    def student_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        if self.training is None:
            return super().student_logits(x_BCHW)
        self.student.train()
        return self.training(self.training_pixels.images(x_BCHW, z_BHWC, None))

    def divergence_gradient(
        self, x_BCHW: Tensor, pair: Pair, *, with_student: bool, z_BHWC: Tensor | None = None
    ) -> Tensor:
        if not with_student or self.frozen is None or self.frozen_student is not self.frozen:
            return super().divergence_gradient(x_BCHW, pair, with_student=with_student, z_BHWC=z_BHWC)
        self._refresh_student()
        members = _members(pair, x_BCHW.device)
        if len(members) == 2:
            members = torch.stack([members, members + self._first_member], dim=1).flatten()
        return self._seeded(self.frozen, self.pixels, self.pixels.images(x_BCHW, z_BHWC, members), members, (1.0, -1.0))

    def ods_gradient(
        self, x_BCHW: Tensor, j: Member, w_BK: Tensor, tau: float, *, z_BHWC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.frozen is None:
            return super().ods_gradient(x_BCHW, j, w_BK, tau)
        members = _members((j,) if isinstance(j, int) else j, x_BCHW.device)
        logits, kept = self.frozen.forward(self.pixels.images(x_BCHW, z_BHWC, members), members, bits=1)
        seeds_BK, confidence_B = ods_seeds(logits[0], w_BK, tau, dtype=self.frozen.dtype, kernel=self.kernel)
        return self._image_gradient(self.frozen, self.pixels, kept, seeds_BK[None], members), confidence_B

    def _teacher_divergence(self, x_BCHW: Tensor, pair: Pair, z_BHWC: Tensor | None) -> Tensor:
        if self.frozen is None:
            return super()._teacher_divergence(x_BCHW, pair, z_BHWC)
        members = _members(pair, x_BCHW.device)
        return self._seeded(self.frozen, self.pixels, self.pixels.images(x_BCHW, z_BHWC, members), members, (1.0,))

    def _student_divergence(self, x_BCHW: Tensor, pair: Pair, z_BHWC: Tensor | None) -> Tensor:
        if self.frozen_student is None:
            return super()._student_divergence(x_BCHW, pair, z_BHWC)
        self._refresh_student()
        members = _members(pair, x_BCHW.device) + self._first_member
        pixels = self.pixels if self.frozen_student is self.frozen else self.training_pixels
        return self._seeded(self.frozen_student, pixels, pixels.images(x_BCHW, z_BHWC, members), members, (-1.0,))

    def _seeded(
        self, frozen: FrozenNetworks, pixels: SlotNormalisation, z: Tensor, members: Tensor, signs: Sequence[float]
    ) -> Tensor:
        """Forward of `members`, those of a before those of b; input gradient of a's, with sign · (p_a − p_b)."""
        G = len(signs)
        logits, kept = frozen.forward(z, members, bits=G)
        seeds_GBK = divergence_seeds(logits[:G], logits[G:], signs, dtype=frozen.dtype, kernel=self.kernel)
        return self._image_gradient(frozen, pixels, kept, seeds_GBK, members[:G])

    def _image_gradient(
        self, frozen: FrozenNetworks, pixels: SlotNormalisation, kept: Kept, seeds_MBK: Tensor, members: Tensor
    ) -> Tensor:
        """Go back to the images: their gradient (B, C, H, W), summed over `members`."""
        if pixels.is_shared:  # the chain rule of the normalisation rides along with the last convolution
            return _nchw(frozen.input_gradient(kept, seeds_MBK, members, scale=pixels.inverse_std_1C))
        gradient = frozen.input_gradient(kept, seeds_MBK, members)
        return _nchw((gradient / pixels.rows(pixels.std_SC, members)).sum(0))

    def _refresh_student(self) -> None:
        """Fold the student's weights anew, which change with every update."""
        assert self.frozen_student is not None
        self.frozen_student.load(self._student_networks, self._first_member)


def make_networks(
    backend: Backend, teachers: Teachers | None, student: Student, precision: Precision, device: torch.device
) -> Networks:
    """Choose how `teachers` and `student`, which lie on `device`, are computed; see `operations.make_operations`."""
    operations = make_operations(backend, device)
    if operations is None:
        return Networks(teachers, student, precision)
    return KernelNetworks(teachers, student, precision, operations)


def dtype_of(precision: Precision) -> torch.dtype:
    """Type of the kernels' activations."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


class SlotNormalisation:
    """The normalisation of the networks in the slots."""

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        self.mean_SC = torch.stack([classifier.pixel_mean.flatten() for classifier in classifiers])
        self.std_SC = torch.stack([classifier.pixel_std.flatten() for classifier in classifiers])
        # on `meta` there are no values to compare: only launches are listed there
        self.is_shared = self.mean_SC.is_meta or all(
            row == rows[0] for rows in (self.mean_SC.tolist(), self.std_SC.tolist()) for row in rows[1:]
        )
        self.inverse_std_1C = 1 / self.std_SC[:1]
        """Factor of the gradient of normalised images, where the normalisation is shared."""

    def images(self, x_BCHW: Tensor, z_BHWC: Tensor | None, members: Tensor | None) -> Tensor:
        """Normalise to (B, H, W, C) where all networks normalise alike, else (M, B, H, W, C); `z_BHWC` if given."""
        if z_BHWC is not None:
            return z_BHWC
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).contiguous()
        if self.is_shared:
            return (x_BHWC - self.mean_SC[0]) / self.std_SC[0]
        return (x_BHWC - self.rows(self.mean_SC, members)) / self.rows(self.std_SC, members)

    @staticmethod
    def rows(values_SC: Tensor, members: Tensor | None) -> Tensor:
        rows = values_SC if members is None else values_SC.index_select(0, members)
        return rows[:, None, None, None, :]


def _two(pair: Pair) -> tuple[Member, Member]:
    a, b = pair.split(1) if isinstance(pair, Tensor) else pair
    return a, b


def _members(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Count members out as int64 on the device: a copy from the host would wait for it."""
    if isinstance(values, Tensor):
        return values
    return torch.cat([torch.arange(value, value + 1, device=device) for value in values])


def _nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)
