"""Replay a file of golden numbers: `python -m ensdistill.verify FILE.npz`.

The file holds networks, batches and what another implementation computed from them (names: tests/golden/README.md).
Everything is replayed in float32, on the CPU, and with a backend other than the reference on a GPU where there is one
(without one the kernels run in Triton's interpreter, some minutes a file), and by the reference in float64, on the CPU:
the exact numbers. Each quantity gets a line: ours to official, ours to exact, official to exact, the tolerance, and

    ok      ours is within the tolerance of the official number; or, where the official number is one that float32 can
            give: within the tolerance of exact, or nearer to it than the official number is
    FAIL    otherwise

Float32 gives numbers past the tolerance where a ReLU next to zero falls on the other side. Replays from weights and
images that were moved by a few of float32's roundings, made where they are needed, tell that from a wrong number: the
official number lies no farther from exact than they do, and ours is exact from one of them. Exit code 0 if all are ok,
1 if one is not, 2 for a file that is not of the form.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
import tyro
from torch import Tensor

from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks, make_networks
from ensdistill.engine.operations import Backend
from ensdistill.formats.flax import OfficialNetwork, official_from_state_dict
from ensdistill.formats.golden import Golden
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

Arrays = dict[str, np.ndarray]
Kind = Literal["relative", "absolute"]
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
TAU, WEIGHT_DECAY = 4.0, 5e-4
RUNS = {
    "sgd": (Method(student="ce"), 0.0),
    "kd": (Method(student="kd"), 0.9),
    "latentbe": (Method(student="latentbe"), 1.0),
    "latentbe_tdiv_sdiv": (Method(student="latentbe", shown="tdiv-sdiv"), 1.0),
}
"""Method and α of each run; τ 4, weight decay 5e-4, Nesterov momentum 0.9."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One quantity against its golden value and against float64's."""

    name: str
    official: float
    """Error of ours to the golden number."""
    exact: float
    """Error of ours to float64's number."""
    official_exact: float
    """Error of the golden number to float64's."""
    tolerance: float
    """Error that float32 has where no ReLU is next to zero."""
    explained: float = 0.0
    """Error that float32 can have here, as far as it was measured."""
    agrees_nearby: bool = False
    """True where ours is within the tolerance of exact from weights and images that were moved by a few roundings."""
    kind: Kind = "relative"

    @property
    def is_plausible(self) -> bool:
        """True where the golden number is one that float32 can give; NaN is not."""
        return self.official_exact <= max(self.tolerance, self.explained)

    @property
    def ok(self) -> bool:
        """True where ours is right; NaN is not."""
        is_exact = self.exact <= max(self.tolerance, self.official_exact) or self.agrees_nearby
        return self.official <= self.tolerance or (self.is_plausible and is_exact)

    def __str__(self) -> str:
        verdict = "ok  " if self.ok else "FAIL"
        why = "" if self.ok or self.is_plausible else "; the file's number is not what float64 gives"
        return (
            f"{verdict}  {self.name:<44} ours to official {self.official:8.2e}   ours to exact {self.exact:8.2e}   "
            f"official to exact {self.official_exact:8.2e}   tolerance {self.tolerance:.0e} {self.kind}{why}"
        )


@dataclass(frozen=True)
class Quantity:
    """What one line judges: one array or more, by their names in the golden file."""

    name: str
    arrays: Mapping[str, np.ndarray]
    tolerance: float
    kind: Kind = "relative"


def quantity(name: str, value: Tensor | np.ndarray | float, tolerance: float, kind: Kind = "relative") -> Quantity:
    """Make the quantity of one array."""
    return Quantity(name, {name: _array(value)}, tolerance, kind)


