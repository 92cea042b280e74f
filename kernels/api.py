"""The public operations: checks their arguments once and picks an implementation."""

import torch
from torch import Tensor

from automix_kernels import reference
from automix_kernels.reference import normalize, upsample_mask

__all__ = ["mask_blend", "mix_attention", "momentum_update", "normalize", "upsample_mask"]


def mix_attention(
    projection: Tensor,
    value: Tensor,
    partner: Tensor,
    lam: Tensor,
    query_lambda: Tensor | None = None,
    query_bias: Tensor | None = None,
    value_lambda: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Mask logits of each image with its partner: see `reference.mix_attention`."""
    return reference.mix_attention(
        projection, value, partner, lam, query_lambda, query_bias, value_lambda, value_bias
    )


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
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed images, and the per-image means of the mask and of its square: see `reference.mask_blend`."""
    return reference.mask_blend(logits, images, partner, lam, mean, std, mode, lam_margin, dtype)


def momentum_update(
    targets: list[Tensor], sources: list[Tensor], coefficient: float, *, implementation: str = "auto"
) -> None:
    """target <- coefficient * target + (1 - coefficient) * source, in place."""
    reference.momentum_update(targets, sources, coefficient)
