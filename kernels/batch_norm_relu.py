"""BatchNorm in training, with the ReLU behind it and what is added in between: Triton kernels and the torch ops.

    y = relu((x - mean) * rstd * weight + bias + residual)        with or without a residual

Layers of their own pass over the map 13 times, forward and backward, or 16 with a residual; here it is 8 and 11 times.
The forward pass reads it for the statistics and once more for the result, and the backward pass likewise. Without a
residual the ReLU's sign is computed again from x, so that the result needs not be read; with one, the pass that adds up
the sums also writes the residual's gradient, which is what the second pass reads.

A map is a matrix in memory: channels-last, `rows` of all images' pixels by C channels. Its tiles of rows are dealt out
to at most PROGRAMS parts in turn, and the parts' sums are put together in an order that is fixed: no atomics, and the
same bits on every NVIDIA GPU. Passes over the map run from the back and from the front in turn, so that each begins
with what the one before left in the cache. With several groups of images, each has statistics of its own.
"""

import torch
import triton
import triton.language as tl
from automix_kernels.operators import Operator, cdiv, next_power_of_2
from automix_kernels.rounding import rounded_product
from torch import Tensor

PROGRAMS = 512  # of the passes that sum: all of them fit an A100 or an H200 at once, and none is left over for the end
FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # numbers: 32 bytes or more of each map that a thread has under way
ROUNDS = 4  # tiles a program in the passes that do not sum
FINISHED = 4096  # numbers in a tile of the finishing kernels, which holds all parts


@triton.jit
def _tile(ptr, row, rows, channels, C, BLOCK_R: tl.constexpr):
    """Pointers to BLOCK_R rows from `row` on, and which of them exist."""
    within = tl.arange(0, BLOCK_R)
    pointers = ptr + row.to(tl.int64) * C + (within[:, None] * C + channels[None, :])
    return pointers, (row + within < rows)[:, None] & (channels < C)[None, :]


@triton.jit
def _of_channels(ptr, group, channels, C):
    """[1, channels] float32 of one group."""
    return tl.load(ptr + group * C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _norm_of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channels, C):
    """mean, rstd, scale = rstd * weight, bias: without a residual (x - mean) * scale + bias enters the ReLU."""
    mean, rstd = _of_channels(mean_ptr, group, channels, C), _of_channels(rstd_ptr, group, channels, C)
    scale = rstd * _of_channels(weight_ptr, 0, channels, C)
    return mean, rstd, scale, _of_channels(bias_ptr, 0, channels, C)


@triton.jit
def _rows_of_part(part, PARTS, rows, BLOCK_R: tl.constexpr):
    """How many rows the tiles part, part + PARTS, ... hold, counted from the back; the last of all may be cut."""
    tiles = tl.cdiv(rows, BLOCK_R)
    cut = tl.where(part == 0, tiles * BLOCK_R - rows, 0)
    return tl.cdiv(tiles - part, PARTS) * BLOCK_R - cut


