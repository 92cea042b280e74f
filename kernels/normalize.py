"""uint8 pixels to normalised images in one pass: a Triton kernel and the torch op.

    output[b, c, y, x] = images[b, y, x, c] * (1 / (255 * std[c])) - mean[c] / std[c]

The output is in channels-last layout, so both are the same sequence of numbers in memory, whose channels take turns.
There is no gradient.
"""

import torch
import triton
import triton.language as tl
from automix_kernels.operators import Operator, cdiv
from torch import Tensor

LINES, WIDTH, ROUNDS = 128, 16, 2


@triton.jit
def scales(std_ptr):
    """1 / (255 std) of the three channels: three numbers, so that nothing is divided for each element."""
    red, green, blue = tl.load(std_ptr), tl.load(std_ptr + 1), tl.load(std_ptr + 2)
    return tl.div_rn(1.0, 255 * red), tl.div_rn(1.0, 255 * green), tl.div_rn(1.0, 255 * blue)


@triton.jit
def shifts(mean_ptr, std_ptr):
    """mean / std of the three channels"""
    red = tl.div_rn(tl.load(mean_ptr), tl.load(std_ptr))
    green = tl.div_rn(tl.load(mean_ptr + 1), tl.load(std_ptr + 1))
    return red, green, tl.div_rn(tl.load(mean_ptr + 2), tl.load(std_ptr + 2))


@triton.jit
def of_channel(channel, red, green, blue):
    """One of three numbers for each element: selected, as a load each would cost more. Where a thread's elements have
    fixed channels, the compiler leaves nothing of it."""
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def _of_lines(first, column, red, green, blue):
    """`of_channel` of the columns of lines that begin with channel `first`: each line chooses three numbers only."""
    return of_channel(
        column % 3,
        of_channel(first, red, green, blue),
        of_channel((first + 1) % 3, red, green, blue),
        of_channel((first + 2) % 3, red, green, blue),
    )


@triton.jit
def _normalize_kernel(
    images_ptr, mean_ptr, std_ptr, output_ptr, elements, ROUNDS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Grid: (chunks of 3 * ROUNDS tiles,). A tile has LINES of WIDTH consecutive elements, a line a thread.

    A line begins with one of three channels; three constants, chosen by it, are those of all its elements. Every third
    tile begins with the same channel, and shares the constants.
    """
    TILE: tl.constexpr = LINES * WIDTH
    start = tl.program_id(0).to(tl.int64) * (3 * ROUNDS * TILE)
    line = tl.arange(0, LINES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    red, green, blue = scales(std_ptr)
    red_shift, green_shift, blue_shift = shifts(mean_ptr, std_ptr)
    for turn in tl.static_range(3):
        first = (turn * TILE + line * WIDTH) % 3
        scale = _of_lines(first, column, red, green, blue)
        shift = _of_lines(first, column, red_shift, green_shift, blue_shift)
        for i in tl.static_range(ROUNDS):
            indices = start + ((3 * i + turn) * TILE + line * WIDTH + column)
            mask = indices < elements
            pixels = tl.load(images_ptr + indices, mask=mask, other=0).to(tl.float32)
            tl.store(output_ptr + indices, (pixels * scale - shift).to(output_ptr.dtype.element_ty), mask=mask)


def launch(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in channels-last layout."""
    images = images.contiguous()
    output = _empty_output(images, dtype)
    with torch.cuda.device_of(images):
        _normalize_kernel[(cdiv(images.numel(), 3 * ROUNDS * LINES * WIDTH),)](
            images_ptr=images,
            mean_ptr=mean,
            std_ptr=std,
            output_ptr=output,
            elements=images.numel(),
            ROUNDS=ROUNDS,
            LINES=LINES,
            WIDTH=WIDTH,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output


def _empty_output(images: Tensor, dtype: torch.dtype) -> Tensor:
    batch, height, width, _ = images.shape
    return torch.empty(batch, 3, height, width, dtype=dtype, device=images.device, memory_format=torch.channels_last)


normalize = Operator("normalize", launch)


@normalize.register_fake
def _(images, mean, std, dtype):
    return _empty_output(images, dtype)
