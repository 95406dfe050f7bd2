"""Updates of the weights: by which optimizer, and what is averaged over time beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["sgd", "adamw"]

RATES: dict[Optimizer, tuple[float, float]] = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 1e-2)}
"""Learning rate and weight decay by default: the official ones, and for AdamW PyTorch's."""
_MOMENTS: dict[Optimizer, int] = {"sgd": 1, "adamw": 2}


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Optimizer, and averages of the weights over time."""

    optimizer: Optimizer = "sgd"
    """Nesterov SGD, or AdamW."""
    ema: float | None = None
    """Decay of the exponential moving average, a step; None: there is none."""
    swa: int | None = None
    """Number of last epochs whose weights are averaged alike; None: they are not."""

    @property
    def copies(self) -> int:
        """Number of values kept of every parameter while it trains, the parameter among them, its gradient not."""
        return 1 + _MOMENTS[self.optimizer] + (self.ema is not None) + (self.swa is not None)

    @property
    def bytes_moved(self) -> int:
        """Bytes that an update moves for an fp32 parameter: its gradient read, all that it changes read and written."""
        return 4 + 8 * (1 + _MOMENTS[self.optimizer] + (self.ema is not None))

    @property
    def files(self) -> int:
        """Number of networks that a training leaves: the best and the last, the same of the EMA, and SWA's."""
        return 2 + 2 * (self.ema is not None) + (self.swa is not None)

    @property
    def averages(self) -> dict[str, str]:
        """Names of the averages by the stem of the file that holds the network: `best-ema`, `swa`."""
        ema = {} if self.ema is None else {"best-ema": f"EMA {self.ema}"}
        return ema | ({} if self.swa is None else {"swa": f"SWA {self.swa}"})


SGD = Updates()
"""Nesterov SGD, and no average: the official method."""
