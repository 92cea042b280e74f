"""A step that is not finite on one rank changes nothing on any rank, under every engine."""

import pytest
import torch
from engine_steps import ENGINES, STEPS_PER_EPOCH, TOLERANCE, assert_same, start_engine, whole_parameters
from ranks import run_ranks
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist.batchnorm import RunningStatistics
from automix_dist.engine_state import optimizer_scalars
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer, set_learning_rates
from automix_dist.schedules import Schedule

BAD_STEPS = (0, 3)  # the first one too: optimizers have no state yet
STEPS = 5


def inputs(config, step: int, rank: int, size: int):
    """A micro batch whose lambda is not a number on rank 1 in the bad steps."""
    draws = rank_draws(config, step, rank, size)
    if step in BAD_STEPS and rank == 1:
        draws = draws._replace(lam=torch.stack([draws.lam[0], draws.lam[1] * torch.nan]))
    return *micro_batch(step, rank, size), draws


def train_plain(config) -> tuple[dict, dict]:
    """Two ranks' micro batches in one process; the bad steps are left out. Rank 0's BatchNorm statistics."""
    model = tiny_model(config).train()
    optimizer = build_optimizer(model, config.optimizer)
    update, schedule = MomentumUpdate(model), Schedule(config, STEPS_PER_EPOCH)
    ranks_buffers = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(2)]
    for step in range(STEPS):
        if step in BAD_STEPS:
            continue
        values = schedule.at(step)
        set_learning_rates(optimizer, values)
        optimizer.zero_grad()
        for rank in range(2):
            for name, buffer in model.named_buffers():
                buffer.copy_(ranks_buffers[rank][name])
            size = config.batch_size // 2
            (model(*inputs(config, step, rank, size), values.mask_loss_weight).total / 2).backward()
            ranks_buffers[rank] = {n: b.clone() for n, b in model.named_buffers()}
        if config.optimizer.clip_norm:
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        optimizer.step()
        update(values.momentum)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, ranks_buffers[0]


def train_engine(config, folder):
    process, model, engine = start_engine(config)
    update, schedule, statistics = MomentumUpdate(model), Schedule(config, STEPS_PER_EPOCH), RunningStatistics(model)
    model.train()
    skips = []
    for step in range(STEPS):
        values = schedule.at(step)
        set_learning_rates(engine.optimizer, values)
        statistics.keep()
        images, labels, draws = inputs(config, step, process.rank, config.batch_size // 2)
        engine.backward(engine(images, labels, draws, values.mask_loss_weight).total)
        skipped = engine.step()
        statistics.restore(skipped)
        update(values.momentum, skipped)
        skips.append(float(skipped))
    buffers = {n: b.clone() for n, b in engine.module.named_buffers()}
    return whole_parameters(engine, folder, process, config), buffers, skips, optimizer_scalars(engine)


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [(name, "adamw") for name in ENGINES] + [(name, "sgd") for name in ("zero2", "zero3", "ddp")],
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(engine, optimizer, tmp_path):
    settings = {"sgd": {}, "adamw": {"name": "adamw", "lr": 0.01, "mix_momentum": None}}[optimizer]
    config = tiny_config(engine=ENGINES[engine], optimizer={**settings, "clip_norm": 0.5 if engine == "zero1" else 0.0})
    expected, expected_buffers = train_plain(config)
    (got, buffers, skips, scalars), (_, _, other_skips, _) = run_ranks(2, train_engine, config, tmp_path)
    assert skips == other_skips == [float(step in BAD_STEPS) for step in range(STEPS)]
    assert_same(got, expected, tolerance=1e-4 if optimizer == "adamw" else TOLERANCE)
    for name, buffer in expected_buffers.items():
        if "running" in name:
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)
    if optimizer == "adamw":
        assert scalars["step"] == STEPS - len(BAD_STEPS)
