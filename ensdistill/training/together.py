"""E teachers that train together, as one network with a leading axis of members.

They share the launches and nothing else: every member has its own weights, its own norms with statistics of its own
rows, its own images. The losses are added, so that each member gets the gradient of its own loss, and the optimizer
computes number by number: one over the stacked parameters does for each member what one of its own would do. Each
becomes what it becomes alone, up to the order of floating-point sums; by the modules its gradients are the very ones.
Their step is what `step.train_step` is for one network:

    x_m = augment(images_m; seed + m)          loss = Σ_m CE(network_m(x_m), labels_m)          Nesterov SGD

Every draw of member m has the seed that it has alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.engine.member_parameters import as_read
from ensdistill.engine.member_training import MemberTraining
from ensdistill.engine.networks import Networks, dtype_of
from ensdistill.engine.operations import Operations
from ensdistill.engine.structure import NotExpressible
from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.launch import check
from ensdistill.kernels.loss.seeds import at_least_fp32
from ensdistill.kernels.philox import counter_of
from ensdistill.models import Classifier
from ensdistill.models.ensembles import MemberNetworks, call_with, slots
from ensdistill.models.students import Members, Student
from ensdistill.runtime.environment import Precision
from ensdistill.training.module_draws import seed_modules
from ensdistill.training.step import State, StepConfig, apply_gradients

_APART = "teachers that train together draw each from a seed of its own, member by member"


class TeachersInTraining(Student):
    """E networks of one architecture with a stack of every parameter and buffer, (E, …), under the plain one's name.

    `forward` goes through the modules, a member at a time, on any device; `passes` through the member-batched kernels.
    `classifier(t)` is a plain network again. Buffers must be written in place, as norms write their running statistics:
    what a module assigns anew is lost.
    """

    def __init__(self, classifiers: Sequence[Classifier], *, for_kernels: bool = False) -> None:
        """Take over the state of `classifiers`, which are left alone.

        Args:
            for_kernels: let the weights lie in memory as the convolutions of `passes` read them, which spares copies;
                by default they lie as the plain networks' do, for a library may add in another order otherwise.
                Momentum must lie as the weights do: PyTorch's fused SGD on a CPU goes by memory, and does not check.

        Raises:
            ValueError: there is none, or their modules, parameters or buffers differ in name, shape or type.
        """
        super().__init__()
        check(len(classifiers) > 0, "classifiers", "at least one", len(classifiers))
        self.E = len(classifiers)
        first = classifiers[0]
        for member, classifier in enumerate(classifiers):
            same = str(classifier) == str(first)
            check(same, f"member {member}", "the modules of member 0", type(classifier.network).__name__)
        self._strides = {name: torch.empty_like(tensor).stride() for name, tensor in _tensors(first).items()}
        memo: dict[int, Any] = {}
        for name, tensor in _tensors(first).items():
            stack = tensor.detach().new_empty_strided((self.E, *tensor.shape), (tensor.numel(), *self._strides[name]))
            memo[id(tensor)] = _like(tensor, as_read(stack) if for_kernels else stack)
        self.stacked = copy.deepcopy(first, memo)
        for member, classifier in enumerate(classifiers):
            self.load(member, classifier)

    @torch.no_grad()
    def load(self, member: int, classifier: Classifier) -> None:
        """Make `member` what `classifier` is.

        Raises:
            ValueError: its parameters or buffers differ from a member's in name, shape or type.
        """
        stacks, given = _tensors(self.stacked), _tensors(classifier)
        expected = {name: (tuple(stack.shape[1:]), stack.dtype) for name, stack in stacks.items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()}
        for name in (*expected, *found):
            right = expected.get(name) == found.get(name)
            check(
                right, f"member {member}'s {name}", str(expected.get(name, "no such tensor")), found.get(name, "none")
            )
        for name, stack in stacks.items():
            stack[member].copy_(given[name])

    def classifier(self, member: int) -> Classifier:
        """A copy of `member` as the plain network that it is."""
        memo: dict[int, Any] = {}
        for name, stack in _tensors(self.stacked).items():
            row = stack.detach()[member]
            memo[id(stack)] = _like(stack, row.new_empty_strided(row.shape, self._strides[name]).copy_(row))
        return copy.deepcopy(self.stacked, memo)

    def shipped(self) -> Classifier:
        """The members as the ensemble that they are; a teacher is shipped by itself as `classifier(t)`."""
        members = MemberNetworks([self.classifier(member) for member in range(self.E)])
        C = self.stacked.pixel_mean.shape[1]
        unchanged = Classifier(members, [0.0] * C, [1.0] * C)  # each member normalises by itself
        return unchanged.to(self.stacked.pixel_mean.device).train(self.training)

    def forward(
        self, x: Tensor, members: Members | None = None, *, begin: Callable[[int], None] | None = None
    ) -> Tensor:
        """Logits (M, B, K) of the given members, of all by default.

        Args:
            x: images in [0, 1], (M, B, C, H, W), each member's own, or (B, C, H, W), the same for all of them.
            begin: called with each member before its modules are.
        """
        chosen = range(self.E) if members is None else members
        # all rows of a stack by one operation, whose backward stacks the gradients once
        unbound = {id(stack): stack.unbind() for stack in _tensors(self.stacked).values()}
        rows = {name: unbound[id(stack)] for name, stack in slots(self.stacked).items()}
        images = x.unbind() if x.ndim == 5 else [x] * len(chosen)
        logits = []
        for member, image in zip(chosen, images, strict=True):
            if begin is not None:
                begin(member)
            logits.append(call_with(self.stacked, {name: row[member] for name, row in rows.items()}, image))
        return torch.stack(logits)

    def passes(self, *, dtype: torch.dtype, operations: Operations) -> MemberTraining:
        """The training forward and backward by member-batched kernels, on images that `normalised` gives.

        They use parameters and running statistics in place, as `forward` does.

        Raises:
            NotExpressible: the networks have no such form.
        """
        return MemberTraining(self.stacked.network, self.E, dtype=dtype, operations=operations, stacked=True)

    def normalised(self, x: Tensor) -> Tensor:
        """(E, B, H, W, C), each member's images with its normalisation, of x (E, B, C, H, W) or (B, C, H, W)."""
        mean_ECHW, std_ECHW = self.stacked.pixel_mean, self.stacked.pixel_std
        z_EBCHW = (x - mean_ECHW[:, None]) / std_ECHW[:, None]
        return z_EBCHW.permute(0, 1, 3, 4, 2).contiguous()


