"""One training run: its parts, and the training itself."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automix_dist import beton, distributed, provenance
from automix_dist.activation_checkpointing import checkpoint_blocks
from automix_dist.backbone import foreign_normalisation, synchronize_batchnorm
from automix_dist.captured_step import capture_steps
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import Saved, committed_steps
from automix_dist.config import Config, ConfigError, flatten, to_dict
from automix_dist.data import EvalLoader, TrainLoader
from automix_dist.distributed import Process
from automix_dist.engines import Engine, build_engine, summary
from automix_dist.errors import EXIT_STOPPED, stop_reason
from automix_dist.export import foreseen_refusal
from automix_dist.fused_batchnorm import describe_fused
from automix_dist.heartbeat import Heartbeat
from automix_dist.metrics_file import has_saved, kinds_at, set_aside
from automix_dist.model import describe_model
from automix_dist.optimizer import build_optimizer
from automix_dist.precision import autocast_name
from automix_dist.rank_log import RankLog
from automix_dist.run_check import Checked, check_run
from automix_dist.run_folder import discard, is_of_this_job, on_rank_0, open_folder, store_settings, try_saving
from automix_dist.run_log import RunLog
from automix_dist.trainer import Position, Trainer

FIXED_ON_RESUME = (
    "seed",
    "batch_size",
    "data.order",
    "data.chunk_size",
    "data.window_chunks",
    "data.repeats",
    "model",
    "automix.reduction",
    "automix.lam_concat",
    "automix.norm",
    "automix.feature",
    "optimizer.name",
    "policy.name",
    "policy.ema_decay",
)
"""Settings, or whole sections, whose change would make a checkpoint's tensors or its place in the data meaningless."""

BITWISE_CONDITIONS = {
    "device": "device",
    "gpus": "GPUs",
    "world_size": "ranks",
    "threads": "threads of a rank",
    "versions.torch": "torch",
}
"""Of an environment, what the last bits of a training depend on; and its name for people."""

Say = Callable[[str], None]


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> int:
    """One run, from the resolved config to its end; the exit code of `automix train`.

    Args:
        config: with its policy's settings written out (`policy.with_policy_settings`).
        resume: continue from the newest whole checkpoint, if there is one.
        overwrite: discard the run that the output folder holds. A Slurm job that is started again by its controller
            discards once, and then continues its own run.

    Raises:
        AutomixError: in whatever form; the message is meant for the user.
    """
    run = Path(config.output)
    checked = check_run(config, run if resume else None)
    process = distributed.start(config.engine)
    if process.broadcast(overwrite and is_of_this_job(run) if process.is_main else None):
        resume, overwrite = True, False  # what was to be discarded is gone: an earlier start of this job did it
    about = {
        "config": to_dict(config),
        "environment": provenance.environment()
        | {
            "device": process.device.type,
            "autocast": autocast_name(config, process.device),
            "world_size": process.world_size,
            "threads": torch.get_num_threads(),
        },
        "classes": checked.train.classes,
        "index_checksums": {"train": checked.train.index_checksum, "val": checked.val.index_checksum},
    }
    indices = {f"the index of data.{split}": checksum for split, checksum in about["index_checksums"].items()}
    process.agree(flatten(about["config"]) | indices)
    on_rank_0(process, lambda: open_folder(run, resume, overwrite))
    try_saving(process, run)
    log = RankLog(run, process.rank)
    try:
        with Heartbeat(process, config.engine, log):
            code = _train(config, process, run, checked, about, resume, overwrite)
    except Exception:
        if not config.engine.stall_seconds:  # else the heartbeat tells of it
            log.speak_on_console()
        raise
    distributed.finish()
    return code


