"""A network as the kernels see it: convolutions and norms in order, each with what rides on it.

`structure_of` traces the network's own `forward` (torch.fx), so that the networks are written once, as plain modules:

    Conv   target = conv(source) [+ residual]
    Norm   target = [relu](norm(source) [+ residual])
    MaxPool  target = maxpool(source)
    then   logits = linear(mean over pixels of features)

Values are numbers, 0 is the image. In evaluation mode norms are constants, and `frozen_layers` folds each into the
convolution before it, or makes it that convolution's second output relu(a·y + b) where others read y as well
(pre-activation networks). What has no such form is `NotExpressible`, which says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx, nn

from ensdistill.engine.kinds import ADD_IN_PLACE, LEAVES, kind_of


class NotExpressible(ValueError):
    """A network, or a part of it, that the kernels have no form for; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution: target = conv(source) [+ residual]."""

    name: str
    """Name of the module."""
    source: int
    """Number of the value that is read."""
    target: int
    """Number of the value that is written."""
    kernel: int
    """Side of the kernel: 1, 3 or 7."""
    stride: int
    """Stride in both directions: 1 or 2."""
    residual: int | None = None
    """Number of the value that is added."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm: target = [relu](norm(source) [+ residual])."""

    name: str
    """Name of the module."""
    source: int
    """Number of the value that is read: the target of a `Conv`."""
    target: int
    """Number of the value that is written."""
    relu: bool = False
    """True where a ReLU follows."""
    residual: int | None = None
    """Number of the value that is added before the ReLU."""


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """A max-pool of 3x3 with stride 2 and padding 1: target = maxpool(source)."""

    name: str
    """Name of the module, or of the operation."""
    source: int
    """Number of the value that is read."""
    target: int
    """Number of the value that is written."""
    residual: ClassVar[int | None] = None
    """Nothing is added."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A whole network: its layers, a global average pool and a linear layer; or a stretch of one (`cut`)."""

    layers: tuple[Conv | Norm | MaxPool, ...]
    """Convolutions, norms and max-pools, in an order in which they can run."""
    features: int
    """The value whose mean over pixels the linear layer reads; or what a stretch without one hands over."""
    linear: str | None
    """Name of the linear layer's module; None for a stretch that has none."""
    given: int = 0
    """The value that the layers are given: the images, or what the stretch before hands over."""

    @property
    def entries(self) -> tuple[Norm, ...]:
        """Norms of the given value: a stretch may begin with some."""
        return tuple(layer for layer in self.layers if isinstance(layer, Norm) and layer.source == self.given)


