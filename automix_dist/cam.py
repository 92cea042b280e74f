"""Where an encoder looks: Grad-CAM (arXiv 1610.02391) of a timm backbone, for images and for the mixes of pairs."""

import math
from collections import Counter
from typing import NamedTuple

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.backbone import Backbone
from automix_dist.config import ConfigError
from automix_dist.data import Batch
from automix_dist.distributed import Process
from automix_dist.encoder import Encoder
from automix_dist.policy import Mixes

MAX_IMAGES = 64
MIN_SIDE = 4
"""Places along a side of the smallest feature map that tells where."""


class Showcase:
    """The first images of classes spread evenly over all: the same on any number of ranks.

    Raises ConfigError for a count that is not from 1 to MAX_IMAGES.
    """

    def __init__(self, count: int, classes: int):
        if not 1 <= count <= MAX_IMAGES:
            raise ConfigError(f"--cam {count}: expected a number of images from 1 to {MAX_IMAGES}")
        self._wanted = Counter(i * classes // count for i in range(count))
        self._found: list[tuple[int, int, Tensor]] = []  # label, sample, uint8 [H, W, 3] on the host

    def add(self, batch: Batch) -> None:
        """Keep what may be shown of this rank's next batch; samples must rise."""
        have = Counter(label for label, _, _ in self._found)
        for row, label in enumerate(batch.labels.tolist()):
            if have[label] < self._wanted[label]:
                have[label] += 1
                self._found.append((label, int(batch.indices[row]), batch.images[row].cpu()))

    def gather(self, process: Process) -> Batch | None:
        """The chosen images of all ranks, on the device, in the order of their classes; None if these have none."""
        found = sorted((each for own in process.gather(self._found) for each in own), key=lambda each: each[:2])
        have: Counter = Counter()
        chosen = []
        for label, sample, image in found:
            if have[label] < self._wanted[label]:
                have[label] += 1
                chosen.append((label, sample, image))
        if not chosen:
            return None
        labels, samples, images = zip(*chosen, strict=True)
        numbers = (torch.tensor(each, device=process.device) for each in (labels, samples))
        return Batch(torch.stack(images).to(process.device), *numbers)


class Views(NamedTuple):
    """What `look` saw of B images. Maps are [B, H, W] in [0, 1], their largest value 1 where any is positive."""

    batch: Batch
    guess: Tensor
    """[B] int64."""
    confidence: Tensor
    """[B], of the guess."""
    of_guess: Tensor
    of_label: Tensor
    mixes: Mixes | None
    """Each image with the next one; None if the policy mixes no images."""
    mixed: Tensor | None
    """[B, H, W, 3] uint8, the mixes' images."""
    of_own: Tensor | None
    """On the mixes, of each image's own class."""
    of_partner: Tensor | None


def check(model: nn.Module, image: Tensor, answer: str) -> None:
    """Raise ConfigError, before a long evaluation, if `look` cannot see this answer.

    Args:
        image: one as evaluation has them, [1, H, W, 3] uint8.
    """
    name = answer.partition("_")[0]
    if name == "ensemble":
        raise ConfigError("--cam: the ensemble has no features of its own; choose --encoder query or momentum")
    if hasattr(model, name):
        model.eval()
        _features(getattr(model, name).backbone, _normalized(model, image))


@torch.no_grad()
def look(model: nn.Module, batch: Batch, answer: str) -> Views:
    """Grad-CAM in float32 of one answer to each image, and to its mix with the next one.

    Args:
        model: of a policy; it is left in evaluation mode and frozen.
        answer: a name of the model's logits, such as "query_mix". Mixes are seen by the head trained on them, if
            there is one.

    Raises ConfigError as `check` does.
    """
    check(model, batch.images[:1], answer)
    name, _, head = answer.partition("_")
    model.eval().requires_grad_(False)
    encoder = getattr(model, name)
    images = _normalized(model, batch.images)
    probabilities = encoder(images, head or "one").softmax(dim=1)
    confidence, guess = probabilities.max(dim=1)
    maps = [_enlarged(each, images) for each in grad_cam(encoder, head or "one", images, [guess, batch.labels])]
    mixes = model(batch.images, None, model.gallery_draw(batch.images))
    mixed, mixed_maps = None, [None, None]
    if mixes is not None:
        mixed = mixes.pixels(model.mean, model.std)
        head = "mix" if hasattr(encoder, "head_mix") else "one"
        classes = [batch.labels, batch.labels[mixes.partner]]
        mixed_maps = [_enlarged(each, images) for each in grad_cam(encoder, head, mixes.images.float(), classes)]
    return Views(batch, guess, confidence, *maps, mixes, mixed, *mixed_maps)


def _normalized(model: nn.Module, images: Tensor) -> Tensor:
    return kernels.normalize(images, model.mean, model.std, implementation=model.implementation)


def grad_cam(encoder: Encoder, head: str, images: Tensor, classes: list[Tensor]) -> list[Tensor]:
    """For each [B] of classes the maps [B, h, w]: the feature map's channels, weighted by the mean over places of the
    logit's gradient, added up; negative sums are 0.

    The features are the backbone's last map, or its last tokens, where they are averaged; on small images the last of
    timm's feature maps with MIN_SIDE places along each side. Where only a class token is read, no other token has a
    gradient at the end: there they are what the last block's attention reads.

    Args:
        encoder: frozen.
        images: [B, 3, H, W], normalised.
    """
    with torch.enable_grad():
        features, channels, embedding = _features(encoder.backbone, images)
        logits = getattr(encoder, f"head_{head}")(embedding)
        maps = []
        for each in classes:
            logit = logits.gather(1, each[:, None]).sum()
            (gradient,) = torch.autograd.grad(logit, features, retain_graph=True)
            weights = _places(gradient, channels, encoder.backbone.model).mean(dim=(1, 2), keepdim=True)
            maps.append((weights * _places(features.detach(), channels, encoder.backbone.model)).sum(dim=3).relu())
    return maps


def _features(backbone: Backbone, images: Tensor) -> tuple[Tensor, int, Tensor]:
    """The features that begin the graph, their number of channels, and the embedding at the graph's end."""
    model = backbone.model
    if getattr(model, "global_pool", None) == "token":
        blocks = getattr(model, "blocks", None)
        if blocks is None or not hasattr(blocks[-1], "norm1"):
            raise _refused(model, "reads a class token only, and its last block has no norm1")
        features, embedding = _tapped(backbone, blocks[-1].norm1, images)
        return features, model.num_features, embedding
    features = backbone.last_map(images).detach().requires_grad_()
    if _places(features, model.num_features, model).shape[1] >= MIN_SIDE:
        return features, model.num_features, backbone.pool(features)
    modules = dict(model.named_modules())  # Twins' feature_info names some that do not exist
    for info in reversed(getattr(model, "feature_info", [])):
        if info["module"] not in modules:
            continue
        features, embedding = _tapped(backbone, modules[info["module"]], images)
        if _places(features, info["num_chs"], model).shape[1] >= MIN_SIDE:
            return features, info["num_chs"], embedding
    raise _refused(model, f"has no feature map of {MIN_SIDE} x {MIN_SIDE} places or more for these images")


def _tapped(backbone: Backbone, module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a module gives, as the start of the graph, and the embedding."""
    tapped = []

    def tap(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        tapped.append(output.detach().requires_grad_())
        return tapped[0]

    hook = module.register_forward_hook(tap)
    try:
        embedding = backbone(images)
    finally:
        hook.remove()
    return tapped[0], embedding


def _places(features: Tensor, channels: int, model: nn.Module) -> Tensor:
    """[B, C, h, w], [B, h, w, C] or tokens [B, N, C], those of no place first -> [B, h, w, C]."""
    if features.ndim == 4 and features.shape[1] == channels:
        return features.permute(0, 2, 3, 1)
    if features.ndim == 4 and features.shape[3] == channels:
        return features
    if features.ndim == 3 and features.shape[2] == channels:
        tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
        side = math.isqrt(tokens.shape[1])
        if side**2 == tokens.shape[1]:
            return tokens.unflatten(1, (side, side))
    raise _refused(model, f"has features of shape {list(features.shape[1:])}, which is not a feature map of the image")


def _refused(model: nn.Module, reason: str) -> ConfigError:
    return ConfigError(f"--cam: {model.pretrained_cfg.get('architecture')} {reason}: leave --cam out")


def _enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """[B, h, w] -> [B, H, W], each divided by its largest value."""
    maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return F.interpolate(maps[:, None], size=images.shape[2:], mode="bilinear").squeeze(1)
