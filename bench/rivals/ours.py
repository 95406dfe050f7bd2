"""This program's step, by the backend named; as one CUDA graph where the program would capture it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.rivals.capture import Captured, momentum
from bench.rivals.problem import Problem, Run
from ensdistill.engine.cpu.side_by_side import SideBySideNetworks, crew_for
from ensdistill.engine.networks import Networks, make_networks
from ensdistill.engine.operations import Backend
from ensdistill.kernels.philox import counter_of
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, train_step


def networks_of(backend: Backend, teachers: Teachers | None, student: Student, problem: Problem) -> Networks:
    """The networks that the program would train: on a CPU, side by side on as many threads as PyTorch has."""
    crew = crew_for(backend, problem.device, torch.get_num_threads(), tiny=False)
    if crew is None:
        return make_networks(backend, teachers, student, problem.precision, problem.device)
    size = 32
    images = torch.rand(2 * crew.threads, 3, size, size, generator=torch.Generator().manual_seed(0))
    return SideBySideNetworks(teachers, student, problem.precision, crew, images)


class Ours(Run):
    """Does `train_step` on batches that lie on the device."""

    def __init__(self, problem: Problem, *, backend: Backend) -> None:
        """Raises ValueError where the backend cannot express all of the networks."""
        self.config, self.lr, self.device = problem.config, problem.lr, problem.device
        teachers, self.student = problem.copies(torch.channels_last)
        networks = networks_of(backend, teachers, self.student, problem)
        if networks.notes:
            raise ValueError(f"problem: expected networks that {backend} can compute, got {'; '.join(networks.notes)}")
        self.state = State(networks=networks, optimizer=make_optimizer(self.student, self.config.weight_decay))
        self.captures = self.device.type == "cuda" and not networks.asks_modules(self.config.method.shown)
        self._captured: Captured | None = None
        self.remember_images(networks)

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        if not self.captures:
            return self._step(images_BHWC, labels_B)
        step = self.state.step
        inputs = images_BHWC, labels_B, counter_of(self.config.seed, step, 0, self.device)
        if self._captured is None:
            changing = [*self.student.state_dict().values(), *momentum(self.state.optimizer)]
            self._captured = Captured(self._step, inputs, changing)
        self.state.step = step + 1
        return self._captured(*inputs)

    def _step(self, images_BHWC: Tensor, labels_B: Tensor, counter: Tensor | None = None) -> dict[str, Tensor]:
        return train_step(self.state, self.config, images_BHWC, labels_B, self.lr, counter=counter)
