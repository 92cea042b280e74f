"""AdAutoMix (arXiv 2312.11954): masks for two or three images, learned against the classifier in every other step.

In those steps the Mix Block maximises the mixed loss of the momentum encoder and minimises the cosine between its
answers to the mix and to the images in it. There is no mask loss, and the settings of one are ignored; of the section
`automix` those of UNUSED are refused.

The published code asks the momentum encoder anew for each image in a mix; here these answers are those of the pass that
makes the features, in another order. Its BatchNorm statistics thus see two batches per step instead of four or five,
which its evaluation notices; training differs only where the encoder draws random numbers.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from automix_kernels import reference
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.automix import AutoMix
from automix_dist.config import AutoMixConfig, ConfigError
from automix_dist.convolutions import lay_out
from automix_dist.draws import gallery_pairs, on_device, pairing, shared_rng, step_rng
from automix_dist.immediate_backward import sum_losses
from automix_dist.loss import class_loss
from automix_dist.mix_block import projection_norm, reset_projections
from automix_dist.policy import Mixes, require


@dataclass(frozen=True)
class Settings:
    samples: int = 3
    """Images in a mix."""
    random_samples: bool = False
    """Draw the number for each micro batch, from 2 to `samples`."""
    adversarial: float = 0.3
    """Weight of the mixed loss that the Mix Block maximises in an adversarial step; the cosine's is 1 minus it."""
    interval: int = 2
    """One step of so many is adversarial."""
    linear_share: float = 0.5
    """With three images or more: weight of a plain linear mix of them in the classifier's clean loss."""
    margin_as_published: bool = False
    """With three images or more, let the classifier see plain linear mixes nearly always, not only where lambda is near
    0 or 1: so does the published code, by a mistake in a comparison."""

    def __post_init__(self):
        require(self.samples >= 2, "samples", self.samples, "2 or more")
        require(0 <= self.adversarial <= 1, "adversarial", self.adversarial, "a weight in [0, 1]")
        require(self.interval >= 1, "interval", self.interval, "1 or more steps")
        require(0 <= self.linear_share <= 1, "linear_share", self.linear_share, "a weight in [0, 1]")


UNUSED = ("feature_source", "feature_pass", "generator_share", "generator_every", "mask_adjust")


class MultiDraw(NamedTuple):
    """How one mixed batch is made of S images each."""

    lam: Tensor
    """[S, B] float32, the shares, their sum over S is 1."""
    members: Tensor
    """[S, B] int64, S permutations: the images in each mix."""
    upsampling: str


class Draws(NamedTuple):
    mix_block: MultiDraw
    classifier: MultiDraw
    adversarial: bool
    """Whether the Mix Block works against the classifier in this step."""
    train_generator: bool
    """Whether the momentum encoder judges the Mix Block's samples in this step."""


class Losses(NamedTuple):
    """What a training step returns; all scalars, all but `total` detached."""

    total: Tensor
    clean: Tensor
    """Query encoder on clean images, and with three images or more on their linear mixes."""
    mixed: Tensor
    """Query encoder on its mixed images."""
    generator: Tensor
    """Momentum encoder on the Mix Block's mixed images."""
    cosine: Tensor
    """Between its answers to the mixes and to the images in them, weighted by their shares."""
    mask_area: Tensor
    """Mean share that the Mix Block's masks give to all images but the first."""
    accuracy: Tensor
    """Top-1 of the query encoder on the clean images."""


