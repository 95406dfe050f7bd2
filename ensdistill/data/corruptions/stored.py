"""Corrupted images as CIFAR-10-C keeps them: a folder of .npy files, five severities one after another in each.

    gaussian_noise.npy, shot_noise.npy, …   uint8 (5 · N, H, W, C): N images of severity 1, the same of severity 2, …
    labels.npy                              integers (5 · N,): the N labels, five times

The layout, and which corruptions a mean is taken over, are those of Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019; CIFAR-100-C has it too, and anybody's own files
may. They stay on the disk and are read as they are shown (a memory map).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ensdistill.data.corruptions.made import SEVERITIES
from ensdistill.data.feed import Batch
from ensdistill.data.sources.arrays import load_npy
from ensdistill.data.sources.base import check_images
from ensdistill.runtime.errors import UserError, first_names

LABELS_FILE = "labels.npy"
COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The fifteen corruptions that published means are of."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Four more that lie in the same folder, for trials, and are no part of those means."""
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of CIFAR-10's labels, in their order."""


class StoredCorruptions:
    """A folder of corrupted images, checked.

    Args:
        image_shape: shape (H, W, C) of the images that the networks take.
        class_names: names of their classes, in the order of the logits.
        say, warn: what happens is said, and what makes the mean another one than the published.

    Raises:
        UserError: no such folder, or a file that is missing, damaged, of another length, type or shape than the others,
            or labels of other classes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str],
        batch_size: int,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.folder, self.batch_size, self.image_shape = folder, batch_size, image_shape
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected one of corrupted images, such as CIFAR-10-C's")
        found = sorted(file.stem for file in folder.glob("*.npy") if file.name != LABELS_FILE)
        if not found:
            raise UserError(f"{folder}: holds no .npy file of images; expected gaussian_noise.npy, … as in CIFAR-10-C")
        if not (folder / LABELS_FILE).is_file():
            raise UserError(f"{folder}: {LABELS_FILE} is missing; expected the labels of all files, as in CIFAR-10-C")
        self.labels_N = _read_labels(folder / LABELS_FILE, len(class_names))
        self.num_images = len(self.labels_N)
        is_published = bool({*found} & {*COMMON})
        self.extra = tuple(name for name in EXTRA if name in found) if is_published else ()
        in_order = {name: place for place, name in enumerate(COMMON)}
        self.names = tuple(
            sorted((name for name in found if name not in self.extra), key=lambda name: in_order.get(name, len(COMMON)))
        )
        self.description = f"{folder}: {len(self.names)} corruptions of {self.num_images:,} images"
        for name in (*self.names, *self.extra):
            self._open(name)
        if is_published:
            _compare_with_published(folder, self.names, self.extra, say, warn)
        if absent := len(class_names) - len(np.unique(self.labels_N)):
            warn(f"{folder / LABELS_FILE}: {absent} of the networks' {len(class_names)} classes have no image")
        self._order_labels(class_names, say)

    def batches(self, name: str, severity: int) -> Iterator[Batch]:
        """Batches of the images of one file and severity, in its order: uint8 (B, H, W, C) and labels int64 (B,)."""
        images, first = self._open(name), (severity - 1) * self.num_images
        for start in range(0, self.num_images, self.batch_size):
            labels_B = self.labels_N[start : start + self.batch_size]
            images_BHWC = np.array(images[first + start : first + start + len(labels_B)])
            yield torch.from_numpy(images_BHWC).reshape(-1, *self.image_shape), torch.from_numpy(labels_B)

    def _open(self, name: str) -> np.ndarray:
        file = self.folder / f"{name}.npy"
        images = load_npy(file)
        if images.ndim == 3:
            images = images[..., None]
        check_images(images, str(file))
        expected = len(SEVERITIES) * self.num_images
        if len(images) != expected:
            raise UserError(
                f"{file}: {len(images):,} images; expected {expected:,}, five times the {self.num_images:,} of "
                f"{LABELS_FILE}: copy it again"
            )
        if images.shape[1:] != self.image_shape:
            (H, W, C), (h, w, c) = images.shape[1:], self.image_shape
            raise UserError(
                f"{file}: images of {H}x{W} pixels and {C} channels; expected {h}x{w} and {c}, as the networks take: "
                "give the corrupted images of the data that they were trained for"
            )
        return images

    def _order_labels(self, class_names: Sequence[str], say: Callable[[str], None]) -> None:
        """Bring CIFAR-10's own labels to the order of classes of the same names."""
        if tuple(class_names) == CIFAR10_CLASSES:
            return
        if set(class_names) != set(CIFAR10_CLASSES):
            say(f"{self.folder}: its labels are taken in the order of the data's classes, {first_names(class_names)}")
            return
        place = np.array([list(class_names).index(name) for name in CIFAR10_CLASSES])
        self.labels_N = place[self.labels_N]
        say(f"{self.folder}: labels are CIFAR-10's, taken to the data's classes by their names")


def _read_labels(file: Path, num_classes: int) -> np.ndarray:
    """The N labels of a file that has them five times, int64."""
    labels = load_npy(file)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{file}: {labels.dtype} of shape {labels.shape}; expected integer labels of shape (5 · N,)")
    if len(labels) % len(SEVERITIES):
        raise UserError(f"{file}: {len(labels):,} labels; expected those of N images five times: copy it again")
    each_5N = np.asarray(labels).reshape(len(SEVERITIES), -1).astype(np.int64)
    if (each_5N != each_5N[0]).any():
        raise UserError(
            f"{file}: its fifths differ; expected the labels of the same images five times, one severity after another"
        )
    if each_5N.min() < 0 or each_5N.max() >= num_classes:
        raise UserError(
            f"{file}: labels {each_5N.min()} to {each_5N.max()}; expected 0 to {num_classes - 1}, the networks' "
            f"{num_classes} classes: give the corrupted images of the data that they were trained for"
        )
    if 2 * (present := len(np.unique(each_5N[0]))) <= num_classes:  # CIFAR-10-C for networks of CIFAR-100
        raise UserError(
            f"{file}: labels of {present} classes; expected the networks' {num_classes}: give the corrupted images of "
            "the data that they were trained for"
        )
    return each_5N[0]


def _compare_with_published(
    folder: Path, names: Sequence[str], extra: Sequence[str], say: Callable[[str], None], warn: Callable[[str], None]
) -> None:
    """Say where a mean over `names` is not the one over the fifteen corruptions that others publish."""
    missing = [name for name in COMMON if name not in names]
    if missing:
        warn(
            f"{folder}: {len(missing)} of the {len(COMMON)} corruptions that published means are of are missing "
            f"({', '.join(missing)}); the mean is over the others"
        )
    if own := [name for name in names if name not in COMMON]:
        warn(f"{folder}: {', '.join(own)}: not among those that published means are of, but in the mean here")
    if extra:
        say(f"{folder}: {', '.join(extra)}: measured, and left out of the mean, as published means leave them out")
