"""A recording of steps: which ones, with what in it, and that it leaves the training as it is."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_trainer import train
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist.config import ProfileConfig
from automix_dist.profiling import StepProfile


def spans(folder: Path, step: int) -> list[str]:
    trace = json.loads(gzip.decompress((folder / f"trace_step_{step:08d}.json.gz").read_bytes()))
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]


def record(folder: Path, first: int, last: int, **settings: int) -> tuple[list[str], torch.Tensor]:
    """Steps `first` to `last - 1` of a session; what was said, and the sum of the last gradients."""
    said: list[str] = []
    config = tiny_config()
    model = tiny_model(config)
    profile = StepProfile(ProfileConfig(**settings), folder, model, said.append)
    for step in range(first, last):
        profile.begin_step(step)
        model.zero_grad()
        model(*micro_batch(step, 0, 8), rank_draws(config, step, 0, 8), 0.1).total.backward()
    profile.close()
    return said, sum(p.grad.sum() for p in model.parameters() if p.grad is not None)


def test_the_chosen_steps_are_recorded(tmp_path):
    said, gradients = record(tmp_path, 100, 108, start=3, steps=2)
    names = spans(tmp_path, 103)
    for part, times in (("query", 4), ("momentum", 2), ("mix_block", 2)):
        assert names.count(part) == times, names
    assert len(said) == 1 and "2 steps from step 103" in said[0]
    table = (tmp_path / "table_step_00000103.txt").read_text()
    assert "aten::convolution" in table and "mix_block" in table
    assert torch.equal(gradients, record(tmp_path / "off", 100, 108)[1])
    assert not (tmp_path / "off").exists()


def test_compiled_parts_are_left_alone(tmp_path):
    """A hook on them would compile them once more in the middle of the recording."""
    model = tiny_model(tiny_config())
    model.compile_regions("eager")
    profile = StepProfile(ProfileConfig(steps=1, start=0), tmp_path, model, print)
    profile.begin_step(0)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.children())
    profile.close()
    assert (tmp_path / "trace_step_00000000.json.gz").exists()


def test_a_session_that_ends_early_keeps_what_there_is(tmp_path):
    record(tmp_path, 0, 4, start=3, steps=5)
    assert spans(tmp_path, 3).count("momentum") == 1
    said, _ = record(tmp_path / "none", 0, 2, start=3, steps=5)
    assert not (tmp_path / "none").exists() and "ended before step 3" in said[0]


def test_a_profile_that_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "file").touch()
    said, gradients = record(tmp_path / "file", 0, 4, start=1, steps=1)
    assert len(said) == 1 and "from step 1 could not be written: " in said[0]
    assert torch.isfinite(gradients)


@pytest.mark.slow
def test_a_training_leaves_its_profile_in_the_run_folder(tmp_path):
    config = tiny_config(output=str(tmp_path), epochs=2, profile={"steps": 2, "start": 1}, log={"gallery_pairs": 0})
    run_ranks(2, train, config, tmp_path)
    names = spans(tmp_path / "profile", 1)
    assert names.count("momentum") == 2 and names.count("query") == 4
    assert len(list((tmp_path / "profile").iterdir())) == 2, "only the main rank records"