class Model(AutoMix):
    """AdAutoMix; the arguments are AutoMix's, with this file's Settings as `settings`."""

    Losses = Losses

    def check_settings(self) -> None:
        super().check_settings()
        self.settings = self.settings or Settings()
        if self.joint_query:
            raise ConfigError("engine.joint_query has no meaning for policy adautomix: set it to false")
        for key in UNUSED:
            value, only = getattr(self.config, key), getattr(AutoMixConfig(), key)
            if value != only:
                raise ConfigError(f"automix.{key} = {value!r} has no meaning for policy adautomix: set it to {only}")

    def outside_kernels(self) -> str:
        return "policy.name = 'adautomix'"

    def make_mix_block(self, channels: int) -> nn.Module:
        return AdaptiveMask(channels, self.config)

    def draw(self, images: Tensor, *, train_generator: bool = True, **where: int) -> Draws:
        config, settings, size = self.config, self.settings, len(images)
        rng, shared = step_rng(**where), shared_rng(**where)
        samples = int(shared.integers(2, settings.samples + 1)) if settings.random_samples else settings.samples
        lam = rng.beta(config.alpha, config.alpha, size=samples)

        def multi(shares: np.ndarray) -> MultiDraw:
            members = [pairing(rng, size, config.no_repeat) for _ in range(samples)]
            if samples == 2:
                members[0] = np.arange(size)
            elif config.no_repeat:
                for i in range(1, samples):  # powers of one cycle: no image twice in a mix of a batch of S or more
                    members[i] = members[0][members[i - 1]]
            mode = config.upsampling[rng.integers(len(config.upsampling))]
            shares = np.repeat(shares[:, None], size, axis=1)
            return MultiDraw(on_device(shares, images.device), on_device(np.stack(members), images.device), mode)

        if samples == 2:
            draws = [multi(np.array([each, 1 - each])) for each in lam]
        else:
            draws = [multi(lam / lam.sum()) for _ in range(2)]
        train_generator = train_generator and (config.switch_off == 0 or bool(shared.random() < config.switch_off))
        return Draws(*draws, adversarial=where["step"] % settings.interval == 0, train_generator=train_generator)

    def gallery_draw(self, images: Tensor, sweep: int = 0) -> Draws:
        lam, partner = (on_device(each, images.device) for each in gallery_pairs(len(images), sweep))
        own = torch.arange(len(images), device=images.device)
        draw = MultiDraw(torch.stack([lam, 1 - lam]), torch.stack([own, partner]), self.config.upsampling[0])
        return Draws(draw, draw, False, True)

    def _losses(self, images: Tensor, clean: Tensor, labels: Tensor, draws: Draws, mask_loss_weight: float) -> Losses:
        images = self._normalized(images)
        with torch.no_grad():
            features, embedding = self.momentum.backbone.features_and_embedding(clean)
            answers = self.momentum.head_mix(embedding).float()
        masks = self._masks(features, draws.mix_block, images)
        with torch.no_grad():
            mixed = lay_out(blend(images, self._classifier_masks(features, draws.classifier, images), draws.classifier))
        area = 1 - masks[:, 0].mean()

        generator = cosine = 0 * area  # with a gradient, of zeros, for engines that wait for one
        if draws.train_generator:
            mixed_logits = self.momentum(lay_out(blend(images, masks, draws.mix_block)), "mix")
            generator = self._shared_loss(mixed_logits, labels, draws.mix_block)
            similarity = F.cosine_similarity(mixed_logits, answers[draws.mix_block.members], dim=2)
            cosine = (draws.mix_block.lam * similarity).sum(dim=0).mean()
        weight = self.settings.adversarial
        objective = (1 - weight) * cosine - weight * generator if draws.adversarial else generator
        early = [self._differentiate(objective, self.mix_block)]

        clean_logits = self.query(clean, "one")
        loss_clean = class_loss(clean_logits, labels, self.loss)
        if len(draws.classifier.lam) > 2:
            linear = blend(images, draws.classifier.lam.T[:, :, None, None], draws.classifier)
            loss_linear = self._shared_loss(self.query(lay_out(linear), "mix"), labels, draws.classifier)
            loss_clean = torch.lerp(loss_clean, loss_linear, self.settings.linear_share)
        early.append(self._differentiate(loss_clean, self.query))
        loss_mixed = self._shared_loss(self.query(mixed, "mix"), labels, draws.classifier)
        total = sum_losses(early, loss_mixed)
        with torch.no_grad():
            accuracy = (clean_logits.argmax(dim=1) == labels).float().mean()
        return Losses(total, *(x.detach() for x in (loss_clean, loss_mixed, generator, cosine, area, accuracy)))

    def _masks(self, features: Tensor, draw: MultiDraw, images: Tensor) -> Tensor:
        """[B, S, H, W], the weights of the images in each mix; softmax after the upsampling."""
        logits = self.mix_block(features, draw)
        return reference.interpolate(logits, tuple(images.shape[2:]), draw.upsampling).softmax(dim=1)

    def _classifier_masks(self, features: Tensor, draw: MultiDraw, images: Tensor) -> Tensor:
        """The same, but constant where the first image's share is near 0 or 1."""
        first, margin = draw.lam[0], self.config.lam_margin
        is_plain = reference.is_plain(first, margin)
        if self.settings.margin_as_published and len(draw.lam) > 2:
            is_plain = (first <= margin) | (first < 1 - margin)
        masks = self._masks(features, draw, images)
        return torch.where(is_plain[:, None, None, None], draw.lam.T[:, :, None, None], masks)

    def _shared_loss(self, logits: Tensor, labels: Tensor, draw: MultiDraw) -> Tensor:
        """The loss for each image in a mix, weighted by its drawn share; mean over the batch."""
        losses = [class_loss(logits, labels[members], self.loss, "none") for members in draw.members]
        return (draw.lam * torch.stack(losses)).sum(dim=0).mean()

    def _mixes(self, clean: Tensor, draws: Draws) -> Mixes:
        draw = draws.mix_block
        with torch.no_grad():
            masks = self._masks(self.momentum.backbone.features(clean), draw, clean)
            return Mixes(masks[:, 1], blend(clean.float(), masks, draw), draw.lam[0], draw.members[1])