def _train(
    config: Config, process: Process, run: Path, checked: Checked, about: dict[str, Any], resume: bool, overwrite: bool
) -> int:
    """Build the parts of a run and train. Until they are built, the folder keeps what it holds."""

    def say(text: str) -> None:
        if process.is_main:
            # RuntimeError: a signal came in the middle of another line. OSError, ValueError: the console is gone, as in
            # a pipe to tee after Ctrl-C, and what is to be said must not stop what is to be saved.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                print(text, file=sys.stderr, flush=True)

    # From here on a signal is noted, and acted upon before the first step: no rank leaves the others alone.
    stop = distributed.StopRequest(process, say, config.checkpoint.stop_after_minutes)
    _announce(config, process, checked, say)
    checkpoints = Checkpoints(run, config.checkpoint, process, say)
    saved = checkpoints.agree_on_newest() if resume else None
    changed: list[str] = []
    if saved is not None:
        total_steps = config.epochs * (checked.train.count // config.batch_size)
        changed = _check_continuation(saved, config, about, total_steps, say)
    elif checked.weights_error is not None:
        raise checked.weights_error

    train_loader, val_loader = _open_loaders(config, process, checked)
    say(train_loader.storage_note)
    engine = _engine_of(checked.model, config, process)
    position, logged = Position(), set()
    if overwrite:
        on_rank_0(process, lambda: discard(run))
    if saved is not None:
        position = _restored_position(checkpoints.load(engine, saved), saved, config, about, say)
        logged = process.broadcast(kinds_at(run, position.step) if process.is_main else None)
        if position.evaluated_step == position.step and "eval" not in logged:
            position = dataclasses.replace(position, evaluated_step=0)  # a crash has lost the result: once more
    else:
        if resume:
            say(f"nothing to resume in {run}: starting from the beginning")
        if process.is_main and (committed_steps(run) or has_saved(run)):
            say(f"the checkpoints of an earlier training are lost; what it logged is kept as {set_aside(run)}_*")
    on_rank_0(process, lambda: store_settings(run, config, about))
    log = RunLog(
        run,
        is_main=process.is_main,
        tensorboard=config.log.tensorboard,
        trackers=config.log.trackers,
        start_step=position.step,
        config=about["config"],
    )
    if saved is not None and "checkpoint" not in logged:
        log.event("checkpoint", saved.step, bytes=sum(entry["bytes"] for entry in saved.manifest["files"]))
    if changed:
        log.event("changed", position.step, changes=changed)
    trainer = Trainer(config, process, engine, train_loader, val_loader, checkpoints, log, stop, about)
    try:
        stopped = trainer.train(position)
    finally:
        train_loader.close()
        val_loader.close()
    if stopped:
        kept = "saved" if position.step else "nothing to save yet"
        say(f"stopped by {stop_reason(stopped)} at step {position.step}, {kept}; continue with --resume")
        return EXIT_STOPPED
    best = "" if position.best_step is None else f", best top-1 {position.best_top1:.2%} at step {position.best_step}"
    skipped = f", {trainer.skipped_steps} of them skipped as not finite" if trainer.skipped_steps else ""
    say(f"done: {position.step} steps{skipped}{best}; results in {run}")
    return 0


def _open_loaders(config: Config, process: Process, checked: Checked) -> tuple[TrainLoader, EvalLoader]:
    share = {"rank": process.rank, "world_size": process.world_size, "device": process.device}
    train_loader = TrainLoader(
        config.data.train,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation_steps=config.engine.accumulation_steps,
        **share,
    )
    _check_not_replaced("train", train_loader.manifest, checked.train, config)
    eval_batch_size = config.eval_batch_size or config.micro_batch_size(process.world_size)
    val_loader = EvalLoader(config.data.val, config.data, batch_size=eval_batch_size, **share)
    _check_not_replaced("val", val_loader.manifest, checked.val, config)
    return train_loader, val_loader


def _engine_of(model: nn.Module, config: Config, process: Process) -> Engine:
    """The model on its device, changed as the section `engine` asks, in its engine."""
    model.to(process.device)
    if config.engine.sync_batchnorm:
        model = synchronize_batchnorm(model)
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model.query)
    if config.engine.compile:
        model.compile_regions()
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    if config.engine.cuda_graph:
        capture_steps(model)
    return engine


