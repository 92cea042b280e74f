"""The model of a run: built from its config, or restored from a checkpoint."""

import dataclasses

import torch
from torch import nn

from automix_dist import policy
from automix_dist.activation_checkpointing import check_not_inside_blocks
from automix_dist.backbone import create_backbone
from automix_dist.checkpoint_files import Saved, load_module_state
from automix_dist.classifier import Classifier
from automix_dist.config import Config, ConfigError
from automix_dist.convolutions import lay_out_weights, pad_stems
from automix_dist.fused_batchnorm import fuse_batchnorms
from automix_dist.precision import autocast_dtype


def build_model(
    config: Config, backbone: nn.Module, num_classes: int, autocast: torch.dtype | None = None
) -> nn.Module:
    """The model of a run's policy, on the CPU: a Classifier, AutoMix, or one of its descendants.

    `autocast` is the dtype of its forward passes; float32 = no autocast, None = the caller's.

    Raises ConfigError for settings that the policy cannot use, alone or with this backbone.
    """
    module, settings = policy.load(config.policy)
    if config.engine.padded_stem:
        pad_stems(backbone)
    if config.engine.fused_batchnorm:
        fuse_batchnorms(backbone, config.engine.kernels)
    common = {
        "loss": config.loss,
        "mean": config.data.mean,
        "std": config.data.std,
        "autocast": autocast,
        "implementation": config.engine.kernels,
    }
    if hasattr(module, "Policy"):
        if config.engine.joint_query:
            raise ConfigError(f"engine.joint_query has no meaning for policy {config.policy.name}: set it to false")
        mixing = module.Policy(settings, config.data.mean, config.data.std)
        model = Classifier(backbone, num_classes, mixing, average=config.policy.ema_decay > 0, **common)
        if config.engine.activation_checkpointing:
            check_not_inside_blocks(backbone, mixing.changed_layers(backbone))
    elif config.policy.ema_decay:
        raise ConfigError(f"policy.ema_decay: {config.policy.name} has a momentum encoder; set policy.ema_decay=0")
    else:
        model = module.Model(
            backbone,
            num_classes,
            config.automix,
            settings,
            immediate_backward=config.engine.immediate_backward,
            joint_query=config.engine.joint_query,
            **common,
        )
    lay_out_weights(model)
    return model


def new_model(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The model of the config's policy and backbone, on the CPU, to train on `device`."""
    torch.manual_seed(config.seed)
    other_sizes = [size for _, size in config.data.resolution_schedule]
    backbone = create_backbone(config.model, policy.needed_feature(config), config.data.image_size, other_sizes)
    torch.manual_seed(config.seed)
    return build_model(config, backbone, num_classes, autocast_dtype(config.engine, device))


def restored_model(saved: Saved, config: Config, device: torch.device) -> nn.Module:
    """The model of a checkpoint, with its weights, on a device."""
    model = new_model(without_weights(config), len(saved.manifest["classes"]), device).to(device)
    model.load_state_dict(load_module_state(saved, ""))
    return model


def without_weights(config: Config) -> Config:
    """A run's settings where all weights come from a checkpoint."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False, weights=""))


def describe_model(config: Config, model: nn.Module) -> str:
    """The backbone, its size without the classifier, what it begins with, and which of its feature maps the Mix Block
    reads."""
    backbone = model.query.backbone
    first = "timm's pretrained ones" if config.model.pretrained else "random"
    if config.model.weights:
        first = f"those of {config.model.weights!r}"
    count = sum(parameter.numel() for parameter in backbone.parameters())
    feature = "" if backbone.feature is None else f": the Mix Block reads {backbone.describe_feature()}"
    return f"{config.model.backbone}, {count:,} parameters, at first {first}{feature}"
