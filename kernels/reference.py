"""Each operation in plain PyTorch: its definition, and the path taken without a GPU.

Sizes: B images, a feature map of h x w = N positions, D channels of the Mix Block's projection, images of H x W pixels.
Equations are those of the paper (arXiv 2103.13027, section 3.2), rearranged: a term that is constant along a softmax
row cancels, so lambda and the bias are needed on the query side only, and one projection serves queries and keys.

The backward passes are written out too, as the kernels compute them; the definitions themselves are differentiated by
autograd.
"""

import math

import torch
import torch.nn.functional as F
from automix_kernels.projection import joined_rows, split_projection
from torch import Tensor


def split_weights(
    query_weight: Tensor, value_weight: Tensor, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The Mix Block's weights [D, columns] and [1, columns], cut into what is read by whom.

    Returns:
        their first `channels` columns, one below the other, [joined_rows(D), channels] in `dtype` with zeros at the
        end; and the last column of each, for lambda, [D] and [1] in the weights' type, empty where there is none.
    """
    width, columns = query_weight.shape
    (query, query_lambda), (value, value_lambda) = (
        weight.split([channels, columns - channels], dim=1) for weight in (query_weight, value_weight)
    )
    filling = query.new_zeros(joined_rows(width) - width - 1, channels)
    joined = torch.cat([query, value, filling]).to(dtype)
    return joined, query_lambda.flatten().clone(), value_lambda.flatten().clone()


def split_weights_backward(
    grad_joined: Tensor, grad_query_lambda: Tensor, grad_value_lambda: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The weights' gradients [D, columns] and [1, columns], in float32 (float64 for float64 gradients)."""
    columns = len(grad_value_lambda)
    grad_query, grad_value, _ = grad_joined.to(_accumulate_dtype(grad_joined)).split(
        [width, 1, len(grad_joined) - width - 1]
    )
    return (
        torch.cat([grad_query, grad_query_lambda.view(width, columns)], dim=1),
        torch.cat([grad_value, grad_value_lambda.view(1, columns)], dim=1),
    )


def mix_attention(
    projection: Tensor,
    value: Tensor | None,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None = None,
    query_bias: Tensor | None = None,
    value_lambda: Tensor | None = None,
    value_bias: Tensor | None = None,
    width: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mask logits of each image with its partner, before upsampling and sigmoid.

    With y = projection, v = value, p = partner[b] and l = lam[b]:

        S[b, i, j]   = (y[b, i] + l * query_lambda + query_bias) . y[p, j] / sqrt(D)
        logits[b, i] = sum_j softmax_j(S[b, i, j]) * v[p, j] + (1 - l) * value_lambda + value_bias

    Args:
        projection: [B, N, D], the features times the shared query/key weight, without lambda and bias.
        value: [B, N], the features times the value weight, without lambda and bias; or None, and it is column D of a
            wider projection, whose columns beyond it are read by nobody.
        partner: [B] or [R, B] int64, the partner of each image in each draw.
        lam: [B] or [R, B] float32, the share of each image in its pair.
        query_lambda: [D], the projection's weight for the lambda channel; None without lambda embedding.
        query_bias: [D] or None.
        value_lambda: [1], the value's weight for the lambda channel, or None.
        value_bias: [1] or None.
        width: D, where `value` is None.

    Returns:
        [B, N] float32, or for [R, B] a tuple of R such tensors, of which the first alone carries a gradient. Products
        are accumulated in float32 (float64 for float64 inputs) whatever the input's dtype.
    """
    projection, value = split_projection(projection, value, width)
    if partner.dim() == 2:
        parameters = (query_lambda, query_bias, value_lambda, value_bias)
        first = mix_attention(projection, value, partner[0], lam[0], *parameters)
        with torch.no_grad():
            others = [
                mix_attention(projection, value, *draw, *parameters) for draw in zip(partner[1:], lam[1:], strict=True)
            ]
        return first, *others
    accumulate = _accumulate_dtype(projection)
    with torch.autocast(projection.device.type, enabled=False):
        lam = lam.to(accumulate)
        keys = projection.to(accumulate)
        offset = _query_offset(lam, query_lambda, query_bias)
        queries = keys if offset is None else keys + offset.unsqueeze(1)
        scores = torch.bmm(queries, keys[partner].transpose(1, 2)) / math.sqrt(projection.shape[2])
        logits = torch.bmm(scores.softmax(dim=2), value.to(accumulate)[partner].unsqueeze(2)).squeeze(2)
        return _add_constants(logits, lam, value_lambda, value_bias)


def _accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _query_offset(lam: Tensor, query_lambda: Tensor | None, query_bias: Tensor | None) -> Tensor | None:
    """[B, D] in lam's dtype: what lambda and the bias add to every query of an image."""
    if query_lambda is None and query_bias is None:
        return None
    offset = 0 if query_lambda is None else lam[:, None] * query_lambda.to(lam.dtype)
    return offset if query_bias is None else (offset + query_bias.to(lam.dtype)).expand(lam.shape[0], -1)


def _add_constants(logits: Tensor, lam: Tensor, value_lambda: Tensor | None, value_bias: Tensor | None) -> Tensor:
    if value_lambda is not None:
        logits = logits + (1 - lam)[:, None] * value_lambda.to(logits.dtype)
    if value_bias is not None:
        logits = logits + value_bias.to(logits.dtype)
    return logits


def mix_attention_forward(
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
    """`mix_attention`, and what the first draw's backward needs.

    Returns:
        logits [B, N] of the first draw and [R - 1, B, N] of the others; o [B, N], the softmax-weighted value before the
        constants; lse [B, N], sqrt(D) times the logarithm of the softmax's denominator; the products of the projection
        with query_lambda and with query_bias [2, B, N], zeros for one that there is not, empty without both.
    """
    projection, value = split_projection(projection, value, width)
    if partner.dim() == 2:
        parameters = (query_lambda, query_bias, value_lambda, value_bias)
        draws = [
            mix_attention_forward(projection, value, *draw, *parameters) for draw in zip(partner, lam, strict=True)
        ]
        logits, others, *saved = draws[0]
        return logits, torch.stack([draw[0] for draw in draws[1:]]) if len(draws) > 1 else others, *saved
    accumulate = _accumulate_dtype(projection)
    lam = lam.to(accumulate)
    own = projection.to(accumulate)
    keys = own[partner]
    products = own.new_zeros(0 if query_lambda is None and query_bias is None else 2, *own.shape[:2])
    for i, parameter in enumerate((query_lambda, query_bias)):
        if parameter is not None:
            products[i] = own @ parameter.to(accumulate)
    scores = _unscaled_scores(own, keys, partner, lam, products)
    scale = 1 / math.sqrt(own.shape[2])
    lse = torch.logsumexp(scores * scale, dim=2) / scale
    probability = torch.exp((scores - lse.unsqueeze(2)) * scale)
    attended = torch.einsum("bij,bj->bi", probability, value.to(accumulate)[partner])
    logits = _add_constants(attended.clone(), lam, value_lambda, value_bias)
    return logits, logits.new_empty(0, *logits.shape), attended, lse, products


def _unscaled_scores(own: Tensor, keys: Tensor, partner: Tensor, lam: Tensor, products: Tensor) -> Tensor:
    scores = torch.bmm(own, keys.transpose(1, 2))
    if len(products) == 0:
        return scores
    by_lambda, plain = products[:, partner]
    return scores + (lam[:, None] * by_lambda + plain).unsqueeze(1)


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

    With P the softmax, recomputed from lse, g = grad_logits and o = attended:

        dS[b, i, j] = P[b, i, j] * g[b, i] * (v[p, j] - o[b, i]) / sqrt(D)

    The second is empty where the value is a column of the projection, the third without lambda and bias.
    """
    joined, columns = value is None, projection.shape[2]
    projection, value = split_projection(projection, value, width)
    accumulate = lse.dtype
    lam = lam.to(accumulate)
    grad_logits = grad_logits.to(accumulate)
    own = projection.to(accumulate)
    keys = own[partner]
    values = value.to(accumulate)
    scores = _unscaled_scores(own, keys, partner, lam, products)
    probability = torch.exp((scores - lse.unsqueeze(2)) / math.sqrt(own.shape[2]))
    weighted = probability * grad_logits.unsqueeze(2)
    grad_scores = weighted * (values[partner].unsqueeze(1) - attended.unsqueeze(2)) / math.sqrt(own.shape[2])

    grad_queries = torch.bmm(grad_scores, keys)
    offset = _query_offset(lam, query_lambda, query_bias)
    queries = own if offset is None else own + offset.unsqueeze(1)
    grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries)
    grad_projection = grad_queries.index_add(0, partner, grad_keys)
    grad_value = torch.zeros_like(values).index_add(0, partner, weighted.sum(dim=1))
    if offset is None:
        grad_query = own.new_empty(0, own.shape[2])
    else:
        grad_offset = grad_queries.sum(dim=1)
        grad_query = torch.stack([lam @ grad_offset, grad_offset.sum(dim=0)])
    grad_sums = grad_logits.sum(dim=1)
    grad_constant = torch.stack([(1 - lam) @ grad_sums, grad_sums.sum()])
    if joined:
        grad_projection = torch.cat([grad_projection, grad_value.unsqueeze(2)], dim=2)
        grad_projection = F.pad(grad_projection, (0, columns - width - 1))
        grad_value = grad_value.new_empty(0)
    return grad_projection.to(projection.dtype), grad_value.to(value.dtype), grad_query, grad_constant


def normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, H, W, 3] -> (x / 255 - mean) / std as [B, 3, H, W] in channels-last layout.

    Floating-point images are taken as normalised already and returned in `dtype` as they are.
    """
    if images.is_floating_point():
        return images.to(dtype)
    scale = 1 / (255 * std)
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return (images * scale[:, None, None] - (mean / std)[:, None, None]).to(dtype)


def upsample_mask(logits: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[B, h, w] mask logits -> [B, H, W] mask of the partner in (0, 1): upsampling first, then the sigmoid.

    mode: "nearest", or "bilinear" with the corners' pixels not aligned to the corners' cells; ValueError for another.
    """
    return torch.sigmoid(interpolate(logits.unsqueeze(1), size, mode).squeeze(1))


def interpolate(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W] as `upsample_mask` upsamples. Raises ValueError for another mode."""
    if mode == "bilinear":
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    if mode != "nearest":
        raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
    # Plain "nearest" is off by a cell for a few whole factors (41, 47, ...), where 1 / factor is rounded down.
    return F.interpolate(maps, size=size, mode="nearest-exact")


def mask_blend(
    logits: Tensor,
    images: Tensor,
    partner: Tensor,
    lam: Tensor,
    mean: Tensor,
    std: Tensor,
    mode: str,
    lam_margin: float | None = None,
    dtype: torch.dtype = torch.float32,
    num_mixed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with its partner under the upsampled mask m: x + (x[partner] - x) * m.

    Where lam <= lam_margin or lam >= 1 - lam_margin the mask is the constant 1 - lam.

    Args:
        logits: [B, h, w] mask logits of the partner.
        images: [B, H, W, 3] uint8, or [B, 3, H, W] floating point and normalised already.
        partner: [B] int64.
        lam: [B] float32.
        mean, std: [3] float32 on the [0, 1] scale, for uint8 images.
        mode: "nearest" or "bilinear".
        lam_margin: how near to 0 or 1 lambda turns the mix into plain mixup, the margin included; None = never.
        dtype: of the mixed images.
        num_mixed: mix only so many images, the first ones; None = all.

    Returns:
        mixed [B or num_mixed, 3, H, W] channels-last, and two [B] means over the pixels, of m and of m squared, in
        float32 (float64 for float64 logits).
    """
    normalized = normalize(images, mean, std, torch.promote_types(dtype, torch.float32))
    mask = _mask(logits, lam, tuple(normalized.shape[2:]), mode, lam_margin)
    weight = mask[:num_mixed].unsqueeze(1).to(normalized.dtype)
    mixed = torch.lerp(normalized[:num_mixed], normalized[partner[:num_mixed]], weight)
    mixed = mixed.to(dtype).contiguous(memory_format=torch.channels_last)
    return mixed, mask.mean(dim=(1, 2)), mask.square().mean(dim=(1, 2))


def _mask(logits: Tensor, lam: Tensor, size: tuple[int, int], mode: str, lam_margin: float | None) -> Tensor:
    mask = upsample_mask(logits.to(_accumulate_dtype(logits)), size, mode)
    if lam_margin is not None:
        mask = torch.where(is_plain(lam, lam_margin)[:, None, None], (1 - lam)[:, None, None].to(mask.dtype), mask)
    return mask


def is_plain(lam: Tensor, lam_margin: float) -> Tensor:
    """Where lambda is so near to 0 or 1 that the mask is constant, as plain mixup's."""
    return (lam <= lam_margin) | (lam >= 1 - lam_margin)


def mask_blend_backward(
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
    """The logits' gradient; an output that nothing depends on brings None, grad_mixed may be of the first images only.

    Each pixel has dm = sum_c grad_mixed[c] * (x[partner, c] - x[c]) + (grad_mean + 2 * m * grad_square_mean) / pixels,
    and the logits get the adjoint of the upsampling of dm * m * (1 - m), or zero where the mask is constant.
    """
    normalized = normalize(images, torch.zeros_like(std), std, _accumulate_dtype(logits))
    size = tuple(normalized.shape[2:])
    mask = upsample_mask(logits.to(normalized.dtype), size, mode)
    grad_mask = torch.zeros_like(mask)
    if grad_mixed is not None:
        num_mixed = len(grad_mixed)
        difference = normalized[partner[:num_mixed]] - normalized[:num_mixed]
        grad_mask[:num_mixed] += (grad_mixed * difference).sum(dim=1)
    if grad_mean is not None:
        grad_mask += grad_mean[:, None, None] / (size[0] * size[1])
    if grad_square_mean is not None:
        grad_mask += grad_square_mean[:, None, None] * 2 * mask / (size[0] * size[1])
    grad = (grad_mask * mask * (1 - mask)).unsqueeze(1)
    if lam_margin is not None:
        grad = grad.masked_fill(is_plain(lam, lam_margin)[:, None, None, None], 0)
    shape = [logits.shape[0], 1, *logits.shape[1:]]
    if mode == "bilinear":
        grad_logits = torch.ops.aten.upsample_bilinear2d_backward(grad, size, shape, False)
    else:
        grad_logits = torch.ops.aten._upsample_nearest_exact2d_backward(grad, size, shape)
    return grad_logits.squeeze(1).to(logits.dtype)


def momentum_update(
    targets: list[Tensor], sources: list[Tensor], coefficient: float, skip: Tensor | None = None
) -> None:
    """target <- coefficient * target + (1 - coefficient) * source, in place, for each pair of tensors; unless skip."""
    sources = [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)]
    if skip is None:
        torch._foreach_lerp_(targets, sources, 1 - coefficient)
        return
    steps = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(steps, (1 - coefficient) * (1 - skip.to(targets[0].dtype)))
    torch._foreach_add_(targets, steps)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """nn.BatchNorm2d in training, then the residual added, then ReLU; each in x's type, as those layers do it.

    Args:
        x: [B, C, H, W].
        weight, bias: [C].
        running_mean, running_var: [C], moved by `momentum` towards this batch's mean and unbiased variance, in place.
        num_batches: scalar int64, how many batches have moved them.
        residual: of x's shape and type, or None.
        groups: as many batches, one after the other, are in x.
    """
    normalized = [
        F.batch_norm(batch, running_mean, running_var, weight, bias, True, momentum, eps) for batch in x.chunk(groups)
    ]
    num_batches += groups
    y = torch.cat(normalized) if groups > 1 else normalized[0]
    return F.relu(y if residual is None else y + residual)


def batch_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] -> mean and 1 / sqrt(variance + eps) of each group, [groups, C]; the running statistics move."""
    batches = _grouped(x, groups).to(_accumulate_dtype(x))
    var, mean = torch.var_mean(batches, dim=(1, 3, 4), correction=0)
    count = batches[0].numel() // batches.shape[2]
    for group in range(groups):
        running_mean.lerp_(mean[group].to(running_mean.dtype), momentum)
        running_var.lerp_((var[group] * (count / (count - 1))).to(running_var.dtype), momentum)
    num_batches += groups
    return mean, (var + eps).rsqrt()


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(0, (groups, -1))


def _per_channel(values: Tensor) -> Tensor:
    """[C] or [groups, C] against [groups, images, C, H, W]."""
    return values.view(-1, 1, values.shape[-1], 1, 1)


def _as_map(grouped: Tensor, dtype: torch.dtype) -> Tensor:
    return grouped.flatten(0, 1).to(dtype).contiguous(memory_format=torch.channels_last)


def batch_norm_relu_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """relu((x - mean) * rstd * weight + bias + residual) in x's type, channels-last; the moments are [groups, C]."""
    y = (_grouped(x, len(mean)).to(mean.dtype) - _per_channel(mean)) * _per_channel(rstd * weight) + _per_channel(bias)
    return _as_map(F.relu(y if residual is None else y + _grouped(residual, len(mean))), x.dtype)


def batch_norm_relu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the residual; the moments are x's own.

    `y` is the result where there was a residual; else it is None, the ReLU's sign is that of its input computed again,
    and the residual's gradient is empty.

    With g what the ReLU lets through of `grad`, x^ = (x - mean) * rstd and n numbers in each channel of a group,
    x gets weight * rstd * (g - sum g / n - x^ * sum (g x^) / n), the bias sum g and the weight sum (g x^).
    """
    groups = len(mean)
    distance = _grouped(x, groups).to(mean.dtype) - _per_channel(mean)
    scale = _per_channel(rstd * weight)
    g = _grouped(grad, groups).to(mean.dtype)
    stopped = distance * scale + _per_channel(bias) <= 0 if y is None else _grouped(y, groups) <= 0
    g = g.masked_fill(stopped, 0)
    normalized = distance * _per_channel(rstd)
    first, second = (each.sum(dim=(1, 3, 4)) for each in (g, g * normalized))
    count = x.numel() // x.shape[1] // groups
    grad_x = scale * (g - _per_channel(first / count) - normalized * _per_channel(second / count))
    grad_residual = x.new_empty(0) if y is None else _as_map(g, x.dtype)
    return _as_map(grad_x, x.dtype), second.sum(dim=0).to(weight.dtype), first.sum(dim=0).to(bias.dtype), grad_residual