def _announce(config: Config, process: Process, checked: Checked, say: Say) -> None:
    """What a run says before it begins."""
    backbone = checked.model.query.backbone
    say(f"training on {', '.join(summary(config, process.world_size, process.device))}")
    say(describe_model(config, checked.model))
    if fused := describe_fused(backbone):
        say(fused)
    if note := foreign_normalisation(backbone.model, config.model, config.data):
        say(f"warning: {note}")
    if process.is_main and (note := foreseen_refusal(config, checked.model)):
        say(f"warning: {note}")
    if len(checked.train.classes) == 1:
        say(f"warning: data.train = {config.data.train!r} has one class only: every answer is right, nothing is learnt")


def _restored_position(
    state: dict[str, Any], saved: Saved, config: Config, about: dict[str, Any], say: Say
) -> Position:
    """Where a checkpoint's training stood; with other validation images it has no best step yet."""
    known = {field.name for field in dataclasses.fields(Position)}  # an older checkpoint may hold more
    position = Position(**{name: value for name, value in state.items() if name in known})
    before = saved.manifest.get("index_checksums", about["index_checksums"])
    if before["val"] != about["index_checksums"]["val"]:
        say(f"data.val = {config.data.val!r} has other images than before: there is no best checkpoint yet")
        position = dataclasses.replace(position, evaluated_step=0, best_step=None, best_top1=-1.0)
    say(f"resuming from {saved.folder}, step {position.step}")
    return position


def _check_not_replaced(split: str, opened: beton.Manifest, checked: beton.Manifest, config: Config) -> None:
    if opened.index_checksum != checked.index_checksum:
        raise beton.BetonError(
            f"data.{split} = {getattr(config.data, split)!r} was replaced while the run was starting: start it again"
        )


def _check_continuation(saved: Saved, config: Config, about: dict[str, Any], total_steps: int, say: Say) -> list[str]:
    """Tell, and return, which settings were changed since the checkpoint, and what else; refuse what a run cannot
    survive."""
    old, new = flatten(saved.manifest["config"]), flatten(about["config"])
    defaults = flatten(to_dict(Config()))
    changed, refused = [], []
    for key in sorted(old.keys() | new.keys()):
        was = old.get(key, defaults.get(key))  # a setting may be younger than the run
        if was != new.get(key):
            fixed = any(key == each or key.startswith(f"{each}.") for each in FIXED_ON_RESUME)
            (refused if fixed else changed).append(f"{key}: {was!r} -> {new.get(key)!r}")
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: cannot change when resuming; put {'it' if len(refused) == 1 else 'them'} back, or "
            "start a new run (output=...)"
        )
    for change in changed:
        say(f"resuming with another setting: {change}")
    then, now = flatten(saved.manifest.get("environment", {})), flatten(about["environment"])
    ground = [key for key in BITWISE_CONDITIONS if key in then and then[key] != now[key]]
    if now["device"] != "cpu" and "threads" in ground:
        ground.remove("threads")
    ground = [f"{BITWISE_CONDITIONS[key]} {then[key]} -> {now[key]}" for key in ground]
    if ground:
        say(f"resuming, but not bit for bit: {', '.join(ground)}")
    if saved.manifest.get("classes", about["classes"]) != about["classes"]:
        say(f"resuming with other class names than before, from data.train = {config.data.train!r}")
    before = saved.manifest.get("index_checksums", about["index_checksums"])
    if before["train"] != about["index_checksums"]["train"]:
        raise ConfigError(
            f"data.train = {config.data.train!r} has other images than those that {saved.folder} was trained with: "
            f"give the same file, at any path, or train anew in another output"
        )
    if saved.step > total_steps:
        raise ConfigError(
            f"epochs = {config.epochs} is {total_steps} steps; the run is at step {saved.step}: set epochs to no fewer "
            f"than it has trained, or train anew in another output"
        )
    return changed + ground
