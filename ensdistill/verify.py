"""Replay a file of golden numbers: `python -m ensdistill.verify FILE.npz`.

The file holds networks, batches and what another implementation computed from them (names: tests/golden/README.md).
Each quantity gets a line: its largest error, the tolerance, ok or FAIL. Exit code 0 if all are within, 1 if one is
past, 2 for a file that is not of the form. Everything runs in float32: on the CPU, and with a backend other than the
reference on a GPU where there is one. Without one the kernels run in Triton's interpreter, some minutes a file.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks, make_networks
from ensdistill.engine.operations import Backend
from ensdistill.formats.flax import OfficialNetwork, official_from_state_dict, wide_resnet_from_official
from ensdistill.kernels.images.perturb import perturb
from ensdistill.kernels.launch import INTERPRETED
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import BatchEnsembleStudent, PlainStudent, Student
from ensdistill.run.metrics import accuracy, diversity, measures, nll
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.training.optimizer import Schedule, make_optimizer
from ensdistill.training.step import State, StepConfig, update

TAU, WEIGHT_DECAY = 4.0, 5e-4
RUNS = {
    "sgd": (Method(student="ce"), 0.0),
    "kd": (Method(student="kd"), 0.9),
    "latentbe": (Method(student="latentbe"), 1.0),
    "latentbe_tdiv_sdiv": (Method(student="latentbe", shown="tdiv-sdiv"), 1.0),
}
"""Method and α of each run; τ 4, weight decay 5e-4, Nesterov momentum 0.9."""


@dataclass(frozen=True)
class Check:
    """One quantity against its golden value."""

    name: str
    error: float
    tolerance: float
    kind: Literal["relative", "absolute"] = "relative"

    @property
    def ok(self) -> bool:
        """True where the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok  " if self.ok else "FAIL"
        return f"{verdict}  {self.name:<44} {self.kind} error {self.error:9.2e}   tolerance {self.tolerance:.0e}"


def relative(name: str, ours: Tensor | np.ndarray | float, golden: np.ndarray, tolerance: float) -> Check:
    """Largest difference over the golden array's largest entry."""
    difference, golden = np.abs(_array(ours) - golden.astype(np.float64)), np.abs(golden.astype(np.float64))
    return Check(name, float(difference.max() / max(float(golden.max()), 1e-30)), tolerance)


_MAX_BYTES = 1 << 30
"""Largest size of an unpacked golden file; the one in tests/golden has 4 million bytes."""


class Golden:
    """The arrays of a golden file; a missing one is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
                num_bytes = sum(member.file_size for member in archive.infolist())
                if num_bytes > _MAX_BYTES:
                    raise UserError(
                        f"{path}: unpacks to {num_bytes:,} bytes; expected a golden file of at most {_MAX_BYTES:,}"
                    )
                self.arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable .npz of plain arrays ({error}); expected a golden file") from error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise UserError(
                f"{self.path}: the array {name} is missing; expected a golden file (tests/golden/README.md)"
            )
        return self.arrays[name]

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, without it."""
        found = {name[len(prefix) + 1 :]: array for name, array in self.arrays.items() if name.startswith(prefix + "/")}
        if not found:
            raise UserError(
                f"{self.path}: no array is called {prefix}/…; expected a golden file (tests/golden/README.md)"
            )
        return found

    def network(self, prefix: str) -> OfficialNetwork:
        """The network under `prefix/params` and `prefix/batch_stats`."""
        return wide_resnet_from_official(
            self.below(f"{prefix}/params"), self.below(f"{prefix}/batch_stats"), where=f"{self.path}: {prefix}"
        )


