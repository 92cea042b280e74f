"""What a hand-crafted mixing policy is, and how one is found by its name: a file of automix_dist/policies.

Each file there has a frozen dataclass `Settings`, and one of two classes (docs/policies.md):
    Policy  mixes the images of a `Classifier`
    Model   a whole model that learns how to mix: AutoMix and its descendants
"""

import importlib
from dataclasses import asdict, dataclass, fields, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, AutoMixConfig, Config, ConfigError, PolicyConfig
from automix_dist.config_file import build_section
from automix_dist.draws import on_device
from automix_dist.errors import did_you_mean


@dataclass(frozen=True)
class BetaSettings:
    """What most policies set; a policy's Settings derive from it."""

    alpha: float = 1.0
    """Lambda is drawn from Beta(alpha, alpha)."""

    def __post_init__(self):
        require(self.alpha > 0, "alpha", self.alpha, "a positive number")


class Draw(NamedTuple):
    """How one batch is mixed."""

    lam: Tensor
    """[B] float32, the share of each image in its pair that the policy aims at."""
    partner: Tensor
    """[B] int64, a permutation: the image that each image is mixed with."""
    extra: dict[str, Any]
    """What the policy drew besides: tensors [B, ...] on the device, or plain numbers and names."""


class Mix(NamedTuple):
    images: Tensor
    """[B, 3, H, W], the mixed images."""
    mask: Tensor
    """[B, H, W], or a shape that expands to it: the weight of the partner in each pixel."""
    lam: Tensor
    """[B] float32, the share of each image's own label."""


class Mixes(NamedTuple):
    """What a policy makes of images, for people to look at."""

    mask: Tensor
    """[B, H, W], the weight of the partner in each pixel."""
    images: Tensor
    """[B, 3, H, W], normalised."""
    lam: Tensor
    """[B]"""
    partner: Tensor
    """[B]"""

    def pixels(self, mean: Tensor, std: Tensor) -> Tensor:
        """The images as [B, H, W, 3] uint8, for the normalisation [3] that they have."""
        images = self.images * std[:, None, None] + mean[:, None, None]
        return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


class Policy(nn.Module):
    """A way to mix a batch with a permutation of itself.

    A subclass gives `mask`; `partners`, where the partner's pixels change too; `prepare`, where the mix depends on what
    the network says; or `forward`, where the mixing happens inside it. All of it runs on the device, for the whole
    batch at once; what is random is drawn on the host in `draw_lam` and `draw_extra`, and nowhere else.

    Args:
        settings: the Settings of the policy's file.
        mean, std: of the images that it gets, on the [0, 1] scale.
    """

    mixes = True
    """Whether images and labels are mixed at all."""

    def __init__(self, settings: Any, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD):
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def check(self, backbone: nn.Module) -> None:
        """Raise ConfigError if this backbone lacks something that the policy needs."""

    def changed_layers(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """The backbone's modules, by name, whose outputs `forward` changes by a hook that it removes again."""
        return {}

    def draw(self, rng: np.random.Generator, shared: np.random.Generator, images: Tensor) -> Draw:
        """The draws of one micro batch: one lambda, a permutation, and what `draw_extra` adds.

        `shared` is the same on all ranks (draws.shared_rng).
        """
        lam = np.full(len(images), self.draw_lam(rng))
        return self.finish_draw(rng, lam, rng.permutation(len(images)), images)

    def draw_lam(self, rng: np.random.Generator) -> float:
        return rng.beta(self.settings.alpha, self.settings.alpha)

    def finish_draw(self, rng: np.random.Generator, lam: np.ndarray, partner: np.ndarray, images: Tensor) -> Draw:
        """A draw with given lambdas [B] and partners [B]; the images tell size and device."""
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        extra = self.draw_extra(rng, lam, height, width)
        device = images.device
        extra = {k: on_device(v, device) if isinstance(v, np.ndarray) else v for k, v in extra.items()}
        return Draw(on_device(lam, device), on_device(partner, device), extra)

    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        """Further draws: arrays whose first axis is the batch, or plain numbers; for lambdas [B] and H x W pixels."""
        return {}

    def prepare(self, encoder: nn.Module, images: Tensor, labels: Tensor | None, draw: Draw) -> Draw:
        """Called before mixing: the draw with what the mix needs to know from the encoder. A gallery has no labels.

        It must run the same modules on all ranks.
        """
        return draw

    def mask(self, images: Tensor, draw: Draw) -> Tensor:
        """The partners' weights in [0, 1], [B, H, W] or a shape that expands to it."""
        raise NotImplementedError

    def partners(self, images: Tensor, draw: Draw) -> Tensor:
        """What each image [B, 3, H, W] is mixed with."""
        return images[draw.partner]

    def mix(self, images: Tensor, draw: Draw) -> Mix | None:
        """Mix normalised images [B, 3, H, W]; None if the policy mixes activations, or nothing."""
        mask = self.mask(images, draw)
        mixed = torch.lerp(images, self.partners(images, draw), mask.unsqueeze(1))
        return Mix(mixed, mask, 1 - mask.flatten(1).mean(dim=1))

    def forward(self, encoder: nn.Module, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Normalised images to the encoder's logits [B, classes] for their mixes, and the own labels' shares [B]."""
        mix = self.mix(images, draw)
        return encoder(mix.images, "one"), mix.lam


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """[B, 4] integers, top, bottom, left, right, ends excluded -> [B, H, W] float32: 1 inside, 0 outside."""
    top, bottom, left, right = (edge.view(-1, 1) for edge in boxes.unbind(dim=1))
    rows, columns = (torch.arange(size, device=boxes.device) for size in (height, width))
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).float()


def box_edges(centre: Any, share: Any, size: int) -> tuple[Any, Any]:
    """First and last (excluded) pixel along one side: `share` of it around `centre`, cut off at the image's edges.

    For numpy arrays and tensors alike; CutMix's rounding: half the side is rounded down.
    """
    half = 0.5 * size * share
    half = half.astype(np.int64) if isinstance(half, np.ndarray) else half.long()
    return (centre - half).clip(0, size), (centre + half).clip(0, size)


def load(config: PolicyConfig) -> tuple[ModuleType, Any]:
    """The policy's module and its settings, checked.

    Raises ConfigError for a setting that the policy does not have or cannot use.
    """
    module = importlib.import_module(f"automix_dist.policies.{config.name}")
    known = {each.name: f"policy.settings.{each.name}" for each in fields(module.Settings)}
    shared = {each.name: f"automix.{each.name}" for each in fields(AutoMixConfig)} if hasattr(module, "Model") else {}
    for key in config.settings:
        if key not in known:
            hint = did_you_mean(str(key), shared | known)
            has = ", ".join(known) or "no settings of its own"
            raise ConfigError(f"unknown key policy.settings.{key}{hint} (policy {config.name} has {has})")
    return module, build_section(module.Settings, config.settings, "policy.settings")


def needed_feature(config: Config) -> int | None:
    """Which of the backbone's feature maps a run's policy learns from; None if it is hand-crafted."""
    return config.automix.feature if hasattr(load(config.policy)[0], "Model") else None


def with_policy_settings(config: Config) -> Config:
    """The same with every setting of its policy written out. Raises ConfigError as `load` does."""
    return replace(config, policy=replace(config.policy, settings=asdict(load(config.policy)[1])))


def require(condition: bool, setting: str, value: object, expected: str) -> None:
    """Raise ConfigError naming one of a policy's settings unless the condition holds."""
    if not condition:
        raise ConfigError(f"policy.settings.{setting} = {value!r}: expected {expected}")
