"""Upsampling, sigmoid, normalisation and mixing in one pass over the pixels: Triton kernels and the torch op.

With m = sigmoid(upsample(logits)) at pixel resolution, p = partner[b] and n() the normalisation of uint8 pixels:

    mixed[b] = n(images[b]) + (n(images[p]) - n(images[b])) * m[b]
    mean[b], square_mean[b] = means over the pixels of m[b] and of m[b] squared

An image of H x W pixels in channels-last order, seen from a map of h x w cells, is a matrix with rows of 3 * W / w
contiguous numbers, one pixel row inside one cell. A program takes one row of cells: the mask varies along such a
matrix row only for bilinear upsampling, where it is a fixed combination of the cell and its two neighbours, so no index
is computed per pixel. A matrix row is taken in pieces that fit a thread, one after the other in the code: channel and
pixel of each number are then known to the compiler. The backward walks the same tiles, and each program sums its own
cells; for bilinear upsampling it keeps the shares of the nine cells around apart, and a second kernel adds them up.
Nothing is summed by atomics. Saved for the backward: the inputs. There is no gradient for the images. Where only the
first images are to be mixed, the pixels of the others are not touched.
"""

import torch
import triton
import triton.language as tl
from automix_kernels.normalize import of_channel, scales, shifts
from automix_kernels.operators import Operator, cdiv, next_power_of_2
from automix_kernels.rounding import rounded_product
from torch import Tensor

FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # elements; twice as many in the backward take twice the registers


@triton.jit
def _cell_logits(logits_ptr, image, row, cells, H_CELLS: tl.constexpr, W_CELLS: tl.constexpr):
    """[BLOCK_W] logits, float32; rows and columns outside repeat the edge."""
    row = tl.minimum(tl.maximum(row, 0), H_CELLS - 1)
    cells = tl.minimum(tl.maximum(cells, 0), W_CELLS - 1)
    return tl.load(logits_ptr + (image * H_CELLS + row) * W_CELLS + cells).to(tl.float32)


@triton.jit
def _taps(offset, FACTOR: tl.constexpr):
    """Bilinear weights of the previous, the same and the next cell, for pixel `offset` of a cell of FACTOR pixels."""
    distance = (offset.to(tl.float32) + 0.5) * (1.0 / FACTOR) - 0.5
    previous = tl.maximum(-distance, 0.0)
    following = tl.maximum(distance, 0.0)
    return previous, 1.0 - previous - following, following


@triton.jit
def _column(logits_ptr, image, row, cells, y, H_CELLS: tl.constexpr, W_CELLS: tl.constexpr, FACTOR_Y: tl.constexpr):
    """Logits interpolated along y only, [BLOCK_Y, BLOCK_W, 1]."""
    above, same, below = _taps(y, FACTOR_Y)
    upper = _cell_logits(logits_ptr, image, row - 1, cells, H_CELLS, W_CELLS)
    middle = _cell_logits(logits_ptr, image, row, cells, H_CELLS, W_CELLS)
    lower = _cell_logits(logits_ptr, image, row + 1, cells, H_CELLS, W_CELLS)
    column = above[:, None] * upper[None, :] + same[:, None] * middle[None, :] + below[:, None] * lower[None, :]
    return column[:, :, None]


@triton.jit
def _columns(logits_ptr, image, row, cells, y, H_CELLS: tl.constexpr, W_CELLS: tl.constexpr, FACTOR_Y: tl.constexpr):
    """`_column` of the cells before, of the cells themselves and of those after."""
    previous = _column(logits_ptr, image, row, cells - 1, y, H_CELLS, W_CELLS, FACTOR_Y)
    same = _column(logits_ptr, image, row, cells, y, H_CELLS, W_CELLS, FACTOR_Y)
    following = _column(logits_ptr, image, row, cells + 1, y, H_CELLS, W_CELLS, FACTOR_Y)
    return previous, same, following


