"""What the processes of test_ranks.py and test_many_processes.py in tests/runtime run: `torchrun … rank_programs.py`.

FOLDER                          steps, statistics and collectives; what they gave to FOLDER/RANK.pt
commands FOLDER                 the commands in FOLDER/commands.json, one after another, and what is sent in each; to
                                FOLDER/RANK.pt
sending RANK SIGNAL STEP WHO …  one command, in which RANK sends SIGNAL to `agent` or `self` after STEP, or to itself
                                in the validation after STEP (`validating`); not where torchrun has started it anew
"""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from networks import K, move_, small_batch, small_classifier
from rich.console import Console

from ensdistill import fast_train
from ensdistill.config.methods import Method
from ensdistill.data.feed import Feed
from ensdistill.engine.member_training import MemberTraining
from ensdistill.engine.networks import Networks, make_networks
from ensdistill.engine.operations import LibraryOperations
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.models.synced_norm import averaged_statistics, gather_statistics, scatter_statistics, synchronise_norms
from ensdistill.run import job as job_module
from ensdistill.run.display import Screen
from ensdistill.run.job import Job
from ensdistill.run.predict import predict
from ensdistill.run.report import report
from ensdistill.run.trainer import in_stages
from ensdistill.runtime import ranks as ranks_module
from ensdistill.runtime.errors import RunFailed, UserError, run_main
from ensdistill.runtime.ranks import ALONE, Ranks, from_environment
from ensdistill.runtime.stop import Stop, Stopped
from ensdistill.training import loop
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, update
from ensdistill.training.stepper import Stepper

CPU = torch.device("cpu")
B, SIZE = 6, 9


# ---- collectives ---------------------------------------------------------------------------------------------------


def collectives(ranks: Ranks) -> dict[str, Any]:
    """Every method of `Ranks` that communicates."""
    r = ranks.rank
    ranks_module._BUCKET_BYTES = 100
    averaged = gradients(r)
    ranks.average_(averaged)
    first = [torch.full((3,), r + 5.0), torch.tensor(r)]
    ranks.broadcast_(first)
    own = torch.tensor([1.0, 10.0 * r])
    mean = ranks.mean(own)
    rows = [torch.arange(4).view(2, 2) + 10, None][r]
    written: list[int] = []
    ranks.barrier()
    found = {
        "averaged": averaged,
        "broadcast": first,
        "own": own,
        "mean": mean,
        "sum": ranks.sum_(torch.tensor([r + 1.0])),
        "gathered": ranks.gather(torch.tensor([r, 7])),
        "rows": [ranks.gather_rows(rows), ranks.gather_rows(torch.ones(r + 1, 2, dtype=torch.float64))],
        "any": [ranks.any(False), ranks.any(r == 1), ranks.any(True)],
        "first": ranks.first(lambda: (written.append(r), "a value")[1]),
        "written": written,
        "copy": copy.deepcopy({"ranks": ranks})["ranks"] is ranks,
    }

    def fails() -> None:
        raise OSError("no space left")

    try:
        ranks.first(fails)
    except (OSError, UserError) as error:
        found["failure"] = (type(error).__name__, str(error))
    found["after"] = ranks.any(r == 0)
    return found


def gradients(r: int) -> list[Tensor]:
    """Tensors of several types, sizes and memory formats, other ones on every rank."""
    generator = torch.Generator().manual_seed(r)
    shapes = [(5,), (2, 3, 3, 3), (), (40,), (1, 7)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn[1] = drawn[1].contiguous(memory_format=torch.channels_last)
    return [*drawn, torch.randn(4, dtype=torch.float64, generator=generator)]


class CountingFeed:
    """Batches of a list, and which of them were taken."""

    def __init__(self, sizes: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randint(256, (n, 4, 4, 1), dtype=torch.uint8, generator=generator), torch.arange(n) + 100 * i)
            for i, n in enumerate(sizes)
        ]
        self.num_steps = len(sizes)
        self.taken: list[int] = []

    @contextmanager
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        def left() -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(first_step, self.num_steps):
                self.taken.append(i)
                yield self.batches[i]

        yield left()


FEEDS = ([4, 4, 4, 4, 3], [3])


