"""AlignMixup (arXiv 2103.15375): the last feature maps of a pair are mixed after one is aligned with the other.

The alignment is an entropic optimal transport plan between the positions of the two maps (Sinkhorn's algorithm). Half
of the micro batches mix the images instead. The published code ends the iterations when the plan hardly moves; here all
are run, which needs no word from the device.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from automix_dist import policy
from automix_dist.config import ConfigError
from automix_dist.policy import BetaSettings, Draw, require


@dataclass(frozen=True)
class Settings(BetaSettings):
    alpha: float = 2.0
    epsilon: float = 0.1
    """Strength of the entropy in the transport; the smaller, the harder the assignment."""
    iterations: int = 100
    """Sinkhorn iterations."""

    def __post_init__(self):
        super().__post_init__()
        require(self.epsilon > 0, "epsilon", self.epsilon, "a positive number")
        require(self.iterations >= 1, "iterations", self.iterations, "1 or more")


class Policy(policy.Policy):
    def check(self, backbone: nn.Module) -> None:
        model = getattr(backbone, "model", None)
        is_map = getattr(model, "output_fmt", "NCHW") == "NCHW" and not hasattr(model, "num_prefix_tokens")
        if not is_map or not hasattr(backbone, "last_map"):
            raise ConfigError("policy.name = 'alignmix' needs a CNN, whose last feature map is [B, C, h, w]")

    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        align, partner_moves = rng.integers(2, size=2)
        return {"align": bool(align), "partner_moves": bool(partner_moves)}

    def mix(self, images: Tensor, draw: Draw) -> None:
        return None

    def forward(self, encoder: nn.Module, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        # Both ways run the same modules in the same order, as engines with sharded weights need it of all ranks.
        align = draw.extra["align"]
        if not align:
            images = torch.lerp(images[draw.partner], images, draw.lam.view(-1, 1, 1, 1))
        maps = encoder.backbone.last_map(images)
        if align:
            maps = self._mix_aligned(maps, draw)
        return encoder.head_one(encoder.backbone.pool(maps)).float(), draw.lam

    def _mix_aligned(self, maps: Tensor, draw: Draw) -> Tensor:
        own = maps.flatten(2).transpose(1, 2).float()
        partner = own[draw.partner]
        with torch.autocast(maps.device.type, enabled=False):
            with torch.no_grad():
                # Each row of one and each column of the other is a weighting of the other map's positions.
                plan = transport(own, partner, self.settings.epsilon, self.settings.iterations) * own.shape[1]
            if draw.extra["partner_moves"]:
                partner = plan @ partner
            else:
                own = plan.transpose(1, 2) @ own
            mixed = torch.lerp(partner, own, draw.lam.view(-1, 1, 1))
        return mixed.transpose(1, 2).reshape(maps.shape).to(maps.dtype)


def transport(a: Tensor, b: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The entropic transport plans [B, N, N] between points a and b, [B, N, C], for squared distances.

    All points weigh 1 / N; each step of Sinkhorn's algorithm, in logarithms, makes the columns' sums exact.
    """
    squares = a.square().sum(dim=2).unsqueeze(2) + b.square().sum(dim=2).unsqueeze(1)
    scores = (2 * a @ b.transpose(1, 2) - squares) / epsilon
    weight = -math.log(a.shape[1])
    rows, columns = torch.zeros_like(scores[:, :, :1]), torch.zeros_like(scores[:, :1])
    for _ in range(iterations):
        rows = weight - torch.logsumexp(scores + columns, dim=2, keepdim=True)
        columns = weight - torch.logsumexp(scores + rows, dim=1, keepdim=True)
    return torch.exp(scores + rows + columns)
