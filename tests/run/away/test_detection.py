"""Scores and measures of detection, against their definitions written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensdistill.run.away.detection import detection, detections, uncertainties


def test_scores_against_their_definitions() -> None:
    logits = 3 * torch.randn(50, 3, 5)
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=2, keepdims=True)
    mean = p.mean(axis=1)
    entropy = -(mean * np.log(mean)).sum(axis=1)
    found = uncertainties(logits)
    assert found["max_probability"] == pytest.approx(1 - mean.max(axis=1), rel=1e-12)
    assert found["entropy"] == pytest.approx(entropy, rel=1e-12)
    each = -(p * np.log(p)).sum(axis=2).mean(axis=1)
    assert found["mutual_information"] == pytest.approx(entropy - each, rel=1e-9, abs=1e-12)


def test_one_network_has_no_mutual_information_and_a_certain_one_no_entropy() -> None:
    found = uncertainties(torch.tensor([[[1000.0, 0.0]]]))
    assert found == {"max_probability": [0.0], "entropy": [0.0]}


def test_measures_by_counting_pairs_and_thresholds() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=70).round(1), (rng.normal(size=45) + 1).round(1)  # with ties
    found = detection(inside, outside)
    above = (outside[:, None] > inside).mean() + 0.5 * (outside[:, None] == inside).mean()
    assert found["auroc"] == pytest.approx(above, rel=1e-12)
    for name, positive, negative in (("aupr", outside, inside), ("aupr_in", -inside, -outside)):
        total, recall_before = 0.0, 0.0
        for threshold in np.unique(positive)[::-1]:
            hits, misses = (positive >= threshold).sum(), (negative >= threshold).sum()
            recall = hits / len(positive)
            total += (recall - recall_before) * hits / (hits + misses)
            recall_before = recall
        assert found[name] == pytest.approx(total, rel=1e-12), name
    threshold = max(t for t in np.unique(outside) if (outside >= t).mean() >= 0.95)
    assert found["fpr95"] == pytest.approx((inside >= threshold).mean())


def test_the_same_images_are_not_told_apart_and_others_are() -> None:
    values = np.random.default_rng(1).normal(size=200)
    same = detection(values, values)
    assert same["auroc"] == pytest.approx(0.5) and same["aupr"] == pytest.approx(0.5, abs=0.05)
    assert 0.9 <= same["fpr95"] <= 1
    apart = detection(values, values + 100)
    assert (apart["auroc"], apart["aupr"], apart["aupr_in"], apart["fpr95"]) == (1, 1, 1, 0)


def test_every_network_has_every_score() -> None:
    logits = {"a": torch.randn(30, 1, 4), "b": torch.randn(30, 2, 4)}
    found = detections(logits, {key: value[:20] for key, value in logits.items()})
    assert list(found) == ["a", "b"]
    assert list(found["a"]) == ["max_probability", "entropy"] and "mutual_information" in found["b"]
