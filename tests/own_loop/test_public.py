"""The public names: there without FFCV, quick to import, each documented; the examples run."""

from __future__ import annotations

import inspect
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_here import define_operators, import_timm

import ensdistill

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys
sys.modules.update(dict.fromkeys(["ffcv", "numba", "cv2", "PIL", "sklearn", "tensorboard", "tqdm"]))  # None: not there
import ensdistill
assert "torch" not in sys.modules and "Distiller" in dir(ensdistill)
for name in ensdistill.__all__:
    getattr(ensdistill, name)
import torch
from torch import nn
network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
distiller = ensdistill.Distiller([network(), network()], network(), steps=1)
distiller.step(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))
print(type(distiller.average()).__name__)
"""


def test_needs_neither_ffcv_nor_what_only_data_need(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == "Sequential", done.stderr


def test_every_public_name_has_a_docstring_and_an_unknown_one_is_named() -> None:
    for name in ensdistill.__all__:
        assert inspect.getdoc(getattr(ensdistill, name)), name
    with pytest.raises(AttributeError, match="'ensdistill' has no attribute 'Distillr'"):
        ensdistill.Distillr  # noqa: B018


@pytest.mark.parametrize("example", ["plain_loop", "lightning_module", "by_hand", "timm_ensemble"])
def test_the_examples_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    define_operators()
    if example == "timm_ensemble":
        import_timm()
    if example == "lightning_module":
        pytest.importorskip("pytorch_lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", [example, "1"])
    state = torch.get_rng_state()
    try:
        runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    finally:
        torch.set_rng_state(state)
    assert "student" in capsys.readouterr().out


def test_a_lightning_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    define_operators()
    lightning = pytest.importorskip("pytorch_lightning")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from digits import digits, small_network  # type: ignore[import-not-found]
    from lightning_module import Distillation  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader, Subset

    train, _ = digits()
    teachers = [small_network(seed) for seed in (1, 2)]

    def fitted(epochs: int, checkpoint: str | None = None) -> tuple[Any, Any]:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path / str(epochs),
        )
        module = Distillation(teachers, small_network(3), steps=6, lr=0.05, device="cpu")
        trainer.fit(module, DataLoader(Subset(train, range(60)), batch_size=20), ckpt_path=checkpoint)
        return module.distiller, trainer.checkpoint_callback.best_model_path

    state = torch.get_rng_state()
    try:
        (first, path), (unbroken, _) = fitted(1), fitted(2)
        resumed, _ = fitted(2, path)
    finally:
        torch.set_rng_state(state)
    assert [one.step_count for one in (first, unbroken, resumed)] == [3, 6, 6]
    expected = unbroken.average().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.average().state_dict().items())
