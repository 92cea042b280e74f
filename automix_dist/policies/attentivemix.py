"""Attentive CutMix (arXiv 2003.13048): the cells of the partner that a trained teacher attends to most are pasted.

Attention is the mean over channels of the teacher's last feature map. OpenMixup's AttentiveMix+ takes the number of
cells from lambda, the paper a fixed one. The labels' shares follow the pasted area.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from automix_dist import policy
from automix_dist.backbone import create_backbone
from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError, ModelConfig
from automix_dist.policy import BetaSettings, Draw, require

NAMES = {
    "model.backbone": "teacher",
    "model.weights": "weights",
    "model.pretrained": "weights",
    "data.image_size": "teacher_size",
}
"""The teacher's settings, by what they are called for the backbone that is trained."""


@dataclass(frozen=True)
class Settings(BetaSettings):
    alpha: float = 2.0
    teacher: str = "resnet50"
    """The timm model that says where to look. It is a part of the checkpoints, and is built again for evaluation."""
    weights: str = ""
    """Its weights, a file as `model.weights` takes it; empty: timm's pretrained ones, from its cache or downloaded."""
    teacher_size: int = 224
    """Side in pixels of the images that the teacher sees."""
    cells: int | None = None
    """How many cells are pasted; null = a share 1 - lambda of them, at least one."""

    def __post_init__(self):
        super().__post_init__()
        require(self.teacher_size >= 1, "teacher_size", self.teacher_size, "a number of pixels")
        require(self.cells is None or self.cells >= 1, "cells", self.cells, "1 or more, or null")


class Policy(policy.Policy):
    def __init__(self, settings: Settings, *normalisation: tuple[float, ...]):
        super().__init__(settings, *normalisation)
        teacher = ModelConfig(
            settings.teacher, pretrained=not settings.weights, weights=os.path.expanduser(settings.weights)
        )
        try:
            self.teacher = create_backbone(teacher, -1, settings.teacher_size).requires_grad_(False)
        except ConfigError as error:
            message = str(error)
            for key, name in NAMES.items():
                message = message.replace(key, f"policy.settings.{name}")
            raise ConfigError(f"the teacher of policy attentivemix: {message}") from error
        self.register_buffer("teacher_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("teacher_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Policy":
        super().train(mode)
        self.teacher.eval()
        return self

    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        with torch.no_grad():
            pixels = (images * self.std + self.mean - self.teacher_mean) / self.teacher_std
            size = self.settings.teacher_size
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
            attention = self.teacher.features(pixels).float().mean(dim=1)
        cells = attention[0].numel()
        fixed = self.settings.cells
        wanted = ((1 - draw.lam) * cells).floor() if fixed is None else torch.full_like(draw.lam, fixed)
        rank = attention.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)[draw.partner]
        chosen = rank < wanted.clamp(1, cells).view(-1, 1)
        mask = chosen.float().view(-1, 1, *attention.shape[1:])
        return F.interpolate(mask, size=images.shape[2:], mode="nearest-exact").squeeze(1)
