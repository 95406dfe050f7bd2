"""A latentbe+tdiv-sdiv step of networks that have no kernels, timm's: by modules, captured on a GPU, and compiled.

Each network takes the way that a training of it would take: the step is tried captured, and compiled, against itself on
the same draws (engine/modules/rehearsal.py), and what gives other numbers is not timed. `modules` is the step as it is, or
captured where there is a GPU; `compiled` the same with torch.compile. Both then take turns (turns.py). The note says
which way it was, how far the compiled steps came from the others, and the seconds that compiling took: with what
inductor's cache held, so that the first measurement on a machine tells more than the second.

Networks are drawn, not pretrained; teachers and student are of one kind. Those that fix their size are built for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.harness.context import FAILED, Context, release, timing_columns
from bench.harness.rows import Row
from bench.harness.turns import in_turns
from ensdistill.config.methods import Method
from ensdistill.engine.modules.rehearsal import Compiling
from ensdistill.engine.networks import make_networks
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.runtime.errors import UserError
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig
from ensdistill.training.stepper import CudaGraph, Stepper

METHOD = Method(student="latentbe", shown="tdiv-sdiv")
NETWORKS = (
    "resnet50",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "vit_tiny_patch16_224",
    "regnety_002",
    "swin_tiny_patch4_window7_224",
)
"""Networks of timm, one of a family each."""
WAYS: dict[str, Compiling] = {"modules": "no", "compiled": "yes"}
"""Providers, and what each asks of `--compile`; with --quick the first alone."""
LEAST_SIZE = 32
"""Pixels of a side below which nothing is left of an image at the end of these networks."""
LR, STEPS, LOG_EVERY = 1e-3, 10_000, 50


class ModuleStep:
    """Does the step of a training of `network` on random images."""

    def __init__(self, context: Context, network: str, compiling: Compiling) -> None:
        """Raises UserError where it cannot be compiled, and should be."""

        def classifier(seed: int) -> Classifier:
            return Classifier(timm_network(network, context.classes, context.size, seed), [0.5] * 3, [0.25] * 3)

        device, B, size = context.device, context.B, context.size
        generator = torch.Generator().manual_seed(0)
        images_BHWC = torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8, generator=generator)
        labels_B = torch.randint(0, context.classes, (B,), generator=generator)
        self._batch = images_BHWC.to(device), labels_B.to(device)
        teachers = Teachers([classifier(1 + t) for t in range(context.E)], context.classes).to(device)
        student = build_student(METHOD, classifier, E=context.E, seed=0).to(device)
        networks = make_networks("reference", teachers, student, context.precision, device)
        config = StepConfig(method=METHOD, seed=0)
        inputs: Any = self  # of its inputs the stepper itself wants a batch alone
        self.stepper = Stepper(
            State(networks=networks, optimizer=make_optimizer(student, config.weight_decay)),
            config,
            inputs=inputs,
            rates=[LR] * STEPS,
            device=device,
            rows=LOG_EVERY,
            graph=CudaGraph(device) if device.type == "cuda" else None,
            compiling=compiling,
        )
        self.stepper.prepare(first_row=0)

    def fill(self) -> None:
        """Leave the batch as it is: see `ensdistill.data.inputs.Inputs`."""

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the batch that the step reads."""
        return self._batch

    def __call__(self, i: int) -> None:
        """Do one step."""
        self.stepper()
        if self.stepper.state.step % LOG_EVERY == 0:
            self.stepper.mark()

    @property
    def note(self) -> str:
        """The way that it took, and what it was chosen by."""
        trial, words = self.stepper.trial, []
        assert trial is not None, "modules are asked"
        if self.stepper.device.type == "cuda":
            words.append("captured" if trial.captured else f"not captured: {trial.facts['not_captured']}")
        if trial.compiled:
            facts = trial.facts
            words.append(f"compiled in {facts['compiling_seconds']:.0f} s, within {facts['compiled_within']:.0e}")
        return "; ".join(words)


def timm_network(name: str, K: int, size: int, seed: int) -> torch.nn.Module:
    """Draw timm's network `name` for K classes and images of `size` pixels a side.

    Raises:
        UserError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"timm cannot be imported ({error}); install it (pip install timm)") from error
    torch.manual_seed(seed)
    options: dict[str, Any] = {"pretrained": False, "num_classes": K}
    if timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = size
    network: torch.nn.Module = timm.create_model(name, **options)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads


def rows(context: Context) -> Iterator[Row]:
    """Yield two rows for each network, as they are found."""
    if context.size < LEAST_SIZE:
        raise UserError(f"--size: got {context.size}, expected at least {LEAST_SIZE} for these networks")
    for network in NETWORKS[-1:] if context.quick else NETWORKS:
        context.say(f"modules: {network}")
        steps: dict[str, ModuleStep] = {}
        for provider, compiling in list(WAYS.items())[: 1 if context.quick else None]:
            try:
                steps[provider] = ModuleStep(context, network, compiling)
            except (UserError, RuntimeError) as error:
                yield replace(_row(context, provider, network), note=f"{FAILED}: {error}")
        timings = in_turns(steps, context.device, rounds=context.rounds, max_seconds=context.seconds)
        for provider, timing in timings.items():
            columns: dict[str, Any] = timing_columns(timing, context.B)
            yield replace(_row(context, provider, network), **columns, note=steps[provider].note)
        steps.clear()
        release(context.device)


def _row(context: Context, provider: str, network: str) -> Row:
    return context.row(part="modules", provider=provider, network=network, method=str(METHOD))
