"""An encoder: a backbone with linear heads; what BatchNorm makes of a batch of two halves; torch.compile's settings."""

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn

from automix_dist.fused_batchnorm import FusedBatchNorm2d

RECOMPILE_LIMIT = 64
"""How many versions torch.compile may make of a function, one for each image size of a schedule. Beyond the limit, 8 in
PyTorch, it runs uncompiled."""


class Encoder(nn.Module):
    """A backbone with linear heads: `head_one` for clean images, `head_mix` for mixed ones (docs/method.md 2.1).

    With `clean_head_only` the backbone does not learn from clean images in training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        heads: tuple[str, ...] = ("one", "mix"),
        clean_head_only: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.clean_head_only = clean_head_only
        for head in heads:
            setattr(self, f"head_{head}", _head(backbone.width, num_classes))

    def forward(self, images: Tensor, head: str) -> Tensor:
        """[B, 3, H, W] -> [B, classes] float32 logits of `head`: "one" or "mix"."""
        head_alone = self.training and self.clean_head_only and head == "one"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not head_alone):
            embedding = self.backbone(images)
        return getattr(self, f"head_{head}")(embedding).float()

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's feature map for the Mix Block, without a graph, and the logits of the clean head."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.clean_head_only):
            features, embedding = self.backbone.features_and_embedding(images)
        return features.detach(), self.head_one(embedding).float()

    def clean_and_mixed(self, clean: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of clean and of mixed images, each from its head, from one pass over both."""
        clean_embedding, mixed_embedding = self.backbone(torch.cat([clean, mixed])).chunk(2)
        if self.clean_head_only:
            clean_embedding = clean_embedding.detach()
        return self.head_one(clean_embedding).float(), self.head_mix(mixed_embedding).float()

    def both_heads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> the [B, classes] float32 logits of the clean and of the mixed head, from one pass."""
        embedding = self.backbone(images)
        return self.head_one(embedding).float(), self.head_mix(embedding).float()


def _head(width: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def normalize_halves(encoder: Encoder) -> None:
    """Have BatchNorm take each half of a training batch for a batch of its own, the first one first."""
    for layer in encoder.modules():
        if isinstance(layer, FusedBatchNorm2d):
            layer.batches = 2
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.forward = partial(_forward_halves, layer, layer.forward)


def _forward_halves(layer: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([forward(half) for half in images.chunk(2)]) if layer.training else forward(images)


def set_up_compiler() -> None:
    """RECOMPILE_LIMIT; and caches on disk that hold what was compiled for these very operators: their keys know an
    operator's name, but not what it returns, and another version's code would be taken and fail."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    torch.compiler.config.cache_key_tag = sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
