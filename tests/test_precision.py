"""Training in float16 under every kind of engine does what torch.amp.GradScaler does to a plain loop."""

import math

import pytest
import torch
from engine_steps import ENGINES, STEPS_PER_EPOCH, assert_same, start_engine, whole_parameters
from ranks import run_ranks
from test_captured_step import Tape
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist import precision
from automix_dist.captured_step import capture_steps
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import load_module_state, step_folder, verify
from automix_dist.data import Batch
from automix_dist.momentum import MomentumUpdate
from automix_dist.optimizer import build_optimizer, set_learning_rates
from automix_dist.precision import LossScale
from automix_dist.replay import find_dump, replay, write_dump
from automix_dist.schedules import Schedule

START, INTERVAL, HALF, STEPS = 2.0**21, 2, 4, 9
"""A scale with which the first steps overflow, and which soon grows again."""


def float16_config(**sections):
    return tiny_config(**{**sections, "engine": {"precision": "float16", **sections.get("engine", {})}})


def inputs(config, step: int, rank: int, ranks: int, weight: float) -> tuple:
    size = config.batch_size // ranks
    return *micro_batch(step, rank, size), rank_draws(config, step, rank, size), weight


def train_plain(config, ranks: int) -> tuple[dict, list[float], list[float]]:
    """The weights after the last step, and the scale and the gradients' norm of each."""
    model = tiny_model(config).train()
    model.autocast = torch.float16
    optimizer = build_optimizer(model, config.optimizer)
    # torch's fused SGD has no momentum yet, but memory as it was, after a first step that is skipped.
    optimizer._step_supports_amp_scaling = False
    for group in optimizer.param_groups:
        group["fused"] = False
    update, schedule = MomentumUpdate(model), Schedule(config, STEPS_PER_EPOCH)
    scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=INTERVAL)
    scales, norms = [], []
    for step in range(STEPS):
        values = schedule.at(step)
        set_learning_rates(optimizer, values)
        optimizer.zero_grad()
        model.loss_scale = scaler.scale(torch.ones(()))
        for rank in range(ranks):
            losses = model(*inputs(config, step, rank, ranks, values.mask_loss_weight))
            scaler.scale(losses.total).backward()
        scaler.unscale_(optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch._foreach_div_([p.grad for p in trained], ranks)  # engines average what the ranks have
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm or math.inf)))
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if scales[-1] >= before:
            update(values.momentum)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, scales, norms


def train_steps(config, process, model, engine, first: int, last: int) -> tuple[list[float], list[float], list[float]]:
    """The scale after each step, whether it was skipped, and the norm of its gradients."""
    precision.GROWTH_INTERVAL = INTERVAL
    model.autocast = torch.float16
    model.train()
    update, schedule = MomentumUpdate(model), Schedule(config, STEPS_PER_EPOCH)
    scales, skips, norms = [], [], []
    for step in range(first, last):
        values = schedule.at(step)
        set_learning_rates(engine.optimizer, values)
        losses = engine(*inputs(config, step, process.rank, process.world_size, values.mask_loss_weight))
        engine.backward(losses.total)
        skipped = engine.step()
        update(values.momentum, skipped)
        scales.append(float(engine.loss_scale.value))
        skips.append(float(skipped))
        norms.append(float(engine.grad_norm))
    return scales, skips, norms


def train_engine(config, folder):
    process, model, engine = start_engine(config)
    engine.loss_scale.value.fill_(START)
    recorded = train_steps(config, process, model, engine, 0, STEPS)
    return whole_parameters(engine, folder, process, config), *recorded


@pytest.mark.parametrize("engine", ["zero0", "offload1", "zero3", "ddp", "fsdp2"])
def test_every_engine_scales_as_torchs_scaler(engine, tmp_path):
    optimizer = {"name": "adamw", "lr": 0.01, "mix_momentum": None} if engine == "zero0" else {}
    clip_norm = 0.5 if engine in ("offload1", "fsdp2") else 0.0
    config = float16_config(engine=ENGINES[engine], optimizer={**optimizer, "clip_norm": clip_norm})
    expected, expected_scales, expected_norms = train_plain(config, 2)
    ranks = run_ranks(2, train_engine, config, tmp_path)
    for _, scales, skips, norms in ranks:
        assert scales == expected_scales
        assert skips == [float(b < a) for a, b in zip([START, *scales], scales, strict=False)]
        assert 1 < sum(skips) < STEPS - 2 and max(scales[-4:]) > min(scales)
        applied = [
            (norm, expected) for norm, expected, skip in zip(norms, expected_norms, skips, strict=True) if not skip
        ]
        assert all(norm == pytest.approx(expected, rel=1e-3) for norm, expected in applied)  # without the scale
    assert_same(ranks[0][0], expected, 1e-4)


