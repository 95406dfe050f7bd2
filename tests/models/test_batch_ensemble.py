"""BatchEnsemble students: members and their average against the formula, on own networks, pytorchcv's and timm's."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm_here import import_timm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from ensdistill.models.batch_ensemble import (
    BatchEnsembleLayer,
    average_members,
    check_members,
    factor_parameters,
    is_batch_ensemble,
    member_network,
    num_members,
    select_members,
    to_batch_ensemble,
)
from ensdistill.models.convertible import _weights_read_by, why_shared
from ensdistill.runtime.errors import UserError


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 10, 3, groups=2, stride=2, dilation=2, padding=2, bias=False),
        nn.GroupNorm(2, 10),
        nn.Conv2d(10, 10, 3, groups=10),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )


@torch.no_grad()
def draw_factors(student: nn.Module, scale: float = 0.3) -> nn.Module:
    """`student` with random factors, norms' statistics and vectors, none of them where it starts."""
    for rho in factor_parameters(student):
        rho.normal_(0, scale)
    for name, tensor in student.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else tensor.normal_(0, 0.1)
    return student


def assert_faithful(network: nn.Module, x: Tensor, members: int = 2) -> nn.Module:
    """Conversion and both ways back, in evaluation mode and float64; returns the student with random factors."""
    network, x = network.double().eval(), x.double()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    student = to_batch_ensemble(network, members)
    torch.testing.assert_close(student(torch.cat([x] * members)), torch.cat([network(x)] * members))

    draw_factors(student)
    state = {key: value.clone() for key, value in student.state_dict().items()}
    outputs = student(torch.cat([x] * members)).chunk(members)
    for m, output in enumerate(outputs):
        torch.testing.assert_close(member_network(student, m)(x), output)
    assert not torch.allclose(outputs[0], outputs[1])

    averaged = average_members(student)
    assert [type(module) for module in averaged.modules()] == kinds
    assert list(averaged.state_dict()) == list(before)
    network_again = copy.deepcopy(network)
    network_again.load_state_dict(averaged.state_dict(), strict=True)
    torch.testing.assert_close(network_again(x), averaged(x))
    mean = copy.deepcopy(student)
    with torch.no_grad():
        for rho in factor_parameters(mean):
            rho.copy_(rho.mean(dim=0, keepdim=True).expand_as(rho))
    torch.testing.assert_close(averaged(x), mean(torch.cat([x] * members)).chunk(members)[1])

    assert not is_batch_ensemble(averaged) and not is_batch_ensemble(network)
    for module, expected in ((network, before), (student, state)):
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    check_members(student.float(), x.float())
    return student.double()


def test_small_network() -> None:
    student = assert_faithful(small_network(), torch.randn(3, 3, 9, 7), members=3)
    assert num_members(student) == 3
    assert [tuple(rho.shape) for rho in factor_parameters(student)] == [
        *[(3, 3), (3, 6), (3, 6), (3, 10), (3, 10), (3, 10), (3, 10), (3, 5)]
    ]
    assert [tuple(p.shape) for name, p in student.named_parameters() if "rho" not in name] == [
        tuple(p.shape) for p in small_network().parameters()
    ]
    assert "members=3" in repr(student)


LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular", groups=2), (5, 4, 7)),
    (lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), dilation=(1, 2)), (5, 4, 7, 5)),
    (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1, padding_mode="replicate", bias=False), (5, 6, 5, 3)),
    (lambda: nn.Conv3d(3, 2, 2, padding=1), (5, 3, 3, 4, 2)),
    (lambda: nn.Linear(4, 3), (5, 4)),
    (lambda: nn.Linear(4, 3, bias=False), (5, 2, 3, 4)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_is_the_formula(make: Any, shape: tuple[int, ...]) -> None:
    layer, M, B = make().double(), 3, shape[0]
    student = draw_factors(to_batch_ensemble(layer, M))
    assert isinstance(student, type(layer)) and type(student) is not type(layer)
    x = torch.randn(M * B, *shape[1:], dtype=torch.float64)
    y = student(x)
    ones = [1] * (len(shape) - 2)
    weight, bias = cast(Tensor, student.weight), cast("Tensor | None", student.bias)
    for m in range(M):
        r, s = 1 + student.rho_r[m], 1 + student.rho_s[m]
        if isinstance(layer, nn.Linear):
            expected = s * F.linear(r * x[m * B : (m + 1) * B], weight, bias)
        else:
            rx = r.view(-1, *ones) * x[m * B : (m + 1) * B]
            expected = s.view(-1, *ones) * layer._conv_forward(rx, weight, bias)
        torch.testing.assert_close(y[m * B : (m + 1) * B], expected)


def test_average_takes_each_mean_by_itself() -> None:
    student = draw_factors(to_batch_ensemble(nn.Linear(4, 3), 2)).double()
    averaged = cast(nn.Linear, average_members(student))
    r, s = (1 + student.rho_r).mean(0), (1 + student.rho_s).mean(0)
    torch.testing.assert_close(averaged.weight, student.weight * s[:, None] * r[None])
    torch.testing.assert_close(averaged.bias, student.bias * s)
    each = torch.einsum("mi,mo->oi", 1 + student.rho_r, 1 + student.rho_s) / 2 * student.weight
    assert not torch.allclose(averaged.weight, each)


def test_gradients_agree_with_explicit_members() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    student = draw_factors(to_batch_ensemble(network, 2))
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*student.named_parameters(), strict=True)

    def together(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(student, dict(zip(names, values, strict=True)), (x,))

    def apart(x: Tensor, *values: Tensor) -> Tensor:
        v, outputs = dict(zip(names, values, strict=True)), []
        for m, x_m in enumerate(x.chunk(2)):
            r, s = 1 + v["0.rho_r"][m], 1 + v["0.rho_s"][m]
            weight = v["0.weight"] * s.view(-1, 1, 1, 1) * r.view(2, 1, 1, 1).repeat_interleave(2, 0)
            h = F.conv2d(x_m, weight, v["0.bias"] * s, groups=2).tanh().flatten(1)
            r, s = 1 + v["3.rho_r"][m], 1 + v["3.rho_s"][m]
            outputs.append(F.linear(h, v["3.weight"] * torch.outer(s, r), v["3.bias"] * s))
        return torch.cat(outputs)

    weights = torch.randn(6, 3, dtype=torch.float64)
    gradients = [torch.autograd.grad((f(x, *parameters) * weights).sum(), (x, *parameters)) for f in (together, apart)]
    for name, ours, theirs in zip(("x", *names), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert torch.autograd.gradcheck(together, (x, *parameters), fast_mode=True)


def test_select_members() -> None:
    student = draw_factors(to_batch_ensemble(small_network(), 4)).eval()
    x = torch.randn(2, 3, 9, 7)
    members = [member_network(student, m)(x) for m in range(4)]
    index = torch.tensor([3, 1])
    with select_members(student, index):
        torch.testing.assert_close(student(torch.cat([x, x])), torch.cat([members[3], members[1]]))
        with select_members(student, [2]):
            torch.testing.assert_close(student(x), members[2])
            torch.testing.assert_close(copy.deepcopy(student)(x), members[2])
            check_members(student, x)
        index.copy_(torch.tensor([0, 2]))  # as a captured graph would see it
        torch.testing.assert_close(student(torch.cat([x, x])), torch.cat([members[0], members[2]]))
        with pytest.raises(KeyError), select_members(student, [1]):
            raise KeyError
        torch.testing.assert_close(student(torch.cat([x, x])), torch.cat([members[0], members[2]]))
    torch.testing.assert_close(student(torch.cat([x] * 4)), torch.cat(members))


def test_select_members_reads_no_value() -> None:
    """On the meta device a tensor has no values: anything that asks for one raises."""
    student = to_batch_ensemble(small_network(), 3).to("meta")
    with select_members(student, torch.empty(2, dtype=torch.int64, device="meta")):
        assert student(torch.empty(4, 3, 9, 7, device="meta")).shape == (4, 5)


@pytest.mark.parametrize("members", [[], [0, 3], [-1], torch.tensor(1), torch.tensor([], dtype=torch.int64)])
def test_select_members_refuses(members: Any) -> None:
    student = to_batch_ensemble(small_network(), 3)
    with pytest.raises(ValueError, match="expected"), select_members(student, members):
        pass


def test_wrong_rows_are_named() -> None:
    student = to_batch_ensemble(small_network(), 3)
    with pytest.raises(UserError, match=r"Conv2d '0' got an input of shape \(4, 3, 9, 7\) for 3 members: expected"):
        student(torch.randn(4, 3, 9, 7))
    with pytest.raises(ValueError, match=r"\(3, 9, 7\)"):  # a single image without its batch axis
        student(torch.randn(3, 9, 7))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        to_batch_ensemble(nn.Linear(3, 2), 3)(torch.randn(3))


@pytest.mark.parametrize("member", [-1, 2])
def test_member_out_of_range(member: int) -> None:
    with pytest.raises(ValueError, match="expected 0 … 1"):
        member_network(to_batch_ensemble(small_network(), 2), member)


def test_plain_networks_are_no_students() -> None:
    two = nn.ModuleList([to_batch_ensemble(nn.Linear(2, 2), 2), to_batch_ensemble(nn.Linear(2, 2), 3)])
    for function in (num_members, average_members, factor_parameters):
        with pytest.raises(ValueError, match="Sequential holds 0 BatchEnsemble students, expected one"):
            function(small_network())
        with pytest.raises(ValueError, match="ModuleList holds 2"):
            function(two)


def test_copies_and_pickles_are_students_of_their_own() -> None:
    student = draw_factors(to_batch_ensemble(small_network(), 2)).eval()
    x = torch.randn(4, 3, 9, 7)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        torch.testing.assert_close(other(x), student(x))
        assert type(other[0]) is type(student[0])
        with select_members(other, [1]):
            assert other(x[:1]).shape == (1, 5)
            torch.testing.assert_close(student(x[:2]).shape, (2, 5))
            with pytest.raises(ValueError, match="for 2 members"):
                student(x[:1])
    fresh = to_batch_ensemble(small_network(), 2).eval()
    fresh.load_state_dict(student.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), student(x))


def test_hooks_and_attributes_survive() -> None:
    network, seen = small_network(), []
    network[0].register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    student = cast(nn.Sequential, to_batch_ensemble(network, 2))
    student(torch.randn(2, 3, 9, 7))
    assert seen == [(2, 3, 9, 7)]
    assert (student[0].in_channels, student[0].padding_mode, student[3].groups) == (3, "reflect", 2)


def test_frozen_weights_have_frozen_factors_and_types_are_kept() -> None:
    network = small_network().bfloat16()
    network[0].requires_grad_(False)
    student = cast(Any, to_batch_ensemble(network, 2))
    assert not student[0].rho_r.requires_grad and student[3].rho_s.requires_grad
    assert {rho.dtype for rho in factor_parameters(student)} == {torch.bfloat16}
    assert {p.dtype for p in average_members(student).parameters()} == {torch.bfloat16}


class _Operations(TorchDispatchMode):
    """Counts operations and the copies among them of tensors that have at least `size` entries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names, self.copies = size, Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        is_copy = name in ("clone", "contiguous", "copy_", "_to_copy", "_reshape_copy", "repeat", "cat", "index_select")
        self.copies += is_copy and args[0].numel() >= self.size
        return func(*args, **(kwargs or {}))


def test_channels_last_is_kept_without_a_copy() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    student = draw_factors(to_batch_ensemble(layer, 3))
    x = torch.randn(6, 4, 7, 5).to(memory_format=torch.channels_last).requires_grad_()
    with _Operations(x.numel()) as operations:
        y = student(x)
        (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert operations.copies == 0
    assert operations.names["mul"] >= 4 and operations.names["convolution"] == 1
    for tensor in (y, gradient, average_members(student).weight):
        assert cast(Tensor, tensor).is_contiguous(memory_format=torch.channels_last)


def test_autocast_scales_in_the_type_of_the_activation() -> None:
    student = draw_factors(to_batch_ensemble(small_network(), 2))
    x = torch.randn(4, 3, 9, 7)
    dtypes: list[torch.dtype] = []
    student[5].register_forward_hook(lambda module, inputs, output: dtypes.extend((inputs[0].dtype, output.dtype)))
    student[5].register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(),))
    with torch.autocast("cpu", torch.bfloat16):
        y = student(x)
    y.float().sum().backward()
    assert dtypes == [torch.bfloat16] * 2 and y.dtype == torch.bfloat16
    assert all(rho.grad is not None and rho.grad.dtype == torch.float32 for rho in factor_parameters(student))


def test_compiles_as_one_graph() -> None:
    student = draw_factors(to_batch_ensemble(small_network(), 2)).eval()
    compiled, x = torch.compile(student, backend="eager", fullgraph=True), torch.randn(4, 3, 9, 7)
    torch.testing.assert_close(compiled(x), student(x))
    with select_members(student, torch.tensor([1])):
        torch.testing.assert_close(compiled(x), student(x))
    torch._dynamo.reset()


# What stays shared.


class Block(nn.Module):
    """A transformer block as torchvision's: norm first, nn.MultiheadAttention, an MLP."""

    def __init__(self, dim: int, batch_first: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, block: nn.Module, dim: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.batch_first = next(m for m in block.modules() if isinstance(m, nn.MultiheadAttention)).batch_first
        self.block, self.head = block, nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = self.block(tokens) if self.batch_first else self.block(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(tokens[:, 0])


def converted(student: nn.Module) -> set[str]:
    return {name for name, layer in student.named_modules() if isinstance(layer, BatchEnsembleLayer)}


def test_packed_attention_stays_shared() -> None:
    network = Transformer(Block(8))
    student = assert_faithful(network, torch.randn(2, 3, 8, 8))
    assert converted(student) == {"patches", "block.mlp.0", "block.mlp.2", "head"}
    (name, reason) = why_shared(network).popitem()
    assert name == "block.self_attention.out_proj" and "its weight is read by MultiheadAttention" in reason


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False])
def test_encoder_layer_keeps_off_its_fast_path(grad: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2)
    with torch.set_grad_enabled(grad):
        student = assert_faithful(Transformer(encoder), torch.randn(2, 3, 8, 8))
        assert "block.layers.1.linear2" in converted(student)
        block = cast(nn.TransformerEncoder, student.get_submodule("block"))
        x, mask = torch.randn(2, 3, 8, dtype=torch.float64), torch.tensor([[False, False, True], [False, False, False]])
        y, other = block(x, src_key_padding_mask=mask), member_network(block, 1)(x, src_key_padding_mask=mask)
    assert y.shape == x.shape  # a nested tensor would need the fast path
    torch.testing.assert_close(y[1, 0], other[1, 0])


@pytest.mark.parametrize("block", [Block(8, False), nn.TransformerEncoderLayer(8, 2, 12, 0.0)])
def test_tokens_before_batch_stay_shared(block: nn.Module) -> None:
    network = Transformer(block)
    assert converted(assert_faithful(network, torch.randn(2, 3, 12, 12))) == {"patches", "head"}
    assert any("the batch is on the second axis in" in reason for reason in why_shared(network).values())


class Positions(nn.Module):
    """A position encoding of numbers, as XCiT's: one row, which stands beside every image."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(2, 6, 1)

    def forward(self, B: int, H: int, W: int) -> Tensor:
        rows, columns = torch.linspace(-1, 1, H)[:, None].expand(H, W), torch.linspace(-1, 1, W).expand(H, W)
        grid = torch.stack([rows, columns])[None].to(self.projection.weight.dtype)
        return self.projection(grid).repeat(B, 1, 1, 1)


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positions, self.head = nn.Conv2d(3, 6, 3), Positions(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.positions(len(x), *x.shape[2:])).relu().mean((2, 3)))


def test_layers_that_are_given_numbers_stay_shared() -> None:
    network = Positioned()
    assert converted(assert_faithful(network, torch.randn(2, 3, 9, 9))) == {"stem", "head"}
    reason = "Conv2d 'positions.projection': Positions 'positions' is given numbers, not images"
    assert why_shared(network) == {"positions.projection": reason}


class StdConv2d(nn.Conv2d):
    """Weight standardisation, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-6), self.bias)


