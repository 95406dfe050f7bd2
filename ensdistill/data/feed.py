"""Batches of images and labels from a `.beton` file, in an order that nothing but (seed, epoch) decides.

FFCV decodes. The order, and the boxes of random-resized crops, are functions of (seed, epoch, index of the image)
alone: not of the number of workers, of threads, of caching, or of where an epoch was resumed. Batches are uint8; flips,
shifts and normalisation are the step's business. Boxes (top, left, height, width) are drawn here, for a batch at once,
and not inside the compiled decoder, so that they can depend on no thread, no compiler option and no other draw.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ensdistill.data.beton_file import read_index
from ensdistill.data.ffcv_guards import num_cores
from ensdistill.kernels.philox import STREAM_RESIZED_CROP, below, epoch_order, philox
from ensdistill.runtime.errors import UserError, nearest
from ensdistill.runtime.ranks import local_processes

if TYPE_CHECKING:
    from ensdistill.data.ffcv_loader import BetonLoader

Batch = tuple[Tensor, Tensor]
Crop = Literal["none", "center", "random-resized"]
Cache = Literal["auto", "host", "none"]

AUTO_CACHE_BYTES = 1 << 30
_CACHE_BATCH = 512


class Feed:
    """Feeds the batches of one split, in our order.

    Args:
        path: a `.beton` file with one field of images (RGBImageField, or NDArrayField of uint8 (H, W, C)) and one
            IntField of labels.
        indices: rows of the file that make up the split, a range or int64 (N,); all by default.
        batch_size: images a batch.
        seed: key of every draw, in [0, 2**64).
        shuffle: an order of its own for each epoch; otherwise the file's.
        drop_last: leave out the last batch of an epoch where it is not full (training; never in evaluation).
        image_size: side in pixels of the square that a crop is resized to. Not for images that are fed whole.
        crop: the part of each image that is shown; `none`, the whole, needs images of one size.
        cache: keep the decoded split in memory (`host`), decode every epoch anew (`none`), or keep it where it is below
            1 GiB (`auto`). Batches are the same; random-resized crops are never kept.
        share: the rows of every batch that this process is fed, where several share each; all by default.
        pin: batches lie in page-locked memory, from which a GPU copies while the host goes on.

    Raises:
        UserError: a damaged or foreign file, a split without a single batch, or settings that do not fit the data.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        indices: range | np.ndarray | None = None,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        image_size: int | None = None,
        crop: Crop = "none",
        cache: Cache = "auto",
        share: range | None = None,
        pin: bool = False,
    ) -> None:
        assert share is None or (drop_last and share.step == 1), "only full batches are shared"
        path = Path(path)
        _check_settings(path, batch_size, seed, crop, image_size, cache)
        self.index = index = read_index(path)
        indices = range(index.num_images) if indices is None else indices
        _check_split(path, indices, index.num_images, batch_size, drop_last)
        self.path, self.indices, self.batch_size = path, indices, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.crop = crop
        self.share, self.pin = range(batch_size) if share is None else share, pin
        self._indices_N = np.asarray(indices, dtype=np.int64)
        self.image_shape = self._output_shape(image_size)
        """Shape (H, W, C) of every image."""
        only_copied = crop == "none" and self._all_raw()
        self.num_workers = 1 if only_copied else max(1, num_cores() // local_processes())
        """Threads that decode: this process's share of the cores where images are decompressed or resized."""
        self.is_cached = cache == "host" or (
            cache == "auto" and crop != "random-resized" and self.num_bytes < AUTO_CACHE_BYTES
        )
        self._kept: list[np.ndarray] = []  # uint8 (N, H, W, C) once decoded; one list for all orders of the images
        self._loader: BetonLoader | None = None
        self._open: weakref.WeakSet[EpochBatches] = weakref.WeakSet()

    @property
    def num_images(self) -> int:
        """Number of images in the split (an epoch shows all of them, but for a last batch that is dropped)."""
        return len(self.indices)

    @property
    def num_bytes(self) -> int:
        """Bytes of all images of the split, decoded."""
        return self.num_images * int(np.prod(self.image_shape))

    @property
    def rows(self) -> int:
        """Number of images of a full batch that this process is fed."""
        return len(self.share)

    @property
    def num_steps(self) -> int:
        """Number of batches an epoch."""
        return self.num_images // self.batch_size if self.drop_last else -(-self.num_images // self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> EpochBatches:
        """Start the batches of an epoch, or those that were left of it: from `first_step` on, as they would have come.

        Decoding begins here; several epochs may be open at once. Use it in a `with`, which ends it wherever the loop is
        left.
        """
        assert epoch >= 0 and 0 <= first_step <= self.num_steps
        num_steps = self.num_steps - first_step
        if self.is_cached:
            batches = EpochBatches(self._from_memory(epoch, first_step), num_steps, lambda: None)
        else:
            if self._loader is None:
                self._loader = self._new_loader(lambda epoch: self._indices_N[self.order(epoch)], self.rows)
            worker = self._loader.batches(epoch, first_step)
            batches = EpochBatches(worker, num_steps, worker.close)
        self._open.add(batches)
        return batches

    def with_seed(self, seed: int) -> Feed:
        """Return a feed of the same images in another order; what one of them keeps in memory all of them have."""
        other = copy.copy(self)
        other.seed, other._loader, other._open = seed, None, weakref.WeakSet()
        return other

    def whole(self) -> Feed:
        """Return the same feed with all rows of every batch."""
        other = self.with_seed(self.seed)
        other.share = range(self.batch_size)
        return other

    def close(self) -> None:
        """End every epoch that is still open and let go of the images in memory."""
        for batches in list(self._open):
            batches.close()
        self._kept.clear()
        self._loader = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def order(self, epoch: int) -> np.ndarray:
        """Return places in the split, int64 (num_steps · rows,), in the epoch's order, dropped batches left out."""
        order = epoch_order(self.num_images, self.seed, epoch) if self.shuffle else np.arange(self.num_images)
        order = order[: self.num_steps * self.batch_size]
        if self.rows == self.batch_size:
            return order
        return order.reshape(-1, self.batch_size)[:, self.share.start : self.share.stop].ravel()

    def all_images(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode every image of the split, uint8 (N, H, W, C), and return it with its label, int64 (N,), in order.

        Raises:
            UserError: the crops differ in every epoch.
        """
        if self.crop == "random-resized":
            raise UserError(f"{self.path}: random-resized crops differ in every epoch and cannot be kept")
        return self._decode_all(), self.index.labels_N[self._indices_N]

    def load(self) -> None:
        """Decode now what is kept in memory, which the first epoch would do; the first use compiles the decoder too."""
        if self.is_cached and not self._kept:
            self._kept.append(self._decode_all())

    def _from_memory(self, epoch: int, first_step: int) -> Iterator[Batch]:
        self.load()
        (images_NHWC,) = self._kept
        positions = self.order(epoch)[first_step * self.rows :]
        for start in range(0, len(positions), self.rows):
            positions_B = positions[start : start + self.rows]
            B = len(positions_B)
            images_BHWC = torch.empty((B, *self.image_shape), dtype=torch.uint8, pin_memory=self.pin)
            # numpy's take: PyTorch's index_select splits even small batches over threads, which is slower. `clip`: in
            # the mode that raises it goes through a copy, and the positions are ours.
            images_NHWC.take(positions_B, axis=0, out=images_BHWC.numpy(), mode="clip")
            labels_B = torch.empty(B, dtype=torch.int64, pin_memory=self.pin)
            labels_B.numpy()[:] = self.index.labels_N[self._indices_N[positions_B]]
            yield images_BHWC, labels_B

    def _decode_all(self) -> np.ndarray:
        """Decode every image of the split, in the split's order."""
        images_NHWC = np.empty((self.num_images, *self.image_shape), dtype=np.uint8)
        worker = self._new_loader(lambda epoch: self._indices_N, _CACHE_BATCH).batches(0)
        start = 0
        with EpochBatches(worker, -(-self.num_images // _CACHE_BATCH), worker.close) as batches:
            for images_BHWC, _ in batches:
                images_NHWC[start : start + len(images_BHWC)] = images_BHWC.numpy()
                start += len(images_BHWC)
        assert start == self.num_images
        return images_NHWC

    def _new_loader(self, order: Callable[[int], np.ndarray], batch_size: int) -> BetonLoader:
        from ensdistill.data.ffcv_loader import BetonLoader

        return BetonLoader(
            self.index,
            order=order,
            boxes=self._boxes,
            batch_size=batch_size,
            output_size=self.image_shape[:2],
            num_workers=self.num_workers,
            pin=self.pin,
        )

    def _boxes(self, indices_B: np.ndarray, epoch: int) -> np.ndarray:
        heights_B, widths_B = self.index.heights_N[indices_B], self.index.widths_N[indices_B]
        if self.crop == "random-resized":
            return random_boxes(heights_B, widths_B, indices_B=indices_B, seed=self.seed, epoch=epoch)
        if self.crop == "center":
            return center_boxes(heights_B, widths_B)
        return whole_boxes(heights_B, widths_B)

    def _all_raw(self) -> bool:
        return not self.index.is_jpeg_N[self._indices_N].any()

    def _output_shape(self, image_size: int | None) -> tuple[int, int, int]:
        index = self.index
        if self.crop != "none":
            if index.is_array:
                raise UserError(
                    f"{self.path}: crop '{self.crop}' needs images in an RGBImageField, and '{index.image_field}' is an"
                    f" NDArrayField; take crop 'none', or write the file with RGBImageField"
                )
            assert image_size is not None
            return image_size, image_size, index.num_channels
        heights_N, widths_N = index.heights_N[self._indices_N], index.widths_N[self._indices_N]
        height, width = int(heights_N[0]), int(widths_N[0])
        if (heights_N != height).any() or (widths_N != width).any():
            raise UserError(
                f"{self.path}: images are {heights_N.min()} to {heights_N.max()} pixels high and {widths_N.min()} to"
                f" {widths_N.max()} wide, a batch needs one size; set image_size, and crop to 'center' or"
                f" 'random-resized'"
            )
        if image_size is not None and (height, width) != (image_size, image_size):
            raise UserError(
                f"{self.path}: images are {height}x{width}, image_size {image_size} was asked for; leave it away, or"
                f" resize with crop 'center' or 'random-resized'"
            )
        return height, width, index.num_channels


class EpochBatches:
    """Iterator over the batches that are left of an epoch; a context manager that ends it early.

    Each item is (images uint8 (B, H, W, C), labels int64 (B,)), and its receiver's to keep. An exception in the thread
    that decodes is raised here. At the end, on an error and on `close()` the thread has ended.
    """

    def __init__(self, batches: Iterator[Batch], num_steps: int, close: Callable[[], None]) -> None:
        self._batches = batches
        self._num_steps = num_steps
        # Also where a loop was left with `break` and nobody closed: the thread does not keep this object alive.
        self._close = weakref.finalize(self, close)

    def __len__(self) -> int:
        """Number of batches from the first one on, however many were taken."""
        return self._num_steps

    def __iter__(self) -> EpochBatches:
        return self

    def __next__(self) -> Batch:
        if not self._close.alive:
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop decoding and join the thread; a second call does nothing."""
        self._close()

    def __enter__(self) -> EpochBatches:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check_settings(
    path: Path,
    batch_size: int,
    seed: int,
    crop: str,
    image_size: int | None,
    cache: str,
) -> None:
    for name, value, choices in [("crop", crop, get_args(Crop)), ("cache", cache, get_args(Cache))]:
        if value not in choices:
            hint = nearest(value, choices)
            raise UserError(f"{path}: {name} '{value}' is unknown{hint}; expected one of {', '.join(choices)}")
    for name, number in [("batch_size", batch_size), ("image_size", image_size)]:
        if number is not None and number < 1:
            raise UserError(f"{path}: {name} is {number}; expected at least 1")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"{path}: seed is {seed}; expected a number from 0 to 2**64 - 1")
    if crop != "none" and image_size is None:
        raise UserError(f"{path}: crop '{crop}' without image_size; set the side in pixels that crops are resized to")
    if crop == "random-resized" and cache == "host":
        raise UserError(f"{path}: random-resized crops differ in every epoch and cannot be kept; set cache to 'none'")


def _check_split(path: Path, indices: range | np.ndarray, num_in_file: int, batch_size: int, drop_last: bool) -> None:
    if len(indices) == 0:
        raise UserError(f"{path}: the split {indices} holds no images; the file has {num_in_file}: choose some of them")
    ends = (indices[0], indices[-1]) if isinstance(indices, range) else (indices.min(), indices.max())
    if min(ends) < 0 or max(ends) >= num_in_file:
        raise UserError(
            f"{path}: the split {indices} goes past the {num_in_file} images of the file; choose from those"
        )
    if drop_last and len(indices) < batch_size:
        raise UserError(
            f"{path}: {len(indices)} images make no full batch of {batch_size}, so training would do nothing;"
            f" set batch_size to at most {len(indices)}"
        )


CENTER_RATIO = 224 / 256
"""Side of the `center` crop, as a share of the image's shorter side."""
MIN_AREA = 0.25
"""Smallest area of a `random-resized` crop, as a share of the image."""
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
NUM_ATTEMPTS = 10


def whole_boxes(heights_B: np.ndarray, widths_B: np.ndarray) -> np.ndarray:
    """Boxes (B, 4) of whole images."""
    zero_B = np.zeros_like(heights_B)
    return np.stack([zero_B, zero_B, heights_B, widths_B], axis=1)


def center_boxes(heights_B: np.ndarray, widths_B: np.ndarray) -> np.ndarray:
    """Boxes (B, 4) of the central squares whose side is `CENTER_RATIO` of the shorter side, as usual in evaluation."""
    sides_B = np.rint(CENTER_RATIO * np.minimum(heights_B, widths_B)).astype(np.int64)
    return _centered(heights_B, widths_B, sides_B, sides_B)


def random_boxes(
    heights_B: np.ndarray, widths_B: np.ndarray, *, indices_B: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """Boxes (B, 4) of random-resized crops (Szegedy et al., "Going deeper with convolutions", CVPR 2015).

    Area uniform in [`MIN_AREA`, 1] of the image, aspect (width / height) log-uniform in [3/4, 4/3], position uniform;
    the first of ten attempts that fits, else the largest central box of an aspect in that range.
    """
    attempts = np.arange(NUM_ATTEMPTS, dtype=np.int64)
    words = philox(seed, indices_B[:, None], epoch, STREAM_RESIZED_CROP, attempts[None, :])
    area_BA, aspect_BA = ((word + 0.5) * 2.0**-32 for word in words[:2])  # middle of the word's bin, in (0, 1)
    area_BA = (MIN_AREA + (1 - MIN_AREA) * area_BA) * (heights_B * widths_B)[:, None]
    low, high = math.log(MIN_ASPECT), math.log(MAX_ASPECT)
    aspect_BA = np.exp(low + (high - low) * aspect_BA)
    h_BA = np.rint(np.sqrt(area_BA / aspect_BA)).astype(np.int64)
    w_BA = np.rint(np.sqrt(area_BA * aspect_BA)).astype(np.int64)
    fits_BA = (h_BA > 0) & (h_BA <= heights_B[:, None]) & (w_BA > 0) & (w_BA <= widths_B[:, None])

    rows, first_B = np.arange(len(indices_B)), fits_BA.argmax(axis=1)
    h_B, w_B = h_BA[rows, first_B], w_BA[rows, first_B]
    top_B = below(words[2][rows, first_B], np.maximum(heights_B - h_B, 0) + 1)
    left_B = below(words[3][rows, first_B], np.maximum(widths_B - w_B, 0) + 1)
    boxes_B4 = np.stack([top_B, left_B, h_B, w_B], axis=1)

    fallback_h_B = np.minimum(heights_B, np.rint(widths_B / MIN_ASPECT)).astype(np.int64)
    fallback_w_B = np.minimum(widths_B, np.rint(heights_B * MAX_ASPECT)).astype(np.int64)
    fallback_B4 = _centered(heights_B, widths_B, fallback_h_B, fallback_w_B)
    return np.where(fits_BA.any(axis=1)[:, None], boxes_B4, fallback_B4)


def _centered(heights_B: np.ndarray, widths_B: np.ndarray, h_B: np.ndarray, w_B: np.ndarray) -> np.ndarray:
    return np.stack([(heights_B - h_B) // 2, (widths_B - w_B) // 2, h_B, w_B], axis=1)
