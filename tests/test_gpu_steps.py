"""A real trainer's steps on a GPU: the host waits for nothing, neither for a value nor for a stream or the device."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import CLASSES, TinyBackbone, micro_batch, tiny_config

from automix_dist import distributed
from automix_dist.captured_step import capture_steps
from automix_dist.data import Batch
from automix_dist.engines import build_engine
from automix_dist.model import build_model
from automix_dist.optimizer import build_optimizer
from automix_dist.trainer import Trainer

pytest.importorskip("accelerate", exc_type=ImportError)

SECONDS = 180  # on a CPU that others use, too, a step is compiled within one minute
WARM_UP, WATCHED = 12, 4  # everything is compiled in the first steps, and DDP times its first ten, which waits

ENGINES = [
    pytest.param({"name": "ddp"}, id="ddp"),
    pytest.param({"name": "ddp", "immediate_backward": False}, id="ddp, one backward"),
    pytest.param({"name": "ddp", "compile": True}, id="ddp, compiled"),
    pytest.param({"name": "ddp", "cuda_graph": True}, id="ddp, CUDA graph"),
    pytest.param({"name": "ddp", "cuda_graph": True, "compile": True}, id="ddp, compiled, CUDA graph"),
    pytest.param({"name": "ddp", "fused_batchnorm": True}, id="ddp, fused BatchNorm"),
    pytest.param({"name": "ddp", "fused_batchnorm": True, "compile": True}, id="ddp, fused BatchNorm, compiled"),
    pytest.param({"name": "ddp", "fused_batchnorm": True, "cuda_graph": True}, id="ddp, fused BatchNorm, CUDA graph"),
    pytest.param(
        {"zero_stage": 0},
        id="zero0",
        marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    ),
]


def refuse(*_, **__):
    raise RuntimeError("the host waits for the GPU")


def train(engine: dict) -> float:
    """The loss of the last step; raises if one of the last steps waits."""
    config = tiny_config(
        engine={"device": "cuda", **engine}, optimizer={"clip_norm": 1.0},
        automix={"upsampling": ["nearest"], "switch_off": 0.0, "mask_adjust": 0.0},
    )  # fmt: skip
    process = distributed.start(config.engine)
    torch.manual_seed(0)
    model = build_model(config, TinyBackbone(), CLASSES, torch.bfloat16).to(process.device).train()
    if config.engine.compile:
        model.compile_regions()
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    if config.engine.cuda_graph:
        capture_steps(model)
    loader = SimpleNamespace(steps_per_epoch=WARM_UP + WATCHED)
    trainer = Trainer(config, process, engine, loader, None, None, None, None, {})
    batches = [micro_batch(step, 0, config.batch_size) for step in range(WARM_UP + WATCHED)]
    batches = [Batch(*(each.to(process.device) for each in batch), None) for batch in batches]

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            trainer.progress.begin_step(step, patient=False)
            trainer._train_step(iter([batches[step]]), trainer.schedule.at(step))
            trainer.position.step += 1
            trainer.progress.end_step()

    steps(0, WARM_UP)
    torch.cuda.synchronize()
    # What torch's mode does not see: waiting for the device, a stream or an event by name.
    with (
        mock.patch("torch.cuda.synchronize", refuse),
        mock.patch("torch.cuda.Stream.synchronize", refuse),
        mock.patch("torch.cuda.Event.synchronize", refuse),
    ):
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps(WARM_UP, WARM_UP + WATCHED)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    losses, _, skipped = trainer._tally.read()
    assert skipped == 0
    distributed.finish()
    return losses["total"]


def train_and_wait() -> float:
    plain = Trainer._train_step

    def step(self, batches, values):
        plain(self, batches, values)
        self._tally.skipped_in_a_row()

    with mock.patch.object(Trainer, "_train_step", step):
        return train({"name": "ddp"})


@pytest.fixture
def own_process():
    """One process belongs to one group of processes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
        for process in pool._processes.values():  # one that hangs would be waited for
            process.kill()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_a_steady_step_waits_for_nothing(engine, own_process):
    assert own_process.submit(train, engine).result(SECONDS) > 0


@pytest.mark.gpu
def test_a_step_that_waits_is_noticed(own_process):
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        own_process.submit(train_and_wait).result(SECONDS)