class ConvSame(nn.Conv2d):
    """TensorFlow's padding, as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 1, 2)))


class ConvOnes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), value=1.0))


class GainConv(nn.Conv2d):
    """A gain a channel, which commutes with the factors."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(args[1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class LoraLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(1, inputs)), nn.Parameter(torch.zeros(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class PickyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("expected 4\nrows")
        return super().forward(x)


@pytest.mark.parametrize("kind", [ConvSame, GainConv])
def test_subclass_that_folds_is_converted(kind: type[nn.Conv2d]) -> None:
    network = nn.Sequential(kind(3, 4, 3), nn.Flatten(1), nn.LazyLinear(2))
    network(torch.randn(1, 3, 5, 5))
    assert converted(assert_faithful(network, torch.randn(2, 3, 5, 5))) == {"0", "2"}


@pytest.mark.parametrize("kind", [StdConv2d, ConvOnes])
def test_subclass_that_does_not_fold_stays_shared(kind: type[nn.Conv2d]) -> None:
    network = nn.Sequential(kind(3, 4, 3), nn.Conv2d(4, 2, 3, padding=1))
    student = assert_faithful(network, torch.randn(2, 3, 5, 5))
    assert converted(student) == {"1"}
    assert why_shared(network) == {"0": f"{kind.__name__} '0': factors do not fold into its weight"}


