"""Mask logits of each image with its partner, without the N x N scores in memory: Triton kernels and the torch op.

With y = projection, v = value, p = partner[b], a = lam[b] * query_lambda + query_bias:

    u[b, j]      = a[b] . y[p, j] = lam[b] * k0[p, j] + k1[p, j]
    S[b, i, j]   = (y[b, i] . y[p, j] + u[b, j]) / sqrt(D)
    o[b, i]      = sum_j softmax_j(S[b, i, j]) * v[p, j]
    logits[b, i] = o[b, i] + (1 - lam[b]) * value_lambda + value_bias

k0 = y . query_lambda and k1 = y . query_bias come from a small kernel, once for an image whatever the draws, so that
every operand of a matrix product goes from memory to the matrix units untouched. u is one fused multiply-add wherever
it is needed: the backward's transposed product sees the very same scores. Saved for the backward: the inputs, k0, k1, o
and lse = log(sum_j exp(S[b, i, j])) * sqrt(D), [B, N] each. The backward recomputes the probabilities P, and subtracts
lse before it divides by sqrt(D): the other way round, a fused multiply-add would leave out one of two roundings, and a
lone score of 1e4 would not get the probability 1. As the value has one channel, the gradient of the scores needs
neither a product nor a pass of its own (g = grad_logits):

    dS[b, i, j] = P[b, i, j] * g[b, i] * (v[p, j] - o[b, i]) / sqrt(D)
    dv[p, j]    = sum_b sum_i P[b, i, j] * g[b, i]                         over every b whose partner is p
    dy          = (image as query)  sum_j dS[b, i, j] * y[p, j]
                + (image as key)    sum_b sum_i dS[b, i, j] * (y[b, i] + a[b])

One program owns some rows of one image's gradient and adds up both roles, one after the other, so nothing is summed by
atomics and the result is the same bits every time. It finds the pairs that name its image by scanning `partner`: any
mapping will do, not only permutations.

Several draws of partners and lambdas over the same projection share both launches of the forward. Only the first one
has a gradient; of the others nothing but the logits is kept.

The value may be a column of the projection, so that one product of the features gives both. Its gradient is then the
same column of the projection's, and one product gives the gradients of both weights.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from automix_kernels.operators import Operator, cdiv, next_power_of_2
from automix_kernels.projection import split_projection
from automix_kernels.rounding import rounded_product
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """How one program is cut: `rows` x `columns` scores, `width` channels at a time, and what runs it."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


