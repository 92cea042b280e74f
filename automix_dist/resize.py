"""Resizing boxes of images in compiled loops: areas as OpenCV averages them, or Pillow's antialiased filters.

Two passes, the first one rounded to bytes, in Pillow's fixed point. An output value is a weighted sum over an interval
of the source; where the image shrinks, the filter widens with it (antialiasing). The two inner loops are written as
vectors, because LLVM does not find any in interleaved pixels. Loads may pass the end of a row or of a buffer by less
than 16 bytes, whose weights are zero or whose results are not used.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from automix_dist.compiled_loops import c_function, compiled
from automix_dist.ffcv_parts import libffcv

AREA, BILINEAR, BICUBIC = 0, 1, 2
"""How to resize: by area averaging as OpenCV's, or by Pillow's antialiased bilinear or bicubic filter."""

RESIZE_METHODS = {"area": AREA, "bilinear": BILINEAR, "bicubic": BICUBIC}

PRECISION = 22
"""Bits after the point of a weight."""

SLACK = 16
"""Bytes that must follow a buffer of pixels that is resized. In a file, tables follow the last image."""

_ffcv_resize = c_function(libffcv.lib, "resize", types.void(*[types.int64] * 11))
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
            address = builder.add(weights, builder.mul(loop.index, ir.IntType(64)(32)))
            weight = builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)
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
            address = builder.add(weights, builder.mul(loop.index, ir.IntType(64)(4)))
            weight = builder.load(builder.inttoptr(address, _INT.as_pointer()), align=4)
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
def resample(pixels, width, box, whole, first, method, target):
    """Resize the box (top, left, height, width) of an image to whole (height, width), and keep the part that begins at
    first (row, column), (0, 0) for AREA, and has the size of target, [H, W, 3] with W at least 6.

    pixels: address of the image.
    """
    top, left, height, length = box
    if method == AREA and (height < whole[0] or length < whole[1]):  # OpenCV's own, which interpolates then, is fast
        _ffcv_resize(
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
    """resample's horizontal pass and then its vertical one."""
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
    """resample's vertical pass and then its horizontal one."""
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
def whole_size(side, shorter, size, ratio):
    """Length of a side after the resize that brings the shorter one to size / ratio, as torchvision's Resize."""
    return int(round(size / ratio) * side / shorter)
