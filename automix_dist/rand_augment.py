"""RandAugment on timm's increasing operations, as an FFCV operation whose draws depend on (seed, epoch, sample) alone.

Pixels are those of the functions in timm.data.auto_augment, which call Pillow's: tables and enhancers to the bit;
geometric operations interpolate bicubically in Pillow's order of float64 operations, and fill what lies outside with
the data set's mean.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from automix_dist.augment import BRIGHTNESS, CONTRAST, SATURATION, AugmentKey, InPlace, adjust_colour, blend
from automix_dist.compiled_loops import compiled
from automix_dist.config import RandAugmentPolicy
from automix_dist.random_streams import POLICY, stream_of, uniform
from automix_dist.resize import SLACK

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
)  # fmt: skip
"""timm's names, in its order."""

AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR = range(8)
ENHANCE_CONTRAST, ENHANCE_BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(8, 15)

DRAWS = 5
"""Random numbers that a step uses: operation, whether to apply it, two for its magnitude, sign."""


@compiled()
def policy_step(step, policy, key):
    """(operation, argument) of one step of an image's policy, as timm's RandAugment and AugmentOp draw them; operation
    -1 = none. The argument is that of timm's function: degrees, bits, threshold, summand, factor or share."""
    magnitude, deviation, most, probability = policy
    if uniform(key, DRAWS * step + 1) > probability:
        return -1, 0.0
    operation = int(uniform(key, DRAWS * step) * len(OPERATIONS))
    if deviation > 100:
        magnitude *= uniform(key, DRAWS * step + 2)
    else:
        length = math.sqrt(-2 * math.log(1 - uniform(key, DRAWS * step + 2)))
        magnitude += deviation * length * math.cos(2 * math.pi * uniform(key, DRAWS * step + 3))
    level = min(max(magnitude, 0.0), most) / 10
    sign = -1.0 if uniform(key, DRAWS * step + 4) > 0.5 else 1.0
    if operation == ROTATE:
        return operation, sign * 30 * level
    if operation == POSTERIZE:
        return operation, 4.0 - int(4 * level)
    if operation == SOLARIZE:
        return operation, 256.0 - min(256, int(256 * level))
    if operation == SOLARIZE_ADD:
        return operation, float(min(128, int(110 * level)))
    if operation in (COLOR, ENHANCE_CONTRAST, ENHANCE_BRIGHTNESS, SHARPNESS):
        return operation, max(0.1, 1 + sign * 0.9 * level)
    if operation in (SHEAR_X, SHEAR_Y):
        return operation, sign * 0.3 * level
    if operation in (TRANSLATE_X, TRANSLATE_Y):
        return operation, sign * 0.45 * level
    return operation, 0.0


@compiled()
def apply_operation(image, operation, argument, fill):
    """Change an image [H, W, 3] uint8, contiguous, as timm's function of that number does. fill: [3] uint8."""
    height, width = image.shape[0], image.shape[1]
    if operation in (AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD):
        _look_up(image, _table(image, operation, int(argument)))
    elif operation == COLOR:
        adjust_colour(image.reshape(-1), SATURATION, argument)
    elif operation == ENHANCE_CONTRAST:
        adjust_colour(image.reshape(-1), CONTRAST, argument)
    elif operation == ENHANCE_BRIGHTNESS:
        adjust_colour(image.reshape(-1), BRIGHTNESS, argument)
    elif operation == SHARPNESS:
        _sharpen(image, np.float32(argument))
    elif operation == SHEAR_X:
        _warp(image, (1.0, argument, 0.0), (0.0, 1.0, 0.0), fill)
    elif operation == SHEAR_Y:
        _warp(image, (1.0, 0.0, 0.0), (argument, 1.0, 0.0), fill)
    elif operation == TRANSLATE_X:
        _warp(image, (1.0, 0.0, argument * width), (0.0, 1.0, 0.0), fill)
    elif operation == TRANSLATE_Y:
        _warp(image, (1.0, 0.0, 0.0), (0.0, 1.0, argument * height), fill)
    elif operation == ROTATE:
        angle = -math.radians(argument)
        cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)  # as Pillow does
        x, y = width / 2, height / 2
        across, down = (cosine, sine, -cosine * x - sine * y + x), (-sine, cosine, sine * x - cosine * y + y)
        _warp(image, across, down, fill)


