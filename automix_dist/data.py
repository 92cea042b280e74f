"""Loaders: how the images that sampling.py gives to a rank reach its device.

Operations with FFCV's interface decode and crop (augment.py); what drives them is here. FFCV's own loader thread leaves
the consumer waiting forever when an operation fails, writes the next batch over one that is still in use, and outlives
an epoch that is left early. Here every batch owns its memory, one daemon thread per loader computes batches as futures,
and a future delivers its exception.
"""

import contextlib
import math
import mmap
import os
import queue
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automix_dist import beton
from automix_dist.config import ConfigError, DataConfig
from automix_dist.control_group import memory_limit
from automix_dist.cores import cores_of_rank
from automix_dist.errors import AutomixError
from automix_dist.sampling import epoch_order, quasi_random_order, rank_batches, repeated

STALL_SECONDS = 300.0
"""A batch that takes longer than this (compilation included) is reported as a stall."""

LOOK_SECONDS = 2.0
"""How often somebody who waits for a batch looks at the clock: the time of a suspended job is not the loader's."""

EXIT_SECONDS = 10.0
"""How long the end of a loader, or of the process, waits for the batch in the making."""

SKIP_ATTEMPTS = 100
"""With data.on_corrupt=skip, so many damaged images in a row are an error after all."""

PIECE = 128 * 1024
"""Bytes that the kernel is asked to read ahead in one call: it reads no more of a longer one than its device's limit,
often 128 KiB, and says nothing of the rest."""

_COMPILED_LOOPS = threading.Lock()
"""One loader at a time runs compiled loops: numba's simplest threading layer ends the process otherwise."""


class LoaderError(AutomixError, RuntimeError):
    """A sample that cannot be decoded, or a loader that no longer delivers; the message names the sample or place."""


class Batch(NamedTuple):
    """One micro batch of one rank. Its memory is its own: it may be kept, changed and passed on."""

    images: Tensor
    """[B, H, W, 3] uint8."""
    labels: Tensor
    """[B] int64."""
    indices: Tensor
    """[B] int64, the samples' numbers in the file."""


class TrainLoader:
    """Shuffled, augmented micro batches of one rank, a function of (seed, epoch, step): any position can be started at.

    batch_size is that of an optimizer step, over all ranks and micro batches. Raises BetonError for a file that cannot
    be used and ConfigError for settings that do not fit it or this machine; iteration raises LoaderError.
    """

    def __init__(
        self,
        path: str | Path,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        accumulation_steps: int,
        device: torch.device,
    ):
        self.manifest, index = beton.load(path)
        if batch_size % (world_size * accumulation_steps):
            raise ConfigError(
                f"batch_size = {batch_size}: expected a multiple of {world_size} rank(s) x {accumulation_steps} "
                "micro batch(es)"
            )
        check_batch_size(batch_size, self.manifest.count, path)
        check_crop(config, self.manifest)
        self.num_classes = len(self.manifest.classes)
        self.steps_per_epoch = self.manifest.count // batch_size
        self._seed, self._config = seed, config
        self._shares = (batch_size, accumulation_steps, world_size, rank)
        self._pipeline = _Pipeline(path, index, config, device, train_seed=seed)
        size, free = self.manifest.file_size, _free_memory()
        if size > free:
            self._pipeline.read_from_storage(config)
        self.storage_note = _storage_note(Path(path), size, free, config)
        """One line on how the file's size compares with free memory, and what follows for reading it."""

    @property
    def skipped(self) -> int:
        """Damaged images that other ones have stood in for so far, on this rank; 0 with data.on_corrupt=error."""
        return self._pipeline.skipped

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The micro batches of an epoch from an optimizer step on; what comes before is not read.

        Raises ValueError for a step that the epoch does not have.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step = {start_step}: expected 0 to {self.steps_per_epoch}, the steps of an epoch")
        config, count = self._config, self.manifest.count
        if config.order == "quasi_random":
            places = quasi_random_order(count, self._seed, epoch, config.chunk_size, config.window_chunks)
            order = self._pipeline.by_offset[places]
        else:
            order = epoch_order(count, self._seed, epoch)
        # Copies in one micro batch would be fewer images for BatchNorm, and mixed with each other.
        order, dealt = repeated(order, config.repeats), config.repeats > 1
        steps = rank_batches(order, *self._shares, dealt=dealt)[start_step:]
        batches = list(steps.reshape(-1, steps.shape[-1]))
        batch_size, accumulation_steps, *_ = self._shares
        window = config.chunk_size * config.window_chunks * config.repeats * accumulation_steps // batch_size
        horizon = max(1, window) if config.order == "quasi_random" else 1
        return self._pipeline.stream(batches, config.train_size(epoch), epoch, horizon)

    def close(self) -> None:
        """End the loader's thread."""
        self._pipeline.close()


