"""Mixup (arXiv 1710.09412): every pixel is lambda x the image + (1 - lambda) x the partner."""

from dataclasses import dataclass

from torch import Tensor

from automix_dist import policy
from automix_dist.policy import BetaSettings, Draw


@dataclass(frozen=True)
class Settings(BetaSettings):
    """Nothing else."""


class Policy(policy.Policy):
    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        return (1 - draw.lam).view(-1, 1, 1)