class Replay:
    """One computation of everything that a golden file holds.

    Args:
        dtype: float32 for ours, float64 for exact numbers.
        nudge: relative size of what every weight and image is moved by, up or down as `seed` draws it.

    Raises:
        UserError: an array is missing, or does not fit the others.
    """

    def __init__(
        self,
        golden: Golden,
        backend: Backend = "reference",
        dtype: torch.dtype = torch.float32,
        *,
        nudge: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.golden, self.backend, self.dtype, self.nudge = golden, backend, dtype, nudge
        self.generator = torch.Generator().manual_seed(seed)
        gpu = backend != "reference" and torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu else "cpu")
        E = len({name.split("/")[0] for name in golden.arrays if re.match(r"teacher\d+/", name)})
        if E == 0:
            raise UserError(
                f"{golden.path}: no array is called teacher0/…; expected a golden file (tests/golden/README.md)"
            )
        self.official = [golden.network(f"teacher{t}") for t in range(E)]
        self.K, C = self.official[0].num_classes, self.official[0].in_channels
        for t, network in enumerate(self.official):
            if (network.num_classes, network.in_channels) != (self.K, C):
                raise UserError(
                    f"{golden.path}: teacher{t} has {network.num_classes} classes and {network.in_channels} channels; "
                    f"expected {self.K} and {C}, as teacher0 has"
                )
        self.pixels = [golden.shaped(f"pixel_{name}", (C,), "one a channel").tolist() for name in ("mean", "std")]
        self.x_SBCHW = self._images("images", (None, None, None, None, C), "(steps, B, H, W, C)")
        why = "one an image of images"
        self.labels_SB = golden.labels("labels", self.x_SBCHW.shape[:2], self.K, why).to(self.device)
        N, why = self.labels_SB.numel(), "one image a label of labels"
        self.merged_NCHW = self._images("merged/images", (N, None, None, C), why).cpu()
        self.teachers = Teachers([self._classifier(network) for network in self.official], self.K).to(self.device)

    def _moved(self, x: Tensor) -> Tensor:
        if self.nudge == 0.0:
            return x
        signs = torch.randint(0, 2, x.shape, generator=self.generator) * 2 - 1
        return x * (1 + self.nudge * signs)

    def _images(self, name: str, shape: Sequence[int | None], why: str) -> Tensor:
        """Take images, in their last three axes (C, H, W)."""
        x = torch.from_numpy(self.golden.shaped(name, shape, why)).to(self.dtype)
        return self._moved(x.movedim(-1, -3)).to(self.device)

    @torch.no_grad()
    def _typed(self, module: ModuleT) -> ModuleT:
        """Give the module of a float32 network this replay's type, and move its tensors."""
        module = module.to(self.dtype)
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(self._moved(tensor))
        return module

    def _classifier(self, official: OfficialNetwork) -> Classifier:
        network = build(official.name, num_classes=official.num_classes, in_channels=official.in_channels)
        network.load_state_dict(_with_counters(official.state_dict, network))
        return self._typed(Classifier(network, *self.pixels))

    def _student(self, run: str, method: Method) -> Student:
        official = self.golden.network(f"{run}/before")
        if not method.has_members:
            return PlainStudent(self._classifier(official)).to(self.device)
        E = len(official.state_dict.get("stem.rho_r", ()))
        if E != self.teachers.E:
            raise UserError(
                f"{self.golden.path}: {run}/before has {E or 'no'} members; expected {self.teachers.E}, one a teacher"
            )
        network = build(official.name, num_classes=official.num_classes, in_channels=official.in_channels)
        student = BatchEnsembleStudent(Classifier(network, *self.pixels), E, average=True)
        converted = student.classifier.network
        converted.load_state_dict(_with_counters(official.state_dict, converted))
        return self._typed(student).to(self.device)

    def _networks(self, teachers: Teachers | None, student: Student) -> Networks:
        made = make_networks(self.backend, teachers, student, "fp32", self.device)
        if made.notes:
            raise UserError(f"{self.golden.path}: no kernels for {'; '.join(made.notes)}; use --backend reference")
        return made

    def clean(self) -> Iterator[Quantity]:
        """Give the teachers' log-probabilities at the images themselves."""
        student = PlainStudent(self._classifier(self.official[0])).to(self.device)
        networks = self._networks(self.teachers, student)
        t_SEBK = torch.stack([networks.teacher_logits(x_BCHW) for x_BCHW in self.x_SBCHW])
        yield quantity("teacher_log_confidences_clean", t_SEBK.log_softmax(-1), 1e-5)

    def run(self, run: str) -> Iterator[Quantity]:
        """Give the measures of a run's steps, and its network after them."""
        golden, (method, alpha) = self.golden, RUNS[run]
        student = self._student(run, method)
        state = State(
            networks=self._networks(self.teachers if method.needs_teachers else None, student),
            optimizer=make_optimizer(student, WEIGHT_DECAY),
        )
        config = StepConfig(method=method, seed=0, tau=TAU, alpha=alpha, weight_decay=WEIGHT_DECAY, pad=0, flip=False)
        steps = [f"{run}/step{i}" for i in range(len(self.x_SBCHW))]
        rates = [float(golden.shaped(f"{step}/lr", (), "one number")) for step in steps]
        for step, lr, x_BCHW, labels_B in zip(steps, rates, self.x_SBCHW, self.labels_SB, strict=True):
            if method.shown == "tdiv-sdiv":
                a, b = golden.labels(f"{step}/pair", (2,), self.teachers.E, "the members a, b").tolist()
                gradient = state.networks.divergence_gradient(x_BCHW, (a, b), with_student=True)
                x_BCHW, _ = perturb(x_BCHW, gradient, kernel=state.networks.kernel)
                yield quantity(f"{step}/perturbed_images", x_BCHW.permute(0, 2, 3, 1), 5e-4, "absolute")
            values = update(state, config, x_BCHW, labels_B, lr)
            for name in ("loss", "loss_ce", "loss_kd", "loss_wd", "acc1"):
                if name in values:
                    yield quantity(f"{step}/{name}", values[name], 1e-5)
        network = getattr(student, "classifier").network.cpu()  # noqa: B009 - both kinds of student have one
        after = official_from_state_dict(network.state_dict())
        for kind in ("params", "batch_stats"):
            arrays = {f"{run}/after/{name}": _array(x) for name, x in after.items() if name.startswith(f"{kind}/")}
            for name in golden.below(f"{run}/after/{kind}"):
                if f"{run}/after/{kind}/{name}" not in arrays:
                    raise UserError(
                        f"{golden.path}: {run}/after/{kind}/{name} has no counterpart in {run}/before; expected the "
                        "same network"
                    )
            yield Quantity(f"{run}/after/{kind} ({len(arrays)} tensors)", arrays, 5e-4)

    def merged(self) -> Iterator[Quantity]:
        """Give what the averaged student says of the labelled images."""
        student = self._student("latentbe", Method(student="latentbe")).cpu()
        with torch.no_grad():
            log_probs_NK = student.shipped().to(self.dtype).eval()(self.merged_NCHW).log_softmax(-1)
        labels_N = self.labels_SB.flatten().cpu()
        yield quantity("merged/log_confidences", log_probs_NK, 1e-5)
        yield quantity("merged/acc1", accuracy(log_probs_NK, labels_N), 1e-5)
        yield quantity("merged/loss_ce", nll(log_probs_NK, labels_N), 1e-5)

    def schedule(self) -> Iterator[Quantity]:
        """Give the learning rates."""
        for name in self.golden.arrays:
            if match := re.fullmatch(r"lr_schedule\(warmup (\d+), cosine (\d+), peak ([\d.]+)\)", name):
                warmup, cosine, peak = int(match[1]), int(match[2]), float(match[3])
                schedule = Schedule(peak=peak, warmup_steps=warmup, total_steps=warmup + cosine)
                steps = len(self.golden.shaped(name, (None,), "one rate a step"))
                yield quantity(name, np.array([schedule(step) for step in range(steps)]), 1e-5)

    def metrics(self) -> Iterator[Quantity]:
        """Give the measures of an ensemble."""
        golden, logits, labels = self.golden, {}, {}
        for split in ("val", "test"):
            array = golden.shaped(f"metrics/{split}_logits", (None, None, None), "(N, E, K)")
            logits[split] = self._moved(torch.from_numpy(array).to(self.dtype))
            N, _, K = array.shape
            labels[split] = golden.labels(f"metrics/{split}_labels", (N,), K, f"one an image of {split}_logits")
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
            yield quantity(f"metrics/{name}", value, 1e-5)