def test_linear_subclasses_are_tried() -> None:
    network = nn.Sequential(nn.Linear(3, 3), LoraLinear(3, 3), PickyLinear(3, 2))
    assert converted(to_batch_ensemble(network, 2)) == {"0"}
    assert why_shared(network) == {
        "1": "LoraLinear '1': factors do not fold into its weight",
        "2": "PickyLinear '2': trying it gave ValueError: expected 4 rows",
    }


def test_trying_leaves_the_random_state_and_hooks_alone() -> None:
    network, calls = nn.Sequential(ConvSame(3, 4, 3)), []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    to_batch_ensemble(network, 2)
    assert torch.equal(torch.get_rng_state(), state) and not calls


def test_replaced_forward_stays_shared() -> None:
    network = small_network()
    network[3].forward = cast(Any, network[3]).__class__.forward.__get__(network[3])
    assert converted(to_batch_ensemble(network, 2)) == {"0", "5", "8"}
    assert "replaced on the instance" in why_shared(network)["3"]


class ReadsWeight(nn.Module):
    """Reads one weight the ways that count, and asks others for what does not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.inner = nn.Module()
        self.inner.proj = nn.Linear(4, 4)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.to(self.out.weight.dtype), weight=self.qkv.weight, bias=self.qkv.bias)
        x = x + sum(F.linear(x, w) for w in (self.key.weight.t(),)) + x @ self.inner.proj.weight
        return self.out(self.value(x))


def test_weights_read_elsewhere_stay_shared() -> None:
    network = nn.Sequential(ReadsWeight())
    assert converted(assert_faithful(network, torch.randn(3, 4))) == {"0.value", "0.out"}
    reason = "Linear '0.inner.proj': its weight is read by ReadsWeight '0' without calling it"
    assert why_shared(network)["0.inner.proj"] == reason


class OnlyReadsWeight(nn.Module):
    """Reads one weight, which is not the network's last."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))


