"""Accuracy, likelihood and calibration of networks on corrupted images, by kind and severity."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from ensdistill.data.corruptions.made import SEVERITIES
from ensdistill.data.feed import Batch
from ensdistill.run.away.networks import Loaded, logits_of_each
from ensdistill.run.away.results import means_by_name
from ensdistill.run.metrics import Measures, measures_at
from ensdistill.runtime.environment import Precision

MEASURES = ("accuracy", "nll", "ece", "cnll", "cece", "brier", "aece")
"""What is measured of each kind and severity: `metrics.Measures`, but for the temperature, which is one for all."""


class Corrupted(Protocol):
    """Corrupted images of one data set."""

    names: tuple[str, ...]
    """Kinds of corruption, which the means are over."""
    extra: tuple[str, ...]
    """Kinds beside those, which no mean has."""
    num_images: int
    """Number of images of one kind and severity."""
    description: str
    """What they are, in words."""

    def batches(self, name: str, severity: int) -> Iterator[Batch]:
        """Batches of one kind and severity."""


def measure_corruptions(
    networks: Mapping[str, Loaded],
    corrupted: Corrupted,
    clean: Mapping[str, Measures],
    *,
    device: torch.device,
    precision: Precision,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every network on all kinds at all severities; the images are made, or read, once for all networks.

    Args:
        networks: by key, on the device already, with `clean`, their measures on the images themselves: the temperature
            is the one of those, for none is ever fitted on corrupted images.
        progress: called with (images done, images in all) after every batch.

    Returns:
        The section `corruptions` of `away.json` (`run.away.results`).

    Raises:
        UserError: a network gives a value that is not finite.
    """
    kinds = (*corrupted.names, *corrupted.extra)
    total, done = len(kinds) * len(SEVERITIES) * corrupted.num_images, 0

    def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal done
        for images_BHWC, labels_B in batches:
            yield images_BHWC, labels_B
            done += len(labels_B)
            progress(done, total)

    values: dict[str, dict[str, list[list[float]]]] = {key: {name: [] for name in MEASURES} for key in networks}
    for kind in kinds:
        for severity in SEVERITIES:
            batches = counted(corrupted.batches(kind, severity))
            logits, labels_N = logits_of_each(networks, batches, by_member=False, device=device, precision=precision)
            for key, logits_NMK in logits.items():
                measured = asdict(measures_at(logits_NMK, labels_N, clean[key].temperature))
                for name in MEASURES:
                    if severity == SEVERITIES[0]:
                        values[key][name].append([])
                    values[key][name][-1].append(measured["acc" if name == "accuracy" else name])
    _warn_of_other_labels(values, clean, networks, warn)
    section = _section(corrupted.names, values, clean, networks, 0)
    section["description"], section["num_images"] = corrupted.description, corrupted.num_images
    if corrupted.extra:
        section["extra"] = _section(corrupted.extra, values, clean, networks, len(corrupted.names))
    return section


def _section(
    names: Sequence[str],
    values: Mapping[str, Mapping[str, list[list[float]]]],
    clean: Mapping[str, Measures],
    networks: Mapping[str, Loaded],
    first: int,
) -> dict[str, Any]:
    """The kinds `names`, which begin at row `first`."""
    each: dict[str, Any] = {}
    for key, own in values.items():
        rows = {name: own[name][first : first + len(names)] for name in MEASURES}
        each[key] = rows | {
            "clean": {name: getattr(clean[key], "acc" if name == "accuracy" else name) for name in MEASURES},
            "mean": {name: statistics.fmean(value for row in rows[name] for value in row) for name in MEASURES},
        }
    name_of = {key: loaded.found.name for key, loaded in networks.items()}
    by_name = means_by_name(each, name_of)
    for name, mean in by_name.items():
        mean["n"] = list(name_of.values()).count(name)
    for key, found in each.items():
        own_found = networks[key].found
        found |= {"name": own_found.name, "members": own_found.members, "temperature": clean[key].temperature}
    return {"names": list(names), "severities": list(SEVERITIES), "networks": by_name, "each": each}


def _warn_of_other_labels(
    values: Mapping[str, Mapping[str, list[list[float]]]],
    clean: Mapping[str, Measures],
    networks: Mapping[str, Loaded],
    warn: Callable[[str], None],
) -> None:
    """Warn where the mildest corruptions leave no more than chance of a network that knows the clean images."""
    for key, each in values.items():
        chance = 1 / networks[key].found.info.num_classes
        best = max(row[0] for row in each["accuracy"])
        if best < 2 * chance < 4 * chance < clean[key].acc:
            warn(
                f"{key}: its accuracy is {clean[key].acc:.1%} on clean images, at severity 1 {best:.1%} at most, near "
                f"chance ({chance:.1%}): are the labels those of other classes, or in another order?"
            )
            return
