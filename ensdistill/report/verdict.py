"""The verdict: what the averaged network gains over others, and how sure that is.

A difference has two kinds of chance in it: of training (another seed) and of the test images. Both get a 95 % interval
where they can be had, Welch's t over seeds where both networks have several, and a paired one over test images where
their predictions are kept; the wider counts. With one seed there is the second alone, and the page says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ensdistill.report.folder import Row
from ensdistill.report.group import Group


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A measure of one network less that of another."""

    value: float
    """The difference."""
    half: float | None
    """Half the width of its 95 % interval; None where there is none."""
    by: str
    """What the interval is over: `seeds`, `test images`, or nothing."""

    @property
    def is_sure(self) -> bool:
        """True where the interval leaves 0 out."""
        return self.half is not None and abs(self.value) > self.half


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The target beside one other network."""

    name: str
    """The other network."""
    n: tuple[int, int]
    """Number of networks: of the target, of the other."""
    acc: Difference
    """Accuracy gained, a fraction."""
    nll: Difference
    """NLL gained or lost, in nats; below 0 is better."""
    cnll: Difference
    """The same after each network's temperature."""
    discordant: tuple[int, int] | None
    """Test images that the target alone is right on, and the other alone; None unless there is one network of each."""
    p_value: float | None
    """Exact McNemar test of `discordant`."""


def compare(group: Group, target: str, other: str) -> Comparison:
    """Compare two networks of a group by their names."""
    ours, theirs = group.rows(target), group.rows(other)
    right = [group.correct_RN(name) for name in (target, other)]
    discordant = p_value = None
    if right[0] is not None and right[1] is not None and len(right[0]) == len(right[1]) == 1:
        discordant = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        p_value = float(stats.binomtest(discordant[0], sum(discordant)).pvalue) if sum(discordant) else 1.0
    return Comparison(
        name=other,
        n=(len(ours), len(theirs)),
        acc=_difference(ours, theirs, "acc", *right),
        nll=_difference(ours, theirs, "nll", *(_nll_RN(group, name, "nll_N") for name in (target, other))),
        cnll=_difference(ours, theirs, "cnll", *(_nll_RN(group, name, "scaled_nll_N") for name in (target, other))),
        discordant=discordant,
        p_value=p_value,
    )


def _nll_RN(group: Group, name: str, field: str) -> np.ndarray | None:
    found = [row.predictions for row in group.rows(name)]
    if group.labels_N is None or not found or any(one is None for one in found):
        return None
    return np.stack([getattr(one, field) for one in found])


def _difference(
    ours: Sequence[Row], theirs: Sequence[Row], measure: str, our_RN: np.ndarray | None, their_RN: np.ndarray | None
) -> Difference:
    a, b = ([row.measure(measure) for row in rows] for rows in (ours, theirs))
    value = statistics.fmean(a) - statistics.fmean(b)
    halves = {}
    if (seeds := welch_half(a, b)) is not None:
        halves["seeds"] = seeds
    if our_RN is not None and their_RN is not None:
        halves["test images"] = paired_half(our_RN.mean(axis=0) - their_RN.mean(axis=0), of_shares=measure == "acc")
    halves = {by: half for by, half in halves.items() if math.isfinite(half)}
    if not halves:
        return Difference(value=value, half=None, by="")
    widest = max(halves, key=lambda by: halves[by])
    return Difference(value=value, half=halves[widest], by=widest)


