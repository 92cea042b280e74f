"""The Mix Block's two weights as its products want them, in one pass: Triton kernels and the torch op.

A weight has a column for each channel of the features and one for lambda. The channels' columns of both weights make
one dense matrix in the features' type, so that one product gives projection and value; lambda's are read by the
attention, in float32. Operation by operation that is several launches, and as many for the gradients, which have to be
put together again; here it is one each.
"""

import torch
import triton
import triton.language as tl
from automix_kernels.operators import Operator, cdiv
from automix_kernels.projection import joined_rows
from torch import Tensor

BLOCK = 1024


@triton.jit
def _split_row(weight_ptr, part_ptr, lambda_ptr, columns, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=columns < COLUMNS)
    tl.store(part_ptr + columns, weight.to(part_ptr.dtype.element_ty), mask=columns < CHANNELS)
    if COLUMNS > CHANNELS:
        tl.store(lambda_ptr + columns - CHANNELS, weight, mask=columns == CHANNELS)


@triton.jit
def _join_row(part_ptr, lambda_ptr, weight_ptr, columns, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    grad = tl.load(part_ptr + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)
    if COLUMNS > CHANNELS:
        grad = tl.where(columns < CHANNELS, grad, tl.load(lambda_ptr))
    tl.store(weight_ptr + columns, grad, mask=columns < COLUMNS)


@triton.jit
def _split_kernel(
    query_weight_ptr,
    value_weight_ptr,
    joined_ptr,
    query_lambda_ptr,
    value_lambda_ptr,
    D,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (chunks of columns, rows of the joined weight): D of the queries, the value's, and zeros."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part_ptr = joined_ptr + row * CHANNELS
    if row < D:
        _split_row(query_weight_ptr + row * COLUMNS, part_ptr, query_lambda_ptr + row, columns, COLUMNS, CHANNELS)
    elif row == D:
        _split_row(value_weight_ptr, part_ptr, value_lambda_ptr, columns, COLUMNS, CHANNELS)
    else:
        tl.store(part_ptr + columns, tl.zeros([BLOCK], part_ptr.dtype.element_ty), mask=columns < CHANNELS)


@triton.jit
def _join_kernel(
    grad_joined_ptr,
    grad_query_lambda_ptr,
    grad_value_lambda_ptr,
    grad_query_weight_ptr,
    grad_value_weight_ptr,
    D,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_split_kernel` the other way round. Grid: (chunks of columns, D + 1)."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part_ptr = grad_joined_ptr + row * CHANNELS
    if row < D:
        weight_ptr = grad_query_weight_ptr + row * COLUMNS
        _join_row(part_ptr, grad_query_lambda_ptr + row, weight_ptr, columns, COLUMNS, CHANNELS)
    else:
        _join_row(part_ptr, grad_value_lambda_ptr, grad_value_weight_ptr, columns, COLUMNS, CHANNELS)


def launch_split(
    query_weight: Tensor, value_weight: Tensor, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[D, columns] and [1, columns] float32 -> `channels` columns of both in one matrix, and their last columns.

    The last two are empty where there is no column beside the channels'.
    """
    width, columns = query_weight.shape
    joined, query_lambda, value_lambda = outputs = _empty_parts(query_weight, channels, dtype)
    with torch.cuda.device_of(query_weight):
        _split_kernel[(cdiv(columns, BLOCK), len(joined))](
            query_weight_ptr=query_weight.contiguous(),
            value_weight_ptr=value_weight.contiguous(),
            joined_ptr=joined,
            query_lambda_ptr=query_lambda,
            value_lambda_ptr=value_lambda,
            D=width,
            COLUMNS=columns,
            CHANNELS=channels,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs


def _empty_parts(query_weight: Tensor, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    width, columns = query_weight.shape
    has_lambda = columns > channels
    return (
        query_weight.new_empty(joined_rows(width), channels, dtype=dtype),
        query_weight.new_empty(width if has_lambda else 0),
        query_weight.new_empty(1 if has_lambda else 0),
    )


split_weights = Operator("split_weights", launch_split)


@split_weights.register_fake
def _(query_weight, value_weight, channels, dtype):
    return _empty_parts(query_weight, channels, dtype)


def launch_join(
    grad_joined: Tensor, grad_query_lambda: Tensor, grad_value_lambda: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The parts' gradients put together as those of the weights, float32."""
    outputs = _empty_weights(grad_joined, grad_value_lambda, width)
    columns = outputs[0].shape[1]
    with torch.cuda.device_of(grad_joined):
        _join_kernel[(cdiv(columns, BLOCK), width + 1)](
            grad_joined_ptr=grad_joined.contiguous(),
            grad_query_lambda_ptr=grad_query_lambda.contiguous(),
            grad_value_lambda_ptr=grad_value_lambda,
            grad_query_weight_ptr=outputs[0],
            grad_value_weight_ptr=outputs[1],
            D=width,
            COLUMNS=columns,
            CHANNELS=grad_joined.shape[1],
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs


def _empty_weights(grad_joined: Tensor, grad_value_lambda: Tensor, width: int) -> tuple[Tensor, Tensor]:
    columns = grad_joined.shape[1] + len(grad_value_lambda)
    return tuple(grad_joined.new_empty(rows, columns, dtype=torch.float32) for rows in (width, 1))


split_weights_backward = Operator("split_weights_backward", launch_join)


@split_weights_backward.register_fake
def _(grad_joined, grad_query_lambda, grad_value_lambda, width):
    return _empty_weights(grad_joined, grad_value_lambda, width)


def _setup_context(ctx, inputs, output):
    ctx.width = len(inputs[0])


def _backward(ctx, *grads):
    return *split_weights_backward(*grads, ctx.width), None, None


split_weights.register_autograd(_backward, setup_context=_setup_context)
