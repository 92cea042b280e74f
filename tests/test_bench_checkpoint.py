"""The benchmark of saving measures what it says it measures: every way brings back the same bits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from engine_steps import ENGINES, engine_steps, start_engine
from ranks import run_ranks
from tiny import tiny_config

from automix_dist.bench import checkpoint
from automix_dist.engine_state import pieces


def save_spoil_restore(config, folder) -> list[tuple[str, bool]]:
    process, model, engine = start_engine(config)
    engine_steps(config, process, model, engine, 0, 1)
    outcomes = []
    for kind in (checkpoint.Ours, checkpoint.TorchSave, checkpoint.Distributed):
        way = kind(engine, process, folder / kind.__name__)
        if process.is_main:
            way.folder.mkdir()
        process.barrier()
        views = [p.view for p in pieces(engine, process.rank, process.world_size) if p.save]
        before = [view.clone() for view in views]
        way.save()()
        for view in views:
            view.zero_()
        process.barrier()
        way.restore()
        outcomes.append((way.name, all(torch.equal(a, b) for a, b in zip(views, before, strict=True))))
    return outcomes


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_every_way_brings_back_the_same_bits(engine, tmp_path):
    for outcomes in run_ranks(2, save_spoil_restore, tiny_config(engine=ENGINES[engine]), tmp_path):
        assert len(outcomes) == 3 and all(same for _, same in outcomes), outcomes


@pytest.mark.slow
def test_the_command_writes_a_table_and_leaves_nothing_behind(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "scratch"
    folder.mkdir()
    arguments = ["--backbone", "resnet18", "--ranks", "2", "--rounds", "1", "--folder", folder, "--out", out]
    command = [sys.executable, "-m", "automix_dist", "bench", "checkpoint", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| ours |" in done.stdout
    rows = json.loads((out / "checkpoint.json").read_text())["rows"]
    sizes = [row["bytes"] for row in rows]
    assert min(sizes) > 80e6 and max(sizes) < 1.1 * min(sizes)  # two encoders and SGD's momentum, float32
    assert all(row["stall"] <= row["written"] for row in rows)
    assert not list(folder.iterdir())
