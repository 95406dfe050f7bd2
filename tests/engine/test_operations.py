"""The convolutions' keys and costs, the library path against the definitions, and who computes what."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conv_checks import true_forward, true_input_gradient, true_weight_gradient
from torch import Tensor

from ensdistill.engine import operations as providers
from ensdistill.engine.launch_key import Key, key_of
from ensdistill.engine.operations import (
    LibraryOperations,
    RecordingOperations,
    TritonOperations,
    TunedOperations,
    make_operations,
)
from ensdistill.engine.tuning.candidates import Candidate, arguments, candidates
from ensdistill.engine.tuning.measuring import Outcome
from ensdistill.engine.tuning.table import Choice, Failure, Measured, TuningTable
from ensdistill.engine.tuning.tuner import Tuner
from ensdistill.kernels import launch
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.weight_gradient import member_conv_weight_gradient
from ensdistill.kernels.epilogue import unpack_bits_ref
from ensdistill.kernels.norm.pool import global_pool
from ensdistill.kernels.weights.gradient import GradientParts, member_weights_gradient
from ensdistill.kernels.weights.layout import Layer
from ensdistill.kernels.weights.member_weights import WeightSlots, member_weights
from ensdistill.runtime.devices import DEVICES
from ensdistill.runtime.errors import UserError

CPU = torch.device("cpu")
CONVOLUTIONS = {one.direction: one for one in (member_conv, member_conv_input_gradient, member_conv_weight_gradient)}


def make_key(op: str = "forward", **changes: object) -> Key:
    fields = {"E": 3, "M": 3, "B": 2, "H": 7, "W": 9, "CI": 5, "CO": 6, "k": 3, "stride": 1, "dtype": "fp64"}
    fields |= {"out_dtype": "fp64"} | changes
    return Key(op=op, **fields)  # type: ignore[arg-type]


def library_keys() -> Iterator[Key]:
    for k, stride in ((3, 1), (3, 2), (1, 1), (1, 2)):
        for shared in (False, True):
            shape = {"k": k, "stride": stride, "shared": shared}
            yield make_key(**shape)
            yield make_key(**shape, present=("bias", "relu", "residual", "sums"), bits=2)
            yield make_key(**shape, M=4, members=True, present=("no y", "prologue", "second", "sums"), bits=1)
            yield make_key("input gradient", **shape)
            yield make_key("input gradient", **shape, present=("after", "before", "bits", "scale"))
            yield make_key("input gradient", **shape, M=2, members=True, present=("norm",), H=8, W=6)
            yield make_key("weight gradient", **shape, H=8, W=6)
            yield make_key("weight gradient", **shape, present=("prologue",))
    yield make_key(E=1, M=1, present=("relu",))
    yield make_key("input gradient", E=1, M=1)
    yield make_key("weight gradient", E=1, M=1)
    yield make_key(H=1, W=1, k=1, present=("bias",))


def truth_of(key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """What `key`'s operation should give, in float64: results with values, then sums (M, 2, C)."""
    if key.op == "weight gradient":
        return (true_weight_gradient(*tensors, **options),)
    if key.op == "input gradient":
        return true_input_gradient(*tensors, **{**options, "out_dtype": None})
    y, z = true_forward(*tensors, **{**options, "out_dtype": None})
    sums = torch.stack((y.sum((1, 2, 3)), (y * y).sum((1, 2, 3))), 1) if options["sums"] else None
    return y if options["keep_y"] else None, z, sums


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("key", [*library_keys()], ids=str)
def test_library_is_the_convolution(key: Key, grouped: bool) -> None:
    tensors, options = arguments(key, CPU, seed=0)
    operations = LibraryOperations(grouped=grouped)
    run: Any = operations(CONVOLUTIONS[key.op])
    result = run(*tensors, **options)
    if key.op == "weight gradient":
        parts = torch.full((2, *result.shape), torch.nan, dtype=result.dtype)
        assert run(*tensors, **options, parts=parts) is parts
        assert torch.equal(parts.sum(0), result) and operations.weight_gradient_splits(*tensors, **options) == 1
        result = (result,)
    if key.op == "forward":
        *result, bits = result
        assert (bits is None) == (key.bits == 0)
        if bits is not None:
            y, z = true_forward(*tensors, **{**options, "out_dtype": None})
            assert torch.equal(unpack_bits_ref(bits, key.CO), (y if z is None else z)[: key.bits] > 0)
    for one, other in zip(result, truth_of(key, tensors, options), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == torch.float64 and one.is_contiguous()
            torch.testing.assert_close(one.view(other.shape), other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
def test_library_in_bf16_gives_the_types_of_the_kernels(grouped: bool) -> None:
    operations = LibraryOperations(grouped=grouped)
    key = make_key(dtype="bf16", out_dtype="fp32", present=("second", "sums"), bits=3)
    tensors, options = arguments(key, CPU, seed=0)
    out = operations(member_conv)(*tensors, **options)
    assert out.y is not None and out.z is not None and out.sums is not None and out.bits is not None
    dtypes = [out.y.dtype, out.z.dtype, out.sums.dtype, out.bits.dtype]
    assert dtypes == [torch.float32, torch.float32, torch.float32, torch.uint8]
    key = make_key("weight gradient", dtype="bf16", out_dtype="fp32")
    tensors, options = arguments(key, CPU, seed=0)
    dw = operations(member_conv_weight_gradient)(*tensors, **options)
    assert dw.dtype == torch.float32 and dw.shape == (3, 3, 3, 5, 6)


@pytest.mark.parametrize("key", [*library_keys()], ids=str)
def test_key_is_read_off_the_arguments(key: Key) -> None:
    tensors, options = arguments(key, CPU, seed=0)
    if key.op == "weight gradient":
        key = dataclasses.replace(key, out_dtype="fp32")
    assert key_of(CONVOLUTIONS[key.op], *tensors, **options) == key
    with pytest.raises(TypeError, match="unexpected keyword argument 'strides'"):
        key_of(CONVOLUTIONS[key.op], *tensors, **options, strides=2)


def test_keys_of_one_name_are_equal() -> None:
    """The names are the keys of the file of choices."""
    keys = {*library_keys(), make_key(E=4, M=3, members=True), make_key(out_dtype="fp32"), make_key(B=3), make_key(H=9)}
    assert len({str(key) for key in keys}) == len(keys)
    assert str(make_key(stride=2, M=4, members=True, present=("bias", "relu"), bits=2)) == (
        "forward, 3x3/2 5→6 @ 7x9, members 4 of 3 chosen, B 2, fp64, bias, relu, bits of 2"
    )


def test_costs_are_counted_by_hand() -> None:
    E, B, side, C = 4, 128, 32, 64
    activations, weights = 2 * E * B * side * side * C, 2 * E * 9 * C * C
    plain = make_key(E=E, M=E, B=B, H=side, W=side, CI=C, CO=C, dtype="bf16", out_dtype="bf16")
    assert plain.flops == 2 * E * B * side * side * 9 * C * C == 38_654_705_664
    assert plain.bytes == 2 * activations + weights

    def of(**changes: object) -> Key:
        return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]

    assert of(present=("bias", "relu", "sums")).bytes == plain.bytes
    assert of(present=("residual",)).bytes == of(present=("second",)).bytes == plain.bytes + activations
    assert of(present=("no y", "second")).bytes == plain.bytes
    assert of(bits=2).bytes == plain.bytes + activations // 16 * 2 // E
    assert of(shared=True).bytes == plain.bytes - activations * 3 // 4
    assert of(out_dtype="fp32").bytes == plain.bytes + activations
    assert of(members=True, M=2).flops == plain.flops // 2
    backward = of(op="input gradient", present=("after", "before", "bits", "norm", "scale"))
    assert backward.flops == plain.flops and backward.bytes == plain.bytes + 3 * activations + activations // 16
    weight = of(op="weight gradient", out_dtype="fp32")
    assert weight.flops == plain.flops and weight.bytes == 2 * activations + 2 * weights
    assert of(k=1, stride=2).bytes == activations // 2 + weights // 9  # a quarter in, a quarter out
    assert plain.floor(DEVICES["H100"]) == pytest.approx(38_654_705_664 / 800e12)
    assert of(present=("residual",)).floor(DEVICES["H100"]) == pytest.approx((3 * activations + weights) / 3e12)


def test_unknown_shapes_on_a_cpu_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuner, "choice", None)
    key = make_key(dtype="fp32", out_dtype="fp32", present=("bias",))
    tensors, options = arguments(key, CPU, seed=0)
    operations = TunedOperations(TuningTable(None, {}))
    result = operations(member_conv)(*tensors, **options)
    truth = LibraryOperations()(member_conv)(*tensors, **options)
    assert result.y is not None and truth.y is not None and torch.equal(result.y, truth.y)
    assert len(operations.table) == 0


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_the_chosen_one_computes(op: str, device: torch.device) -> None:
    """Every provider on one shape, through the table's choice."""
    key = make_key(op, dtype="fp32", out_dtype="fp32", CI=16, CO=16)
    tensors, options = arguments(key, device, seed=0)
    truth = truth_of(key, tensors, options)[0]
    assert truth is not None
    for candidate in (
        Candidate(provider="triton"),
        Candidate(provider="library"),
        Candidate(provider="library", grouped=True),
    ):
        table = TuningTable(None, {})
        table.put(key, Choice.of(key, [Measured(candidate=candidate, microseconds=1.0, spread=0.0)], None))
        run: Any = TunedOperations(table)(CONVOLUTIONS[op])
        result = run(*tensors, **options)
        one = result if isinstance(result, Tensor) else result[0]
        torch.testing.assert_close(one.double(), truth, rtol=1e-2, atol=1e-2)
        if op == "weight gradient":
            parts = torch.full((3, *truth.shape), torch.nan, device=device)
            run(*tensors, **options, parts=parts)
            torch.testing.assert_close(parts.sum(0).double(), truth, rtol=1e-2, atol=1e-2)


