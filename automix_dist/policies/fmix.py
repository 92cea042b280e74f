"""FMix (arXiv 2002.12047): a binary mask of area lambda, cut from random noise with a low-frequency spectrum.

The noise is the paper's. The published code takes two rows of its spectrum for the real and the imaginary part, which
leaves two frequencies along one axis, and OpenMixup's figures are from that code.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automix_dist import policy
from automix_dist.policy import BetaSettings, Draw, require


@dataclass(frozen=True)
class Settings(BetaSettings):
    decay: float = 3.0
    """Amplitudes fall as 1 / frequency ** decay."""

    def __post_init__(self):
        super().__post_init__()
        require(self.decay >= 0, "decay", self.decay, "0 or more")


class Policy(policy.Policy):
    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        noise = rng.standard_normal((1, height, width // 2 + 1, 2))
        rounded = np.ceil if rng.integers(2) else np.floor
        return {"noise": noise, "own_pixels": rounded(lam * height * width).astype(np.int64)}

    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        height, width = images.shape[2:]
        rows = torch.fft.fftfreq(height, device=images.device)
        columns = torch.fft.rfftfreq(width, device=images.device)
        frequency = (rows[:, None].square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
        spectrum = torch.view_as_complex(draw.extra["noise"]) / frequency**self.settings.decay
        noise = torch.fft.irfft2(spectrum, s=(height, width)).flatten(1)
        rank = noise.argsort(dim=1, descending=True).argsort(dim=1)
        return (rank >= draw.extra["own_pixels"][:, None]).float().view(-1, height, width)
