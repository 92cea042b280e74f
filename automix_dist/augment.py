"""FFCV operations whose every random choice is a function of (seed, epoch, sample id).

FFCV's own random operations draw from the generators of the threads that happen to run them, so that the same seed
gives other pixels each time. Here a counter-based hash of (seed, epoch, sample id, operation) replaces the generators:
the same sample gets the same pixels for any number of threads, ranks and batch sizes, and after any restart.

The loops are compiled functions of this module, kept in numba's cache on disk, with all settings as arguments: no
process but the first compiles them, and no new epoch or crop does. Each operation's `generate_code` returns a few lines
that call them, which runs as it is and in FFCV's own Loader too (with `os_cache=True`).

Decoders share the storage state of FFCV's memory-mapped reading: (file bytes, sorted places, their sizes).
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

_threads = torch.get_num_threads()
from ffcv import libffcv  # noqa: E402 - importing FFCV sets torch's thread count to 1 ...
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

torch.set_num_threads(_threads)  # ... which would starve everything else in the process

JPEG = 0
"""FFCV's number for images stored as JPEG; others are raw pixels."""

OK, UNREADABLE, ALTERED = 0, 1, 2
"""What a decoder reports of each sample: decoded; its JPEG is damaged; its bytes are not those that were written."""

CROP, FLIP = 1, 2  # the operations' own streams of random numbers


def _compiled(*, parallel: bool = False) -> Callable:
    """numba's njit, keeping what it compiled on disk. No fastmath: crops could differ by a pixel between processors."""

    def decorate(function: Callable) -> Callable:
        options = {"nogil": True, "error_model": "numpy", "parallel": parallel}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile every time
            return njit(**options)(function)

    return decorate


