"""The command `automix`: reads arguments, builds the parts in order and runs them.

Heavy packages are imported by the command that needs them, so that `--help` and mistakes in a config answer at once.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from automix_dist.config import Config, ConfigError, flatten, keys_named, load_config, to_dict, to_yaml
from automix_dist.whole_file import write_whole

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""Stopped by a signal after saving: start again with --resume (EX_TEMPFAIL of sysexits.h)."""


class CommandError(ValueError):
    """A command that cannot do what was asked; one message for the user."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 2 wrong usage or config, 1 failed, 75 stopped by a signal after saving."""
    options = _parse(arguments)
    # OpenMP's threads spin while they wait; on cores that are shared with anything, long spinning costs tenfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Image sizes that change must not fragment GPU memory; the older name, if a user has set it, says it all.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored
    try:
        sys.exit(options.run(options))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)  # `automix ... | head`
    except Exception as error:
        message = _explain(error)
        if message is None or options.debug:
            traceback.print_exc()
        if message is None:
            message = f"{type(error).__name__}: {error} (unexpected; please report it with the lines above)"
        rank = os.environ.get("RANK")
        print(f"automix{f' [rank {rank}]' if rank else ''}: error: {message}", file=sys.stderr)
        sys.stderr.flush()
        code = EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(code)  # leaving normally would wait for ranks that wait for this one
        sys.exit(code)


