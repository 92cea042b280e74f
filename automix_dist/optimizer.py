"""The optimizer of all trained parameters, in a few groups: query encoder and Mix Block, with and without decay."""

import torch

from automix_dist.automix import AutoMix
from automix_dist.config import OptimizerConfig
from automix_dist.schedules import StepValues


def build_optimizer(model: AutoMix, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the query encoder and the Mix Block; the momentum encoder is in no group.

    Each group carries the key `schedule`, the field of StepValues that gives its learning rate.
    """
    settings = {"query": {"schedule": "lr"}, "mix_block": {"schedule": "mix_lr"}}
    if config.mix_momentum is not None:
        settings["mix_block"]["momentum"] = config.mix_momentum
    groups = []
    for part, extra in settings.items():
        parameters = [p for p in getattr(model, part).parameters() if p.requires_grad]
        decayed = [p for p in parameters if config.decay_norm_and_bias or p.ndim > 1]
        plain = [p for p in parameters if not (config.decay_norm_and_bias or p.ndim > 1)]
        groups += [{"params": decayed, "weight_decay": config.weight_decay, **extra}] if decayed else []
        groups += [{"params": plain, "weight_decay": 0.0, **extra}] if plain else []
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def set_learning_rates(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Give each group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = getattr(values, group["schedule"])
