"""The benchmark of a whole job: that its record adds up, and what it concludes. No timing is judged."""

import ctypes
import dataclasses
import json
import subprocess
import sys
import time
import types
from unittest.mock import MagicMock

import pytest
import torch

from automix_dist.bench import throughput as bench
from automix_dist.config import ConfigError
from automix_dist.config_file import load_config
from automix_dist.data import Batch

CONFIG = "configs/imagenet/automix_resnet18_100ep.yaml"
SMALL = ["model.backbone=resnet10t", "data.image_size=32", "batch_size=8", "engine.device=cpu", "automix.feature=-2"]


@pytest.mark.slow
def test_end_to_end(tmp_path):
    arguments = [CONFIG, *SMALL, "engine.accumulation_steps=2", "--steps", "6", "--warmup", "2", "--images", "40"]
    arguments += ["--storage", "raw@48", "--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "automix_dist", "bench", "throughput", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "throughput.json").read_text())
    measured = result["measured"]
    assert measured["steps"] == 8, "two epochs of five steps, less the two of the warm-up"
    assert 0 <= measured["waiting_share"] < 1 and 0 < measured["filling_share"] < 1
    assert 0 < measured["saving_share"] < 1 and measured["saving_seconds"] > 0
    assert measured["images_per_second"] > 0 and measured["evaluated_per_second"] > 0 and result["loader_alone"] > 0
    assert result["images"] == [1281167, 50000] and result["epochs"] == 100
    assert (measured["joules_per_image"] is None) == bool(measured["joules_unknown"])
    assert torch.cuda.is_available() or measured["joules_unknown"] == "no GPU"
    text = (tmp_path / "throughput.md").read_text()
    assert text == bench.markdown(result) and text in done.stdout
    saved = sorted(path.name for path in (tmp_path / "data" / "run" / "checkpoints").glob("step_*"))
    assert saved == ["step_00000005", "step_00000010"]


class Naps:
    """A loader whose batches take `seconds` each, the first of an epoch three times that."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def epoch(self, number: int, start_step: int = 0):
        for index in range(4):
            time.sleep(self.seconds * (3 if index == 0 else 1))
            yield Batch(torch.zeros(2, 1, 1, 3, dtype=torch.uint8), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_waiting_and_working_are_told_apart(micro_batches, monkeypatch):
    now = [0.0]  # a clock that nothing but sleeping moves
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    recorder = bench.Recorder(warmup=1, micro_batches=micro_batches)
    epoch, loader = recorder._epoch(Naps.epoch), Naps(0.02)
    for number in range(3):
        batches = epoch(loader, number)
        for _ in range(4):
            next(batches)
            time.sleep(0.01)
        batches.close()
    recorder.end()
    recorder.saving, recorder.evaluating = [0.1, 0.3], [(2.0, 100)]
    config = dataclasses.replace(load_config(CONFIG, ["batch_size=2"]))
    measured = bench.figures(recorder, config, 1)
    assert measured["steps"] == 12 / micro_batches - 1
    counted = 12 - micro_batches
    total = counted * 0.01 + 2 * 0.06 + (counted - 3) * 0.02
    assert measured["waiting_share"] == pytest.approx((counted - 3) * 0.02 / total)
    assert measured["filling_share"] == pytest.approx(2 * 0.06 / total)
    assert measured["step_ms"] == pytest.approx(10 * micro_batches)
    assert measured["saving_seconds"] == pytest.approx(0.2) and measured["evaluated_per_second"] == 50


def test_extrapolation():
    recipe = load_config(CONFIG, ["epochs=10", "batch_size=100", "eval_every_epochs=3", "checkpoint.every_epochs=2"])
    measured = {
        "images_per_second": 500.0, "filling_share": 0.5, "evaluated_per_second": 100.0, "saving_seconds": 36.0,
        "world_size": 4,
    }  # fmt: skip
    hours = bench.extrapolate(measured, recipe, (360_050, 90_000))
    assert hours["training"] == pytest.approx(1.0)  # 10 epochs of 3,600 steps at 1,000 images/s while an epoch runs
    assert hours["evaluating"] == pytest.approx(1.0)  # four times 900 s
    assert hours["saving"] == pytest.approx(0.05)
    assert hours["hours"] == pytest.approx(2.05) and hours["device_hours"] == pytest.approx(8.2)


def test_the_verdict():
    result = {
        "config": "c", "overrides": ["epochs=3"], "data": "beads",
        "machine": {"device": "abacus", "versions": {}, "load_average": 0.0},
        "batch_size": 8, "epochs": 1, "images": [1, 1], "loader_alone": 200.0, "training_sizes": [160],
        "measured": {"images_per_second": 100.0, "world_size": 1, "step_ms": 80.0, "waiting_share": 0.2,
                     "filling_share": 0.0, "saving_share": 0.0, "saving_seconds": 0.0, "steps": 3,
                     "evaluated_per_second": 1.0, "joules_per_image": 2.5, "joules_unknown": ""},
        "recipe": {"hours": 1.0, "training": 1.0, "evaluating": 0.0, "saving": 0.0, "device_hours": 1.0},
    }  # fmt: skip
    text = bench.markdown(result)
    assert "\nc epochs=3; abacus; " in text
    assert "| training images | 160 px |" in text
    assert "20.0%: the loader holds the job up" in text and "2.50 J/image" in text and "2.0 times" in text
    result["measured"] |= {"waiting_share": 0.01, "joules_per_image": None, "joules_unknown": "no GPU"}
    result["training_sizes"] = [128, 224, 160]
    text = bench.markdown(result)
    assert "the step is what takes the time" in text and "| energy | not known: no GPU |" in text
    assert "224 px, the largest of the recipe's 128, 224, 160: its hours are an upper bound" in text


def test_a_job_is_the_recipe_but_for_its_length(tmp_path):
    files = bench.generated(tmp_path, 40, "raw@32", 8)
    assert bench.generated(tmp_path, 40, "raw@32", 8) == files
    recipe = load_config(CONFIG, SMALL)
    job = bench.job(recipe, tmp_path, files, steps=7, warmup=2)
    assert job.epochs == 2 and job.checkpoint.every_steps == 5
    assert (job.model, job.automix, job.engine, job.batch_size) == (
        recipe.model, recipe.automix, recipe.engine, recipe.batch_size)  # fmt: skip
    assert job.data.resolution_schedule == ()
    for schedule, sizes, kept in (
        ("[[0, 160]]", [160], ((0, 160),)),
        ("[[0, 128], [30, 160], [60, 192], [1000, 256]]", [128, 160, 192], ((0, 192),)),
    ):
        resized = load_config(CONFIG, [*SMALL, f"data.resolution_schedule={schedule}"])
        assert bench.training_sizes(resized) == sizes
        assert bench.job(resized, tmp_path, files, 7, 2).data.resolution_schedule == kept
    with pytest.raises(ConfigError, match="batch_size = 41: expected at most 40"):
        bench.job(dataclasses.replace(recipe, batch_size=41), tmp_path, files, 7, 2)


def test_the_images_told_are_those_that_were_made(tmp_path, monkeypatch, capsys):
    """A batch may be more than --images."""
    for name, result in (("train", 0), ("figures", {}), ("loader_alone", 0.0), ("extrapolate", {})):
        monkeypatch.setattr(bench, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(bench, "Recorder", MagicMock())
    monkeypatch.setattr(bench, "markdown", lambda result: result["data"])
    command = [CONFIG, *SMALL, "batch_size=24", "--images", "16", "--storage", "raw@32", "--data", str(tmp_path)]
    assert bench.run(command) == 0
    assert capsys.readouterr().out == "24 generated images, raw@32\n"


class Nvml:
    """The driver's library as ctypes shows it: three functions that return 0, or an error's number."""

    def __init__(self, energy: int = 0):
        self.energy, self.joules = energy, 5000

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        assert uuid == b"GPU-1-2" and isinstance(handle._obj, ctypes.c_void_p)
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        millijoules._obj.value = self.joules
        return self.energy


def test_energy_is_known_or_there_is_a_reason(monkeypatch):
    assert torch.cuda.is_available() or bench._joules() == "no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    assert bench._joules() == 5.0
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(energy=3))
    assert bench._joules() == "nvmlDeviceGetTotalEnergyConsumption failed with NVML's error 3"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if not torch.cuda.device_count():
        assert "libnvidia-ml.so.1" in bench._joules()


def test_ranks_do_not_make_data(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="without torchrun"):
        bench.generated(tmp_path, 40, "raw@32", 8)


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--warmup", "0"], ["--images", "3"], ["--storage", "png@5"]])
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.run([CONFIG, *arguments])
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err
