"""The results away from the training data as one JSON file, `away.json` in a run's folder.

    format           1
    corruptions      what `--corruptions` measured:
      names            kinds of corruption; severities: 1 to 5; description and num_images: what they are, how many each
      networks         by name: accuracy, nll, ece, cnll, cece, brier, aece: [kind][severity]; clean and mean: one value
                       of each, on the images themselves and over all kinds and severities; n: of so many networks of
                       one name (seeds, teachers) all these are the mean
      each             the same of every network by itself, with name, members and temperature, which was fitted on
                       clean validation images
      extra            names, severities, networks and each again, of kinds that no mean has (CIFAR-10-C's four)
    ood              what `--ood` measured: by data, name and score (max_probability, entropy, mutual_information): the
                     means of auroc, aupr, aupr_in, fpr95; out-of-distribution is the positive side
                     (`run.away.detection`)
    corruptions_of   what the section beside it was measured on: data, split, num_images, device, precision, commit, and
    ood_of             by network the digests of its files; of `ood` by its data, with each (of every network by
                       itself), num_outside, shared_classes (of the data's, by name), known_images (that lie inside too)

Accuracies and errors are fractions, NLL is in nats; null stands for what there is not, as cNLL without a temperature.
A section is kept where the other is measured anew, as long as the files of its networks are what they were.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensdistill.data.sources.content_hash import file_hash
from ensdistill.formats.ours import student_path
from ensdistill.run.away.networks import Found
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, read_json

AWAY_FILE = "away.json"
FORMAT = 1


def means_by_name(each: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The means over the networks of one name, from the values of each by its key; `names`: the name of each."""
    return {
        name: _mean([values for key, values in each.items() if names[key] == name])
        for name in dict.fromkeys(names[key] for key in each)
    }


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, of lists place by place, of objects key by key."""
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [_mean(place) for place in zip(*values, strict=True)]
    return math.fsum(values) / len(values)


def digests_of(found: Mapping[str, Found]) -> dict[str, list[str]]:
    """Digests of the files of each network, by its key."""
    return {
        key: [digest for part in one.parts for digest in _digests(found[part])] if one.parts else _digests(one)
        for key, one in found.items()
    }


def _digests(one: Found) -> list[str]:
    return [file_hash(one.file)] + ([file_hash(student_path(one.file))] if one.is_student else [])


def require_place(path: Path) -> None:
    """Refuse a place for the results that holds something else, or that may not be written, before any work.

    Raises:
        UserError: it is such a place.
    """
    if path.exists():
        _read(path)
    existing = next(place for place in (path.absolute().parent, *path.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path}: {existing} is no folder that you may write to; choose another place with --save")


def merged(path: Path, new: Mapping[str, Any], networks: Mapping[str, list[str]], say: Callable[[str], None]) -> Any:
    """What `path` is to hold: `new`, and of what it holds already all that `new` does not measure anew.

    Args:
        new: sections by name, with what they were measured on beside them.
        networks: digests of each network that was found now, by its key. A section of networks that have others by now,
            or are there no more, is left out, which is said.

    Raises:
        UserError: `path` holds something else.
    """
    before = _read(path) if path.exists() else {}
    kept: dict[str, Any] = {}
    if "corruptions" in before and "corruptions" not in new:
        if _is_of(before["corruptions_of"], networks):
            kept |= {name: before[name] for name in ("corruptions", "corruptions_of")}
        else:
            say(f"{path}: what it had of corruptions was of networks that are others by now, and is left out")
    ood, ood_of = dict(new.get("ood", {})), dict(new.get("ood_of", {}))
    for data, values in before.get("ood", {}).items():
        if data in ood:
            continue
        if _is_of(before["ood_of"].get(data), networks):
            ood[data], ood_of[data] = values, before["ood_of"][data]
        else:
            say(f"{path}: what it had of --ood {data} was of networks that are others by now, and is left out")
    outside = {"ood": ood, "ood_of": ood_of} if ood else {}
    return {"format": FORMAT} | kept | dict(new) | outside


def _is_of(measured_on: Any, networks: Mapping[str, list[str]]) -> bool:
    """Tell whether a section is of networks as they are now; one that does not say of which is not."""
    digests = measured_on.get("networks") if isinstance(measured_on, dict) else None
    return isinstance(digests, dict) and all(networks.get(key) == value for key, value in digests.items())


def _read(path: Path) -> Any:
    expected = f"expected the results of ensdistill.evaluate of format {FORMAT}; move it away"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {expected}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: is something else; {expected}")
    for section in ("corruptions", "ood"):
        parts = found.get(section, {}), found.get(f"{section}_of", {})
        if not all(isinstance(part, dict) for part in parts) or (section in found) != (f"{section}_of" in found):
            raise UserError(f"{path}: its section {section} is damaged; {expected}")
    return found


def save_results(path: Path, results: Any) -> None:
    """Write the results, whole or not at all.

    Raises:
        UserError: `path` cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(plain(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
