"""CutMix (arXiv 1905.04899): a box of the partner, of area 1 - lambda, is pasted at a random place.

Where the box is cut off by the image's edge, the labels' shares follow the area that is left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from automix_dist import policy
from automix_dist.policy import BetaSettings, Draw, box_edges, box_mask


@dataclass(frozen=True)
class Settings(BetaSettings):
    """Nothing else."""


class Policy(policy.Policy):
    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        share = np.sqrt(1 - lam)
        rows = box_edges(rng.integers(height), share, height)
        columns = box_edges(rng.integers(width), share, width)
        return {"boxes": np.stack([*rows, *columns], axis=1)}

    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        return box_mask(draw.extra["boxes"], *images.shape[2:])
