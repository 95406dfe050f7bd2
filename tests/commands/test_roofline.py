"""The floor: the design's table, counts of F, traces of single layers against arithmetic by hand, the command."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensdistill import roofline
from ensdistill.config.methods import Method
from ensdistill.costs.floor import Part, step_floor, step_parts
from ensdistill.costs.network import NetworkCost, network_cost
from ensdistill.models import Classifier, build
from ensdistill.runtime.devices import DEVICES, Device, find_device, installed_gpu
from ensdistill.runtime.errors import UserError, run_main

H100 = DEVICES["H100"]


def cost_of(name: str, *, num_classes: int = 100, in_channels: int = 3, image_size: int = 32) -> NetworkCost:
    with torch.device("meta"):
        network = build(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    return network_cost(network, in_channels=in_channels, image_size=image_size)


def parts_of(method: str, E: int, network: str = "wrn10x1") -> list[Part]:
    cost = cost_of(network, num_classes=7)
    return step_parts(cost, [cost] * E, Method.parse(method))


@pytest.mark.parametrize(
    ("name", "arithmetic_ms", "floor_ms"), [("wrn28x1", 0.39, 1.48), ("wrn28x4", 5.95, 7.8), ("wrn28x10", 36.9, 39.2)]
)
def test_reproduces_the_designs_table(name: str, arithmetic_ms: float, floor_ms: float) -> None:
    cost = cost_of(name)
    teachers, method = [cost] * 4, Method.parse("latentbe+tdiv-sdiv")
    parts = step_parts(cost, teachers, method)
    arithmetic = sum(part.flops(128) for part in parts) / H100.flops
    assert 1e3 * arithmetic == pytest.approx(arithmetic_ms, rel=1e-2)
    floors = step_floor(cost, teachers, method, 128, H100)
    assert 1e3 * sum(floors.values()) == pytest.approx(floor_ms, rel=1e-2)
    assert 1e3 * (sum(floors.values()) - floors["update"]) == pytest.approx(floor_ms, rel=5e-3)


@pytest.mark.parametrize(("name", "floor_ms"), [("wrn28x1", 1.05), ("wrn28x4", 6.95), ("wrn28x10", 39.1)])
def test_the_floor_on_an_h200(name: str, floor_ms: float) -> None:
    cost = cost_of(name)
    floors = step_floor(cost, [cost] * 4, Method.parse("latentbe+tdiv-sdiv"), 128, DEVICES["H200"])
    assert 1e3 * sum(floors.values()) == pytest.approx(floor_ms, rel=1e-2)


def test_rates_say_where_they_come_from() -> None:
    assert DEVICES["H200"].rates == "788 TFLOP/s, 4.3 TB/s (measured)"
    assert {device.source for device in DEVICES.values()} == {"measured", "data sheet"}


def test_reproduces_the_designs_network() -> None:
    cost = cost_of("wrn28x4")
    assert cost.macs == pytest.approx(846e6, rel=1e-3)
    assert cost.activations == pytest.approx(1.05e6, rel=2e-3)
    moved = sum(part.bytes(128, 2) for part in parts_of("latentbe+tdiv-sdiv", 4, "wrn28x4"))
    assert moved == pytest.approx(18e9, rel=1e-2)


@pytest.mark.parametrize(
    ("method", "E", "F"),
    [
        ("ce", 3, 3),
        ("ce+gaussian", 4, 3),
        ("kd", 4, 4 + 3),
        ("kd+gaussian", 3, 3 + 3),
        ("kd+ods", 3, 2 + 3 + 3),
        ("kd+tdiv", 5, 3 + 5 + 3),
        ("latentbe", 3, 3 + 9),
        ("be+confods", 3, 2 + 3 + 9),
        ("be+tdiv", 4, 3 + 4 + 12),
        ("latentbe+tdiv-sdiv", 4, 22),
        ("latentbe+tdiv-sdiv", 2, 6 + 2 + 6),
    ],
)
def test_counts_F(method: str, E: int, F: float) -> None:
    assert sum(part.F for part in parts_of(method, E)) == pytest.approx(F)


def test_hydra_runs_its_trunk_once() -> None:
    cost = cost_of("resnet20x1")
    head = sum(layer.macs for layer in cost.layers if layer.in_head) / cost.macs
    assert 0.2 < head < 0.5  # the last of three groups that cost about the same
    parts = {part.name: part.F for part in step_parts(cost, [cost] * 3, Method.parse("hydra+tdiv-sdiv"))}
    assert parts["student forward"] == pytest.approx(1 - head + 3 * head)
    assert parts["student backward"] == pytest.approx(2 * (1 - head + 3 * head))
    assert parts["sdiv: members a and b"] == pytest.approx(2 * (1 - head) + 3 * head)


def test_teachers_of_several_architectures_count_as_their_mean() -> None:
    small, large = cost_of("wrn10x1"), cost_of("resnet20x2")
    parts = {part.name: part for part in step_parts(small, [small, large, large], Method.parse("latentbe+tdiv"))}
    assert parts["teachers"].flops(5) == 2 * 5 * (small.macs + 2 * large.macs)
    assert parts["tdiv: teachers a and b"].flops(5) == pytest.approx(2 * 5 * 3 * (small.macs + 2 * large.macs) / 3)
    assert parts["student forward"].flops(5) == 2 * 5 * 3 * small.macs


class Mixed(nn.Module):
    """One of each kind of layer, one of them used twice, and a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 10, (3, 1), stride=2, padding=(1, 0), groups=2)
        self.up = nn.ConvTranspose2d(10, 4, 2, stride=2)
        self.twice = nn.Linear(5, 5)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Parameter(torch.randn(3, 5))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = self.norm(self.up(self.grouped(x_BCHW)))
        y = nn.functional.adaptive_avg_pool2d(y, (1, 5)).flatten(1, 2)  # (B, 4, 5)
        y = self.twice(self.twice(y))
        return nn.functional.linear(y, self.out).mean(1)