@triton.jit
def _load_rows(base_ptr, rows, columns, N: tl.constexpr, D: tl.constexpr, STRIDE_N: tl.constexpr, EVEN: tl.constexpr):
    """[rows, columns] of one image's [N, D] projection, zero outside; EVEN: no column lies outside."""
    pointers = base_ptr + rows[:, None] * STRIDE_N + columns[None, :]
    mask = rows[:, None] < N
    if not EVEN:
        mask = mask & (columns[None, :] < D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _vector(ptr, columns, D: tl.constexpr, STRIDE: tl.constexpr, PRESENT: tl.constexpr):
    """A parameter at these columns, float32; zeros if there is none. It may be a column of a matrix."""
    if PRESENT:
        return tl.load(ptr + columns * STRIDE, mask=columns < D, other=0.0).to(tl.float32)
    else:
        return tl.zeros(columns.shape, tl.float32)


@triton.jit
def _key_products_kernel(
    projection_ptr,
    query_lambda_ptr,
    query_bias_ptr,
    products_ptr,
    stride_b,
    N: tl.constexpr,
    D: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_LAMBDA: tl.constexpr,
    HAS_LAMBDA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """k0 and k1 [2, B, N]; zeros for what there is not. Grid: (tiles of rows, images)."""
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    keys = _load_rows(projection_ptr + image * stride_b, rows, columns, N, D, STRIDE_N, D == BLOCK_D).to(tl.float32)
    query_lambda = _vector(query_lambda_ptr, columns, D, STRIDE_LAMBDA, HAS_LAMBDA)
    query_bias = _vector(query_bias_ptr, columns, D, 1, HAS_BIAS)
    pointers = products_ptr + image * N + rows
    tl.store(pointers, tl.sum(rounded_product(keys, query_lambda[None, :]), axis=1), mask=rows < N)
    tl.store(
        pointers + tl.num_programs(1) * N, tl.sum(rounded_product(keys, query_bias[None, :]), axis=1), mask=rows < N
    )


@triton.jit
def _scores(
    left_base,
    left_rows,
    right_base,
    right_rows,
    N: tl.constexpr,
    D: tl.constexpr,
    STRIDE_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """left . right^T over all channels, float32 [BLOCK_M, BLOCK_N]; rows outside the image count as zero."""
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        columns = start_d + tl.arange(0, BLOCK_D)
        left = _load_rows(left_base, left_rows, columns, N, D, STRIDE_N, D % BLOCK_D == 0)  # [BLOCK_M, BLOCK_D]
        right = _load_rows(right_base, right_rows, columns, N, D, STRIDE_N, D % BLOCK_D == 0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(left, tl.trans(right), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _add_key_offset(scores, products_ptr, batch, partner, lam, keys, N: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """Adds u to the scores, and -inf where a key lies outside the image."""
    if HAS_OFFSET:
        pointers = products_ptr + partner * N + keys
        by_lambda = tl.load(pointers, mask=keys < N, other=0.0)
        plain = tl.load(pointers + batch * N, mask=keys < N, other=float("-inf"))
        scores += tl.fma(lam, by_lambda, plain)[None, :]
    else:
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _forward_kernel(
    projection_ptr,
    value_ptr,
    partner_ptr,
    lam_ptr,
    products_ptr,
    value_lambda_ptr,
    value_bias_ptr,
    logits_ptr,
    others_ptr,
    attended_ptr,
    lse_ptr,
    stride_b,
    stride_value_b,
    scale,
    batch,
    N: tl.constexpr,
    D: tl.constexpr,
    DRAWS: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_VALUE_N: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_VALUE_LAMBDA: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax over the partner's positions.

    Grid: (tiles of rows, images * draws). An image's draws are neighbours, so that its rows are still in the cache.
    """
    image = (tl.program_id(1) // DRAWS).to(tl.int64)
    draw = tl.program_id(1) % DRAWS
    pair = draw * batch + image
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    partner = tl.load(partner_ptr + pair).to(tl.int64)
    lam = tl.load(lam_ptr + pair)
    own_base = projection_ptr + image * stride_b
    key_base = projection_ptr + partner * stride_b

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    numerator = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        key_mask = keys < N
        scores = _scores(own_base, rows, key_base, keys, N, D, STRIDE_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        scores = _add_key_offset(scores, products_ptr, batch, partner, lam, keys, N, HAS_OFFSET)
        value_pointers = value_ptr + partner * stride_value_b + keys * STRIDE_VALUE_N
        value = tl.load(value_pointers, mask=key_mask, other=0.0).to(tl.float32)  # [BLOCK_N]

        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        decay = tl.exp2((running_max - new_max) * (scale * LOG2_E))
        weights = tl.exp2((scores - new_max[:, None]) * (scale * LOG2_E))
        denominator = denominator * decay + tl.sum(weights, axis=1)
        numerator = numerator * decay + tl.sum(weights * value[None, :], axis=1)
        running_max = new_max

    attended = numerator / denominator
    constant = 0.0
    if HAS_VALUE_LAMBDA:
        constant += (1 - lam) * tl.load(value_lambda_ptr).to(tl.float32)
    if HAS_VALUE_BIAS:
        constant += tl.load(value_bias_ptr).to(tl.float32)
    outputs = image * N + rows
    if draw == 0:
        tl.store(logits_ptr + outputs, attended + constant, mask=rows < N)
        tl.store(attended_ptr + outputs, attended, mask=rows < N)
        tl.store(lse_ptr + outputs, running_max + tl.log2(denominator) / (scale * LOG2_E), mask=rows < N)
    else:
        tl.store(others_ptr + (draw - 1) * batch * N + outputs, attended + constant, mask=rows < N)


@triton.jit
def _next_pair(partner_ptr, image, previous, batch, BLOCK_B: tl.constexpr):
    """The lowest pair above `previous` whose partner is `image`; at least `batch` if there is none."""
    pairs = tl.arange(0, BLOCK_B)
    partners = tl.load(partner_ptr + pairs, mask=pairs < batch, other=-1)
    return tl.min(tl.where((partners == image) & (pairs > previous), pairs, BLOCK_B), axis=0).to(tl.int64)


@triton.jit
def _unit_kernel(
    value_ptr,
    partner_ptr,
    grad_ptr,
    unit_ptr,
    stride_value_b,
    scale,
    N: tl.constexpr,
    STRIDE_VALUE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """unit[b], float32: the power of two above max |g| * (max v - min v) * scale, which no |dS| of pair b exceeds.

    Grid: (pairs,). Never below 2^-110: the backward divides by it, and float16's numbers times the inverse are finite.
    1 where that product is zero, as that of equal values, whose dS is what their mean's rounding makes of it.
    """
    pair = tl.program_id(0).to(tl.int64)
    partner = tl.load(partner_ptr + pair).to(tl.int64)
    positions = tl.arange(0, BLOCK_N)
    mask = positions < N
    grad = tl.load(grad_ptr + pair * N + positions, mask=mask, other=0.0).to(tl.float32)
    value_pointers = value_ptr + partner * stride_value_b + positions * STRIDE_VALUE_N
    value = tl.load(value_pointers, mask=mask, other=0.0).to(tl.float32)
    highest = tl.max(tl.where(mask, value, float("-inf")), axis=0)
    lowest = tl.min(tl.where(mask, value, float("inf")), axis=0)
    largest = tl.max(tl.abs(grad), axis=0) * (highest - lowest) * scale
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) + 1  # a float32 holds it with 127 added
    unit = (tl.minimum(tl.maximum(exponent, 127 - 110), 254) << 23).to(tl.float32, bitcast=True)
    tl.store(unit_ptr + pair, tl.where(largest > 0, unit, 1.0))


@triton.jit
def _backward_kernel(
    projection_ptr,
    value_ptr,
    partner_ptr,
    lam_ptr,
    query_lambda_ptr,
    query_bias_ptr,
    products_ptr,
    attended_ptr,
    lse_ptr,
    grad_ptr,
    unit_ptr,
    grad_projection_ptr,
    grad_value_ptr,
    grad_offset_ptr,
    grad_sum_ptr,
    stride_b,
    stride_value_b,
    scale,
    batch,
    N: tl.constexpr,
    D: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_VALUE_N: tl.constexpr,
    STRIDE_LAMBDA: tl.constexpr,
    STRIDE_GRAD_N: tl.constexpr,
    HAS_LAMBDA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rows of one image's gradient: as queries of its own pair, then as keys of every pair that names it.

    Grid: (tiles of rows, images). The scores' gradient of one role stays in registers while its product runs over the
    channels; each role (and each BLOCK_N columns of it) is added to what this same program wrote before. grad_offset[b,
    tile] gets the tile's part of the gradient of a[b], grad_sum[b, tile] its sum of grad_logits. Divided by unit[b] (of
    _unit_kernel), dS stays within float16's range; other types need none. A row of the projection's gradient that is
    longer than D ends with the value's gradient and zeros.
    """
    HAS_OFFSET: tl.constexpr = HAS_LAMBDA or HAS_BIAS
    EVEN: tl.constexpr = D % BLOCK_D == 0
    row_tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    tile = image * tl.num_programs(0) + row_tile
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < N
    own_base = projection_ptr + image * stride_b
    output_base = grad_projection_ptr + image * (N * STRIDE_GRAD_N)

    partner = tl.load(partner_ptr + image).to(tl.int64)
    lam = tl.load(lam_ptr + image)
    # An infinite denominator: rows outside the image have probability zero, and add nothing to the sums over rows.
    lse = tl.load(lse_ptr + image * N + rows, mask=row_mask, other=float("inf"))
    attended = tl.load(attended_ptr + image * N + rows, mask=row_mask, other=0.0)
    grad = tl.load(grad_ptr + image * N + rows, mask=row_mask, other=0.0)
    tl.store(grad_sum_ptr + tile, tl.sum(grad, axis=0))
    unit = 1.0
    if HAS_UNIT:
        unit = tl.load(unit_ptr + image)
    for start_n in range(0, N, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        key_mask = keys < N
        key_base = projection_ptr + partner * stride_b
        scores = _scores(own_base, rows, key_base, keys, N, D, STRIDE_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        scores = _add_key_offset(scores, products_ptr, batch, partner, lam, keys, N, HAS_OFFSET)
        value_pointers = value_ptr + partner * stride_value_b + keys * STRIDE_VALUE_N
        value = tl.load(value_pointers, mask=key_mask, other=0.0).to(tl.float32)
        probability = tl.exp2((scores - lse[:, None]) * (scale * LOG2_E))
        grad_scores = probability * (value[None, :] - attended[:, None]) * (grad * (scale / unit))[:, None]
        grad_scores = grad_scores.to(projection_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
        for start_d in range(0, D, BLOCK_D):
            columns = start_d + tl.arange(0, BLOCK_D)
            column_mask = columns < D
            key = _load_rows(key_base, keys, columns, N, D, STRIDE_N, EVEN)  # [BLOCK_N, BLOCK_D]
            product = tl.dot(grad_scores, key, input_precision=PRECISION)
            if HAS_OFFSET:
                offset_pointers = grad_offset_ptr + tile * D + columns
                offset_sum = tl.sum(product, axis=0) * unit
                if start_n > 0:
                    offset_sum += tl.load(offset_pointers, mask=column_mask, other=0.0)
                tl.store(offset_pointers, offset_sum, mask=column_mask)
            pointers = output_base + rows[:, None] * STRIDE_GRAD_N + columns[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            product *= unit
            if start_n > 0:
                product += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            tl.store(pointers, product.to(grad_projection_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # what is stored here is read again below, not always by the same thread

    value_pointers = value_ptr + image * stride_value_b + rows * STRIDE_VALUE_N
    own_value = tl.load(value_pointers, mask=row_mask, other=0.0).to(tl.float32)
    grad_value = tl.zeros([BLOCK_M], tl.float32)
    if HAS_OFFSET:
        by_lambda = tl.load(products_ptr + image * N + rows, mask=row_mask, other=0.0)
        plain = tl.load(products_ptr + (batch + image) * N + rows, mask=row_mask, other=0.0)
    pair = _next_pair(partner_ptr, image, -1, batch, BLOCK_B)
    while pair < batch:
        lam = tl.load(lam_ptr + pair)
        if HAS_UNIT:
            unit = tl.load(unit_ptr + pair)
        for start_n in range(0, N, BLOCK_N):
            queries = start_n + tl.arange(0, BLOCK_N)
            query_mask = queries < N
            query_base = projection_ptr + pair * stride_b
            scores = _scores(own_base, rows, query_base, queries, N, D, STRIDE_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
            if HAS_OFFSET:
                scores += tl.fma(lam, by_lambda, plain)[:, None]
            query_lse = tl.load(lse_ptr + pair * N + queries, mask=query_mask, other=float("inf"))
            query_attended = tl.load(attended_ptr + pair * N + queries, mask=query_mask, other=0.0)
            query_grad = tl.load(grad_ptr + pair * N + queries, mask=query_mask, other=0.0)
            probability = tl.exp2((scores - query_lse[None, :]) * (scale * LOG2_E))
            weighted = probability * query_grad[None, :]
            grad_value += tl.sum(weighted, axis=1)
            grad_scores = weighted * ((own_value[:, None] - query_attended[None, :]) * (scale / unit))
            offset_weight = tl.sum(grad_scores, axis=1) * unit
            grad_scores = grad_scores.to(projection_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N], transposed dS
            for start_d in range(0, D, BLOCK_D):
                columns = start_d + tl.arange(0, BLOCK_D)
                pointers = output_base + rows[:, None] * STRIDE_GRAD_N + columns[None, :]
                mask = row_mask[:, None] & (columns < D)[None, :]
                before = tl.load(pointers, mask=mask, other=0.0)  # asked for here, it arrives while the product runs
                query = _load_rows(query_base, queries, columns, N, D, STRIDE_N, EVEN)  # [BLOCK_N, BLOCK_D]
                product = tl.dot(grad_scores, query, input_precision=PRECISION) * unit
                if HAS_OFFSET:
                    offset = lam * _vector(query_lambda_ptr, columns, D, STRIDE_LAMBDA, HAS_LAMBDA)
                    offset += _vector(query_bias_ptr, columns, D, 1, HAS_BIAS)
                    product += offset_weight[:, None] * offset[None, :]
                product += before.to(tl.float32)
                tl.store(pointers, product.to(grad_projection_ptr.dtype.element_ty), mask=mask)
            tl.debug_barrier()
        pair = _next_pair(partner_ptr, image, pair, batch, BLOCK_B)
    if STRIDE_GRAD_N == D:
        tl.store(grad_value_ptr + image * N + rows, grad_value.to(grad_value_ptr.dtype.element_ty), mask=row_mask)
    else:
        rest = tl.arange(0, BLOCK_REST)
        values = tl.where(rest[None, :] == 0, grad_value[:, None], 0.0).to(grad_projection_ptr.dtype.element_ty)
        pointers = output_base + rows[:, None] * STRIDE_GRAD_N + D + rest[None, :]
        tl.store(pointers, values, mask=row_mask[:, None] & (rest < STRIDE_GRAD_N - D)[None, :])


@triton.jit
def _parameter_grad_kernel(
    grad_offset_ptr,
    grad_sum_ptr,
    lam_ptr,
    grad_query_ptr,
    grad_constant_ptr,
    PARTIALS: tl.constexpr,
    TILES: tl.constexpr,
    D: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the tiles' parts in a fixed order: grad_query[0] weighted by lam, [1] plain; grad_constant likewise.

    Grid: (chunks of channels,). The value's constants are one number each; the first program adds them up as well.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < D
    by_lambda = tl.zeros([BLOCK_D], tl.float32)
    plain = tl.zeros([BLOCK_D], tl.float32)
    value_by_lambda = 0.0
    value_plain = 0.0
    for start in range(0, PARTIALS, BLOCK_P):
        indices = start + tl.arange(0, BLOCK_P)
        mask = indices < PARTIALS
        lam = tl.load(lam_ptr + indices // TILES, mask=mask, other=0.0)
        grad_sum = tl.load(grad_sum_ptr + indices, mask=mask, other=0.0)
        value_by_lambda += tl.sum(rounded_product(1 - lam, grad_sum), axis=0)
        value_plain += tl.sum(grad_sum, axis=0)
        if HAS_OFFSET:
            pointers = grad_offset_ptr + indices.to(tl.int64)[:, None] * D + columns[None, :]
            part = tl.load(pointers, mask=mask[:, None] & column_mask[None, :], other=0.0)  # [BLOCK_P, BLOCK_D]
            by_lambda += tl.sum(rounded_product(lam[:, None], part), axis=0)
            plain += tl.sum(part, axis=0)
    if HAS_OFFSET:
        tl.store(grad_query_ptr + columns, by_lambda, mask=column_mask)
        tl.store(grad_query_ptr + D + columns, plain, mask=column_mask)
    if tl.program_id(0) == 0:
        tl.store(grad_constant_ptr, value_by_lambda)
        tl.store(grad_constant_ptr + 1, value_plain)


def forward_tile(architecture: str, itemsize: int, positions: int, channels: int) -> Tile:
    """The forward's tile, without register spills. `architecture`: "sm80", "sm90", "sm100" (or later) or "hip"."""
    if itemsize == 4:
        tile = Tile(rows=64, columns=64, width=32, warps=4, stages=2)
    elif architecture == "sm90":
        tile = Tile(rows=128, columns=256, width=64, warps=8, stages=3)
    elif architecture == "hip":
        tile = Tile(rows=64, columns=128, width=64, warps=4, stages=2)
    elif architecture == "sm80":
        tile = Tile(rows=128, columns=128, width=64, warps=8, stages=3)
    else:
        tile = Tile(rows=128, columns=128, width=32, warps=8, stages=3)
    return _fit(tile, positions, channels)


def backward_tile(architecture: str, itemsize: int, positions: int, channels: int) -> Tile:
    """The backward's tile: the largest for which no supported Triton spills more than 32 bytes a thread."""
    if itemsize == 4:
        columns = 64 if architecture in ("sm90", "hip") else 32
        tile = Tile(rows=64, columns=columns, width=32, warps=4, stages=2)
    elif architecture == "sm90":
        tile = Tile(rows=128, columns=256 if positions <= 256 else 128, width=32, warps=8, stages=3)
    elif architecture == "hip":
        tile = Tile(rows=64, columns=64, width=64, warps=4, stages=2)
    elif architecture == "sm80":
        tile = Tile(rows=64, columns=128, width=64, warps=8, stages=2)
    else:
        tile = Tile(rows=64, columns=128, width=16, warps=8, stages=3)
    return _fit(tile, positions, channels)


def _fit(tile: Tile, positions: int, channels: int) -> Tile:
    """Shrinks a tile to small maps; 64 rows are the least that four warps share without repeating each other."""
    rows = min(tile.rows, max(64, next_power_of_2(positions)))
    columns = min(tile.columns, max(16, next_power_of_2(positions)))
    width = min(tile.width, max(16, next_power_of_2(channels)))
    return Tile(rows, columns, width, max(4, tile.warps * rows // tile.rows), tile.stages)


def _architecture(device: torch.device) -> str:
    if device.type == "cpu":  # the interpreter, which has no limits
        return "sm90"
    if torch.version.hip:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm80" if major == 8 else "sm90" if major == 9 else "sm100"


def _precision(architecture: str) -> str:
    # float32 keeps float32's accuracy: three tf32 products on NVIDIA's matrix units, AMD's have float32 themselves.
    return "ieee" if architecture == "hip" else "tf32x3"


def _rows_are_contiguous(projection: Tensor) -> Tensor:
    return projection if projection.stride(2) == 1 else projection.contiguous()


@partial(Operator, "mix_attention")
def mix_attention(
    projection: Tensor,
    value: Tensor | None,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None,
    query_bias: Tensor | None,
    value_lambda: Tensor | None,
    value_bias: Tensor | None,
    width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For partners and lambdas [B] or [R, B]: logits [B, N] of the first draw and [R - 1, B, N] of the others, and for
    the first one's backward o and lse [B, N] and k0 and k1 [2, B, N] (see the module's docstring); float32.

    The last is empty where neither lambda nor a bias enters the query. Without `value` it is column D = `width` of a
    wider projection.
    """
    with torch.cuda.device_of(projection):
        return launch_forward(
            projection, value, partner, lam, query_lambda, query_bias, value_lambda, value_bias, width
        )


def launch_forward(
    projection: Tensor,
    value: Tensor | None,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None,
    query_bias: Tensor | None,
    value_lambda: Tensor | None,
    value_bias: Tensor | None,
    width: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mix_attention` with a tile of one's choice."""
    projection, value = split_projection(_rows_are_contiguous(projection), value, width)
    batch, positions, channels = projection.shape
    architecture = _architecture(projection.device)
    tile = tile or forward_tile(architecture, projection.element_size(), positions, channels)
    logits, others, attended, lse, products = _empty_outputs(projection, partner, query_lambda, query_bias)
    pairs = partner.numel()
    has_offset = len(products) > 0
    if has_offset:
        block_d = max(16, next_power_of_2(channels))
        block_m = max(1, 8192 // block_d)
        _key_products_kernel[(cdiv(positions, block_m), batch)](
            projection_ptr=projection,
            query_lambda_ptr=query_lambda,
            query_bias_ptr=query_bias,
            products_ptr=products,
            stride_b=projection.stride(0),
            N=positions,
            D=channels,
            STRIDE_N=projection.stride(1),
            STRIDE_LAMBDA=_element_stride(query_lambda),
            HAS_LAMBDA=query_lambda is not None,
            HAS_BIAS=query_bias is not None,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    _forward_kernel[(cdiv(positions, tile.rows), pairs)](
        projection_ptr=projection,
        value_ptr=value,
        partner_ptr=partner,
        lam_ptr=lam,
        products_ptr=products,
        value_lambda_ptr=value_lambda,
        value_bias_ptr=value_bias,
        logits_ptr=logits,
        others_ptr=others,
        attended_ptr=attended,
        lse_ptr=lse,
        stride_b=projection.stride(0),
        stride_value_b=value.stride(0),
        scale=1 / math.sqrt(channels),
        batch=batch,
        N=positions,
        D=channels,
        DRAWS=pairs // batch,
        STRIDE_N=projection.stride(1),
        STRIDE_VALUE_N=value.stride(1),
        HAS_OFFSET=has_offset,
        HAS_VALUE_LAMBDA=value_lambda is not None,
        HAS_VALUE_BIAS=value_bias is not None,
        PRECISION=_precision(architecture),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_D=tile.width,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return logits, others, attended, lse, products


def _empty_outputs(
    projection: Tensor, partner: Tensor, query_lambda: Tensor | None, query_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, positions, _ = projection.shape
    pairs = partner.numel()
    has_offset = query_lambda is not None or query_bias is not None
    shapes = (
        (batch, positions),
        (pairs // batch - 1, batch, positions),
        (batch, positions),
        (batch, positions),
        (2 if has_offset else 0, batch, positions),
    )
    return tuple(projection.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _element_stride(vector: Tensor | None) -> int:
    return 1 if vector is None else vector.stride(0)


@mix_attention.register_fake
def _(projection, value, partner, lam, query_lambda, query_bias, value_lambda, value_bias, width=None):
    return _empty_outputs(projection, partner, query_lambda, query_bias)


@partial(Operator, "mix_attention_backward")
def mix_attention_backward(
    grad_logits: Tensor,
    projection: Tensor,
    value: Tensor | None,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None,
    query_bias: Tensor | None,
    attended: Tensor,
    lse: Tensor,
    products: Tensor,
    width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projection, of value, of [query_lambda, query_bias] [2, D] and of [value_lambda, value_bias] [2].

    Of one draw, with its partner, lam, attended and lse alone. The second is empty where the value is a
    column of the projection, the third where neither lambda nor a bias enters the query.
    """
    with torch.cuda.device_of(projection):
        return launch_backward(
            grad_logits, projection, value, partner, lam, query_lambda, query_bias, attended, lse, products, width
        )


def launch_backward(
    grad_logits: Tensor,
    projection: Tensor,
    value: Tensor | None,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None,
    query_bias: Tensor | None,
    attended: Tensor,
    lse: Tensor,
    products: Tensor,
    width: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mix_attention_backward` with a tile of one's choice."""
    joined, columns = value is None, projection.shape[2]
    projection, value = split_projection(_rows_are_contiguous(projection), value, width)
    grad_logits = grad_logits.contiguous()
    batch, positions, channels = projection.shape
    architecture = _architecture(projection.device)
    tile = tile or backward_tile(architecture, projection.element_size(), positions, channels)
    row_tiles = cdiv(positions, tile.rows)
    has_offset = query_lambda is not None or query_bias is not None
    # More than one block of columns is added up in memory, which is done in float32.
    one_block = positions <= tile.columns
    grad_projection = projection.new_empty(
        batch, positions, columns, dtype=projection.dtype if one_block else torch.float32
    )
    grad_value = value.new_empty(0 if joined else (batch, positions))
    grad_offset = lse.new_empty(batch, row_tiles, channels)
    grad_sum = lse.new_empty(batch, row_tiles)
    grad_query = lse.new_empty(2 if has_offset else 0, channels)
    grad_constant = lse.new_empty(2)
    unit = None
    if projection.dtype == torch.float16:
        unit = lse.new_empty(batch)
        _unit_kernel[(batch,)](
            value_ptr=value,
            partner_ptr=partner,
            grad_ptr=grad_logits,
            unit_ptr=unit,
            stride_value_b=value.stride(0),
            scale=1 / math.sqrt(channels),
            N=positions,
            STRIDE_VALUE_N=value.stride(1),
            BLOCK_N=next_power_of_2(positions),
            num_warps=4,
            enable_fp_fusion=True,
        )
    _backward_kernel[(row_tiles, batch)](
        projection_ptr=projection,
        value_ptr=value,
        partner_ptr=partner,
        lam_ptr=lam,
        query_lambda_ptr=query_lambda,
        query_bias_ptr=query_bias,
        products_ptr=products,
        attended_ptr=attended,
        lse_ptr=lse,
        grad_ptr=grad_logits,
        unit_ptr=unit,
        grad_projection_ptr=grad_projection,
        grad_value_ptr=grad_value,
        grad_offset_ptr=grad_offset,
        grad_sum_ptr=grad_sum,
        stride_b=projection.stride(0),
        stride_value_b=value.stride(0),
        scale=1 / math.sqrt(channels),
        batch=batch,
        N=positions,
        D=channels,
        STRIDE_N=projection.stride(1),
        STRIDE_VALUE_N=value.stride(1),
        STRIDE_LAMBDA=_element_stride(query_lambda),
        STRIDE_GRAD_N=columns,
        HAS_LAMBDA=query_lambda is not None,
        HAS_BIAS=query_bias is not None,
        HAS_UNIT=unit is not None,
        PRECISION=_precision(architecture),
        BLOCK_B=next_power_of_2(batch),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_D=tile.width,
        BLOCK_REST=next_power_of_2(max(columns - channels, 1)),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    _parameter_grad_kernel[(cdiv(channels, 32) if has_offset else 1,)](
        grad_offset_ptr=grad_offset,
        grad_sum_ptr=grad_sum,
        lam_ptr=lam,
        grad_query_ptr=grad_query,
        grad_constant_ptr=grad_constant,
        PARTIALS=batch * row_tiles,
        TILES=row_tiles,
        D=channels,
        HAS_OFFSET=has_offset,
        BLOCK_P=128,
        BLOCK_D=32,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_projection.to(projection.dtype), grad_value, grad_query, grad_constant


@mix_attention_backward.register_fake
def _(grad_logits, projection, value, partner, lam, query_lambda, query_bias, attended, lse, products, width=None):
    has_offset = query_lambda is not None or query_bias is not None
    return (
        projection.new_empty(projection.shape),
        projection.new_empty(0) if value is None else value.new_empty(value.shape),
        lse.new_empty(2 if has_offset else 0, projection.shape[2] if width is None else width),
        lse.new_empty(2),
    )


def _save_for_backward(ctx, inputs, output):
    projection, value, partner, lam, query_lambda, query_bias, value_lambda, value_bias, width = inputs
    _, others, attended, lse, products = output
    ctx.mark_non_differentiable(others, attended, lse, products)
    ctx.set_materialize_grads(False)
    if partner.dim() == 2:
        partner, lam = partner[0], lam[0]
    ctx.save_for_backward(projection, value, partner, lam, query_lambda, query_bias, attended, lse, products)
    ctx.value_dtypes = [None if p is None else p.dtype for p in (value_lambda, value_bias)]
    ctx.width = width


def _backward(ctx, grad_logits, *_):
    if grad_logits is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: under activation checkpointing they are there for one reading
    grad_projection, grad_value, grad_query, grad_constant = mix_attention_backward(grad_logits, *saved, ctx.width)
    if saved[1] is None:
        grad_value = None
    query_parameters = saved[4:6]
    grad_query = [None if p is None else grad_query[i].to(p.dtype) for i, p in enumerate(query_parameters)]
    grad_constant = [None if d is None else grad_constant[i : i + 1].to(d) for i, d in enumerate(ctx.value_dtypes)]
    return grad_projection, grad_value, None, None, *grad_query, *grad_constant, None


mix_attention.register_autograd(_backward, setup_context=_save_for_backward)