class MemberLosses(NamedTuple):
    """Losses of an update of E members; `loss` alone is differentiable."""

    loss: Tensor
    """Σ loss_ce, a scalar: the gradient of each member's parameters is that of its own loss."""
    loss_ce: Tensor
    """(E,): each member's cross-entropy, the mean over its images."""
    acc1: Tensor
    """(E,): share of its images whose largest logit is the label's."""
    loss_wd: Tensor
    """(E,): ½ Σ‖θ‖² of its parameters; the optimizer's weight decay is its gradient, and `loss` is without it."""


def member_losses(logits_EBK: Tensor, labels_EB: Tensor, parameters: Iterable[Tensor]) -> MemberLosses:
    """The losses and measures of every member on its own labels (method `ce`).

    Args:
        labels_EB: int64 in [0, K).
        parameters: the members' stacks, (E, …) each.

    Raises:
        ValueError: the shapes or types are not those.
    """
    fits = logits_EBK.ndim == 3 and logits_EBK.numel() > 0 and logits_EBK.is_floating_point()
    check(fits, "logits_EBK", "logits (E, B, K)", logits_EBK)
    E, B, K = logits_EBK.shape
    check(labels_EB.shape == (E, B) and labels_EB.dtype == torch.int64, "labels_EB", f"int64 ({E}, {B})", labels_EB)
    stacks = [parameter.detach() for parameter in parameters]
    check(all(len(stack) == E for stack in stacks), "parameters", f"stacks of {E}", [len(stack) for stack in stacks])
    wide_EBK = logits_EBK.to(at_least_fp32(logits_EBK))
    loss_EB = F.cross_entropy(wide_EBK.reshape(E * B, K), labels_EB.reshape(E * B), reduction="none").view(E, B)
    loss_E = loss_EB.mean(1)
    # one launch for many tensors, as for one network
    norms = torch.stack(torch._foreach_norm([row for stack in stacks for row in stack.unbind()])).view(-1, E)
    acc1_E = (logits_EBK.argmax(-1) == labels_EB).to(loss_E.dtype).mean(1)
    return MemberLosses(loss_E.sum(), loss_E.detach(), acc1_E, norms.square().sum(0) / 2)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; one that has two names by its first."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, as a parameter where `tensor` is one."""
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


