"""SmoothMix (Lee et al., CVPR workshops 2020): the partner shows through a Gaussian at a random place.

The labels' shares follow the mask's mean; lambda is not drawn. OpenMixup gives the image's own label the share that its
partner has in the pixels, and the other way round; here both agree.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from automix_dist import policy
from automix_dist.policy import Draw, require


@dataclass(frozen=True)
class Settings:
    sigma: tuple[float, float] = (0.25, 0.5)
    """Range of the Gaussian's standard deviation, as a fraction of the image's height."""

    def __post_init__(self):
        require(0 < self.sigma[0] <= self.sigma[1], "sigma", self.sigma, "0 < low <= high")


class Policy(policy.Policy):
    def draw_lam(self, rng: np.random.Generator) -> float:
        return 0.5  # of no account: the mask's mean decides

    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        centre = rng.integers(height), rng.integers(width)
        sigma = rng.uniform(*self.settings.sigma) * height
        rows, columns = (
            np.exp(-((np.arange(size) - at) ** 2) / (2 * sigma**2))[None]
            for size, at in zip((height, width), centre, strict=True)
        )
        return {"rows": rows, "columns": columns}

    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        return (draw.extra["rows"].unsqueeze(2) * draw.extra["columns"].unsqueeze(1)).expand(len(images), -1, -1)