class AdaptiveMask(nn.Module):
    """One mask logit per image in a mix: attention from each image to the sum of the others' keys, on its own value.

    Queries and keys have a ReLU, and a norm before it if the config asks for one.
    """

    def __init__(self, channels: int, config: AutoMixConfig):
        super().__init__()
        inputs = channels + int(config.lam_concat)
        self.width = max(channels // config.reduction, 1)
        self.channels, self.lam_concat = channels, config.lam_concat
        self.query_weight = nn.Parameter(torch.empty(self.width, inputs))
        self.key_weight = nn.Parameter(torch.empty(self.width, inputs))
        self.value_weight = nn.Parameter(torch.empty(1, inputs))
        self.value_bias = nn.Parameter(torch.empty(1))
        self.query_norm, self.key_norm = (projection_norm(config.norm, self.width) for _ in range(2))
        self.query_bias = nn.Parameter(torch.empty(self.width)) if config.norm == "none" else None
        self.key_bias = nn.Parameter(torch.empty(self.width)) if config.norm == "none" else None
        reset_projections(self)

    def forward(self, features: Tensor, draw: MultiDraw) -> Tensor:
        """[B, C, h, w] -> [B, S, h, w] float32 logits."""
        size = features.shape[2:]
        tokens = features.flatten(2).transpose(1, 2)
        weights = torch.cat([self.query_weight, self.key_weight, self.value_weight])
        projected = F.linear(tokens, weights[:, : self.channels])
        with torch.autocast(features.device.type, enabled=False):
            projected = projected.float()
            parts = []
            for lam, members in zip(draw.lam, draw.members, strict=True):
                each = projected[members]
                if self.lam_concat:
                    each = each + lam[:, None, None] * weights[:, -1]
                query, key, value = each.split([self.width, self.width, 1], dim=2)
                query = self._finish(query, self.query_norm, self.query_bias, size)
                key = self._finish(key, self.key_norm, self.key_bias, size)
                parts.append((query, key, value + self.value_bias))
            all_keys = sum(key for _, key, _ in parts)
            logits = [
                torch.softmax(query @ (all_keys - key).transpose(1, 2) / math.sqrt(self.width), dim=2) @ value
                for query, key, value in parts
            ]
        return torch.cat(logits, dim=2).transpose(1, 2).unflatten(2, tuple(size))

    def _finish(self, tokens: Tensor, norm: nn.Module | None, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
        if norm is None:
            return F.relu(tokens + bias)
        return F.relu(norm(tokens.transpose(1, 2).unflatten(2, tuple(size))).flatten(2).transpose(1, 2))


def blend(images: Tensor, masks: Tensor, draw: MultiDraw) -> Tensor:
    """The mixes [B, 3, H, W] of images under masks [B, S, H, W], or a shape that expands to it."""
    return sum(masks[:, i, None] * images[members] for i, members in enumerate(draw.members))
