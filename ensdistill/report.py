"""The end of a run: every network that is there, measured on the test images, as one table.

Measures come from the exported files, as anybody would load them. The temperature is fitted on the validation images and
written, with the measures, into the file that it belongs to.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ensdistill.errors import UserError
from ensdistill.export import load_network, save_network
from ensdistill.files import atomic_write
from ensdistill.loop import Progress
from ensdistill.methods import Method
from ensdistill.metrics import Measures, accuracy, dee, ensemble_log_probs, format_dee, measures, nll

if TYPE_CHECKING:
    from ensdistill.job import Job

AVERAGING_GAP = 0.05
"""Accuracy by which the averaged network may fall behind its members' mean before it is called a gap."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network, or one ensemble, measured on the test images."""

    name: str
    """What the table calls it."""
    measures: Measures
    """On the test images."""
    dee: float
    """Deep-ensemble equivalent."""
    last_acc: float | None
    """Test accuracy of the last epoch; `measures` are of the best one on validation."""
    seconds: float | None
    """Of training; None where it was not trained here."""
    images_per_s: float | None
    """Training images a second."""
    cost: float | None
    """Seconds relative to training one plain network, one teacher."""
    averaging: dict[str, float] = field(default_factory=dict)
    """members_acc, members_nll, ensemble_acc, ensemble_nll; recalibrated_acc, recalibrated_nll; of a student of members."""


def member_values(logits_NMK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """The members' mean accuracy and NLL, each by itself, and those of their ensemble (the mean of probabilities)."""
    singles = [ensemble_log_probs(logits_NMK[:, m : m + 1]) for m in range(logits_NMK.shape[1])]
    ensemble_NK = ensemble_log_probs(logits_NMK)
    return {
        "members_acc": statistics.fmean(accuracy(single, labels_N) for single in singles),
        "members_nll": statistics.fmean(nll(single, labels_N) for single in singles),
        "ensemble_acc": accuracy(ensemble_NK, labels_N),
        "ensemble_nll": nll(ensemble_NK, labels_N),
    }


def averaging_gap(values: dict[str, float]) -> str | None:
    """What to say where averaging has failed though the members are well; None where it has not."""
    gap = values.get("members_acc", 0.0) - values["acc"]
    if gap <= AVERAGING_GAP:
        return None
    return (
        f"the averaging gap is open: the averaged network has accuracy {values['acc']:.3f}, its members "
        f"{values['members_acc']:.3f} on average. Try a longer warm-up (--student.warmup-epochs), more epochs, "
        "a lower --factor-rate, a lower --student.lr, or --recalibrate-bn"
    )