READERS: list[tuple[Any, Any, str]] = [
    (lambda: Transformer(Block(8)), (4, 3, 8, 8), "'block.self_attention.out_proj'"),
    (lambda: Transformer(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)), (4, 3, 8, 8), "out_proj'"),
    (OnlyReadsWeight, (4, 4), "Linear 'qkv'"),
    (lambda: nn.Sequential(ReadsWeight()), (4, 4), "Linear '0.(qkv|key|inner.proj)'"),
]


@pytest.mark.parametrize(("make", "shape", "layer"), READERS)
def test_check_members_finds_weights_read_without_source(
    make: Any, shape: tuple[int, ...], layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_source(function: Any) -> str:
        raise OSError("could not get source code")

    _weights_read_by.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr("inspect.getsource", no_source)
        student = to_batch_ensemble(make(), 2)
    _weights_read_by.cache_clear()
    with pytest.raises(UserError, match=rf"{layer}.* does not act on each member by itself.*; name it in keep_shared"):
        check_members(student, torch.randn(shape))
    # training leaves the factors of such a layer at one, so that its average is exact
    student.train()(torch.randn(8, *shape[1:])).sum().backward()
    unused = [
        layer for layer in student.modules() if isinstance(layer, BatchEnsembleLayer) and layer.rho_r.grad is None
    ]
    assert unused and all(not layer.rho_r.any() and layer.rho_s.grad is None for layer in unused)


def test_other_modules_stay_shared() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3, groups=2), nn.InstanceNorm2d(2, affine=True)
    )
    student = assert_faithful(network, torch.randn(2, 3, 6, 5))
    assert converted(student) == {"0"}


