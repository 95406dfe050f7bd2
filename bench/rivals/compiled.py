"""The pruned order of work, 22 F a step at E = 4, as torch.compile makes it: one CUDA graph where there is a GPU.

Three functions are compiled whole, for fixed shapes: the batch to x', the teachers at x', and the loss with its
backward. Members are chosen on the device, from stacked parameters and factors: a variant for each of the E (E − 1)
pairs would be minutes of compilation, and a step that asks the host is no graph. On a GPU the mode is max-autotune, its
own CUDA graphs off: the whole step, fused Nesterov SGD included, is captured as one instead, which copies and launches
less. On a CPU the mode is torch.compile's default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness.compiled_networks import MODE, loop_forward, vmap_forward
from bench.rivals.capture import Captured, cudnn, momentum
from bench.rivals.problem import Problem, Run, weight_decay_loss
from ensdistill.kernels.images.augment import augment_ref
from ensdistill.kernels.images.perturb import perturb_ref
from ensdistill.kernels.loss.distil import distil_output_ref
from ensdistill.kernels.loss.seeds import divergence_seeds_ref
from ensdistill.kernels.philox import counter_of, draw_pair
from ensdistill.models.batch_ensemble import select_members
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.environment import autocast

Images = Callable[[Tensor], Tensor]


class Compiled(Run):
    """Does the step that the module describes."""

    def __init__(self, problem: Problem, *, stacked: bool, compiler: str = "inductor") -> None:
        """`stacked`: the teachers at x' run as one network over stacked parameters, else one after the other.

        `compiler`: torch.compile's backend; those but inductor show only that the functions are whole.
        """
        self.config, self.precision, self.device = problem.config, problem.precision, problem.device
        teachers, self.student = problem.copies(torch.channels_last)
        self.optimizer = _sgd(self.student, problem.lr, self.config.weight_decay)
        self.step = 0
        self.E = 0 if teachers is None else teachers.E
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": compiler}
        if self.device.type == "cuda":
            options["mode"] = MODE
        self._images = torch.compile(self._make_images(teachers), **options)
        self._loss = torch.compile(self._make_loss(), **options)
        self._teachers: Images | None = None
        if teachers is not None:
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            forward = vmap_forward(teachers, dtype) if stacked else loop_forward(teachers, self.precision)
            self._teachers = torch.compile(forward, **options)
        self._captured: Captured | None = None

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        seed = self.config.seed
        pair = draw_pair(seed, self.step, self.E) if self.config.method.shown != "clean" else (0, 0)
        cuda = self.device.type == "cuda"  # page-locked, so that the host need not wait for the steps before
        pair_2 = torch.tensor(pair, pin_memory=cuda).to(self.device, non_blocking=cuda)
        inputs = images_BHWC, labels_B, counter_of(seed, self.step, 0, self.device), pair_2
        self.step += 1
        with cudnn():
            if not cuda:
                return self._whole(*inputs)
            if self._captured is None:
                changing = [*self.student.state_dict().values(), *momentum(self.optimizer)]
                self._captured = Captured(self._whole, inputs, changing)
            return self._captured(*inputs)

    def _whole(self, images_BHWC: Tensor, labels_B: Tensor, counter: Tensor, pair: Tensor) -> dict[str, Tensor]:
        self.student.eval()
        self.shown = self._images(images_BHWC, counter, pair)
        t_EBK = None if self._teachers is None else self._teachers(self.shown)
        self.student.train()
        loss, measures = self._loss(self.shown, t_EBK, labels_B)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return measures

    def _make_images(self, teachers: Teachers | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        config, student, precision = self.config, self.student, self.precision
        stacks = None if teachers is None else torch.func.stack_module_state(list(teachers.classifiers))

        def teacher(m_1: Tensor) -> Images:
            assert teachers is not None and stacks is not None
            # `index` gives the slice itself: PyTorch 2.11 cannot compile a convolution whose weight is a view of one
            own = tuple({name: torch.ops.aten.index(x, [m_1[0]]) for name, x in stack.items()} for stack in stacks)
            return lambda x_BCHW: torch.func.functional_call(teachers.classifiers[0], own, (x_BCHW,))

        def member(m_1: Tensor) -> Images:
            classifier: Any = getattr(student, "classifier")  # noqa: B009 - both kinds of student have one

            def forward(x_BCHW: Tensor) -> Tensor:
                with select_members(classifier.network, m_1):
                    return classifier(x_BCHW)

            return forward

        def term(first: Images, second: Images, x_BCHW: Tensor) -> Tensor:
            pulled: Any = torch.func.vjp(first, x_BCHW)
            logits_BK, pull = pulled
            return pull(divergence_seeds_ref(logits_BK, second(x_BCHW)).to(logits_BK.dtype))[0]

        def images(images_BHWC: Tensor, counter: Tensor, pair: Tensor) -> Tensor:
            x_BCHW = augment_ref(images_BHWC, counter, pad=config.pad, flip=config.flip).permute(0, 3, 1, 2)
            if config.method.shown == "clean":
                return x_BCHW
            a_1, b_1 = pair.split(1)
            with torch.no_grad(), autocast(x_BCHW.device, precision):
                g_BCHW = term(teacher(a_1), teacher(b_1), x_BCHW)
                if config.method.shown == "tdiv-sdiv":
                    g_BCHW = g_BCHW - term(member(a_1), member(b_1), x_BCHW)
            return perturb_ref(x_BCHW, g_BCHW)

        return images

    def _make_loss(self) -> Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        config, student, precision = self.config, self.student, self.precision

        def loss(x_BCHW: Tensor, t_EBK: Tensor | None, labels_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with autocast(x_BCHW.device, precision):
                s_MBK = student(x_BCHW)
            out = distil_output_ref(s_MBK, t_EBK, labels_B, config.tau, config.alpha if t_EBK is not None else 0.0)
            with torch.no_grad():
                loss_wd = weight_decay_loss(student)
                measures = {"loss_ce": out.loss_ce, "loss_wd": loss_wd, "acc1": out.acc1}
                measures["loss"] = out.loss.detach() + config.weight_decay * loss_wd
                if out.loss_kd is not None:
                    measures["loss_kd"] = out.loss_kd
            return out.loss, measures

        return loss


def _sgd(student: Student, lr: float, weight_decay: float) -> torch.optim.SGD:
    """Make Nesterov SGD with momentum from the start: a captured graph would repeat the first step's branch."""
    groups: list[dict[str, Any]] = [{"params": student.shared(), "lr": lr, "weight_decay": weight_decay}]
    if factors := student.factors():
        groups.append({"params": factors, "lr": student.E * lr, "weight_decay": weight_decay / student.E})
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    for parameter in student.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