@triton.jit
def _bilinear_mask(before, column, after, x, FACTOR_X: tl.constexpr):
    """The mask [BLOCK_Y, BLOCK_W, BLOCK_S] of pixels x of each cell, between three columns."""
    previous, same, following = _taps(x, FACTOR_X)
    logits = before * previous[None, None, :] + column * same[None, None, :] + after * following[None, None, :]
    return tl.sigmoid(logits)


@triton.jit
def _offsets(
    y,
    cells,
    elements,
    H_CELLS: tl.constexpr,
    W_CELLS: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Offsets [BLOCK_Y, BLOCK_W, BLOCK_S] in an image, for pixel rows y and elements (pixel, channel) of cells."""
    if CHANNELS_LAST:
        return (y[:, None, None] * W_CELLS + cells[None, :, None]) * (3 * FACTOR_X) + elements[None, None, :]
    else:
        plane = (elements % 3) * (H_CELLS * FACTOR_Y * W_CELLS * FACTOR_X) + elements // 3
        return y[:, None, None] * (W_CELLS * FACTOR_X) + cells[None, :, None] * FACTOR_X + plane[None, None, :]


@triton.jit
def _forward_kernel(
    logits_ptr,
    images_ptr,
    partner_ptr,
    lam_ptr,
    mean_ptr,
    std_ptr,
    mixed_ptr,
    mask_mean_ptr,
    mask_square_mean_ptr,
    num_mixed,
    low,
    high,
    H_CELLS: tl.constexpr,
    W_CELLS: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr,
    BILINEAR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (rows of cells, images). Where lam <= low or lam >= high, the mask is 1 - lam. Images from `num_mixed` on
    are not mixed.

    With nearest upsampling the mask's means are those of the cells and the first program of an image writes them; with
    bilinear upsampling each program writes its share, [images, rows of cells].
    """
    PIXELS: tl.constexpr = H_CELLS * FACTOR_Y * W_CELLS * FACTOR_X
    row = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    partner = tl.load(partner_ptr + image).to(tl.int64)
    lam = tl.load(lam_ptr + image)
    plain = (lam <= low) | (lam >= high)
    mixed_rows = tl.where(image < num_mixed, FACTOR_Y, 0)
    cells = tl.arange(0, BLOCK_W)
    in_piece = tl.arange(0, BLOCK_S)
    pixels = tl.arange(0, BLOCK_X)
    if NORMALIZE:
        red, green, blue = scales(std_ptr)
        red_shift, green_shift, blue_shift = shifts(mean_ptr, std_ptr)
    if not BILINEAR:
        mask = tl.sigmoid(_cell_logits(logits_ptr, image, row, cells, H_CELLS, W_CELLS))[None, :, None]
        mask = tl.where(plain, 1 - lam, mask)
    mask_sum = 0.0
    square_sum = 0.0
    for start_y in range(0, FACTOR_Y, BLOCK_Y):
        y = start_y + tl.arange(0, BLOCK_Y)
        image_y = row * FACTOR_Y + y
        rows_inside = (y < FACTOR_Y)[:, None, None] & (cells < W_CELLS)[None, :, None]
        to_mix = rows_inside & (in_piece < PIECE)[None, None, :] & (y < mixed_rows)[:, None, None]
        if BILINEAR:
            before, column, after = _columns(logits_ptr, image, row, cells, y, H_CELLS, W_CELLS, FACTOR_Y)
            counted = tl.where(plain, 1 - lam, _bilinear_mask(before, column, after, pixels, FACTOR_X))
            counted = tl.where(rows_inside & (pixels < FACTOR_X)[None, None, :], counted, 0.0)
            mask_sum += tl.sum(counted)
            square_sum += tl.sum(rounded_product(counted, counted))
        for piece in tl.static_range(3 * FACTOR_X // PIECE):
            elements = piece * PIECE + in_piece
            if BILINEAR:
                mask = _bilinear_mask(before, column, after, elements // 3, FACTOR_X)
                mask = tl.where(plain, 1 - lam, mask)
            offsets = _offsets(image_y, cells, elements, H_CELLS, W_CELLS, FACTOR_Y, FACTOR_X, CHANNELS_LAST)
            own = tl.load(images_ptr + image * (3 * PIXELS) + offsets, mask=to_mix, other=0).to(tl.float32)
            other = tl.load(images_ptr + partner * (3 * PIXELS) + offsets, mask=to_mix, other=0).to(tl.float32)
            mixed = own + (other - own) * mask
            if NORMALIZE:
                scale = of_channel(elements % 3, red, green, blue)
                shift = of_channel(elements % 3, red_shift, green_shift, blue_shift)
                mixed = mixed * scale[None, None, :] - shift[None, None, :]
            outputs = _offsets(image_y, cells, elements, H_CELLS, W_CELLS, FACTOR_Y, FACTOR_X, True)
            tl.store(mixed_ptr + image * (3 * PIXELS) + outputs, mixed.to(mixed_ptr.dtype.element_ty), mask=to_mix)

    if BILINEAR:
        part = image * H_CELLS + row
        tl.store(mask_mean_ptr + part, mask_sum / PIXELS)
        tl.store(mask_square_mean_ptr + part, square_sum / PIXELS)
    elif row == 0:
        indices = tl.arange(0, BLOCK_CELLS)
        inside_map = indices < H_CELLS * W_CELLS
        logits = tl.load(logits_ptr + image * (H_CELLS * W_CELLS) + indices, mask=inside_map, other=0.0)
        counted = tl.where(inside_map, tl.where(plain, 1 - lam, tl.sigmoid(logits.to(tl.float32))), 0.0)
        tl.store(mask_mean_ptr + image, tl.sum(counted) / (H_CELLS * W_CELLS))
        tl.store(mask_square_mean_ptr + image, tl.sum(rounded_product(counted, counted)) / (H_CELLS * W_CELLS))


@triton.jit
def _store_taps(taps_ptr, left, same, right, live, cells, W_CELLS: tl.constexpr):
    inside = cells < W_CELLS
    tl.store(taps_ptr + cells, tl.sum(left, axis=0) * live, mask=inside)
    tl.store(taps_ptr + W_CELLS + cells, tl.sum(same, axis=0) * live, mask=inside)
    tl.store(taps_ptr + 2 * W_CELLS + cells, tl.sum(right, axis=0) * live, mask=inside)


@triton.jit
def _backward_kernel(
    grad_mixed_ptr,
    grad_mean_ptr,
    grad_square_mean_ptr,
    logits_ptr,
    images_ptr,
    partner_ptr,
    lam_ptr,
    std_ptr,
    output_ptr,
    stride_mean,
    stride_square_mean,
    num_mixed,
    low,
    high,
    H_CELLS: tl.constexpr,
    W_CELLS: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    FACTOR_X: tl.constexpr,
    BILINEAR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_MIXED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARE_MEAN: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (rows of cells, images). Output: the logits' gradient, or if bilinear its shares [B, h, 9, w] by tap."""
    PIXELS: tl.constexpr = H_CELLS * FACTOR_Y * W_CELLS * FACTOR_X
    row = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    partner = tl.load(partner_ptr + image).to(tl.int64)
    lam = tl.load(lam_ptr + image)
    live = tl.where((lam <= low) | (lam >= high), 0.0, 1.0)
    mixed_rows = tl.where(image < num_mixed, FACTOR_Y, 0)
    grad_mean = 0.0
    if HAS_MEAN:
        grad_mean = tl.load(grad_mean_ptr + image * stride_mean)
    grad_square_mean = 0.0
    if HAS_SQUARE_MEAN:
        grad_square_mean = tl.load(grad_square_mean_ptr + image * stride_square_mean)
    cells = tl.arange(0, BLOCK_W)
    in_piece = tl.arange(0, BLOCK_S)
    if NORMALIZE:
        red, green, blue = scales(std_ptr)
    total = tl.zeros([BLOCK_Y, BLOCK_W], tl.float32)
    above_left, above, above_right = total, total, total
    left, same, right = total, total, total
    below_left, below, below_right = total, total, total
    for start_y in range(0, FACTOR_Y, BLOCK_Y):
        y = start_y + tl.arange(0, BLOCK_Y)
        image_y = row * FACTOR_Y + y
        inside = (y < FACTOR_Y)[:, None, None] & (cells < W_CELLS)[None, :, None]
        inside = inside & (in_piece < PIECE)[None, None, :]
        is_mixed = inside & (y < mixed_rows)[:, None, None]
        if BILINEAR:
            before, column, after = _columns(logits_ptr, image, row, cells, y, H_CELLS, W_CELLS, FACTOR_Y)
        for piece in tl.static_range(3 * FACTOR_X // PIECE):
            elements = piece * PIECE + in_piece
            grad = tl.zeros([BLOCK_Y, BLOCK_W, BLOCK_S], tl.float32)
            if HAS_MIXED:
                offsets = _offsets(image_y, cells, elements, H_CELLS, W_CELLS, FACTOR_Y, FACTOR_X, CHANNELS_LAST)
                own = tl.load(images_ptr + image * (3 * PIXELS) + offsets, mask=is_mixed, other=0).to(tl.float32)
                other = tl.load(images_ptr + partner * (3 * PIXELS) + offsets, mask=is_mixed, other=0).to(tl.float32)
                outputs = _offsets(image_y, cells, elements, H_CELLS, W_CELLS, FACTOR_Y, FACTOR_X, True)
                grad_mixed = tl.load(grad_mixed_ptr + image * (3 * PIXELS) + outputs, mask=is_mixed, other=0.0)
                grad = rounded_product(grad_mixed.to(tl.float32), other - own)
                if NORMALIZE:
                    grad = rounded_product(grad, of_channel(elements % 3, red, green, blue)[None, None, :])
            if BILINEAR:
                mask = _bilinear_mask(before, column, after, elements // 3, FACTOR_X)
                # A pixel's share of the means' gradient is spread over its three elements.
                grad += (grad_mean + 2 * mask * grad_square_mean) / (3 * PIXELS)
                grad = tl.where(inside, grad * (mask * (1 - mask)), 0.0)
                to_left, to_same, to_right = _taps(elements // 3, FACTOR_X)
                grad_left = tl.sum(rounded_product(grad, to_left[None, None, :]), axis=2)  # [BLOCK_Y, BLOCK_W]
                grad_same = tl.sum(rounded_product(grad, to_same[None, None, :]), axis=2)
                grad_right = tl.sum(rounded_product(grad, to_right[None, None, :]), axis=2)
                to_above, to_same, to_below = _taps(y, FACTOR_Y)
                above_left += grad_left * to_above[:, None]
                above += grad_same * to_above[:, None]
                above_right += grad_right * to_above[:, None]
                left += grad_left * to_same[:, None]
                same += grad_same * to_same[:, None]
                right += grad_right * to_same[:, None]
                below_left += grad_left * to_below[:, None]
                below += grad_same * to_below[:, None]
                below_right += grad_right * to_below[:, None]
            else:
                total += tl.sum(grad, axis=2)

    if BILINEAR:
        taps_ptr = output_ptr + (image * H_CELLS + row) * (9 * W_CELLS)
        _store_taps(taps_ptr, above_left, above, above_right, live, cells, W_CELLS)
        _store_taps(taps_ptr + 3 * W_CELLS, left, same, right, live, cells, W_CELLS)
        _store_taps(taps_ptr + 6 * W_CELLS, below_left, below, below_right, live, cells, W_CELLS)
    else:
        mask = tl.sigmoid(_cell_logits(logits_ptr, image, row, cells, H_CELLS, W_CELLS))
        grad = tl.sum(total, axis=0) + (grad_mean + 2 * mask * grad_square_mean) / (H_CELLS * W_CELLS)
        grad_logits = grad * mask * (1 - mask) * live
        output_pointers = output_ptr + (image * H_CELLS + row) * W_CELLS + cells
        tl.store(output_pointers, grad_logits.to(output_ptr.dtype.element_ty), mask=cells < W_CELLS)


@triton.jit
def _sum_taps_kernel(
    taps_ptr, grad_logits_ptr, H_CELLS: tl.constexpr, W_CELLS: tl.constexpr, BLOCK_CELLS: tl.constexpr
):
    """A cell's gradient: the share of each cell around meant for it, where the edge stands in for what lies outside.

    Grid: (blocks of cells, images).
    """
    image = tl.program_id(1).to(tl.int64)
    indices = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    row = indices // W_CELLS
    cell = indices % W_CELLS
    inside = indices < H_CELLS * W_CELLS
    total = tl.zeros([BLOCK_CELLS], tl.float32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            tap = 3 * (dy + 1) + dx + 1
            for from_edge_y in tl.static_range(2):
                source_row = row if from_edge_y else row - dy
                take = inside & (source_row >= 0) & (source_row < H_CELLS)
                if from_edge_y:
                    take = take & ((row + dy < 0) | (row + dy >= H_CELLS))
                for from_edge_x in tl.static_range(2):
                    source_cell = cell if from_edge_x else cell - dx
                    take_cell = take & (source_cell >= 0) & (source_cell < W_CELLS)
                    if from_edge_x:
                        take_cell = take_cell & ((cell + dx < 0) | (cell + dx >= W_CELLS))
                    pointers = taps_ptr + ((image * H_CELLS + source_row) * 9 + tap) * W_CELLS + source_cell
                    total += tl.load(pointers, mask=take_cell, other=0.0)
    pointers = grad_logits_ptr + image * (H_CELLS * W_CELLS) + indices
    tl.store(pointers, total.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def _shape_arguments(logits: Tensor, images: Tensor, mode: str, lam_margin: float | None, tile: int) -> dict:
    """What forward and backward kernel are told alike."""
    _, h, w = logits.shape
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    planar = images.is_floating_point() and not images.is_contiguous(memory_format=torch.channels_last)
    factor_x = width // w
    piece = next((each for each in (16, 8) if factor_x % each == 0 and factor_x <= 64), factor_x)
    block_s = next_power_of_2(piece)
    block_w = next_power_of_2(w)
    block_y = max(1, min(next_power_of_2(height // h), tile // (block_s * block_w)))
    return {
        # Without a margin no lambda reaches these.
        "low": -1.0 if lam_margin is None else lam_margin,
        "high": 2.0 if lam_margin is None else 1 - lam_margin,
        "H_CELLS": h,
        "W_CELLS": w,
        "FACTOR_Y": height // h,
        "FACTOR_X": factor_x,
        "BILINEAR": mode == "bilinear",
        "NORMALIZE": images.dtype == torch.uint8,
        "CHANNELS_LAST": not planar,
        "BLOCK_Y": block_y,
        "BLOCK_W": block_w,
        "PIECE": piece,
        "BLOCK_S": block_s,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _dense(images: Tensor) -> Tensor:
    """Images without gaps; floating-point ones in either order of dimensions."""
    if images.is_floating_point() and images.is_contiguous(memory_format=torch.channels_last):
        return images
    return images.contiguous()


def launch_forward(
    logits: Tensor,
    images: Tensor,
    partner: Tensor,
    lam: Tensor,
    mean: Tensor,
    std: Tensor,
    mode: str,
    lam_margin: float | None,
    dtype: torch.dtype,
    num_mixed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed images in channels-last layout, all B or the first `num_mixed`, and [B] float32 means of the mask and of
    its square."""
    logits, images = logits.contiguous(), _dense(images)
    batch, h, w = logits.shape
    arguments = _shape_arguments(logits, images, mode, lam_margin, FORWARD_TILE)
    mixed = _empty_mixed(logits, images, dtype, num_mixed)
    parts = h if mode == "bilinear" else 1
    mask_mean = logits.new_empty(batch, parts, dtype=torch.float32)
    mask_square_mean = logits.new_empty(batch, parts, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _forward_kernel[(h, batch)](
            logits_ptr=logits,
            images_ptr=images,
            partner_ptr=partner,
            lam_ptr=lam,
            mean_ptr=mean,
            std_ptr=std,
            mixed_ptr=mixed,
            mask_mean_ptr=mask_mean,
            mask_square_mean_ptr=mask_square_mean,
            num_mixed=len(mixed),
            BLOCK_CELLS=next_power_of_2(h * w),
            BLOCK_X=next_power_of_2(arguments["FACTOR_X"]),
            **arguments,
        )
    if parts == 1:
        return mixed, mask_mean.squeeze(1), mask_square_mean.squeeze(1)
    return mixed, mask_mean.sum(dim=1), mask_square_mean.sum(dim=1)


def _empty_mixed(logits: Tensor, images: Tensor, dtype: torch.dtype, num_mixed: int | None) -> Tensor:
    batch = logits.shape[0] if num_mixed is None else num_mixed
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    return torch.empty(batch, 3, height, width, dtype=dtype, device=logits.device, memory_format=torch.channels_last)


mask_blend = Operator("mask_blend", launch_forward)


@mask_blend.register_fake
def _(logits, images, partner, lam, mean, std, mode, lam_margin, dtype, num_mixed=None):
    means = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    return _empty_mixed(logits, images, dtype, num_mixed), *means


def launch_backward(
    grad_mixed: Tensor | None,
    grad_mean: Tensor | None,
    grad_square_mean: Tensor | None,
    logits: Tensor,
    images: Tensor,
    partner: Tensor,
    lam: Tensor,
    std: Tensor,
    mode: str,
    lam_margin: float | None,
) -> Tensor:
    """The logits' gradient; an output that nothing depends on brings None, grad_mixed may be of the first images."""
    logits, images = logits.contiguous(), _dense(images)
    batch, h, w = logits.shape
    arguments = _shape_arguments(logits, images, mode, lam_margin, BACKWARD_TILE)
    grad_logits = torch.empty_like(logits)
    bilinear = mode == "bilinear"
    output = logits.new_empty(batch, h, 9, w, dtype=torch.float32) if bilinear else grad_logits
    if grad_mixed is not None:
        grad_mixed = grad_mixed.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(logits):
        _backward_kernel[(h, batch)](
            grad_mixed_ptr=grad_mixed,
            grad_mean_ptr=grad_mean,
            grad_square_mean_ptr=grad_square_mean,
            logits_ptr=logits,
            images_ptr=images,
            partner_ptr=partner,
            lam_ptr=lam,
            std_ptr=std,
            output_ptr=output,
            # 0 for the gradient of a mean over the batch
            stride_mean=0 if grad_mean is None else grad_mean.stride(0),
            stride_square_mean=0 if grad_square_mean is None else grad_square_mean.stride(0),
            num_mixed=0 if grad_mixed is None else len(grad_mixed),
            HAS_MIXED=grad_mixed is not None,
            HAS_MEAN=grad_mean is not None,
            HAS_SQUARE_MEAN=grad_square_mean is not None,
            **arguments,
        )
        if bilinear:
            block = min(256, next_power_of_2(h * w))
            _sum_taps_kernel[(cdiv(h * w, block), batch)](
                taps_ptr=output,
                grad_logits_ptr=grad_logits,
                H_CELLS=h,
                W_CELLS=w,
                BLOCK_CELLS=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return grad_logits


mask_blend_backward = Operator("mask_blend_backward", launch_backward)


@mask_blend_backward.register_fake
def _(grad_mixed, grad_mean, grad_square_mean, logits, images, partner, lam, std, mode, lam_margin):
    return logits.new_empty(logits.shape)


def _save_for_backward(ctx, inputs, output):
    logits, images, partner, lam, _, std, mode, lam_margin, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, images, partner, lam, std)
    ctx.mode, ctx.lam_margin = mode, lam_margin


def _backward(ctx, grad_mixed, grad_mean, grad_square_mean):
    grad_logits = mask_blend_backward(
        grad_mixed, grad_mean, grad_square_mean, *ctx.saved_tensors, ctx.mode, ctx.lam_margin
    )
    return grad_logits, *[None] * 9


mask_blend.register_autograd(_backward, setup_context=_save_for_backward)
