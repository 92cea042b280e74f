"""Which parameters decay, against timm's own grouping."""

import pytest
import torch
from test_recipes import SMALL
from timm.optim import param_groups_weight_decay

from automix_dist.backbone import create_backbone
from automix_dist.classifier import build_model
from automix_dist.config import from_dict
from automix_dist.optimizer import build_optimizer

BACKBONES = {
    "deit_small_patch16_224": {"pos_embed", "cls_token"},
    "swin_tiny_patch4_window7_224": {f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(4)},
    "pvt_v2_b1": set(),
    "convnext_tiny": set(),
    "resnet18": set(),
}
"""With the parameters that are no vectors and do not decay."""


def two_sides(name: str, decay_norm_and_bias: bool):
    kwargs = next(kwargs for start, kwargs in SMALL.items() if name.startswith(start))
    optimizer = {"name": "adamw", "weight_decay": 0.05, "decay_norm_and_bias": decay_norm_and_bias}
    model = {"backbone": name, "timm_kwargs": kwargs}
    config = from_dict({"model": model, "optimizer": optimizer})
    model = build_model(config, create_backbone(config.model, -2, 64), 10, torch.float32)
    sides = {0.0: set(), 0.05: set()}
    for group in build_optimizer(model, config.optimizer).param_groups:
        sides[group["weight_decay"]] |= set(group["params"])
    return model, sides


@pytest.mark.parametrize("name", BACKBONES)
def test_what_decays_is_what_timm_would_let_decay(name):
    model, sides = two_sides(name, decay_norm_and_bias=False)
    network = model.query.backbone.model
    names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    for group in param_groups_weight_decay(network, weight_decay=0.05, no_weight_decay_list=names):
        assert set(group["params"]) == sides[group["weight_decay"]] & set(network.parameters())
    spared = {n for n, p in network.named_parameters() if p in sides[0.0] and p.ndim > 1}
    assert spared == BACKBONES[name]
    others = [p for m in (model.query.head_one, model.query.head_mix, model.mix_block) for p in m.parameters()]
    assert all((p in sides[0.0]) == (p.ndim == 1) for p in others)
    assert sum(map(len, sides.values())) == len([p for p in model.parameters() if p.requires_grad])


def test_everything_decays_where_it_is_asked_for():
    model, sides = two_sides("deit_small_patch16_224", decay_norm_and_bias=True)
    assert not sides[0.0] and sides[0.05] == {p for p in model.parameters() if p.requires_grad}
