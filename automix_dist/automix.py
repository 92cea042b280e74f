"""The method as one nn.Module: query encoder, momentum encoder, Mix Block; one forward is one training step's losses.

The total loss is a sum of independent parts: the query encoder learns from the clean and the (detached) mixed batch;
the Mix Block learns from the momentum encoder's loss on its own mixed batch and from the mask loss. The momentum
encoder learns from no loss; `momentum.py` moves it after each optimizer step.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from automix_kernels import api as kernels
from automix_kernels.reference import is_plain
from torch import Tensor, nn

from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, AutoMixConfig, ConfigError, LossConfig
from automix_dist.convolutions import lay_out
from automix_dist.draws import Draws, MixDraw, draw_step, gallery_pairs, on_device
from automix_dist.encoder import Encoder, normalize_halves, set_up_compiler
from automix_dist.immediate_backward import Differentiated, differentiate, sum_losses
from automix_dist.loss import class_loss, mixed_loss
from automix_dist.mix_block import MixBlock, mask_loss
from automix_dist.policy import Mixes
from automix_dist.precision import surrounding_autocast


class Losses(NamedTuple):
    """What a training step returns; all scalars, all but `total` detached."""

    total: Tensor
    """The sum to differentiate."""
    clean: Tensor
    """Query encoder on clean images."""
    mixed: Tensor
    """Query encoder on its mixed images."""
    generator: Tensor
    """Momentum encoder on the Mix Block's mixed images; 0 in steps where the branch is switched off."""
    mask: Tensor
    """Mask loss before its weight."""
    mask_area: Tensor
    """Mean share that the Mix Block's masks give to the partner; its target is 1 - lambda."""
    accuracy: Tensor
    """Top-1 of the query encoder on the clean images."""


class Logits(NamedTuple):
    """Both encoders' answers, [B, classes] float32 each: from the head trained on clean and the one on mixed images."""

    query: Tensor
    query_mix: Tensor
    momentum: Tensor
    momentum_mix: Tensor


