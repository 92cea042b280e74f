"""The loop's order of things, with a real engine and loaders that are lists: what is done when, stopping anywhere."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from engine_steps import start_engine
from ranks import run_ranks
from tiny import SIZE, micro_batch, tiny_config, tiny_model

from automix_dist import distributed, trainer
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import committed_steps, load_module_state, newest
from automix_dist.config import ConfigError
from automix_dist.data import Batch
from automix_dist.distributed import StopRequest
from automix_dist.profiling import StepProfile
from automix_dist.progress import Progress
from automix_dist.replay import replay
from automix_dist.run_log import RunLog
from automix_dist.trainer import Position, Tally, Trainer, TrainingError

STEPS, BATCH = 3, 16


class ListTrainLoader:
    """Three steps an epoch; `signal_at` sends this process a SIGTERM while that step's batch is made."""

    steps_per_epoch = STEPS
    skipped = 0

    def __init__(self, process, signal_at: int | None = None):
        self.process = process
        self.signal_at = signal_at
        self.closed = 0

    def epoch(self, epoch: int, start_step: int = 0):
        try:
            for step in range(epoch * STEPS + start_step, (epoch + 1) * STEPS):
                if step == self.signal_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                size = BATCH // self.process.world_size
                yield Batch(*micro_batch(step, self.process.rank, size), torch.arange(size))
        finally:
            self.closed += 1


class ListEvalLoader:
    """Seven images in batches of one; `signal_in` sends SIGTERM in that evaluation, counted from 1."""

    num_samples, batch_size = 7, 1

    def __init__(self, process, signal_in: int | None = None):
        self.process = process
        self.signal_in = signal_in
        self.evaluations = 0
        self.num_batches = math.ceil(self.num_samples / process.world_size)  # of one image each

    def blank(self) -> torch.Tensor:
        return torch.zeros((1, SIZE, SIZE, 3), dtype=torch.uint8)

    def __iter__(self):
        images, labels = micro_batch(999, 0, self.num_samples)
        own = torch.arange(self.process.rank, self.num_samples, self.process.world_size)
        self.evaluations += 1
        for number, part in enumerate(own.split(self.batch_size)):
            if number == 0 and self.evaluations == self.signal_in:
                os.kill(os.getpid(), signal.SIGTERM)
            yield Batch(images[part], labels[part], part)


def train(config, folder: Path, signal_at: int | None = None, signal_in: int | None = None):
    """One session, resumed from what the folder holds: (signal that stopped it, position, saved steps, events)."""
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    saved = checkpoints.agree_on_newest()
    position = Position(**checkpoints.load(engine, saved)) if saved else Position()
    me = process.rank == process.world_size - 1  # only the last rank gets the signal
    loaders = ListTrainLoader(process, signal_at if me else None), ListEvalLoader(process, signal_in if me else None)
    log = RunLog(folder, is_main=process.is_main, tensorboard=False, start_step=position.step, config={})
    stop = StopRequest(process, print, config.checkpoint.stop_after_minutes)
    trainer = Trainer(config, process, engine, *loaders, checkpoints, log, stop, {})
    stopped = trainer.train(position)
    process.barrier()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [(r["kind"], r["step"]) for r in records if r["kind"] in ("eval", "checkpoint", "stopped")]
    return stopped, position, sorted(committed_steps(folder)), kinds, loaders[0].closed


def stop_by_limit_and_signals(config) -> list[str]:
    process, _, _ = start_engine(config)
    said: list[str] = []
    with mock.patch.object(distributed, "SAME_STOP_SECONDS", 0.0):
        stop = StopRequest(process, said.append, minutes=1e-9)
        assert stop.agreed() == signal.SIGALRM
        for number in (signal.SIGUSR1, signal.SIGTERM):  # neither ends this process
            signal.raise_signal(number)
            time.sleep(0.01)
    return [text.partition(":")[0] for text in said]


@pytest.mark.parametrize(("world_size", "exchanges"), [(2, 128), (64, 128), (256, 32), (1024, 8)])
def test_of_more_ranks_an_exchange_is_for_more_calls(world_size, exchanges, monkeypatch):
    """In the same call on every rank another rank's signal is known, and none is forgotten."""
    begun = []

    def all_reduce(tensor, *_, **__):
        begun.append(tensor)
        tensor.fill_(signal.SIGUSR1 if len(begun) > 2 else 0)
        return mock.Mock()

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    handlers = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    stop = StopRequest(mock.Mock(world_size=world_size), print)
    agreed = [stop.agreed() for _ in range(128)]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert len(begun) == exchanges
    every = 128 // exchanges
    assert agreed == [0] * (4 * every - 1) + [signal.SIGUSR1] * (129 - 4 * every)


