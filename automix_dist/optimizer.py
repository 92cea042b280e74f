"""The optimizer of all trained parameters, in a few groups: query encoder and Mix Block, with and without decay; with
optimizer.layer_decay also by layer."""

from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from automix_dist.config import ConfigError, OptimizerConfig
from automix_dist.schedules import StepValues


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD, AdamW or LAMB over the query encoder and any Mix Block; the momentum encoder is in no group.

    Each group carries the keys `schedule`, the field of StepValues that gives its learning rate, and `lr_scale`, a
    factor. Fused: few launches, and the engines clip and skip steps inside them.

    Raises ConfigError if the layers of the backbone have no known order and optimizer.layer_decay asks for it.
    """
    settings = {"query": {"schedule": "lr"}, "mix_block": {"schedule": "mix_lr"}}
    if config.mix_momentum is not None:
        settings["mix_block"]["momentum"] = config.mix_momentum
    layers_from_top = {} if config.layer_decay == 1 else _layers_from_top(model.query)
    groups = []
    for part, extra in settings.items():
        module = getattr(model, part, nn.Identity())  # hand-crafted policies have no Mix Block
        spared = set() if config.decay_norm_and_bias else _without_decay(module)
        alike: dict[tuple[bool, int], list[nn.Parameter]] = {}
        for parameter in module.parameters():
            if parameter.requires_grad:
                alike.setdefault((parameter in spared, layers_from_top.get(parameter, 0)), []).append(parameter)
        for (is_spared, layers), parameters in sorted(alike.items(), key=lambda item: item[0]):
            weight_decay = 0.0 if is_spared else config.weight_decay
            scale = config.layer_decay**layers
            groups.append({"params": parameters, "weight_decay": weight_decay, "lr_scale": scale, **extra})
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _without_decay(module: nn.Module) -> set[nn.Parameter]:
    """Vectors and scalars, and what a network itself names in timm's `no_weight_decay()`: class tokens, position
    embeddings, tables of position biases."""
    spared = {p for p in module.parameters() if p.ndim <= 1}
    for network in module.modules():
        if hasattr(network, "no_weight_decay"):
            patterns = network.no_weight_decay()
            spared |= {p for name, p in network.named_parameters() if any(fnmatch(name, each) for each in patterns)}
    return spared


def _layers_from_top(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """What the encoder's backbone says of its parameters: see `Backbone.layers_from_top`."""
    for network in encoder.modules():
        if hasattr(network, "layers_from_top"):
            return network.layers_from_top()
    raise ConfigError("optimizer.layer_decay: this backbone has no layers_from_top(); set it to 1")


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962): AdamW whose step has the length lr x the tensor's norm; AdamW's in groups without decay.

    The step is a function of whole tensors, so it is wrong for an engine that shards them. As torch's fused optimizers
    it obeys `grad_scale`, by which gradients are divided, and `found_inf`, which is 1 to leave everything as it is.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            tensors = [p for p in group["params"] if p.grad is not None]
            if tensors:
                self._step_group(group, tensors)

    def _step_group(self, group: dict, tensors: list[Tensor]) -> None:
        for each in tensors:
            state = self.state[each]
            if not state:
                state["step"] = torch.zeros((), device=each.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(each), torch.zeros_like(each)
        counts, means, squares = ([self.state[p][k] for p in tensors] for k in ("step", "exp_avg", "exp_avg_sq"))
        kept = torch.ones_like(counts[0]) if self.found_inf is None else 1 - self.found_inf
        scale = torch.ones_like(kept) if self.grad_scale is None else self.grad_scale
        # A gradient that is not finite counts as 0, and what comes of it is multiplied by 0.
        gradients = [torch.nan_to_num(p.grad / scale, 0.0, 0.0, 0.0) for p in tensors]
        torch._foreach_add_(counts, kept, alpha=1)  # without alpha it would read `kept` as a number, and wait for it
        (beta1, beta2), count = group["betas"], counts[0].clamp(min=1)
        for averages, values, beta in (
            (means, gradients, beta1),
            (squares, torch._foreach_mul(gradients, gradients), beta2),
        ):
            change = torch._foreach_sub(values, averages)
            torch._foreach_mul_(change, (1 - beta) * kept)
            torch._foreach_add_(averages, change)
        denominator = torch._foreach_div(squares, 1 - beta2**count)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        update = torch._foreach_div(means, 1 - beta1**count)
        torch._foreach_div_(update, denominator)
        length = group["lr"] * kept
        if group["weight_decay"]:
            torch._foreach_add_(update, tensors, alpha=group["weight_decay"])
            norms, steps = torch._foreach_norm(tensors), torch._foreach_norm(update)
            ratios = [torch.where((n > 0) & (s > 0), n / s, 1.0) for n, s in zip(norms, steps, strict=True)]
            torch._foreach_mul_(update, ratios)
        torch._foreach_mul_(update, -length)
        torch._foreach_add_(tensors, update)


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an optimizer of `build_optimizer` keeps for each parameter: tensors of its shape, and plain numbers."""
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",), ()
    return ("exp_avg", "exp_avg_sq"), ("step",)


def set_learning_rates(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Give each group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = getattr(values, group["schedule"]) * group["lr_scale"]