class TeacherNetworks(Networks):
    """The teachers in training, by the member-batched `operations`, or by their modules where those are None.

    `student` holds them all; there are no other teachers.
    """

    def __init__(self, together: TeachersInTraining, precision: Precision, operations: Operations | None) -> None:
        super().__init__(None, together, precision)
        self.together, self.operations = together, operations
        self.training: MemberTraining | None = None
        if operations is None:
            return
        self.kernel, self.dtype = operations.kernel, dtype_of(precision)
        try:
            self.training = together.passes(dtype=self.dtype, operations=operations)
        except NotExpressible as error:
            self.notes.append(f"the teachers in training: {error}")

    def asks_modules(self, shown: str) -> bool:
        return self.training is None

    def why_not_captured(self, shown: str) -> str | None:
        return None if self.training is not None else f"{_APART}, which a graph cannot repeat"

    def why_not_compiled(self) -> str | None:
        return None if self.training is not None else f"{_APART}, which a compiled pass would not"

    def student_logits(
        self, x_EBCHW: Tensor, z_BHWC: Tensor | None = None, *, begin: Callable[[int], None] | None = None
    ) -> Tensor:
        """(E, B, K) of each member's own images, in training mode; by modules `begin(member)` comes before each."""
        self.together.train()
        if self.training is not None:
            return self.training(self.together.normalised(x_EBCHW))
        with self._autocast(x_EBCHW):
            return self.together(x_EBCHW, begin=begin)


def teachers_step(
    state: State,
    config: StepConfig,
    images_EBHWC: Tensor,
    labels_EB: Tensor,
    lr: float | Tensor,
    *,
    counter: Tensor | None = None,
) -> dict[str, Tensor]:
    """Augment, forward, update: `state`, whose networks are `TeacherNetworks`, is advanced by one step.

    Args:
        images_EBHWC: uint8.
        labels_EB: int64 in [0, K).
        lr, counter: see `step.train_step`; the seed is member 0's, and member m's is m more.

    Returns:
        The measures of method `ce` before the update, (E,) each.
    """
    networks: Any = state.networks
    step, first_row, device = state.step, state.ranks.rank * images_EBHWC.shape[1], images_EBHWC.device
    if counter is None:
        counter = counter_of(config.seed, step, first_row, device)
    crop: dict[str, Any] = {"pad": config.pad, "flip": config.flip, "kernel": networks.kernel}
    member_3 = torch.zeros_like(counter)
    shown = []
    for images_BHWC in images_EBHWC.unbind():
        shown.append(augment(images_BHWC, counter + member_3, **crop)[0])
        member_3[:1] += 1
    x_EBCHW = torch.stack(shown).permute(0, 1, 4, 2, 3)
    logits_EBK = networks.student_logits(
        x_EBCHW, begin=lambda member: seed_modules(config.seed + member, step, first_row, device)
    )
    losses = member_losses(logits_EBK, labels_EB, networks.together.parameters())
    losses.loss.backward()
    apply_gradients(state, lr)
    loss = losses.loss_ce + config.weight_decay * losses.loss_wd
    return {"loss": loss, "loss_ce": losses.loss_ce, "loss_wd": losses.loss_wd, "acc1": losses.acc1}
