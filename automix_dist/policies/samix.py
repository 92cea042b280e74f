"""SAMix (arXiv 2111.15454): AutoMix with a Mix Block that sees both images in its queries and its keys.

Lambda scales the features instead of being one of their channels, and the value has a hidden layer. Of the section
`automix`, lam_concat must be off and norm "none"; the published recipes have mask_loss l1_variance and bilinear
upsampling.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.automix import AutoMix
from automix_dist.config import AutoMixConfig, ConfigError
from automix_dist.mix_block import attend_each, reset_projections
from automix_dist.policy import require


@dataclass(frozen=True)
class Settings:
    lam_curve: float | None = None
    """k of the S-shaped curve through 0, 1/2 and 1 that lambda follows before it scales the features; null = none."""
    value_dropout: float = 0.0
    """Dropout of the value (large-scale recipes: 0.1)."""

    def __post_init__(self):
        require(self.lam_curve is None or self.lam_curve >= 0, "lam_curve", self.lam_curve, "0 or more, or null")
        require(0 <= self.value_dropout < 1, "value_dropout", self.value_dropout, "a rate in [0, 1)")


class Model(AutoMix):
    """SAMix; the arguments are AutoMix's, with this file's Settings as `settings`."""

    def check_settings(self) -> None:
        super().check_settings()
        for key, needed in (("lam_concat", False), ("norm", "none")):
            value = getattr(self.config, key)
            if value != needed:
                raise ConfigError(
                    f"automix.{key} = {value!r}: policy samix needs {needed!r}; set it, or take one of its recipes"
                )

    def outside_kernels(self) -> str:
        return "policy.name = 'samix'"

    def make_mix_block(self, channels: int) -> nn.Module:
        return SAMixBlock(channels, self.config, self.settings or Settings())


class SAMixBlock(nn.Module):
    """From the features of image pairs to mask logits. For an image's features x and its partner's x':

        x <- (1 + c(lambda)) x      x' <- (1 + 1 - c(lambda)) x'      c: the curve
        logits = softmax(Q [x, x'] . K [x, x'] / sqrt(D)) V(x')       [x, x'] joined along the channels

    As in MixBlock, the weights belong to this module itself.
    """

    def __init__(self, channels: int, config: AutoMixConfig, settings: Settings):
        super().__init__()
        self.settings = settings
        self.width = max(channels // config.reduction, 1)
        hidden = max(channels // 2, 1)
        self.query_weight = nn.Parameter(torch.empty(self.width, 2 * channels))
        self.query_bias = nn.Parameter(torch.empty(self.width))
        self.key_weight = nn.Parameter(torch.empty(self.width, 2 * channels))
        self.key_bias = nn.Parameter(torch.empty(self.width))
        self.hidden_weight = nn.Parameter(torch.empty(hidden, channels))
        self.hidden_norm = nn.BatchNorm1d(hidden)
        self.value_weight = nn.Parameter(torch.empty(1, hidden))
        reset_projections(self)

    def forward(self, features: Tensor, partner: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        """As MixBlock's: mask logits [B, h, w] of each draw; only the first carries a gradient."""
        channels, h, w = features.shape[1:]
        tokens = features.flatten(2).transpose(1, 2)
        query, key = (weight.unflatten(1, (2, channels)).unbind(1) for weight in (self.query_weight, self.key_weight))
        # Scaling and projecting commute: one projection serves both draws and both roles of an image in a pair.
        weights = torch.cat([*query, *key, self.hidden_weight])
        projected = F.linear(tokens, weights)
        logits = attend_each(lambda *draw: self._attend(projected, *draw), partner, lam)
        return tuple(each.unflatten(1, (h, w)) for each in logits)

    def _attend(self, projected: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
        """[B, N, 4 D + hidden] -> [B, N] logits of one draw."""
        lam = lam_curve(lam, self.settings.lam_curve)[:, None, None]
        of_own, of_partner = (1 + lam), (2 - lam)
        with torch.autocast(projected.device.type, enabled=False):
            *parts, hidden = projected.float().split([self.width] * 4 + [len(self.hidden_weight)], dim=2)
            query_own, query_partner, key_own, key_partner = parts
            queries = of_own * query_own + of_partner * query_partner[partner] + self.query_bias
            keys = of_own * key_own + of_partner * key_partner[partner] + self.key_bias
            hidden = self.hidden_norm((of_partner * hidden[partner]).transpose(1, 2)).transpose(1, 2)
            value = F.dropout(F.elu(hidden) @ self.value_weight.T, self.settings.value_dropout, self.training)
            attention = torch.softmax(torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(self.width), dim=2)
            return torch.bmm(attention, value).squeeze(2)


def lam_curve(lam: Tensor, k: float | None) -> Tensor:
    """The curve (4/3 l^3 - 2 l^2 + (k + 1) l) / (k + 1/3): 0, 1/2 and 1 stay where they are."""
    if k is None:
        return lam
    return (4 / 3 * lam**3 - 2 * lam**2 + (k + 1) * lam) / (k + 1 / 3)
