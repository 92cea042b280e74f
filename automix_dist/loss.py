"""The classification losses, on plain and on mixed labels (docs/method.md 2.5)."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from automix_dist.config import LossConfig


def class_loss(
    logits: Tensor, labels: Tensor, config: LossConfig, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Loss of [B, classes] logits against [B] labels: a scalar, or [B] with reduction "none".

    The binary form, of the RSB recipes (arXiv 2110.00476), is summed over the classes.
    """
    if config.name == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=config.label_smoothing)
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    targets = targets * (1 - config.label_smoothing) + config.label_smoothing / logits.shape[1]
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
    return losses.mean() if reduction == "mean" else losses


def mixed_loss(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, config: LossConfig) -> Tensor:
    """lambda * loss(y) + (1 - lambda) * loss(y of the partner), the mean over the batch; lambda is [B]."""
    own = class_loss(logits, labels, config, "none")
    partner = class_loss(logits, partner_labels, config, "none")
    return (lam * own + (1 - lam) * partner).mean()
