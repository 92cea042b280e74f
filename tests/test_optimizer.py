"""Which parameters decay, against timm's own grouping."""

from unittest import mock

import pytest
import timm
import torch
from test_recipes import SMALL
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from tiny import tiny_config, tiny_model
from torch import nn

from automix_dist.backbone import create_backbone
from automix_dist.config import ConfigError
from automix_dist.config_file import from_dict
from automix_dist.model import build_model
from automix_dist.optimizer import build_optimizer, set_learning_rates
from automix_dist.schedules import StepValues

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


@pytest.mark.parametrize("name", [*BACKBONES, "deit_tiny_distilled_patch16_224"])
def test_learning_rates_fall_by_layer_as_timms_do(name):
    kwargs = next(kwargs for start, kwargs in SMALL.items() if name.startswith(start))
    optimizer = {"name": "adamw", "decay_norm_and_bias": False, "layer_decay": 0.5}
    config = from_dict({"model": {"backbone": name, "timm_kwargs": kwargs}, "optimizer": optimizer})
    network = create_backbone(config.model, -2, 64)
    model = build_model(config, network, 10, torch.float32)
    groups = build_optimizer(model, config.optimizer).param_groups
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    size = {"img_size": 64} if hasattr(network.model, "patch_embed") and "pvt" not in name else {}
    whole = timm.create_model(name, num_classes=10, **{**kwargs, **size})
    name_of = {p: n for n, p in whole.named_parameters()}
    expected = {
        name_of[p]: group["lr_scale"] for group in param_groups_layer_decay(whole, layer_decay=0.5)
        for p in group["params"]
    }  # fmt: skip
    got = {n: scale[p] for n, p in network.model.named_parameters()}
    assert len(set(got.values())) > 2 and got == {n: expected[n] for n in got}
    heads = [p for m in (model.query.head_one, model.query.head_mix, model.mix_block) for p in m.parameters()]
    assert {scale[p] for p in heads} == {1.0}


def test_an_unknown_order_of_layers_is_refused():
    config = from_dict({"model": {"backbone": "resnet18"}, "optimizer": {"layer_decay": 0.5}})
    model = build_model(config, create_backbone(config.model, -2, 64), 10, torch.float32)
    with (
        mock.patch.object(type(model.query.backbone.model), "group_matcher", new_callable=mock.PropertyMock) as matcher,
        pytest.raises(ConfigError, match=r"optimizer\.layer_decay.* ResNet; set it to 1"),
    ):
        matcher.side_effect = AttributeError
        build_optimizer(model, config.optimizer)
    model.query.backbone = nn.Identity()
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay.*layers_from_top"):
        build_optimizer(model, config.optimizer)


def test_everything_decays_where_it_is_asked_for():
    model, sides = two_sides("deit_small_patch16_224", decay_norm_and_bias=True)
    assert not sides[0.0] and sides[0.05] == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("optimizer", "of_query", "of_mix_block"),
    [
        (
            {"name": "sgd", "momentum": 0.8, "mix_momentum": 0.3},
            {"momentum": 0.8, "nesterov": False},
            {"momentum": 0.3},
        ),
        ({"name": "sgd", "momentum": 0.8, "mix_momentum": None}, {"momentum": 0.8}, {"momentum": 0.8}),
        ({"name": "adamw", "betas": [0.8, 0.95], "mix_momentum": None}, *[{"betas": (0.8, 0.95), "eps": 1e-8}] * 2),
        ({"name": "lamb", "betas": [0.8, 0.95], "mix_momentum": None}, *[{"betas": (0.8, 0.95), "eps": 1e-6}] * 2),
    ],
)
def test_every_group_has_the_settings_of_the_config(optimizer, of_query, of_mix_block):
    config = tiny_config(optimizer={**optimizer, "layer_decay": 0.5, "weight_decay": 0.02})
    model = tiny_model(config)
    built = build_optimizer(model, config.optimizer)
    set_learning_rates(built, StepValues(lr=0.4, mix_lr=0.06, momentum=0.0, mask_loss_weight=0.0))
    backbone = model.query.backbone
    rates = {p: 0.4 * 0.25 for p in backbone.stem.parameters()} | {p: 0.4 * 0.5 for p in backbone.top.parameters()}
    mix_block = set(model.mix_block.parameters())
    seen = 0
    for group in built.param_groups:
        for parameter in group["params"]:
            expected = of_mix_block if parameter in mix_block else of_query
            rate = 0.06 if parameter in mix_block else rates.get(parameter, 0.4)
            assert {key: tuple(group[key]) if key == "betas" else group[key] for key in expected} == expected
            assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == 0.02
            seen += 1
    assert seen == sum(p.requires_grad for p in model.parameters())