@dataclass(frozen=True, kw_only=True)
class FrozenConv:
    """A conv with norms: target = [relu](conv(source) · a + b [+ residual]), second_target = relu(a'·target + b')."""

    conv: str
    """Name of the convolution."""
    norm: str | None
    """Name of the norm that is folded into its weights and bias."""
    second: str | None
    """Name of the norm of the second output."""
    source: int
    """Number of the value that is read."""
    target: int
    """Number of the value of the first output; stored only where `is_read`."""
    second_target: int | None
    """Number of the value of the second output."""
    residual: int | None
    """Number of the value that is added."""
    relu: bool
    """True where a ReLU follows in the first output."""
    is_read: bool
    """True where a layer reads the first output."""
    kernel: int
    """Side of the kernel: 1, 3 or 7."""
    stride: int
    """Stride in both directions: 1 or 2."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def structure_of(network: nn.Module) -> Structure:
    """Trace a network that maps images (B, C, H, W) to logits (B, K), in training and in evaluation mode.

    Raises:
        NotExpressible: it does something else than what this file's head says.
    """
    if "forward" in vars(network):  # tracing reads the class's
        raise NotExpressible(f"{type(network).__name__}: its forward is replaced")
    modes = [(module, module.training) for module in network.modules()]
    try:
        found = [_traced(network, training) for training in (True, False)]
    finally:
        for module, training in modes:
            module.training = training
    if found[0] != found[1]:
        raise NotExpressible(f"{type(network).__name__}: it does something else in training than in evaluation")
    return found[0]


def _traced(network: nn.Module, training: bool) -> Structure:
    for module in network.modules():
        module.training = training
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # tracing runs the network's own code, which may raise anything on a stand-in
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotExpressible(f"{type(network).__name__} cannot be traced ({reason[:120]})") from error
    return _Builder(network, graph).build()


class _Builder:
    """Walks over the traced operations once; each either starts a layer or rides on the one before it."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        self.network, self.graph = network, graph
        self.values: dict[fx.Node, int] = {}
        self.users: Counter[int] = Counter()
        self.layers: dict[int, Conv | Norm | MaxPool] = {}  # by target
        self.features: int | None = None
        self.pooled: int | None = None
        self.linear: str | None = None
        self.logits: int | None = None
        self.num_values = 0

    def build(self) -> Structure:
        for name, module in self.network.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise self._refuse(f"{type(module).__name__} '{name}' has hooks, which would not run")
        # what nobody reads stays: it may work in place, or keep statistics
        nodes = [node for node in self.graph.nodes if node.users or node.op != "placeholder"]
        kinds = {node: kind_of(node, self.network, self._refuse) for node in nodes}
        counted = [node for node in nodes if kinds[node] in ("conv", "norm", "relu", "add", "pool", "max pool")]
        origin = {node: self._origin(node, kinds) for node in nodes}
        for node in counted:
            self.users.update(id(origin[source]) for source in node.all_input_nodes)
        self.origin = origin
        for i, node in enumerate(nodes):
            if node.target in ADD_IN_PLACE and kinds[node] == "add":
                written = origin[node.all_input_nodes[0]]
                if any(written in map(origin.get, later.all_input_nodes) for later in nodes[i + 1 :]):
                    raise self._refuse("a value is read after it was added to in place")
        for node in nodes:
            self._add(node, kinds[node])
        if self.features is None or self.linear is None:
            raise self._refuse("it does not end in a global average pool and a linear layer")
        layers = in_order(list(self.layers.values()), 0)
        if [layer.source for layer in layers].count(0) != 1 or any(layer.residual == 0 for layer in layers):
            raise self._refuse("more than one layer reads the image")
        for layer in layers:
            if isinstance(layer, Norm) and not any(
                isinstance(other, Conv) and other.target == layer.source for other in layers
            ):
                raise self._refuse(f"norm '{layer.name}' does not follow a convolution")
        if not any(isinstance(layer, Norm) for layer in layers):
            raise self._refuse("it has no norm")
        structure = Structure(layers=tuple(layers), features=self.features, linear=self.linear)
        read = readers(layers, self.features)
        for layer in layers:
            if not read[layer.target]:
                raise self._refuse(f"nothing reads what '{layer.name}' computes")
        last_layer = self.layers[self.features]
        while isinstance(last_layer, MaxPool):  # which keeps the channels
            last_layer = self.layers[last_layer.source]
        last: Any = self.network.get_submodule(last_layer.name)
        linear: Any = self.network.get_submodule(self.linear)
        if linear.in_features != (last.num_features if isinstance(last, nn.BatchNorm2d) else last.out_channels):
            raise self._refuse(f"linear layer '{self.linear}' does not read the channels of the pooled features")
        return structure

    def _refuse(self, why: str) -> NotExpressible:
        return NotExpressible(f"{type(self.network).__name__}: {why}")

    def _origin(self, node: fx.Node, kinds: dict[fx.Node, str]) -> fx.Node:
        while kinds.get(node) == "pass":
            node = node.all_input_nodes[0]
        return node

    def _add(self, node: fx.Node, kind: str) -> None:
        if kind == "size":
            return
        if kind == "output":
            returned = node.args[0]
            if not isinstance(returned, fx.Node) or self.logits is None or self.values.get(returned) != self.logits:
                raise self._refuse("it does not end in a global average pool and a linear layer")
            return
        sources = [self.values.get(source) for source in node.all_input_nodes]
        if kind == "pass":
            module = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if sources[0] is None or (sources[0] != self.pooled and (module is None or isinstance(module, nn.Flatten))):
                raise self._refuse(f"the operation {node.target} reshapes something else than the pooled features")
            self.values[node] = sources[0]
            return
        value = self.num_values
        self.num_values += 1
        self.values[node] = value
        if kind == "placeholder":
            if value != 0:
                raise self._refuse("it takes more than one input")
            return
        given = [source for source in sources if source is not None]
        if len(given) != len(sources) or (self.pooled in given and kind != "linear") or self.linear is not None:
            raise self._refuse(f"the operation {node.target} reads something else than an image")
        source = given[0]
        if kind in ("conv", "norm"):
            name = str(node.target)
            if any(layer.name == name for layer in self.layers.values()):
                raise self._refuse(f"'{name}' is used twice")
            if kind == "norm":
                self.layers[value] = Norm(name=name, source=source, target=value)
                return
            conv: Any = self.network.get_submodule(name)
            self.layers[value] = Conv(
                name=name, source=source, target=value, kernel=conv.kernel_size[0], stride=conv.stride[0]
            )
        elif kind == "max pool":
            if source == 0:
                raise self._refuse("a max-pool reads the image itself")
            name = str(node.target) if node.op == "call_module" else node.name
            self.layers[value] = MaxPool(name=name, source=source, target=value)
        elif kind == "relu":
            layer = self.layers.get(source)
            if not isinstance(layer, Norm) or layer.relu or not self._is_only_user(node, 0):
                raise self._refuse("a ReLU does not follow a norm or a sum of one")
            self._replace(replace(layer, relu=True, target=value), source)
        elif kind == "add":
            self._add_residual(node, given, value)
        elif kind == "pool":
            if self.features is not None:
                raise self._refuse("it pools twice")
            self.features, self.pooled = source, value
        elif kind == "linear":
            if source != self.pooled:
                raise self._refuse(f"linear layer '{node.target}' does not read the global average pool")
            self.linear, self.logits = str(node.target), value

    def _is_only_user(self, node: fx.Node, argument: int) -> bool:
        return self.users[id(self.origin[node.all_input_nodes[argument]])] == 1

    def _add_residual(self, node: fx.Node, given: list[int], value: int) -> None:
        """Let the sum ride on whichever of its terms can carry it; on the 3x3 convolution's side if both can."""
        candidates = []
        for i, term in enumerate(given):
            layer = self.layers.get(term)
            if isinstance(layer, Conv | Norm) and layer.residual is None and self._is_only_user(node, i):
                if isinstance(layer, Norm) and layer.relu:
                    continue
                conv = layer if isinstance(layer, Conv) else self.layers.get(layer.source)
                kernel = conv.kernel if isinstance(conv, Conv) else 0
                candidates.append((-kernel, i, layer))
        if not candidates:
            raise self._refuse("a sum follows neither a convolution nor a norm")
        _, i, layer = min(candidates, key=lambda candidate: candidate[:2])
        self._replace(replace(layer, residual=given[1 - i], target=value), given[i])

    def _replace(self, layer: Conv | Norm, old_target: int) -> None:
        del self.layers[old_target]
        self.layers[layer.target] = layer


