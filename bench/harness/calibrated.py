"""Teachers and students of any depth whose activations are of order one: what speed and error are measured on.

As drawn, a deep network in evaluation mode saturates its softmax: its norms have seen no images yet.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student, build_student

Network = TypeVar("Network", bound=nn.Module)


def random_images(B: int, size: int, device: torch.device, seed: int = 0) -> Tensor:
    """Draw images (B, 3, H, W) in [0, 1], channels_last, as the step has them."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(B, size, size, 3, generator=generator, device=device).permute(0, 3, 1, 2)


def calibrated(
    network: str, method: str, *, E: int, K: int, size: int, device: torch.device
) -> tuple[Teachers, Student]:
    """Build E teachers and the student of `method`, with norms that scale and shift and whose statistics fit."""

    def classifier(seed: int) -> Classifier:
        plain = build(network, num_classes=K, image_size=size, seed=seed)
        return Classifier(plain, [0.5, 0.4, 0.6], [0.25, 0.3, 0.2])

    student = _settled(build_student(Method.parse(method), classifier, E=E, seed=0), 0, size, device)
    teachers = [_settled(classifier(1 + t), 1 + t, size, device) for t in range(E)]
    return Teachers(teachers, K).to(device), student


def _settled(module: Network, seed: int, size: int, device: torch.device) -> Network:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 or name.endswith(("rho_r", "rho_s")):  # norms, biases, factors
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    module.to(device)
    batches = [random_images(16, size, device, seed=100 + i) for i in range(2)]
    torch.optim.swa_utils.update_bn(batches, module)
    return module.eval()
