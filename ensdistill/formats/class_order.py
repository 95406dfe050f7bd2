"""Classes of a network against those of the data, by their names: the same, moved into the data's order, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensdistill.models import final_layer
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.runtime.errors import UserError, first_names


def match_classes(theirs: Sequence[str], ours: Sequence[str], where: str) -> tuple[list[int] | None, str]:
    """Find the network's class for each class of the data.

    Arrays and `.beton` files have no names but numbers, "0" to "K-1": beside real names they say nothing.

    Args:
        theirs: names of the network's classes, in the order of its logits.
        ours: names of the data's, in the order of their labels; as many.
        where: the network's file, for error messages.

    Returns:
        (order, note): logit `order[k]` is that of the data's class k, None where nothing moves; and a line for the
        user, empty where the names are the same.

    Raises:
        UserError: the names are of other classes, or one name is that of two.
    """
    assert len(theirs) == len(ours)
    theirs, ours = list(theirs), list(ours)
    if theirs == ours:
        return None, ""
    k = next(k for k, (name, other) in enumerate(zip(theirs, ours, strict=True)) if name != other)
    differ = f"class {k} is called '{theirs[k]}', in the data '{ours[k]}'"
    place = {name: index for index, name in enumerate(theirs)}
    if len(place) == len(theirs) and set(theirs) == set(ours):
        return [place[name] for name in ours], f"{differ}: the same classes in another order, taken by their names"
    nameless = are_numbers(theirs) or are_numbers(ours)
    if nameless and all(place.get(name, index) == index for index, name in enumerate(ours)):
        return None, f"{differ}: numbers are no names, so the classes are taken in order"
    unknown = next((name for name in theirs if name not in ours), None)
    reason = differ if unknown is None else f"class {place[unknown]} is called '{unknown}', which the data do not have"
    raise UserError(
        f"{where}: {reason} ({first_names(ours)}); expected the same names: give a network of these classes, or name "
        "the data's class folders as it does"
    )


def are_numbers(names: Sequence[str]) -> bool:
    """Tell whether classes have no names, but the numbers of their labels."""
    return list(names) == [str(index) for index in range(len(names))]


def in_order(network: nn.Module, order: Sequence[int]) -> nn.Module:
    """Make `network` give its logits (B, K), or (M, B, K), in another order: logit k is what was logit `order[k]`.

    Of our own networks the rows of the final layer move, so that they stay what kernels compute; others are wrapped.
    """
    if isinstance(network, MemberNetworks):
        network.members = nn.ModuleList(in_order(member, order) for member in network.members)
        return network
    if (layer := final_layer(network)) is None:
        return _InOrder(network, order)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[list(order)])
    return network


class _InOrder(nn.Module):
    """A network of somebody else's with its logits in another order."""

    order: Tensor

    def __init__(self, network: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW).index_select(-1, self.order)