def _explain(error: Exception) -> str | None:
    """The one message for a mistake or mishap that is not a defect of this program; None for a defect."""
    # Told by name, so that explaining an error imports nothing.
    known = {
        "ConfigError",
        "CommandError",
        "BetonError",
        "DecoderError",
        "LoaderError",
        "CheckpointError",
        "TrainingError",
        "ReportError",
        "CompareError",
        "PeerError",
        "PreflightError",
    }
    if any(cls.__name__ in known for cls in type(error).__mro__):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        reason = str(error).splitlines()[0]
        return (
            f"out of GPU memory: raise engine.accumulation_steps, or lower batch_size (eval: --batch-size) ({reason})"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rest = _parser().parse_known_args(arguments)
    takes_settings = hasattr(options, "overrides")
    # argparse gives up on a list of positionals that an option interrupts: `train CONFIG --resume epochs=3`.
    if rest and not (takes_settings and not any(each.startswith("-") for each in rest)):
        hint = _settings_meant(rest, arguments) if takes_settings else ""
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _settings_meant(unknown: list[str], arguments: list[str]) -> str:
    """What to write instead of options that are none, as the end of a message."""
    settings, file = [], ""
    for option in (each for each in unknown if each.startswith("--")):
        name, _, value = option[2:].partition("=")
        after = arguments[arguments.index(option) + 1 :]
        if not value and after and not after[0].startswith("-"):
            value = after[0]
        if name == "config":
            file = f"; the YAML file stands without a flag: {value or 'FILE'}"
        elif keys := keys_named(name.replace("-", "_")):
            settings.append(" or ".join(f"{key}={value or 'VALUE'}" for key in keys))
    return f"{file}; settings are written key=value{': ' if settings else ''}{', '.join(settings)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="automix", description=__import__("automix_dist").__doc__)
    parser.add_argument("--version", action="version", version=f"automix-dist {metadata.version('automix-dist')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, parser=sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    prepare = command("prepare", _prepare, "write a dataset to a .beton file")
    prepare.add_argument(
        "source",
        help="a folder with one subfolder per class, or imagenet:DIR, parquet:DIR, synthetic:COUNT, ... (docs/data.md)",
    )
    prepare.add_argument("out", type=Path, help="the .beton file to write; its manifest is put beside it")
    prepare.add_argument("--split", choices=["train", "val"], default="train", help="for sources that have splits")
    prepare.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="take the class list of a .beton file, or of a text file with one name a line (default: the source's own)",
    )
    prepare.add_argument("--write-mode", choices=["raw", "jpg", "proportion", "smart"], default="jpg")
    prepare.add_argument("--max-resolution", type=int, help="shrink images whose longer side exceeds this many pixels")
    prepare.add_argument("--quality", type=int, default=90, help="of JPEGs that have to be encoded (default: 90)")
    prepare.add_argument("--workers", type=int, default=0, help="threads (default: one per usable core)")
    prepare.add_argument(
        "--skip-broken", action="store_true", help="leave unreadable and mislabelled images out, instead of failing"
    )

    train = command("train", _train, "train from a config")
    train.add_argument("config", help="a YAML file")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    train.add_argument(
        "--resume", action="store_true", help="continue from the newest whole checkpoint, if there is one"
    )
    train.add_argument("--overwrite", action="store_true", help="discard the run that the output folder holds")
    train.add_argument("--print-config", action="store_true", help="show the resolved settings and exit")

    evaluate = command(
        "eval", _evaluate, "accuracy, calibration and robustness of a run's checkpoint (docs/evaluation.md)"
    )
    evaluate.add_argument("run_folder", type=Path, metavar="RUN")
    evaluate.add_argument("--data", help="another .beton file than the run's validation set")
    evaluate.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    evaluate.add_argument("--best", action="store_true", help="the checkpoint with the best validation top-1")
    evaluate.add_argument("--batch-size", type=int, help="images per rank and batch")
    evaluate.add_argument("--out", type=Path, help="a folder for eval.json and eval.html, with all classes")
    evaluate.add_argument(
        "--encoder", choices=["query", "momentum", "ensemble"], default="query", help="told in detail"
    )
    evaluate.add_argument("--head", choices=["one", "mix"], default="one", help="trained on clean or on mixed images")
    evaluate.add_argument("--tta", choices=["flip"], help="average each image's answer with its mirror image's")
    evaluate.add_argument("--attack", choices=["fgsm", "pgd"], help="on the chosen encoder and head")
    evaluate.add_argument("--epsilon", default="8/255", help="of the attack, for values in [0, 1] (default: 8/255)")
    evaluate.add_argument("--corruptions", nargs="?", const="all", help="all, or names with commas between")
    evaluate.add_argument("--occlusion", type=float, nargs="+", default=[], help="hide these shares of the images")
    evaluate.add_argument("--cam", type=int, metavar="N", help="Grad-CAM of so many images on the page of --out")
    evaluate.add_argument("--seed", type=int, default=0, help="of what is random in the conditions")

    export = command("export", _export, "write an encoder as a timm state dict")
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT.safetensors")
    export.add_argument("--encoder", choices=["query", "momentum"], default="query")
    export.add_argument("--head", choices=["one", "mix"], default="one", help="trained on clean or on mixed images")
    export.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    export.add_argument("--best", action="store_true", help="the checkpoint with the best validation top-1")

    replay = command("replay", _replay, "compute a step again that was skipped, and say where it went wrong")
    replay.add_argument("dump", type=Path, metavar="RUN/dumps/STEP")
    replay.add_argument("--rank", type=int, default=0, help="whose images (default: 0)")

    checkpoint = command("checkpoint", _checkpoint, "look after a run's checkpoints")
    checkpoint.add_argument("action", choices=["list", "verify", "reshard", "to-safetensors"])
    checkpoint.add_argument("run_folder", type=Path, metavar="RUN")
    checkpoint.add_argument("--out", type=Path, help="reshard: the run folder to write; to-safetensors: the file")
    checkpoint.add_argument("--step", type=int, help="of the checkpoint to reshard or convert (default: the newest)")
    checkpoint.add_argument("--ranks", type=int, default=1, help="reshard: how many shards to write (default: 1)")

    report = command("report", _report, "write a page of a run's curves, numbers and mixed samples")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="default: RUN/report.html")

    watch = command("watch", _watch, "a run at a glance in the terminal, while it trains or after")
    watch.add_argument("run_folder", type=Path, metavar="RUN")
    watch.add_argument("--once", action="store_true", help="show it once and exit")
    watch.add_argument("--seconds", type=float, default=2.0, help="between two looks (default: 2)")

    compare = command("compare", _compare, "train policies over seeds with equal budgets, and write one table")
    compare.add_argument("config", type=Path, help="a YAML file (docs/evaluation.md)")
    compare.add_argument("--launcher", help="what trains on several GPUs: 'torchrun ... -m automix_dist'")

    verify = command("verify", _verify, "check every sample of a .beton file")
    verify.add_argument("file", type=Path)

    bench = command("bench", _bench, "measure; `automix bench NAME --help` lists a benchmark's own options")
    bench.add_argument("name", choices=["checkpoint", "kernels", "loader", "memory", "scaling", "step", "throughput"])
    bench.add_argument("arguments", nargs=argparse.REMAINDER)

    doctor = command("doctor", _doctor, "what this machine lacks, and how to get it")
    doctor.add_argument("config", nargs="?", help="check its data and output folder too")
    doctor.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    doctor.add_argument(
        "--all-ranks", action="store_true", help="under a launcher: every host of the job, and the network between them"
    )
    doctor.add_argument("--seconds", type=float, default=60, help="--all-ranks: how long to wait for the other ranks")
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from automix_dist import beton

    manifest = beton.prepare(
        options.source,
        options.out,
        split=options.split,
        classes=beton.read_classes(options.classes) if options.classes else None,
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        quality=options.quality,
        workers=options.workers,
        skip_broken=options.skip_broken,
        progress=True,
    )
    print(f"{options.out}: {manifest.count} images, {len(manifest.classes)} classes")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from automix_dist import beton

    beton.verify(options.file, progress=True)
    print(f"{options.file}: every sample is readable and matches the manifest")
    return 0


