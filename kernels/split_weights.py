"""The Mix Block's two weights as its products want them, in one pass: Triton kernels and the torch op.

A weight has a column for each channel of the features and one for lambda. The products read the former, densely and in
the features' type; the attention reads the latter, in float32. Operation by operation the casts are two launches, and
four for the gradients, which have to be put together again; here it is one each.
"""

import torch
import triton
import triton.language as tl
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
    query_ptr,
    value_ptr,
    query_lambda_ptr,
    value_lambda_ptr,
    D,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (chunks of columns, D + 1 rows); the last row is the value's."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if row < D:
        weight_ptr, part_ptr = query_weight_ptr + row * COLUMNS, query_ptr + row * CHANNELS
        _split_row(weight_ptr, part_ptr, query_lambda_ptr + row, columns, COLUMNS, CHANNELS)
    else:
        _split_row(value_weight_ptr, value_ptr, value_lambda_ptr, columns, COLUMNS, CHANNELS)


@triton.jit
def _join_kernel(
    grad_query_ptr,
    grad_value_ptr,
    grad_query_lambda_ptr,
    grad_value_lambda_ptr,
    grad_query_weight_ptr,
    grad_value_weight_ptr,
    D,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_split_kernel` the other way round."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if row < D:
        part_ptr, weight_ptr = grad_query_ptr + row * CHANNELS, grad_query_weight_ptr + row * COLUMNS
        _join_row(part_ptr, grad_query_lambda_ptr + row, weight_ptr, columns, COLUMNS, CHANNELS)
    else:
        _join_row(grad_value_ptr, grad_value_lambda_ptr, grad_value_weight_ptr, columns, COLUMNS, CHANNELS)


def launch_split(
    query_weight: Tensor, value_weight: Tensor, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[D, columns] and [1, columns] float32 -> their first `channels` columns in `dtype`, and their last one.

    The last two are empty where there is no column beside the channels'.
    """
    rows, columns = query_weight.shape
    outputs = _empty_parts(query_weight, channels, dtype)
    query, value, query_lambda, value_lambda = outputs
    with torch.cuda.device_of(query_weight):
        _split_kernel[(triton.cdiv(columns, BLOCK), rows + 1)](
            query_weight_ptr=query_weight.contiguous(),
            value_weight_ptr=value_weight.contiguous(),
            query_ptr=query,
            value_ptr=value,
            query_lambda_ptr=query_lambda,
            value_lambda_ptr=value_lambda,
            D=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs


def _empty_parts(query_weight: Tensor, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = query_weight.shape
    has_lambda = columns > channels
    return (
        query_weight.new_empty(rows, channels, dtype=dtype),
        query_weight.new_empty(1, channels, dtype=dtype),
        query_weight.new_empty(rows if has_lambda else 0),
        query_weight.new_empty(1 if has_lambda else 0),
    )


split_weights = torch.library.custom_op("automix::split_weights", launch_split, mutates_args=(), device_types="cuda")


@split_weights.register_fake
def _(query_weight, value_weight, channels, dtype):
    return _empty_parts(query_weight, channels, dtype)


def launch_join(
    grad_query: Tensor, grad_value: Tensor, grad_query_lambda: Tensor, grad_value_lambda: Tensor
) -> tuple[Tensor, Tensor]:
    """The parts' gradients put together as those of the weights, float32."""
    rows, channels = grad_query.shape
    outputs = _empty_weights(grad_query, grad_value_lambda)
    columns = outputs[0].shape[1]
    with torch.cuda.device_of(grad_query):
        _join_kernel[(triton.cdiv(columns, BLOCK), rows + 1)](
            grad_query_ptr=grad_query.contiguous(),
            grad_value_ptr=grad_value.contiguous(),
            grad_query_lambda_ptr=grad_query_lambda.contiguous(),
            grad_value_lambda_ptr=grad_value_lambda,
            grad_query_weight_ptr=outputs[0],
            grad_value_weight_ptr=outputs[1],
            D=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs


def _empty_weights(grad_query: Tensor, grad_value_lambda: Tensor) -> tuple[Tensor, Tensor]:
    rows, channels = grad_query.shape
    columns = channels + len(grad_value_lambda)
    return tuple(grad_query.new_empty(count, columns, dtype=torch.float32) for count in (rows, 1))


split_weights_backward = torch.library.custom_op(
    "automix::split_weights_backward", launch_join, mutates_args=(), device_types="cuda"
)


@split_weights_backward.register_fake
def _(grad_query, grad_value, grad_query_lambda, grad_value_lambda):
    return _empty_weights(grad_query, grad_value_lambda)


def _backward(ctx, *grads):
    return *split_weights_backward(*grads), None, None


split_weights.register_autograd(_backward)
