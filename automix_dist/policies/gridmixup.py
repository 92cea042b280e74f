"""GridMixup (github.com/IlyaDobrynin/GridMixup): the partner shows through a grid of holes within a random crop.

This is what OpenMixup's benchmarks list as GridMix. The paper of that name (Baek et al., Pattern Recognition 2021) has
a second, local classification loss, which is not part of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from automix_dist import policy
from automix_dist.policy import BetaSettings, Draw, require


@dataclass(frozen=True)
class Settings(BetaSettings):
    alpha: float = 0.2
    holes: tuple[int, int] = (2, 6)
    """Range of the number of holes along the crop's width, drawn once per micro batch as all below."""
    hole_aspect: tuple[float, float] = (1.0, 1.0)
    """Range of height over width of a grid cell."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """Range of the crop's share of the image."""
    crop_aspect: tuple[float, float] = (0.5, 2.0)
    """Range of the crop's height over its width; a side that would exceed the image's is cut to it."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("holes", "hole_aspect", "crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            require(0 < low <= high, name, (low, high), "0 < low <= high")
        require(self.crop_area[1] <= 1, "crop_area", self.crop_area, "shares of the image, at most 1")


class Policy(policy.Policy):
    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        settings = self.settings
        holes = rng.integers(settings.holes[0], settings.holes[1] + 1)
        hole_aspect, area, aspect = (
            rng.uniform(*each) for each in (settings.hole_aspect, settings.crop_area, settings.crop_aspect)
        )
        crop_width = min(int(math.sqrt(int(height * width * area) / aspect)), width)
        crop_height = min(int(crop_width * aspect), height)
        cell_width = math.ceil(crop_width / holes)
        cell_height = max(int(cell_width * hole_aspect), 1)
        share = np.sqrt(1 - lam)[:, None]
        return {
            "rows": _holes(height, crop_height, cell_height, share, rng.random()),
            "columns": _holes(width, crop_width, cell_width, share, rng.random()),
        }

    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        return draw.extra["rows"].unsqueeze(2) * draw.extra["columns"].unsqueeze(1)


def _holes(size: int, crop: int, cell: int, share: np.ndarray, place: float) -> np.ndarray:
    """[B, size] float, 1 in the holes along one side: the first pixels of each cell, at least one and never all."""
    at = np.arange(size) - int((size - crop) * place)
    hole = np.clip((cell * share).astype(np.int64), 1, max(cell - 1, 1))
    return ((at >= 0) & (at < crop) & (at % cell < hole)).astype(np.float64)