def _train(options: argparse.Namespace) -> int:
    config = _load_config(options)
    if options.print_config:
        print(to_yaml(config) + _what_it_comes_to(config), end="")
        return 0
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    return train(config, resume=options.resume, overwrite=options.overwrite)


def _what_it_comes_to(config: Config) -> str:
    """The engine's effective settings as YAML comments, for the number of processes that a launcher started, or one."""
    import torch

    from automix_dist.distributed import resolve_device
    from automix_dist.engines import describe

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    lines = describe(config, world_size, torch.device(resolve_device(config.engine)))
    return "\n# What this comes to:\n" + "".join(f"#   {line}\n" for line in lines)


def _load_config(options: argparse.Namespace) -> Config:
    """The resolved config, with the settings of its policy written out."""
    config = load_config(options.config, options.overrides)

    from automix_dist.policy import complete

    return complete(config)


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> int:
    """One run, from the resolved config to its end; the exit code of `automix train`."""
    run = Path(config.output)
    manifest, val, model, lacking = _check(config, run if resume else None)

    from automix_dist import distributed, provenance
    from automix_dist.heartbeat import Heartbeat
    from automix_dist.rank_log import RankLog

    process = distributed.start(config.engine)
    about = {
        "config": to_dict(config),
        "environment": provenance.environment(),
        "classes": manifest.classes,
        "index_checksum": manifest.index_checksum,
    }
    indices = {"the index of data.train": manifest.index_checksum, "the index of data.val": val.index_checksum}
    _agree(process, flatten(about["config"]) | indices)
    problem = process.broadcast(_open_run(run, resume, overwrite) if process.is_main else None)
    if problem:
        raise CommandError(problem)
    with Heartbeat(process, config.engine, RankLog(run, process.rank)):
        code = _run(config, process, run, model, lacking, about, resume)
    distributed.finish()
    return code


