"""An ensemble of timm's networks to one. `python examples/timm_ensemble.py [EPOCHS]`

Here the networks are small, drawn at random and trained for a moment; yours come with `pretrained=True`, or
`checkpoint_path`. Teachers may be of other architectures than the student.
"""

import sys

import timm
import torch
from digits import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ensdistill

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]  # of timm's networks: network.pretrained_cfg["mean"], ["std"]


def network(name: str, seed: int) -> nn.Module:
    """Draw a network for ten classes."""
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10)


def as_pictures(data: TensorDataset) -> TensorDataset:
    """Turn the digits into pictures (3, 32, 32) of uint8, which `step` crops and flips as the paper does."""
    images, labels = data.tensors
    images = nn.functional.interpolate(images, 32).expand(-1, 3, -1, -1)
    return TensorDataset((255 * images).round().to(torch.uint8), labels)


train, test = (as_pictures(data) for data in digits())
loader = DataLoader(train, batch_size=50, shuffle=True, drop_last=True)
options = {"steps": epochs * len(loader), "mean": MEAN, "std": STD, "flip": False, "pad": 2, "device": "cpu"}


def train_with(distiller: ensdistill.Distiller) -> nn.Module:
    """Run the loop: the same for a teacher, on labels, and for the student."""
    for _ in range(epochs):
        for images, labels in loader:
            distiller.step(images, labels)
    return distiller.average()


names = ["test_resnet", "test_resnet", "test_efficientnet"]
teachers = [
    train_with(ensdistill.Distiller([], network(name, t), method="ce", **options)) for t, name in enumerate(names)
]
student = train_with(ensdistill.Distiller(teachers, network("test_resnet", 9), **options))

images, labels = test.tensors
normalised = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
with torch.no_grad():
    for name, net in zip([*names, "student: test_resnet"], [*teachers, student], strict=True):
        print(f"{name}: {(net(normalised).argmax(dim=1) == labels).float().mean().item():.3f} of the test images")