def members_of(x_BCHW: Tensor) -> Tensor:
    """Logits of two members, (2, B, 3)."""
    return torch.stack([x_BCHW[:, 0, 0, :3], 1 - x_BCHW[:, 0, 1, 1:]])


def prediction(ranks: Ranks) -> dict[str, Any]:
    """Shared evaluation, with more and with fewer batches than ranks."""
    found: dict[str, Any] = {"predicted": [], "taken": []}
    for sizes in FEEDS:
        feed = CountingFeed(sizes)
        found["predicted"].append(predict(members_of, cast(Feed, feed), device=CPU, precision="fp32", ranks=ranks))
        found["taken"].append(feed.taken)
    return found


def statistics(ranks: Ranks) -> dict[str, Any]:
    """Running statistics: averaged for a while, stored and restored."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    move_(network, ranks.rank)
    before = running(network)
    with averaged_statistics(network, ranks):
        inside = running(network)
    stored = gather_statistics(network, ranks)
    after = running(network)
    for tensor in network.buffers():
        tensor.zero_()
    scatter_statistics(network, stored, ranks)
    return {"before": before, "inside": inside, "after": after, "stored": stored, "restored": running(network)}


def running(network: nn.Module) -> dict[str, Tensor]:
    """Copies of all running means and variances."""
    return {name: tensor.clone() for name, tensor in network.named_buffers() if "running" in name}


# ---- a training step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A student, what computes its training pass, and in which type."""

    method: str
    path: str
    dtype: torch.dtype
    network: str = "wrn10x1"

    def __str__(self) -> str:
        return f"{self.method}-{self.network}-{self.path}-{self.dtype}"


CASES = [
    Case(method="ce", path="modules", dtype=torch.float64),
    Case(method="latentbe", path="modules", dtype=torch.float64),
    Case(method="latentbe", path="modules", dtype=torch.float32),
    Case(method="latentbe", path="passes", dtype=torch.float64),
    Case(method="ce", path="library", dtype=torch.float32),
    Case(method="latentbe", path="library", dtype=torch.float32),
    Case(method="latentbe", path="modules", dtype=torch.float64, network="foreign"),
    Case(method="latentbe", path="passes", dtype=torch.float64, network="foreign"),
]