def test_traces_every_kind_of_layer() -> None:
    network = Mixed()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cost = network_cost(network, in_channels=6, image_size=9)
    rows = [(layer.name, layer.macs, layer.inputs, layer.outputs) for layer in cost.layers]
    assert rows == [
        ("grouped", 10 * 5 * 5 * 3 * 3, 6 * 81, 10 * 25),  # 5x5 outputs, 3 inputs a group, 3x1 kernel
        ("up", 10 * 25 * 4 * 4, 10 * 25, 4 * 100),
        ("twice", 4 * 25, 20, 20),
        ("twice", 4 * 25, 20, 20),
        ("", 4 * 15, 20, 12),
    ]
    assert cost.params == sum(parameter.numel() for parameter in network.parameters())
    assert network.training and not network.norm.training and network.twice.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.grouped._forward_hooks and not network._forward_pre_hooks


def test_a_network_that_fails_is_left_as_it_was() -> None:
    network = Mixed()
    with pytest.raises(RuntimeError):
        network_cost(network, in_channels=5, image_size=9)
    assert network.training and not network.grouped._forward_hooks and not network._forward_pre_hooks


def test_normalisation_costs_nothing() -> None:
    network = build("resnet20x1", num_classes=3, in_channels=1, image_size=9)
    plain = network_cost(network, in_channels=1, image_size=9)
    classifier = network_cost(Classifier(network, [0.3], [0.2]), in_channels=1, image_size=9)
    assert (classifier.macs, classifier.activations) == (plain.macs, plain.activations)


def test_a_layer_takes_the_larger_of_arithmetic_and_memory() -> None:
    cost = cost_of("wrn10x1")
    method, B = Method.parse("kd"), 3
    parts = step_parts(cost, [cost] * 2, method)
    slow = Device(name="a", flops=1e9, bandwidth=1e30, source="made up")
    bound = step_floor(cost, [cost] * 2, method, B, slow)
    assert sum(bound.values()) == pytest.approx(sum(part.flops(B) for part in parts) / 1e9)
    narrow = Device(name="b", flops=1e30, bandwidth=1e9, element_bytes=4, source="made up")
    bound = step_floor(cost, [cost] * 2, method, B, narrow)
    activations = (2.5 * 3 + 8) * B * 4 * cost.activations  # 2 teachers and the student forward, one backward
    assert sum(bound.values()) == pytest.approx((activations + 20 * cost.params) / 1e9)


def test_measures_the_cpu() -> None:
    device = find_device("cpu")
    assert 1e9 < device.flops < 1e14 and 1e8 < device.bandwidth < 1e13
    assert device.element_bytes == 4 and device.source.startswith("measured now")


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run_main(lambda: roofline.main(arguments.split()))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--network wrn28x4 --classes 100 --image-size 32 --members 4 --batch-size 128 --device H100"
    code, out, _ = run(command, capsys)
    assert code == 0
    assert "845.6 MMAC and 1.049 M activations an image, 5,872,180 parameters" in out
    assert "H100: 800 TFLOP/s, 3 TB/s (measured)" in out
    total = out.strip().splitlines()[-1].split()
    assert total[:3] == ["step", "22", "4762.5"] and total[-2:] == ["7.827", "100.0%"]
    shares = [float(line.split()[-1].rstrip("%")) for line in out.splitlines() if line.endswith(("% ", "%"))]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.5)


def test_command_prints_layers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--network wrn10x1 --channels 1 --image-size 9 --method kd --layers", capsys)
    assert code == 0
    assert "conv 3x3/2 16→32 @ 5x5" in out and "matmul 64→100" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device H10", "device 'H10': its rates are not known (did you mean 'H100'?); expected one of cpu, H100, "),
        ("--batch-size 0", "batch-size: got 0, expected at least 1; give a positive number"),
        ("--network resnet19", "network 'resnet19': no such network"),
        ("--method kd+sdiv", "method: no data is called 'sdiv'"),
    ],
)
def test_command_says_what_is_wrong(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(arguments, capsys)
    assert code == 2
    assert err.startswith(f"error: {message}") and len(err.splitlines()) == 1


def test_unknown_gpu_has_no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert installed_gpu() is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert installed_gpu() is H100
    with pytest.raises(UserError, match="its rates are not known"):
        find_device("V100")
