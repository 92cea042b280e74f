"""The method as one nn.Module: query encoder, momentum encoder, Mix Block; one forward is one training step's losses.

The total loss is a sum of independent parts: the query encoder learns from the clean and the (detached) mixed batch;
the Mix Block learns from the momentum encoder's verdict on its own mixed batch and from the mask loss. The momentum
encoder learns from no loss; `momentum.py` moves it after each optimizer step.
"""

import copy
from typing import NamedTuple

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, AutoMixConfig
from automix_dist.draws import Draws, MixDraw
from automix_dist.mix_block import MixBlock, mask_loss


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


class Encoder(nn.Module):
    """A backbone with two linear heads: `head_one` for clean images, `head_mix` for mixed ones (docs/method.md 2.1)."""

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head_one = _head(backbone.width, num_classes)
        self.head_mix = _head(backbone.width, num_classes)

    def forward(self, images: Tensor, head: str) -> Tensor:
        """[B, 3, H, W] -> [B, classes] float32 logits of `head`: "one" or "mix"."""
        return {"one": self.head_one, "mix": self.head_mix}[head](self.backbone(images)).float()

    def both_heads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.backbone(images)
        return self.head_one(embedding).float(), self.head_mix(embedding).float()


class AutoMix(nn.Module):
    """AutoMix (arXiv 2103.13027).

    Args:
        backbone: a Backbone, or any module with its attributes; it is copied for the momentum encoder.
        num_classes: width of the heads.
        config: the method's settings.
        mean, std: normalisation of uint8 images, three floats each on the [0, 1] scale.
        autocast: dtype of the forward passes; float32 = no autocast. Weights stay float32.
        implementation: of the kernels: "auto", "triton" or "reference".
        immediate_backward: differentiate each loss as soon as it is known, so that only one set of activations lives at
            a time instead of three; `total.backward()` then delivers the sum. Needs whole parameters (not ZeRO 3).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        config: AutoMixConfig | None = None,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        autocast: torch.dtype = torch.float32,
        implementation: str = "auto",
        immediate_backward: bool = False,
    ):
        super().__init__()
        self.config = config or AutoMixConfig()
        self.immediate_backward = immediate_backward
        self.autocast = autocast
        self.implementation = implementation
        self.query = Encoder(backbone, num_classes)
        self.momentum = copy.deepcopy(self.query).requires_grad_(False)
        self.mix_block = MixBlock(backbone.feature_channels, self.config, implementation)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, draws: Draws | None = None, mask_loss_weight: float = 0.0
    ) -> Losses | Logits | tuple[Tensor, Tensor]:
        """One training step's losses; without draws both encoders' logits; without labels what the Mix Block draws.

        A pure function of the weights and the arguments, apart from BatchNorm's running statistics (and dropout and
        stochastic depth where the backbone has them).

        Args:
            images: [B, H, W, 3] uint8, or [B, 3, H, W] floating point and normalised already.
            labels: [B] int64.
            draws: the step's random numbers.
            mask_loss_weight: scheduled weight of the mask loss.

        Returns:
            Losses; or Logits; or for people to look at, the partners' masks [B, H, W] and the mixed images
            [B, 3, H, W], normalised, of `draws.mix_block`.
        """
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast != torch.float32):
            clean = _lay_out(kernels.normalize(images, self.mean, self.std, self.autocast))
            if draws is None:
                return Logits(*self.query.both_heads(clean), *self.momentum.both_heads(clean))
            if labels is None:
                return self._mixes(clean, draws)
            return self._losses(images, clean, labels, draws, mask_loss_weight)

    def _losses(self, images: Tensor, clean: Tensor, labels: Tensor, draws: Draws, mask_loss_weight: float) -> Losses:
        """Steps 1 to 12 of docs/method.md 2.3, in its order: it fixes the order of BatchNorm updates."""
        config = self.config
        with torch.no_grad():
            features = self.momentum.backbone.features(clean, full=config.feature_pass == "full")
        train_logits, classifier_logits = self.mix_block(features, draws.mix_block, draws.classifier)

        mixed_for_block, mask_mean, mask_square_mean = self._blend(train_logits, images, draws.mix_block)
        loss_mask = mask_loss(
            config.mask_loss, mask_mean, mask_square_mean, draws.mix_block.lam, config.mask_loss_margin
        )
        with torch.no_grad():
            if draws.adjust_mask:
                mixed = self._blend_adjusted(classifier_logits, images, draws)
            else:
                mixed, _, _ = self._blend(classifier_logits, images, draws.classifier, config.lam_margin)

        loss_generator = torch.zeros_like(loss_mask)
        if draws.train_mixed_momentum:
            loss_generator = self._mixed_loss(self.momentum(mixed_for_block, "mix"), labels, draws.mix_block)
        total = self._differentiate(loss_generator + loss_mask * mask_loss_weight, self.mix_block)

        clean_logits = self.query(clean, "one")
        loss_clean = F.cross_entropy(clean_logits, labels, label_smoothing=config.label_smoothing)
        total = total + self._differentiate(loss_clean, self.query)

        # The last one keeps its graph: its backward pass overlaps with the engine's reduction.
        loss_mixed = self._mixed_loss(self.query(mixed, "mix"), labels, draws.classifier)
        total = total + loss_mixed
        with torch.no_grad():
            accuracy = (clean_logits.argmax(dim=1) == labels).float().mean()
            parts = (loss_clean, loss_mixed, loss_generator, loss_mask, mask_mean.mean(), accuracy)
            return Losses(total, *(part.detach() for part in parts))

    def _differentiate(self, loss: Tensor, part: nn.Module) -> Tensor:
        """The loss as it is; or with immediate_backward its value, with the gradients of `part` instead of a graph."""
        if not (self.immediate_backward and loss.requires_grad):
            return loss
        parameters = [p for p in part.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        torch.clear_autocast_cache()  # its casts of the weights hang on the graph that was just freed
        return _HoldGradients.apply(loss.detach(), gradients, *parameters)

    def _mixes(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        draw = draws.mix_block
        with torch.no_grad():
            logits, _ = self.mix_block(self.momentum.backbone.features(clean), draw, draws.classifier)
            mask = kernels.upsample_mask(logits, tuple(clean.shape[2:]), draw.upsampling)
            return mask, torch.lerp(clean.float(), clean[draw.partner].float(), mask.unsqueeze(1))

    def _blend(self, logits: Tensor, images: Tensor, draw: MixDraw, lam_margin: float = 0.0):
        mixed, mask_mean, mask_square_mean = kernels.mask_blend(
            logits,
            images,
            draw.partner,
            draw.lam,
            self.mean,
            self.std,
            draw.upsampling,
            lam_margin,
            self.autocast,
            implementation=self.implementation,
        )
        return _lay_out(mixed), mask_mean, mask_square_mean

    def _blend_adjusted(self, logits: Tensor, images: Tensor, draws: Draws) -> Tensor:
        """The classifier's mixed images under masks rescaled to the area lambda (docs/method.md 2.4)."""
        draw = draws.classifier
        images = kernels.normalize(images, self.mean, self.std)
        target = draws.mix_block.lam if self.config.mask_adjust_lam == "mix_block" else draw.lam
        own = 1 - kernels.upsample_mask(logits, tuple(images.shape[2:]), draw.upsampling)
        own = adjust_mask(own, target)
        if self.config.lam_margin > 0:
            outside = (draw.lam <= self.config.lam_margin) | (draw.lam >= 1 - self.config.lam_margin)
            own = torch.where(outside[:, None, None], draw.lam[:, None, None], own)
        return _lay_out(torch.lerp(images[draw.partner], images, own.unsqueeze(1)).to(self.autocast))

    def _mixed_loss(self, logits: Tensor, labels: Tensor, draw: MixDraw) -> Tensor:
        """lambda * CE(y) + (1 - lambda) * CE(y of the partner), with the drawn lambda, not the mask's area."""
        smoothing = self.config.label_smoothing
        own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        partner = F.cross_entropy(logits, labels[draw.partner], reduction="none", label_smoothing=smoothing)
        return (draw.lam * own + (1 - draw.lam) * partner).mean()


class _HoldGradients(torch.autograd.Function):
    """A loss value whose backward pass hands out gradients computed earlier, scaled by the incoming one."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        return None, None, *(g if g is None else g * scale for g in ctx.gradients)


def adjust_mask(own: Tensor, lam: Tensor) -> Tensor:
    """Rescale each image's own mask [B, H, W] to the area lam [B]: shrink it, or shrink its complement."""
    own = own.clamp(1e-8, 1 - 1e-8)
    area, lam = own.mean(dim=(1, 2), keepdim=True), lam[:, None, None]
    shrunk = own * (lam / area)
    grown = 1 - (1 - own) * ((1 - lam) / (1 - area))
    adjusted = torch.where(area > lam, shrunk, grown)
    return torch.where((area - lam).abs() > 1e-8, adjusted, own)


def _lay_out(images: Tensor) -> Tensor:
    """The layout in which convolutions are fast: channels-last on a GPU; on a CPU the weights' own, contiguous one."""
    return images.contiguous(memory_format=torch.channels_last if images.is_cuda else torch.contiguous_format)


def _head(width: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head
