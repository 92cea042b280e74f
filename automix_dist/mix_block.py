"""The Mix Block: from the features of image pairs to mask logits; and the losses on its masks."""

import math
from collections.abc import Callable

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.config import AutoMixConfig
from automix_dist.precision import surrounding_autocast


class MixBlock(nn.Module):
    """Cross-attention between the features of an image and of its partner (paper section 3.2; docs/method.md 1).

    Queries and keys share one projection of C (+ 1 for lambda) channels to D; the value has one channel. All weights
    belong to this module itself, not to child layers, so that an engine that shards them gathers them for its forward.

    Args:
        channels: C of the feature map.
        config: reduction, lam_concat and norm are read.
        implementation: of the kernels: "auto", "triton" or "reference".
    """

    def __init__(self, channels: int, config: AutoMixConfig, implementation: str = "auto"):
        super().__init__()
        inputs = channels + int(config.lam_concat)
        self.width = max(channels // config.reduction, 1)
        self.channels = channels
        self.lam_concat = config.lam_concat
        self.implementation = implementation
        self.query_weight = nn.Parameter(torch.empty(self.width, inputs))
        self.query_bias = nn.Parameter(torch.empty(self.width)) if config.norm == "none" else None
        self.value_weight = nn.Parameter(torch.empty(1, inputs))
        self.value_bias = nn.Parameter(torch.empty(1))
        self.norm = projection_norm(config.norm, self.width)
        reset_projections(self)

    def forward(self, features: Tensor, partner: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        """Mask logits of R draws from one projection; only the first carries a gradient.

        Args:
            features: [B, C, h, w].
            partner: [R, B] int64.
            lam: [R, B] float32.

        Returns:
            R tensors [B, h, w] float32: the logits of the partner's mask, at the feature's resolution.
        """
        h, w = features.shape[2:]
        tokens = features.flatten(2).transpose(1, 2)
        weight, query_lambda, value_lambda = kernels.split_weights(
            self.query_weight,
            self.value_weight,
            self.channels,
            surrounding_autocast(features.device, features.dtype),
            implementation=self.implementation,
        )
        projection = F.linear(tokens, weight)  # with the value as a column
        if self.norm is None:
            logits = kernels.mix_attention(
                projection,
                None,
                partner,
                lam,
                query_lambda,
                self.query_bias,
                value_lambda,
                self.value_bias,
                self.width,
                implementation=self.implementation,
            )
        else:
            projection, value, _ = projection.split([self.width, 1, projection.shape[2] - self.width - 1], dim=2)

            def attend(partner: Tensor, lam: Tensor) -> Tensor:
                return self._attend_normed(projection, value, partner, lam, query_lambda, value_lambda, (h, w))

            logits = attend_each(attend, partner, lam)
        return tuple(each.unflatten(1, (h, w)) for each in logits)

    def _attend_normed(
        self,
        projection: Tensor,
        value: Tensor,
        partner: Tensor,
        lam: Tensor,
        query_lambda: Tensor | None,
        value_lambda: Tensor | None,
        size: tuple[int, int],
    ) -> Tensor:
        """With a norm behind the projection lambda no longer cancels from the keys: queries and keys are made apart."""
        queries, keys, values = projection.float(), projection.float()[partner], value.float()[partner]
        if self.lam_concat:
            queries = queries + lam[:, None, None] * query_lambda
            keys = keys + (1 - lam)[:, None, None] * query_lambda
        queries, keys = (self._normed(tokens, size) for tokens in (queries, keys))
        with torch.autocast(projection.device.type, enabled=False):
            attention = torch.softmax(torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(self.width), dim=2)
            logits = torch.bmm(attention, values).squeeze(2) + self.value_bias
            if self.lam_concat:
                logits = logits + (1 - lam)[:, None] * value_lambda
        return logits

    def _normed(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, size)
        return self.norm(maps).float().flatten(2).transpose(1, 2)


def attend_each(attend: Callable[[Tensor, Tensor], Tensor], partner: Tensor, lam: Tensor) -> list[Tensor]:
    """`attend` of each draw's partners and lambdas, rows of [R, B]; only of the first with a graph."""
    logits = [attend(partner[0], lam[0])]
    with torch.no_grad():
        return logits + [attend(*draw) for draw in zip(partner[1:], lam[1:], strict=True)]


def projection_norm(name: str, width: int) -> nn.Module | None:
    """The norm behind a projection of [B, C, h, w] maps: AutoMixConfig.norm."""
    return {"none": lambda: None, "batch": lambda: nn.BatchNorm2d(width), "layer": lambda: ChannelNorm(width)}[name]()


def reset_projections(block: nn.Module) -> None:
    """Give a Mix Block's own weights and biases their starting values; its norms keep theirs."""
    for name, parameter in block.named_parameters(recurse=False):
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=0.01)
        else:
            nn.init.zeros_(parameter)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w], eps 1e-6 (the published fp16 ViT recipes)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mask_loss(form: str, mask_mean: Tensor, mask_square_mean: Tensor, lam: Tensor, margin: float) -> Tensor:
    """How far the masks are from covering 1 - lambda of the image, and from being binary (docs/method.md 1.4).

    Args:
        form: AutoMixConfig.mask_loss.
        mask_mean, mask_square_mean: [B], the means over the pixels of each partner's mask m and of m squared.
        lam: [B].
        margin: deviation that costs nothing.

    Returns:
        a scalar; forms with a variance term can be negative.

    Raises ValueError for another form.
    """
    mean, square = mask_mean.mean(), mask_square_mean.mean()
    if form == "sparsity":
        return F.relu(mean - square - margin)  # m is in [0, 1], so |m (m - 1)| = m - m^2
    deviation = (1 - mean - lam.mean()).abs()
    if form == "l1":
        return F.relu(deviation - margin)
    variance = square - mean.square()
    if form == "l1_variance":
        return F.relu(deviation - margin) - 2 * variance
    if form == "l2_variance":
        return F.relu(deviation.square() - margin**2) - 2 * variance
    raise ValueError(f"form = {form!r}: expected l1, sparsity, l1_variance or l2_variance")
