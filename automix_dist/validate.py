"""Exact accuracy of all of a model's encoders and heads over all ranks."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automix_dist.batchnorm import averaged_statistics
from automix_dist.data import EvalLoader
from automix_dist.distributed import Process


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: EvalLoader,
    process: Process,
    check_stop: Callable[[], None] = lambda: None,
    forward: Callable[[Tensor], NamedTuple] | None = None,
) -> dict[str, float]:
    """Accuracies in [0, 1] over the whole set: every image counts once, whatever the world size.

    BatchNorm uses the mean over ranks of the running statistics.

    Args:
        model: AutoMix or another model of a policy.
        loader: this rank's share of the set.
        check_stop: called before each batch, equally often on all ranks; may raise.
        forward: the engine around the model, if there is one.

    Returns:
        top1_* and top5_* for each of the model's logits (AutoMix: query, query_mix, momentum, momentum_mix), and the
        cross-entropy loss_query.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(0, 2, dtype=torch.float64, device=process.device)
    loss = torch.zeros((), dtype=torch.float64, device=process.device)
    batches = iter(loader)
    try:
        with averaged_statistics(model, process):
            # A sharded model needs all ranks in each forward pass: one that has run out joins with a blank image.
            for _ in range(loader.num_batches):
                check_stop()
                batch = next(batches, None)
                images = loader.blank() if batch is None else batch.images
                logits = (forward or model)(images)
                if not len(counts):
                    names = logits._fields
                    counts = counts.new_zeros(len(names), 2)
                if batch is not None:
                    counts += torch.stack([top_hits(output, batch.labels) for output in logits])
                    loss += F.cross_entropy(logits.query, batch.labels, reduction="sum")
    finally:
        batches.close()
        model.train(training)
    totals = process.sum(torch.cat([counts.flatten(), loss.view(1)])) / loader.num_samples
    keys = [f"{top}_{name}" for name, top in itertools.product(names, ("top1", "top5"))]
    return dict(zip([*keys, "loss_query"], totals.tolist(), strict=True))


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of [B, classes] logits have their label [B] first, and among the first five: [2] int64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.sum()])
