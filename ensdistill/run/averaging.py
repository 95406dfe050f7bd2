"""Averaging, watched: the members' mean, their ensemble and the averaged network side by side.

Averaging can fail while the members' loss looks fine, on short schedules and narrow networks above all: the factors
learn at E times the rate. What opens is the averaging gap.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from torch import Tensor

from ensdistill.run.metrics import accuracy, ensemble_log_probs, nll

AVERAGING_GAP = 0.05
"""Accuracy by which the averaged network may fall behind its members' mean before it is called a gap."""


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


def averaging_gap(values: Mapping[str, float]) -> str | None:
    """What to say where averaging has failed though the members are well; None where it has not.

    `values` holds `acc`, of what is shipped, and `members_acc` where there are members.
    """
    if values.get("members_acc", 0.0) - values["acc"] <= AVERAGING_GAP:
        return None
    return (
        f"the averaging gap is open: the averaged network has accuracy {values['acc']:.3f}, its members "
        f"{values['members_acc']:.3f} on average. Try a longer warm-up (--student.warmup-epochs), more epochs, "
        "a lower --factor-rate or --student.lr, or --recalibrate-bn"
    )