def _run(config: Config, process, run: Path, model, lacking: ConfigError | None, about: dict, resume: bool) -> int:
    """Build the parts of a run and train. `lacking`: why the model has no weights but those of a checkpoint."""
    from automix_dist import distributed
    from automix_dist.activation_checkpointing import checkpoint_blocks
    from automix_dist.backbone import foreign_normalisation, synchronize_batchnorm
    from automix_dist.captured_step import CapturedStep
    from automix_dist.checkpoint import Checkpoints, committed
    from automix_dist.data import EvalLoader, TrainLoader
    from automix_dist.engines import build_engine, summary
    from automix_dist.optimizer import build_optimizer
    from automix_dist.run_log import RunLog, set_aside
    from automix_dist.trainer import Position, Trainer

    def say(text: str) -> None:
        if process.is_main:
            # RuntimeError: a signal came in the middle of another line. OSError, ValueError: the console is gone, as in
            # a pipe to tee after Ctrl-C, and what is to be said must not stop what is to be saved.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                print(text, file=sys.stderr, flush=True)

    # From here on a signal is noted, and acted upon before the first step: no rank leaves the others alone.
    stop = distributed.StopRequest(process, say, config.checkpoint.stop_after_minutes)
    backbone = model.query.backbone
    say(f"training on {', '.join(summary(config, process.world_size, process.device))}")
    feature = "" if backbone.feature is None else f": the Mix Block reads {backbone.describe_feature()}"
    say(f"{config.model.backbone}{feature}")
    if config.model.pretrained and (note := foreign_normalisation(backbone.model, config.data)):
        say(f"warning: {note}")
    checkpoints = Checkpoints(run, config.checkpoint, process, say)
    saved = checkpoints.agree_on_newest() if resume else None
    if saved is None and lacking is not None:
        raise lacking
    if saved is not None:
        _compare_settings(saved.manifest["config"], to_dict(config), say)
        if saved.manifest.get("index_checksum", about["index_checksum"]) != about["index_checksum"]:
            raise ConfigError(
                f"data.train = {config.data.train!r} has other images than those that {saved.folder} was trained with: "
                f"give the same file, at any path, or train anew in another output"
            )
    problem = process.broadcast(_store_settings(run, config, about) if process.is_main else None)
    if problem:
        raise CommandError(problem)

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
    if saved is not None:
        position = Position(**checkpoints.load(engine, saved))
        say(f"resuming from {saved.folder}, step {position.step}")
    elif resume:
        say(f"nothing to resume in {run}: starting from the beginning")
        if process.is_main and committed(checkpoints.root):
            set_aside(run)
    log = RunLog(
        run,
        is_main=process.is_main,
        tensorboard=config.log.tensorboard,
        trackers=config.log.trackers,
        start_step=position.step,
        config=about["config"],
    )
    trainer = Trainer(config, process, model, engine, train_loader, val_loader, checkpoints, log, stop, about)
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
    say(f"done: {position.step} steps{best}; results in {run}")
    return 0


def _check(config: Config, resumed: Path | None):
    """All that can be wrong with a config, before any process group, folder or file exists.

    Returns:
        the manifests of data.train and data.val; the model, whose construction is a check of its own; and, where the
        weights to begin with are not to be had but the resumed run has checkpoints, the error that this would be.
    """
    from automix_dist import beton
    from automix_dist.sources import some
    from automix_dist.trackers import check_installed

    check_installed(config.log)
    for key in ("train", "val"):
        path = getattr(config.data, key)
        if not path:
            raise ConfigError(f"data.{key} is not set: expected the path of a .beton file written by `automix prepare`")
        if not Path(path).is_file():
            raise beton.BetonError(
                f"data.{key} = {path!r} does not exist: write it with automix prepare (a recipe has the line beside "
                f"data.{key}), or set data.{key} to another file"
            )
    config.micro_batch_size(int(os.environ.get("WORLD_SIZE", 1)))
    train, val = beton.check(Path(config.data.train)), beton.check(Path(config.data.val))
    if config.batch_size > train.count:
        raise ConfigError(
            f"batch_size = {config.batch_size} exceeds the {train.count} images of data.train = "
            f"{config.data.train!r}: expected {train.count} or less"
        )
    if train.index_checksum == val.index_checksum:
        raise ConfigError(
            f"data.val = {config.data.val!r} holds the images of data.train = {config.data.train!r}: write it from the "
            f"validation images, with automix prepare --split val or from their own folder"
        )
    if train.classes != val.classes:
        missing = [name for name in train.classes if name not in val.classes]
        foreign = [name for name in val.classes if name not in train.classes]
        differences = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(foreign)} besides"] * bool(foreign)
        raise ConfigError(
            f"the class list of data.val = {config.data.val!r} {' and '.join(differences) or 'has another order'}, "
            f"compared with data.train: write it again with automix prepare --classes {config.data.train}"
        )

    import torch

    from automix_dist.checkpoint import committed
    from automix_dist.distributed import resolve_device
    from automix_dist.engines import deepspeed_settings

    device = torch.device(resolve_device(config.engine))
    for key in ("sync_batchnorm", "cuda_graph"):
        if getattr(config.engine, key) and device.type == "cpu":
            raise ConfigError(f"engine.{key} needs a GPU and there is none here: set it to false")
    deepspeed_settings(config, int(os.environ.get("WORLD_SIZE", 1)), device)

    try:
        return train, val, _build_model(config, len(train.classes), device), None
    except ConfigError as error:
        if resumed is None or not committed(resumed / "checkpoints"):
            raise
        return train, val, _build_model(_without_weights(config), len(train.classes), device), error


