"""FFCV's Loader, decoding in the order and with the crops that it is told, and ending cleanly whatever happens.

Loaded on first use only: it imports FFCV at the top, which takes seconds. What differs from FFCV's own classes:

- the order of an epoch is ours, and an epoch can start in the middle;
- one decoder for every crop; its boxes come from outside, so nothing random is compiled in, and its result says which
  images could not be decoded (FFCV ignores that);
- a batch is decoded into memory of its own, not into one of a few slots that are written again later;
- an exception in the worker thread reaches the consumer (FFCV's loop waits for ever), and closing joins the thread;
- numba's types stay as they are (FFCV marks the shared one of uint8 vectors read-only, anew for each loader, and every
  function that was compiled with it is lost).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from queue import Empty, Queue
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ensdistill.data.beton_file import MODE_JPEG, BetonIndex, damaged_jpeg
from ensdistill.data.ffcv_guards import import_ffcv, kept_thread_counts

import_ffcv()

import ffcv.loader.loader  # noqa: E402
from ffcv.fields.ndarray import NDArrayDecoder  # noqa: E402
from ffcv.libffcv import imdecode, memcpy, resize_crop  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager  # noqa: E402
from ffcv.pipeline import Compiler, PipelineSpec  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.reader import Reader  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402

Batch = tuple[Tensor, Tensor]
"""Images uint8 (B, H, W, C) and labels int64 (B,); the receiver owns both."""

# numba's pool may be entered by one thread at a time in some of its threading layers; a batch uses all of it anyway.
_pool_lock = threading.Lock()

_stages: dict[tuple[bool, bool], tuple[Callable, int]] = {}
"""(images are arrays, several workers) -> the compiled stage, and the number that its arguments' names end in."""


class MappedFile(OSCacheManager):
    """FFCV's memory-mapped file, without its tables of pages: nothing here reads them, and they are large and slow."""

    def __init__(self, reader: Reader) -> None:
        order = np.argsort(reader.alloc_table["ptr"])
        self.reader = reader
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)

    def compile_reader(self) -> Callable:
        return _read_sample()


@functools.cache
def _read_sample() -> Callable:
    """Compiled (offset, (file, sorted offsets, their sizes)) -> the bytes of the sample that begins there."""
    content = numba.types.Array(numba.uint8, 1, "C", readonly=True)
    numbers = numba.types.Array(numba.uint64, 1, "C")

    def read(offset: Any, state: Any) -> Any:
        size = state[2][np.searchsorted(state[1], offset)]
        return state[0][offset : offset + size]

    return Compiler.compile(read, content(numba.uint64, numba.types.Tuple([content, numbers, numbers])))


ffcv.loader.loader.OSCacheManager = MappedFile  # where the Loader takes it from


class GivenOrder(TraversalOrder):
    """FFCV's traversal order as a function from the epoch to the indices (n,) int64 of its images, n fixed."""

    def __init__(self, order: Callable[[int], np.ndarray]) -> None:
        self._order = order

    def __call__(self, loader: Loader) -> GivenOrder:
        return self  # the Loader calls the order that it is given, as if that were a class

    def sample_order(self, epoch: int) -> np.ndarray:
        return self._order(epoch)