def test_losses_of_judged_steps_are_means_of_those():
    tally = Tally(mock.Mock(device=torch.device("cpu"), sum=lambda each: each), ("clean", "generator"))
    for clean, generator, judged, skipped in ((1.0, 0.0, 0.0, 0), (2.0, 6.0, 1.0, 0), (3.0, 1.0, 0.5, 0), (9, 9, 1, 1)):
        tally.add(torch.tensor([clean, generator]), torch.tensor(1.0), torch.tensor(float(skipped)), judged)
    losses, norm, skips = tally.read()
    assert losses == {"clean": 2.0, "generator": pytest.approx(7 / 1.5)} and (norm, skips) == (1.0, 1)
    tally.add(torch.tensor([4.0, 0.0]), torch.tensor(1.0), torch.tensor(0.0), 0.0)
    assert tally.read()[0] == {"clean": 4.0}
    assert list(tally.read()[0]) == ["clean"]  # without any step


def test_a_scheduler_s_signals_after_a_time_limit_do_not_cut_the_save(tmp_path):
    assert run_ranks(1, stop_by_limit_and_signals, tiny_config()) == [["the time limit is reached", "SIGUSR1"]]


def config(**checkpoint):
    return tiny_config(
        epochs=4, eval_every_epochs=2, log={"every_steps": 2, "gallery_pairs": 2},
        checkpoint={"every_epochs": 1, "keep_last": 9, "keep_best": False, **checkpoint},
    )  # fmt: skip


def test_evaluations_and_checkpoints_come_when_they_are_due(tmp_path):
    ((stopped, position, saved, kinds, closed),) = run_ranks(1, train, config(), tmp_path)
    assert stopped == 0 and position.step == 12 and closed == 4
    assert saved == [3, 6, 9, 12]
    assert [step for kind, step in kinds if kind == "eval"] == [6, 12]
    assert kinds.index(("eval", 6)) < kinds.index(("checkpoint", 6))  # what is saved has been evaluated


def test_checkpoints_by_steps_and_only_at_the_end(tmp_path):
    ((_, _, saved, _, _),) = run_ranks(1, train, config(every_epochs=0, every_steps=5), tmp_path / "steps")
    assert saved == [5, 10, 12]
    ((_, _, saved, kinds, _),) = run_ranks(1, train, config(every_epochs=0, every_steps=6), tmp_path / "last")
    assert saved == [6, 12] and kinds[-1] == ("checkpoint", 12)
    ((_, _, saved, _, _),) = run_ranks(1, train, config(every_epochs=0), tmp_path / "end")
    assert saved == [12]


def test_every_new_best_is_saved(tmp_path):
    ((_, position, saved, _, _),) = run_ranks(1, train, config(every_epochs=0, keep_best=True), tmp_path)
    assert position.best_step in saved and saved[-1] == 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_a_step_stops_all_ranks_after_the_same_step(ranks, tmp_path):
    results = run_ranks(ranks, train, config(), tmp_path, 4)
    (stopped, position, saved, kinds, closed), *others = results
    assert stopped == signal.SIGTERM and position.step in (5, 6)  # with several ranks word takes a step to get around
    assert saved[-1] == position.step and kinds[-1] == ("stopped", position.step)
    assert closed == 2
    assert all(other[:3] == (stopped, position, saved) for other in others)
    for stopped, position, saved, kinds, _ in run_ranks(ranks, train, config(), tmp_path):
        assert stopped == 0 and position.step == 12 and saved[-1] == 12
        assert [step for kind, step in kinds if kind == "eval"] == [6, 12]


def test_a_time_limit_stops_like_a_signal(tmp_path):
    limited = config(stop_after_minutes=1e-6)
    for stopped, position, saved, kinds, _ in run_ranks(2, train, limited, tmp_path):
        assert stopped == signal.SIGALRM and saved == [position.step] == [1]  # with two ranks word takes a step
        assert kinds[-1] == ("stopped", position.step)