class AutoMix(nn.Module):
    """AutoMix (arXiv 2103.13027); its descendants in policies/ are subclasses.

    Args:
        backbone: a Backbone, or a module that stands in for one (see there); it is copied for the momentum encoder.
        num_classes: width of the heads.
        config: the method's settings.
        settings: of a descendant, its own ones.
        loss: form of the classification losses.
        mean, std: normalisation of uint8 images, three floats each on the [0, 1] scale.
        autocast: dtype of the forward passes; float32 = no autocast, None = the caller's. Weights stay float32.
        implementation: of the kernels: "auto", "triton" or "reference".
        immediate_backward: differentiate each loss as soon as it is known, so that only one set of activations lives at
            a time instead of three; `total.backward()` then delivers the sum.
        joint_query: the query encoder reads clean and mixed images in one training pass; its BatchNorms take the halves
            for two batches.

    Raises:
        ConfigError: for settings that the method cannot use.
        TypeError: if the backbone is none.
    """

    Losses = Losses
    loss_scale: Tensor | None = None
    """By what the caller multiplies `total` for float16; `immediate_backward` multiplies the losses that it
    differentiates, and divides their gradients again."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        config: AutoMixConfig | None = None,
        settings: Any = None,
        *,
        loss: LossConfig | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        autocast: torch.dtype | None = None,
        implementation: str = "auto",
        immediate_backward: bool = False,
        joint_query: bool = False,
    ):
        super().__init__()
        if not hasattr(backbone, "feature_channels"):
            raise TypeError(
                f"backbone is a {type(backbone).__name__}: expected what backbone.create_backbone(ModelConfig(NAME), "
                "FEATURE, IMAGE_SIZE) makes, or a module with a Backbone's attributes"
            )
        self.config = config or AutoMixConfig()
        self.settings = settings
        self.loss = loss or LossConfig()
        self.immediate_backward = immediate_backward
        self.joint_query = joint_query
        self.autocast = autocast
        self.implementation = implementation
        self.check_settings()
        self.query = Encoder(backbone, num_classes, clean_head_only=self.config.clean_images == "head")
        self.momentum = copy.deepcopy(self.query).requires_grad_(False)
        self.mix_block = self.make_mix_block(backbone.feature_channels)
        if joint_query:
            normalize_halves(self.query)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def check_settings(self) -> None:
        """Raise ConfigError for settings that the method cannot use."""
        if self.implementation == "triton" and (why := self.outside_kernels()):
            raise ConfigError(
                f"engine.kernels = 'triton', but with {why} the Mix Block runs in part in plain PyTorch: "
                "set engine.kernels=auto to allow that"
            )

    def outside_kernels(self) -> str | None:
        """The setting through which a part of the mixing is plain PyTorch; None if the kernels can do all of it."""
        if self.config.norm != "none":
            return f"automix.norm = {self.config.norm!r}"
        return f"automix.mask_adjust = {self.config.mask_adjust}" if self.config.mask_adjust else None

    def make_mix_block(self, channels: int) -> nn.Module:
        """The Mix Block for a feature map of so many channels."""
        return MixBlock(channels, self.config, self.implementation)

    def draw(self, images: Tensor, *, train_generator: bool = True, **where: int) -> Draws:
        """The random numbers of one forward pass over these images.

        Args:
            train_generator: whether the momentum encoder may judge the Mix Block's samples in this step.
            where: seed, step, and if not 0 micro_step and rank; the draws depend on nothing else.
        """
        draws = draw_step(self.config, len(images), **where, device=images.device)
        return draws if train_generator else draws._replace(train_generator=False)

    def gallery_draw(self, images: Tensor, sweep: int = 0) -> Draws:
        """Pairs and lambdas for people to look at: see `draws.gallery_pairs`."""
        lam, partner = (on_device(each, images.device) for each in gallery_pairs(len(images), sweep))
        draw = MixDraw(lam, partner, self.config.upsampling[0])
        return Draws.of(draw, draw)

    def compile_regions(self, backend: str = "inductor") -> None:
        """Have torch.compile replace both encoders and the Mix Block, each as a whole, at their next call.

        Evaluation stays as it is. Dropout and stochastic depth then draw other numbers from the same seed.
        """
        set_up_compiler()
        for region in (self.query, self.momentum, self.mix_block):
            region.compile(backend=backend, dynamic=False)
        # What a step calls beside their `forward`.
        others = ((self.momentum.backbone, "features"), (self.query, "clean_and_mixed"), (self.query, "with_features"))
        for owner, name in others:
            setattr(owner, name, torch.compile(getattr(owner, name), backend=backend, dynamic=False))

    def forward(
        self, images: Tensor, labels: Tensor | None = None, draws: Draws | None = None, mask_loss_weight: float = 0.0
    ) -> Losses | Logits | Mixes:
        """One training step's losses; without draws both encoders' logits; without labels what the Mix Block draws.

        A pure function of the weights and the arguments, apart from BatchNorm's running statistics (and dropout and
        stochastic depth where the backbone has them).

        Args:
            images: [B, H, W, 3] uint8, or [B, 3, H, W] floating point and normalised already.
            labels: [B] int64.
            draws: the step's random numbers.
            mask_loss_weight: scheduled weight of the mask loss.

        Returns:
            Losses; or Logits; or the Mixes of `draws.mix_block`.
        """
        dtype = self.autocast or surrounding_autocast(images.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            clean = lay_out(self._normalized(images, dtype))
            if draws is None:
                return Logits(*self.query.both_heads(clean), *self.momentum.both_heads(clean))
            if labels is None:
                return self._mixes(clean, draws)
            return self._losses(images, clean, labels, draws, mask_loss_weight)

    def _losses(self, images: Tensor, clean: Tensor, labels: Tensor, draws: Draws, mask_loss_weight: float) -> Losses:
        """Steps 1 to 7 of docs/method.md 2.3, in its order: it fixes the order of BatchNorm updates."""
        config = self.config
        clean_logits, mixed_logits = None, None
        if config.feature_source == "query":
            features, clean_logits = self.query.with_features(clean)
        else:
            with torch.no_grad():
                features = self.momentum.backbone.features(clean, full=config.feature_pass == "full")
        train_logits, classifier_logits = self.mix_block(features, draws.partner, draws.lam)

        num_mixed = math.ceil(config.generator_share * len(labels)) if draws.train_generator else 0
        mixed_for_block, mask_mean, mask_square_mean = self._blend(
            train_logits, images, draws.mix_block, num_mixed=num_mixed
        )
        loss_mask = mask_loss(
            config.mask_loss, mask_mean, mask_square_mean, draws.mix_block.lam, config.mask_loss_margin
        )
        with torch.no_grad():
            if draws.adjust_mask:
                mixed = self._blend_adjusted(classifier_logits, images, draws)
            else:
                mixed, _, _ = self._blend(classifier_logits, images, draws.classifier, config.lam_margin)

        loss_generator = torch.zeros_like(loss_mask)
        if draws.train_generator:
            loss_generator = self._mixed_loss(self.momentum(mixed_for_block, "mix"), labels, draws.mix_block)
        early = [self._differentiate(loss_generator + loss_mask * mask_loss_weight, self.mix_block)]

        if self.joint_query:
            clean_logits, mixed_logits = self.query.clean_and_mixed(clean, mixed)
        elif clean_logits is None:
            clean_logits = self.query(clean, "one")
        loss_clean = class_loss(clean_logits, labels, self.loss)
        early.append(loss_clean if self.joint_query else self._differentiate(loss_clean, self.query))

        if mixed_logits is None:
            mixed_logits = self.query(mixed, "mix")
        loss_mixed = self._mixed_loss(mixed_logits, labels, draws.classifier)
        total = sum_losses(early, loss_mixed)
        with torch.no_grad():
            accuracy = (clean_logits.argmax(dim=1) == labels).float().mean()
            parts = (loss_clean, loss_mixed, loss_generator, loss_mask, mask_mean.mean(), accuracy)
            return Losses(total, *(part.detach() for part in parts))

    def _differentiate(self, loss: Tensor, part: nn.Module) -> Tensor | Differentiated:
        """The loss as it is; or with immediate_backward its value, with the gradients of `part` instead of a graph."""
        return differentiate(loss, part, self.loss_scale) if self.immediate_backward else loss

    def _normalized(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return kernels.normalize(images, self.mean, self.std, dtype, implementation=self.implementation)

    def _mixes(self, clean: Tensor, draws: Draws) -> Mixes:
        draw = draws.mix_block
        with torch.no_grad():
            encoder = self.query if self.config.feature_source == "query" else self.momentum
            logits, _ = self.mix_block(encoder.backbone.features(clean), draws.partner, draws.lam)
            mask = kernels.upsample_mask(logits, tuple(clean.shape[2:]), draw.upsampling)
            mixed = torch.lerp(clean.float(), clean[draw.partner].float(), mask.unsqueeze(1))
            return Mixes(mask, mixed, draw.lam, draw.partner)

    def _blend(
        self,
        logits: Tensor,
        images: Tensor,
        draw: MixDraw,
        lam_margin: float | None = None,
        num_mixed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, mask_mean, mask_square_mean = kernels.mask_blend(
            logits,
            images,
            draw.partner,
            draw.lam,
            self.mean,
            self.std,
            draw.upsampling,
            lam_margin,
            surrounding_autocast(images.device),
            num_mixed,
            implementation=self.implementation,
        )
        return lay_out(mixed), mask_mean, mask_square_mean

    def _blend_adjusted(self, logits: Tensor, images: Tensor, draws: Draws) -> Tensor:
        """The classifier's mixed images under masks rescaled to the area lambda (docs/method.md 2.4)."""
        draw = draws.classifier
        images = self._normalized(images)
        target = draws.mix_block.lam if self.config.mask_adjust_lam == "mix_block" else draw.lam
        own = 1 - kernels.upsample_mask(logits, tuple(images.shape[2:]), draw.upsampling)
        own = adjust_mask(own, target)
        plain = is_plain(draw.lam, self.config.lam_margin)
        own = torch.where(plain[:, None, None], draw.lam[:, None, None], own)
        mixed = torch.lerp(images[draw.partner], images, own.unsqueeze(1))
        return lay_out(mixed.to(surrounding_autocast(images.device)))

    def _mixed_loss(self, logits: Tensor, labels: Tensor, draw: MixDraw) -> Tensor:
        """With the drawn lambda, not the mask's area; of the first images where there are fewer logits than labels."""
        size = len(logits)
        return mixed_loss(logits, labels[:size], labels[draw.partner[:size]], draw.lam[:size], self.loss)


def adjust_mask(own: Tensor, lam: Tensor) -> Tensor:
    """Rescale each image's own mask [B, H, W] to the area lam [B]: shrink it, or shrink its complement."""
    own = own.clamp(1e-8, 1 - 1e-8)
    area, lam = own.mean(dim=(1, 2), keepdim=True), lam[:, None, None]
    shrunk = own * (lam / area)
    grown = 1 - (1 - own) * ((1 - lam) / (1 - area))
    adjusted = torch.where(area > lam, shrunk, grown)
    return torch.where((area - lam).abs() > 1e-8, adjusted, own)
