"""The momentum encoder follows the query encoder: k <- c k + (1 - c) q (docs/method.md 2.7) in float32, in place.

Where the engine keeps whole parameters on every rank (DDP, ZeRO 0, 1, 2), each rank updates them all, and the ranks
agree because their query encoders do. Where it shards parameters (ZeRO 3, FSDP2), each rank updates its own shards.
Called once per optimizer step, never per micro batch.
"""

from collections.abc import Iterator

import torch
from automix_kernels import api as kernels
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automix_dist.automix import AutoMix


class MomentumUpdate:
    """The update for one model; the parameters are paired by name once.

    BatchNorm statistics of AutoMix's momentum encoder come from its own forward passes (docs/method.md 2.6). A plain
    classifier's average has none: its statistics follow as its weights do, for those of the present weights would not
    fit it.
    """

    def __init__(self, model: nn.Module, implementation: str = "auto"):
        self.implementation = implementation
        query = dict(model.query.named_parameters())
        momentum = dict(model.momentum.named_parameters()) if hasattr(model, "momentum") else {}
        self.pairs = [(parameter, query[name]) for name, parameter in momentum.items()]
        self.model = model
        self.moves_buffers = bool(momentum) and not isinstance(model, AutoMix)
        self.persistent = set(model.momentum.state_dict()) if self.moves_buffers else set()

    @torch.no_grad()
    def __call__(self, coefficient: float, skipped: Tensor | None = None) -> None:
        """Move the momentum encoder by one optimizer step; not at all if coefficient is 1 or `skipped`, a scalar on the
        device, is not 0."""
        if coefficient >= 1:
            return
        targets, sources = [], []
        for momentum, query in self.pairs:
            for target, source in zip(_local(momentum), _local(query), strict=True):
                targets.append(target)
                sources.append(source)
        for target, source in self._buffers():
            targets.append(target)
            sources.append(source)
        kernels.momentum_update(targets, sources, coefficient, skipped, implementation=self.implementation)

    def _buffers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs of buffers that move; counters and constants, a mask of -inf among them, are copied here."""
        if not self.moves_buffers:
            return
        # Found anew each time: RunningStatistics gives them other places in memory.
        both = zip(self.model.momentum.named_buffers(), self.model.query.buffers(), strict=True)
        for (name, target), source in both:
            if name in self.persistent and target.dtype == torch.float32 and target.is_contiguous():
                yield target, source
            else:
                target.copy_(source)


def _local(parameter: torch.nn.Parameter) -> list[Tensor]:
    """What this rank holds of a parameter: all of it, or its shard; under ZeRO 3 all of it too while gathered."""
    if isinstance(parameter, DTensor):  # FSDP2
        return [parameter.to_local()]
    if not hasattr(parameter, "ds_tensor"):
        return [parameter]
    shard, whole = parameter.ds_tensor.data, parameter.data
    if whole.numel() != parameter.ds_numel or whole.data_ptr() == shard.data_ptr():  # a lone rank's shard is the whole
        return [shard]
    return [shard, whole]
