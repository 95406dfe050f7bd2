"""A Lightning module: three teachers to one network. `python examples/lightning_module.py [EPOCHS]`"""

import sys
from typing import Any

import pytorch_lightning as lightning
import torch
from digits import accuracy, digits, small_network, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ensdistill


class Distillation(lightning.LightningModule):
    """Lets `Distiller` do the step, and Lightning the rest: loaders, logs, checkpoints."""

    def __init__(self, teachers: list[nn.Module], student: nn.Module, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step updates the weights itself, captured on a GPU
        self.distiller = ensdistill.Distiller(teachers, student, **options)
        self.nothing = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log_dict(self.distiller.step(images, labels))  # without waiting: Lightning reads them when it logs
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give Lightning steps to count, without which it saves no checkpoint: the distiller has the real optimizer."""
        return torch.optim.SGD([self.nothing], lr=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the student, its optimizer and the step in Lightning's checkpoint."""
        checkpoint["distiller"] = self.distiller.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there, to the numbers of an unbroken run."""
        self.distiller.load_state_dict(checkpoint["distiller"])


def main() -> None:
    """Train teachers, distil them, and print what the student knows."""
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    train, test = digits()
    teachers = [trained(small_network(seed), train, epochs) for seed in range(3)]
    loader = DataLoader(train, batch_size=50, shuffle=True, drop_last=True)
    module = Distillation(teachers, small_network(seed=3), steps=epochs * len(loader), lr=0.05, device="cpu")
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(module, loader)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})
    print(f"student: {accuracy(module.distiller.average(), test):.3f} of the test images")


if __name__ == "__main__":
    main()