def shape_of(network: nn.Module, structure: Structure) -> tuple[object, ...]:
    """Key that is equal for networks that fit the same slots."""
    assert structure.linear is not None, "a stretch alone"
    weighted = [layer for layer in structure.layers if not isinstance(layer, MaxPool)]
    names = [layer.name for layer in weighted] + [structure.linear]
    modules: list[Any] = [network.get_submodule(name) for name in names]
    # the slots' layout is made once, of the first network's names, biases and ε
    layouts = ((tuple(m.weight.shape), m.bias is None, getattr(m, "eps", None)) for m in modules)
    return (structure, *layouts)


def in_order(layers: Sequence[Any], *given: int) -> list[Any]:
    """Sort `layers` so that each comes after what it reads, but for the values `given`; else in the order given."""
    waiting, written, ordered = list(layers), set(given), []
    while waiting:
        ready = next(x for x in waiting if x.source in written and (x.residual is None or x.residual in written))
        waiting.remove(ready)
        ordered.append(ready)
        written.add(ready.target)
        written.add(getattr(ready, "second_target", None) or ready.target)
    return ordered


def readers(layers: Sequence[Conv | Norm | MaxPool | FrozenConv], features: int) -> Counter[int]:
    """Count the layers that read each value, the pool, which reads `features`, included."""
    counts = Counter([features])
    for layer in layers:
        counts[layer.source] += 1
        if layer.residual is not None:
            counts[layer.residual] += 1
    return counts


