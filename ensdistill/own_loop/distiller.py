"""`Distiller`: the training step of `fast_train` for people who have their own loader and loop.

It puts together what a run puts together (the networks, the state, the step, its capture) around batches that come one
at a time: there is no second step here.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensdistill.config.configs import Config, Training
from ensdistill.config.methods import Method
from ensdistill.config.updates import RATES, Optimizer
from ensdistill.costs.dry_run import precision_of_gradients
from ensdistill.costs.network import network_cost
from ensdistill.data.inputs import GivenInputs
from ensdistill.engine.cpu.side_by_side import crew_for, make_step_networks
from ensdistill.engine.modules.rehearsal import Compiling
from ensdistill.engine.networks import Networks
from ensdistill.engine.operations import Backend, make_operations
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import PlainStudent, Student, build_student
from ensdistill.own_loop.checks import (
    content_of,
    is_outside,
    rates_of,
    refuse_outside,
    require_batch,
    require_logits,
)
from ensdistill.own_loop.pieces import channel_values, classifier_of
from ensdistill.runtime.environment import Precision, choose_device, choose_precision, is_tiny
from ensdistill.runtime.errors import UserError
from ensdistill.training.checkpoint import restore, stored
from ensdistill.training.from_config import make_state, step_config
from ensdistill.training.module_draws import kept_generators
from ensdistill.training.step import State
from ensdistill.training.stepper import CudaGraph, Stepper

_FORMAT = 1
_log = logging.getLogger("ensdistill")


class Distiller:
    """Distils teachers into a student, one batch a call::

        distiller = Distiller(teachers, student, steps=len(loader) * epochs)
        for images, labels in loader:
            measures = distiller.step(images, labels)
        network = distiller.average()

    A batch gives the same weights, bit for bit, as in `python -m ensdistill.fast_train`. On a GPU the step is captured
    as one CUDA graph where that is sound; on a CPU networks are computed side by side, on as many threads as PyTorch
    has. PyTorch's autocast around `step` is not followed: `precision` says what is computed in.

    One process alone: several share a batch in `fast_train` under torchrun.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        student: nn.Module | Callable[[int], nn.Module],
        *,
        steps: int,
        method: str = "latentbe+tdiv-sdiv",
        lr: float | Callable[[int], float] | None = None,
        warmup_steps: int | None = None,
        weight_decay: float | None = None,
        optimizer: Optimizer = "sgd",
        tau: float = 4.0,
        alpha: float = 1.0,
        factor_rate: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad: int = 4,
        flip: bool = True,
        seed: int = 0,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        backend: Backend = "auto",
        device: str | torch.device | None = None,
        capture: bool = True,
        compile: Compiling | None = None,
    ) -> None:
        """Prepare; the networks are asked for the first time in the first step.

        Args:
            teachers: E networks, each normalised images (B, C, H, W) → logits (B, K). They are moved to the device,
                frozen and put into evaluation mode themselves. Empty for `ce`.
            student: a network of the same kind, of which a copy is trained; or a function that draws one from a seed,
                which `hydra` needs, for its heads start from different draws.
            steps: updates in all, over which the learning rate falls.
            method: student[+data shown], as `--methods` has them: `kd`, `latentbe`, `be`, `hydra`, `ce`; `gaussian`,
                `ods`, `confods`, `tdiv`, `tdiv-sdiv`.
            lr: peak of the schedule: a linear warm-up, then one cosine to 0; or a function of the step, from 0 on, in
                place of that schedule. By default 0.1, for `adamw` 1e-3.
            warmup_steps: steps of the warm-up; by default 2.5 % of `steps`, the paper's share.
            weight_decay: of every parameter; by default 5e-4, for `adamw` 1e-2.
            optimizer: `sgd`, Nesterov with momentum 0.9; or `adamw`.
            tau: temperature of the distillation.
            alpha: weight of the distillation; 1 − α is that of the labels.
            factor_rate: the rank-one factors learn at `factor_rate` · E times the learning rate.
            mean, std: a value a channel, by which networks want images normalised: the step does it, because images are
                perturbed in [0, 1]. None: networks take images in [0, 1].
            pad, flip: augmentation of uint8 images: a random crop after so many zero pixels a side, a random flip.
            seed: key of every draw of the step; give another in every repetition.
            precision: of convolutions and linear layers; `auto` is bf16 where the device has it.
            backend: as `--backend`: kernels where they are faster, or PyTorch's modules.
            device: `cpu`, `cuda`, `cuda:N`; by default a GPU where there is one.
            capture: on a GPU, replay one CUDA graph a step.
            compile: whether torch.compile computes what PyTorch's modules do; by default `auto` on a GPU, else `no`.

        Raises:
            UserError: an argument has a value that it cannot have, or the student cannot have members.
        """
        if optimizer not in RATES:
            raise UserError(f"optimizer: got {optimizer!r}, expected one of {', '.join(RATES)}")
        self.method = Method.parse(method)
        self._require_choices(teachers, student)
        default_lr, default_decay = RATES[optimizer]
        self._config = Config(
            recipe="own-loop",
            source="own-loop",
            members=max(1, len(teachers)),
            methods=(method,),
            student=Training(lr=default_lr, weight_decay=default_decay if weight_decay is None else weight_decay),
            tau=tau,
            alpha=alpha,
            factor_rate=factor_rate,
            optimizer=optimizer,
            pad=pad,
            flip=flip,
            seed=seed,
            precision=precision,
            backend=backend,
        )
        self.rates = rates_of(steps, default_lr if lr is None else lr, warmup_steps)
        """Learning rate of every step."""
        self.device = choose_device(None if device is None else str(device))
        self.notes: list[str] = []
        """What was chosen, and why something is computed in another way than it might be; logged too (`ensdistill`)."""
        self._mean, self._std = mean, std
        if (mean is None) != (std is None):
            raise UserError("mean, std: got one of the two, expected both, or neither for images in [0, 1]")
        self._precision: Precision = choose_precision(precision, self.device)
        make_operations(backend, self.device)  # says here if it cannot
        self._capture = capture and self.device.type == "cuda"
        self._compiling: Compiling = compile or ("auto" if self.device.type == "cuda" else "no")
        self._begun: tuple[GivenInputs, Stepper] | None = None
        # the number of channels, and of classes, is the first batch's to say
        frozen = None
        if self.method.needs_teachers:
            frozen = Teachers([classifier_of(t, mean or [0.0], std or [1.0]) for t in teachers], 0).to(self.device)
        self._state = self._make_state(frozen, self._make_student(student, len(teachers)))
        self._num_classes = 0
        self._is_outside = torch.zeros(2, dtype=torch.bool, device=self.device)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Train on a batch: perturb, distil, update.

        Args:
            images: (B, C, H, W) of any device, all batches of one shape and type: float32 in [0, 1], augmented as you
                like and not normalised; or uint8, which the step augments (`pad`, `flip`). From page-locked memory they
                are copied without waiting: do not overwrite that before the step has run.
            labels: int64 (B,) in [0, K). Distillation with α = 1 learns nothing from them.

        Returns:
            The measures before the update, float64 scalars on the device for which nothing has waited yet. They are
            `loss`, `loss_ce`, `loss_kd` (not for `ce`), `loss_wd`, and `acc1`, the share of the members' predictions
            that are right.

        Raises:
            UserError: images or labels do not fit (values outside their range are noticed, on a GPU, in the first step
                and when weights are asked for), all steps are done, or networks do not fit each other.
        """
        if self._state.step >= len(self.rates):
            raise UserError(f"steps: all {len(self.rates)} are done; give as many as the loop has")
        require_batch(images, labels, None if self._begun is None else self._begun[0].held[0])
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self._begun is None or self._begun[1].asks_modules:
                stack.enter_context(kept_generators(self.device))
            if self._begun is None:
                inputs = GivenInputs(images, labels, self.device)
                self._begun = inputs, self._begin(inputs)
            else:
                self._begun[0].give(images, labels)
                self._look(self._begun[0])
            stepper = self._begun[1]
            stepper.advance()
            return stepper.measures()

    @property
    def step_count(self) -> int:
        """Number of updates done so far."""
        return self._state.step

    @property
    def student(self) -> nn.Module:
        """The network in training: of BatchEnsemble methods (E·B, …) → (E·B, K), blockwise by member; of `hydra` the
        trunk and its heads, images in [0, 1] (B, …) → (E, B, K)."""
        student = self._state.student
        classifier = getattr(student, "classifier", None)
        return student if classifier is None else classifier.network

    def average(self) -> nn.Module:
        """Take out the network that ships, as it is now: a copy in evaluation mode, which takes what the student took.

        Of `latentbe` the average of the members: a plain network of the student's own class, with its own state_dict
        keys. Of `be` and `hydra` the members, which predict together: log of the mean of their probabilities. Of `kd`
        and `ce` the student.

        Raises:
            UserError: a batch had values that it cannot have.
        """
        self.check()
        shipped = self._state.student.shipped()
        return copy.deepcopy(shipped.network).requires_grad_(True).eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that steps change, as tensors, numbers and text, which `torch.load(…, weights_only=True)` reads.

        A distiller that was made with the same arguments, and takes it, goes on to the very same numbers. Tensors are
        those in training: save them, or copy them, before the next step.

        Raises:
            UserError: a batch had values that it cannot have.
        """
        self.check()
        content = stored(self._state) | {"format": _FORMAT, "arguments": self._arguments()}
        trial = None if self._begun is None else self._begun[1].trial
        if trial is not None and trial.is_needed:
            content["compiled"] = "yes" if trial.compiled else "no"  # compiled passes round differently
        return content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Before the first step of this distiller.

        Raises:
            UserError: a step was done already, or the state is of other arguments or another network.
        """
        if self._begun is not None:
            raise UserError(
                "load_state_dict: this distiller has done a step; make a new one, and give it the state first"
            )
        if state.get("format") != _FORMAT:
            raise UserError(f"state: got format {state.get('format')!r}, expected {_FORMAT}: what state_dict() gives")
        mine, theirs = self._arguments(), state["arguments"]
        if differing := [name for name in mine if mine[name] != theirs.get(name)]:
            found = "; ".join(f"{name} {theirs.get(name)!r}, here {mine[name]!r}" for name in differing)
            raise UserError(f"state: is of other arguments: {found}; make the distiller with the same ones")
        try:
            restore(self._state, state)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"state: belongs to another student ({first}); give the one it was taken of") from error
        if "compiled" in state:
            self._compiling = state["compiled"]

    def check(self) -> None:
        """Wait for the steps so far, and say if a batch had values that it cannot have.

        Raises:
            UserError: images outside [0, 1], or labels that are no class.
        """
        refuse_outside(self._is_outside, self._num_classes)

    # ---- how it is put together --------------------------------------------------------------------------------------

    def _require_choices(self, teachers: Sequence[nn.Module], student: object) -> None:
        if self.method.needs_teachers and not len(teachers):
            raise UserError(f"teachers: got none, but {self.method} learns from them; give one at least")
        for t, teacher in enumerate(teachers):
            if not isinstance(teacher, nn.Module):
                raise UserError(f"teachers: got a {type(teacher).__name__} at {t}, expected networks (nn.Module)")
        if self.method.student == "hydra" and isinstance(student, nn.Module):
            raise UserError(
                "student: hydra draws a head for every teacher; give a function of a seed that makes a network"
            )
        if not isinstance(student, nn.Module) and not callable(student):
            raise UserError(
                f"student: got a {type(student).__name__}, expected a network, or a function that draws one"
            )
        is_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_group and (size := torch.distributed.get_world_size()) > 1:
            raise UserError(
                f"processes: got {size}, but a Distiller trains in one, for each would train a student of its own; "
                "several share a batch in python -m ensdistill.fast_train under torchrun"
            )

    def _make_student(self, student: nn.Module | Callable[[int], nn.Module], E: int) -> Student:
        def make(seed: int) -> Classifier:
            network = copy.deepcopy(student) if isinstance(student, nn.Module) else student(seed)
            return classifier_of(network.requires_grad_(True), self._mean or [0.0], self._std or [1.0])

        return build_student(self.method, make, E=E, seed=self._config.seed).to(self.device)

    def _make_state(self, teachers: Teachers | None, student: Student) -> State:
        return make_state(
            Networks(teachers, student, self._precision),
            self._config.updates,
            weight_decay=self._config.student.weight_decay,
            factor_rate=self._config.factor_rate,
        )

    def _arguments(self) -> dict[str, Any]:
        """What has to be the same where a state is taken: everything that its numbers depend on."""
        config, teachers = self._config, self._state.networks.teachers
        names = ("tau", "alpha", "factor_rate", "optimizer", "pad", "flip", "seed", "members", "backend")
        return {name: getattr(config, name) for name in names} | {
            "method": str(self.method),
            "weight_decay": config.student.weight_decay,
            "precision": self._precision,
            "mean": None if self._mean is None else [float(value) for value in self._mean],
            "std": None if self._std is None else [float(value) for value in self._std],
            "steps": len(self.rates),
            "lr": max(self.rates),
            "schedule": hashlib.sha256(array("d", self.rates).tobytes()).hexdigest()[:8],
            "teachers": [] if teachers is None else [content_of(teacher) for teacher in teachers.classifiers],
        }

    def _begin(self, inputs: GivenInputs) -> Stepper:
        """Choose how networks are computed, now that a batch shows its shape; capture the step."""
        images_BHWC, _ = inputs.held
        B, H, W, C = images_BHWC.shape
        networks, network = self._state.networks, self._a_network()
        self._set_channels(C)
        self._num_classes = require_logits(images_BHWC, networks)
        if networks.teachers is not None:
            networks.teachers.num_classes = self._num_classes
        self._look(inputs, wait=True)
        precision = precision_of_gradients(
            self._precision, network, (H, W, C), device=self.device, asked=self._config.precision, say=self._note
        )
        tiny = False
        with suppress(RuntimeError, AssertionError):  # it looks at values, so that its work cannot be counted
            tiny = is_tiny(B * network_cost(network.network, in_channels=C, image_size=(H, W)).macs_a_layer)
        threads = torch.get_num_threads()
        crew = None if self._compiling == "yes" else crew_for(self._config.backend, self.device, threads, tiny=tiny)
        self._state.networks = networks = make_step_networks(
            self._config.backend,
            networks.teachers,
            networks.student,
            precision,
            self.device,
            crew=crew,
            rows=B,
            image_shape=(H, W, C),
        )
        for note in networks.notes:
            self._note(f"no kernels for {note}; computed by PyTorch's modules")
        stepper = Stepper(
            self._state,
            step_config(self._config, self.method, self._config.student, self._config.seed),
            inputs=inputs,
            rates=self.rates,
            device=self.device,
            rows=1,
            graph=CudaGraph(self.device) if self._capture else None,
            compiling=self._compiling,
        )
        stepper.prepare(first_row=0)
        if stepper.note is not None:
            self._note(stepper.note)
        return stepper

    def _set_channels(self, C: int) -> None:
        """Give every normalisation a value a channel, and refuse those for other images."""
        channel_values("mean", self._mean, C, 0.0), channel_values("std", self._std, C, 1.0)
        networks = self._state.networks
        for module in [*networks.student.modules(), *(networks.teachers.modules() if networks.teachers else ())]:
            if isinstance(module, Classifier) and (found := module.pixel_mean.numel()) != C:
                if found != 1:
                    raise UserError(f"images: got {C} channels, but a network is normalised for {found}")
                module.pixel_mean, module.pixel_std = (
                    values.expand(C, 1, 1).clone() for values in (module.pixel_mean, module.pixel_std)
                )

    def _a_network(self) -> Classifier:
        """A plain network of the student's kind."""
        student = self._state.student
        return student.classifier if isinstance(student, PlainStudent) else student.shipped()

    def _look(self, inputs: GivenInputs, *, wait: bool = False) -> None:
        """Refuse a batch with values that it cannot have: at once, if `wait`; else, on a GPU, when one waits anyway."""
        found = is_outside(*inputs.held, self._num_classes)
        if wait or self.device.type == "cpu":
            refuse_outside(found, self._num_classes)
        else:
            self._is_outside |= found

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            _log.info(text)