@pytest.mark.parametrize(
    ("job", "age"),
    [("{ago}-4711-12", 5400), ("{ahead}-4711-12", 60), ("", 60), ("nightly-7", 60), ("12-4711-12", 60)],
)
def test_the_time_limit_counts_from_the_start_of_the_job(job, age, monkeypatch):
    """Ranks that torchrun has started again are younger than their job."""
    now = time.time()
    monkeypatch.setenv("AUTOMIX_JOB", job.format(ago=int(now - 5400), ahead=int(now + 5400)))
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: now - 60)
    assert now - distributed._job_start() == pytest.approx(age, abs=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_an_evaluation_saves_and_the_resumed_run_evaluates(ranks, tmp_path):
    first = run_ranks(ranks, train, config(), tmp_path, None, 1)
    assert {(stopped, position.step, position.evaluated_step) for stopped, position, *_ in first} == {(15, 6, 0)}
    assert first[0][2][-1] == 6 and ("eval", 6) not in first[0][3]
    second = run_ranks(ranks, train, config(), tmp_path)
    assert [step for kind, step in second[0][3] if kind == "eval"] == [6, 12]
    undisturbed = run_ranks(ranks, train, config(), tmp_path / "undisturbed")
    assert second[0][1] == undisturbed[0][1]


def die_after_the_evaluation(settings, folder: Path) -> None:
    ListTrainLoader.epoch = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(settings, folder)


def test_a_step_saved_by_a_signal_is_evaluated_once(tmp_path):
    """Also where no save is due after the evaluation, and the resumed run dies before the next one."""
    settings = config(every_epochs=0)
    run_ranks(1, train, settings, tmp_path, None, 1)
    run_ranks(1, die_after_the_evaluation, settings, tmp_path)
    ((_, _, _, kinds, _),) = run_ranks(1, train, settings, tmp_path)
    assert [step for kind, step in kinds if kind == "eval"] == [6, 12]


@pytest.mark.parametrize("changes", [{"every_steps": 3}, {"every_steps": 2}, {}])
def test_the_last_checkpoint_knows_the_last_evaluation(changes, tmp_path):
    """Also where a signal came in the midst of it: what is best is read from the newest checkpoint."""
    settings = config(every_epochs=0, keep_best=True, **changes)
    run_ranks(1, train, settings, tmp_path, None, 2)
    ((stopped, position, _, kinds, _),) = run_ranks(1, train, settings, tmp_path)
    assert stopped == 0 and position.evaluated_step == 12
    state = newest(tmp_path).manifest["state"]
    assert (state["evaluated_step"], state["best_step"]) == (12, position.best_step)
    ((_, again, _, later, _),) = run_ranks(1, train, settings, tmp_path)  # a finished run is left as it is
    assert again == position and later == kinds
    assert [step for kind, step in later if kind == "eval"] == [6, 12]


def settings_of_ranks(settings, _: Path) -> str:
    process, *_ = start_engine(settings)
    process.agree({"seed": 0, "optimizer.lr": 0.1})
    try:
        process.agree({"seed": 0, "optimizer.lr": 0.1 + process.rank})
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_are_named(tmp_path):
    said = run_ranks(2, settings_of_ranks, tiny_config(), tmp_path)
    assert said == ["rank 1 has optimizer.lr = 1.1 and rank 0 0.1: give all nodes the same config and data"] * 2


def diverge(settings, folder: Path) -> str:
    try:
        train(settings, folder)
    except TrainingError as error:
        return str(error)
    return ""


def test_too_many_skipped_steps_stop_all_ranks_and_leave_a_dump(tmp_path):
    settings = tiny_config(
        optimizer={"lr": 1e30, "min_lr": 0.0}, log={"every_steps": 2}, engine={"max_skipped_steps": 3},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )  # fmt: skip
    messages = run_ranks(2, diverge, settings, tmp_path)
    last = max(committed_steps(tmp_path))
    assert last and f"; the last checkpoint is of step {last}. A lower optimizer.lr" in messages[0]
    assert all("3 steps in a row were not finite" in message and "on rank 1" in message for message in messages)
    (dump,) = (tmp_path / "dumps").iterdir()
    assert f"automix replay {dump}" in messages[0]
    assert sorted(p.name for p in dump.glob("*.safetensors")) == [
        "batches_00000.safetensors",
        "batches_00001.safetensors",
    ]
    ((sound, said),) = run_ranks(1, replay_dump, settings, dump)
    assert not sound and "first output that is not finite" in "".join(said)


def fail_on_a_full_disk(settings, folder: Path) -> tuple[str, list[str]]:
    """No dump and no checkpoint can be written; the error, and in which order what was done."""
    noted, close, begin = [], RunLog.close, Progress.__init__

    def begin_noting(progress, *arguments, **keywords) -> None:
        begin(progress, *arguments, **keywords)
        progress.on_failure = lambda error: noted.append(f"told of {type(error).__name__}")

    def close_noting(log, failed: bool = False) -> None:
        noted.append("closed as failed" if failed else "closed")
        close(log, failed)

    RunLog.close, Progress.__init__ = close_noting, begin_noting
    StepProfile.close = lambda _: 1 / 0
    (folder / "dumps").touch()
    (folder / "checkpoints").touch()
    try:
        train(settings, folder)
    except ZeroDivisionError as error:
        return str(error.__context__), noted
    return "", noted


def test_a_failure_says_what_is_not_on_disk_and_is_told_before_logs_are_closed(tmp_path):
    settings = tiny_config(
        optimizer={"lr": 1e30, "min_lr": 0.0}, engine={"max_skipped_steps": 3}, checkpoint={"every_steps": 1}
    )
    ((message, noted),) = run_ranks(1, fail_on_a_full_disk, settings, tmp_path)
    assert "Its dump could not be written; no checkpoint exists." in message and "replay" not in message
    assert noted == ["told of TrainingError", "closed as failed", "closed"]


def test_a_second_failure_at_a_step_leaves_its_own_dump(tmp_path):
    weights = []
    for lr in (1e30, 2e30):
        settings = tiny_config(
            optimizer={"lr": lr, "min_lr": 0.0}, log={"every_steps": 2}, engine={"max_skipped_steps": 3}
        )
        run_ranks(1, diverge, settings, tmp_path)
        (dump,) = (tmp_path / "dumps").iterdir()
        weights.append(load_module_state(newest(dump), "mix_block."))
        shutil.rmtree(tmp_path / "checkpoints")  # the next one starts from the beginning
    first, second = weights
    assert any(not torch.equal(first[name], second[name]) for name in first)


def replay_dump(settings, dump: Path) -> tuple[bool, list[str]]:
    saved, said = newest(dump), []
    model = tiny_model(settings)
    model.load_state_dict(load_module_state(saved, ""))
    return replay(model, settings, saved, 1, said.append), said


@pytest.mark.parametrize("stage", [0, 3])
def test_uneven_evaluation_counts_every_image_once(stage, tmp_path):
    """Seven images on three ranks: some run out of batches earlier, which a sharded model must not hang on. With five
    classes top-5 is the share of images that were counted."""
    settings = tiny_config(batch_size=24, epochs=1, engine={"zero_stage": stage}, log={"gallery_pairs": 2})
    run_ranks(3, train_wide, settings, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["top5_query"] for each in records if each["kind"] == "eval"] == [1.0]


def train_wide(settings, folder: Path) -> Position:
    global BATCH
    BATCH = 24
    return train(settings, folder)[1]


def train_with_answers(settings, folder, top1: list[float], top5: list[float]):
    answers = iter([{"top1_query": a, "top5_query": b, "loss_query": 1.0} for a, b in zip(top1, top5, strict=True)])
    trainer.validate = lambda *_, **__: next(answers)
    return train(settings, folder)[1]


@pytest.mark.parametrize(("top1", "best"), [([0.3, 0.5, 0.4, 0.5], (6, 0.5)), ([0.2, 0.2, 0.2, 0.1], (3, 0.2))])
def test_the_best_is_the_first_with_the_highest_top1(top1, best, tmp_path):
    settings = tiny_config(epochs=4, eval_every_epochs=1, log={"gallery_pairs": 0}, checkpoint={"every_epochs": 0})
    (position,) = run_ranks(1, train_with_answers, settings, tmp_path, top1, [0.9, 0.8, 0.95, 0.99])
    assert (position.best_step, position.best_top1) == best


def gallery_of(settings, folder) -> dict:
    ListEvalLoader.batch_size = 7
    shown = []
    RunLog.gallery = lambda self, step, shown_now: shown.append(shown_now._asdict())
    train(settings, folder)
    return shown[-1]


def test_a_gallery_shows_the_partners_that_it_names(tmp_path):
    (shown,) = run_ranks(1, gallery_of, config(), tmp_path)  # two pairs: each image with the next one
    images, labels = micro_batch(999, 0, 7)
    chosen = [0, 6]
    assert np.array_equal(shown["images"], images[chosen]) and shown["labels"].tolist() == labels[chosen].tolist()
    assert np.array_equal(shown["partners"], images[chosen[::-1]])
    assert shown["partner_labels"].tolist() == labels[chosen[::-1]].tolist()
    mask = shown["masks"].astype(np.float64)[..., None]
    expected = shown["images"] * (1 - mask) + shown["partners"] * mask
    assert np.abs(shown["mixed"] - expected).max() <= 1.5
    assert len(shown["sweep_lam"]) == 11 and shown["lam"].tolist() == pytest.approx([0.1, 0.9])


def test_a_dump_has_the_values_of_its_own_step(tmp_path):
    settings = tiny_config(
        optimizer={"lr": 1e30, "min_lr": 0.0, "lr_update": "step"}, log={"every_steps": 2},
        engine={"max_skipped_steps": 3}, checkpoint={"every_steps": 1},
    )  # fmt: skip
    run_ranks(1, diverge, settings, tmp_path)
    (dump,) = (tmp_path / "dumps").iterdir()
    step = int(dump.name.removeprefix("step_"))
    total = 4 * STEPS
    lr = 1e30 * (1 + np.cos(np.pi * step / total)) / 2
    assert newest(dump).manifest["step_values"]["lr"] == pytest.approx(lr)
