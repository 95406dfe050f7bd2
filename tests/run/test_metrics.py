"""Measures: the official numbers, hand-computed small cases, definitions written out again in NumPy, and bad input."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ensdistill.run import metrics, report
from ensdistill.runtime.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden" / "official_wrn10x1_m4.npz"


def draw(N: int, E: int, K: int, seed: int, skill: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits (N, E, K) that know something of the labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (N,), generator=generator)
    logits = 2.5 * torch.randn(N, E, K, generator=generator) + skill * F.one_hot(labels, K)[:, None]
    return logits, labels


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {key.removeprefix("metrics/"): torch.from_numpy(file[key]) for key in file if key.startswith("metrics/")}


def test_golden_numbers_of_the_official_code(golden: dict[str, Tensor]) -> None:
    measured = metrics.measures(
        golden["test_logits"], golden["test_labels"], golden["val_logits"], golden["val_labels"]
    )
    diversity = metrics.diversity(golden["test_logits"])
    found = {
        "acc": measured.acc,
        "nll": measured.nll,
        "ece15": measured.ece,
        "cnll": measured.cnll,
        "cece15": measured.cece,
        "temperature": measured.temperature,
        "pairwise_kld": diversity.kld,
        "pairwise_agreement": diversity.agreement,
    }
    for name, value in found.items():
        assert value == pytest.approx(golden[name].item(), rel=2e-6), name


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = draw(41, 3, 7, seed=1)
    val_logits, val_labels = draw(29, 3, 7, seed=2)
    whole = asdict(metrics.measures(logits, labels, val_logits, val_labels)) | asdict(metrics.diversity(logits))
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 4 * 21)
    chunked = asdict(metrics.measures(logits, labels, val_logits, val_labels)) | asdict(metrics.diversity(logits))
    assert chunked == pytest.approx(whole, rel=1e-12)


def test_an_ensemble_predicts_the_mean_of_probabilities_not_of_logits() -> None:
    logits = torch.tensor([[[4.0, 0.0], [-1.0, 0.0]]])
    p = (torch.sigmoid(torch.tensor(4.0)) + torch.sigmoid(torch.tensor(-1.0))) / 2
    assert metrics.ensemble_log_probs(logits)[0].exp().tolist() == pytest.approx([p.item(), 1 - p.item()], rel=1e-6)


def test_a_certain_mistake_costs_no_more_than_the_logarithm_of_1e_8() -> None:
    log_probs = metrics.ensemble_log_probs(torch.tensor([[[1000.0, -1000.0]]]))
    assert metrics.nll(log_probs, torch.tensor([1])) == pytest.approx(-math.log(1e-8))
    assert metrics.nll(log_probs, torch.tensor([0])) == pytest.approx(0, abs=1e-7)
    # p + 1e-8 passes 1 here: the image must still fall into the last bin
    assert metrics.ece(log_probs, torch.tensor([1])) == pytest.approx(1)


def test_ece_by_hand_with_confidences_on_the_edges_of_bins() -> None:
    # four bins: 0.5 belongs to (0.25, 0.5], 0.75 to (0.5, 0.75]
    top = torch.tensor([0.5, 0.45, 0.75, 0.6, 0.9], dtype=torch.float64)
    probs = torch.stack([top, (1 - top) * 0.7, (1 - top) * 0.3], dim=1)
    labels = torch.tensor([0, 1, 0, 0, 2])
    expected = abs((1 + 0) - (0.5 + 0.45)) / 5 + abs((1 + 1) - (0.75 + 0.6)) / 5 + abs(0 - 0.9) / 5
    assert metrics.ece(probs.log(), labels, bins=4) == pytest.approx(expected, rel=1e-12)


def test_ece_against_its_definition_written_out() -> None:
    logits, labels = draw(997, 2, 5, seed=3)
    log_probs = metrics.ensemble_log_probs(logits)
    top, found = log_probs.exp().max(dim=1)
    expected = 0.0
    for i in range(15):
        inside = (top > i / 15) & (top <= (i + 1) / 15)
        if inside.any():
            right = (found == labels)[inside].double().mean()
            expected += (inside.double().mean() * (right - top[inside].mean()).abs()).item()
    assert metrics.ece(log_probs, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_minimises_the_validation_nll(scale: float) -> None:
    logits, labels = draw(301, 1, 6, seed=4)
    log_probs = metrics.ensemble_log_probs(scale * logits)
    best = metrics.fit_temperature(scale * logits, labels)

    def loss(temperature: float) -> float:
        return F.cross_entropy(log_probs / temperature, labels).item()

    assert 0.01 < best < 100
    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.97, 0.999, 1.001, 1.03, 2.0))


def test_the_temperature_stops_at_its_bounds_where_there_is_no_minimum() -> None:
    logits, labels = draw(57, 2, 4, seed=5, skill=30.0)
    assert metrics.accuracy(metrics.ensemble_log_probs(logits), labels) == 1
    assert metrics.fit_temperature(logits, labels) == pytest.approx(metrics.MIN_TEMPERATURE)
    wrong = (metrics.ensemble_log_probs(logits).argmax(dim=1) + 1) % 4
    assert metrics.fit_temperature(logits, wrong) == pytest.approx(metrics.MAX_TEMPERATURE)


def test_an_unknown_temperature_leaves_the_rest() -> None:
    logits, labels = draw(31, 2, 4, seed=6)
    measured = metrics.measures_at(logits, labels, math.nan)
    assert math.isnan(measured.cnll) and math.isnan(measured.cece) and math.isnan(measured.temperature)
    assert measured.nll == metrics.nll(metrics.ensemble_log_probs(logits), labels)
    at_one = metrics.measures_at(logits, labels, 1.0)
    assert at_one.cnll == pytest.approx(at_one.nll, rel=1e-5)


def test_pairwise_measures_against_their_definitions() -> None:
    logits, _ = draw(83, 3, 5, seed=7)
    p = logits.double().softmax(dim=-1)
    kld, agreement, cka = [], [], []
    for i, j in itertools.permutations(range(3), 2):
        kld.append((p[:, i] * (p[:, i] / p[:, j]).log()).sum(dim=1).mean().item())
        agreement.append((logits[:, i].argmax(1) == logits[:, j].argmax(1)).double().mean().item())
        # the N x N form: the same number by another way
        x, y = (logits[:, m].double() - logits[:, m].double().mean(dim=0) for m in (i, j))
        gram_x, gram_y = x @ x.T, y @ y.T
        cka.append(((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())).item())
    found = metrics.diversity(logits)
    assert found.kld == pytest.approx(np.mean(kld), rel=1e-9)
    assert found.agreement == pytest.approx(np.mean(agreement), rel=1e-12)
    assert found.cka == pytest.approx(np.mean(cka), rel=1e-9)


def test_equal_members_do_not_differ() -> None:
    logits, _ = draw(23, 1, 5, seed=8)
    found = metrics.diversity(logits.expand(-1, 4, -1))
    assert (found.kld, found.agreement, found.cka) == pytest.approx((0, 1, 1), abs=1e-12)
    shifted = torch.cat([logits, 3 * logits + 2], dim=1)  # CKA sees neither scale nor shift
    assert metrics.pairwise_cka(shifted) == pytest.approx(1, rel=1e-9)


def test_a_member_of_constant_logits_has_no_cka() -> None:
    logits, _ = draw(23, 2, 5, seed=9)
    logits[:, 1] = 1.5
    assert math.isnan(metrics.pairwise_cka(logits))


def test_cnll_by_size_averages_every_subset() -> None:
    test_logits, test_labels = draw(61, 3, 4, seed=10)
    val_logits, val_labels = draw(47, 3, 4, seed=11)
    found = metrics.ensemble_cnll_by_size(test_logits, test_labels, val_logits, val_labels)
    for size in (1, 2, 3):
        subsets = [list(subset) for subset in itertools.combinations(range(3), size)]
        expected = [
            metrics.measures(test_logits[:, s], test_labels, val_logits[:, s], val_labels).cnll for s in subsets
        ]
        assert found[size - 1] == pytest.approx(np.mean(expected), rel=1e-9)
    assert found[0] > found[1] > found[2]


def test_dee_interpolates_between_sizes() -> None:
    teachers = draw(61, 3, 4, seed=10)
    validation = draw(47, 3, 4, seed=11)
    by_size = metrics.ensemble_cnll_by_size(*teachers, *validation)
    one, two, three = by_size
    for cnll, expected in [
        (one, 1.0),
        (0.25 * one + 0.75 * two, 1.75),
        (two, 2.0),
        (0.4 * two + 0.6 * three, 2.6),
        (three, 3.0),
        (one + 1e-6, -math.inf),
        (three - 1e-6, math.inf),
    ]:
        assert metrics.equivalent_size(cnll, by_size) == pytest.approx(expected, rel=1e-9)


def test_dee_where_the_curve_is_not_monotone_or_has_one_point() -> None:
    assert metrics.equivalent_size(0.75, [1.0, 0.5, 0.6, 0.4]) == pytest.approx(1.5)
    assert metrics.equivalent_size(0.45, [1.0, 0.5, 0.6, 0.4]) == pytest.approx(3.75)
    assert metrics.equivalent_size(0.5, [0.5, 0.5]) == 1
    assert metrics.equivalent_size(0.5, [0.5]) == 1
    assert metrics.equivalent_size(0.4, [0.5]) == math.inf


def test_dee_reads_as_a_table_shows_it() -> None:
    assert [metrics.format_dee(value, 4) for value in (2.68, -math.inf, math.inf)] == ["2.7", "< 1", "> 4"]


def test_values_that_are_not_finite_are_refused() -> None:
    logits, labels = draw(13, 2, 4, seed=12)
    logits[9, 1, 2] = math.nan
    with pytest.raises(
        UserError, match=r"test logits: member 1 gives a value that is not finite for image 9, expected"
    ):
        metrics.measures_at(logits, labels, 1.0)
    with pytest.raises(UserError, match="validation logits: member 1"):
        metrics.fit_temperature(logits, labels)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(label: int) -> None:
    logits, labels = draw(13, 2, 4, seed=13)
    labels[5] = label
    with pytest.raises(UserError, match=r"test labels: .* found, expected 0 … 3 for a network of 4 classes"):
        metrics.measures_at(logits, labels, 1.0)


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="validation logits: no images, expected at least one"):
        metrics.fit_temperature(torch.empty(0, 2, 4), torch.empty(0, dtype=torch.long))


def test_a_loss_next_to_nothing_has_no_sign():
    assert report._THREE.format(-1e-9) == "0.000" and report._THREE.format(-0.0127) == "-0.013"


def test_brier_and_adaptive_ece_against_their_definitions_in_numpy() -> None:
    logits, labels = draw(1003, 3, 7, seed=14)
    p = np.exp(logits.double().numpy())
    p = (p / p.sum(axis=2, keepdims=True)).mean(axis=1)
    right = np.eye(7)[labels.numpy()]
    measured = metrics.measures_at(logits, labels, 1.0)
    assert measured.brier == pytest.approx(((p - right) ** 2).sum(axis=1).mean(), rel=1e-9)
    top, hit = p.max(axis=1), p.argmax(axis=1) == labels.numpy()
    order = np.argsort(top, kind="stable")
    parts = np.array_split(order, 15)  # 1003 = 13 · 67 + 2 · 66
    expected = sum(len(part) / 1003 * abs(hit[part].mean() - top[part].mean()) for part in parts)
    assert measured.aece == pytest.approx(expected, rel=1e-6)
    log_probs = metrics.ensemble_log_probs(logits)
    # one bin: the distance of accuracy and mean confidence; a bin an image: the mean distance
    assert metrics.adaptive_ece(log_probs, labels, bins=1) == pytest.approx(abs(hit.mean() - top.mean()), abs=2e-8)
    assert metrics.adaptive_ece(log_probs, labels, bins=2000) == pytest.approx(np.abs(hit - top).mean(), rel=1e-6)


def test_brier_of_two_classes_is_twice_scikit_learn_s() -> None:
    from sklearn.metrics import brier_score_loss

    logits, labels = draw(301, 1, 2, seed=15)
    log_probs = metrics.ensemble_log_probs(logits)
    theirs = brier_score_loss(labels.numpy(), log_probs[:, 1].exp().numpy())
    assert metrics.brier(log_probs, labels) == pytest.approx(2 * theirs, rel=1e-6)


def test_brier_of_a_certain_network() -> None:
    log_probs = metrics.ensemble_log_probs(torch.tensor([[[1000.0, -1000.0, 0.0]]]))
    assert metrics.brier(log_probs, torch.tensor([0])) == pytest.approx(0, abs=1e-12)
    assert metrics.brier(log_probs, torch.tensor([1])) == pytest.approx(2)
