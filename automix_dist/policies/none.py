"""No mixing: plain training on the images as the loader gives them."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from automix_dist import policy
from automix_dist.policy import Draw


@dataclass(frozen=True)
class Settings:
    """Nothing to set."""


class Policy(policy.Policy):
    mixes = False

    def draw_lam(self, rng: np.random.Generator) -> float:
        return 1.0

    def mix(self, images: Tensor, draw: Draw) -> None:
        return None

    def forward(self, encoder: nn.Module, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return encoder(images, "one"), draw.lam
