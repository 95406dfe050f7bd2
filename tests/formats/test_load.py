"""Teachers: frozen, from files of every form, in the order given, checked before any long work."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ensdistill.formats.flax import official_from_state_dict
from ensdistill.formats.load import find_files, load_teachers, parse_builder_args
from ensdistill.formats.ours import NetworkInfo, save_network
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.runtime.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
FLAX_FILE = GOLDEN / "official_teacher0.msgpack"
PIXELS: dict[str, Any] = {"pixel_mean": (0.3, 0.5, 0.4), "pixel_std": (0.2, 0.3, 0.25)}
DATA: dict[str, Any] = {"num_classes": 4, "image_shape": (9, 7, 3)}
BUILDER: dict[str, Any] = {"builder": "their_nets:small", "builder_args": {"num_classes": 4}}


@pytest.fixture
def images_BCHW() -> Tensor:
    return torch.rand(5, 3, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def their_nets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("package")
    (folder / "their_nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from ensdistill.models import Classifier\n"
        "def small(num_classes, width=6, in_channels=3):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))\n"
        "def normalised(num_classes):\n"
        "    return Classifier(small(num_classes), (0.1, 0.2, 0.3), (1.5, 1.0, 0.5))\n"
        "class Tuple(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = small(4)\n"
        "    def forward(self, x):\n        return self.net(x), x\n"
        "class Ending(nn.Module):\n"
        "    def __init__(self, end):\n        super().__init__()\n        self.net = small(4)\n"
        "        self.end = {'softmax': nn.Softmax(1), 'sigmoid': nn.Sigmoid(), 'log': nn.LogSoftmax(1)}.get(end)\n"
        "        self.exp = end == 'exp'\n"
        "    def forward(self, x):\n        y = self.net(x)\n"
        "        return y.log_softmax(1).exp() if self.exp else self.end(y)\n"
        "class Map(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = nn.Conv2d(3, 4, 1)\n"
        "    def forward(self, x):\n        return self.conv(x)\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("their_nets", None)


@pytest.fixture
def write_flax() -> Callable[..., None]:
    """Writes flat arrays as the nested msgpack file that Flax makes of them."""

    def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
        tree: dict[str, Any] = {}
        for name, value in arrays.items():
            *folders, leaf = name.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))
        path.write_bytes(msgpack.packb(tree))

    return write


def small(seed: int = 0, **arguments: Any) -> nn.Module:
    import their_nets

    torch.manual_seed(seed)
    network = their_nets.small(**({"num_classes": 4} | arguments))
    for entry in network.state_dict().values():
        if entry.is_floating_point():
            entry.copy_(torch.rand(entry.shape) + 0.1 * torch.randn(entry.shape))
            entry.abs_() if entry.ndim == 1 else None
    return network


def classified(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        return Classifier(network, **PIXELS).eval()(images_BCHW)


def saved(path: Path, network: nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


# ------------------------------------------------------------------------------------------------------------ Teachers


def make_teachers() -> Teachers:
    return Teachers([Classifier(small(seed), **PIXELS) for seed in range(3)], num_classes=4)


def test_logits_of_every_teacher_and_of_one(images_BCHW: Tensor) -> None:
    teachers = make_teachers()
    assert (teachers.E, teachers.num_classes) == (3, 4)
    logits_EBK = teachers(images_BCHW)
    assert logits_EBK.shape == (3, 5, 4)
    for m in range(3):
        assert torch.equal(logits_EBK[m], teachers.member(m, images_BCHW))
        assert torch.equal(logits_EBK[m], classified(small(m), images_BCHW))
    assert not torch.allclose(logits_EBK[0], logits_EBK[1])


def test_training_mode_never_reaches_them(images_BCHW: Tensor) -> None:
    teachers = make_teachers()
    before = {key: value.clone() for key, value in teachers.state_dict().items()}
    expected = teachers(images_BCHW)
    holder = nn.ModuleList([teachers])
    assert holder.train().training and teachers.train() is teachers
    assert not any(module.training for module in teachers.modules())
    assert torch.equal(teachers(images_BCHW), expected)  # no dropout, no batch statistics
    assert all(torch.equal(value, before[key]) for key, value in teachers.state_dict().items())


def test_they_are_frozen_and_still_give_input_gradients(images_BCHW: Tensor) -> None:
    teachers = make_teachers()
    assert not any(parameter.requires_grad for parameter in teachers.parameters())
    images_BCHW.requires_grad_()
    teachers.member(1, images_BCHW).square().sum().backward()
    assert images_BCHW.grad is not None and images_BCHW.grad.norm() > 0
    assert all(parameter.grad is None for parameter in teachers.parameters())


# --------------------------------------------------------------------------------------------------------- files, order


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (
            ["teachers/10/best.safetensors", "teachers/2/best.safetensors", "teachers/2/last.safetensors", "x.pt"],
            [1, 0],
        ),
        (["b/best.safetensors", "a/best.safetensors", "a/best_acc1"], [1, 0]),
        (["1/best_acc1", "0/best_acc1", "0/ckpt_e10"], [1, 0]),
        (["best.safetensors", "last.safetensors"], [0]),
        (["best_acc1", "ckpt_e200"], [0]),
        (["n10.pt", "n9.pth", "n1.safetensors", "n11.msgpack", "notes.txt"], [2, 1, 0, 3]),
    ],
)
def test_a_folder_gives_its_teachers_in_order(tmp_path: Path, there: list[str], found: list[int]) -> None:
    touch(tmp_path, *there)
    assert find_files([tmp_path]) == [tmp_path / there[i] for i in found]


def test_files_and_patterns_keep_the_order_given(tmp_path: Path) -> None:
    touch(tmp_path, "b.pt", "a.pt", "SGD/10/best_acc1", "SGD/9/best_acc1", "odd[1].pt")
    given: list[str | Path] = [
        tmp_path / "b.pt",
        str(tmp_path / "SGD/*/best_acc1"),
        tmp_path / "a.pt",
        tmp_path / "odd[1].pt",
    ]
    expected = ["b.pt", "SGD/9/best_acc1", "SGD/10/best_acc1", "a.pt", "odd[1].pt"]
    assert find_files(given) == [tmp_path / name for name in expected]
    assert find_files([tmp_path / "SGD/*"]) == [tmp_path / name for name in expected[1:3]]


def test_paths_that_give_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "a.pt")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("absent.pt", "absent.pt: no such file or folder"),
        ("*.gone", r"\*.gone: no such file or folder"),
        ("empty", "empty: no teachers in this folder; expected a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_files([tmp_path / "a.pt", tmp_path / path])
    with pytest.raises(UserError, match="teachers: no path given"):
        find_files([])
    with pytest.raises(UserError, match=r"a.pt: given twice; an ensemble needs different teachers"):
        find_files([tmp_path / "a.pt", tmp_path / "*.pt"])


@pytest.mark.parametrize("content", [b"", b"x", b"<!DOCTYPE html>", b"\x89HDF\r\n\x1a\n" + b"1" * 30, b"\x80"])
def test_files_of_no_network_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"a.pt: not the file of a network \(\d+ bytes.*; expected our .safetensors"):
        load_teachers([tmp_path / "a.pt"], **DATA, **BUILDER, **PIXELS)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(small().state_dict(), path)
    data = path.read_bytes()
    for size in (3, 30, len(data) // 3, -5):
        path.write_bytes(data[:size])
        message = "not the file of a network" if size == 3 else "no whole safetensors file"
        with pytest.raises(UserError, match=rf"a.safetensors: {message}"):
            load_teachers([path], **DATA, **BUILDER, **PIXELS)


def test_a_safetensors_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a.safetensors: no tensors by name in it, found nothing"):
        load_teachers([tmp_path / "a.safetensors"], **DATA, **BUILDER, **PIXELS)


# ------------------------------------------------------------------------------------------------------ PyTorch's files


def test_state_dicts_with_a_builder(tmp_path: Path, images_BCHW: Tensor) -> None:
    saved(tmp_path / "0.pt", small(0))
    save_file(small(1).state_dict(), tmp_path / "1.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in small(2).state_dict().items()}}, tmp_path / "2.pth")
    teachers = load_teachers([tmp_path], **DATA, **BUILDER, **PIXELS)
    assert teachers.E == 3 and not any(parameter.requires_grad for parameter in teachers.parameters())
    for m in range(3):
        assert torch.allclose(teachers.member(m, images_BCHW), classified(small(m), images_BCHW), atol=1e-5)


def test_each_file_may_have_its_own_arguments(tmp_path: Path, images_BCHW: Tensor) -> None:
    saved(tmp_path / "0.pt", small(0))
    saved(tmp_path / "1.pt", small(1, width=9))
    arguments = '[{"num_classes": 4}, {"num_classes": 4, "width": 9}]'
    teachers = load_teachers([tmp_path], **DATA, **PIXELS, builder="their_nets:small", builder_args=arguments)
    assert torch.allclose(teachers.member(1, images_BCHW), classified(small(1, width=9), images_BCHW), atol=1e-5)
    with pytest.raises(UserError, match="a list of 2 for 1 PyTorch files; expected one object, or one for each file"):
        load_teachers([tmp_path / "0.pt"], **DATA, **PIXELS, builder="their_nets:small", builder_args=arguments)
    with pytest.raises(UserError, match=r"1.pt: the state_dict does not fit their_nets:small: 0.weight has shape"):
        load_teachers([tmp_path], **DATA, **PIXELS, **BUILDER)


def test_a_builder_may_bring_its_normalisation(tmp_path: Path, images_BCHW: Tensor) -> None:
    path = saved(tmp_path / "0.pt", small(3))
    builder: dict[str, Any] = {"builder": "their_nets:normalised", "builder_args": {"num_classes": 4}}
    logits = load_teachers([path], **DATA, **builder)(images_BCHW)[0]
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.5, 1.0, 0.5]).view(3, 1, 1)
    with torch.inference_mode():
        expected = small(3).eval()((images_BCHW - mean) / std)
    assert torch.allclose(logits, expected, atol=1e-5)
    with pytest.raises(UserError, match=r"0.pt: does not say its pixel mean and std"):
        load_teachers([path], **DATA, **BUILDER)


def test_a_network_of_another_package(tmp_path: Path) -> None:
    provider = pytest.importorskip("pytorchcv.model_provider")
    torch.manual_seed(4)
    path = saved(tmp_path / "n.pth", provider.get_model("resnet20_cifar10"))
    teachers = load_teachers(
        [path],
        num_classes=10,
        image_shape=(32, 32, 3),
        builder="pytorchcv.model_provider:get_model",
        builder_args='{"name": "resnet20_cifar10"}',
        **PIXELS,
    )
    assert teachers(torch.rand(2, 3, 32, 32)).shape == (1, 2, 10)


def test_a_state_dict_needs_a_builder(tmp_path: Path) -> None:
    path = saved(tmp_path / "0.pt", small())
    with pytest.raises(UserError, match=r"0.pt: a state_dict does not say its network; expected --teacher-builder"):
        load_teachers([path], **DATA, **PIXELS)


def test_arguments_of_the_builder() -> None:
    assert parse_builder_args('{"a": 1}') == parse_builder_args({"a": 1}) == [{"a": 1}]
    assert parse_builder_args('[{"a": 1}, {}]') == [{"a": 1}, {}]
    with pytest.raises(UserError, match=r"teacher-args: .{a: 1}. is no JSON \(.*\(char 1\)\); expected such as"):
        parse_builder_args("{a: 1}")
    for wrong in ("3", "[]", "[1]", '"text"', "null"):
        with pytest.raises(UserError, match="expected a JSON object, or a list of them"):
            parse_builder_args(wrong)


# ------------------------------------------------------------------------------------------------ official checkpoints


def test_official_checkpoints(tmp_path: Path) -> None:
    for t in range(2):
        (tmp_path / str(t)).mkdir()
        shutil.copy(FLAX_FILE, tmp_path / str(t) / "best_acc1")
    teachers = load_teachers([tmp_path], num_classes=10, image_shape=(32, 32, 3))
    with np.load(GOLDEN / "official_wrn10x1_m4.npz", allow_pickle=False) as golden:
        images_BCHW = torch.from_numpy(golden["images"][1]).permute(0, 3, 1, 2)
        expected = golden["teacher_log_confidences_clean"][1, 0]
    log_probs = teachers(images_BCHW).log_softmax(-1).numpy()
    assert teachers.E == 2
    np.testing.assert_allclose(log_probs, [expected, expected], atol=0.05)  # it holds bfloat16 weights


def test_an_official_student_teaches_as_its_average(tmp_path: Path, write_flax: Callable[..., None]) -> None:
    with np.load(GOLDEN / "official_wrn10x1_m4.npz", allow_pickle=False) as golden:
        prefix = "latentbe/before/"
        student = {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}
        write_flax(tmp_path / "best_acc1", student)
        images_BCHW = torch.from_numpy(golden["merged/images"]).permute(0, 3, 1, 2)
        expected = golden["merged/log_confidences"]
        pixels: dict[str, Any] = {
            "pixel_mean": golden["pixel_mean"].tolist(),
            "pixel_std": golden["pixel_std"].tolist(),
        }
    teachers = load_teachers([tmp_path / "best_acc1"], num_classes=10, image_shape=(32, 32, 3), **pixels)
    np.testing.assert_allclose(teachers(images_BCHW)[0].log_softmax(-1).numpy(), expected, atol=1e-4)
    with pytest.raises(UserError, match=r"best_acc1: does not say its pixel mean and std; give pixel_mean"):
        load_teachers([tmp_path / "best_acc1"], num_classes=10, image_shape=(32, 32, 3))


def test_an_official_student_may_have_layers_without_factors(tmp_path: Path, write_flax: Callable[..., None]) -> None:
    prefix, linear = "latentbe/before/", "params/classifier/Linear"
    with np.load(GOLDEN / "official_wrn10x1_m4.npz", allow_pickle=False) as golden:
        mixed = {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}
        images_BCHW = torch.from_numpy(golden["merged/images"]).permute(0, 3, 1, 2)
    ones = {f"{linear}_BatchEnsemble_0/{f}": np.ones_like(mixed[f"{linear}_BatchEnsemble_0/{f}"]) for f in "rs"}
    write_flax(tmp_path / "with", mixed | ones)
    for entry in "wb":
        mixed[f"{linear}_0/{entry}"] = mixed.pop(f"{linear}_BatchEnsemble_0/{entry}")
    write_flax(tmp_path / "without", {name: value for name, value in mixed.items() if name not in ones})
    pixels: dict[str, Any] = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.25,) * 3}
    teachers = load_teachers(
        [tmp_path / "with", tmp_path / "without"], num_classes=10, image_shape=(32, 32, 3), **pixels
    )
    logits_EBK = teachers(images_BCHW)
    assert torch.equal(logits_EBK[0], logits_EBK[1]) and logits_EBK.std() > 0.1


# ------------------------------------------------------------------------------------------------------ ours, and mixed


def save_ours(path: Path, network: nn.Module, architecture: str, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "class_names": tuple("abcd"),
        "image_shape": (9, 7, 3),
        "method": "ce",
        **PIXELS,
    }
    save_network(path, network, NetworkInfo(**(fields | changes)))
    return path


def test_a_run_folder_brings_everything(tmp_path: Path, images_BCHW: Tensor) -> None:
    networks = [build("wrn10x1", num_classes=4, image_size=9, seed=t) for t in range(3)]
    for t in (2, 0, 1):
        save_ours(tmp_path / f"teachers/{t}/best.safetensors", networks[t], "wrn10x1")
        save_ours(tmp_path / f"teachers/{t}/last.safetensors", networks[0], "wrn10x1")
    teachers = load_teachers([tmp_path], **DATA)
    assert teachers.E == 3
    for t, network in enumerate(networks):
        assert torch.allclose(teachers.member(t, images_BCHW), classified(network, images_BCHW), atol=1e-5)


def test_ours_of_a_foreign_builder_needs_its_name(tmp_path: Path, images_BCHW: Tensor) -> None:
    path = save_ours(tmp_path / "t.safetensors", small(1), "their_nets:small", arguments={"num_classes": 4})
    teachers = load_teachers([path], **DATA, builder="their_nets:small")
    assert torch.allclose(teachers(images_BCHW)[0], classified(small(1), images_BCHW), atol=1e-5)
    with pytest.raises(UserError, match=r"t.safetensors: .*their_nets:small"):
        load_teachers([path], **DATA)


def test_forms_architectures_and_normalisations_may_differ(
    tmp_path: Path, images_BCHW: Tensor, write_flax: Callable[..., None]
) -> None:
    theirs = saved(tmp_path / "theirs.pt", small(1))
    network = build("wrn10x1", num_classes=4, image_size=9, seed=2)
    other: dict[str, Any] = {"pixel_mean": (0.0, 0.1, 0.2), "pixel_std": (0.5, 0.6, 0.7)}
    ours = save_ours(tmp_path / "ours.safetensors", network, "wrn10x1", **other)
    official = build("wrn16x1", num_classes=4, image_size=9, seed=3)
    write_flax(tmp_path / "ckpt", official_from_state_dict(official.state_dict()))
    teachers = load_teachers([theirs, ours, tmp_path / "ckpt"], **DATA, **BUILDER, **PIXELS)
    with torch.inference_mode():
        normalised = Classifier(network, **other).eval()(images_BCHW)
    expected = [classified(small(1), images_BCHW), normalised, classified(official, images_BCHW)]
    assert torch.allclose(teachers(images_BCHW), torch.stack(expected), atol=1e-5)


def test_classes_are_taken_by_name(tmp_path: Path, images_BCHW: Tensor) -> None:
    network, said = build("wrn10x1", num_classes=4, image_size=9, seed=2), []
    ours = [save_ours(tmp_path / f"{name}.safetensors", network, "wrn10x1") for name in "ab"]
    theirs = [saved(tmp_path / f"{name}.pt", small(1)) for name in "cd"]
    loaded = load_teachers(
        [*ours, *theirs], **DATA, **BUILDER, **PIXELS, class_names=tuple("cabd"), say=said.append
    )(images_BCHW)  # fmt: skip
    expected = classified(network, images_BCHW)[:, [2, 0, 1, 3]], classified(small(1), images_BCHW)
    assert torch.allclose(loaded[0], expected[0], atol=1e-5) and torch.allclose(loaded[2], expected[1], atol=1e-5)
    assert [line.split(":")[0] for line in said] == [f"{ours[0]} and 1 more", f"{theirs[0]} and 1 more"]
    assert "the same classes in another order" in said[0] and "does not name its classes" in said[1]
    load_teachers(ours, **DATA, class_names=tuple("0123"), say=pytest.fail, warn=said.append)
    assert len(said) == 3 and said[2].endswith("numbers are no names, so the classes are taken in order")
    with pytest.raises(UserError, match=r"a.safetensors: class 3 is called 'd', which the data do not have"):
        load_teachers(ours, **DATA, class_names=tuple("abcx"))


# ------------------------------------------------------------------------------------------- checked before long work


def load_one(tmp_path: Path, network: nn.Module, **changes: Any) -> Teachers:
    path = saved(tmp_path / "t.pt", network)
    return load_teachers([path], **({**DATA, **BUILDER, **PIXELS} | changes))


def test_class_counts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t.pt: gives 4 classes, the data have 5; give teachers of the same classes"):
        load_one(tmp_path, small(), num_classes=5)


def test_channels_are_checked(tmp_path: Path) -> None:
    grey: dict[str, Any] = {"image_shape": (9, 7, 1), "pixel_mean": (0.5,), "pixel_std": (0.5,)}
    with pytest.raises(
        UserError, match=r"t.pt: does not take images of 9 x 7 pixels and 1 channels.*conv takes 3"
    ) as caught:
        load_one(tmp_path, small(), **grey)
    assert "\n" not in str(caught.value)
    # Three means would silently make three channels of one.
    with pytest.raises(UserError, match=r"t.pt: takes images of 3 channels, the data have 1"):
        load_one(tmp_path, small(), image_shape=(9, 7, 1))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = small()
    network[6].weight.data[2, 1] = float("nan")  # type: ignore[index]
    with pytest.raises(UserError, match=r"t.pt: gives values that are not finite"):
        load_one(tmp_path, network)


@pytest.mark.parametrize(("name", "found"), [("Tuple", "tuple"), ("Map", r"\(2, 4, 9, 7\)")])
def test_outputs_other_than_logits_are_refused(tmp_path: Path, name: str, found: str) -> None:
    import their_nets

    network = getattr(their_nets, name)()
    with pytest.raises(UserError, match=rf"t.pt: gives {found} for 2 images; expected logits of shape \(2, 4\)"):
        load_one(tmp_path, network, builder=f"their_nets:{name}", builder_args={})


@pytest.mark.parametrize(
    ("end", "found"),
    [
        ("softmax", "rows that sum to 1.*leave out the softmax"),
        ("exp", "rows that sum to 1.*leave out the softmax"),
        ("sigmoid", "numbers between 0 and 1.*leave out the sigmoid"),
    ],
)
def test_probabilities_are_no_logits(tmp_path: Path, end: str, found: str) -> None:
    import their_nets

    network = their_nets.Ending(end)
    with pytest.raises(UserError, match=rf"t.pt: gives probabilities \({found} that it ends with, or give its logar"):
        load_one(tmp_path, network, builder="their_nets:Ending", builder_args={"end": end})
    with torch.no_grad():  # sure of itself: a row of one and zeros
        network.net[-1].weight.mul_(1e4)
    with pytest.raises(UserError, match="gives probabilities"):
        load_one(tmp_path, network, builder="their_nets:Ending", builder_args={"end": end})


def test_logarithms_of_probabilities_are_logits(tmp_path: Path) -> None:
    import their_nets

    assert load_one(tmp_path, their_nets.Ending("log"), builder="their_nets:Ending", builder_args={"end": "log"}).E == 1