def test_splits_are_those_of_the_chosen_one() -> None:
    key = make_key("weight gradient", dtype="fp32", out_dtype="fp32")
    tensors, options = arguments(key, CPU, seed=0)
    for candidate, splits in (
        (Candidate(provider="triton", tile=(0, 16, 16, 16, 4, 2, 7)), 7),
        (Candidate(provider="triton"), TritonOperations().weight_gradient_splits(*tensors, **options)),
        (Candidate(provider="library"), 1),
    ):
        table = TuningTable(None, {})
        table.put(key, Choice.of(key, [Measured(candidate=candidate, microseconds=1.0, spread=0.0)], None))
        assert TunedOperations(table).weight_gradient_splits(*tensors, **options) == splits


class OnGPU(torch.Tensor):
    """Says that it lies on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Arguments of `make_key()` on a GPU that is made up, where running a candidate gives its name."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Candidate, "run", lambda self, key, tensors, options: str(self))
    return [x.as_subclass(OnGPU) for x in arguments(make_key(), CPU, seed=0)[0]]


def test_an_unknown_shape_on_a_gpu_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def outcome(self: Tuner, key: Key, left: list[Candidate], deadline: float | None) -> Outcome:
        asked.append(key)
        return Outcome(measured=[Measured(candidate=left[-1], microseconds=1.0, spread=0.0)])

    tensors = on_gpu(monkeypatch)
    monkeypatch.setattr(Tuner, "_outcome", outcome)
    operations = TunedOperations(TuningTable(None, {}))
    assert [operations.run(make_key(), tensors, {}) for _ in range(2)] == ["library grouped"] * 2
    assert asked == [make_key()]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert operations.run(make_key(B=3), tensors, {}).startswith("triton") and asked == [make_key()]


def test_where_nothing_is_measured_the_first_tile_runs_that_did_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = on_gpu(monkeypatch)
    monkeypatch.setattr(Tuner, "_outcome", None)
    table = TuningTable(None, {})
    operations = TunedOperations(table, measures=False)
    first, *others = candidates(make_key(), torch.device("cuda"))
    assert operations.run(make_key(), tensors, {}) == str(first)
    table.put_failure(make_key(), first, Failure(reason="an illegal access", crashed=True))
    assert operations.run(make_key(), tensors, {}) == str(others[0])
    chosen = Measured(candidate=others[-1], microseconds=1.0, spread=0.0)
    table.put(make_key(), Choice.of(make_key(), [chosen], None))
    assert operations.run(make_key(), tensors, {}) == str(others[-1])
    y_MBHWC = torch.empty(2, 1, 4, 4, 16)
    assert operations.folds_norm(y_MBHWC, [], torch.device("cuda"))  # as by default


def test_recording_runs_on_tensors_without_values() -> None:
    recorded = RecordingOperations()
    x = torch.empty(3, 2, 8, 8, 16, device="meta")
    w = torch.empty(3, 3, 3, 16, 32, device="meta")
    out = recorded(member_conv)(x, w, stride=2, sums=True)
    assert out.y is not None and out.y.shape == (3, 2, 4, 4, 32) and out.sums is not None
    dx, _ = recorded(member_conv_input_gradient)(out.y, w, size=(8, 8), stride=2)
    dw = recorded(member_conv_weight_gradient)(x, out.y, kernel=3, stride=2)
    assert dx.shape == x.shape and dw.shape == w.shape
    parts = dw.new_empty(2, *dw.shape)
    assert recorded(member_conv_weight_gradient)(x, out.y, kernel=3, stride=2, parts=parts) is parts
    recorded(member_conv)(x, w, stride=2, sums=True)
    assert {key.op: count for key, count in recorded.keys.items()} == {
        "forward": 2,
        "input gradient": 1,
        "weight gradient": 2,
    }
    f = recorded(global_pool)(out.y)
    assert f.shape == (3, 2, 32)
    (one,) = recorded.passes
    assert one.name == "global_pool" and one.shape == "32 @ 4x4" and one.bytes == out.y.nbytes + f.nbytes


def test_recording_counts_the_slots_that_are_written() -> None:
    recorded = RecordingOperations()
    layer = Layer(*(torch.empty(shape, device="meta") for shape in ((32, 16, 3, 3), (2, 16), (2, 32), (32,))))
    recorded(member_weights)(WeightSlots([layer], 5, dtype=torch.bfloat16), [[layer]], E=2)
    parts = GradientParts([layer], 2, [3], dtype=torch.float32)
    recorded(member_weights_gradient)(parts, [[layer]], E=2)
    n, small = 32 * 16 * 9, 4 * (2 * 16 + 2 * 32 + 32)
    assert [(one.name, one.shape) for one in recorded.passes] == [
        ("member_weights", "1 layers"),
        ("member_weights_gradient", "1 layers"),
    ]
    forward, backward = (one.bytes for one in recorded.passes)
    assert forward == 4 * n + 2 * 2 * n + small + 4 * 2 * 32
    assert backward == parts.flat.nbytes + 2 * (4 * n + small) and parts.flat.nbytes >= 4 * 3 * 2 * n + 4 * 2 * 32


def test_backends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_operations("reference", CPU) is None and make_operations("auto", CPU) is None
    assert isinstance(make_operations("library", CPU), LibraryOperations)
    with pytest.raises(
        UserError, match=r"--backend tritn: no such backend \(did you mean 'triton'\?\); expected one of"
    ):
        make_operations("tritn", CPU)
    monkeypatch.setattr(providers.launch, "INTERPRETED", True)
    assert isinstance(make_operations("triton", CPU), TritonOperations)
    monkeypatch.setattr(providers.launch, "INTERPRETED", False)
    with pytest.raises(UserError, match="--backend triton: the kernels need an NVIDIA GPU"):
        make_operations("triton", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda")
    assert isinstance(make_operations("auto", cuda), LibraryOperations)
    with pytest.raises(UserError, match=r"compute capability 8\.0 or more, this one has 7\.5"):
        make_operations("triton", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(TuningTable, "of_device", classmethod(lambda cls, device: TuningTable(None, {})))
    monkeypatch.setattr(providers.launch, "launch_fault", lambda: "Failed to find C compiler.")
    for backend in ("auto", "triton"):
        with pytest.raises(UserError, match=f"--backend {backend}: kernels cannot be launched here: Failed to find C"):
            make_operations(backend, cuda)
    assert isinstance(make_operations("library", cuda), LibraryOperations)
    monkeypatch.setattr(providers.launch, "launch_fault", lambda: "")
    for backend, measures in (("auto", True), ("tuned", False)):
        operations = make_operations(backend, cuda)
        assert isinstance(operations, TunedOperations) and operations.measures == measures


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("Failed to find C compiler.\n Please"), "Failed to find C compiler. Please"),
        (AssertionError("libcuda.so cannot found!"), "libcuda.so cannot found!"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "gcc cannot compile Triton's C part"),
    ],
)
def test_what_triton_s_launches_miss_is_said(error: Exception, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @property
        def active(self) -> None:
            raise error

    monkeypatch.setattr(launch.triton.runtime, "driver", Broken())
    assert launch.launch_fault().startswith(fault)
    monkeypatch.setattr(launch.triton.runtime, "driver", SimpleNamespace(active=object()))
    assert launch.launch_fault() == ""
