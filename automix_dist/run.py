"""One training run: its parts, and the training itself; and its evaluation."""

import contextlib
import dataclasses
import hashlib
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automix_dist import beton, cam, distributed, provenance
from automix_dist.activation_checkpointing import checkpoint_blocks
from automix_dist.backbone import foreign_normalisation, synchronize_batchnorm
from automix_dist.captured_step import CapturedStep
from automix_dist.checkpoint import Checkpoints, Saved, committed_steps, load_module_state
from automix_dist.config import Config, ConfigError, flatten, to_dict
from automix_dist.config_file import from_dict
from automix_dist.data import EvalLoader, TrainLoader
from automix_dist.distributed import Process, autocast_dtype
from automix_dist.engines import build_engine, summary
from automix_dist.errors import EXIT_STOPPED
from automix_dist.evaluate import Conditions, evaluate_model, write_evaluation
from automix_dist.fused_batchnorm import describe_fused
from automix_dist.heartbeat import Heartbeat
from automix_dist.optimizer import build_optimizer
from automix_dist.rank_log import RankLog
from automix_dist.run_check import Checked, check_run, describe_model, new_model, without_weights
from automix_dist.run_folder import RunError, discard, open_folder, store_settings, try_saving
from automix_dist.run_log import RunLog, has_saved, set_aside
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
    "policy.average",
)
"""Settings, or whole sections, whose change would make a checkpoint's tensors or its place in the data meaningless."""

Say = Callable[[str], None]


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> int:
    """One run, from the resolved config to its end; the exit code of `automix train`.

    Args:
        config: with its policy's settings written out (`policy.with_policy_settings`).
        resume: continue from the newest whole checkpoint, if there is one.
        overwrite: discard the run that the output folder holds.

    Raises:
        AutomixError: in whatever form; the message is meant for the user.
    """
    run = Path(config.output)
    checked = check_run(config, run if resume else None)
    process = distributed.start(config.engine)
    about = {
        "config": to_dict(config),
        "environment": provenance.environment()
        | {
            "device": process.device.type,
            "autocast": str(autocast_dtype(config.engine, process.device)).removeprefix("torch."),
            "world_size": process.world_size,
        },
        "classes": checked.train.classes,
        "index_checksums": {"train": checked.train.index_checksum, "val": checked.val.index_checksum},
    }
    indices = {f"the index of data.{split}": checksum for split, checksum in about["index_checksums"].items()}
    agree(process, flatten(about["config"]) | indices)
    _on_rank_0(process, lambda: open_folder(run, resume, overwrite))
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


def _on_rank_0(process: Process, write: Callable[[], str | None]) -> None:
    """Let rank 0 write; if it returns a reason why it could not, every rank raises RunError."""
    if problem := process.broadcast(write() if process.is_main else None):
        raise RunError(problem)


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
    model, backbone = checked.model, checked.model.query.backbone
    say(f"training on {', '.join(summary(config, process.world_size, process.device))}")
    say(describe_model(config, model))
    if fused := describe_fused(backbone):
        say(fused)
    if config.model.pretrained and (note := foreign_normalisation(backbone.model, config.data)):
        say(f"warning: {note}")
    if len(checked.train.classes) == 1:
        say(f"warning: data.train = {config.data.train!r} has one class only: every answer is right, nothing is learnt")
    checkpoints = Checkpoints(run, config.checkpoint, process, say)
    saved = checkpoints.agree_on_newest() if resume else None
    if saved is not None:
        total_steps = config.epochs * (checked.train.count // config.batch_size)
        _check_continuation(saved, config, about, total_steps, say)
    elif checked.weights_error is not None:
        raise checked.weights_error

    share = {"rank": process.rank, "world_size": process.world_size, "device": process.device}
    train_loader = TrainLoader(
        config.data.train,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation_steps=config.engine.accumulation_steps,
        **share,
    )
    say(train_loader.storage_note)
    eval_batch_size = config.eval_batch_size or config.micro_batch_size(process.world_size)
    val_loader = EvalLoader(config.data.val, config.data, batch_size=eval_batch_size, **share)
    model.to(process.device)
    if config.engine.sync_batchnorm:
        model = synchronize_batchnorm(model)
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model.query)
    if config.engine.compile:
        model.compile_regions()
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    if config.engine.cuda_graph:
        CapturedStep(model)

    position = Position()
    if overwrite:
        _on_rank_0(process, lambda: discard(run))
    if saved is not None:
        state = checkpoints.load(engine, saved)
        known = {field.name for field in dataclasses.fields(Position)}  # an older checkpoint may hold more
        position = Position(**{name: value for name, value in state.items() if name in known})
        before = saved.manifest.get("index_checksums", about["index_checksums"])
        if before["val"] != about["index_checksums"]["val"]:
            say(f"data.val = {config.data.val!r} has other images than before: there is no best checkpoint yet")
            position = dataclasses.replace(position, evaluated_step=0, best_step=None, best_top1=-1.0)
        say(f"resuming from {saved.folder}, step {position.step}")
    else:
        if resume:
            say(f"nothing to resume in {run}: starting from the beginning")
        if process.is_main and (committed_steps(run) or has_saved(run)):
            say(f"the checkpoints of an earlier training are lost; what it logged is kept as {set_aside(run)}_*")
    _on_rank_0(process, lambda: store_settings(run, config, about))
    log = RunLog(
        run,
        is_main=process.is_main,
        tensorboard=config.log.tensorboard,
        trackers=config.log.trackers,
        start_step=position.step,
        config=about["config"],
    )
    trainer = Trainer(config, process, engine, train_loader, val_loader, checkpoints, log, stop, about)
    try:
        stopped = trainer.train(position)
    finally:
        train_loader.close()
        val_loader.close()
    if stopped:
        kept = "saved" if position.step else "nothing to save yet"
        say(f"stopped by {signal.Signals(stopped).name} at step {position.step}, {kept}; continue with --resume")
        return EXIT_STOPPED
    best = "" if position.best_step is None else f", best top-1 {position.best_top1:.2%} at step {position.best_step}"
    skipped = f", {trainer.skipped_steps} of them skipped as not finite" if trainer.skipped_steps else ""
    say(f"done: {position.step} steps{skipped}{best}; results in {run}")
    return 0