def _build_model(config: Config, num_classes: int, device):
    """The model of the config's policy and backbone, on the CPU, to train on `device`."""
    import torch

    from automix_dist import policy
    from automix_dist.backbone import create_backbone
    from automix_dist.classifier import build_model
    from automix_dist.distributed import autocast_dtype

    torch.manual_seed(config.seed)
    other_sizes = [size for _, size in config.data.resolution_schedule]
    backbone = create_backbone(config.model, policy.needed_feature(config), config.data.image_size, other_sizes)
    torch.manual_seed(config.seed)
    return build_model(config, backbone, num_classes, autocast_dtype(config.engine, device))


def _agree(process, settings: dict) -> None:
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


def _open_run(run: Path, resume: bool, overwrite: bool) -> str | None:
    """Make the run's folder, and take it for this process; a reason if that cannot or should not be done."""
    from automix_dist.checkpoint import committed
    from automix_dist.run_log import METRICS

    try:
        steps = committed(run / "checkpoints")
        if steps and not (resume or overwrite):
            return (
                f"{run} holds a run already (checkpoint of step {max(steps)}): continue it with --resume, discard it "
                f"with --overwrite, or choose another folder with output=..."
            )
        run.mkdir(parents=True, exist_ok=True)
        holder = _lock(run)
        if holder is not None:
            return (
                f"{run} is being trained in by another process ({holder}): wait for it, stop it, or set output=...; if "
                f"its machine is dead, a network file system may hold its lock for long: delete {run / 'lock'}"
            )
        if overwrite and (steps or (run / METRICS).exists()):  # else it is the folder of something else
            for name in ("checkpoints", "dumps", "gallery", "logs", "mlruns", "profile", "tensorboard", "wandb"):
                _clear(run / name)
            if steps := committed(run / "checkpoints"):
                return f"{run}/checkpoints: steps {sorted(steps)} could not be deleted: delete them, or set output=..."
    except OSError as error:
        return f"cannot write to output = {str(run)!r}: {error.strerror}"
    return None


def _clear(folder: Path) -> None:
    """Delete a folder as far as it can be; of a link, as to a scratch disk, what is in the folder."""
    for path in folder.glob("*") if folder.is_symlink() else [folder]:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _store_settings(run: Path, config: Config, about: dict) -> str | None:
    """Keep config and environment in the run's folder; a reason if that cannot be done."""
    environment = about["environment"] | {"classes": about["classes"]}
    try:
        write_whole(run / "config.yaml", to_yaml(config))
        write_whole(run / "environment.json", json.dumps(environment, indent=1))
    except OSError as error:
        return f"cannot write to output = {str(run)!r}: {error.strerror}"
    return None


def _lock(run: Path) -> str | None:
    """Take the run's lock until this process ends; who holds it if another does. Two would tear each other's files."""
    file = open(run / "lock", "a+")  # noqa: SIM115 - closing it would release the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip()
    except OSError:
        pass  # a file system without locks: better to train unguarded than not at all
    file.truncate(0)
    file.write(f"{platform.node()}, process {os.getpid()}\n")
    file.flush()
    _LOCKS.append(file)
    return None


_LOCKS: list = []  # open for as long as this process lives

