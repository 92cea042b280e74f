"""FFCV operations whose every random choice is a function of (seed, epoch, sample id).

FFCV's own random operations draw from the generators of the threads that happen to run them, so that the same seed
gives other pixels each time. Here a counter-based hash of (seed, epoch, sample id, operation) replaces the generators:
the same sample gets the same pixels for any number of threads, ranks and batch sizes, and after any restart.

The loops are compiled functions of this module, kept in numba's cache on disk, with all settings as arguments: no
process but the first compiles them, and no new epoch or crop does. Each operation's `generate_code` returns a few lines
that call them, which runs as it is and in FFCV's own Loader too (with `os_cache=True`).

Decoders share the storage state of FFCV's memory-mapped reading: (file bytes, sorted places, their sizes). They decode
the crop alone (jpeg.py) and resize it with compiled loops, both faster than FFCV's own, which call OpenCV.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import llvmlite.binding
import numba.typed
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

# Importing FFCV sets torch's thread count to 1, which would starve everything else in the process, and fills one of
# numba's typed dictionaries, for which numba compiles for four seconds: no compiled code reads it, so any dict does.
_threads, _typed_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
from ffcv import libffcv  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

from automix_dist import jpeg  # noqa: E402

torch.set_num_threads(_threads)
numba.typed.Dict = _typed_dict

JPEG = 0
"""FFCV's number for images stored as JPEG; others are raw pixels."""

OK, UNREADABLE, ALTERED = 0, 1, 2
"""What a decoder reports of each sample: decoded; its JPEG is damaged; its bytes are not those that were written."""

AREA, BILINEAR, BICUBIC = 0, 1, 2
"""How to resize: by area averaging as OpenCV's, or by Pillow's antialiased bilinear or bicubic filter."""

RESIZE_METHODS = {"area": AREA, "bilinear": BILINEAR, "bicubic": BICUBIC}

CROP, FLIP, JITTER, ERASE, POLICY = 1, 2, 3, 4, 5  # the operations' own streams of random numbers
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""What splitmix64 counts by: 2^64 over the golden ratio, made odd."""


class _Cache(FunctionCache):
    """What numba compiled, kept on disk where that can be: a full or broken disk costs time, and no training."""

    def load_overload(self, sig, target_context):
        with contextlib.suppress(OSError):
            return super().load_overload(sig, target_context)

    def save_overload(self, sig, data):
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def _cache_folder() -> str:
    """For these sources and this kind of processor alone: numba itself looks at the file of a function but not at those
    of the functions that it calls, and two processors that write at once would take each other's code."""
    package = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    for name in ("augment.py", "rand_augment.py"):
        digest.update((package / name).read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = package / "__pycache__" if os.access(package, os.W_OK) else Path(home, "automix_dist")
    return str(Path(numba.config.CACHE_DIR or place) / f"numba-{digest.hexdigest()[:16]}")


_CACHE_FOLDER = _cache_folder()


def compiled(*, parallel: bool = False) -> Callable:
    """numba's njit, keeping what it compiled on disk. No fastmath: crops could differ by a pixel between processors."""

    def decorate(function: Callable) -> Callable:
        dispatcher = njit(nogil=True, error_model="numpy", parallel=parallel)(function)
        asked, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE_FOLDER
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError:
            pass  # no folder can be written: compile every time
        finally:
            numba.config.CACHE_DIR = asked
        return dispatcher

    return decorate


def _c_function(library: ctypes.CDLL, name: str, signature: types.FunctionType) -> types.ExternalFunction:
    """A library's function for compiled code, called by name: code with an address in it cannot be kept on disk."""
    symbol = f"automix_loader_{name}"
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, signature)


_decode_box = _c_function(
    jpeg.library, "automix_decode_box", types.int32(types.uintp, types.uint64, *[types.uint32] * 6, types.uintp)
)
_resize = _c_function(libffcv.lib, "resize", types.void(*[types.int64] * 11))
_memcpy = _c_function(libffcv.lib, "my_memcpy", types.void(types.uintp, types.uintp, types.uint64))