def _with_counters(state_dict: dict[str, Tensor], network: torch.nn.Module) -> dict[str, Tensor]:
    """PyTorch counts the batches that a norm has seen; golden files do not."""
    return {
        key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")
    } | state_dict


def _array(value: Tensor | np.ndarray | float) -> np.ndarray:
    return (
        value.detach().cpu().numpy().astype(np.float64) if isinstance(value, Tensor) else np.asarray(value, np.float64)
    )


Section = Callable[[Replay], Iterator[Quantity]]
SECTIONS: list[Section] = [
    Replay.clean,
    *(partial(Replay.run, run=run) for run in RUNS),
    Replay.merged,
    Replay.schedule,
    Replay.metrics,
]
"""Parts of a replay; none needs another."""


def verify(golden: Golden, backend: Backend = "reference") -> Iterator[Check]:
    """Make every check of the file, one after another."""
    ours, exact = Replay(golden, backend), Replay(golden, dtype=torch.float64)
    for section in SECTIONS:
        moved = _Moved(golden, backend, section)
        for mine, right in zip(section(ours), section(exact), strict=True):
            yield _judge(golden, mine, right, moved)


NUDGE = 2.0**-20
"""Sixteen roundings of float32: what its sums come to in a network."""
ROUNDINGS = 2
"""Spreads of the moved replays that the official number may lie from exact: more than one ReLU may be next to zero."""
NUM_MOVED = 6
"""Moved replays: every other one goes the opposite way, so that a ReLU next to zero falls on either side."""


