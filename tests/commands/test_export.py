"""Exports: each format is read by what others read it with, and what does not fit is refused before there is a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from safetensors import safe_open
from saved_networks import BUILDER, CLASSES, save_tiny, tiny
from torch import Tensor

import ensdistill
from ensdistill.deploy import graphs
from ensdistill.export import ExportCommand, export, main
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.run.metrics import probabilities
from ensdistill.runtime.errors import UserError, run_main


def images(B: int) -> Tensor:
    """Random uint8 images (B, C, H, W)."""
    return torch.randint(0, 256, (B, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(B))


def expected(B: int, temperature: float | None, network: torch.nn.Module | None = None) -> Tensor:
    """Probabilities of the tiny network at `images(B)`, by hand."""
    with torch.inference_mode():
        logits = (network or tiny()).eval()((images(B).float() / 255 - 0.3) / 0.2)
    return probabilities(logits[:, None], temperature)


def run(file: Path, folder: Path, to: str, **options: Any) -> str:
    return export(ExportCommand(file=file, folder=folder, to=to, builder=BUILDER, **options))  # type: ignore[arg-type]


def test_onnx_gives_calibrated_probabilities_of_any_batch(tmp_path: Path, monkeypatch, capsys) -> None:
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    file, folder = save_tiny(tmp_path / "a.safetensors"), tmp_path / "out"
    arguments = ["export", str(file), str(folder), "--to", "onnx", "--builder", BUILDER]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run_main(main) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    for part in (
        f"{folder / 'model.onnx'}: ONNX, opset 18 of the averaged network, {BUILDER} (latentbe+tdiv-sdiv); ",
        "takes float32 (batch, 1, 8, 8) in [0, 1], any batch; ",
        "gives probabilities float32 (batch, 3), calibrated at temperature 1.37; 3 class names in it; largest |Δp| to",
    ):
        assert part in captured.out
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 1, 8, 8])
    assert (result.name, result.shape) == ("probabilities", ["batch", 3])
    for B in (1, 3, 17):
        found = session.run(None, {"images": (images(B).float() / 255).numpy()})[0]
        assert np.abs(found - expected(B, 1.37).numpy()).max() < 1e-6
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["input"] == "float32 (batch, 1, 8, 8) in [0, 1]" and metadata["opset"] == "18"
    assert json.loads(metadata["class_names"]) == list(CLASSES) and json.loads(metadata["temperature"]) == 1.37
    model = onnx.load(folder / "model.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    content = (folder / "model.onnx").read_bytes()
    assert b".py" not in content and str(Path.cwd()).encode() not in content  # no stack traces of this machine


def test_pt2_takes_uint8_and_gives_logits(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "a.safetensors")
    said = run(file, tmp_path / "out", "pt2", input="uint8", output="logits")
    assert "takes uint8 (batch, 1, 8, 8) from 0 to 255, any batch; gives logits float32 (batch, 3); calibrated" in said
    extra = {graphs.METADATA_FILE: ""}
    program = torch.export.load(tmp_path / "out/model.pt2", extra_files=extra).module()
    for B in (1, 3, 17):
        torch.testing.assert_close(program(images(B)).double().softmax(-1), expected(B, None), rtol=0, atol=1e-6)
    metadata = json.loads(extra[graphs.METADATA_FILE])
    assert metadata["output"].endswith("softmax(log(softmax(logits) + 1e-08) / 1.37)")
    assert metadata["torch"] == torch.__version__ and json.loads(metadata["class_names"]) == list(CLASSES)


def test_what_another_graph_computes_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "a.safetensors", arguments={"changes": True})
    with pytest.raises(UserError, match=r"a.safetensors: the exported file's probabilities differ .* by 0.\d+ on 1 im"):
        run(file, tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


def test_weights_are_the_plain_network_s_with_all_that_they_need(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "a.safetensors")
    said = run(file, tmp_path / "out", "safetensors")
    assert "takes float32 (batch, 1, 8, 8), normalised: (x - [0.3]) / [0.2] of x in [0, 1], any batch" in said
    path = tmp_path / "out/model.safetensors"
    network = tiny(seed=1).eval()
    network.load_state_dict(safetensors.torch.load_file(path))
    torch.testing.assert_close(expected(3, None, network), expected(3, None))
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["input"].startswith("float32 (batch, 1, 8, 8), normalised")
    assert metadata["source"].startswith("the averaged network, saved_networks:tiny (latentbe+tdiv-sdiv), exported by")
    _, info = ensdistill.load_network(path, builder=BUILDER)
    assert info.class_names == CLASSES and info.measures["test_acc"] == 0.875


def test_weights_that_are_not_read_back_as_they_were_are_refused(tmp_path: Path, monkeypatch) -> None:
    file = save_tiny(tmp_path / "a.safetensors")
    other = save_tiny(tmp_path / "b.safetensors", seeds=(1,)).read_bytes()
    monkeypatch.setattr("ensdistill.deploy.weights.network_bytes", lambda *_: other)
    for to in ("safetensors", "hub"):
        with pytest.raises(UserError, match=r"a.safetensors: the exported file's probabilities differ"):
            run(file, tmp_path / to, to)
        assert not (tmp_path / to).exists()


def test_a_hub_folder_has_a_card_of_what_is_known(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    place = run_folder / "students/latentbe-seed0"
    place.mkdir(parents=True)
    file = save_tiny(place / "best.safetensors", recipe="digits")
    config = {"recipe": "digits", "network": BUILDER, "source": "digits", "members": 4, "student": {"epochs": 20}}
    (run_folder / "config.json").write_text(json.dumps(config))
    counts = {"train": 400, "valid": 397, "test": 1000}
    (run_folder / "data.json").write_text(json.dumps({"class_names": CLASSES, "counts": counts}))
    run(file, tmp_path / "my-net", "hub", licence="cc-by-4.0")
    card = (tmp_path / "my-net/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "image-classification"
    for part in (
        "# my-net", "| accuracy | test images | 87.50 % |", "400 train, 397 valid, 1,000 test", "- Teachers: 4",
        "- Epochs: 20", "- Device: not known", "Of the weights: cc-by-4.0.", "0 cat, 1 dog, 2 Käfer",
        f"load_network('my-net', builder='{BUILDER}')",
    ):  # fmt: skip
        assert part in card
    network, info = ensdistill.load_network(tmp_path / "my-net", builder=BUILDER)
    with torch.inference_mode():
        found = probabilities(network(images(3).float() / 255)[:, None], info.temperature)
    torch.testing.assert_close(found, expected(3, 1.37), rtol=0, atol=1e-6)
    # a copied file lies in no run folder, and a hub folder is a source like a file
    run(tmp_path / "my-net", tmp_path / "again", "hub")
    card = (tmp_path / "again/README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1]) and "Of the weights: not stated." in card
    assert "## Data\n\nNot known: neither" in card and "- Epochs: not known" in card
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "my-net/config.json").read_bytes()


def test_a_card_shows_what_a_file_says_as_text(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "a.safetensors", class_names=("<b>", "a\n## Licence\n\nmit", "[x](y)"))
    run(file, tmp_path / "out", "hub", licence="Nobody's Licence 1")
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license_name"] == "Nobody's Licence 1"
    assert r"0 \<b\>, 1 a?\#\# Licence??mit, 2 \[x\](y)" in card


def test_an_ensemble_is_exported_whole_or_refused(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "be.safetensors", seeds=(0, 1), method="be")
    with pytest.raises(UserError, match=r"be.safetensors: holds 2 networks whose probabilities are averaged \(be\)"):
        run(file, tmp_path / "out", "safetensors")
    said = run(file, tmp_path / "out", "hub")
    assert "model card of 2 networks of saved_networks:tiny (be), probabilities averaged" in said
    network, _ = ensdistill.load_network(tmp_path / "out", builder=BUILDER)
    both = MemberNetworks([tiny(seed=0), tiny(seed=1)])
    with torch.inference_mode():
        torch.testing.assert_close(network(images(2).float() / 255).double().softmax(-1), expected(2, None, both))


def test_bad_options_are_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    file, out = save_tiny(tmp_path / "a.safetensors"), tmp_path / "out"
    full, text = tmp_path / "full", tmp_path / "text"
    full.mkdir()
    (full / "mine").touch()
    text.write_text("nothing")
    for message, source, folder, to, options in (
        (
            "--input float: --to hub writes weights alone, which have normalised there",
            file,
            out,
            "hub",
            {"input": "float"},
        ),
        ("--output probabilities: --to safetensors", file, out, "safetensors", {"output": "probabilities"}),
        ("--opset 20: --to pt2 has none", file, out, "pt2", {"opset": 20}),
        ("--opset 3: expected 18 or more", file, out, "onnx", {"opset": 3}),
        ("--licence: --to pt2 has no model card", file, out, "pt2", {"licence": "mit"}),
        ("--licence: got 'a\\\\nb', expected its name in one line", file, out, "hub", {"licence": "a\nb"}),
        (r"full: not empty \(mine\); nothing is overwritten", file, full, "hub", {}),
        ("text: a file; expected a folder", file, text, "pt2", {}),
        ("text: not a safetensors file", text, out, "pt2", {}),
        ("full: no model.safetensors and no config.json", full, out, "pt2", {}),
    ):
        with pytest.raises(UserError, match=message):
            run(source, folder, to, **options)
        assert not out.exists()
    with pytest.raises(UserError, match="its network is built by saved_networks:tiny, which is not part of ensdistill"):
        export(ExportCommand(file=file, folder=out, to="pt2"))
    assert [path.name for path in full.iterdir()] == ["mine"] and text.read_text() == "nothing"


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--to onnx: onnxscript cannot be imp.*: pip install 'ensdistill\[export\]'"):
        run(save_tiny(tmp_path / "a.safetensors"), tmp_path / "out", "onnx")


def test_help_names_every_option(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--to", "--input", "--output", "--opset", "--licence", "--builder"):
        assert option in printed
