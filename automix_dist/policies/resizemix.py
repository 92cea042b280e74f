"""ResizeMix (arXiv 2012.11101): the whole partner, made smaller, is pasted at a random place: CutMix's box.

The labels' shares follow the pasted area; lambda is not drawn.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from automix_dist.policies import cutmix
from automix_dist.policy import Draw, require


@dataclass(frozen=True)
class Settings:
    scale: tuple[float, float] = (0.1, 0.8)
    """Range of the pasted image's side, as a fraction of the whole one's, drawn uniformly."""

    def __post_init__(self):
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "0 < low <= high <= 1")


class Policy(cutmix.Policy):
    def draw_lam(self, rng: np.random.Generator) -> float:
        return 1 - rng.uniform(*self.settings.scale) ** 2

    def partners(self, images: Tensor, draw: Draw) -> Tensor:
        """Each partner shrunk into its box, by the nearest pixel; what lies outside of the box does not matter."""
        top, bottom, left, right = draw.extra["boxes"].unsqueeze(2).unbind(dim=1)
        rows = _sources(top, bottom, images.shape[2]).unsqueeze(2)
        columns = _sources(left, right, images.shape[3]).unsqueeze(1)
        return images.permute(0, 2, 3, 1)[draw.partner[:, None, None], rows, columns].permute(0, 3, 1, 2)


def _sources(first: Tensor, last: Tensor, size: int) -> Tensor:
    """[B, size]: for each pixel along one side the one that lands there when the side is shrunk to [first, last)."""
    at = torch.arange(size, device=first.device) - first
    return (at * size // (last - first).clamp(min=1)).clamp(0, size - 1)
