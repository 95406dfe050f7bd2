"""The official code's order of work in plain PyTorch, eager, contiguous tensors: 32 F a step at E = 4.

    x  = augment(images)
    L  = mean(−Σ p_b log p_a) − mean(−Σ q_b log q_a)      every teacher, and every member on its own copy of the batch
    x' = clip(x + √D/255 · ∂L/∂x / ‖∂L/∂x‖)               autograd: back through all of them, 8 F and 8 F
    t  = every teacher on x'                               4 F
    loss = (1 − α) CE + α KD + λ loss_wd                   student forward and back: 12 F; decay is part of the loss
    the gradient of r and s times E; Nesterov SGD

As there: teachers one after the other; the factors scale activations, s ∘ (W * (r ∘ x)); a gradient of zero makes its
image NaN. Unlike there, where JAX compiles the step, nothing is compiled: that is how a port to PyTorch runs. Nothing
slows it down on purpose: no weight gradient is computed where only that of the images is asked for, cuDNN may try
algorithms, and factors are applied as one factor a row, the faster form (see `batch_ensemble.BatchEnsembleLayer`).
Source: github.com/cs-giung/distill-latentbe, train_KD_LatentBE_TDivSDiv.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.rivals.capture import cudnn
from bench.rivals.problem import Problem, Run, weight_decay_loss
from ensdistill.kernels.images.augment import augment_ref
from ensdistill.kernels.philox import counter_of, draw_pair
from ensdistill.runtime.environment import autocast


class OfficialOrder(Run):
    """Does the step in the official order, in fp32 or under autocast."""

    def __init__(self, problem: Problem, *, tf32: bool = False) -> None:
        """`tf32`: whether cuDNN may round the operands of fp32 convolutions."""
        self.config, self.precision, self.tf32 = problem.config, problem.precision, tf32
        self.teachers, self.student = problem.copies(torch.contiguous_format)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=problem.lr, momentum=0.9, nesterov=True)
        self.step = 0

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        config = self.config
        counter = counter_of(config.seed, self.step, 0, torch.device("cpu"))  # numbers to a GPU's launches: no copy
        with cudnn(tf32=self.tf32):
            x_BHWC = augment_ref(images_BHWC, counter, pad=config.pad, flip=config.flip)
            x_BCHW = x_BHWC.permute(0, 3, 1, 2).contiguous()
            self.shown = x_BCHW if config.method.shown == "clean" else self._perturbed(x_BCHW)
            measures = self._update(self.shown, labels_B)
        self.step += 1
        return measures

    def _perturbed(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW.requires_grad_()
        loss = self._divergence(self._teacher_logits(x_BCHW))
        if self.config.method.shown == "tdiv-sdiv":
            self.student.eval()
            loss = loss - self._divergence(self._student_logits(x_BCHW))
        (g_BCHW,) = torch.autograd.grad(loss, x_BCHW)
        g_BCHW = g_BCHW / g_BCHW.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * (x_BCHW[0].numel() ** 0.5 / 255)
        return (x_BCHW.detach() + g_BCHW).clamp(0, 1)

    def _divergence(self, logits_EBK: Tensor) -> Tensor:
        a, b = draw_pair(self.config.seed, self.step, len(logits_EBK))
        log_p_EBK = logits_EBK.log_softmax(-1)
        return -(log_p_EBK[a] * log_p_EBK[b].detach().exp()).sum(-1).mean()

    def _update(self, x_BCHW: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        self.student.train()
        s_MBK = self._student_logits(x_BCHW)
        M, tau = len(s_MBK), self.config.tau
        loss_ce = F.cross_entropy(s_MBK.flatten(0, 1), labels_B.repeat(M))
        loss_wd = weight_decay_loss(self.student)
        acc1 = (s_MBK.argmax(-1) == labels_B).float().mean()
        measures = {"loss_ce": loss_ce, "loss_wd": loss_wd, "acc1": acc1}
        loss = self.config.weight_decay * loss_wd
        if self.teachers is None:
            loss = loss + loss_ce
        else:
            with torch.no_grad():
                p_EBK = (self._teacher_logits(x_BCHW) / tau).softmax(-1)
            loss_kd = -(p_EBK * (s_MBK / tau).log_softmax(-1)).sum(-1).mean() * tau**2
            loss = loss + (1 - self.config.alpha) * loss_ce + self.config.alpha * loss_kd
            measures["loss_kd"] = loss_kd
        self.optimizer.zero_grad()
        loss.backward()
        for factor in self.student.factors():
            assert factor.grad is not None
            factor.grad *= self.student.E
        self.optimizer.step()
        return {name: value.detach() for name, value in (measures | {"loss": loss}).items()}

    def _teacher_logits(self, x_BCHW: Tensor) -> Tensor:
        assert self.teachers is not None, "no teachers"
        with autocast(x_BCHW.device, self.precision):
            return torch.stack([teacher(x_BCHW) for teacher in self.teachers.classifiers]).float()

    def _student_logits(self, x_BCHW: Tensor) -> Tensor:
        with autocast(x_BCHW.device, self.precision):
            return self.student(x_BCHW).float()
