"""Students: networks of E members that train together, and the network that each ships.

A student maps images (B, C, H, W) in [0, 1] to logits (M, B, K), one row of blocks a member: `student(x)` runs every
member, `student(x, members=[a, b])` only those. Plain networks have one member.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.models import Classifier
from ensdistill.models.batch_ensemble import (
    average_members,
    factor_parameters,
    folded_members,
    member_network,
    select_members,
    to_batch_ensemble,
)
from ensdistill.models.ensembles import MemberNetworks, call_with, slots
from ensdistill.runtime.errors import UserError

Members = Sequence[int] | Tensor
"""Numbers of members; or int64 (M,) on the device, which a captured graph follows."""


class Student(nn.Module):
    """A network in training with `E` members; `shared` and `factors` are the optimizer's two groups of parameters."""

    E: int

    @abstractmethod
    def forward(self, x_BCHW: Tensor, members: Members | None = None) -> Tensor:
        """Logits (M, B, K) of the given members, of all by default."""

    def side_by_side(self, x_BCHW: Tensor, members: Sequence[int]) -> Tensor:
        """Logits (M, B, K) of the given members; several threads may call it at once, for different ones."""
        return self(x_BCHW, members)

    @abstractmethod
    def shipped(self) -> Classifier:
        """Give the network that is evaluated and shipped, copied or shared: plain, or members that predict together."""

    def factors(self) -> list[nn.Parameter]:
        """List the rank-one factors, whose weight decay and learning rate are their own."""
        return []

    def shared(self) -> list[nn.Parameter]:
        """List every parameter that is no rank-one factor."""
        factors = {id(parameter) for parameter in self.factors()}
        return [parameter for parameter in self.parameters() if id(parameter) not in factors]


class PlainStudent(Student):
    """One plain network: `ce` and `kd`."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.E = 1
        self.classifier = classifier

    def forward(self, x_BCHW: Tensor, members: Members | None = None) -> Tensor:
        return self.classifier(x_BCHW).unsqueeze(0)

    def shipped(self) -> Classifier:
        return self.classifier


class BatchEnsembleStudent(Student):
    """Shared weights and rank-one factors per member; ships the averaged network (`average`) or the ensemble."""

    def __init__(self, classifier: Classifier, E: int, *, average: bool, converted: bool = False) -> None:
        """Convert a copy of the network of `classifier`, unless it is `converted` already, to E members."""
        super().__init__()
        self.E = E
        self.average = average
        self.classifier = classifier if converted else classifier.around(to_batch_ensemble(classifier.network, E))

    def forward(self, x_BCHW: Tensor, members: Members | None = None) -> Tensor:
        M = self.E if members is None else len(members)
        x_MBCHW = torch.cat([x_BCHW] * M)  # blockwise; cat keeps channels_last
        selected = nullcontext() if members is None else select_members(self.classifier.network, members)
        with selected:
            return self.classifier(x_MBCHW).unflatten(0, (M, -1))

    def side_by_side(self, x_BCHW: Tensor, members: Sequence[int]) -> Tensor:
        x_MBCHW = torch.cat([x_BCHW] * len(members))
        with folded_members(self.classifier.network, members):
            return self.classifier(x_MBCHW).unflatten(0, (len(members), -1))

    def shipped(self) -> Classifier:
        student = self.classifier.network
        if self.average:
            return self.classifier.around(average_members(student))
        return self.classifier.around(MemberNetworks([member_network(student, m) for m in range(self.E)]))

    def factors(self) -> list[nn.Parameter]:
        return list(factor_parameters(self.classifier.network))


class HydraStudent(Student):
    """A shared trunk; the last group, the final norm and the classifier once per member, each drawn anew."""

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        super().__init__()
        self.E = len(classifiers)
        first = classifiers[0]
        splits = [_split_head(classifier.network) for classifier in classifiers]
        self.trunk = first.around(splits[0][0])
        self.heads = nn.ModuleList(head for _, head in splits)
        self._networks = (first.network,)  # in a tuple: its modules are registered above already

    def forward(self, x_BCHW: Tensor, members: Members | None = None) -> Tensor:
        features = self.trunk(x_BCHW)
        if isinstance(members, Tensor):
            return torch.stack([self._head(m_1, features) for m_1 in members.split(1)])
        return torch.stack([self.heads[m](features) for m in (range(self.E) if members is None else members)])

    def _head(self, m_1: Tensor, features: Tensor) -> Tensor:
        """Logits (B, K) of the head `m_1`, int64 (1,) on the device: of the first head's code, with its tensors."""
        heads = [slots(head) for head in self.heads]
        # `index` copies the row out: PyTorch 2.11 cannot compile a convolution whose weight is a view of others
        own = {name: torch.ops.aten.index(torch.stack([head[name] for head in heads]), [m_1[0]]) for name in heads[0]}
        return call_with(self.heads[0], own, features)

    def shipped(self) -> Classifier:
        networks = []
        for head in self.heads:
            network = copy.deepcopy(self._networks[0])
            _split_head(network)[1].load_state_dict(head.state_dict())
            networks.append(network)
        return self.trunk.around(MemberNetworks(networks))


def _split_head(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    split_head: Any = getattr(network, "split_head", None)
    if split_head is None:
        raise UserError(
            f"method hydra: {type(network).__name__} has no split_head() that gives its trunk and its head; "
            "add one, or choose another method"
        )
    return split_head()


def build_student(method: Method, make: Callable[[int], Classifier], *, E: int, seed: int) -> Student:
    """Build the student of `method`, drawn from `seed`.

    Args:
        make: gives a freshly initialised classifier for a seed.
        E: members; the students without members ignore it.
    """
    if method.student in ("ce", "kd"):
        return PlainStudent(make(seed))
    if method.student == "hydra":
        # One stream of seeds a student: heads start from different draws, and no two students share one.
        return HydraStudent([make(seed + 1_000_003 * m) for m in range(E)])
    return BatchEnsembleStudent(make(seed), E, average=method.student == "latentbe")