FIXED_ON_RESUME = (
    "seed",
    "batch_size",
    "data.order",
    "data.chunk_size",
    "data.window_chunks",
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


def _compare_settings(before: dict, now: dict, say) -> None:
    """Tell what was changed since the checkpoint; refuse what a run cannot survive."""

    old, new = flatten(before), flatten(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        change = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_ON_RESUME):
            raise ConfigError(f"{change}: cannot change when resuming; put it back, or start a new run (output=...)")
        say(f"resuming with another setting: {change}")


def _require_run(run: Path) -> None:
    if not run.is_dir():
        raise CommandError(f"{run}: no such run folder")


def _find_checkpoint(run: Path, step: int | None, best: bool):
    from automix_dist.checkpoint import CheckpointError, committed, newest, verify

    if best and step is not None:
        raise ConfigError("--best and --step exclude each other")
    _require_run(run)
    root = run / "checkpoints"
    if step is None:
        saved = newest(run)
        if saved is None:
            raise CheckpointError(f"{run} has no whole checkpoint")
        if not best:
            return saved
        step = saved.manifest["state"].get("best_step")
        if step is None:
            raise CheckpointError(f"{run} has no best checkpoint: no evaluation up to step {saved.step}; omit --best")
    if step not in committed(root):
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {sorted(committed(root))}")
    return verify(root / f"step_{step:08d}")


def _saved_model(saved, config: Config, device):
    """The model of a checkpoint, with its weights, on a device."""
    from automix_dist.checkpoint import load_module_state

    model = _build_model(_without_weights(config), len(saved.manifest["classes"]), device).to(device)
    model.load_state_dict(load_module_state(saved, ""))
    return model


def _without_weights(config: Config) -> Config:
    """A run's settings where all weights come from a checkpoint."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False, weights=""))


def _anywhere(config: Config) -> Config:
    """A run's settings for another machine, which may lack the GPU that the run asked for."""
    device, kernels = config.engine.device, config.engine.kernels
    engine = dataclasses.replace(
        config.engine,
        device="auto" if device == "cuda" else device,
        kernels="auto" if kernels == "triton" else kernels,
    )
    return dataclasses.replace(config, engine=engine)


def _replay(options: argparse.Namespace) -> int:
    saved = _find_checkpoint(options.dump, None, best=False)

    from automix_dist import distributed
    from automix_dist.config import from_dict
    from automix_dist.replay import replay

    config = _anywhere(from_dict(saved.manifest["config"]))
    process = distributed.start(config.engine)
    sound = replay(_saved_model(saved, config, process.device), config, saved, options.rank, print)
    print("everything was finite this time" if sound else "not finite again")
    distributed.finish()
    return 0


def _conditions(options: argparse.Namespace):
    from automix_dist.examine import Conditions, fraction
    from automix_dist.robustness import STRENGTHS

    try:
        epsilon = fraction(options.epsilon)
    except ValueError as error:
        raise ConfigError(f"--epsilon {options.epsilon}: expected a number in (0, 1], such as 8/255") from error
    if options.encoder == "ensemble" and options.head == "mix":
        raise ConfigError("--encoder ensemble: it is of the heads one; leave --head mix out")
    names = tuple(STRENGTHS) if options.corruptions == "all" else tuple((options.corruptions or "").split(","))
    return Conditions(
        answer=options.encoder + ("_mix" if options.head == "mix" else ""),
        attack=options.attack,
        epsilon=epsilon,
        corruptions=names if options.corruptions else (),
        occlusion=tuple(options.occlusion),
        flip=options.tta == "flip",
        seed=options.seed,
    )


def _evaluate(options: argparse.Namespace) -> int:
    conditions = _conditions(options)
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: expected 1 or more")
    if options.cam is not None and options.out is None:
        raise ConfigError("--cam: its pictures are part of the page; set --out to a folder, such as RUN/eval")
    saved = _find_checkpoint(options.run_folder, options.step, options.best)

    import torch

    from automix_dist import beton, cam, distributed
    from automix_dist.config import from_dict
    from automix_dist.data import EvalLoader
    from automix_dist.examine import examine, summary, write_examination

    config = _anywhere(from_dict(saved.manifest["config"]))
    path = Path(options.data or config.data.val)
    manifest, classes = beton.check(path), saved.manifest["classes"]
    if len(manifest.classes) != len(classes):
        raise CommandError(f"{path} has {len(manifest.classes)} classes, the model {len(classes)}")
    process = distributed.start(config.engine)
    model = _saved_model(saved, config, process.device)
    if manifest.classes != classes and process.is_main:
        print(f"warning: {path} names its classes otherwise; they are compared by number", file=sys.stderr)
    ranks = saved.manifest["world_size"] * config.engine.accumulation_steps
    batch_size = options.batch_size or config.eval_batch_size or max(1, config.batch_size // ranks)
    loader = EvalLoader(
        str(path),
        config.data,
        batch_size=batch_size,
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
    )
    showcase = None if options.cam is None else cam.Showcase(options.cam, loader.num_classes)
    if showcase is not None:
        cam.check(model, loader.blank(), conditions.answer)
    values = examine(model, loader, process, conditions, config.data.mean, showcase)
    loader.close()
    chosen = None if showcase is None else showcase.gather(process)
    if showcase is not None and chosen is None and process.is_main:
        print("no Grad-CAM: the classes that --cam chose have no images; a larger number chooses more", file=sys.stderr)
    views = None if chosen is None else cam.look(model, chosen, conditions.answer)
    torch.distributed.barrier()
    if process.is_main:
        result = {"step": saved.step, "data": str(path), "images": loader.num_samples, **values}
        print(json.dumps(summary(result), indent=1))
        if options.out:
            title = f"{options.run_folder.resolve().name}, step {saved.step:,}, {path.name}"
            print(write_examination(result, options.out, title, views), file=sys.stderr)
    distributed.finish()
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"{options.out}: expected a file that ends in .safetensors, which is what it will hold")
    saved = _find_checkpoint(options.run_folder, options.step, options.best)

    from automix_dist.export import export_encoder

    code = export_encoder(saved, options.out, options.encoder, options.head)
    print(f"# {options.encoder} encoder with head_{options.head} of step {saved.step}; load it with:\n{code}")
    return 0


def _checkpoint(options: argparse.Namespace) -> int:
    from automix_dist.checkpoint import CheckpointError, committed, export_tensors, load_module_state, reshard, verify

    _require_run(options.run_folder)
    root = options.run_folder / "checkpoints"
    steps = sorted(committed(root))
    if not steps:
        raise CheckpointError(f"{options.run_folder} has no checkpoint")
    if options.action == "reshard":
        if options.out is None:
            raise ConfigError("reshard needs --out, another run folder")
        if options.ranks < 1:
            raise ConfigError(f"--ranks {options.ranks}: expected 1 or more")
        saved = _find_checkpoint(options.run_folder, options.step, best=False)
        print(f"{reshard(saved, options.out, options.ranks)}: step {saved.step} in {options.ranks} shard(s)")
        return 0
    if options.action == "to-safetensors":
        if options.out is None:
            raise ConfigError("to-safetensors needs --out FILE.safetensors")
        saved = _find_checkpoint(options.run_folder, options.step, best=False)
        export_tensors(load_module_state(saved, ""), options.out, metadata={"step": str(saved.step)})
        print(
            f"{options.out}: weights and statistics of query encoder, momentum encoder and Mix Block, step {saved.step}"
        )
        return 0
    broken, best_step = 0, None
    for step in reversed(steps):
        try:
            manifest = verify(root / f"step_{step:08d}", checksums=options.action == "verify").manifest
        except CheckpointError as error:
            broken += 1
            print(f"step {step}: broken: {error}")
            continue
        best_step = best_step or manifest["state"].get("best_step")  # the newest knows
        size = sum(entry["bytes"] for entry in manifest["files"]) / 2**20
        best = "  best" if step == best_step else ""
        print(f"step {step}: {size:,.1f} MiB from {manifest['world_size']} rank(s), engine {manifest['engine']}{best}")
    return EXIT_FAILED if broken else 0


def _report(options: argparse.Namespace) -> int:
    from automix_dist.report import write_picture, write_report

    print(write_report(options.run_folder, options.out))
    print(write_picture(options.run_folder))
    return 0


def _watch(options: argparse.Namespace) -> int:
    from automix_dist.watch import watch

    watch(options.run_folder, once=options.once, seconds=options.seconds)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from automix_dist.compare import compare

    launcher = shlex.split(options.launcher) if options.launcher else [sys.executable, "-m", "automix_dist"]
    return compare(options.config, launcher, lambda text: print(text, file=sys.stderr, flush=True))


def _bench(options: argparse.Namespace) -> int:
    names = {"kernels": "automix_kernels.benchmark"}
    module = importlib.import_module(names.get(options.name, f"automix_dist.bench.{options.name}"))
    return module.run(options.arguments)


def _doctor(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides) if options.config else None
    if options.all_ranks:
        from automix_dist import preflight

        return preflight.run(config, options.seconds)

    from automix_dist.doctor import diagnose, print_table

    return print_table(diagnose(config))