@triton.jit
def _moments_kernel(x_ptr, parts_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Moments of each part. Grid: (blocks of channels, parts, groups).

    parts is [3, groups, parts, C]: the mean of the part's first tile, the part's mean as a distance from that one, and
    the sum of squared distances from the part's mean. A mean far from zero costs no digits, as it stands alone.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part, PARTS = tl.program_id(1), tl.num_programs(1)
    group, groups = tl.program_id(2), tl.num_programs(2)
    x_ptr += group.to(tl.int64) * rows * C
    tiles = tl.cdiv(rows, BLOCK_R)
    start = (tiles - 1 - part) * BLOCK_R
    pointers, mask = _tile(x_ptr, start, rows, channels, C, BLOCK_R)
    shift = tl.sum(tl.load(pointers, mask=mask, other=0.0).to(tl.float32), axis=0)[None, :]
    shift /= tl.minimum(rows - start, BLOCK_R)
    first = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tile = part
    while tile < tiles:
        pointers, mask = _tile(x_ptr, (tiles - 1 - tile) * BLOCK_R, rows, channels, C, BLOCK_R)
        distance = tl.where(mask, tl.load(pointers, mask=mask, other=0.0).to(tl.float32) - shift, 0.0)
        first += distance
        second += distance * distance
        tile += PARTS
    total = tl.sum(first, axis=0)[None, :]
    mean = total / _rows_of_part(part, PARTS, rows, BLOCK_R)
    squares = tl.sum(second, axis=0)[None, :] - total * mean
    squares = tl.where(squares < 0, 0.0, squares)  # NaN stays
    pointers = parts_ptr + (group * PARTS + part) * C + channels[None, :]
    tl.store(pointers, shift, mask=(channels < C)[None, :])
    tl.store(pointers + groups * PARTS * C, mean, mask=(channels < C)[None, :])
    tl.store(pointers + 2 * groups * PARTS * C, squares, mask=(channels < C)[None, :])


@triton.jit
def _finish_moments_kernel(
    parts_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_ptr,
    rows,
    C,
    PARTS,
    momentum,
    eps,
    GROUPS: tl.constexpr,
    ROWS_OF_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Parts put together as one group's moments, and the running statistics moved. Grid: (blocks of channels,)."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)[:, None]
    inside = channels < C
    mask = (part < PARTS) & inside[None, :]
    count = tl.where(part < PARTS, _rows_of_part(part, PARTS, rows, ROWS_OF_TILE), 0).to(tl.float32)
    running_mean = tl.load(running_mean_ptr + channels, mask=inside)
    running_var = tl.load(running_var_ptr + channels, mask=inside)
    for group in range(GROUPS):
        pointers = parts_ptr + (group * PARTS + part) * C + channels[None, :]
        shift = tl.load(parts_ptr + group * PARTS * C + channels, mask=inside, other=0.0)
        away = tl.load(pointers, mask=mask, other=0.0) - shift[None, :]
        away += tl.load(pointers + GROUPS * PARTS * C, mask=mask, other=0.0)
        distance = tl.sum(tl.where(mask, rounded_product(count, away), 0.0), axis=0) / rows
        mean = shift + distance
        away -= distance[None, :]
        squares = tl.load(pointers + 2 * GROUPS * PARTS * C, mask=mask, other=0.0)
        squares = tl.sum(tl.where(mask, squares + count * away * away, 0.0), axis=0)
        tl.store(mean_ptr + group * C + channels, mean, mask=inside)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / rows + eps))
        tl.store(rstd_ptr + group * C + channels, rstd, mask=inside)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (squares / (rows - 1) - running_var)
    tl.store(running_mean_ptr + channels, running_mean, mask=inside)
    tl.store(running_var_ptr + channels, running_var, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(num_batches_ptr, tl.load(num_batches_ptr) + GROUPS)


@triton.jit
def _apply_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    C,
    ROUNDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (ROUNDS tiles of rows, blocks of channels, groups)."""
    group = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, _, scale, bias = _norm_of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channels, C)
    offset = group.to(tl.int64) * rows * C
    for i in tl.static_range(ROUNDS):
        row = (tl.program_id(0) * ROUNDS + i) * BLOCK_R
        pointers, mask = _tile(x_ptr + offset, row, rows, channels, C, BLOCK_R)
        y = (tl.load(pointers, mask=mask, other=0.0).to(tl.float32) - mean) * scale + bias
        if residual_ptr is not None:
            pointers, _ = _tile(residual_ptr + offset, row, rows, channels, C, BLOCK_R)
            y += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(y < 0, 0.0, y)  # NaN stays
        pointers, _ = _tile(y_ptr + offset, row, rows, channels, C, BLOCK_R)
        tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_sums_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    grad_residual_ptr,
    parts_ptr,
    rows,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of g and of g * (x - mean) * rstd over each part; g is the gradient where the ReLU lets it through.

    Grid: (blocks of channels, parts, groups). parts is [2, groups, parts, C]. y and grad_residual, which is g, come
    together or not at all.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part, PARTS = tl.program_id(1), tl.num_programs(1)
    group, groups = tl.program_id(2), tl.num_programs(2)
    mean, rstd, scale, bias = _norm_of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channels, C)
    offset = group.to(tl.int64) * rows * C
    first = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tiles = tl.cdiv(rows, BLOCK_R)
    tile = part
    while tile < tiles:
        row = (tiles - 1 - tile) * BLOCK_R
        pointers, mask = _tile(grad_ptr + offset, row, rows, channels, C, BLOCK_R)
        grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        pointers, _ = _tile(x_ptr + offset, row, rows, channels, C, BLOCK_R)
        distance = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) - mean
        if grad_residual_ptr is not None:
            pointers, _ = _tile(y_ptr + offset, row, rows, channels, C, BLOCK_R)
            grad = tl.where(tl.load(pointers, mask=mask, other=0.0) <= 0, 0.0, grad)
            pointers, _ = _tile(grad_residual_ptr + offset, row, rows, channels, C, BLOCK_R)
            tl.store(pointers, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        else:
            grad = tl.where(distance * scale + bias <= 0, 0.0, grad)
        first += grad
        second += tl.where(mask, grad * (distance * rstd), 0.0)
        tile += PARTS
    pointers = parts_ptr + (group * PARTS + part) * C + channels
    tl.store(pointers, tl.sum(first, axis=0), mask=channels < C)
    tl.store(pointers + groups * PARTS * C, tl.sum(second, axis=0), mask=channels < C)


@triton.jit
def _finish_backward_kernel(
    parts_ptr,
    sums_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    C,
    PARTS,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of each group [2, groups, C], and over the groups the gradients. Grid: (blocks of channels,)."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)[:, None]
    inside = channels < C
    mask = (part < PARTS) & inside[None, :]
    grad_weight = tl.zeros([BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_C], tl.float32)
    for group in range(GROUPS):
        pointers = parts_ptr + (group * PARTS + part) * C + channels[None, :]
        first = tl.sum(tl.load(pointers, mask=mask, other=0.0), axis=0)
        second = tl.sum(tl.load(pointers + GROUPS * PARTS * C, mask=mask, other=0.0), axis=0)
        tl.store(sums_ptr + group * C + channels, first, mask=inside)
        tl.store(sums_ptr + (GROUPS + group) * C + channels, second, mask=inside)
        grad_bias += first
        grad_weight += second
    tl.store(grad_weight_ptr + channels, grad_weight, mask=inside)
    tl.store(grad_bias_ptr + channels, grad_bias, mask=inside)


@triton.jit
def _input_grad_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    grad_x_ptr,
    rows,
    C,
    MASKED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """weight * rstd * (g - sum g / rows - x^ * sum (g * x^) / rows), x^ = (x - mean) * rstd. Grid: as `_apply_kernel`.

    MASKED: `grad` is g; else the sign of the ReLU's input is computed from x.
    """
    group, groups = tl.program_id(2), tl.num_programs(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, scale, bias = _norm_of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channels, C)
    constant = _of_channels(sums_ptr, group, channels, C) / rows
    slope = _of_channels(sums_ptr, groups + group, channels, C) * rstd / rows
    offset = group.to(tl.int64) * rows * C
    for i in tl.static_range(ROUNDS):
        row = (tl.program_id(0) * ROUNDS + i) * BLOCK_R
        pointers, mask = _tile(grad_ptr + offset, row, rows, channels, C, BLOCK_R)
        grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        pointers, _ = _tile(x_ptr + offset, row, rows, channels, C, BLOCK_R)
        distance = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) - mean
        if not MASKED:
            grad = tl.where(distance * scale + bias <= 0, 0.0, grad)
        pointers, _ = _tile(grad_x_ptr + offset, row, rows, channels, C, BLOCK_R)
        grad = scale * (grad - constant - distance * slope)
        tl.store(pointers, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


class _Plan:
    """How the kernels divide a map of `groups` times `rows` x `channels`; a function of these alone."""

    def __init__(self, x: Tensor, groups: int, tile: int):
        images, self.channels, height, width = x.shape
        self.groups, self.rows = groups, images // groups * height * width
        self.block_c = min(128, next_power_of_2(self.channels))
        self.block_r = tile // self.block_c
        self.blocks = cdiv(self.channels, self.block_c)
        tiles = cdiv(self.rows, self.block_r)
        self.parts = min(cdiv(PROGRAMS, self.blocks * groups), tiles)
        self.sum_grid = self.blocks, self.parts, groups
        self.map_grid = cdiv(tiles, ROUNDS), self.blocks, groups

    def tiles(self) -> dict[str, int]:
        return {"rows": self.rows, "C": self.channels, "BLOCK_R": self.block_r, "BLOCK_C": self.block_c}

    def finish(self) -> tuple[tuple[int], dict[str, int]]:
        """Grid and sizes of a finishing kernel."""
        block_p = next_power_of_2(self.parts)
        block_c = min(FINISHED // block_p, next_power_of_2(self.channels), 64)
        sizes = {"C": self.channels, "PARTS": self.parts, "GROUPS": self.groups, "BLOCK_P": block_p, "BLOCK_C": block_c}
        return (cdiv(self.channels, block_c),), sizes

    def empty_parts(self, x: Tensor, sums: int) -> Tensor:
        return x.new_empty(sums, self.groups, self.parts, self.channels, dtype=torch.float32)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def launch_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] -> mean and 1 / sqrt(variance + eps) of each group, [groups, C] float32; running statistics move."""
    plan, x = _Plan(x, groups, FORWARD_TILE), _channels_last(x)
    parts, (mean, rstd) = plan.empty_parts(x, 3), _empty_moments(x, groups)
    with torch.cuda.device_of(x):
        _moments_kernel[plan.sum_grid](
            x_ptr=x,
            parts_ptr=parts,
            **plan.tiles(),
            num_warps=4,
            enable_fp_fusion=True,
        )
        grid, sizes = plan.finish()
        _finish_moments_kernel[grid](
            parts_ptr=parts,
            mean_ptr=mean,
            rstd_ptr=rstd,
            running_mean_ptr=running_mean,
            running_var_ptr=running_var,
            num_batches_ptr=num_batches,
            rows=plan.rows,
            momentum=momentum,
            eps=eps,
            ROWS_OF_TILE=plan.block_r,
            **sizes,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return mean, rstd


def _empty_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(groups, x.shape[1], dtype=torch.float32) for _ in range(2))


batch_moments = Operator("batch_moments", launch_moments, ("running_mean", "running_var", "num_batches"))


@batch_moments.register_fake
def _(x, running_mean, running_var, num_batches, momentum, eps, groups):
    return _empty_moments(x, groups)


def launch_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """[B, C, H, W] and a residual of the same shape -> y in x's type, channels-last.

    The moments are x's own, [groups, C]; they and weight and bias, [C], are float32.
    """
    plan, x = _Plan(x, len(mean), FORWARD_TILE), _channels_last(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _apply_kernel[plan.map_grid](
            x_ptr=x,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight,
            bias_ptr=bias,
            residual_ptr=None if residual is None else _channels_last(residual),
            y_ptr=y,
            **plan.tiles(),
            ROUNDS=ROUNDS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y


batch_norm_relu = Operator("batch_norm_relu", launch_apply)


@batch_norm_relu.register_fake
def _(x, mean, rstd, weight, bias, residual):
    return torch.empty_like(x, memory_format=torch.channels_last)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the residual, of their shapes and types; `grad` is y's. `y` is the result where
    there was a residual, else None, and the residual's gradient is empty."""
    plan, grad, x = _Plan(x, len(mean), BACKWARD_TILE), _channels_last(grad), _channels_last(x)
    grad_x, grad_weight, grad_bias, grad_residual = outputs = _empty_gradients(x, weight, bias, y)
    parts = plan.empty_parts(x, 2)
    sums = x.new_empty(2, plan.groups, plan.channels, dtype=torch.float32)
    of_norm = {"x_ptr": x, "mean_ptr": mean, "rstd_ptr": rstd, "weight_ptr": weight, "bias_ptr": bias}
    with torch.cuda.device_of(x):
        _backward_sums_kernel[plan.sum_grid](
            grad_ptr=grad,
            **of_norm,
            y_ptr=None if y is None else _channels_last(y),
            grad_residual_ptr=None if y is None else grad_residual,
            parts_ptr=parts,
            **plan.tiles(),
            num_warps=4,
            enable_fp_fusion=True,
        )
        grid, sizes = plan.finish()
        _finish_backward_kernel[grid](
            parts_ptr=parts,
            sums_ptr=sums,
            grad_weight_ptr=grad_weight,
            grad_bias_ptr=grad_bias,
            **sizes,
            num_warps=4,
            enable_fp_fusion=True,
        )
        _input_grad_kernel[plan.map_grid](
            grad_ptr=grad if y is None else grad_residual,
            **of_norm,
            sums_ptr=sums,
            grad_x_ptr=grad_x,
            **plan.tiles(),
            MASKED=y is not None,
            ROUNDS=ROUNDS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs


def _empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_residual = x.new_empty(0) if y is None else torch.empty_like(grad_x)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias), grad_residual


batch_norm_relu_backward = Operator("batch_norm_relu_backward", launch_backward)


@batch_norm_relu_backward.register_fake
def _(grad, x, mean, rstd, weight, bias, y):
    return _empty_gradients(x, weight, bias, y)


def _setup_context(ctx, inputs, output):
    *inputs, residual = inputs
    ctx.save_for_backward(*inputs, None if residual is None else output)


def _backward(ctx, grad):
    """By way of the moments, which have no gradient of their own, too."""
    *inputs, y = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_residual = batch_norm_relu_backward(grad, *inputs, y)
    return grad_x, None, None, grad_weight, grad_bias, None if y is None else grad_residual


batch_norm_relu.register_autograd(_backward, setup_context=_setup_context)