def cut(whole: Structure, trunk: str, head: str) -> tuple[Structure, Structure]:
    """Cut a network of a trunk and a head, whose modules' names begin with these, into the two.

    The trunk's result is one value, which the head is given; values keep their numbers.

    Raises:
        NotExpressible: something else than one value goes from the one to the other.
    """
    first: list[Conv | Norm | MaxPool] = []
    second: list[Conv | Norm | MaxPool] = []
    by_head: set[int] = set()
    for layer in whole.layers:
        # an operation without a module belongs to what it reads
        is_head = layer.name.startswith(head) or (not layer.name.startswith(trunk) and layer.source in by_head)
        (second if is_head else first).append(layer)
        if is_head:
            by_head.add(layer.target)
    read = {value for layer in second for value in (layer.source, layer.residual)} | {whole.features}
    handed = [value for value in read - by_head if value is not None]
    back = any(value in by_head for layer in first for value in (layer.source, layer.residual))
    of_trunk = {layer.target for layer in first}
    if len(handed) != 1 or handed[0] not in of_trunk or back or not (whole.linear or "").startswith(head):
        raise NotExpressible("its heads read something else than one image of the trunk's")
    (value,) = handed
    return (
        Structure(layers=tuple(first), features=value, linear=None),
        Structure(layers=tuple(second), features=whole.features, linear=whole.linear, given=value),
    )


def only_convolutions_read(value: int, layers: Sequence[Conv | Norm | MaxPool | FrozenConv], features: int) -> bool:
    """Say whether `value` is read as a convolution's source alone: by no norm, no sum, no pool."""
    reading = [layer for layer in layers if value in (layer.source, layer.residual)]
    return value != features and not any(isinstance(x, Norm | MaxPool) or x.residual == value for x in reading)


def frozen_layers(structure: Structure) -> tuple[FrozenConv | MaxPool, ...]:
    """Fold every norm of the structure into a convolution, for evaluation mode.

    Max-pools stay as they are, and `entries` are left to the convolutions that read them.

    Raises:
        NotExpressible: a norm can neither be folded nor be a second output, or convolutions cannot apply an entry.
    """
    counts = readers(structure.layers, structure.features)
    for entry in structure.entries:
        is_read_alike = only_convolutions_read(entry.target, structure.layers, structure.features)
        if entry.residual is not None or not entry.relu or not is_read_alike:
            raise NotExpressible(f"norm '{entry.name}' does not end in a ReLU alone that convolutions alone read")
    norms: dict[int, list[Norm]] = {}
    for layer in structure.layers:
        if isinstance(layer, Norm):
            norms.setdefault(layer.source, []).append(layer)
    frozen: list[FrozenConv | MaxPool] = []
    for layer in structure.layers:
        if isinstance(layer, MaxPool):
            frozen.append(layer)
        if not isinstance(layer, Conv):
            continue
        following = norms.get(layer.target, [])
        if len(following) > 1:
            raise NotExpressible(f"norms {' and '.join(repr(norm.name) for norm in following)} read the same value")
        norm = following[0] if following else None
        folds = norm is not None and counts[layer.target] == 1 and layer.residual is None
        if norm is not None and not folds and (norm.residual is not None or not norm.relu):
            raise NotExpressible(f"norm '{norm.name}' neither folds into '{layer.name}' nor ends in a ReLU alone")
        frozen.append(
            FrozenConv(
                conv=layer.name,
                norm=norm.name if norm is not None and folds else None,
                second=norm.name if norm is not None and not folds else None,
                source=layer.source,
                target=norm.target if norm is not None and folds else layer.target,
                second_target=norm.target if norm is not None and not folds else None,
                residual=norm.residual if norm is not None and folds else layer.residual,
                relu=norm is not None and folds and norm.relu,
                is_read=norm is None or folds or counts[layer.target] > 1,
                kernel=layer.kernel,
                stride=layer.stride,
            )
        )
    return tuple(in_order(frozen, structure.given, *(entry.target for entry in structure.entries)))