@compiled()
def _table(image, operation, argument):
    """[3, 256] uint8, what becomes of each value of each channel."""
    table = np.empty((3, 256), np.uint8)
    counts = np.zeros((3, 256), np.int64)
    if operation in (AUTO_CONTRAST, EQUALIZE):
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                for channel in range(3):
                    counts[channel, image[y, x, channel]] += 1
    for channel in range(3):
        low, high = 0, 255
        while low < 255 and counts[channel, low] == 0:
            low += 1
        while high > 0 and counts[channel, high] == 0:
            high -= 1
        step = (image.shape[0] * image.shape[1] - counts[channel, high]) // 255
        below = step // 2
        scale = 255.0 / max(high - low, 1)
        for value in range(256):
            new = value
            if operation == AUTO_CONTRAST and high > low:
                new = int(value * scale + -low * scale)
            elif operation == EQUALIZE and high > low and step > 0:
                new = below // step
                below += counts[channel, value]
            elif operation == POSTERIZE:
                new = value & ~(2 ** (8 - argument) - 1)
            elif operation == INVERT or (operation == SOLARIZE and value >= argument):
                new = 255 - value
            elif operation == SOLARIZE_ADD and value < 128:
                new = value + argument
            table[channel, value] = min(max(new, 0), 255)
    return table


@compiled()
def _look_up(image, table):
    flat = image.reshape(-1)
    for place in range(0, len(flat), 3):
        for channel in range(3):
            flat[place + channel] = table[channel, flat[place + channel]]