def resume(config, folder):
    """The scales and weights of a run, and of its second half in an engine of its own."""
    process, model, engine = start_engine(config)
    engine.loss_scale.value.fill_(START)
    train_steps(config, process, model, engine, 0, HALF)
    assert engine.loss_scale.state()["loss_scale_good_steps"] == 1
    checkpoints = Checkpoints(folder / "half", config.checkpoint, process, print)
    checkpoints.save(engine, {"step": HALF}, {})
    assert checkpoints.wait()
    found = []
    for part in range(2):
        if part:
            _, model, engine = start_engine(config)
            checkpoints.load(engine, verify(step_folder(folder / "half", HALF)))
        scales, *_ = train_steps(config, process, model, engine, HALF, STEPS)
        found.append((scales, engine.loss_scale.state(), whole_parameters(engine, folder / str(part), process, config)))
    return found


def test_the_scale_is_a_part_of_a_checkpoint(tmp_path):
    ((whole, resumed),) = run_ranks(1, resume, float16_config(engine=ENGINES["ddp"]), tmp_path)
    assert whole[:2] == resumed[:2]
    assert_same(resumed[2], whole[2], 0.0)


def replayed_step(config, folder, scale: float) -> tuple[float, bool, list[str]]:
    """Whether a step was skipped, and what its replay finds."""
    process, model, engine = start_engine(config)
    model.autocast = torch.float16
    model.train()
    engine.loss_scale.value.fill_(scale)
    images, labels = micro_batch(0, 0, config.batch_size)
    engine.backward(engine(images, labels, model.draw(images, seed=config.seed, step=0), 0.1).total)
    skipped = engine.step()
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    values = {"train_generator": True, "mask_loss_weight": 0.1}
    batch = Batch(images, labels, torch.arange(config.batch_size))
    dump = write_dump(folder, checkpoints, engine, [batch], {"step": 1}, {"step_values": values})
    saved, said = find_dump(dump), []
    again = tiny_model(config)
    again.autocast = torch.float16
    again.load_state_dict(load_module_state(saved, ""))
    return float(skipped), replay(again, config, saved, 0, said.append), said


def test_a_replay_overflows_where_the_step_did(tmp_path):
    config = float16_config(engine=ENGINES["ddp"])
    for scale, overflows in ((2.0**30, True), (2.0**10, False)):
        ((skipped, sound, said),) = run_ranks(1, replayed_step, config, tmp_path / str(overflows), scale)
        assert (skipped, sound) == (overflows, not overflows)
        assert any("gradients that are not finite" in each for each in said) == overflows
        assert not any("first output" in each for each in said)


def test_a_run_in_another_precision_leaves_the_scale_as_it_is():
    scale = LossScale(torch.device("cpu"))
    scale.load({"step": 7.0})
    assert scale.state() == {"loss_scale": 2.0**16, "loss_scale_good_steps": 0}


def gradients(dtype: torch.dtype, scale: float | None, immediate: bool, recorded: bool) -> torch.Tensor:
    """Of a query encoder whose heads' weights are so small that float16 hardly has numbers for its activations'."""
    config = tiny_config(engine={"immediate_backward": immediate})
    model = tiny_model(config).train()
    model.autocast = dtype
    model.loss_scale = None if scale is None else torch.tensor(scale)
    with torch.no_grad():
        for head in (model.query.head_one, model.query.head_mix):
            head.weight.mul_(1e-3)
    if recorded:
        capture_steps(model, lambda: Tape)
    total = model(*inputs(config, 0, 0, 1, 0.1)).total
    precision.scaled(total, model.loss_scale).backward()
    return torch.cat([p.grad.flatten() / (scale or 1) for p in model.query.backbone.parameters()])


@pytest.mark.parametrize(("immediate", "recorded"), [(False, False), (True, False), (True, True)])
def test_small_gradients_survive_in_float16_by_their_scale(immediate, recorded):
    expected = gradients(torch.float32, None, immediate, recorded)
    scaled, bare = (gradients(torch.float16, scale, immediate, recorded) for scale in (2.0**16, None))
    error, bare_error = ((each - expected).norm() / expected.norm() for each in (scaled, bare))
    assert error < 0.02 and bare_error > 10 * error


@pytest.mark.parametrize("recorded", [False, True])
def test_a_power_of_two_changes_no_bit_in_float32(recorded):
    scaled, bare = (gradients(torch.float32, scale, True, recorded) for scale in (2.0**16, None))
    assert torch.equal(scaled, bare)
