"""AutoMix's training step as its authors published it, restated in plain PyTorch: what our step is measured against.

A restatement, not their code. It keeps what shapes that code's time: every projection made twice for both pairs, the
attention written out in float32, masks of two channels at image size, checks for NaN that wait for the device,
permutations copied from the host, scalars fetched for the log in every step, one parameter group and three small
operations of the momentum update per parameter. Images come normalised already, in its favour.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.config import AutoMixConfig
from automix_dist.encoder import Encoder
from automix_dist.mix_block import mask_loss


class PublishedStep(nn.Module):
    """One forward is one step's summed loss; see docs/method.md 2.3 for the order."""

    def __init__(self, backbone: nn.Module, num_classes: int, config: AutoMixConfig):
        super().__init__()
        self.config = config
        self.query = Encoder(backbone, num_classes)
        self.momentum = copy.deepcopy(self.query).requires_grad_(False)
        channels = backbone.feature_channels + int(config.lam_concat)
        self.projection = nn.Conv2d(channels, max(backbone.feature_channels // config.reduction, 1), 1)
        self.value = nn.Conv2d(channels, 1, 1)
        for layer in (self.projection, self.value):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, labels: Tensor, lams: list[float], partners: Tensor) -> Tensor:
        """Args: images [B, 3, H, W] normalised float32; labels [B]; two lambdas and two permutations [2, B] on the
        host, those of the Mix Block first."""
        partner_block, partner_classifier = (partner.to(images.device) for partner in partners)
        lam_block, lam_classifier = lams
        config = self.config

        features = self.momentum.backbone.features(images, full=True)
        mask = self._mask(features, lam_block, partner_block, images.shape[2])
        mask_classifier = self._mask(features, lam_classifier, partner_classifier, images.shape[2]).clone().detach()
        if not config.lam_margin < lam_classifier < 1 - config.lam_margin:
            shares = images.new_tensor([lam_classifier, 1 - lam_classifier])
            mask_classifier = shares.view(1, 2, 1, 1).expand_as(mask_classifier)
        partner_mask = mask[:, 1]
        areas, squares = partner_mask.mean(dim=(1, 2)), partner_mask.square().mean(dim=(1, 2))
        lam = areas.new_full((len(labels),), lam_block)
        loss_mask = _checked(mask_loss(config.mask_loss, areas, squares, lam, config.mask_loss_margin))

        mixed_for_block = images * mask[:, :1] + images[partner_block] * mask[:, 1:]
        mixed = images * mask_classifier[:, :1] + images[partner_classifier] * mask_classifier[:, 1:]
        loss_generator = self._mixed_loss(self.momentum(mixed_for_block, "mix"), labels, lam_block, partner_block)
        logits = self.query(images, "one")
        loss_clean = _checked(F.cross_entropy(logits, labels))
        loss_mixed = self._mixed_loss(self.query(mixed, "mix"), labels, lam_classifier, partner_classifier)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        for part in (loss_clean, loss_mixed, loss_generator, accuracy):
            part.item()  # for the log
        return loss_mixed + loss_clean + loss_generator + loss_mask * config.mask_loss_weight

    def _mask(self, features: Tensor, lam: float, partner: Tensor, side: int) -> Tensor:
        """[B, 2, H, W]: the shares of the image and of its partner."""
        own, other = features, features[partner]
        if self.config.lam_concat:
            own = torch.cat([own, torch.full_like(own[:, :1], lam)], dim=1)
            other = torch.cat([other, torch.full_like(other[:, :1], 1 - lam)], dim=1)
        value = self.value(other).flatten(2).transpose(1, 2).float()
        queries = self.projection(own).flatten(2).transpose(1, 2).float()
        keys = self.projection(other).flatten(2).float()
        scores = torch.matmul(queries, keys) / math.sqrt(queries.shape[2])
        _checked(scores)
        if torch.isinf(scores).any():
            scores = scores.clamp(-1e25, 1e25)
        attended = torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).view(len(value), 1, *features.shape[2:])
        upsampled = F.interpolate(attended, scale_factor=side // features.shape[2], mode="nearest")
        mask = _checked(torch.sigmoid(upsampled.float()))
        return torch.cat([1 - mask, mask], dim=1)

    def _mixed_loss(self, logits: Tensor, labels: Tensor, lam: float, partner: Tensor) -> Tensor:
        own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[partner])
        return _checked(lam * own + (1 - lam) * other)

    @torch.no_grad()
    def update_momentum(self, coefficient: float) -> None:
        for target, source in zip(self.momentum.parameters(), self.query.parameters(), strict=True):
            target.data = target.data * coefficient + source.data * (1 - coefficient)

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        groups = [{"params": [p]} for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4)


def _checked(tensor: Tensor) -> Tensor:
    if torch.isnan(tensor).any():
        raise ArithmeticError("NaN in the published step")
    return tensor