class EvalLoader:
    """Centre crops of one rank's share, samples rank, rank + world_size, ..., each once: sums over ranks are exact.

    Can be iterated many times. Raises BetonError for a file that cannot be used and ConfigError for settings that do
    not fit this machine; iteration raises LoaderError.
    """

    def __init__(
        self,
        path: str | Path,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ):
        self.manifest, index = beton.load(path)
        self.num_classes = len(self.manifest.classes)
        self.num_samples = self.manifest.count
        self.batch_size = batch_size
        self._indices = np.arange(rank, self.manifest.count, world_size)
        self.num_batches = math.ceil(math.ceil(self.manifest.count / world_size) / batch_size)
        """Of the rank with the most, so the same on all; this one may have less, and its last may be smaller."""
        self._pipeline = _Pipeline(path, index, config, device, train_seed=None)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self._indices), self.batch_size)
        batches = [self._indices[s : s + self.batch_size] for s in starts]
        return self._pipeline.stream(batches, self._pipeline.image_size, epoch=0)

    def blank(self) -> torch.Tensor:
        """One black image, [1, H, W, 3] uint8 on the device: what a rank without a batch takes part with."""
        return self._pipeline.blank()

    def close(self) -> None:
        """End the loader's thread."""
        self._pipeline.close()


class _Pipeline:
    """One file, the operations for it, and the thread that runs them ahead of the consumer."""

    def __init__(
        self,
        path: str | Path,
        index: beton.Index,
        config: DataConfig,
        device: torch.device,
        train_seed: int | None,
    ):
        from automix_dist import augment  # brings FFCV and numba: seconds that only loaders should cost

        self._path, self._ahead, self.image_size = Path(path), config.batches_ahead, config.image_size
        self._skip = config.on_corrupt == "skip" and train_seed is not None
        self.skipped = 0
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:  # in the loader's thread it would mean GPU 0
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._status_text = {
            augment.UNREADABLE: "its JPEG is damaged",
            augment.ALTERED: "its bytes have changed on disk",
        }
        self._records = index.records["image"]
        self._labels = index.records["label"]
        # FFCV's reader state: the mapped file, and the sorted offsets of all images with their sizes.
        self.by_offset = np.argsort(self._records["data_ptr"], kind="stable")
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._mapping = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        self._storage = (
            np.frombuffer(self._mapping, np.uint8),
            self._records["data_ptr"][self.by_offset],
            index.sizes[self.by_offset].astype(np.uint64),
        )
        self._chunk_of: np.ndarray | None = None  # sample -> chunk, where the file is read from storage
        self._chunk_size, self._window_chunks = 1, config.window_chunks
        self._key = augment.AugmentKey(train_seed or 0)
        self._sums = index.sums  # compiled code knows its address only
        operations = _operations(config, self._key, train=train_seed is not None, sums=self._sums)
        self._decode, *self._transforms = [self._code(operation) for operation in operations]
        self._copy_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._worker = _Worker(count_workers(config))

    def read_from_storage(self, config: DataConfig) -> None:
        """Announce to the kernel what is read next, as a file that does not fit in memory needs it."""
        quasi_random = config.order == "quasi_random"
        self._chunk_size = config.chunk_size if quasi_random else 1
        self._chunk_of = np.argsort(self.by_offset) // self._chunk_size
        if not quasi_random:  # what lies around an image would be read in vain
            self._mapping.madvise(mmap.MADV_RANDOM)

    def _first_uses(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int]]:
        """Of each chunk of the file that these batches read: the batch that is the first to, and from where to where
        the chunk lies. Nothing where the file stays in memory."""
        if self._chunk_of is None:
            return
        _, offsets, sizes = self._storage
        known: set[int] = set()
        for number, indices in enumerate(batches):
            for chunk in np.unique(self._chunk_of[indices % len(self._records)]).tolist():
                if chunk not in known:
                    known.add(chunk)
                    first = chunk * self._chunk_size
                    last = min(first + self._chunk_size, len(offsets)) - 1
                    yield number, int(offsets[first]), int(offsets[last] + sizes[last])

    def _code(self, operation):
        """The code of an FFCV operation, ready to run."""
        operation.accept_globals(self._records, None)
        return operation.generate_code()

    def stream(self, batches: Sequence[np.ndarray], size: int, epoch: int, horizon: int = 1) -> Iterator[Batch]:
        """Batches of these samples, images of size x size, with as many prepared ahead as configured. A sample is an
        image's number, plus a multiple of how many there are for copies of it. From storage it is read up to `horizon`
        batches ahead."""
        pending: deque[Future] = deque()
        read_ahead = _ReadAhead(self._file, self._first_uses(batches), horizon, -(-self._window_chunks // horizon))
        try:
            for i, indices in enumerate(batches):
                pending.append(self._worker.submit(self._read, indices, size, epoch, i, read_ahead))
                if len(pending) > self._ahead:
                    yield self._receive(pending.popleft())
            while pending:
                yield self._receive(pending.popleft())
        finally:
            for future in pending:
                future.cancel()

    def blank(self) -> torch.Tensor:
        return torch.zeros((1, self.image_size, self.image_size, 3), dtype=torch.uint8, device=self._device)

    def close(self) -> None:
        self._worker.close()

    def _read(
        self, indices: np.ndarray, size: int, epoch: int, number: int, read_ahead: "_ReadAhead"
    ) -> tuple[Batch, int, "torch.cuda.Event | None"]:
        """One batch, how many images in it stand in for damaged ones, and on a GPU the event that says when its copy
        has arrived. Runs in the loader's thread."""
        read_ahead.before(number)
        indices = indices.copy()
        on_gpu = self._copy_stream is not None
        with torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
            images = torch.empty((len(indices), size, size, 3), dtype=torch.uint8, pin_memory=on_gpu)
            status = np.zeros((len(indices), 1), np.int32)
            skipped = 0
            with _COMPILED_LOOPS:
                self._key.set_epoch(epoch)
                self._decode(indices, (images.numpy(), status), self._records, self._storage)
                if self._skip and status.any():
                    skipped = self._replace_damaged(indices, images.numpy(), status)
                for transform in self._transforms:
                    transform(images.numpy(), None, indices)
            indices %= len(self._records)
            self._raise_for(indices, status[:, 0])
            batch = Batch(images, torch.from_numpy(self._labels[indices]), torch.from_numpy(indices))
            if not on_gpu:
                return batch, skipped, None
            with torch.cuda.stream(self._copy_stream):
                # The allocator of pinned memory itself keeps `images` until this copy has been made.
                batch = Batch(*(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in batch))
                return batch, skipped, self._copy_stream.record_event()

    def _replace_damaged(self, indices: np.ndarray, images: np.ndarray, status: np.ndarray) -> int:
        """Put the next readable image of the file, and its number, in the place of each damaged one; returns how many.

        The stand-in depends on the damaged image alone, so batches stay the same for any number of ranks.
        """
        failed = np.flatnonzero(status)
        count = len(failed)
        for _ in range(SKIP_ATTEMPTS):
            if not len(failed):
                break
            copy, image = np.divmod(indices[failed], len(self._records))
            indices[failed] = copy * len(self._records) + (image + 1) % len(self._records)
            stand_ins = np.empty((len(failed), *images.shape[1:]), np.uint8)
            found = np.zeros((len(failed), 1), np.int32)
            self._decode(indices[failed], (stand_ins, found), self._records, self._storage)
            images[failed], status[failed] = stand_ins, found
            failed = failed[found[:, 0] != 0]
        return count

    def _raise_for(self, indices: np.ndarray, status: np.ndarray) -> None:
        failed = np.flatnonzero(status)
        if len(failed):
            shown = "; ".join(f"sample {indices[i]}: {self._status_text[int(status[i])]}" for i in failed[:10])
            raise LoaderError(f"{self._path}: {shown}; run automix verify on it, then copy or write it again")

    def _receive(self, future: Future) -> Batch:
        """Wait for a batch and make it safe to use on the consumer's current stream."""
        batch, skipped, arrived = self._worker.result(future, self._path)
        self.skipped += skipped
        if arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            for tensor in batch:
                tensor.record_stream(stream)  # its memory belongs to the copy stream, which must not reuse it earlier
        return batch


def check_batch_size(batch_size: int, count: int, path: str | Path) -> None:
    """Raise ConfigError where a training file of `count` images does not fill one batch."""
    if batch_size > count:
        raise ConfigError(f"batch_size = {batch_size}: expected at most {count}, the number of images in {path}")


def check_crop(config: DataConfig, manifest: beton.Manifest) -> None:
    """Raise ConfigError where the file's images have not the sizes that the training crop takes."""
    size, pad = config.image_size, config.pad
    smallest = min(manifest.height_range[0], manifest.width_range[0])
    largest = max(manifest.height_range[1], manifest.width_range[1])
    if config.crop == "padded" and smallest + 2 * pad < size:
        raise ConfigError(
            f"data.image_size = {size}: expected at most the smallest image side {smallest} + 2 x data.pad "
            f"({pad}), or data.crop=resized"
        )
    if config.crop == "padded" and config.pad_mode == "reflect" and pad >= smallest:
        raise ConfigError(f"data.pad = {pad}: reflection needs less than the smallest image side, {smallest}")
    if config.crop == "none" and (smallest != size or largest != size):
        raise ConfigError(
            f"data.image_size = {size}, but the images have sides from {smallest} to {largest}: data.crop=none "
            "takes images of exactly that size; use data.crop=resized"
        )


def _operations(config: DataConfig, key, *, train: bool, sums: np.ndarray) -> list:
    """The FFCV operations for a file: a decoder, then operations that work in place."""
    from automix_dist import augment  # these bring numba, which only loaders should pay for
    from automix_dist.resize import RESIZE_METHODS

    size, method = config.image_size, RESIZE_METHODS[config.resize]
    if not train:
        return [augment.CropResizeDecoder(size, (config.eval_crop_ratio,) * 2, method=method, sums=sums)]
    if config.crop == "resized":
        decoder = augment.CropResizeDecoder(
            size, config.crop_scale, config.crop_ratio, method=method, key=key, sums=sums
        )
    elif config.crop == "padded":
        reflect = config.pad_mode == "reflect"
        decoder = augment.PaddedCropDecoder(size, config.pad, reflect=reflect, key=key, sums=sums)
    else:
        decoder = augment.CropResizeDecoder(size, (1.0, 1.0), sums=sums)
    operations = [decoder]
    if config.flip:
        operations.append(augment.RandomFlip(key))
    if policy := config.rand_augment_policy():
        from automix_dist.rand_augment import RandAugment  # its compiled code is for those who use it

        operations.append(RandAugment(key, policy, config.mean))
    if config.color_jitter:
        operations.append(augment.ColorJitter(key, config.color_jitter))
    if config.random_erasing:
        pixel = config.erasing_mode == "pixel"
        operations.append(augment.RandomErasing(key, config.random_erasing, config.mean, config.std, pixel=pixel))
    return operations


def _storage_note(path: Path, size: int, free: int, config: DataConfig) -> str:
    numbers = f"{path}: {size / 1e9:.2f} GB, free memory {free / 1e9:.2f} GB"
    if size <= free:
        return f"{numbers}: the file stays in memory once it is read"
    if config.order == "quasi_random":
        return f"{numbers}: read from storage in every epoch, {config.chunk_size} neighbouring images at a time"
    return (
        f"{numbers}: read from storage in every epoch, image by image in random order; data.order=quasi_random "
        "reads neighbouring images together"
    )


def _free_memory() -> int:
    """Bytes of memory that can hold files: what the machine has available, or the limit of the container or job."""
    import psutil  # here, for policies need Batch where psutil may not be installed

    free, limit = psutil.virtual_memory().available, memory_limit()
    return free if limit is None else min(free, limit)


def count_workers(config: DataConfig) -> int:
    """Threads for one rank: as configured, or this process's cores shared between the ranks of the host."""
    import numba  # slow to import, and only loaders need it

    most = numba.config.NUMBA_NUM_THREADS
    if config.workers > most:
        raise ConfigError(f"data.workers = {config.workers}: this process may use {most} core(s); expected 0 to {most}")
    return config.workers or min(most, cores_of_rank())


class _ReadAhead:
    """Asks the kernel to read in the background what is needed soon, each chunk of the file once in an epoch.

    posix_fadvise waits for room in the device's queue where there is none, and lets other threads run meanwhile, which
    Python's mmap.madvise does not.

    Args:
        file: its descriptor.
        first_uses: (batch, start, end) of each chunk in the order of the batches that need it.
        horizon: how many batches before that it may be asked for.
        pace: how many chunks that are not needed for the next batch are asked for at once: a window of chunks comes
            while the one before is used, and not all at its first batch.
    """

    def __init__(self, file: int, first_uses: Iterator[tuple[int, int, int]], horizon: int, pace: int):
        self._file, self._first_uses, self._horizon, self._pace = file, first_uses, horizon, pace
        self._next = next(first_uses, None)

    def before(self, number: int) -> None:
        """Ask for what the batch after `number` needs, and some of what is needed later."""
        spare = self._pace
        while self._next is not None:
            batch, start, end = self._next
            if batch > number + 1:
                if not spare or batch > number + self._horizon:
                    return
                spare -= 1
            for at in range(start, end, PIECE):
                os.posix_fadvise(self._file, at, min(PIECE, end - at), os.POSIX_FADV_WILLNEED)
            self._next = next(self._first_uses, None)


class _Worker:
    """A daemon thread that runs calls one after another, and ends with its owner.

    concurrent.futures' own pool would do, but it makes the interpreter wait for its threads at exit, forever if one
    is stuck in a read from dead storage.
    """

    def __init__(self, threads: int):
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_run_calls, args=(self._calls, threads), name="automix-loader", daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, _end_thread, self._calls, self._thread)

    def submit(self, function, *arguments) -> Future:
        if not self._end.alive:
            raise LoaderError("this loader is closed")
        future: Future = Future()
        self._calls.put((future, function, arguments))
        return future

    def result(self, future: Future, path: Path):
        """What the call returned or raised. Raises LoaderError, with the place where the thread stands, on a stall."""
        look = min(LOOK_SECONDS, STALL_SECONDS)
        silent = 0.0
        while silent < STALL_SECONDS:
            began = time.monotonic()
            try:
                return future.result(timeout=look)
            except TimeoutError:
                if future.done():  # just now; or it is the call's own error
                    return future.result()
            # Of a job that was suspended meanwhile, the sleep is not the storage's silence.
            silent += min(time.monotonic() - began, 2 * look)
        frame = sys._current_frames().get(self._thread.ident)
        at = traceback.extract_stack(frame)[-1] if frame else None
        place = f"its thread stands at {at.filename}:{at.lineno} in {at.name}" if at else "its thread has ended"
        raise LoaderError(f"no batch from {path} for {STALL_SECONDS:g} s; {place}. Is its storage alive?")

    def close(self) -> None:
        self._end()


def _end_thread(calls: queue.SimpleQueue, thread: threading.Thread) -> None:
    """Drop the calls that wait, and wait for the one that runs: at exit it would find the interpreter gone."""
    with contextlib.suppress(queue.Empty):
        while True:
            calls.get_nowait()[0].cancel()
    calls.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=EXIT_SECONDS)


def _run_calls(calls: queue.SimpleQueue, threads: int) -> None:
    import numba

    numba.set_num_threads(threads)  # of this thread only
    while (call := calls.get()) is not None:
        future, function, arguments = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # delivered to the consumer, whatever it is
                future.set_exception(error)
        del call, future, function, arguments  # a waiting thread must not keep the last batch or its owner alive
