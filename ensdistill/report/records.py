"""What a report draws and no table holds, as small files in the run folder: a run writes them, a report reads them.

OUT/predictions.npz   of every row of results.json, in its order, and every test image: predicted class, its
                      probability and the label's NLL, before and after the temperature. 18 bytes an image and row,
                      however many classes there are
OUT/shown.npz         a few test images, and the step that each perturbed student was shown on top of them
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write

PREDICTIONS_FILE, SHOWN_FILE, REPORT_FILE = "predictions.npz", "shown.npz", "report.html"
MAX_SHOWN = 8
"""Images of `shown.npz`, at most."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one network, or ensemble, predicts on N test images."""

    predicted_N: np.ndarray
    """The most probable class, uint16."""
    top_N: np.ndarray
    """Its probability, float32."""
    nll_N: np.ndarray
    """Negative log-likelihood of the label in nats, float32."""
    scaled_top_N: np.ndarray
    """Probability of the most probable class after the temperature, float32."""
    scaled_nll_N: np.ndarray
    """NLL of the label after the temperature, float32."""


@dataclass(frozen=True, kw_only=True)
class KeptPredictions:
    """The predictions of every row of a run's results."""

    labels_N: np.ndarray
    """Labels of the test images, uint16."""
    names: tuple[str, ...]
    """Name of each row."""
    rows: tuple[Predictions, ...]
    """Predictions of each row."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one kind of student was shown of n images. E teachers."""

    steps_nHWC: np.ndarray
    """x' − x, float16."""
    kl_n: np.ndarray
    """Disagreement of the teachers at x': mean over ordered pairs of KL(p_i ‖ p_j), in nats, float32."""
    classes_nE: np.ndarray
    """Class that each teacher names at x', uint16."""


@dataclass(frozen=True, kw_only=True)
class ShownImages:
    """A few test images, and what students were shown of them."""

    images_nHWC: np.ndarray
    """x, uint8."""
    labels_n: np.ndarray
    """Their classes, uint16."""
    kl_n: np.ndarray | None
    """Disagreement of the teachers at x; None where a run has no teachers."""
    classes_nE: np.ndarray | None
    """Class that each teacher names at x; None where a run has no teachers."""
    methods: Mapping[str, Shown]
    """What each method was shown, by its name."""


def write_predictions(path: Path, labels_N: np.ndarray, named: Sequence[tuple[str, Predictions]]) -> None:
    """Write the predictions of every row, by its name."""
    arrays = {"labels": labels_N.astype(np.uint16), "names": np.array([name for name, _ in named], dtype=np.str_)}
    for field in fields(Predictions):
        arrays[field.name] = np.stack([getattr(row, field.name) for _, row in named])
    _write(path, arrays)


def read_predictions(path: Path) -> KeptPredictions:
    """Read what `write_predictions` wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    arrays = _read(path)
    try:
        stacked = {field.name: arrays[field.name] for field in fields(Predictions)}
        names = tuple(map(str, arrays["names"]))
        if any(array.shape != (len(names), len(arrays["labels"])) for array in stacked.values()):
            raise ValueError("its arrays do not belong together")
        rows = tuple(Predictions(**{key: array[i] for key, array in stacked.items()}) for i in range(len(names)))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the predictions of a run ({error})") from error
    return KeptPredictions(labels_N=arrays["labels"], names=names, rows=rows)


def write_shown(path: Path, shown: ShownImages) -> None:
    """Write images and what students were shown of them."""
    arrays = {"images": shown.images_nHWC, "labels": shown.labels_n.astype(np.uint16)}
    if shown.kl_n is not None and shown.classes_nE is not None:
        arrays |= {"kl": shown.kl_n, "classes": shown.classes_nE}
    arrays["methods"] = np.array(list(shown.methods), dtype=np.str_)
    for number, method in enumerate(shown.methods.values()):
        arrays |= {f"steps_{number}": method.steps_nHWC, f"kl_{number}": method.kl_n}
        arrays[f"classes_{number}"] = method.classes_nE
    _write(path, arrays)


def read_shown(path: Path) -> ShownImages:
    """Read what `write_shown` wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    arrays = _read(path)
    try:
        shape = arrays["images"].shape
        methods = {
            str(name): Shown(steps_nHWC=arrays[f"steps_{i}"], kl_n=arrays[f"kl_{i}"], classes_nE=arrays[f"classes_{i}"])
            for i, name in enumerate(arrays["methods"])
        }
        if len(shape) != 4 or any(method.steps_nHWC.shape != shape for method in methods.values()):
            raise ValueError("its arrays do not belong together")
        return ShownImages(
            images_nHWC=arrays["images"],
            labels_n=arrays["labels"],
            kl_n=arrays.get("kl"),
            classes_nE=arrays.get("classes"),
            methods=methods,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the images of a run ({error})") from error


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a path would get another suffix
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path}: not readable ({error})") from error
