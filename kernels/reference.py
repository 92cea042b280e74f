"""Each operation in plain PyTorch: its definition, and the path taken without a GPU.

Sizes: B images, a feature map of h x w = N positions, D channels of the Mix Block's projection, images of H x W pixels.
Equations are those of the paper (arXiv 2103.13027, section 3.2), rearranged: a term that is constant along a softmax
row cancels, so lambda and the bias are needed on the query side only, and one projection serves queries and keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_attention(
    projection: Tensor,
    value: Tensor,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None = None,
    query_bias: Tensor | None = None,
    value_lambda: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    """Mask logits of each image with its partner, before upsampling and sigmoid.

    With y = projection, v = value, p = partner[b] and l = lam[b]:

        S[b, i, j]   = (y[b, i] + l * query_lambda + query_bias) . y[p, j] / sqrt(D)
        logits[b, i] = sum_j softmax_j(S[b, i, j]) * v[p, j] + (1 - l) * value_lambda + value_bias

    Args:
        projection: [B, N, D], the features times the shared query/key weight, without lambda and bias.
        value: [B, N], the features times the value weight, without lambda and bias.
        partner: [B] int64, the partner of each image.
        lam: [B] float32, the share of each image in its pair.
        query_lambda: [D], the projection's weight for the lambda channel; None without lambda embedding.
        query_bias: [D] or None.
        value_lambda: [1], the value's weight for the lambda channel, or None.
        value_bias: [1] or None.

    Returns:
        [B, N] float32. Products are accumulated in float32 (float64 for float64 inputs) whatever the input's dtype.
    """
    accumulate = torch.float64 if projection.dtype == torch.float64 else torch.float32
    with torch.autocast(projection.device.type, enabled=False):
        keys = projection.to(accumulate)
        queries = keys
        lam = lam.to(accumulate)
        if query_lambda is not None:
            queries = queries + lam[:, None, None] * query_lambda.to(accumulate)
        if query_bias is not None:
            queries = queries + query_bias.to(accumulate)
        scores = torch.bmm(queries, keys[partner].transpose(1, 2)) / math.sqrt(projection.shape[2])
        logits = torch.bmm(scores.softmax(dim=2), value.to(accumulate)[partner].unsqueeze(2)).squeeze(2)
        if value_lambda is not None:
            logits = logits + (1 - lam)[:, None] * value_lambda.to(accumulate)
        if value_bias is not None:
            logits = logits + value_bias.to(accumulate)
        return logits


def normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, H, W, 3] -> (x / 255 - mean) / std as [B, 3, H, W] in channels-last layout.

    Floating-point images are taken as normalised already and returned in `dtype` as they are.
    """
    if images.is_floating_point():
        return images.to(dtype)
    scale = 1 / (255 * std)
    return (images.permute(0, 3, 1, 2) * scale[:, None, None] - (mean / std)[:, None, None]).to(dtype)


def upsample_mask(logits: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[B, h, w] mask logits -> [B, H, W] mask of the partner in (0, 1): upsampling first, then the sigmoid."""
    corners = {} if mode == "nearest" else {"align_corners": False}
    return torch.sigmoid(F.interpolate(logits.unsqueeze(1), size=size, mode=mode, **corners).squeeze(1))


def mask_blend(
    logits: Tensor,
    images: Tensor,
    partner: Tensor,
    lam: Tensor,
    mean: Tensor,
    std: Tensor,
    mode: str,
    lam_margin: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with its partner under the upsampled mask m: x + (x[partner] - x) * m.

    Where lam <= lam_margin or lam >= 1 - lam_margin (and lam_margin > 0) the mask is the constant 1 - lam.

    Args:
        logits: [B, h, w] mask logits of the partner.
        images: [B, H, W, 3] uint8, or [B, 3, H, W] floating point and normalised already.
        partner: [B] int64.
        lam: [B] float32.
        mean, std: [3] float32 on the [0, 1] scale, for uint8 images.
        mode: "nearest" or "bilinear".
        lam_margin: how near to 0 or 1 lambda turns the mix into plain mixup; 0 = never.
        dtype: of the mixed images.

    Returns:
        mixed [B, 3, H, W] channels-last, and two [B] float32 means over the pixels, of m and of m squared.
    """
    normalized = normalize(images, mean, std, torch.promote_types(dtype, torch.float32))
    mask = upsample_mask(logits, tuple(normalized.shape[2:]), mode)
    if lam_margin > 0:
        outside = (lam <= lam_margin) | (lam >= 1 - lam_margin)
        mask = torch.where(outside[:, None, None], (1 - lam)[:, None, None].to(mask.dtype), mask)
    mixed = torch.lerp(normalized, normalized[partner], mask.unsqueeze(1).to(normalized.dtype))
    mixed = mixed.to(dtype).contiguous(memory_format=torch.channels_last)
    return mixed, mask.mean(dim=(1, 2)), mask.square().mean(dim=(1, 2))


def momentum_update(targets: list[Tensor], sources: list[Tensor], coefficient: float) -> None:
    """target <- coefficient * target + (1 - coefficient) * source, in place, for each pair of tensors."""
    torch._foreach_lerp_(targets, [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)], 1 - coefficient)