def verify(golden: Golden, backend: Backend = "reference") -> Iterator[Check]:
    """Make every check of the file, one after another."""
    gpu = backend != "reference" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")

    def networks(teachers: Teachers | None, student: Student) -> Networks:
        made = make_networks(backend, teachers, student.to(device), "fp32", device)
        if made.notes:
            raise UserError(f"{golden.path}: no kernels for {'; '.join(made.notes)}; use --backend reference")
        return made

    x_SBCHW = torch.from_numpy(golden["images"]).permute(0, 1, 4, 2, 3)
    labels_SB = torch.from_numpy(golden["labels"]).long()
    if x_SBCHW.ndim != 5 or labels_SB.shape != x_SBCHW.shape[:2]:
        raise UserError(
            f"{golden.path}: images {golden['images'].shape} and labels {golden['labels'].shape}; "
            "expected (steps, B, H, W, C) and (steps, B)"
        )
    E = len({name.split("/")[0] for name in golden.arrays if re.match(r"teacher\d+/", name)})
    if E == 0:
        raise UserError(
            f"{golden.path}: no array is called teacher0/…; expected a golden file (tests/golden/README.md)"
        )
    official = [golden.network(f"teacher{t}") for t in range(E)]
    teachers = Teachers([_classifier(golden, network) for network in official], official[0].num_classes).to(device)
    x_SBCHW, labels_SB = x_SBCHW.to(device), labels_SB.to(device)
    clean = networks(teachers, PlainStudent(_classifier(golden, official[0])))
    t_SEBK = torch.stack([clean.teacher_logits(x_BCHW) for x_BCHW in x_SBCHW])
    yield relative(
        "teacher_log_confidences_clean", t_SEBK.log_softmax(-1), golden["teacher_log_confidences_clean"], 1e-5
    )
    for run, (method, alpha) in RUNS.items():
        yield from _verify_run(golden, run, method, alpha, teachers, x_SBCHW, labels_SB, networks)
    yield from _verify_merged(golden, labels_SB.flatten().cpu())
    yield from _verify_schedule(golden)
    yield from _verify_metrics(golden)


def _classifier(golden: Golden, official: OfficialNetwork) -> Classifier:
    network = build(official.name, num_classes=official.num_classes, in_channels=official.in_channels)
    network.load_state_dict(_with_counters(official.state_dict, network))
    return Classifier(network, golden["pixel_mean"].tolist(), golden["pixel_std"].tolist())


def _student(golden: Golden, run: str, method: Method) -> Student:
    official = golden.network(f"{run}/before")
    network = build(official.name, num_classes=official.num_classes, in_channels=official.in_channels)
    classifier = Classifier(network, golden["pixel_mean"].tolist(), golden["pixel_std"].tolist())
    if not method.has_members:
        network.load_state_dict(_with_counters(official.state_dict, network))
        return PlainStudent(classifier)
    E = len(official.state_dict["stem.rho_r"])
    student = BatchEnsembleStudent(classifier, E, average=True)
    converted = student.classifier.network
    converted.load_state_dict(_with_counters(official.state_dict, converted))
    return student


def _with_counters(state_dict: dict[str, Tensor], network: torch.nn.Module) -> dict[str, Tensor]:
    """PyTorch counts the batches that a norm has seen; golden files do not."""
    return {
        key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")
    } | state_dict


def _verify_run(
    golden: Golden,
    run: str,
    method: Method,
    alpha: float,
    teachers: Teachers,
    x_SBCHW: Tensor,
    labels_SB: Tensor,
    networks: Callable[[Teachers | None, Student], Networks],
) -> Iterator[Check]:
    student = _student(golden, run, method)
    state = State(
        networks=networks(teachers if method.needs_teachers else None, student),
        optimizer=make_optimizer(student, WEIGHT_DECAY),
    )
    config = StepConfig(method=method, seed=0, tau=TAU, alpha=alpha, weight_decay=WEIGHT_DECAY, pad=0, flip=False)
    for i, (x_BCHW, labels_B) in enumerate(zip(x_SBCHW, labels_SB, strict=True)):
        step = f"{run}/step{i}"
        if method.shown == "tdiv-sdiv":
            a, b = (int(member) for member in golden[f"{step}/pair"])
            gradient = state.networks.divergence_gradient(x_BCHW, (a, b), with_student=True)
            x_BCHW, _ = perturb(x_BCHW, gradient, kernel=state.networks.kernel)
            difference = np.abs(_array(x_BCHW.permute(0, 2, 3, 1)) - golden[f"{step}/perturbed_images"])
            yield Check(f"{step}/perturbed_images", float(difference.max()), 5e-4, "absolute")
        values = update(state, config, x_BCHW, labels_B, lr=float(golden[f"{step}/lr"]))
        for name in ("loss", "loss_ce", "loss_kd", "loss_wd", "acc1"):
            if name in values:
                yield relative(f"{step}/{name}", values[name], golden[f"{step}/{name}"], 1e-5)
    network = getattr(student, "classifier").network.cpu()  # noqa: B009 - both kinds of student have one
    ours = official_from_state_dict(network.state_dict())
    for kind in ("params", "batch_stats"):
        checks = [
            relative(name, ours[f"{kind}/{name}"], array, 5e-4)
            for name, array in golden.below(f"{run}/after/{kind}").items()
            if f"{kind}/{name}" in ours or _missing(golden, run, f"{kind}/{name}")
        ]
        worst = max(checks, key=lambda check: check.error)
        yield Check(f"{run}/after/{kind} ({len(checks)} tensors)", worst.error, worst.tolerance)


