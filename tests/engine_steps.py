"""Steps of the tiny model under each engine and in plain PyTorch, for the tests that compare them."""

import math
from pathlib import Path

import torch
from tiny import micro_batch, rank_draws, tiny_model

from automix_dist import distributed
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import load_module_state, step_folder, verify
from automix_dist.engines import build_engine
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer, set_learning_rates
from automix_dist.schedules import Schedule

STEPS_PER_EPOCH = 2
TOLERANCE = 1e-5  # float32 sums in another order
ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "offload1": {"zero_stage": 1, "offload_optimizer": True},
    "offload3": {"zero_stage": 3, "offload_optimizer": True},
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
}


def train_plain(config, ranks: int, steps: int, norms: list[float] | None = None) -> dict[str, torch.Tensor]:
    """Micro batches of `ranks` ranks in one process, without any engine. The gradients' norms go into `norms`."""
    model = tiny_model(config).train()
    return plain_steps(config, model, build_optimizer(model, config.optimizer), ranks, 0, steps, norms)


def plain_steps(config, model, optimizer, ranks: int, first: int, last: int, norms: list[float] | None = None):
    """`engine_steps` of `ranks` ranks in one process; returns the parameters."""
    update, schedule = MomentumUpdate(model), Schedule(config, STEPS_PER_EPOCH)
    size = config.batch_size // ranks
    for step in range(first, last):
        values = schedule.at(step)
        set_learning_rates(optimizer, values)
        optimizer.zero_grad()
        for rank in range(ranks):
            losses = model(
                *micro_batch(step, rank, size), rank_draws(config, step, rank, size), values.mask_loss_weight
            )
            (losses.total / ranks).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm or math.inf)
        if norms is not None:
            norms.append(float(norm))
        optimizer.step()
        update(values.momentum)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def start_engine(config):
    torch.use_deterministic_algorithms(True, warn_only=True)  # then memory that nobody has set holds NaN
    process = distributed.start(config.engine)
    model = tiny_model(config)
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    return process, model, engine


def engine_steps(config, process, model, engine, first: int, last: int) -> list[float]:
    """Returns the norm of each step's gradients."""
    norms = []
    update, schedule = MomentumUpdate(model), Schedule(config, STEPS_PER_EPOCH)
    size, parts = config.micro_batch_size(process.world_size), config.engine.accumulation_steps
    model.train()
    for step in range(first, last):
        values = schedule.at(step)
        set_learning_rates(engine.optimizer, values)
        for part in range(parts):
            index = part * process.world_size + process.rank
            losses = engine(
                *micro_batch(step, index, size), rank_draws(config, step, index, size), values.mask_loss_weight
            )
            engine.backward(losses.total)
            skipped = engine.step()
        update(values.momentum, skipped)
        norms.append(float(engine.grad_norm))
    return norms


def save(checkpoints: Checkpoints, engine, step: int) -> bool:
    checkpoints.save(engine, {"step": step}, {})
    return checkpoints.wait()


def whole_parameters(engine, folder: Path, process, config) -> dict[str, torch.Tensor]:
    """Every parameter whole, by way of a checkpoint: the only place where shards come together."""
    assert save(Checkpoints(folder, config.checkpoint, process, print), engine, 1)
    state = load_module_state(verify(step_folder(folder, 1)), "")
    names = {name for name, _ in engine.module.named_parameters()}
    return {k: v for k, v in state.items() if k in names}


def train_with_engine(config, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    return train_and_norms(config, folder, steps)[0]


def train_and_norms(config, folder: Path, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    process, model, engine = start_engine(config)
    norms = engine_steps(config, process, model, engine, 0, steps)
    return whole_parameters(engine, folder, process, config), norms


def assert_same(got: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (got[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"


def save_after(config, folder: Path, steps: int) -> None:
    process, model, engine = start_engine(config)
    engine_steps(config, process, model, engine, 0, steps)
    assert save(Checkpoints(folder, config.checkpoint, process, print), engine, steps)