class Foreign(nn.Module):
    """A network with PyTorch's own norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, momentum=0.3)
        self.linear = nn.Linear(5, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.linear(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def classifier_of(case: Case, seed: int) -> Classifier:
    """A network of the case, drawn from `seed`."""
    if case.network != "foreign":
        return small_classifier(seed, case.network)
    torch.manual_seed(seed)
    return Classifier(Foreign(), [0.4] * 3, [0.3] * 3)


class Passes(Networks):
    """The passes over kernels in float64, which `make_networks` does not make."""

    def __init__(self, teachers: Teachers | None, student: Any) -> None:
        super().__init__(teachers, student, "fp32")
        network = student.classifier.network
        self.member_training = MemberTraining(network, student.E, dtype=torch.float64, operations=LibraryOperations())

    def student_logits(self, x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        classifier: Any = self.student.train().classifier
        z_BCHW = (x_BCHW - classifier.pixel_mean) / classifier.pixel_std
        return self.member_training(z_BCHW.permute(0, 2, 3, 1).contiguous())


def state_of(case: Case, ranks: Ranks, *, sync: bool) -> State:
    """The same on every rank."""
    method = Method.parse(case.method)
    student = build_student(method, lambda seed: classifier_of(case, seed), E=2, seed=0)
    move_(student, 1)
    student.to(case.dtype)
    teachers = None
    if method.needs_teachers:
        teachers = Teachers([classifier_of(case, 100 + t) for t in range(2)], K).to(case.dtype)
    if sync:
        synchronise_norms(student, ranks)
    if case.path == "passes":
        networks: Networks = Passes(teachers, student)
    elif case.path == "library":
        networks = make_networks("library", teachers, student, "fp32", CPU)
        assert not networks.notes
    else:
        networks = Networks(teachers, student, "fp32")
    return State(networks=networks, optimizer=make_optimizer(student, 5e-4), ranks=ranks)


def step(case: Case, rows: range, ranks: Ranks, *, sync: bool) -> dict[str, Any]:
    """One update on some rows of the batch: its measures, gradients, parameters and statistics."""
    state = state_of(case, ranks, sync=sync)
    images_BHWC, labels_B = small_batch(B, SIZE)
    x_BCHW = (images_BHWC[rows.start : rows.stop].permute(0, 3, 1, 2) / 255).to(case.dtype)
    config = StepConfig(method=Method.parse(case.method), seed=3)
    measures = update(state, config, x_BCHW, labels_B[rows.start : rows.stop], 0.1)
    names = {parameter: name for name, parameter in state.student.named_parameters()}
    # after the first update Nesterov's momentum is the gradient with its weight decay
    momentum = {names[p]: values["momentum_buffer"] for p, values in state.optimizer.state.items()}
    return {
        "loss": ranks.mean(measures["loss"]),
        "momentum": momentum,
        "parameters": {name: parameter.detach() for name, parameter in state.student.named_parameters()},
        "statistics": running(state.student),
        "keys": list(state.student.state_dict()),
    }


def steps(ranks: Ranks) -> dict[str, Any]:
    """Every case, with norms synchronised and apart."""
    return {
        f"{case} {sync}": step(case, ranks.share(B), ranks, sync=sync)
        for case in CASES
        for sync in ((True, False) if case.network != "foreign" else (True,))
    }


# ---- the whole command ----------------------------------------------------------------------------------------------


def commands(ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    """Of each command: its error, what it printed, and every rank's running statistics at its last checkpoints."""
    save = loop.save_checkpoint
    kept: dict[str, dict[str, Tensor]] = {}

    def saving(path: Path, state: State, progress: list[dict[str, Any]]) -> None:
        save(path, state, progress)
        kept[path.parent.name] = gather_statistics(state.student, state.ranks)

    loop.save_checkpoint = saving
    results = []
    for sent, arguments in json.loads((folder / "commands.json").read_text()):
        kept.clear()
        error, printed = "", io.StringIO()
        with redirect_stdout(printed), Stop().installed() as stop, sending(*sent):
            screen = Screen() if ranks.is_first else Screen(Console(quiet=True, force_terminal=False))
            try:
                in_stages(Job(fast_train.parse(arguments), screen, stop, ranks), report)
            except (UserError, RunFailed, Stopped) as ended:
                error = f"{type(ended).__name__}: {ended}"
        results.append({"error": error, "printed": printed.getvalue(), "statistics": dict(kept)})
    return results


@contextmanager
def sending(rank: str = "", number: str = "", step: str = "", who: str = "") -> Iterator[None]:
    """Inside, one process sends one signal, see above; without arguments none does."""
    if not rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        yield
        return
    advance, predicting = Stepper.__call__, job_module.predict
    state: list[State] = []

    def send() -> None:
        if state and state[0].ranks.rank == int(rank) and state[0].step == int(step):
            os.kill(os.getppid() if who == "agent" else os.getpid(), getattr(signal, number))
            time.sleep(0.5)  # until torchrun has passed it on
            state.clear()  # once: a validation may be of an average too

    def advancing(self: Stepper, ready: Any = None) -> None:
        advance(self, ready)
        state[:] = [self.state]
        if who != "validating":
            send()

    def validating(*arguments: Any, **options: Any) -> Any:
        if who == "validating":
            send()
        return predicting(*arguments, **options)

    Stepper.__call__, job_module.predict = advancing, validating  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Stepper.__call__, job_module.predict = advance, predicting  # type: ignore[method-assign]


def main() -> int:
    """See above."""
    if sys.argv[1] == "sending":
        sent, sys.argv[1:] = sys.argv[2:6], sys.argv[6:]
        with sending(*sent):
            return run_main(fast_train.main)
    torch.set_num_threads(1)
    folder = Path(sys.argv[-1])
    with from_environment(CPU) as ranks:
        assert ranks is not ALONE
        if sys.argv[1] == "commands":
            found: Any = commands(ranks, folder)
        else:
            found = {"steps": steps(ranks), "statistics": statistics(ranks)} | prediction(ranks) | collectives(ranks)
        torch.save(found, folder / f"{ranks.rank}.pt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
