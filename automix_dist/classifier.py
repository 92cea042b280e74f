"""A plain classifier: one encoder with one head, trained on images that a hand-crafted policy mixes."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from automix_kernels import api as kernels
from torch import Tensor, nn

from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD, LossConfig
from automix_dist.convolutions import lay_out
from automix_dist.draws import gallery_pairs, shared_rng, step_rng
from automix_dist.encoder import Encoder, set_up_compiler
from automix_dist.loss import class_loss, mixed_loss
from automix_dist.policy import Draw, Mixes, Policy
from automix_dist.precision import surrounding_autocast


class Losses(NamedTuple):
    """What a training step returns; all scalars, all but `total` detached."""

    total: Tensor
    """The loss to differentiate."""
    mask_area: Tensor
    """Mean share of the partners' labels."""
    accuracy: Tensor
    """Top-1 on the mixed images against each image's own label."""


class Logits(NamedTuple):
    query: Tensor
    """[B, classes] float32."""


class AveragedLogits(NamedTuple):
    """With a moving average of the encoder: both answers, [B, classes] float32."""

    query: Tensor
    momentum: Tensor


class Classifier(nn.Module):
    """An encoder with one head, trained on the mixed images of a policy.

    Args:
        backbone: a Backbone, or a module that stands in for one (see there).
        num_classes: width of the head.
        policy: how images are mixed.
        loss: form of the classification loss.
        average: keep a moving average of the encoder beside it, evaluated as `momentum`; momentum.py moves it.
        mean, std: normalisation of uint8 images, three floats each on the [0, 1] scale.
        autocast: dtype of the forward passes; float32 = no autocast, None = the caller's. Weights stay float32.
        implementation: of the normalisation: "auto", "triton" or "reference".
    """

    Losses = Losses
    loss_scale: Tensor | None = None
    """See AutoMix; steps that are recorded differentiate with it."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        policy: Policy,
        *,
        loss: LossConfig | None = None,
        average: bool = False,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        autocast: torch.dtype | None = None,
        implementation: str = "auto",
    ):
        super().__init__()
        policy.check(backbone)
        self.implementation = implementation
        self.loss = loss or LossConfig()
        self.autocast = autocast
        self.policy = policy
        self.query = Encoder(backbone, num_classes, heads=("one",))
        if average:
            self.momentum = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def draw(self, images: Tensor, *, train_generator: bool = True, **where: int) -> Draw:
        """The random numbers of one forward pass over these images.

        Args:
            train_generator: of AutoMix; all models are called alike.
            where: seed, step, and if not 0 micro_step and rank; the draws depend on nothing else.
        """
        return self.policy.draw(step_rng(**where), shared_rng(**where), images)

    def gallery_draw(self, images: Tensor, sweep: int = 0) -> Draw:
        """Pairs and lambdas for people to look at: see `draws.gallery_pairs`."""
        return self.policy.finish_draw(np.random.default_rng(0), *gallery_pairs(len(images), sweep), images)

    def compile_regions(self, backend: str = "inductor") -> None:
        """Have torch.compile replace the encoder, as a whole, at its next call; evaluation too."""
        set_up_compiler()
        self.query.compile(backend=backend, dynamic=False)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, draw: Draw | None = None, mask_loss_weight: float = 0.0
    ) -> Losses | Logits | AveragedLogits | Mixes | None:
        """One training step's losses; without a draw the logits; without labels the policy's mixes.

        Args:
            images: [B, H, W, 3] uint8, or [B, 3, H, W] floating point and normalised already.
            labels: [B] int64.
            draw: from `draw` or `gallery_draw`.
            mask_loss_weight: not used; all models are called alike.

        Returns:
            Losses; or Logits (AveragedLogits with a moving average); or Mixes, None if the policy mixes no images.
        """
        dtype = self.autocast or surrounding_autocast(images.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            read_as = torch.float32 if self.policy.mixes else dtype  # mixing is done in float32
            clean = kernels.normalize(images, self.mean, self.std, read_as, implementation=self.implementation)
            clean = lay_out(clean)
            if draw is None:
                logits = self.query(clean, "one")
                return AveragedLogits(logits, self.momentum(clean, "one")) if self.has_average else Logits(logits)
            draw = self.policy.prepare(self.query, clean, labels, draw)
            if labels is None:
                mix = self.policy.mix(clean, draw)
                return mix and Mixes(mix.mask.expand(-1, *clean.shape[2:]), mix.images, mix.lam, draw.partner)
            logits, lam = self.policy(self.query, clean, draw)
        if self.policy.mixes:
            total = mixed_loss(logits, labels, labels[draw.partner], lam, self.loss)
        else:  # summed over the batch in mixed_loss's way, so that both have the same bits
            total = class_loss(logits, labels, self.loss, "none").mean()
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == labels).float().mean()
            return Losses(total, 1 - lam.mean(), accuracy)

    @property
    def has_average(self) -> bool:
        return hasattr(self, "momentum")
