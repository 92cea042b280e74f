"""The momentum encoder follows the query encoder: k <- c k + (1 - c) q in float32, in place, without communication.

Where the engine keeps whole parameters on every rank (DDP, ZeRO 0, 1, 2), each rank updates them all, and the ranks
agree because their query encoders do. Where it shards parameters (ZeRO 3, FSDP2), each rank updates its own shards.
Called once per optimizer step, never per micro batch.
"""

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automix_dist.automix import AutoMix


class MomentumUpdate:
    """The update for one model; the parameters are paired by name once.

    Parameters only: BatchNorm statistics of the momentum encoder come from its own forward passes (docs/method.md 2.6).
    """

    def __init__(self, model: nn.Module, implementation: str = "auto"):
        self.implementation = implementation
        query = dict(model.query.named_parameters())
        momentum = dict(model.momentum.named_parameters()) if hasattr(model, "momentum") else {}
        self.pairs = [(parameter, query[name]) for name, parameter in momentum.items()]
        self.model = model
        self.copies_statistics = bool(momentum) and not isinstance(model, AutoMix)

    @torch.no_grad()
    def __call__(self, coefficient: float, skipped: Tensor | None = None) -> None:
        """Move the momentum encoder by one optimizer step; not at all if coefficient is 1 or `skipped`, a scalar on the
        device, is not 0."""
        if self.copies_statistics:  # a plain classifier's average has no forward passes of its own
            for target, source in zip(self.model.momentum.buffers(), self.model.query.buffers(), strict=True):
                target.copy_(source)
        if coefficient >= 1:
            return
        targets, sources = [], []
        for momentum, query in self.pairs:
            for target, source in zip(_local(momentum), _local(query), strict=True):
                targets.append(target)
                sources.append(source)
        kernels.momentum_update(targets, sources, coefficient, skipped, implementation=self.implementation)


def _local(parameter: torch.nn.Parameter) -> list[Tensor]:
    """What this rank holds of a parameter: all of it, or its shard; under ZeRO 3 all of it too while gathered."""
    if isinstance(parameter, DTensor):  # FSDP2
        return [parameter.to_local()]
    if not hasattr(parameter, "ds_tensor"):
        return [parameter.data]
    shard, whole = parameter.ds_tensor.data, parameter.data
    if whole.numel() != parameter.ds_numel or whole.data_ptr() == shard.data_ptr():  # a lone rank's shard is the whole
        return [shard]
    return [shard, whole]
