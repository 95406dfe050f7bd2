"""Measures of a network or an ensemble from its logits: accuracy, NLL, calibration, diversity, worth in members.

Everything starts from logits (N, E, K): N images, E members (1 for a single network), K classes. An ensemble predicts
the mean of its members' probabilities. As in the official tables (Nam et al., "Improving Ensemble Distillation With
Weight Averaging and Diversifying Perturbation", ICML 2022), a probability p enters a logarithm as p + 1e-8 everywhere,
for single networks too, and both before and after the temperature; the pairwise divergence alone takes exact
log-softmax. All sums run in float64, over chunks of images, on the device that holds the logits.

Averaging is watched beside them. It can fail while the members' loss looks fine, on short schedules and narrow networks
above all: the factors learn at E times the rate. What opens is the averaging gap.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ensdistill.runtime.errors import UserError

EPSILON = 1e-8
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
_CHUNK_VALUES = 1 << 23  # logits held in float64 at a time: 64 MB, so that 50,000 images of 1,000 classes fit anywhere


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures that the tables report, as fractions, not per cent; NLL in nats."""

    acc: float
    """Share of images whose most probable class is the label."""
    nll: float
    """Mean negative log-likelihood of the label."""
    ece: float
    """Expected calibration error, 15 bins."""
    cnll: float
    """NLL after scaling by the temperature."""
    cece: float
    """ECE after scaling by the temperature."""
    temperature: float
    """The temperature of cnll and cece."""


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Differences between E members: means over the E (E − 1) ordered pairs of different members."""

    kld: float
    """KL(p_i ‖ p_j) in nats, mean over images."""
    agreement: float
    """Share of images on which both members name the same class."""
    cka: float
    """Linear CKA of the centred logits, in [0, 1]; nan where a member gives every image the same logits."""


def ensemble_log_probs(logits_NEK: Tensor) -> Tensor:
    """log(p̄ + 1e-8), p̄ the mean over members of softmax(logits): float64 (N, K). Not normalised, by the 1e-8."""
    return (_mean_probs(logits_NEK) + EPSILON).log()


def scaled_probs(log_probs_NK: Tensor, temperature: float) -> Tensor:
    """softmax(log_probs / temperature), (N, K), of what `ensemble_log_probs` gave: calibrated probabilities."""
    return (log_probs_NK / temperature).softmax(dim=-1)


def scaled_log_probs(log_probs_NK: Tensor, temperature: float) -> Tensor:
    """log(softmax(log_probs / temperature) + 1e-8), (N, K), of what `ensemble_log_probs` gave."""
    return (scaled_probs(log_probs_NK, temperature) + EPSILON).log()


def probabilities(logits_NEK: Tensor, temperature: float | None) -> Tensor:
    """Probabilities float64 (N, K), as measured: the members' mean, calibrated where there is a temperature."""
    if temperature is None:
        return _mean_probs(logits_NEK)
    return scaled_probs(ensemble_log_probs(logits_NEK), temperature)


def accuracy(log_probs_NK: Tensor, labels_N: Tensor) -> float:
    """Share of images whose most probable class is the label."""
    return (log_probs_NK.argmax(dim=-1) == labels_N).double().mean().item()


def nll(log_probs_NK: Tensor, labels_N: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return -log_probs_NK.gather(1, labels_N.long()[:, None]).mean().item()


def ece(log_probs_NK: Tensor, labels_N: Tensor, bins: int = 15) -> float:
    """Expected calibration error: Σ over bins of (share of images) · |accuracy − mean top probability|.

    The bins are equal parts (lo, hi] of [0, 1] (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """
    top_N, class_N = log_probs_NK.max(dim=-1)
    confidence_N = top_N.double().exp().clamp(max=1)  # p + 1e-8 may pass 1, and would fall out of the last bin
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=top_N.device)
    bin_N = torch.bucketize(confidence_N, edges) - 1
    gap_N = (class_N == labels_N).double() - confidence_N
    return confidence_N.new_zeros(bins).index_add(0, bin_N, gap_N).abs().sum().item() / len(top_N)


def fit_temperature(val_logits_NEK: Tensor, val_labels_N: Tensor) -> float:
    """The T in [0.01, 100] that minimises the NLL of softmax(log(p̄ + 1e-8) / T) on validation images.

    That NLL is convex in 1/T, so the minimum that the official code seeks from T = 1.0 is the only one: Newton's method
    finds it from there, inside a bracket that every step tightens. Where none exists (every validation image right:
    T → 0; no better than chance: T → ∞), T stops at the bound.
    """
    _check(val_logits_NEK, val_labels_N, "validation")
    return _fit_temperature(ensemble_log_probs(val_logits_NEK), val_labels_N)