@compiled()
def _sharpen(image, factor):
    """Blend with the image smoothed by 3 x 3 weights of 1 and 5 in the middle; the outermost pixels stay."""
    source = image.copy()
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            for channel in range(3):
                total = 4 * np.int32(source[y, x, channel])
                for row in range(y - 1, y + 2):
                    for column in range(x - 1, x + 2):
                        total += np.int32(source[row, column, channel])
                image[y, x, channel] = blend(source[y, x, channel], (2 * total + 13) // 26, factor)


# Pillow interpolates one value after the other, in float64; here the channels of a pixel lie in one vector, to which
# the same operations happen in the same order. A pixel's load takes a byte more.

_VALUES = ir.VectorType(ir.DoubleType(), 4)


def _load_pixel(builder, address):
    """The pixel at an address as a vector of float64; the fourth value is not used."""
    loaded = builder.load(builder.inttoptr(address, ir.VectorType(ir.IntType(8), 4).as_pointer()), align=1)
    return builder.uitofp(loaded, _VALUES)


def _cubic(builder, values, x):
    """Pillow's cubic through four neighbouring vectors, at x in [0, 1) between the second and the third."""
    a, b, c, d = values
    x = _broadcast(builder, x)
    first = builder.fsub(c, a)
    twice = builder.fsub(a, b)
    second = builder.fsub(builder.fadd(builder.fadd(twice, twice), c), d)
    third = builder.fadd(builder.fsub(builder.fsub(b, a), c), d)
    inner = builder.fadd(second, builder.fmul(x, third))
    return builder.fadd(b, builder.fmul(x, builder.fadd(first, builder.fmul(x, inner))))


def _broadcast(builder, value):
    one = builder.insert_element(ir.Constant(_VALUES, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4))


def _store_pixel(builder, values, address) -> None:
    """Cut values off at 0 and 255, round them towards zero and store three of them."""
    low, high = ir.Constant(_VALUES, [0.0] * 4), ir.Constant(_VALUES, [255.0] * 4)
    values = builder.select(builder.fcmp_ordered("<", values, low), low, values)
    values = builder.select(builder.fcmp_ordered(">", values, high), high, values)
    for channel in range(3):
        value = builder.extract_element(values, ir.IntType(32)(channel))
        pointer = builder.inttoptr(builder.add(address, ir.IntType(64)(channel)), ir.IntType(8).as_pointer())
        builder.store(builder.fptoui(value, ir.IntType(8)), pointer)


@intrinsic
def _interpolate_line(typing_context, addresses, x, target):
    """Store the cubic through the pixels at four addresses, at x."""

    def codegen(context, builder, signature, arguments):
        addresses, x, target = arguments
        pixels = [_load_pixel(builder, builder.extract_value(addresses, i)) for i in range(4)]
        _store_pixel(builder, _cubic(builder, pixels, x), target)
        return context.get_dummy_value()

    return types.void(types.UniTuple(types.int64, 4), types.float64, types.int64), codegen


@intrinsic
def _interpolate_square(typing_context, rows, columns, x, y, target):
    """Store the cubic, at y, through the cubics, at x, through the pixels at rows' addresses + columns' offsets."""

    def codegen(context, builder, signature, arguments):
        rows, columns, x, y, target = arguments
        lines = []
        for i in range(4):
            row = builder.extract_value(rows, i)
            addresses = [builder.add(row, builder.extract_value(columns, j)) for j in range(4)]
            lines.append(_cubic(builder, [_load_pixel(builder, address) for address in addresses], x))
        _store_pixel(builder, _cubic(builder, lines, y), target)
        return context.get_dummy_value()

    four = types.UniTuple(types.int64, 4)
    return types.void(four, four, types.float64, types.float64, types.int64), codegen


@compiled()
def _around(first, count, unit):
    """Where the four neighbours first - 1 .. first + 2 lie, in units, each moved into 0 .. count - 1."""
    last = count - 1
    return (
        unit * max(first - 1, 0), unit * max(first, 0), unit * min(first + 1, last), unit * min(first + 2, last)
    )  # fmt: skip


@compiled()
def _warp(image, across, down, fill):
    """Take each pixel of an image from x = across . (x, y, 1), y = down . (x, y, 1) of it, or from fill outside."""
    height, width = image.shape[0], image.shape[1]
    copy = np.empty(image.size + SLACK, np.uint8)
    copy[: image.size] = image.reshape(-1)
    source, target = np.int64(copy.ctypes.data), np.int64(image.ctypes.data)
    for row in range(height):
        for column in range(width):
            x = across[0] * (column + 0.5) + across[1] * (row + 0.5) + across[2]
            y = down[0] * (column + 0.5) + down[1] * (row + 0.5) + down[2]
            if not (0 <= x < width and 0 <= y < height):
                for channel in range(3):
                    image[row, column, channel] = fill[channel]
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            dx, dy = x - 0.5 - left, y - 0.5 - top
            columns, rows = _around(left, width, 3), _around(top, height, 3 * width)
            address = target + 3 * (row * width + column)
            if dy == 0:  # as in horizontal shears and shifts: the cubic is its second value
                start = source + rows[1]
                line = (start + columns[0], start + columns[1], start + columns[2], start + columns[3])
                _interpolate_line(line, dx, address)
            elif dx == 0:
                start = source + columns[1]
                line = (start + rows[0], start + rows[1], start + rows[2], start + rows[3])
                _interpolate_line(line, dy, address)
            else:
                lines = (source + rows[0], source + rows[1], source + rows[2], source + rows[3])
                _interpolate_square(lines, columns, dx, dy, address)


@compiled(parallel=True)
def _apply_policy(images, indices, key, steps, policy, fill):
    """Take the steps of each image's policy on images [B, H, W, 3], in place."""
    for i in prange(len(indices)):
        stream = stream_of(key, indices[i], POLICY)
        for step in range(steps):
            operation, argument = policy_step(step, policy, stream)
            apply_operation(images[i], operation, argument, fill)


class RandAugment(InPlace):
    """Random operations of a policy on each image. mean: on the [0, 1] scale; fills what comes from outside of it."""

    def __init__(self, key: AugmentKey, policy: RandAugmentPolicy, mean: Sequence[float]):
        super().__init__()
        self.key, self.policy = key, policy
        self.fill = np.array([min(255, round(255 * value)) for value in mean], np.uint8)

    def loop(self) -> tuple[Callable, tuple]:
        values = self.policy.magnitude, self.policy.std, self.policy.most, self.policy.probability
        return _apply_policy, (self.key.address, int(self.policy.count), tuple(map(float, values)), self.fill)