def _c_function(name: str, signature: types.FunctionType) -> types.ExternalFunction:
    """A function of FFCV's library for compiled code, called by name: code with an address cannot be kept on disk."""
    symbol = f"automix_ffcv_{name}"
    address = ctypes.cast(getattr(libffcv.lib, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, signature)


_imdecode = _c_function(
    "imdecode", types.int32(types.uintp, types.uint64, types.uint32, types.uint32, types.uintp, *[types.uint32] * 8)
)
_resize = _c_function("resize", types.void(*[types.int64] * 11))
_memcpy = _c_function("my_memcpy", types.void(types.uintp, types.uintp, types.uint64))


@intrinsic
def _uint64_at(typing_context, address):
    """The uint64 in memory at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.uint64(types.uintp), codegen


@_compiled()
def mix(x):
    """Splitmix64's mixing of 64 bits: a bijection in which each bit of x decides about half of the result's."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compiled()
def stream_key(seed, epoch, sample, operation):
    """Where one operation's random numbers for one sample in one epoch start."""
    step = np.uint64(0x9E3779B97F4A7C15)
    key = mix(np.uint64(seed) + step)
    key = mix(key + np.uint64(epoch) + step)
    key = mix(key + np.uint64(sample) + step)
    return mix(key + np.uint64(operation) + step)


@_compiled()
def uniform(key, i):
    """Random number i of a stream, in [0, 1) with 53 bits."""
    bits = mix(key + np.uint64(0x9E3779B97F4A7C15) * np.uint64(i + 1))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@_compiled()
def random_box(height, width, scale_low, scale_high, ratio_low, ratio_high, key):
    """(top, left, height, width) of a random resized crop, distributed as torchvision's RandomResizedCrop.get_params:
    ten tries of area and log aspect ratio, then the largest centre box of an allowed ratio."""
    for attempt in range(10):
        area = height * width * (scale_low + (scale_high - scale_low) * uniform(key, 4 * attempt))
        log_low, log_high = math.log(ratio_low), math.log(ratio_high)
        ratio = math.exp(log_low + (log_high - log_low) * uniform(key, 4 * attempt + 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(key, 4 * attempt + 2) * (height - h + 1))
            left = int(uniform(key, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width < ratio_low * height:
        h = max(1, round(width / ratio_low))
    elif width > ratio_high * height:
        w = max(1, round(height * ratio_high))
    return (height - h) // 2, (width - w) // 2, h, w


@_compiled()
def centre_box(height, width, ratio):
    """(top, left, height, width) of the centre square with side ratio x the shorter side."""
    side = max(1, round(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


@_compiled()
def _pixels(image, storage, scratch, sum_address):
    """(address of an image's pixels, status): in the file if they are raw, decoded into scratch if JPEG.

    With a sum (address not 0) the stored bytes are compared with it first; see beton.word_sum.
    """
    data, places, sizes = storage
    start = image["data_ptr"]
    size = sizes[np.searchsorted(places, start)]
    if sum_address != 0:
        words = data[start : start + (size + np.uint64(7)) // np.uint64(8) * np.uint64(8)].view(np.uint64)
        total, weight = np.uint64(0), np.uint64(1)
        for i in range(len(words)):
            total += (words[i] ^ (words[i] >> np.uint64(32))) * weight
            weight += np.uint64(2)
        if total != _uint64_at(sum_address):
            return np.uint64(0), ALTERED
    source = np.uint64(data.ctypes.data) + start
    if image["mode"] != JPEG:
        return source, OK
    height, width = np.uint32(image["height"]), np.uint32(image["width"])
    pixels = np.uint64(scratch.ctypes.data)
    if _imdecode(source, size, height, width, pixels, height, width, 0, 0, 1, 1, 0, 0) != 0:
        return np.uint64(0), UNREADABLE
    return pixels, OK


# A task decodes a few samples, one after another, into a buffer of its own: memory goes with the number of threads,
# where FFCV's decoders hold one such buffer for each image of each batch ahead.

SAMPLES_PER_TASK = 4


@_compiled(parallel=True)
def _crop_and_resize(indices, images, status, records, storage, largest, sums, key, scale, ratio):
    """Decode, crop and area-resize samples into images [B, H, W, 3].

    key: address of (seed, epoch) for random boxes within scale and ratio (low, high); 0 = centre boxes of scale[0].
    """
    for task in prange((len(indices) + SAMPLES_PER_TASK - 1) // SAMPLES_PER_TASK):
        scratch = np.empty(largest, np.uint8)
        for i in range(task * SAMPLES_PER_TASK, min((task + 1) * SAMPLES_PER_TASK, len(indices))):
            sample = indices[i]
            image = records[sample]
            height, width = int(image["height"]), int(image["width"])
            sum_address = sums + np.uint64(8) * np.uint64(sample) if sums != 0 else np.uint64(0)
            pixels, status[i, 0] = _pixels(image, storage, scratch, sum_address)
            if status[i, 0] != OK:
                continue
            if key != 0:
                stream = stream_key(_uint64_at(key), _uint64_at(key + np.uint64(8)), sample, CROP)
                top, left, h, w = random_box(height, width, scale[0], scale[1], ratio[0], ratio[1], stream)
            else:
                top, left, h, w = centre_box(height, width, scale[0])
            target = images[i]
            _resize(
                0, pixels, height, width, top, top + h, left, left + w,
                target.ctypes.data, target.shape[0], target.shape[1],
            )  # fmt: skip


@_compiled()
def _source_position(position, size, reflect):
    """Which pixel of a row of `size` stands at a position that may lie outside of it; -1 = none (zero padding)."""
    if 0 <= position < size:
        return position
    if not reflect:
        return -1
    return -position if position < 0 else 2 * (size - 1) - position


@_compiled(parallel=True)
def _pad_and_crop(indices, images, status, records, storage, largest, sums, key, pad, reflect):
    """Decode samples, pad them on each side and cut a random [H, W] out of each into images [B, H, W, 3]."""
    for task in prange((len(indices) + SAMPLES_PER_TASK - 1) // SAMPLES_PER_TASK):
        scratch = np.empty(largest, np.uint8)
        for i in range(task * SAMPLES_PER_TASK, min((task + 1) * SAMPLES_PER_TASK, len(indices))):
            sample = indices[i]
            image = records[sample]
            height, width = int(image["height"]), int(image["width"])
            sum_address = sums + np.uint64(8) * np.uint64(sample) if sums != 0 else np.uint64(0)
            pixels, status[i, 0] = _pixels(image, storage, scratch, sum_address)
            if status[i, 0] != OK:
                continue
            if pixels != np.uint64(scratch.ctypes.data):
                _memcpy(pixels, np.uint64(scratch.ctypes.data), np.uint64(3 * height * width))
            stream = stream_key(_uint64_at(key), _uint64_at(key + np.uint64(8)), sample, CROP)
            top = int(uniform(stream, 0) * (height + 2 * pad - images.shape[1] + 1)) - pad
            left = int(uniform(stream, 1) * (width + 2 * pad - images.shape[2] + 1)) - pad
            for y in range(images.shape[1]):
                row = _source_position(top + y, height, reflect)
                for x in range(images.shape[2]):
                    column = _source_position(left + x, width, reflect)
                    for channel in range(3):
                        inside = row >= 0 and column >= 0
                        images[i, y, x, channel] = scratch[(row * width + column) * 3 + channel] if inside else 0


@_compiled(parallel=True)
def _flip(images, indices, key):
    """Mirror about half of images [B, H, W, 3] from left to right, in place."""
    height, width = images.shape[1], images.shape[2]
    for i in prange(len(indices)):
        stream = stream_key(_uint64_at(key), _uint64_at(key + np.uint64(8)), indices[i], FLIP)
        if uniform(stream, 0) < 0.5:
            for y in range(height):
                for x in range(width // 2):
                    for channel in range(3):
                        left = images[i, y, x, channel]
                        images[i, y, x, channel] = images[i, y, width - 1 - x, channel]
                        images[i, y, width - 1 - x, channel] = left


class AugmentKey:
    """The (seed, epoch) that a pipeline's random operations share, at a fixed address that compiled code reads.

    Changing the epoch changes what they draw without compiling anything again.
    """

    def __init__(self, seed: int):
        self._values = np.array([seed, 0], np.uint64)

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on."""
        self._values[1] = epoch

    @property
    def address(self) -> np.uint64:
        return np.uint64(self._values.ctypes.data)


class _Decoder(SimpleRGBImageDecoder):
    """What the decoders share: they fill (images uint8 [B, size, size, 3], status int32 [B, 1]).

    sums: [count] uint64, beton.word_sum of each stored image, compared before decoding; None = not compared.
    """

    def __init__(self, size: int, sums: np.ndarray | None):
        super().__init__()
        self.size = size
        self.sums = sums

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (self.size, self.size, 3)
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
        return state, (AllocationQuery(shape, np.dtype("u1")), AllocationQuery((1,), np.dtype("i4")))

    def _buffer_size(self, images_of: np.ndarray) -> int:
        """Bytes of the largest image among some records."""
        return int((3 * images_of["height"].astype(np.int64) * images_of["width"]).max(initial=0))

    def _sums_address(self) -> np.uint64:
        return np.uint64(0 if self.sums is None else self.sums.ctypes.data)


class CropResizeDecoder(_Decoder):
    """Decode, cut out a box and resize it to size x size by area averaging (OpenCV's, bilinear where it enlarges).

    With a key: a random box whose share of the image's area lies in scale and whose aspect ratio in ratio, both
    (low, high), as torchvision's RandomResizedCrop draws it. Without: the centre square with side scale[0] x the
    shorter side.
    """

    def __init__(self, size, scale, ratio=(1.0, 1.0), *, key: AugmentKey | None = None, sums: np.ndarray | None = None):
        super().__init__(size, sums)
        self.scale, self.ratio = tuple(map(float, scale)), tuple(map(float, ratio))
        self.key = key

    def generate_code(self) -> Callable:
        largest, sums = self._buffer_size(self.metadata[self.metadata["mode"] == JPEG]), self._sums_address()
        scale, ratio = self.scale, self.ratio
        key = np.uint64(0) if self.key is None else self.key.address

        def decode(indices, memory, records, storage):
            images, status = memory
            _crop_and_resize(indices, images, status, records, storage, largest, sums, key, scale, ratio)
            return images

        return decode


class PaddedCropDecoder(_Decoder):
    """Decode, add pad pixels on each side (zero, or the image reflected) and cut out size x size at a random place."""

    def __init__(self, size: int, pad: int, *, reflect: bool, key: AugmentKey, sums: np.ndarray | None = None):
        super().__init__(size, sums)
        self.pad, self.reflect, self.key = pad, reflect, key

    def generate_code(self) -> Callable:
        largest, sums = self._buffer_size(self.metadata), self._sums_address()
        pad, reflect, key = self.pad, self.reflect, self.key.address

        def decode(indices, memory, records, storage):
            images, status = memory
            _pad_and_crop(indices, images, status, records, storage, largest, sums, key, pad, reflect)
            return images

        return decode


class RandomFlip(Operation):
    """Mirror each image with probability 1/2, in place."""

    def __init__(self, key: AugmentKey):
        super().__init__()
        self.key = key

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        key = self.key.address

        def flip(images, memory, indices):
            _flip(images, indices, key)
            return images

        flip.with_indices = True
        return flip
