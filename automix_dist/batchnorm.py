"""BatchNorm's running statistics: each rank's own in training, averaged for evaluation, untouched by skipped steps."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from automix_dist.distributed import Process


class RunningStatistics:
    """The running means and variances of a model, laid out in the memory of one tensor: a copy is one launch."""

    def __init__(self, model: nn.Module):
        owners = [(m, name) for m in model.modules() for name in ("running_mean", "running_var")]
        owners = [(m, name) for m, name in owners if getattr(m, name, None) is not None]
        self._all: Tensor | None = None
        if owners:
            self._all = torch.cat([getattr(m, name).flatten() for m, name in owners])
            parts = self._all.split([getattr(m, name).numel() for m, name in owners])
            for (module, name), part in zip(owners, parts, strict=True):
                # Not as a view, which shares its version: a layer that writes to its own would spoil the backward pass
                # of all others.
                setattr(module, name, part.data)
            self._kept = self._all.clone()

    def keep(self) -> None:
        """Remember the statistics as they are before a step."""
        if self._all is not None:
            self._kept.copy_(self._all)

    def restore(self, skipped: Tensor) -> None:
        """Undo the step's changes if `skipped`, a scalar on the device, is not 0; without waiting for it."""
        if self._all is not None:
            torch.where(skipped.bool(), self._kept, self._all, out=self._all)


@contextlib.contextmanager
def averaged_statistics(model: nn.Module, process: Process) -> Iterator[None]:
    """Within the block, running statistics are the mean over ranks, so that every rank evaluates the same model.
    Afterwards each rank has its own again: training never depends on when it was evaluated."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    own = [b.clone() for b in buffers]
    try:
        if process.world_size > 1 and buffers:
            flat = process.sum(torch.cat([b.flatten() for b in buffers])) / process.world_size
            for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))
        yield
    finally:
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)
