"""What the operations of a traced network are to the kernels: the kind of each, or why it has none.

A kind is `conv`, `norm`, `relu`, `add`, `max pool`, `pool` (the global average), `linear`, `pass` (hands its input on),
`size` (a number that a reshape reads), or a graph's own `placeholder` and `output`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ensdistill.kernels.conv.arguments import KERNELS
from ensdistill.models.layers import BatchNorm2d, GlobalAveragePool

Refuse = Callable[[str], Exception]
"""Makes the error that says why."""

# What calling a module or function means here. A module in `_PASSED` hands its input on (dropout in evaluation, and in
# training only at p = 0).
_RELU = (F.relu, torch.relu, "relu", "relu_")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_FLATTEN = (torch.flatten, "flatten", "view", "reshape", "squeeze")
_PASSED = (nn.Identity, nn.Flatten)
ADD_IN_PLACE = (operator.iadd, "add_")
# Modules that the kernels stand for, and all forwards that they can stand for.
LEAVES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, GlobalAveragePool)
_FORWARDS = {leaf.forward for leaf in (*LEAVES, BatchNorm2d)}
_CONV = nn.Conv2d._conv_forward
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def kind_of(node: fx.Node, network: nn.Module, refuse: Refuse) -> str:
    """Name the kind of `node`; raises what `refuse` makes where kernels cannot stand for it."""
    if node.op in ("placeholder", "output"):
        return node.op
    if node.op == "call_module":
        return _module_kind(str(node.target), network, refuse)
    if node.target in _RELU:
        return "relu"
    if node.target in _ADD and not node.kwargs and len(node.all_input_nodes) == 2:
        return "add"
    if node.target in _FLATTEN:
        return "pass"
    if node.target in ("size", "shape", getattr, operator.getitem):
        return "size"  # only a flatten can read it: everything else refuses a number
    if node.target in (torch.mean, "mean"):
        dims = [*node.args[1:2], *(node.kwargs.get(key) for key in ("dim", "axis"))]
        if any(tuple(dim) in ((2, 3), (-2, -1), (-1, -2), (3, 2)) for dim in dims if isinstance(dim, list | tuple)):
            return "pool"
    if node.target in (F.max_pool2d, torch.max_pool2d):
        given = dict(zip(_MAX_POOL, node.args[1:], strict=False)) | node.kwargs
        _check_max_pool(node.name, given, refuse)
        return "max pool"
    if node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)):
        return "pool"
    raise refuse(f"the operation {node.target} has no kernel")


def _module_kind(name: str, network: nn.Module, refuse: Refuse) -> str:
    module = network.get_submodule(name)
    if isinstance(module, LEAVES):
        _check_leaf(name, module, refuse)
    if isinstance(module, nn.Conv2d):
        _check_conv(name, module, refuse)
        return "conv"
    if isinstance(module, nn.BatchNorm2d):
        if not module.affine or not module.track_running_stats or module.momentum is None:
            raise refuse(f"norm '{name}' has no weights or no running statistics")
        return "norm"
    if isinstance(module, nn.ReLU):
        return "relu"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.MaxPool2d):
        _check_max_pool(name, {key: getattr(module, key) for key in _MAX_POOL}, refuse)
        return "max pool"
    if isinstance(module, GlobalAveragePool):
        return "pool"
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return "pool"
    if isinstance(module, nn.AvgPool2d):
        raise refuse(f"average pool '{name}' has a window of a fixed size")
    if isinstance(module, _PASSED) or (isinstance(module, nn.Dropout) and module.p == 0):
        return "pass"
    raise refuse(f"{type(module).__name__} '{name}' has no kernel")


def _check_leaf(name: str, module: nn.Module, refuse: Refuse) -> None:
    """Refuse a module that computes otherwise than PyTorch's: a forward of its own, a weight made of others."""
    kind: Any = getattr(type(module), "plain_class", type(module))  # a BatchEnsemble layer's own forward is known
    own = vars(module).keys() & {"forward", "_conv_forward"}
    if own or kind.forward not in _FORWARDS or (isinstance(module, nn.Conv2d) and kind._conv_forward is not _CONV):
        raise refuse(f"{kind.__name__} '{name}' has a forward of its own")
    if any(getattr(module, which, None) is not module._parameters.get(which) for which in ("weight", "bias")):
        raise refuse(f"{kind.__name__} '{name}' computes its weight or bias")


def _check_conv(name: str, conv: nn.Conv2d, refuse: Refuse) -> None:
    k, stride = conv.kernel_size[0], conv.stride[0]
    padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
    same = ("same",) if stride == 1 else ()
    if (
        conv.kernel_size not in [(side, side) for side in KERNELS]
        or conv.stride not in ((1, 1), (2, 2))
        or padding not in ((k // 2, k // 2), *same, *(("valid",) if k == 1 else ()))
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
    ):
        size = "x".join(map(str, conv.kernel_size))
        raise refuse(
            f"convolution '{name}' ({size}, stride {stride}, padding {padding}, dilation {conv.dilation[0]}, groups "
            f"{conv.groups}) is none of 1x1, 3x3 or 7x7 with stride 1 or 2, zero padding k // 2 and one group"
        )


def _check_max_pool(name: str, given: Mapping[str, Any], refuse: Refuse) -> None:
    defaults = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    found = defaults | {key: value for key, value in given.items() if value is not None}
    wanted = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
    fits = all(found.get(key) in (n, (n, n), [n, n]) for key, n in wanted.items())
    if not fits or found["ceil_mode"] or found["return_indices"]:
        options = ", ".join(f"{key} {found[key]}" for key in _MAX_POOL if key in found)
        raise refuse(f"max-pool '{name}' ({options}) is not the one of 3x3 with stride 2 and padding 1")
