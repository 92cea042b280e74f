"""SaliencyMix (arXiv 2006.01791): CutMix with each box around the most salient pixel of its partner.

Saliency is fine-grained saliency (Montabone & Soto 2010), which OpenCV has and the paper uses: how far a pixel differs
from the mean of its surroundings, at six scales. Here it is computed in floating point and for every partner; the
published code rounds at each stage, and places one image's box in the whole batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from automix_dist import policy
from automix_dist.policy import BetaSettings, Draw, box_edges, box_mask

SURROUNDINGS = (12, 24, 28, 48, 56, 112)
"""Half sides of the squares, in pixels."""
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Settings(BetaSettings):
    """Nothing else."""


class Policy(policy.Policy):
    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        height, width = images.shape[2:]
        red, green, blue = (images * self.std).unbind(dim=1)
        gray = LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue  # but for a constant
        peak = saliency(gray).flatten(1).argmax(dim=1)[draw.partner]
        share = (1 - draw.lam).sqrt()
        rows = box_edges(peak // width, share, height)
        columns = box_edges(peak % width, share, width)
        return box_mask(torch.stack([*rows, *columns], dim=1), height, width)


def saliency(gray: Tensor) -> Tensor:
    """[B, H, W] gray values, on any scale -> [B, H, W] saliency, larger where a pixel stands out."""
    height, width = gray.shape[1:]
    for _ in range(2):
        gray = F.pad(gray, (1, 1, 1, 1), mode="reflect")
        gray = (gray[:, :-2] + 2 * gray[:, 1:-1] + gray[:, 2:]) / 4
        gray = (gray[:, :, :-2] + 2 * gray[:, :, 1:-1] + gray[:, :, 2:]) / 4
    sums = F.pad(gray.double().cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0))
    brighter, darker = torch.zeros_like(gray), torch.zeros_like(gray)
    for half in SURROUNDINGS:
        top, bottom = _square(height, half, gray.device)
        left, right = _square(width, half, gray.device)
        rows = sums[:, bottom] - sums[:, top]
        total = rows[:, :, right] - rows[:, :, left]
        others = ((bottom - top)[:, None] * (right - left) - 1).clamp(min=1)
        difference = gray - (total - gray) / others
        brighter = brighter + difference.clamp(min=0)
        darker = darker - difference.clamp(max=0)
    return sum(each / each.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12) for each in (brighter, darker))


def _square(size: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last (excluded) pixel of the surroundings of each pixel along one side."""
    at = torch.arange(size, device=device)
    return (at - half + 1).clamp(0, size), (at + half + 1).clamp(0, size)
