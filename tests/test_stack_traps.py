"""Traps of DeepSpeed and Accelerate that once broke trainings like this one, each with a test that would catch it.

The loader's traps are in test_data.py; clipping and accumulation, the momentum encoder under sharding, and resuming on
another world size are in test_data_parallel.py; interrupted saves are in test_checkpoint.py.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from engine_steps import engine_steps, save, start_engine, whole_parameters
from ranks import run_ranks
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist import distributed
from automix_dist.batchnorm import averaged_statistics
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import verify
from automix_dist.engines import build_engine
from automix_dist.optimizer import build_optimizer


def train_in_bfloat16(config) -> tuple[bool, set]:
    process, model, engine = start_engine(config)
    model.autocast = torch.bfloat16
    engine_steps(config, process, model, engine, 0, 2)
    losses = engine(*micro_batch(0, 0, 16), rank_draws(config, 0, 0, 16), 0.1)
    return bool(torch.isfinite(losses.total)), {t.dtype for t in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_keeps_weights_and_statistics_in_float32(stage):
    """DeepSpeed's bf16 block casts weights but not buffers, and BatchNorm raises; its momentum update is lost too."""
    ((finite, dtypes),) = run_ranks(1, train_in_bfloat16, tiny_config(engine={"zero_stage": stage}))
    assert finite
    assert dtypes == {torch.float32, torch.int64}  # int64: BatchNorm's counters


def momentum_moves(config) -> float:
    _, model, _ = start_engine(config)
    model.autocast = torch.bfloat16
    before = model.momentum.head_one.weight.detach().clone()
    with torch.no_grad():
        model.query.head_one.weight.add_(1.0)
    from automix_dist.momentum import MomentumUpdate

    MomentumUpdate(model)(0.9999)
    return (model.momentum.head_one.weight - before).mean().item()


def test_small_momentum_steps_are_not_lost():
    """1e-4 of a difference of 1 must arrive; next to weights of order one it vanishes in bfloat16."""
    assert run_ranks(1, momentum_moves, tiny_config())[0] == pytest.approx(1e-4, rel=0.01)


def start_channels_last(config) -> float:
    process = distributed.start(config.engine)
    model = tiny_model(config).to(memory_format=torch.channels_last)
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    engine_steps(config, process, model, engine, 0, 1)
    return sum(p.abs().sum().item() for p in model.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_channels_last_model_does_not_crash_the_engine(stage):
    assert run_ranks(1, start_channels_last, tiny_config(engine={"zero_stage": stage}))[0] > 0


def load_older(config, folder: Path) -> tuple[dict, dict]:
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    engine_steps(config, process, model, engine, 0, 1)
    older = whole_parameters(engine, folder / "older", process, config)
    assert save(checkpoints, engine, 1)
    engine_steps(config, process, model, engine, 1, 3)
    assert save(checkpoints, engine, 3)
    checkpoints.load(engine, verify(folder / "checkpoints" / "step_00000001"))
    return older, whole_parameters(engine, folder / "loaded", process, config)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_checkpoint_asked_for_is_the_one_loaded(stage, tmp_path):
    """ZeRO 3 of DeepSpeed loads `latest` where another tag was asked for, and refuses to load after a save."""
    for older, loaded in run_ranks(2, load_older, tiny_config(engine={"zero_stage": stage}), tmp_path):
        assert older.keys() == loaded.keys()
        for name in older:
            assert torch.equal(older[name], loaded[name]), name


def who_am_i(config) -> tuple[int, int, bool, bool]:
    process, _, engine = start_engine(config)
    assert engine.deepspeed.world_size == process.world_size
    return process.rank, process.world_size, process.is_main, "transformers" in sys.modules


def test_every_rank_knows_its_place_and_needs_no_transformers():
    """Accelerate with DeepSpeed on a CPU tells each rank that it is alone and main, and asks for transformers."""
    assert run_ranks(2, who_am_i, tiny_config()) == [(0, 2, True, False), (1, 2, False, False)]


def buffers_after(config, folder: Path, steps: int, load: bool) -> dict[str, torch.Tensor]:
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    if load:
        checkpoints.load(engine, checkpoints.agree_on_newest())
    else:
        engine_steps(config, process, model, engine, 0, steps)
        assert save(checkpoints, engine, steps)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("stage", [1, 3])
def test_another_world_size_gets_the_mean_statistics(stage, tmp_path):
    """DeepSpeed's universal checkpoint drops BatchNorm's statistics and frozen parameters without a word."""
    config = tiny_config(engine={"zero_stage": stage})
    saved = run_ranks(2, buffers_after, config, tmp_path, 2, False)
    (loaded,) = run_ranks(1, buffers_after, config, tmp_path, 2, True)
    assert any(not torch.equal(saved[0][name], saved[1][name]) for name in loaded)  # ranks do differ
    for name, buffer in loaded.items():
        expected = (saved[0][name] + saved[1][name]) / 2 if buffer.is_floating_point() else saved[0][name]
        torch.testing.assert_close(buffer, expected, msg=name)


def evaluated_statistics(config) -> tuple[dict, dict, dict]:
    process, model, engine = start_engine(config)
    engine_steps(config, process, model, engine, 0, 2)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with averaged_statistics(model, process):
        within = {name: b.clone() for name, b in model.named_buffers()}
    return before, within, {name: b.clone() for name, b in model.named_buffers()}


def test_ranks_evaluate_the_same_statistics_and_get_their_own_back():
    """DeepSpeed never synchronises BatchNorm's statistics: each rank would evaluate another model."""
    (before0, within0, after0), (before1, within1, after1) = run_ranks(2, evaluated_statistics, tiny_config())
    for name in within0:
        assert torch.equal(within0[name], within1[name]), name
        assert torch.equal(before0[name], after0[name]) and torch.equal(before1[name], after1[name]), name
    running = [name for name in within0 if name.endswith("running_mean")]
    assert running
    for name in running:
        torch.testing.assert_close(within0[name], (before0[name] + before1[name]) / 2)


@pytest.mark.parametrize(
    ("asked", "ranks", "threads"),
    [
        (None, 0, 6),
        (None, 2, 3),
        ("1", 0, 1),
        ("1", 1, 6),
        ("1", 2, 3),
        ("4", 2, 4),
        ("0", 0, 6),
        ("many", 3, 2),
        (None, 8, 1),
    ],
)
def test_threads_are_what_the_user_says_but_not_what_launchers_say(asked, ranks, threads, monkeypatch):
    """torchrun and accelerate set OMP_NUM_THREADS=1, whatever cores there are; 0 ranks: no launcher."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("AUTOMIX_CORE_SHARERS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert distributed._threads() == threads