def _missing(golden: Golden, run: str, name: str) -> bool:
    raise UserError(f"{golden.path}: {run}/after/{name} has no counterpart in {run}/before; expected the same network")


def _verify_merged(golden: Golden, labels_N: Tensor) -> Iterator[Check]:
    student = _student(golden, "latentbe", Method(student="latentbe"))
    x_BCHW = torch.from_numpy(golden["merged/images"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        log_probs_NK = student.shipped().eval()(x_BCHW).log_softmax(-1)
    yield relative("merged/log_confidences", log_probs_NK, golden["merged/log_confidences"], 1e-5)
    yield relative("merged/acc1", accuracy(log_probs_NK, labels_N), golden["merged/acc1"], 1e-5)
    yield relative("merged/loss_ce", nll(log_probs_NK, labels_N), golden["merged/loss_ce"], 1e-5)


def _verify_schedule(golden: Golden) -> Iterator[Check]:
    for name, array in golden.arrays.items():
        if match := re.fullmatch(r"lr_schedule\(warmup (\d+), cosine (\d+), peak ([\d.]+)\)", name):
            warmup, cosine, peak = int(match[1]), int(match[2]), float(match[3])
            schedule = Schedule(peak=peak, warmup_steps=warmup, total_steps=warmup + cosine)
            yield relative(name, np.array([schedule(step) for step in range(len(array))]), array, 1e-5)


def _verify_metrics(golden: Golden) -> Iterator[Check]:
    logits = {split: torch.from_numpy(golden[f"metrics/{split}_logits"]) for split in ("val", "test")}
    labels = {split: torch.from_numpy(golden[f"metrics/{split}_labels"]).long() for split in ("val", "test")}
    ours = measures(logits["test"], labels["test"], logits["val"], labels["val"])
    pairwise = diversity(logits["test"])
    values = {
        "acc": ours.acc,
        "nll": ours.nll,
        "ece15": ours.ece,
        "cnll": ours.cnll,
        "cece15": ours.cece,
        "temperature": ours.temperature,
        "pairwise_kld": pairwise.kld,
        "pairwise_agreement": pairwise.agreement,
    }
    for name, value in values.items():
        yield relative(f"metrics/{name}", value, golden[f"metrics/{name}"], 1e-5)


def _array(value: Tensor | np.ndarray | float) -> np.ndarray:
    return (
        value.detach().cpu().numpy().astype(np.float64) if isinstance(value, Tensor) else np.asarray(value, np.float64)
    )


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Replay a file of golden numbers and compare."""

    file: Annotated[Path, tyro.conf.Positional]
    """The .npz; its names are those of tests/golden/README.md."""
    backend: Backend = "reference"
    """Backend of the step: its definition in plain PyTorch, cuDNN, the kernels, or the faster of the two."""


def main() -> int:
    """Replay the file and print every check."""
    arguments = parse_arguments(VerifyCommand, "ensdistill.verify", description=__doc__)
    if arguments.backend == "triton" and not torch.cuda.is_available() and not INTERPRETED:
        # Kernels learn that they are interpreted when they are defined: start again with that said.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "ensdistill.verify", *sys.argv[1:]])
    checks = []
    for check in verify(Golden(arguments.file), arguments.backend):
        print(check, flush=True)
        checks.append(check)
    failed = sum(not check.ok for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} quantities agree ({arguments.file}, backend {arguments.backend})")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