def welch_half(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Half of the 95 % interval of mean(a) − mean(b), by Welch's t; None with fewer than two values of either."""
    if len(a) < 2 or len(b) < 2:
        return None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if not va + vb > 0:
        return 0.0 if va + vb == 0 else math.nan
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return float(stats.t.ppf(0.975, freedom)) * math.sqrt(va + vb)


def paired_half(difference_N: np.ndarray, *, of_shares: bool) -> float:
    """Half of the 95 % interval of the mean of paired differences over test images, by the normal approximation.

    Args:
        of_shares: the differences are of right answers. One more image is then counted for each side, on which it
            alone is right (after Agresti and Min, "Simple improved confidence intervals for comparing matched
            proportions", 2005): that no image differs does not say that none ever would.
    """
    N = len(difference_N)
    if N < 2:
        return math.nan
    variance = float(difference_N.astype(np.float64).var(ddof=1)) + (2 / N if of_shares else 0.0)
    return 1.96 * math.sqrt(variance / N)


def sentence(group: Group) -> str:
    """The verdict in one sentence, with n and spread."""
    target = group.target
    if target is None:
        return "This run has no student yet: there is nothing to compare."
    comparisons = [compare(group, target, other) for other in group.baselines]
    name = in_words(target)
    if not comparisons:
        acc = [100 * row.measure("acc") for row in group.rows(target)]
        return (
            f"{_capital(name)} is right on {statistics.fmean(acc):.2f} % of {_images(group)}; there is no network to "
            "compare it with."
        )
    parts = [f"over {group.label_of(one.name).removeprefix('ce, ')} it {_gain(one)}" for one in comparisons]
    first, rest = parts[0].replace(" it ", f", {name} ", 1), parts[1:]
    text = _capital("; ".join([first, *rest]))
    return f"{text} ({_basis(group, comparisons)})."


def basis(group: Group) -> str:
    """What the intervals of the verdict are worth, in one or two sentences."""
    target = group.target
    if target is None or not group.baselines:
        return ""
    comparisons = [compare(group, target, other) for other in group.baselines]
    n = len(group.rows(target))
    by = {one.acc.by for one in comparisons}
    if n == 1:
        text = "One student: "
        text += (
            "the 95 % intervals are over test images, and say nothing about what another seed would give."
            if "test images" in by
            else "without its predictions on the test images no interval is known."
        )
    else:
        text = f"{n} students: the 95 % intervals are the wider of Welch's over seeds and a paired one over images."
        if len(group.runs) == 1:
            text += " All of them learned from the same teachers."
    text += " cNLL is the NLL after one temperature, fitted on the validation images."
    pairs = [one for one in comparisons if one.discordant is not None]
    for one in pairs:
        assert one.discordant is not None and one.p_value is not None
        name = group.label_of(one.name).removeprefix("ce, ")
        text += (
            f" Of the images on which it and {name} differ, it alone is right on {one.discordant[0]}, the other on "
            f"{one.discordant[1]} (McNemar's p {_p(one.p_value)})."
        )
    return text


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"= {value:.2g}"


def in_words(target: str) -> str:
    """Name of the network that the verdict is about."""
    if target.startswith("latentbe"):
        return f"the averaged network ({target})"
    return f"the student's ensemble ({target})" if target.startswith(("be", "hydra")) else f"the student ({target})"


def _gain(one: Comparison) -> str:
    acc, nll = one.acc, one.cnll
    points, nats = _with_half(100 * acc.value, acc.half, 100, 2), _with_half(nll.value, nll.half, 1, 3)
    if acc.half is None:
        return f"differs by {points} points of accuracy, of which no spread is known"
    lower = "lowers" if nll.value < 0 else "raises"
    calibrated = f"{lower} cNLL by {nats.lstrip('+−')}" if nll.is_sure else ""
    if not acc.is_sure and not nll.is_sure:
        return f"gains nothing that can be told from chance (accuracy {points} points, cNLL {nats})"
    if not acc.is_sure:
        return f"gains no accuracy that can be told from chance ({points} points), but {calibrated}"
    text = f"{'gains' if acc.value > 0 else 'loses'} {points.lstrip('+−')} points of accuracy"
    if not nll.is_sure:
        return text
    return f"{text} {'and' if (acc.value > 0) == (nll.value < 0) else 'but'} {calibrated}"


def _basis(group: Group, comparisons: Sequence[Comparison]) -> str:
    ours = comparisons[0].n[0]
    counts = " and ".join(
        f"{one.n[1]} {f'of {one.name}' if one.name.startswith('kd') else 'on labels'}" for one in comparisons
    )
    interval = "; ± is a 95 % interval" if any(one.acc.half is not None for one in comparisons) else ""
    return f"n = {ours} student{'s' if ours > 1 else ''}, against {counts}; {_images(group)}{interval}"


def _images(group: Group) -> str:
    return f"{group.num_images:,} test images" if group.num_images else "the test images"


def _with_half(value: float, half: float | None, scale: float, digits: int) -> str:
    text = signed(value, digits)
    return text if half is None else f"{text} ± {scale * half:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus: `+0.82`, `−0.10`."""
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
