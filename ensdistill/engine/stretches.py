"""Hydra as two stretches of one network: the trunk, of one member, and the heads behind it, of E.

    value = trunk(images)             once for all members
    logits_m = head_m(value)          member-batched, every head with weights and norms of its own

Either is a `Structure`, cut out of that of trunk and head in one; values keep their numbers. In training and in
evaluation mode the heads' passes run the trunk's before theirs and behind theirs: see `MemberTraining`,
`FrozenNetworks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ensdistill.engine.frozen import shape_of
from ensdistill.engine.member_training import MemberTraining
from ensdistill.engine.structure import NotExpressible, Structure, structure_of
from ensdistill.models.students import HydraStudent

_TRUNK, _HEAD = "0.", "1."
"""How names of the modules begin in what `networks_of` gives."""


def networks_of(student: HydraStudent) -> list[nn.Module]:
    """Give each member as one network, trunk and head; the trunk is the same in all."""
    return [nn.Sequential(student.trunk.network, head) for head in student.heads]


def cut(whole: Structure) -> tuple[Structure, Structure]:
    """Cut the structure of trunk and head in one into the two.

    Raises:
        NotExpressible: something else than one value goes from the one to the other.
    """
    trunk = tuple(layer for layer in whole.layers if layer.name.startswith(_TRUNK))
    head = tuple(layer for layer in whole.layers if layer.name.startswith(_HEAD))
    written, by_head = {layer.target for layer in trunk}, {layer.target for layer in head}
    read = {value for layer in head for value in (layer.source, layer.residual)} | {whole.features}
    handed = sorted(value for value in read - by_head if value is not None)
    back = any(value in by_head for layer in trunk for value in (layer.source, layer.residual))
    if len(handed) != 1 or handed[0] not in written or back or not (whole.linear or "").startswith(_HEAD):
        raise NotExpressible("its heads read something else than one image of the trunk's")
    (value,) = handed
    return (
        Structure(layers=trunk, features=value, linear=None),
        Structure(layers=head, features=whole.features, linear=whole.linear, given=value),
    )


def training_of(networks: Sequence[nn.Module], **how: Any) -> MemberTraining:
    """Training passes of the heads of `networks`, which `networks_of` gives, behind their trunk; `how`: see there.

    Raises:
        NotExpressible: they have no such form.
    """
    structures = [structure_of(network) for network in networks]
    shapes = [shape_of(*of_one) for of_one in zip(networks, structures, strict=True)]
    # gradients of all heads come as one stack
    strides = [[parameter.stride() for parameter in network.parameters()] for network in networks]
    if any(each != alike[0] for alike in (shapes, strides) for each in alike):
        raise NotExpressible("its heads differ")
    first, heads = cut(structures[0])
    trunk = MemberTraining(networks[0], 1, structure=first, **how)
    return MemberTraining(networks, len(networks), structure=heads, trunk=trunk, **how)