def test_one_module_in_two_places_is_one_layer() -> None:
    shared = nn.Linear(4, 4)
    student = assert_faithful(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)), torch.randn(3, 4))
    assert cast(Any, student)[0] is cast(Any, student)[2] and len(factor_parameters(student)) == 4


def test_keep_shared() -> None:
    network = nn.Sequential(small_network(), nn.Linear(5, 4), nn.Linear(4, 5))
    student = to_batch_ensemble(network, 2, keep_shared=("0.*", "1"))
    assert converted(student) == {"2"}
    network[2].weight = nn.Parameter(network[1].weight.detach().T.clone())
    network[1].weight = network[2].weight
    assert converted(to_batch_ensemble(network, 2, keep_shared=("1", "2"))) == {"0.0", "0.3", "0.5", "0.8"}
    with pytest.raises(UserError, match=r"'0\.1' fits no conv or linear layer of Sequential.*such as '0\.0', '0\.3'"):
        to_batch_ensemble(network, 2, keep_shared=["0.1"])


# What is refused.


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    return network


def tied_to_embedding() -> nn.Module:
    network = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    network[1].weight = network[0].weight
    return network


def spectral() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), parametrizations.spectral_norm(nn.Linear(4, 4)))


def spectral_by_hook() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)))


def with_cache() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2))
    cast(Any, network[0]).cache = network[0](torch.randn(1, 2))
    return network


class Quantised(nn.Linear):
    __module__ = "torch.ao.nn.qat.modules.linear"