def agree(process: Process, settings: dict[str, Any]) -> None:
    """Raise ConfigError unless all ranks have the same settings: they may have read different files."""
    text = json.dumps(settings, sort_keys=True, default=str)
    if len(set(process.gather(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = process.gather(settings)
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                values = f"{other.get(key)!r} and rank 0 {first.get(key)!r}"
                raise ConfigError(f"rank {rank} has {key} = {values}: give all nodes the same config and data")


def _check_continuation(saved: Saved, config: Config, about: dict[str, Any], total_steps: int, say: Say) -> None:
    """Tell which settings were changed since the checkpoint; refuse what a run cannot survive."""
    old, new = flatten(saved.manifest["config"]), flatten(about["config"])
    defaults = flatten(to_dict(Config()))
    for key in sorted(old.keys() | new.keys()):
        was = old.get(key, defaults.get(key))  # a setting may be younger than the run
        if was == new.get(key):
            continue
        change = f"{key}: {was!r} -> {new.get(key)!r}"
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_ON_RESUME):
            raise ConfigError(f"{change}: cannot change when resuming; put it back, or start a new run (output=...)")
        say(f"resuming with another setting: {change}")
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


def evaluate(
    saved: Saved,
    conditions: Conditions | None = None,
    *,
    data: str | None = None,
    batch_size: int | None = None,
    cam_images: int | None = None,
    out: Path | None = None,
    tell: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint's model, as `automix eval` does; called by all ranks together.

    Args:
        saved: as `checkpoint.find_checkpoint` finds it; rank 0's counts.
        conditions: what to evaluate besides the images as they are, and whose details to tell.
        data: another .beton file than the run's validation set.
        batch_size: images per rank and batch; without it the run's.
        cam_images: show Grad-CAM of so many images on the page in `out`.
        out: a folder, in which rank 0 writes eval.json and eval.html.
        tell: called by rank 0 with the result, before that is written: a full disk must not cost it.

    Returns:
        "step", "data", "images" and what `evaluate.evaluate_model` returns; on all ranks.

    Raises:
        AutomixError: in whatever form; what can be wrong is found before the evaluation.
        OSError: if the page cannot be written after all.
    """
    conditions = conditions or Conditions()
    config = distributed.for_this_machine(from_dict(saved.manifest["config"]))
    path = Path(data or config.data.val)
    manifest, classes = beton.check(path), saved.manifest["classes"]
    if len(manifest.classes) != len(classes):
        raise beton.BetonError(f"{path} has {len(manifest.classes)} classes, the model {len(classes)}")
    renamed = manifest.classes != classes
    if renamed and sorted(manifest.classes) == sorted(classes):
        raise beton.BetonError(
            f"{path} has the model's classes in another order, so that its labels mean others: write it again with "
            f"automix prepare --overwrite --classes {shlex.quote(config.data.train)}"
        )
    showcase = None if cam_images is None else cam.Showcase(cam_images, len(classes))
    process = distributed.start(config.engine)
    saved = process.broadcast(saved)  # a training may have written another one meanwhile
    agree(process, {f"the index of {path}": manifest.index_checksum})
    if out is not None:
        _on_rank_0(process, lambda: _why_not_written(out))
    model = restored_model(saved, config, process.device)
    if renamed and process.is_main:
        print(f"warning: {path} has other class names than the run; classes are matched by number", file=sys.stderr)
    ranks = saved.manifest["world_size"] * config.engine.accumulation_steps
    loader = EvalLoader(
        str(path),
        config.data,
        batch_size=batch_size or config.eval_batch_size or max(1, config.batch_size // ranks),
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
    )
    if showcase is not None:
        cam.check(model, loader.blank(), conditions.answer)
    values = evaluate_model(model, loader, process, conditions, config.data.mean, showcase)
    loader.close()
    result = {"step": saved.step, "data": str(path), "images": loader.num_samples, **values}
    if renamed:
        result["classes_matched_by"] = "number"
    chosen = None if showcase is None else showcase.gather(process)
    if showcase is not None and chosen is None and process.is_main:
        print("no Grad-CAM: the classes that --cam chose have no images; a larger number chooses more", file=sys.stderr)
    views = None if chosen is None else cam.look(model, chosen, conditions.answer)
    process.barrier()
    if tell is not None and process.is_main:
        tell(result)
    if out is not None and process.is_main:
        run = saved.folder.parent.parent.resolve().name
        title = f"{run}, step {saved.step:,}, {path.name}"
        print(write_evaluation(result, out, title, views), file=sys.stderr)
    distributed.finish()
    return result


def _why_not_written(folder: Path) -> str | None:
    """Make a folder and try it, so that nothing is computed for a page that cannot be kept; a new one goes again, as
    what follows may still be refused."""
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_new:
            folder.rmdir()
        return None
    except FileExistsError:
        return f"--out {str(folder)!r} is a file: expected a folder"
    except OSError as error:
        return f"cannot write to --out {str(folder)!r}: {error.strerror}"


def restored_model(saved: Saved, config: Config, device: torch.device) -> nn.Module:
    """The model of a checkpoint, with its weights, on a device."""
    model = new_model(without_weights(config), len(saved.manifest["classes"]), device).to(device)
    model.load_state_dict(load_module_state(saved, ""))
    return model
