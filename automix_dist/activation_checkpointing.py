"""Activation checkpointing: a backbone's blocks keep their inputs only and are computed again in the backward pass."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from automix_dist.config import ConfigError


def checkpoint_blocks(model: nn.Module) -> int:
    """Make every block (a module whose class is named ...Block or Bottleneck) of a model compute itself again; the
    outermost where they nest. Gradients and BatchNorm's running statistics stay what they are without.

    Returns:
        the number of blocks.

    Raises ConfigError if the model has none.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise ConfigError(
            "engine.activation_checkpointing finds no blocks in this backbone: set it to false, or use "
            "engine.immediate_backward"
        )
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)
    return len(blocks)


def check_not_inside_blocks(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise ConfigError for one of a policy's layers inside a block that `checkpoint_blocks` lets compute itself again:
    the hook on the layer is gone by then, and the second result another one. Whole blocks and stages are fine."""
    for block in _blocks(model):
        inside = set(block.modules()) - {block}
        for name, layer in layers.items():
            if layer in inside:
                raise ConfigError(
                    f"engine.activation_checkpointing: the policy mixes the output of {name!r}, which lies inside a "
                    f"{type(block).__name__} that is computed again: name whole blocks or stages in the policy's "
                    f"settings.layers, or set it to false"
                )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__.endswith(("Block", "Bottleneck")):
            yield child
        else:
            yield from _blocks(child)


def _forward(block: nn.Module, forward, *inputs, **keywords):
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **keywords)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, block), **keywords)


def _contexts(block: nn.Module):
    return contextlib.nullcontext(), _FrozenStatistics(block)


class _FrozenStatistics:
    """While a block is computed again, its BatchNorms normalise as before but their running statistics stand still."""

    def __init__(self, block: nn.Module):
        self.norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.momenta = [norm.momentum for norm in self.norms]

    def __enter__(self):
        self.counts = [norm.num_batches_tracked.clone() for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_):
        for norm, momentum, count in zip(self.norms, self.momenta, self.counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
