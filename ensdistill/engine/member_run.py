"""One training forward and backward of all members, over member-batched kernels.

    W_m = W ∘ r_m s_mᵀ, or m's own         the members' weights, megabytes a step
    y = conv(z, W_m), with Σ y and Σ y²    of all members' rows, or of each one's
    z = relu(a·y + b [+ residual])         a, b from those sums; a pass of its own, or where the next convolution loads
    z = maxpool(relu(a·y + b))             in one pass, which keeps a byte a value for the way back

and backwards, convolution by convolution: dz = convᵀ(dy), its epilogue masks and sums for the norm, one pass gives the
norm's dy, and the weight gradient of every member goes back to W, r and s, or is m's own. Nothing is differentiated by
autograd inside. Heads behind a trunk are two such runs: that of the trunk, of one member, hands its last value over to
all heads, and is handed the sum of their gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ensdistill.engine.reverse import Reverse
from ensdistill.engine.structure import Conv, MaxPool, Norm
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.weight_gradient import member_conv_weight_gradient
from ensdistill.kernels.norm.channels import num_counters
from ensdistill.kernels.norm.fused import batch_norm, batch_norm_backward
from ensdistill.kernels.norm.max_pool import max_pool
from ensdistill.kernels.norm.pool import global_pool
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics
from ensdistill.models.layers import BatchNorm2d, NormGroup
from ensdistill.runtime.ranks import ALONE

if TYPE_CHECKING:
    from ensdistill.engine.member_training import MemberTraining

Affine = tuple[Tensor, Tensor]


class MemberRun:
    """One forward and its backward of `training`: the values in between, by number."""

    def __init__(self, training: MemberTraining) -> None:
        self.training, self.operations = training, training.operations
        self.trunk = None if training.trunk is None else MemberRun(training.trunk)
        self.parameters = training.member_parameters()
        self.structure = training.structure
        self.given: tuple[torch.Size, torch.device]
        """Shape and device of what the layers are given."""
        self.values: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.statistics: dict[str, BatchStatistics] = {}
        self.bits: dict[str, Tensor] = {}
        self.positions: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        """Places of a max-pool's maxima and the size (H, W) of what it pooled, by the value that it wrote."""
        self.f_MBC: Tensor | None = None
        self.counters: Tensor | None = None

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Logits (E, B, K) of what the first stretch is given."""
        training, structure = self.training, self.structure
        self._run_layers(x)
        assert structure.linear is not None
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

    def _run_layers(self, x: Tensor) -> None:
        training, structure = self.training, self.structure
        if self.trunk is not None:
            x = self._take_over(self.trunk, x)
        training.choose_folded(x)
        self.given = x.shape, x.device
        self.values[structure.given] = x.to(training.dtype)
        if training.counters:
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
                    sums=layer.target in training.summed,
                )
                assert out.y is not None
                self.values[layer.target] = out.y
                if out.sums is not None:
                    self.sums[layer.target] = out.sums
            elif isinstance(layer, MaxPool):
                source, prologue = self._read(layer.source)
                y, positions = self.operations(max_pool)(source, prologue=prologue, positions=len(source))
                assert positions is not None
                self.values[layer.target], self.positions[layer.target] = y, (positions, _size(source))
            else:
                self._normalise(layer)
        self.parameters.keep_statistics()

    def _take_over(self, trunk: MemberRun, x: Tensor) -> Tensor:
        """Run the trunk and give its result for all members, (B, H, W, C), or a copy for each, and so its sums."""
        trunk._run_layers(x)
        given, E = self.structure.given, self.training.E
        y_1BHWC, sums_1T2C = trunk.values[given], trunk.sums.pop(given, None)
        trunk._forget_residuals()
        if sums_1T2C is not None:
            self.sums[given] = sums_1T2C.expand(E, -1, -1, -1).contiguous()
        return y_1BHWC[0] if self.training.shares_given else y_1BHWC.expand(E, -1, -1, -1, -1).contiguous()

    def _normalise(self, layer: Norm) -> None:
        norm, vectors = self.training.modules[layer.name], self.parameters.norm(layer.name)
        y = self.values[layer.source]
        sums, count = self._of_all_ranks(norm, self.sums[layer.source], y)
        options: dict[str, Any] = {
            "count": count,
            "per_member": self.parameters.own_norms,
            "eps": norm.eps,
            "running_mean": vectors.mean,
            "running_var": vectors.var,
            "momentum": norm.momentum,
            "unbiased": norm.unbiased if isinstance(norm, BatchNorm2d) else True,
            "counters": self._norm_counters(layer, 0),
        }
        weight, bias = vectors.gamma, vectors.beta
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
            norms = [self.training.modules[norm.name] for norm in self.training.norms]
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
        """Drop the values that the backward does not read: sums of which only a norm's own input is wanted, and what a
        max-pool alone read."""
        wanted = {layer.source for layer in self.structure.layers if not isinstance(layer, MaxPool)}
        if self.structure.linear is not None:
            wanted.add(self.structure.features)
        self.values = {value: tensor for value, tensor in self.values.items() if value in wanted}

    # ---- backward -------------------------------------------------------------------------------------------------

    def backward(self, dlogits_MBK: Tensor) -> dict[int, Tensor]:
        """Compute the gradients by the parameters' ids."""
        training, structure = self.training, self.structure
        assert self.f_MBC is not None and structure.linear is not None
        reverse = self._begin_backward()
        dy = dlogits_MBK.to(training.dtype)[:, :, None, None, :].contiguous()
        self._give_parameters(structure.linear, self.f_MBC[:, :, None, None, :], dy, kernel=1, stride=1, prologue=None)
        features, _ = self._read(structure.features)
        reverse.features(structure.features, dy, self.parameters.weights(structure.linear), _size(features))
        return self._run_layers_backward(reverse)

    def _begin_backward(self) -> Reverse:
        self.parameters.expect_gradients(self._splits())
        return Reverse(self.operations, self.training.readers, self._last_share, dtype=self.training.dtype)

    def _run_layers_backward(self, reverse: Reverse) -> dict[int, Tensor]:
        for layer in reversed(self.structure.layers):
            if isinstance(layer, Norm):
                self._norm_backward(reverse, layer)
            elif isinstance(layer, MaxPool):
                positions, size = self.positions.pop(layer.target)
                reverse.max_pool(layer, reverse.take(layer), positions, size)
            else:
                self._conv_backward(reverse, layer)
        self.training.side.join()
        gradients = self.parameters.gradients()
        if self.trunk is not None:
            self.values.clear()
            given = self.structure.given
            gradients |= self.trunk._go_on_backward(reverse.gradients.pop(given), reverse.sums.pop(given, None))
        return gradients

    def _go_on_backward(self, dy: Tensor, sums: Tensor | None) -> dict[int, Tensor]:
        """Go back from the gradient of what was handed over: complete (B, H, W, C), or of each member's copy."""
        reverse, value = self._begin_backward(), self.structure.features
        if dy.ndim == 5:
            reverse.whole(value, dy.sum(0, keepdim=True))
        else:
            reverse.gradients[value] = dy[None]
            if sums is not None:
                reverse.sums[value] = sums
        return self._run_layers_backward(reverse)

    def _splits(self) -> dict[str, int]:
        """Choose the number of parts of each layer's weight gradient."""
        training, structure = self.training, self.structure
        if self.given not in training.splits:
            splits, found = self.operations.weight_gradient_splits, {}
            for layer in structure.layers:
                if isinstance(layer, Conv):
                    x, prologue = self._read(layer.source)
                    H, W = (-(-n // layer.stride) for n in x.shape[-3:-1])
                    channels = training.modules[layer.name].out_channels
                    dy = x.new_empty(training.E, x.shape[-4], H, W, channels, device="meta")
                    found[layer.name] = splits(x, dy, kernel=layer.kernel, stride=layer.stride, prologue=prologue)
            if structure.linear is not None:
                assert self.f_MBC is not None
                classes = training.modules[structure.linear].weight.shape[-2]
                dy = self.f_MBC.new_empty(*self.f_MBC.shape[:2], 1, 1, classes, device="meta")
                found[structure.linear] = splits(self.f_MBC[:, :, None, None, :], dy, kernel=1)
            training.splits[self.given] = found
        return training.splits[self.given]

    def _conv_backward(self, reverse: Reverse, layer: Conv) -> None:
        dy = reverse.take(layer)
        reverse.residual(layer, dy)
        source, prologue = self._read(layer.source)
        self._give_parameters(layer.name, source, dy, kernel=layer.kernel, stride=layer.stride, prologue=prologue)
        is_given = layer.source == self.structure.given
        if not is_given or self.trunk is not None:
            shared = is_given and self.training.shares_given
            reverse.conv(layer, dy, self.parameters.weights(layer.name), _size(source), shared=shared)

    def _norm_backward(self, reverse: Reverse, layer: Norm) -> None:
        """Go from the masked gradient behind the norm to the gradient of what it read."""
        du = reverse.take(layer)
        reverse.residual(layer, du)
        norm = self.training.modules[layer.name]
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
                self.parameters.norm(layer.name).gamma,
                count=count,
                per_member=self.parameters.own_norms,
                residual=before,
                counters=self._norm_counters(layer, 1),
            )
            if size > 1:  # of all ranks' losses, which are averaged later
                dgamma, dbeta = dgamma / size, dbeta / size
            self.parameters.give_norm_gradient(layer.name, dgamma, dbeta)
            return dy

        reverse.norm(layer, gradient)

    def _last_share(self, value: int) -> tuple[int, dict[str, Any]]:
        """Mask the complete gradient of a norm's output, and take the norm's sums."""
        if self.trunk is not None and value == self.structure.given:
            return self.trunk._last_share(value) if self.training.shares_given else (value, {})
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
