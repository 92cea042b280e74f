"""uint8 pixels to normalised images in one pass: a Triton kernel and the torch op.

    output[b, c, y, x] = images[b, y, x, c] * (1 / (255 * std[c])) - mean[c] / std[c]

The output is in channels-last layout, so both are the same sequence of numbers in memory, whose channels take turns.
There is no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, ROUNDS = 2048, 2  # 16 bytes of pixels a thread


@triton.jit
def _of_channel(three_ptr, channel):
    """One of three numbers for each element: selected, as a load each would cost more."""
    later = tl.where(channel == 1, tl.load(three_ptr + 1), tl.load(three_ptr + 2))
    return tl.where(channel == 0, tl.load(three_ptr), later)


@triton.jit
def _normalize_kernel(
    images_ptr, mean_ptr, std_ptr, output_ptr, elements, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: (chunks of 3 * ROUNDS blocks,). Every third block begins with the same channel and shares its constants."""
    start = tl.program_id(0).to(tl.int64) * (3 * ROUNDS * BLOCK)
    for turn in tl.static_range(3):
        first = turn * BLOCK + tl.arange(0, BLOCK)
        std = _of_channel(std_ptr, first % 3)
        scale = 1 / (255 * std)
        shift = _of_channel(mean_ptr, first % 3) / std
        for i in tl.static_range(ROUNDS):
            indices = start + (3 * i * BLOCK) + first
            mask = indices < elements
            pixels = tl.load(images_ptr + indices, mask=mask, other=0).to(tl.float32)
            tl.store(output_ptr + indices, (pixels * scale - shift).to(output_ptr.dtype.element_ty), mask=mask)


def launch(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in channels-last layout."""
    images = images.contiguous()
    output = _empty_output(images, dtype)
    with torch.cuda.device_of(images):
        _normalize_kernel[(triton.cdiv(images.numel(), 3 * ROUNDS * BLOCK),)](
            images_ptr=images,
            mean_ptr=mean,
            std_ptr=std,
            output_ptr=output,
            elements=images.numel(),
            ROUNDS=ROUNDS,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output


def _empty_output(images: Tensor, dtype: torch.dtype) -> Tensor:
    batch, height, width, _ = images.shape
    return torch.empty(batch, 3, height, width, dtype=dtype, device=images.device, memory_format=torch.channels_last)


normalize = torch.library.custom_op("automix::normalize", launch, mutates_args=(), device_types="cuda")


@normalize.register_fake
def _(images, mean, std, dtype):
    return _empty_output(images, dtype)