class _Moved:
    """A section from weights and images that were moved, ours and exact; computed as far as it is asked for."""

    def __init__(self, golden: Golden, backend: Backend, section: Section) -> None:
        self._exact = cache(partial(self._replay, golden, "reference", torch.float64, section))
        self._ours = cache(partial(self._replay, golden, backend, torch.float32, section))

    @staticmethod
    def _replay(golden: Golden, backend: Backend, dtype: torch.dtype, section: Section, i: int) -> Arrays:
        replay = Replay(golden, backend, dtype, nudge=NUDGE if i % 2 else -NUDGE, seed=i // 2)
        return {name: array for one in section(replay) for name, array in one.arrays.items()}

    def spread(self, name: str, exact: np.ndarray, enough: float) -> float:
        """Distance of the moved exact numbers from exact; no more are computed once it is enough."""
        spread = 0.0
        for i in range(NUM_MOVED):
            if spread < enough:
                spread = max(spread, _distance(self._exact(i)[name], exact))
        return spread

    def agree(self, name: str, tolerance: float) -> bool:
        """Tell whether ours is exact on one of the moved inputs."""
        return any(_distance(self._ours(i)[name], self._exact(i)[name]) <= tolerance for i in range(NUM_MOVED))


def _judge(golden: Golden, mine: Quantity, right: Quantity, moved: _Moved) -> Check:
    """Judge the arrays of a quantity one by one; the check is that of the worst."""
    checks = []
    for name, ours in mine.arrays.items():
        official = golden.shaped(name, ours.shape, "as networks and images give it").astype(np.float64)
        exact = right.arrays[name]
        scale = 1.0 if mine.kind == "absolute" else max(float(np.abs(official).max()), 1e-30)
        check = Check(
            name=mine.name,
            official=_distance(ours, official) / scale,
            exact=_distance(ours, exact) / scale,
            official_exact=_distance(official, exact) / scale,
            tolerance=mine.tolerance,
            kind=mine.kind,
        )
        if not check.ok and check.official_exact > check.tolerance:
            enough = check.official_exact * scale / ROUNDINGS
            check = replace(check, explained=ROUNDINGS * moved.spread(name, exact, enough) / scale)
        if not check.ok and check.is_plausible and np.isfinite(ours).all():
            check = replace(check, agrees_nearby=moved.agree(name, check.tolerance * scale))
        checks.append(check)
    return max(checks, key=lambda check: (not check.ok, check.official))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


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