@intrinsic
def uint64_at(typing_context, address):
    """The uint64 in memory at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.uint64(types.uintp), codegen


@compiled()
def splitmix64(x):
    """Splitmix64's mixing of 64 bits: a bijection in which each bit of x decides about half of the result's."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled()
def stream_key(seed, epoch, sample, operation):
    """Where one operation's random numbers for one sample in one epoch start."""
    key = splitmix64(np.uint64(seed) + GOLDEN_GAMMA)
    key = splitmix64(key + np.uint64(epoch) + GOLDEN_GAMMA)
    key = splitmix64(key + np.uint64(sample) + GOLDEN_GAMMA)
    return splitmix64(key + np.uint64(operation) + GOLDEN_GAMMA)


@compiled()
def stream_of(key, sample, operation):
    """`stream_key` where seed and epoch are two numbers in memory, at the address `key`."""
    return stream_key(uint64_at(key), uint64_at(key + np.uint64(8)), sample, operation)


@compiled()
def uniform(key, i):
    """Random number i of a stream, in [0, 1) with 53 bits."""
    bits = splitmix64(key + GOLDEN_GAMMA * np.uint64(i + 1))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled()
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


@compiled()
def centre_box(height, width, ratio):
    """(top, left, height, width) of the centre square with side ratio x the shorter side."""
    side = max(1, round(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


@compiled()
def _pixels(image, storage, scratch, sum_address, box):
    """(address of an image's pixels, status): in the file if they are raw, decoded into scratch if JPEG, where only the
    box (top, left, height, width) is then valid.

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
        if total != uint64_at(sum_address):
            return np.uint64(0), ALTERED
    source = np.uint64(data.ctypes.data) + start
    if image["mode"] != JPEG:
        return source, OK
    height, width = np.uint32(image["height"]), np.uint32(image["width"])
    pixels = np.uint64(scratch.ctypes.data)
    top, left, h, w = box
    if _decode_box(source, size, height, width, top, left, h, w, pixels) != 0:
        return np.uint64(0), UNREADABLE
    return pixels, OK


# Resize in two passes, the first one rounded to bytes, in Pillow's fixed point. An output value is a weighted sum over
# an interval of the source; where the image shrinks, the filter widens with it (antialiasing). The two inner loops are
# written as vectors, because LLVM does not find any in interleaved pixels. Loads may pass the end of a row or of a
# buffer by less than 16 bytes, whose weights are zero or whose results are not used.

PRECISION = 22
"""Bits after the point of a weight."""

SLACK = 16
"""Bytes that must follow a buffer of pixels that is resized. In a file, tables follow the last image."""

_INT, _BYTE = ir.IntType(32), ir.IntType(8)


def _load_bytes(builder, address, count: int):
    """`count` bytes in memory as a vector of int32."""
    loaded = builder.load(builder.inttoptr(address, ir.VectorType(_BYTE, count).as_pointer()), align=1)
    return builder.zext(loaded, ir.VectorType(_INT, count))


def _store_bytes(builder, sums, address, count: int) -> None:
    """Round a vector of weighted sums to bytes, 0 to 255, and store it."""
    kind = ir.VectorType(_INT, count)
    half, point, low, high = (ir.Constant(kind, [v] * count) for v in (1 << (PRECISION - 1), PRECISION, 0, 255))
    values = builder.ashr(builder.add(sums, half), point)
    values = builder.select(builder.icmp_signed("<", values, low), low, values)
    values = builder.select(builder.icmp_signed(">", values, high), high, values)
    whole = builder.trunc(values, ir.VectorType(_BYTE, count))
    builder.store(whole, builder.inttoptr(address, whole.type.as_pointer()), align=1)


def _shuffle(builder, vector, lanes: list[int]):
    mask = ir.Constant(ir.VectorType(_INT, len(lanes)), lanes)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def _weigh_pixels(typing_context, source, weights, pairs, target):
    """Store the weighted sum of 2 * pairs neighbouring RGB pixels, and one byte more.

    weights: int32 [pairs, 8]; the first three of a row weigh one pixel's channels, the next three the other's.
    """

    def codegen(context, builder, signature, arguments):
        source, weights, pairs, target = arguments
        kind = ir.VectorType(_INT, 8)
        total = cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * 8))
        with cgutils.for_range(builder, pairs) as loop:
            pixels = _load_bytes(builder, builder.add(source, builder.mul(loop.index, ir.IntType(64)(6))), 8)
            place = builder.add(weights, builder.mul(loop.index, ir.IntType(64)(32)))
            weight = builder.load(builder.inttoptr(place, kind.as_pointer()), align=4)
            builder.store(builder.add(builder.load(total), builder.mul(pixels, weight)), total)
        both = builder.load(total)
        one = builder.add(_shuffle(builder, both, [0, 1, 2, 6]), _shuffle(builder, both, [3, 4, 5, 7]))
        _store_bytes(builder, one, target, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _weigh_rows(typing_context, source, stride, weights, count, target):
    """Store 16 bytes, the weighted sum of `count` times 16 bytes that lie `stride` apart. weights: int32 [count]."""

    def codegen(context, builder, signature, arguments):
        source, stride, weights, count, target = arguments
        kind = ir.VectorType(_INT, 16)
        total = cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * 16))
        with cgutils.for_range(builder, count) as loop:
            values = _load_bytes(builder, builder.add(source, builder.mul(loop.index, stride)), 16)
            place = builder.add(weights, builder.mul(loop.index, ir.IntType(64)(4)))
            weight = builder.load(builder.inttoptr(place, _INT.as_pointer()), align=4)
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), weight, _INT(0))
            product = builder.mul(values, _shuffle(builder, first, [0] * 16))
            builder.store(builder.add(builder.load(total), product), total)
        _store_bytes(builder, builder.load(total), target, 16)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@compiled()
def _filter_weight(x, method):
    """The filter of a resize method at distance x from its centre."""
    x = abs(x)
    if method == BILINEAR:
        return max(1.0 - x, 0.0)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2:
        return -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
    return 0.0


@compiled()
def _fixed_point(weight):
    """A weight with PRECISION bits after the point, rounded."""
    return np.int32(int(weight * (1 << PRECISION) + (0.5 if weight >= 0 else -0.5)))


@compiled()
def _intervals(first, count, scale, length, method):
    """What Pillow weighs for outputs first .. first + count - 1 of a row of `length` reduced by `scale`.

    Returns starts [count], ends [count] and weights in fixed point [count, most].
    """
    stretch = max(scale, 1.0)
    support = stretch * (1.0 if method == BILINEAR else 2.0)
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    weights = np.zeros((count, 2 * math.ceil(support) + 1), np.int32)
    exact = np.empty(weights.shape[1])
    for i in range(count):
        centre = (first + i + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        end = min(int(centre + support + 0.5), length)
        total = 0.0
        for k in range(end - start):
            exact[k] = _filter_weight((k + start - centre + 0.5) * (1.0 / stretch), method)
            total += exact[k]
        for k in range(end - start):
            weights[i, k] = _fixed_point(exact[k] / total)
        starts[i], ends[i] = start, end
    return starts, ends, weights


@compiled()
def _area_intervals(count, scale, length):
    """As _intervals, what OpenCV's INTER_AREA weighs where an image shrinks: each pixel's share in an interval."""
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    weights = np.zeros((count, math.ceil(scale) + 2), np.int32)
    for i in range(count):
        starts[i], ends[i] = min(int(i * scale), length - 1), min(math.ceil((i + 1) * scale), length)
        for k in range(starts[i], ends[i]):
            share = min(k + 1.0, (i + 1) * scale) - max(float(k), i * scale)
            weights[i, k - starts[i]] = _fixed_point(max(share, 0.0) / scale)
    return starts, ends, weights


@compiled()
def _resample(pixels, width, box, whole, first, method, target):
    """Resize the box (top, left, height, width) of an image to whole (height, width), and keep the part that begins at
    first (row, column), (0, 0) for AREA, and has the size of target, [H, W, 3] with W at least 6.

    pixels: address of the image.
    """
    top, left, height, length = box
    if method == AREA and (height < whole[0] or length < whole[1]):  # OpenCV's own, which interpolates then, is fast
        _resize(
            0, pixels, top + height, width, top, top + height, left, left + length,
            target.ctypes.data, target.shape[0], target.shape[1],
        )  # fmt: skip
        return
    if method == AREA:
        row_starts, row_ends, row_weights = _area_intervals(whole[0], height / whole[0], height)
        starts, ends, weights = _area_intervals(whole[1], length / whole[1], length)
        rows_first = True  # the faster way
    else:
        row_starts, row_ends, row_weights = _intervals(first[0], target.shape[0], height / whole[0], height, method)
        starts, ends, weights = _intervals(first[1], target.shape[1], length / whole[1], length, method)
        rows_first = height - whole[0] > max(0, 2 * (length - whole[1]))  # Pillow's choice: the result depends on it
    count = ((ends - starts).max() + 1) // 2  # the same for all: a loop of known length is faster than a shorter one
    pairs = np.zeros((len(starts), count, 8), np.int32)
    for x in range(len(starts)):
        at = max(min(starts[x], ends[-1] - 2 * count), starts[0])  # as far to the left as it takes to end in the row
        for k in range(ends[x] - starts[x]):
            j = starts[x] - at + k
            for channel in range(3):
                pairs[x, j // 2, 3 * (j % 2) + channel] = weights[x, k]
        starts[x] = at
    if rows_first:
        _rows_then_pixels(pixels, width, top, left, starts, ends, pairs, row_starts, row_ends, row_weights, target)
    else:
        _pixels_then_rows(pixels, width, top, left, starts, pairs, row_starts, row_ends, row_weights, target)


@compiled()
def _pixels_then_rows(pixels, width, top, left, starts, pairs, row_starts, row_ends, row_weights, target):
    """_resample's horizontal pass and then its vertical one."""
    stride = 3 * target.shape[1]
    low, high = row_starts[0], row_ends[-1]
    rows = np.empty(stride * (high - low) + SLACK, np.uint8)
    for y in range(high - low):
        source = np.int64(pixels) + 3 * ((top + low + y) * width + left)
        for x in range(len(starts)):
            _weigh_pixels(
                source + 3 * starts[x],
                np.int64(pairs.ctypes.data) + 32 * pairs.shape[1] * x,
                pairs.shape[1],
                np.int64(rows.ctypes.data) + stride * y + 3 * x,
            )
    for y in range(target.shape[0]):
        source = np.int64(rows.ctypes.data) + stride * (row_starts[y] - low)
        for start in range(0, stride, 16):
            at = min(start, stride - 16)  # the last 16 bytes overlap those before: what follows is another image
            _weigh_rows(
                source + at,
                stride,
                np.int64(row_weights.ctypes.data) + 4 * row_weights.shape[1] * y,
                row_ends[y] - row_starts[y],
                np.int64(target.ctypes.data) + stride * y + at,
            )


@compiled()
def _rows_then_pixels(pixels, width, top, left, starts, ends, pairs, row_starts, row_ends, row_weights, target):
    """_resample's vertical pass and then its horizontal one."""
    low, size = starts[0], target.shape[0]
    stride = 3 * (ends[-1] - low)
    rows = np.empty(stride * size + SLACK, np.uint8)
    for y in range(size):
        source = np.int64(pixels) + 3 * ((top + row_starts[y]) * width + left + low)
        for at in range(0, stride, 16):
            _weigh_rows(
                source + at,
                3 * width,
                np.int64(row_weights.ctypes.data) + 4 * row_weights.shape[1] * y,
                row_ends[y] - row_starts[y],
                np.int64(rows.ctypes.data) + stride * y + at,
            )
    last = np.empty(3 * target.shape[1] + 1, np.uint8)  # a pixel is stored with one byte more: not into another image
    for y in range(size):
        to = np.int64(target.ctypes.data) + 3 * target.shape[1] * y
        if y == size - 1:
            to = np.int64(last.ctypes.data)
        for x in range(len(starts)):
            _weigh_pixels(
                np.int64(rows.ctypes.data) + stride * y + 3 * (starts[x] - low),
                np.int64(pairs.ctypes.data) + 32 * pairs.shape[1] * x,
                pairs.shape[1],
                to + 3 * x,
            )
    for x in range(target.shape[1]):
        for channel in range(3):
            target[size - 1, x, channel] = last[3 * x + channel]


@compiled()
def _whole_size(side, shorter, size, ratio):
    """Length of a side after the resize that brings the shorter one to size / ratio, as torchvision's Resize."""
    return int(round(size / ratio) * side / shorter)


# A task decodes a few samples, one after another, into a buffer of its own: memory goes with the number of threads,
# where FFCV's decoders hold one such buffer for each image of each batch ahead.

SAMPLES_PER_TASK = 4


@compiled(parallel=True)
def _crop_and_resize(indices, images, status, records, storage, largest, sums, key, scale, ratio, method):
    """Decode, crop and resize samples into images [B, H, W, 3].

    key: address of (seed, epoch) for random boxes within scale and ratio (low, high); 0 = centre crops of scale[0].
    """
    for task in prange((len(indices) + SAMPLES_PER_TASK - 1) // SAMPLES_PER_TASK):
        scratch = np.empty(largest + SLACK, np.uint8)
        for i in range(task * SAMPLES_PER_TASK, min((task + 1) * SAMPLES_PER_TASK, len(indices))):
            sample = indices[i]
            image = records[sample]
            height, width = int(image["height"]), int(image["width"])
            target, size = images[i], images.shape[1]
            whole, first = (size, size), (0, 0)
            if key != 0:
                stream = stream_of(key, sample, CROP)
                box = random_box(height, width, scale[0], scale[1], ratio[0], ratio[1], stream)
            elif method == AREA:
                box = centre_box(height, width, scale[0])
            else:  # the centre of the whole image's resize: unlike a resized centre box, it sees what lies around
                box, shorter = (0, 0, height, width), min(height, width)
                rows = _whole_size(height, shorter, size, scale[0])
                columns = _whole_size(width, shorter, size, scale[0])
                whole, first = (rows, columns), (round((rows - size) / 2), round((columns - size) / 2))
            sum_address = sums + np.uint64(8) * np.uint64(sample) if sums != 0 else np.uint64(0)
            pixels, status[i, 0] = _pixels(image, storage, scratch, sum_address, box)
            if status[i, 0] == OK:
                _resample(pixels, width, box, whole, first, method, target)


@compiled()
def _source_position(position, size, reflect):
    """Which pixel of a row of `size` stands at a position that may lie outside of it; -1 = none (zero padding)."""
    if 0 <= position < size:
        return position
    if not reflect:
        return -1
    return -position if position < 0 else 2 * (size - 1) - position


@compiled(parallel=True)
def _pad_and_crop(indices, images, status, records, storage, largest, sums, key, pad, reflect):
    """Decode samples, pad them on each side and cut a random [H, W] out of each into images [B, H, W, 3]."""
    for task in prange((len(indices) + SAMPLES_PER_TASK - 1) // SAMPLES_PER_TASK):
        scratch = np.empty(largest, np.uint8)
        for i in range(task * SAMPLES_PER_TASK, min((task + 1) * SAMPLES_PER_TASK, len(indices))):
            sample = indices[i]
            image = records[sample]
            height, width = int(image["height"]), int(image["width"])
            sum_address = sums + np.uint64(8) * np.uint64(sample) if sums != 0 else np.uint64(0)
            pixels, status[i, 0] = _pixels(image, storage, scratch, sum_address, (0, 0, height, width))
            if status[i, 0] != OK:
                continue
            if pixels != np.uint64(scratch.ctypes.data):
                _memcpy(pixels, np.uint64(scratch.ctypes.data), np.uint64(3 * height * width))
            stream = stream_of(key, sample, CROP)
            top = int(uniform(stream, 0) * (height + 2 * pad - images.shape[1] + 1)) - pad
            left = int(uniform(stream, 1) * (width + 2 * pad - images.shape[2] + 1)) - pad
            for y in range(images.shape[1]):
                row = _source_position(top + y, height, reflect)
                for x in range(images.shape[2]):
                    column = _source_position(left + x, width, reflect)
                    for channel in range(3):
                        inside = row >= 0 and column >= 0
                        images[i, y, x, channel] = scratch[(row * width + column) * 3 + channel] if inside else 0


@compiled(parallel=True)
def _flip(images, indices, key):
    """Mirror about half of images [B, H, W, 3] from left to right, in place."""
    height, width = images.shape[1], images.shape[2]
    for i in prange(len(indices)):
        stream = stream_of(key, indices[i], FLIP)
        if uniform(stream, 0) < 0.5:
            for y in range(height):
                for x in range(width // 2):
                    for channel in range(3):
                        left = images[i, y, x, channel]
                        images[i, y, x, channel] = images[i, y, width - 1 - x, channel]
                        images[i, y, width - 1 - x, channel] = left


@compiled()
def blend(value, other, factor):
    """Pillow's blend of two bytes: float32, cut off at 0 and 255, rounded towards zero."""
    mixed = np.float32(other) + factor * np.float32(np.int32(value) - np.int32(other))
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@compiled()
def _gray(image, place):
    """Pillow's gray value of the pixel that starts at a place of a flat image."""
    red, green, blue = np.uint32(image[place]), np.uint32(image[place + 1]), np.uint32(image[place + 2])
    return np.uint8((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)


BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2


@compiled()
def adjust_colour(image, kind, factor):
    """Brightness, contrast or saturation of a flat RGB image x factor, in place, as Pillow's ImageEnhance does it."""
    factor, count = np.float32(factor), len(image) // 3
    if kind == BRIGHTNESS:
        for place in range(len(image)):
            image[place] = blend(image[place], 0, factor)
    elif kind == CONTRAST:
        total = np.uint64(0)
        for i in range(count):
            total += np.uint64(_gray(image, 3 * i))
        mean = int(total / count + 0.5)
        for place in range(len(image)):
            image[place] = blend(image[place], mean, factor)
    else:
        for i in range(count):
            gray = _gray(image, 3 * i)
            image[3 * i] = blend(image[3 * i], gray, factor)  # written out: LLVM makes no vectors of an inner loop
            image[3 * i + 1] = blend(image[3 * i + 1], gray, factor)
            image[3 * i + 2] = blend(image[3 * i + 2], gray, factor)


@compiled()
def jitter_steps(strength, key):
    """((kind, factor), ...) of a colour jitter, distributed as torchvision's ColorJitter: any order, each factor
    uniform in 1 -+ strength."""
    first = int(uniform(key, 0) * 3)
    second = (first + 1 + int(uniform(key, 1) * 2)) % 3
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factors = (
        low + (high - low) * uniform(key, 2),
        low + (high - low) * uniform(key, 3),
        low + (high - low) * uniform(key, 4),
    )
    return (first, factors[0]), (second, factors[1]), (3 - first - second, factors[2])


@compiled(parallel=True)
def _jitter(images, indices, key, strength):
    """Change brightness, contrast and saturation of images [B, H, W, 3], in place."""
    flat = images.reshape(len(images), -1)
    for i in prange(len(indices)):
        stream = stream_of(key, indices[i], JITTER)
        for kind, factor in jitter_steps(strength, stream):
            adjust_colour(flat[i], kind, factor)


@compiled()
def erased_box(height, width, key):
    """(top, left, height, width) of a random erasing, distributed as timm's RandomErasing: ten tries of an area of 2 %
    to 33 % and an aspect ratio of 0.3 to 1 / 0.3; a box of height 0 if none fits. Uses random numbers 1 to 40."""
    for attempt in range(10):
        area = height * width * (0.02 + (1 / 3 - 0.02) * uniform(key, 4 * attempt + 1))
        ratio = math.exp(math.log(0.3) * (1 - 2 * uniform(key, 4 * attempt + 2)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top = int(uniform(key, 4 * attempt + 3) * (height - h + 1))
            left = int(uniform(key, 4 * attempt + 4) * (width - w + 1))
            return top, left, h, w
    return 0, 0, 0, 0


@compiled(parallel=True)
def _erase(images, indices, key, probability, quantiles):
    """Fill a random box of some images [B, H, W, 3], in place, with draws from quantiles, [3, 4096] for each channel.

    One hash is enough for the three channels of a pixel: 12 of its bits choose each value.
    """
    for i in prange(len(indices)):
        stream = stream_of(key, indices[i], ERASE)
        if uniform(stream, 0) < probability:
            top, left, height, width = erased_box(images.shape[1], images.shape[2], stream)
            start = splitmix64(stream + GOLDEN_GAMMA)  # a stream of its own for the pixels
            for y in range(top, top + height):
                for x in range(left, left + width):
                    bits = splitmix64(start + GOLDEN_GAMMA * np.uint64(y * images.shape[2] + x))
                    for channel in range(3):
                        images[i, y, x, channel] = quantiles[channel, bits & np.uint64(4095)]
                        bits >>= np.uint64(12)


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
    """Decode, cut out a box and resize it to size x size.

    With a key: a random box whose share of the image's area lies in scale and whose aspect ratio in ratio, both
    (low, high), as torchvision's RandomResizedCrop draws it. Without: the centre. For area averaging (OpenCV's,
    bilinear where it enlarges) that is the resized centre square with side scale[0] x the shorter side; for bilinear
    and bicubic, which are Pillow's, the centre size x size of the image resized to size / scale[0], as torchvision's
    Resize and CenterCrop take it.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float] = (1.0, 1.0),
        *,
        method: int = AREA,
        key: AugmentKey | None = None,
        sums: np.ndarray | None = None,
    ):
        super().__init__(size, sums)
        self.scale, self.ratio = tuple(map(float, scale)), tuple(map(float, ratio))
        self.method, self.key = method, key

    def generate_code(self) -> Callable:
        largest, sums = self._buffer_size(self.metadata[self.metadata["mode"] == JPEG]), self._sums_address()
        scale, ratio, method = self.scale, self.ratio, self.method
        key = np.uint64(0) if self.key is None else self.key.address

        def decode(indices, memory, records, storage):
            images, status = memory
            _crop_and_resize(indices, images, status, records, storage, largest, sums, key, scale, ratio, method)
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


class ColorJitter(Operation):
    """Change brightness, contrast and saturation by random factors in 1 -+ strength, in random order, in place."""

    def __init__(self, key: AugmentKey, strength: float):
        super().__init__()
        self.key, self.strength = key, float(strength)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        key, strength = self.key.address, self.strength

        def jitter(images, memory, indices):
            _jitter(images, indices, key, strength)
            return images

        jitter.with_indices = True
        return jitter


class RandomErasing(Operation):
    """Fill a random box of an image, with some probability, in place; boxes as timm's RandomErasing draws them.

    pixel: with normal noise of the data set's mean and std (both on the [0, 1] scale), cut off where bytes end;
    otherwise with the mean. After normalisation that is timm's `pixel` noise, or its constant 0.
    """

    def __init__(
        self, key: AugmentKey, probability: float, mean: Sequence[float], std: Sequence[float], *, pixel: bool
    ):
        super().__init__()
        self.key, self.probability = key, float(probability)
        normal = statistics.NormalDist()
        noise = np.array([normal.inv_cdf((i + 0.5) / 4096) if pixel else 0.0 for i in range(4096)])
        values = np.outer(std, noise) + np.array(mean)[:, None]
        self.quantiles = np.clip(np.rint(255 * values), 0, 255).astype(np.uint8)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        key, probability, quantiles = self.key.address, self.probability, self.quantiles

        def erase(images, memory, indices):
            _erase(images, indices, key, probability, quantiles)
            return images

        erase.with_indices = True
        return erase
