"""FFCV operations whose every random choice is a function of (seed, epoch, sample id).

FFCV's own random operations draw from the generators of the threads that happen to run them, so that the same seed
gives other pixels each time. Here hashes of (seed, epoch, sample id, operation) replace them (random_streams.py): the
same sample gets the same pixels for any number of threads, ranks and batch sizes, and after any restart.

The loops are compiled functions, kept on disk (compiled_loops.py), with all settings as arguments: no process but the
first compiles them, and no new epoch or crop does. Each operation's `generate_code` returns a few lines
that call them, which runs as it is and in FFCV's own Loader too (with `os_cache=True`).

Decoders share the storage state of FFCV's memory-mapped reading: (file bytes, sorted offsets, their sizes). They decode
the crop alone (jpeg.py) and resize it (resize.py), both faster than FFCV's own, which call OpenCV.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numba import prange, types

from automix_dist import jpeg
from automix_dist.compiled_loops import c_function, compiled, uint64_at
from automix_dist.ffcv_parts import AllocationQuery, Operation, SimpleRGBImageDecoder, State, libffcv
from automix_dist.random_streams import CROP, ERASE, FLIP, GOLDEN_GAMMA, JITTER, splitmix64, stream_of, uniform
from automix_dist.resize import AREA, SLACK, resample, whole_size

JPEG = 0
"""FFCV's number for images stored as JPEG; others are raw pixels."""

OK, UNREADABLE, ALTERED = 0, 1, 2
"""What a decoder reports of each sample: decoded; its JPEG is damaged; its bytes are not those that were written."""

_decode_box = c_function(
    jpeg.library(), "automix_decode_box", types.int32(types.uintp, types.uint64, *[types.uint32] * 6, types.uintp)
)
_memcpy = c_function(libffcv.lib, "my_memcpy", types.void(types.uintp, types.uintp, types.uint64))


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
    data, offsets, sizes = storage
    start = image["data_ptr"]
    size = sizes[np.searchsorted(offsets, start)]
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


# A task decodes a few samples, one after another, into a buffer of its own: memory goes with the number of threads,
# where FFCV's decoders hold one such buffer for each image of each batch ahead.

SAMPLES_PER_TASK = 4


@compiled(parallel=True)
def _crop_and_resize(indices, images, status, records, storage, largest, sums, key, scale, ratio, method):
    """Decode, crop and resize samples into images [B, H, W, 3]; a sample beyond the last record is a copy of an image.

    key: address of (seed, epoch) for random boxes within scale and ratio (low, high); 0 = centre crops of scale[0].
    """
    for task in prange((len(indices) + SAMPLES_PER_TASK - 1) // SAMPLES_PER_TASK):
        scratch = np.empty(largest + SLACK, np.uint8)
        for i in range(task * SAMPLES_PER_TASK, min((task + 1) * SAMPLES_PER_TASK, len(indices))):
            sample, number = indices[i], indices[i] % len(records)
            image = records[number]
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
                rows = whole_size(height, shorter, size, scale[0])
                columns = whole_size(width, shorter, size, scale[0])
                whole, first = (rows, columns), (round((rows - size) / 2), round((columns - size) / 2))
            sum_address = sums + np.uint64(8) * np.uint64(number) if sums != 0 else np.uint64(0)
            pixels, status[i, 0] = _pixels(image, storage, scratch, sum_address, box)
            if status[i, 0] == OK:
                resample(pixels, width, box, whole, first, method, target)


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
            sample, number = indices[i], indices[i] % len(records)
            image = records[number]
            height, width = int(image["height"]), int(image["width"])
            sum_address = sums + np.uint64(8) * np.uint64(number) if sums != 0 else np.uint64(0)
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


class InPlace(Operation):
    """An operation that changes a batch of images [B, H, W, 3] uint8 where it is."""

    def loop(self) -> tuple[Callable, tuple]:
        """A compiled function of the images, their indices [B] and settings; and the settings."""
        raise NotImplementedError

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        loop, settings = self.loop()

        def change(images, memory, indices):
            loop(images, indices, *settings)
            return images

        change.with_indices = True
        return change


class RandomFlip(InPlace):
    """Mirror each image with probability 1/2."""

    def __init__(self, key: AugmentKey):
        super().__init__()
        self.key = key

    def loop(self) -> tuple[Callable, tuple]:
        return _flip, (self.key.address,)


class ColorJitter(InPlace):
    """Change brightness, contrast and saturation by random factors in 1 -+ strength, in random order."""

    def __init__(self, key: AugmentKey, strength: float):
        super().__init__()
        self.key, self.strength = key, float(strength)

    def loop(self) -> tuple[Callable, tuple]:
        return _jitter, (self.key.address, self.strength)


class RandomErasing(InPlace):
    """Fill a random box of an image, with some probability; boxes as timm's RandomErasing draws them.

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

    def loop(self) -> tuple[Callable, tuple]:
        return _erase, (self.key.address, self.probability, self.quantiles)
