"""The numbers that figures show, from what a run kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensdistill.report.folder import Row, Training
from ensdistill.report.group import Group

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Accuracy by confidence, in `BINS` equal parts (lo, hi] of [0, 1]. nan in a bin without images."""

    confidence_b: np.ndarray
    """Mean probability of the predicted class in each bin."""
    acc_b: np.ndarray
    """Share of images in it whose predicted class is the label."""
    share_b: np.ndarray
    """Share of the images that lie in it."""
    images: int
    """Number of images."""

    @property
    def ece(self) -> float:
        """Expected calibration error: Σ share · |accuracy − confidence|."""
        return float(np.nansum(self.share_b * np.abs(self.acc_b - self.confidence_b)))


def reliability(top_N: np.ndarray, correct_N: np.ndarray) -> Reliability:
    """Bin images by the probability of their predicted class, as the tables' ECE does."""
    edges = np.linspace(0, 1, BINS + 1)
    bin_N = np.clip(np.searchsorted(edges, top_N.astype(np.float64), side="left") - 1, 0, BINS - 1)
    count_b = np.bincount(bin_N, minlength=BINS).astype(np.float64)
    with np.errstate(invalid="ignore"):
        confidence_b = np.bincount(bin_N, weights=top_N, minlength=BINS) / count_b
        acc_b = np.bincount(bin_N, weights=correct_N, minlength=BINS) / count_b
    return Reliability(confidence_b=confidence_b, acc_b=acc_b, share_b=count_b / max(1, len(top_N)), images=len(top_N))


def reliabilities(group: Group, name: str) -> tuple[Reliability, Reliability] | None:
    """Reliability before and after the temperature, over the images of all rows of `name`; None where not known."""
    correct_RN = group.correct_RN(name)
    if correct_RN is None:
        return None
    found = [row.predictions for row in group.rows(name) if row.predictions is not None]
    before, after = (
        reliability(np.concatenate([getattr(one, field) for one in found]), correct_RN.ravel())
        for field in ("top_N", "scaled_top_N")
    )
    return before, after


def class_accuracies(group: Group, name: str) -> np.ndarray | None:
    """Accuracy on the test images of each class (K,), mean over the rows of `name`; nan for a class without any."""
    correct_RN, labels_N = group.correct_RN(name), group.labels_N
    if correct_RN is None or labels_N is None:
        return None
    K = num_classes(group)
    count_K = np.bincount(labels_N, minlength=K)
    right_K = np.bincount(labels_N, weights=correct_RN.mean(axis=0), minlength=K)
    with np.errstate(invalid="ignore"):
        return right_K / count_K


def num_classes(group: Group) -> int:
    """Number of classes, by their names, or by the labels and predictions that are there."""
    labels_N = group.labels_N
    highest = [int(labels_N.max())] if labels_N is not None and len(labels_N) else []
    found = [row.predictions for run in group.runs for row in run.rows]
    highest += [int(one.predicted_N.max()) for one in found if one is not None and len(one.predicted_N)]
    return max([len(group.first.class_names), *(one + 1 for one in highest)])


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Test images of one class that two networks take for another one."""

    label: int
    """Their class."""
    predicted: int
    """The class that they are taken for."""
    before: float
    """Number of them by the one network, mean over its seeds."""
    after: float
    """Number of them by the other, mean over its seeds."""


def changed_confusions(group: Group, before: str, after: str, most: int) -> list[Changed]:
    """The confusions that differ the most between two networks, at most `most`, largest change first."""
    counts = [_confusions(group, name) for name in (before, after)]
    if counts[0] is None or counts[1] is None:
        return []
    pairs = counts[0].keys() | counts[1].keys()
    found = [
        Changed(label=pair[0], predicted=pair[1], before=counts[0].get(pair, 0.0), after=counts[1].get(pair, 0.0))
        for pair in sorted(pairs)
    ]
    found = [one for one in found if one.after != one.before]
    return sorted(found, key=lambda one: (-abs(one.after - one.before), one.label, one.predicted))[:most]


def _confusions(group: Group, name: str) -> dict[tuple[int, int], float] | None:
    """Number of images by (class, another that they are taken for), mean over the rows; only those that occur."""
    labels_N, rows = group.labels_N, group.rows(name)
    found = [row.predictions for row in rows]
    if labels_N is None or not rows or any(one is None for one in found):
        return None
    K = num_classes(group)
    counts: dict[tuple[int, int], float] = {}
    for one in found:
        assert one is not None
        wrong_N = one.predicted_N != labels_N
        codes, times = np.unique(labels_N[wrong_N].astype(np.int64) * K + one.predicted_N[wrong_N], return_counts=True)
        for code, count in zip(codes.tolist(), times.tolist(), strict=True):
            pair = divmod(code, K)
            counts[pair] = counts.get(pair, 0.0) + count / len(rows)
    return counts


def mean_curve(trainings: Sequence[Training], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds of a value by epoch, at the epochs that all of them have."""
    curves = [training.series(kind, name) for training in trainings]
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return np.empty(0), np.empty(0)
    at = curves[0][0]
    for epochs, _ in curves[1:]:
        at = np.intersect1d(at, epochs)
    if not len(at):
        return curves[0]
    return at, np.mean([values[np.searchsorted(epochs, at)] for epochs, values in curves], axis=0)


@dataclass(frozen=True, kw_only=True)
class DeviceUse:
    """Readings of the device over the trainings of a run, one after another."""

    minutes_T: np.ndarray
    """Minutes of training before each reading: time in steps, without validation."""
    values: dict[str, np.ndarray]
    """Readings by name, nan where one is not known."""
    starts: list[tuple[float, str]]
    """Minutes at which each training begins, and its name."""


def device_use(trainings: Sequence[Training]) -> DeviceUse | None:
    """Readings over the time that the steps took, by the speed in the log; None where there are none.

    A log has steps, and the images a second of each of its lines: their quotient is the time.
    """
    minutes: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {name: [] for name in _DEVICE}
    starts, before = [], 0.0
    for training in trainings:
        train, device = training.lines.get("train", {}), training.lines.get("device", {})
        if "images_per_s" not in train or not training.batch_size:
            continue
        steps, speed = train["step"], train["images_per_s"]
        took = np.nan_to_num(np.diff(steps, prepend=0.0) * training.batch_size / speed, posinf=0.0) / 60
        ends = np.cumsum(took)
        starts.append((before, training.name))
        if len(device):
            minutes.append(before + np.interp(device["step"], np.r_[0.0, steps], np.r_[0.0, ends]))
            for name, found in values.items():
                found.append(device.get(name, np.full(len(device["step"]), math.nan)))
        before += float(ends[-1]) if len(ends) else 0.0
    if not minutes:
        return None
    joined = {name: np.concatenate(found) for name, found in values.items()}
    return DeviceUse(
        minutes_T=np.concatenate(minutes),
        values={name: found for name, found in joined.items() if np.isfinite(found).any()},
        starts=starts,
    )


_DEVICE = ("utilisation", "machine_utilisation", "clock_mhz", "power_w", "memory_gb", "temperature_c", "throttled")


def spread(values: Sequence[float]) -> float:
    """Standard deviation of values; nan of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def diversity_of(row: Row) -> dict[str, float]:
    """Pairwise divergence, disagreement and CKA of the members of a row; empty where there are none."""
    found = row.group("diversity")
    if "kld" not in found:
        return {}
    return {"kld": found["kld"], "disagreement": 1 - found["agreement"], "cka": found["cka"]}