REFUSED: list[tuple[Any, str]] = [
    (tied, r"tied weights: '0\.weight' and '2\.weight' are one parameter"),
    (tied_to_embedding, r"tied weights: '0\.weight' and '1\.weight' are one parameter"),
    (spectral, r"ParametrizedLinear '1' computes its weight"),
    (spectral_by_hook, r"Conv2d '0' computes its weight"),
    (lambda: nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(3)), r"LazyLinear '1' has no values yet"),
    (lambda: nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d()), r"LazyBatchNorm1d '1' has no values yet"),
    (lambda: nn.Linear(2, 3, device="meta"), r"Linear has no values yet"),
    (lambda: torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)), r"is scripted, compiled or data-parallel"),
    (lambda: nn.DataParallel(nn.Linear(2, 3)), r"DataParallel is scripted, compiled or data-parallel"),
    (lambda: torch.compile(nn.Linear(2, 3)), r"OptimizedModule is scripted, compiled or data-parallel"),
    (lambda: nn.Sequential(Quantised(2, 3)), r"Quantised '0' is quantised"),
    (lambda: nn.Linear(2, 3, dtype=torch.complex64), r"Linear has a weight of Parameter torch.complex64"),
    (lambda: to_batch_ensemble(small_network(), 2), r"Sequential is a BatchEnsemble student already"),
    (lambda: nn.Sequential(nn.BatchNorm2d(3)), r"Sequential has no conv or linear layer .*it has none at all"),
    (lambda: StdConv2d(3, 4, 3), r"StdConv2d has no conv or linear layer .*factors do not fold into its weight"),
    (with_cache, r"Sequential cannot be copied: Only Tensors created explicitly"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        to_batch_ensemble(make(), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("members", [0, -1, 2.5])
def test_members_must_be_whole_and_positive(members: Any) -> None:
    with pytest.raises(UserError, match=rf"members: got {members}, expected a whole number of at least 1"):
        to_batch_ensemble(small_network(), members)


def test_one_member() -> None:
    student = draw_factors(to_batch_ensemble(small_network(), 1)).eval()
    x = torch.randn(3, 3, 9, 7)
    torch.testing.assert_close(average_members(student)(x), student(x))


# What only a run can find.


class Around(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def read_by_local_name(net: Any, x: Tensor) -> Tensor:
    layer = net.first
    return net.last(F.linear(x, layer.weight, layer.bias))


FOUND: list[tuple[Any, str]] = [
    (read_by_local_name, r"Linear 'first' does not act on each member by itself"),
    (lambda net, x: net.last(net.first(x.repeat_interleave(2, 0)[: len(x)])), r"the members of Around do not act by"),
    (lambda net, x: net.last(net.first(x.flip(0))), r"it mixes the images of a batch"),
    (
        lambda net, x: net.last(net.first(x.view(-1, 2, 4).transpose(0, 1)).transpose(0, 1).reshape(-1, 4)),
        "Linear 'first'",
    ),
    (lambda net, x: net.last((h := net.first(x)) - h.mean(dim=0)), r"it mixes the images of a batch"),
    (lambda net, x: (net.last(net.first(x)),), r"Around cannot be checked: it gave a tuple"),
    (lambda net, x: net.last(net.first(x)).log() * float("nan"), r"it gave values that are not finite"),
]


@pytest.mark.parametrize(("function", "message"), FOUND)
def test_check_members_finds(function: Any, message: str) -> None:
    student = to_batch_ensemble(Around(function), 2)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(UserError, match=message):
        check_members(student, torch.randn(4, 4))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_check_members_passes_what_is_sound() -> None:
    check_members(to_batch_ensemble(Around(lambda net, x: net.last(net.first(x))), 3), torch.randn(3, 4))


# Other people's networks.


PYTORCHCV = {
    "resnet20_cifar10": 32,
    "preresnet20_cifar10": 32,
    "seresnet20_cifar10": 32,
    "densenet40_k12_cifar10": 16,
    "mobilenetv2_wd4": 32,
    "shufflenet_g3_wd4": 64,
    "efficientnet_b0": 32,
}


@pytest.mark.parametrize("name", PYTORCHCV)
def test_pytorchcv(name: str) -> None:
    provider = pytest.importorskip("pytorchcv.model_provider")
    size = PYTORCHCV[name]
    network = provider.get_model(name, pretrained=False)
    last = [module for module in network.modules() if isinstance(module, nn.AvgPool2d)][-1:]
    if last and size < 224:  # their last pool has the size of the map they were made for
        last[0].kernel_size = last[0].stride = 1
        network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    student = assert_faithful(network, torch.randn(2, 3, size, size))
    convertible = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert converted(student) == convertible


TIMM = {
    "resnet18": ("", ()),
    "convnext_atto": ("", ()),
    "vit_tiny_patch16_224": ("", ()),
    "mobilenetv3_small_050": ("", ()),
    "efficientnet_b0": ("", ()),
    "tf_efficientnet_b0": ("", ()),
    "mixnet_s": ("", ()),
    "swin_tiny_patch4_window7_224": ("", ()),
    "resnetv2_50x1_bit": ("StdConv2d", ()),
    "nfnet_l0": ("ScaledStdConv2d", ()),
    "eva02_tiny_patch14_224": ("read by EvaAttention", ()),
    "xcit_nano_12_p16_224": ("PositionalEncodingFourier 'pos_embed' is given numbers, not images", ()),
    "swinv2_tiny_window8_256": ("read by WindowAttention", ("*.cpb_mlp.*",)),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = import_timm()
    reason, keep_shared = TIMM[name]
    network = timm.create_model(name, num_classes=5).eval()
    size = network.default_cfg["input_size"][-1] if network.default_cfg.get("fixed_input_size") else 64
    student = to_batch_ensemble(network, 2, keep_shared)
    draw_factors(student, 0.1)
    check_members(student, torch.rand(2, 3, size, size))
    averaged = average_members(student)
    assert type(averaged) is type(network)
    network.load_state_dict(averaged.state_dict(), strict=True)
    reasons = why_shared(network).values()
    assert converted(student) and all(reason in why for why in reasons) and bool(reasons) == bool(reason)


@pytest.mark.parametrize("members", [True, 0, 2.0, "2", np.float32(2)], ids=repr)
def test_members_are_a_whole_number(members):
    with pytest.raises(UserError, match=r"members: got .*, expected a whole number of at least 1"):
        to_batch_ensemble(nn.Linear(3, 2), members)


def test_members_are_any_whole_number():
    assert to_batch_ensemble(nn.Linear(3, 2), np.int64(2)).rho_r.shape == (2, 3)
