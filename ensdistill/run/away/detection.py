"""Out-of-distribution detection: how well a network's uncertainty tells images of its own kind from others.

Scores of an image, larger where the network is less certain; p̄ is the mean of its members' probabilities, or its own:

    max probability     1 − max_k p̄_k
    entropy             H(p̄) = −Σ_k p̄_k log p̄_k, in nats
    mutual information  H(p̄) − mean_m H(p_m), in nats, of M ≥ 2 members: what they disagree about

The probabilities are those before any temperature. Out-of-distribution is the positive side (Hendrycks and Gimpel, "A
Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017, have scores and measures):

    auroc    the chance that an image from outside scores higher than one from inside, ties a half; no side matters
    aupr     average precision Σ_n (R_n − R_{n−1}) P_n with the images from outside as positives
    aupr_in  the same with those from inside as positives, by the negative score
    fpr95    the share of images from inside that score as high as the threshold that 95 % of those from outside reach
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ensdistill.data.feed import Feed
from ensdistill.run.away.data import fitted_batches, watched
from ensdistill.run.away.networks import Loaded, logits_of_each
from ensdistill.runtime.environment import Precision

MIN_TPR = 0.95
"""True-positive rate of `fpr95`."""


def uncertainties(logits_NMK: Tensor) -> dict[str, np.ndarray]:
    """The scores by name, float64 (N,), from logits (N, M, K); without mutual information where M is 1."""
    found: dict[str, list[Tensor]] = {}
    for chunk_NMK in logits_NMK.split(4096):
        p_NMK = chunk_NMK.double().softmax(dim=-1)
        mean_NK = p_NMK.mean(dim=1)
        scores = {"max_probability": 1 - mean_NK.amax(dim=-1), "entropy": _entropy(mean_NK)}
        if p_NMK.shape[1] > 1:
            scores["mutual_information"] = scores["entropy"] - _entropy(p_NMK).mean(dim=1)
        for name, score_N in scores.items():
            found.setdefault(name, []).append(score_N)
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def _entropy(p: Tensor) -> Tensor:
    """−Σ p log p over the last axis, where 0 · log 0 is 0."""
    return torch.special.entr(p).sum(dim=-1)


def detection(inside_N: np.ndarray, outside_N: np.ndarray) -> dict[str, float]:
    """AUROC, AUPR of either side and the false-positive rate at 95 % true positives, of one score, float64 (N,)."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # a second, for what asks for it

    is_outside = np.concatenate([np.zeros(len(inside_N), bool), np.ones(len(outside_N), bool)])
    score = np.concatenate([inside_N, outside_N])
    fpr, tpr, _ = roc_curve(is_outside, score, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(is_outside, score)),
        "aupr": float(average_precision_score(is_outside, score)),
        "aupr_in": float(average_precision_score(~is_outside, -score)),
        "fpr95": float(fpr[np.argmax(tpr >= MIN_TPR)]),
    }


def measure_detection(
    networks: Mapping[str, Loaded],
    inside: Feed,
    outside: Mapping[str, Feed],
    *,
    device: torch.device,
    precision: Precision,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, dict[str, dict[str, dict[str, float]]]], dict[str, int]]:
    """Measure how every network tells the images of `inside` from those of each of `outside`.

    Args:
        networks: by key, on the device already; images take their shape.
        outside: by data; images of another shape are brought to that (`run.away.data.fit`).
        progress: called with (images done, images in all) after every batch.

    Returns:
        Detection by data, network and score; and by data how many different images, so fitted, lie inside too.

    Raises:
        UserError: a network gives a value that is not finite.
    """
    shape = next(iter(networks.values())).found.info.image_shape
    total, done = sum(feed.num_images for feed in (inside, *outside.values())), 0

    def logits_of(feed: Feed, seen: set[bytes]) -> dict[str, Tensor]:
        def counted(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        batches = watched(fitted_batches(feed, shape), seen, counted)
        return logits_of_each(networks, batches, by_member=True, device=device, precision=precision)[0]

    seen: set[bytes] = set()
    ours = logits_of(inside, seen)
    found, known = {}, {}
    for data, feed in outside.items():
        theirs: set[bytes] = set()
        found[data] = detections(ours, logits_of(feed, theirs))
        known[data] = len(seen & theirs)
    return found, known


def detections(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, float]]]:
    """Detection of every network by every score, from logits (N, M, K) of both sides by the network's key."""
    found = {}
    for key, logits_NMK in inside.items():
        ours, others = uncertainties(logits_NMK), uncertainties(outside[key])
        found[key] = {score: detection(ours[score], others[score]) for score in ours}
    return found
