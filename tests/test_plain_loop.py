"""A run of the trainer against a plain loop: two ranks, two micro batches each, one step that is not finite."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_trainer import ListEvalLoader
from tiny import micro_batch, tiny_config, tiny_model

from automix_dist import distributed
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import load_module_state, newest
from automix_dist.data import Batch
from automix_dist.distributed import StopRequest
from automix_dist.draws import draw_step, seed_torch
from automix_dist.engines import build_engine
from automix_dist.optimizer import build_optimizer
from automix_dist.run_log import RunLog
from automix_dist.trainer import Position, Trainer

RANKS, PARTS, STEPS, EPOCHS, SIZE, BAD = 2, 2, 3, 2, 4, 2
TOTAL = STEPS * EPOCHS


def inputs(step: int, part: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = micro_batch(step, 10 * part + rank, SIZE)
    if step == BAD and rank == 1 and part == 0:  # its images as floats, one of which is not a number
        images = images.permute(0, 3, 1, 2).float()
        images[0, 0, 0, 0] = math.nan
    return images, labels


class Loader:
    steps_per_epoch, skipped = STEPS, 0

    def __init__(self, rank: int):
        self.rank = rank

    def epoch(self, epoch: int, start_step: int = 0):
        for step in range(epoch * STEPS + start_step, (epoch + 1) * STEPS):
            for part in range(PARTS):
                yield Batch(*inputs(step, part, self.rank), torch.arange(SIZE))


def settings():
    return tiny_config(
        seed=7, epochs=EPOCHS, batch_size=RANKS * PARTS * SIZE,
        optimizer={"lr": 0.1, "min_lr": 0.02, "mix_lr": 0.3, "mix_min_lr": 0.05, "lr_update": "step",
                   "momentum": 0.8, "mix_momentum": 0.3, "weight_decay": 0.01},
        automix={"momentum": 0.6, "momentum_end": 0.9, "momentum_start": 0.0, "mask_loss_weight": 0.5,
                 "mask_loss_schedule": "cosine", "mask_loss_margin": 0.0, "generator_every": 2},
        engine={"name": "ddp", "accumulation_steps": PARTS}, log={"every_steps": 1, "gallery_pairs": 0},
        checkpoint={"every_epochs": 0, "keep_best": False},
    )  # fmt: skip


def model_with_dropout(config):
    model = tiny_model(config)
    model.query.backbone.top.append(torch.nn.Dropout(0.3))
    return model.train()


def trained(config, folder: Path) -> dict[str, torch.Tensor]:
    process = distributed.start(config.engine)
    model = model_with_dropout(config)
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    log = RunLog(folder, is_main=process.is_main, tensorboard=False, start_step=0, config={})
    stop = StopRequest(process, print)
    loaders = Loader(process.rank), ListEvalLoader(process)
    Trainer(config, process, engine, *loaders, checkpoints, log, stop, {}).train(Position())
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def plain(config) -> tuple[dict, list[dict], list[dict]]:
    """Parameters, each rank's buffers and a record of each step, by torch's own SGD and the formulas written out."""
    model = model_with_dropout(config)
    buffers = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(RANKS)]
    groups = [
        {"params": list(model.query.parameters())},
        {"params": list(model.mix_block.parameters()), "momentum": 0.3},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.8, weight_decay=0.01)
    records = []
    for step in range(TOTAL):
        share = step / TOTAL
        optimizer.param_groups[0]["lr"] = half_cosine(0.1, 0.02, share)
        optimizer.param_groups[1]["lr"] = half_cosine(0.3, 0.05, share)
        coefficient = half_cosine(0.6, 0.9, share) if step else 0.6
        judged = step % 2 == 0
        records.append(
            {"lr": optimizer.param_groups[0]["lr"], "momentum": coefficient, "loss": 0.0, "loss_generator": 0.0}
        )
        if step == BAD:
            continue
        optimizer.zero_grad()
        for rank in range(RANKS):
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[rank][name])
            for part in range(PARTS):
                where = {"seed": 7, "step": step, "micro_step": part, "rank": rank}
                draws = draw_step(config.automix, SIZE, **where)._replace(train_generator=judged)
                seed_torch(**where)
                losses = model(*inputs(step, part, rank), draws, half_cosine(0.5, 0.0, share))
                (losses.total / (RANKS * PARTS)).backward()
                records[-1]["loss"] += losses.total.item() / (RANKS * PARTS)
                records[-1]["loss_generator"] += losses.generator.item() / (RANKS * PARTS)
            buffers[rank] = {n: b.clone() for n, b in model.named_buffers()}
        optimizer.step()
        with torch.no_grad():
            for k, q in zip(model.momentum.parameters(), model.query.parameters(), strict=True):
                k.copy_(coefficient * k + (1 - coefficient) * q)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, buffers, records


def test_a_run_is_a_plain_loop(tmp_path):
    config = settings()
    expected, expected_buffers, expected_records = plain(config)
    buffers = run_ranks(RANKS, trained, config, tmp_path)
    state = load_module_state(newest(tmp_path), "")
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for got, wanted in zip(buffers, expected_buffers, strict=True):
        for name, buffer in wanted.items():
            if "running" in name:  # each rank's own
                torch.testing.assert_close(got[name], buffer, rtol=1e-4, atol=1e-6, msg=name)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in logged] == list(range(1, TOTAL + 1))
    for step, (got, wanted) in enumerate(zip(logged, expected_records, strict=True)):
        assert (got["lr"], got["momentum"]) == pytest.approx((wanted["lr"], wanted["momentum"]))
        if step != BAD:
            assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            if step % 2 == 0:
                assert got["loss_generator"] == pytest.approx(wanted["loss_generator"], rel=1e-4)
    assert logged[-1]["skipped_steps"] == 1
    assert {"loss_clean", "loss_mixed", "loss_mask", "mask_area", "top1_train", "grad_norm"} <= logged[0].keys()