def measures(test_logits_NEK: Tensor, test_labels_N: Tensor, val_logits_NEK: Tensor, val_labels_N: Tensor) -> Measures:
    """All measures on test images, the temperature fitted on validation images.

    Args:
        test_logits_NEK, val_logits_NEK: (N, E, K) logits of E members; E = 1 for a single network.
        test_labels_N, val_labels_N: (N,) classes in [0, K).

    Raises:
        UserError: a logit is not finite, or a label is out of range.
    """
    return measures_at(test_logits_NEK, test_labels_N, fit_temperature(val_logits_NEK, val_labels_N))


def measures_at(logits_NEK: Tensor, labels_N: Tensor, temperature: float) -> Measures:
    """All measures at a temperature that is already known; nan gives nan for what depends on it. See `measures`."""
    _check(logits_NEK, labels_N, "test")
    log_probs_NK = ensemble_log_probs(logits_NEK)
    known = not math.isnan(temperature)
    scaled_NK = scaled_log_probs(log_probs_NK, temperature) if known else log_probs_NK
    return Measures(
        acc=accuracy(log_probs_NK, labels_N),
        nll=nll(log_probs_NK, labels_N),
        ece=ece(log_probs_NK, labels_N),
        cnll=nll(scaled_NK, labels_N) if known else math.nan,
        cece=ece(scaled_NK, labels_N) if known else math.nan,
        temperature=temperature,
    )


def diversity(logits_NEK: Tensor) -> Diversity:
    """The three pairwise measures of E ≥ 2 members."""
    return Diversity(
        kld=pairwise_kld(logits_NEK), agreement=pairwise_agreement(logits_NEK), cka=pairwise_cka(logits_NEK)
    )


def pairwise_kld(logits_NEK: Tensor) -> float:
    """Mean over images and ordered pairs i ≠ j of KL(p_i ‖ p_j), in nats."""
    N, E, _ = logits_NEK.shape
    cross_EE = torch.zeros(E, E, dtype=torch.float64, device=logits_NEK.device)  # [i, j]: Σ p_i log p_j
    for chunk_NEK in _chunks(logits_NEK):
        log_p = chunk_NEK.double().log_softmax(dim=-1)
        cross_EE += torch.einsum("nik,njk->ij", log_p.exp(), log_p)
    return _mean_over_pairs((cross_EE.diagonal()[:, None] - cross_EE) / N)


def pairwise_agreement(logits_NEK: Tensor) -> float:
    """Mean over ordered pairs i ≠ j of the share of images on which members i and j name the same class."""
    class_NE = logits_NEK.argmax(dim=-1)
    return _mean_over_pairs((class_NE[:, :, None] == class_NE[:, None, :]).double().mean(dim=0))


def pairwise_cka(logits_NEK: Tensor) -> float:
    """Mean over ordered pairs i ≠ j of linear CKA: ‖X_iᵀX_j‖² / (‖X_iᵀX_i‖ ‖X_jᵀX_j‖), X_i the centred logits (N, K).

    The K × K form of Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
    """
    E, K = logits_NEK.shape[1:]
    mean_EK = logits_NEK.mean(dim=0, dtype=torch.float64)
    gram = torch.zeros(E, K, E, K, dtype=torch.float64, device=logits_NEK.device)
    for chunk_NEK in _chunks(logits_NEK):
        x_NEK = chunk_NEK.double() - mean_EK
        gram += torch.einsum("nik,njl->ikjl", x_NEK, x_NEK)
    norm_EE = gram.square().sum(dim=(1, 3)).sqrt()
    self_E = norm_EE.diagonal()
    return _mean_over_pairs(norm_EE.square() / (self_E[:, None] * self_E[None, :]))


def ensemble_cnll_by_size(
    test_logits_NEK: Tensor, test_labels_N: Tensor, val_logits_NEK: Tensor, val_labels_N: Tensor
) -> list[float]:
    """cNLL of ensembles of 1, …, E members, each size averaged over all its subsets (2^E − 1 temperatures in all)."""
    _check(test_logits_NEK, test_labels_N, "test")
    _check(val_logits_NEK, val_labels_N, "validation")
    E = test_logits_NEK.shape[1]
    test_ENK, val_ENK = (
        [_mean_probs(logits_NEK[:, e : e + 1]) for e in range(E)] for logits_NEK in (test_logits_NEK, val_logits_NEK)
    )

    def cnll(subset: tuple[int, ...]) -> float:
        test_NK, val_NK = (
            (sum((probs_ENK[e] for e in subset[1:]), probs_ENK[subset[0]]) / len(subset) + EPSILON).log()
            for probs_ENK in (test_ENK, val_ENK)
        )
        return nll(scaled_log_probs(test_NK, _fit_temperature(val_NK, val_labels_N)), test_labels_N)

    return [
        sum(cnll(subset) for subset in itertools.combinations(range(E), size)) / math.comb(E, size)
        for size in range(1, E + 1)
    ]


