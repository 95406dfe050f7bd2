"""Training of all members over member-batched kernels: forward and backward as one autograd function.

    W_m = W ∘ r_m s_mᵀ, or m's own         the members' weights, megabytes a step
    y = conv(z, W_m), with Σ y and Σ y²    of all members' rows, or of each one's
    z = relu(a·y + b [+ residual])         a, b from those sums; a pass of its own, or where the next convolution loads

and backwards, convolution by convolution: dz = convᵀ(dy), its epilogue masks and sums for the norm, one pass gives the
norm's dy, and the weight gradient of every member goes back to W, r and s, or is m's own. Nothing is differentiated by
autograd inside. Weights and norms (member_parameters.py) are those of a student, of which a plain network is the case
of one member without factors, or those of E networks that train beside each other (`stacked`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.engine.member_parameters import MemberParameters, OwnParameters, SharedParameters
from ensdistill.engine.operations import Operations, Reader
from ensdistill.engine.reverse import Reverse
from ensdistill.engine.structure import Conv, Norm, NotExpressible, readers, structure_of
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.weight_gradient import member_conv_weight_gradient
from ensdistill.kernels.norm.channels import num_counters
from ensdistill.kernels.norm.fused import batch_norm, batch_norm_backward
from ensdistill.kernels.norm.pool import global_pool
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics
from ensdistill.kernels.weights.layout import Tables
from ensdistill.models.layers import BatchNorm2d, NormGroup
from ensdistill.runtime.ranks import ALONE
from ensdistill.runtime.streams import SideStream

Affine = tuple[Tensor, Tensor]


class MemberTraining:
    """Training passes of `network`, whose parameters and running statistics it uses in place.

    `stacked`: they have a leading axis of E members, which share nothing; else `network` is a student of E members.

    A norm with a ReLU and no residual is applied where the next convolutions load its tile, or in a pass of its own:
    `operations` says which for each. The last one is always applied by the pool.

    Raises:
        NotExpressible: the network has no such form.
    """

    def __init__(
        self,
        network: nn.Module,
        E: int,
        *,
        dtype: torch.dtype,
        operations: Operations,
        stacked: bool = False,
    ) -> None:
        self.network, self.E, self.dtype, self.operations = network, E, dtype, operations
        self.stacked = stacked
        self.exact = torch.promote_types(dtype, torch.float32)
        self.side = SideStream(next(network.parameters()).device)
        self.structure = structure_of(network)
        self.folded_norms: frozenset[str] | None = None
        """Names of the norms that convolutions apply; chosen by the first forward."""
        self.readers = readers(self.structure.layers, self.structure.features)
        self.modules = {layer.name: network.get_submodule(layer.name) for layer in self.structure.layers}
        self.modules[self.structure.linear] = network.get_submodule(self.structure.linear)
        self.parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise NotExpressible(f"{type(network).__name__}: two layers have one parameter")
        self.norms = [layer for layer in self.structure.layers if isinstance(layer, Norm)]
        norms: Any = [self.modules[layer.name] for layer in self.norms]
        self.counters = [norm.num_batches_tracked for norm in norms]
        self.tables: Tables = {}
        self.splits: dict[tuple[torch.Size, torch.device], dict[str, int]] = {}
        """Parts of each layer's weight gradient, by shape and device of the images."""
        self.weighted = {name: module for name, module in self.modules.items() if module not in norms}
        self.norm_of = {layer.source: layer for layer in self.norms}
        self.norm_to = {layer.target: layer for layer in self.norms}

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (E, B, K) fp32 of normalised images (B, H, W, C), all members', or (E, B, H, W, C), each one's own.

        They are differentiable in the parameters. Running statistics advance.
        """
        if self.folded_norms is None:
            self.folded_norms = self._choose_folded(x)
        return _Train.apply(self, x, *self.parameters)

    def member_parameters(self) -> MemberParameters:
        """Make the weights that one forward and its backward read, of the parameters as they are now."""
        parameters = OwnParameters if self.stacked else SharedParameters
        return parameters(self.weighted, self.E, dtype=self.dtype, operations=self.operations, tables=self.tables)

    def is_folded(self, norm: Norm) -> bool:
        """Say whether the convolutions (or the pool) that read `norm` apply it."""
        if not self._can_fold(norm):
            return False
        assert self.folded_norms is not None
        return norm.target == self.structure.features or norm.name in self.folded_norms

    def _can_fold(self, norm: Norm) -> bool:
        if norm.residual is not None or not norm.relu or any(x.residual == norm.target for x in self.structure.layers):
            return False
        return norm.target != self.structure.features or self.readers[norm.target] == 1

    def _choose_folded(self, x: Tensor) -> frozenset[str]:
        """Ask `operations` about every norm that can be folded, with tensors that have shapes alone."""
        sizes = {0: (x.shape[-3], x.shape[-2])}

        def value(number: int, C: int) -> Tensor:
            return torch.empty(self.E, x.shape[-4], *sizes[number], C, dtype=self.dtype, device="meta")

        loaders: dict[int, list[Reader]] = {}
        for layer in self.structure.layers:
            H, W = sizes[layer.source]
            if isinstance(layer, Norm):
                sizes[layer.target] = H, W
                continue
            sizes[layer.target] = -(-H // layer.stride), -(-W // layer.stride)
            conv: Any = self.modules[layer.name]
            CO, CI = conv.out_channels, conv.in_channels
            dy = value(layer.target, CO)
            vector = torch.empty(self.E, CO, device="meta")
            options: dict[str, Any] = {
                "stride": layer.stride,
                "bias": None if conv.bias is None else vector,
                "residual": None if layer.residual is None else dy,
                "sums": layer.target in self.norm_of,
            }
            w_EKKIO = torch.empty(self.E, layer.kernel, layer.kernel, CI, CO, dtype=self.dtype, device="meta")
            loaders.setdefault(layer.source, []).append(Reader(w_EKKIO, dy, options))
        return frozenset(
            norm.name
            for norm in self.norm_to.values()
            if norm.target in loaders
            and self._can_fold(norm)
            and self.operations.folds_norm(
                value(norm.target, loaders[norm.target][0].w_EKKIO.shape[3]), loaders[norm.target], x.device
            )
        )


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, training: MemberTraining, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = _Run(training)
        return ctx.run.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        run, ctx.run = ctx.run, None
        assert run is not None, "a training forward can be gone back through once"
        gradients = run.backward(grads[0])
        return None, None, *(gradients.get(id(parameter)) for parameter in run.training.parameters)


class _Run:
    """One forward and its backward: the values and gradients in between, by number."""

    def __init__(self, training: MemberTraining) -> None:
        self.training, self.operations = training, training.operations
        self.parameters = training.member_parameters()
        self.structure = training.structure
        self.values: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.statistics: dict[str, BatchStatistics] = {}
        self.bits: dict[str, Tensor] = {}
        self.parameter_gradients: dict[int, Tensor] = {}
        self.f_MBC: Tensor | None = None
        self.counters: Tensor | None = None

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        training, structure = self.training, self.structure
        self.values[0] = x.to(training.dtype)
        torch._foreach_add_(training.counters, 1)
        for layer in structure.layers:
            if isinstance(layer, Conv):
                source, prologue = self._read(layer.source)
                out = self.operations(member_conv)(
                    source,
                    self.parameters.weights(layer.name),
                    stride=layer.stride,
                    prologue=prologue,
                    bias=self.parameters.bias(layer.name),
                    residual=None if layer.residual is None else self.values[layer.residual],
                    sums=layer.target in training.norm_of,
                )
                assert out.y is not None
                self.values[layer.target] = out.y
                if out.sums is not None:
                    self.sums[layer.target] = out.sums
            else:
                self._normalise(layer)
        features, prologue = self._read(structure.features)
        self.f_MBC = self.operations(global_pool)(features, prologue=prologue, out_dtype=training.dtype)
        out = self.operations(member_conv)(
            self.f_MBC[:, :, None, None, :],
            self.parameters.weights(structure.linear),
            bias=self.parameters.bias(structure.linear),
            out_dtype=training.exact,
        )
        assert out.y is not None
        self._forget_residuals()
        return out.y[:, :, 0, 0, :]

    def _normalise(self, layer: Norm) -> None:
        norm: Any = self.training.modules[layer.name]
        y = self.values[layer.source]
        sums, count = self._of_all_ranks(norm, self.sums[layer.source], y)
        options: dict[str, Any] = {
            "count": count,
            "per_member": self.parameters.own_norms,
            "eps": norm.eps,
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
            "momentum": norm.momentum,
            "unbiased": norm.unbiased if isinstance(norm, BatchNorm2d) else True,
            "counters": self._norm_counters(layer, 0),
        }
        weight, bias = norm.weight.detach(), norm.bias.detach()
        if self.training.is_folded(layer):
            self.statistics[layer.name] = self.operations(batch_norm_statistics)(sums, weight, bias, **options)
            return
        z, bits, self.statistics[layer.name] = self.operations(batch_norm)(
            y,
            sums,
            weight,
            bias,
            relu=layer.relu,
            residual=None if layer.residual is None else self.values[layer.residual],
            # without a residual the mask is read off y itself
            bits=self.training.E if layer.relu and layer.residual is not None else 0,
            **options,
        )
        self.values[layer.target] = z
        if bits is not None:
            self.bits[layer.name] = bits

    def _norm_counters(self, layer: Norm, way: int) -> Tensor | None:
        """Counters of a norm's launch, forward 0 or backward 1: zeros at the start of every forward, used once."""
        if not self.operations.kernel:
            return None
        if self.counters is None:
            norms: list[Any] = [self.training.modules[norm.name] for norm in self.training.norms]
            groups = self.training.E if self.parameters.own_norms else 1
            length = max(num_counters(norm.weight.shape[-1], groups) for norm in norms)
            self.counters = torch.zeros(2, len(norms), length, dtype=torch.int32, device=norms[0].weight.device)
        return self.counters[way, self.training.norms.index(layer)]

    def _of_all_ranks(self, norm: Any, sums_MT2C: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Add the sums over `y` of all ranks that `norm` normalises together, and count the values a member."""
        count, ranks = y[0, ..., 0].numel(), _ranks_of(norm)
        if ranks.size == 1:
            return sums_MT2C, count
        own = self.parameters.own_norms
        total = ranks.sum_(sums_MT2C.double().sum(1 if own else (0, 1), keepdim=True))
        rounded = total.to(sums_MT2C.dtype)
        # what rounding takes off goes along as a part of its own: the difference of squares needs it
        parts = torch.cat([rounded, (total - rounded).to(rounded.dtype)], dim=1)
        return parts, count * ranks.size * (1 if own else len(sums_MT2C))

    def _read(self, value: int) -> tuple[Tensor, Affine | None]:
        """Give a value as a convolution loads it: itself, or what a folded norm reads and the norm's (a, b)."""
        if value in self.values:
            return self.values[value], None
        norm = self.training.norm_to[value]
        statistics = self.statistics[norm.name]
        return self.values[norm.source], (statistics.scale, statistics.shift)

    def _forget_residuals(self) -> None:
        """Drop the values that the backward does not read: sums of which only a norm's own input is wanted."""
        wanted = {layer.source for layer in self.structure.layers} | {self.structure.features}
        self.values = {value: tensor for value, tensor in self.values.items() if value in wanted}

    # ---- backward -------------------------------------------------------------------------------------------------

    def backward(self, dlogits_MBK: Tensor) -> dict[int, Tensor]:
        """Compute the gradients by the parameters' ids."""
        training, structure = self.training, self.structure
        assert self.f_MBC is not None
        reverse = Reverse(self.operations, training.readers, self._last_share, dtype=training.dtype)
        dy = dlogits_MBK.to(training.dtype)[:, :, None, None, :].contiguous()
        self.parameters.expect_gradients(self._splits(dy))
        self._give_parameters(structure.linear, self.f_MBC[:, :, None, None, :], dy, kernel=1, stride=1, prologue=None)
        features, _ = self._read(structure.features)
        reverse.features(structure.features, dy, self.parameters.weights(structure.linear), _size(features))
        for layer in reversed(structure.layers):
            if isinstance(layer, Norm):
                self._norm_backward(reverse, layer)
            else:
                self._conv_backward(reverse, layer)
        training.side.join()
        return self.parameter_gradients | self.parameters.gradients()

    def _splits(self, dlogits: Tensor) -> dict[str, int]:
        """Choose the number of parts of each layer's weight gradient; `dlogits`: (E, B, 1, 1, K)."""
        training, structure = self.training, self.structure
        key = self.values[0].shape, dlogits.device
        if key not in training.splits:
            assert self.f_MBC is not None
            splits = self.operations.weight_gradient_splits
            found = {structure.linear: splits(self.f_MBC[:, :, None, None, :], dlogits, kernel=1)}
            for layer in structure.layers:
                if isinstance(layer, Conv):
                    x, prologue = self._read(layer.source)
                    H, W = (-(-n // layer.stride) for n in x.shape[-3:-1])
                    conv: Any = training.modules[layer.name]
                    dy = x.new_empty(training.E, x.shape[-4], H, W, conv.out_channels, device="meta")
                    found[layer.name] = splits(x, dy, kernel=layer.kernel, stride=layer.stride, prologue=prologue)
            training.splits[key] = found
        return training.splits[key]

    def _conv_backward(self, reverse: Reverse, layer: Conv) -> None:
        dy = reverse.take(layer)
        reverse.residual(layer, dy)
        source, prologue = self._read(layer.source)
        self._give_parameters(layer.name, source, dy, kernel=layer.kernel, stride=layer.stride, prologue=prologue)
        if layer.source != 0:
            reverse.conv(layer, dy, self.parameters.weights(layer.name), _size(source))

    def _norm_backward(self, reverse: Reverse, layer: Norm) -> None:
        """Go from the masked gradient behind the norm to the gradient of what it read."""
        du = reverse.take(layer)
        reverse.residual(layer, du)
        norm: Any = self.training.modules[layer.name]
        y = self.values[layer.source]
        taken = reverse.sums.pop(layer.target, None)  # None: no kernel was the last to see du
        sums, count = self._of_all_ranks(norm, _sums(du, y) if taken is None else taken, y)
        size = _ranks_of(norm).size

        def gradient(before: Tensor | None) -> Tensor:
            dy, dgamma, dbeta = self.operations(batch_norm_backward)(
                du,
                y,
                sums,
                self.statistics[layer.name],
                norm.weight.detach(),
                count=count,
                per_member=self.parameters.own_norms,
                residual=before,
                counters=self._norm_counters(layer, 1),
            )
            # of all ranks' losses, which are averaged later
            self.parameter_gradients[id(norm.weight)] = dgamma if size == 1 else dgamma / size
            self.parameter_gradients[id(norm.bias)] = dbeta if size == 1 else dbeta / size
            return dy

        reverse.norm(layer, gradient)

    def _last_share(self, value: int) -> tuple[int, dict[str, Any]]:
        """Mask the complete gradient of a norm's output, and take the norm's sums."""
        norm = self.training.norm_to.get(value)
        if norm is None:
            return value, {}
        epilogue: dict[str, Any] = {}
        if norm.relu:
            statistics = self.statistics[norm.name]
            epilogue["norm"] = (self.values[norm.source], statistics.scale, statistics.shift)
        if norm.name in self.bits:
            epilogue["bits"] = self.bits.pop(norm.name)
        return value, epilogue

    def _give_parameters(
        self, name: str, x: Tensor, dy: Tensor, *, kernel: int, stride: int, prologue: Affine | None
    ) -> None:
        # beside the input gradients: nothing in this pass waits for it
        with self.training.side.fork(x, dy):
            self.operations(member_conv_weight_gradient)(
                x, dy, kernel=kernel, stride=stride, prologue=prologue, parts=self.parameters.gradient_parts(name)
            )
            self.parameters.give_output_gradient(name, dy)


def _size(x_MBHWC: Tensor) -> tuple[int, int]:
    return x_MBHWC.shape[-3], x_MBHWC.shape[-2]


def _ranks_of(norm: nn.Module) -> NormGroup:
    return norm.ranks if isinstance(norm, BatchNorm2d) else ALONE


def _sums(du: Tensor, y: Tensor) -> Tensor:
    """Σ du and Σ du·y over each member's rows, (M, 1, 2, C) fp32."""
    du = du.to(torch.promote_types(du.dtype, torch.float32))
    return torch.stack([du.sum((1, 2, 3)), (du * y).sum((1, 2, 3))], dim=1)[:, None]
