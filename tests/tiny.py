"""A small AutoMix and its inputs, shared by the tests that need a whole training step in milliseconds."""

import torch
from torch import nn

from automix_dist.automix import AutoMix
from automix_dist.config import Config
from automix_dist.config_file import from_dict
from automix_dist.draws import draw_step

CLASSES, SIZE = 5, 16


class TinyBackbone(nn.Module):
    """Two stages and an embedding; `norm` is "batch" or "group"."""

    feature_channels, feature_size, width = 12, (4, 4), 20

    def __init__(self, norm: str = "batch"):
        super().__init__()
        make = nn.BatchNorm2d if norm == "batch" else lambda channels: nn.GroupNorm(4, channels)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 5, stride=4, padding=2, bias=False), make(12), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False), make(20), nn.ReLU())

    def features(self, images, *, full=False):
        features = self.stem(images)
        if full:
            self.top(features)
        return features

    def features_and_embedding(self, images):
        features = self.stem(images)
        return features, self.top(features).mean(dim=(2, 3))

    def forward(self, images):
        return self.features_and_embedding(images)[1]

    def layers_from_top(self):
        return {p: 2 for p in self.stem.parameters()} | {p: 1 for p in self.top.parameters()}


def tiny_config(**sections) -> Config:
    """A config of the tiny model: batch 16, four epochs; sections override."""
    base = {"batch_size": 16, "epochs": 4, "optimizer": {"lr": 0.1, "mix_momentum": 0.0}, "engine": {"device": "cpu"}}
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return from_dict(base)


def tiny_model(config: Config, norm: str = "batch") -> AutoMix:
    torch.manual_seed(config.seed)
    options = {"loss": config.loss, "immediate_backward": config.engine.immediate_backward}
    return AutoMix(TinyBackbone(norm), CLASSES, config.automix, **options)


def micro_batch(step: int, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images and labels of micro batch `index` of a step, the same on every machine."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = torch.randint(0, 256, (size, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)


def rank_draws(config: Config, step: int, rank: int, size: int):
    return draw_step(config.automix, size, seed=config.seed, step=step, rank=rank)
