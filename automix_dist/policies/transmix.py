"""TransMix (arXiv 2111.09833): CutMix whose label shares are half the area and half the attention of a ViT.

The attention is the class token's in the last block, the mean over its heads, over the patches of the mixed image.
"""

from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.config import ConfigError
from automix_dist.policies import cutmix
from automix_dist.policy import BetaSettings, Draw


@dataclass(frozen=True)
class Settings(BetaSettings):
    """Nothing else."""


class Policy(cutmix.Policy):
    def check(self, backbone: nn.Module) -> None:
        """Of a class token that nothing reads, or whose attention also has positions in it, `class_attention` would say
        something else than the network does."""
        model = getattr(backbone, "model", None)
        blocks = getattr(model, "blocks", None) or [None]
        if (
            getattr(model, "cls_token", None) is None
            or getattr(model, "global_pool", None) != "token"
            or type(getattr(blocks[-1], "attn", None)) is not Attention
        ):
            raise ConfigError(
                "policy.name = 'transmix' needs a ViT that reads its class token and has plain attention, such as "
                "deit_small_patch16_224"
            )

    def forward(self, encoder: nn.Module, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        model, seen = encoder.backbone.model, []
        attention = model.blocks[-1].attn
        hook = attention.qkv.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        try:
            mix = self.mix(images, draw)
            logits = encoder.forward(mix.images, "one")  # not compiled: see manifoldmix.py
        finally:
            hook.remove()
        patches = class_attention(attention, seen[-1])[:, model.num_prefix_tokens :]
        mask = F.interpolate(mix.mask.unsqueeze(1), size=model.patch_embed.grid_size, mode="nearest").flatten(1)
        attended = (patches * (1 - mask)).sum(dim=1) / patches.sum(dim=1)
        return logits, (mix.lam + attended) / 2


def class_attention(attention: nn.Module, qkv: Tensor) -> Tensor:
    """What the class token attends to, the mean over heads: an attention layer's projection [B, N, 3 D] -> [B, N]."""
    with torch.no_grad(), torch.autocast(qkv.device.type, enabled=False):
        queries, keys, _ = qkv.float().unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys = attention.q_norm(queries[:, :, :1]), attention.k_norm(keys)
        return (queries @ keys.transpose(2, 3) * attention.scale).softmax(dim=3).mean(dim=1).squeeze(1)