def equivalent_size(network_cnll: float, cnll_by_size: list[float]) -> float:
    """Deep-ensemble equivalent: how many teachers it takes, interpolated linearly, to reach the network's cNLL.

    Args:
        cnll_by_size: of ensembles of 1, …, E teachers, as `ensemble_cnll_by_size` gives it.

    Returns:
        A number in [1, E]; −inf where even one teacher is better on average, +inf where all E of them are worse.
    """
    if network_cnll > cnll_by_size[0]:
        return -math.inf
    for size, (larger, smaller) in enumerate(itertools.pairwise(cnll_by_size), start=1):
        if larger >= network_cnll >= smaller:
            return size + ((larger - network_cnll) / (larger - smaller) if larger > smaller else 0.0)
    return 1.0 if network_cnll == cnll_by_size[0] else math.inf


def format_dee(value: float, E: int) -> str:
    """`2.7`, `< 1` or `> E`."""
    return f"{value:.1f}" if math.isfinite(value) else "< 1" if value < 0 else f"> {E}"


def _check(logits_NEK: Tensor, labels_N: Tensor, what: str) -> None:
    assert logits_NEK.ndim == 3 and labels_N.shape == logits_NEK.shape[:1], (logits_NEK.shape, labels_N.shape)
    N, _, K = logits_NEK.shape
    if N == 0:
        raise UserError(f"{what} logits: no images, expected at least one; choose a split that has some")
    for start, chunk_NEK in zip(itertools.count(0, _chunk_rows(logits_NEK)), _chunks(logits_NEK), strict=False):
        if not bool(chunk_NEK.isfinite().all()):
            image, member, _ = (~chunk_NEK.isfinite()).nonzero()[0].tolist()
            raise UserError(
                f"{what} logits: member {member} gives a value that is not finite for image {start + image}, expected "
                "finite logits; the network has diverged (or overflows in bf16: try fp32)"
            )
    low, high = labels_N.min().item(), labels_N.max().item()
    if low < 0 or high >= K:
        raise UserError(
            f"{what} labels: {low} … {high} found, expected 0 … {K - 1} for a network of {K} classes; "
            "check that data and network belong together"
        )


def _chunk_rows(logits: Tensor) -> int:
    return max(1, _CHUNK_VALUES // logits[0].numel())


def _chunks(logits: Tensor) -> Iterator[Tensor]:
    return iter(logits.split(_chunk_rows(logits)))


def _mean_probs(logits_NEK: Tensor) -> Tensor:
    """Mean over members of softmax(logits): float64 (N, K)."""
    return torch.cat([chunk_NEK.double().softmax(dim=-1).mean(dim=1) for chunk_NEK in _chunks(logits_NEK)])


def _mean_over_pairs(value_EE: Tensor) -> float:
    E = len(value_EE)
    assert E >= 2, "one member has no pair"
    return value_EE[~torch.eye(E, dtype=torch.bool, device=value_EE.device)].mean().item()


def _fit_temperature(log_probs_NK: Tensor, labels_N: Tensor) -> float:
    label_mean = log_probs_NK.gather(1, labels_N.long()[:, None]).mean().item()
    low, high = 0.0, math.inf  # where the slope was seen to be negative, and positive
    beta = 1.0
    for _ in range(100):
        # d/dβ and d²/dβ² of mean(logsumexp(β log p) − β log p[label]): the mean and the variance of log p under softmax
        slope, curvature = -label_mean, 0.0
        for chunk_NK in _chunks(log_probs_NK):
            weight_NK = (chunk_NK * beta).softmax(dim=-1)
            mean_N = (weight_NK * chunk_NK).sum(dim=-1)
            slope += mean_N.sum().item() / len(labels_N)
            curvature += (weight_NK * (chunk_NK - mean_N[:, None]).square()).sum().item() / len(labels_N)
        low, high = (low, beta) if slope > 0 else (beta, high)
        newton = beta - slope / curvature if curvature > 0 else math.nan
        if not low < newton < high:
            newton = (low + high) / 2 if math.isfinite(high) else 2 * beta
        last, beta = beta, min(max(newton, 1 / MAX_TEMPERATURE), 1 / MIN_TEMPERATURE)
        if abs(beta - last) <= 1e-9 * last:
            break
    return 1 / beta


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
    """Warning where averaging has failed though the members are well; None where it has not.

    `values` holds `acc`, of what is shipped, and `members_acc` where there are members.
    """
    if values.get("members_acc", 0.0) - values["acc"] <= AVERAGING_GAP:
        return None
    return (
        f"the averaging gap is open: the averaged network has accuracy {values['acc']:.3f}, its members "
        f"{values['members_acc']:.3f} on average. Try a longer warm-up (--student.warmup-epochs), more epochs, "
        "a lower --factor-rate or --student.lr, or --recalibrate-bn"
    )