class ArrayDecoder(NDArrayDecoder):
    """FFCV's decoder of fixed-size arrays, into memory of the batch's own."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        state, _ = super().declare_state_and_memory(previous_state)
        return state, None


class BoxDecoder(Operation):
    """Decodes images and resizes a box of each to the output size.

    Memory of a batch: images (B, H, W, 3) uint8; scratch (workers, bytes of the largest image) uint8; boxes (B, 4)
    int64, top, left, height, width; status (B,) int64, not 0 where a JPEG is damaged.
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        state = State(
            jit_mode=True, device=previous_state.device, shape=(*self.output_size, 3), dtype=np.dtype(np.uint8)
        )
        return state, None

    def generate_code(self) -> Callable:
        read, decode_jpeg = self.memory_read, Compiler.compile(imdecode)
        resize, copy = Compiler.compile(resize_crop), Compiler.compile(memcpy)
        parallel_range = Compiler.get_iterator()

        def decode(indices: Any, memory: Any, metadata: Any, storage: Any) -> Any:
            images, scratch, boxes, status = memory
            num_workers = len(scratch)
            for worker in parallel_range(num_workers):
                for row in range(worker, len(indices), num_workers):
                    sample = metadata[indices[row]]
                    stored = read(sample["data_ptr"], storage)
                    height, width = np.int64(sample["height"]), np.int64(sample["width"])
                    top, left, box_height, box_width = boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3]
                    whole = box_height == height == images.shape[1] and box_width == width == images.shape[2]
                    if sample["mode"] == MODE_JPEG:
                        # Decoded in place where nothing is left to do with it.
                        pixels = images[row].reshape(-1) if whole else scratch[worker][: 3 * height * width]
                        status[row] = decode_jpeg(
                            stored, pixels, height, width, height, width, 0, 0, 1, 1, False, False
                        )  # fmt: skip
                    else:
                        pixels = stored
                        if whole:
                            copy(stored, images[row])
                    if not whole:
                        source = pixels.reshape(height, width, 3)
                        resize(source, top, top + box_height, left, left + box_width, images[row])
            return images

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class BetonLoader(Loader):
    """Loads batches of one `.beton`, in a thread an epoch.

    Args:
        index: the file.
        order: indices of the images, int64 (n,), of each epoch.
        boxes: (indices_B, epoch) -> boxes (B, 4) of a batch; ignored for arrays, which are copied whole.
        output_size: (H, W) of every image.
        num_workers: threads that decode, at most `num_cores()`.
        pin: decode into page-locked memory.
    """

    def __init__(
        self,
        index: BetonIndex,
        *,
        order: Callable[[int], np.ndarray],
        boxes: Callable[[np.ndarray, int], np.ndarray],
        batch_size: int,
        output_size: tuple[int, int],
        num_workers: int,
        pin: bool = False,
    ) -> None:
        self.index, self.boxes, self.output_size, self.pin = index, boxes, output_size, pin
        decoder = ArrayDecoder() if index.is_array else BoxDecoder(output_size)
        with kept_thread_counts():
            super().__init__(
                str(index.path),
                batch_size,
                num_workers=num_workers,
                order=GivenOrder(order),
                pipelines=dict.fromkeys(index.field_names)  # labels are read from the index, which has them in memory
                | {index.image_field: PipelineSpec(index.image_field, decoder=decoder)},
                drop_last=False,  # what to drop is the order's business
            )

    def generate_code(self) -> None:
        """Make the stage that decodes, once a process and kind: it depends on neither the file nor any size.

        numba compiles it on the first batch. FFCV compiles every loader anew, which takes a second or more.
        """
        kind = (self.index.is_array, self.num_workers > 1)
        if kind not in _stages:
            super().generate_code()
            ((stage, _),) = self.code[0]
            _stages[kind] = stage, self.graph.leaf_nodes[self.index.image_field].id
        self.stage, self.node = _stages[kind]

    def __iter__(self) -> WorkerThread:
        """FFCV's own way in: each call is the next epoch."""
        self.next_epoch += 1
        return self.batches(self.next_epoch - 1)

    def batches(self, epoch: int, first_step: int = 0) -> WorkerThread:
        """Start to decode the epoch's batches from `first_step` on."""
        order = self.traversal_order.sample_order(epoch)[first_step * self.batch_size :]
        return WorkerThread(self, order, epoch)


class WorkerThread(EpochIterator):
    """The thread that decodes one epoch, at most `batches_ahead` batches before they are asked for.

    Whoever starts one must close it.
    """

    def __init__(self, loader: BetonLoader, order: np.ndarray, epoch: int) -> None:
        self.epoch = epoch
        self.output_queue: Queue[Batch | BaseException | None]
        super().__init__(loader, order)  # starts the thread

    def run(self) -> None:
        """Queue every batch, then None; an exception is queued in the place of its batch."""
        index, num_workers = self.loader.index, self.loader.num_workers
        try:
            numba.set_num_threads(num_workers)  # of this thread alone
            largest = 0 if index.is_array else int((index.heights_N * index.widths_N).max()) * index.num_channels
            self.scratch = np.empty((num_workers, largest), dtype=np.uint8)
            for step, indices_B in enumerate(self.iter_ixes):
                batch = self.run_pipeline(step, indices_B, 0, None)
                self.output_queue.put(batch)
                if self.terminate_event.is_set():
                    return
            self.output_queue.put(None)
        except BaseException as error:  # raised again in the consumer's thread
            self.output_queue.put(error)

    def run_pipeline(self, b_ix: int, batch_indices: np.ndarray, batch_slot: int, cuda_event: None) -> Batch:
        """Decode one batch into memory of its own (the last two arguments are FFCV's, for memory that is reused)."""
        index, loader = self.loader.index, self.loader
        self.memory_context.start_batch(b_ix)
        size = len(batch_indices)
        shape = (size, *loader.output_size, index.num_channels)
        images_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=loader.pin)
        status_B = np.zeros(size, dtype=np.int64)
        memory: Any = images_BHWC.numpy()
        if not index.is_array:
            boxes_B4 = loader.boxes(batch_indices, self.epoch)
            memory = (memory, self.scratch, boxes_B4, status_B)
        with _pool_lock if loader.num_workers > 1 else contextlib.nullcontext():
            loader.stage(
                batch_indices=batch_indices,
                metadata=self.metadata,
                storage_state=self.storage_state,
                **{f"memory_{loader.node}": memory, f"shared_memory_{loader.node}": None},
            )
        if status_B.any():
            image = int(batch_indices[(status_B != 0).argmax()])
            raise damaged_jpeg(index.path, image)
        labels_B = torch.empty(size, dtype=torch.int64, pin_memory=loader.pin)
        labels_B.numpy()[:] = index.labels_N[batch_indices]
        return images_BHWC, labels_B

    def __next__(self) -> Batch:
        item = None if self.closed else self.output_queue.get()
        if isinstance(item, tuple):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait for its end; at most the batch that it works on is still decoded."""
        self.terminate_event.set()
        self.closed = True
        # The thread looks at the event after each put, so one place in the queue is enough to let it go.
        with contextlib.suppress(Empty):
            while True:
                self.output_queue.get_nowait()
        if threading.current_thread() is not self:  # the garbage collector may run anywhere
            self.join()

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Close what was dropped, unless Python ends: names are gone then, and the thread stands still for ever."""
        if not is_ending() and "terminate_event" in vars(self):  # else FFCV's own __init__ did not get so far
            self.close()
