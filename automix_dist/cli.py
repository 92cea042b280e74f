"""The command `automix`: reads arguments, builds the parts in order and runs them.

Heavy packages are imported by the command that needs them, so that `--help` and mistakes in a config answer at once.
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import automix_dist
from automix_dist.config import Config, ConfigError
from automix_dist.config_file import from_dict, keys_named, load_config, to_yaml
from automix_dist.errors import EXIT_FAILED, EXIT_USAGE, AutomixError, did_you_mean, first_line
from automix_dist.whole_file import write_whole


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 2 wrong usage or config, 1 failed, 75 stopped by a signal after
    saving, 130 by Ctrl-C where there is nothing to save."""
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
        print("automix: interrupted", file=sys.stderr)
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
        if os.environ.get("WORLD_SIZE", "1") != "1":
            os._exit(code)  # leaving normally would wait for ranks that wait for this one
        sys.exit(code)


def _explain(error: Exception) -> str | None:
    """The one message for a mistake or mishap that is not a defect of this program; None for a defect."""
    if isinstance(error, AutomixError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, told by name: explaining an error imports nothing
        reason = first_line(error)
        return (
            f"out of GPU memory: raise engine.accumulation_steps, or lower batch_size (eval: --batch-size) ({reason})"
        )
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed in {sys.prefix}: bash launch/install.sh installs what is missing"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    if "LOCAL_RANK" in os.environ:  # DeepSpeed's own launcher says it a second time
        arguments = [each for each in arguments if not each.startswith(("--local_rank=", "--local-rank="))]
    parser, commands = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        hint = did_you_mean(arguments[0], commands) or f": expected one of {', '.join(commands)}"
        parser.error(f"there is no command {arguments[0]!r}{hint}")
    options, rest = parser.parse_known_args(arguments)
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


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of its commands."""
    parser = argparse.ArgumentParser(prog="automix", description=automix_dist.__doc__)
    parser.add_argument("--version", action="version", version=f"automix-dist {automix_dist.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, add_options, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, parser=command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_options(command)
    return parser, list(commands.choices)


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=text)


def _add_checkpoint_choice(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best validation top-1")


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a folder with one subfolder per class, or imagenet:DIR, parquet:DIR, synthetic:COUNT, ... (docs/data.md)",
    )
    parser.add_argument("out", type=Path, help="the .beton file to write; its manifest is put beside it")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="for sources that have splits")
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="take the class list of a .beton file, or of a text file with one name a line (default: the source's own)",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="of a source without splits: the share of each class that is for --split val, the rest for --split train",
    )
    parser.add_argument("--per-class", type=int, metavar="N", help="only the first N images of each class")
    parser.add_argument("--write-mode", choices=["raw", "jpg", "proportion", "smart"], default="jpg")
    parser.add_argument("--max-resolution", type=int, help="shrink images whose longer side exceeds this many pixels")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs that have to be encoded (default: 90)")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0 = all cores (the default)")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave unreadable and mislabelled images out, instead of failing"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT even if it holds another source or other options"
    )


def _prepare(options: argparse.Namespace) -> int:
    from automix_dist import beton
    from automix_dist.prepare import PrepareOptions, prepare

    warnings.showwarning = lambda message, *_: _to_stderr(f"warning: {message}")
    manifest = prepare(
        options.source,
        options.out,
        PrepareOptions(
            holdout=options.holdout,
            per_class=options.per_class,
            write_mode=options.write_mode,
            max_resolution=options.max_resolution,
            quality=options.quality,
            skip_broken=options.skip_broken,
        ),
        split=options.split,
        classes=beton.read_classes(options.classes) if options.classes else None,
        workers=options.workers,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"{options.out}: {manifest.count} images, {len(manifest.classes)} classes")
    if manifest.skipped:
        print(f"left out: {len(manifest.skipped)} images, named in {beton.manifest_path(options.out)} under `skipped`")
    return 0


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)


def _verify(options: argparse.Namespace) -> int:
    from automix_dist import beton

    beton.verify(options.file, progress=True)
    print(f"{options.file}: every sample is readable and matches the manifest")
    return 0


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or the folder of a run, for its own settings")
    _add_overrides(parser, "settings that replace the file's")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue from the newest whole checkpoint, if there is one"
    )
    start.add_argument("--overwrite", action="store_true", help="discard the run that the output folder holds")
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and exit")
    parser.add_argument("--check", action="store_true", help="look for all that can be wrong with it and exit")


def _train(options: argparse.Namespace) -> int:
    config = _load_config(options)
    if options.check:
        from automix_dist.backbone import pretrained_not_loaded
        from automix_dist.run_check import check_run

        with pretrained_not_loaded():
            check_run(config, Path(config.output) if options.resume else None)
    if options.print_config:
        print(to_yaml(config) + _what_it_comes_to(config), end="")
    if options.check or options.print_config:
        return 0

    from automix_dist.run import train

    return train(config, resume=options.resume, overwrite=options.overwrite)


def _what_it_comes_to(config: Config) -> str:
    """The engine's effective settings as YAML comments, for the number of processes that a launcher started, or one."""
    import torch

    from automix_dist.distributed import launched_ranks, resolve_device
    from automix_dist.engines import describe

    lines = describe(config, launched_ranks(), torch.device(resolve_device(config.engine)))
    return "\n# What this comes to:\n" + "".join(f"#   {line}\n" for line in lines)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load_config(options: argparse.Namespace) -> Config:
    """The resolved config, with the settings of its policy written out."""
    is_main = os.environ.get("RANK", "0") == "0"
    path, overrides = options.config, options.overrides
    if (Path(path) / "config.yaml").is_file():  # a run's folder, perhaps moved: its own settings
        path, overrides = str(Path(path) / "config.yaml"), [f"output={path}", *overrides]
    config = load_config(path, overrides, _to_stderr if is_main else lambda text: None)
    if not any(each.startswith("output=") for each in overrides):
        _refuse_moved(path, config)

    from automix_dist.policy import with_policy_settings

    return with_policy_settings(config)


def _refuse_moved(path: str, config: Config) -> None:
    """Raise ConfigError for a run's own config that leads to where the run was before it was copied or moved."""
    run = Path(path).parent
    if (run / "environment.json").is_file() and Path(config.output).resolve() != run.resolve():
        raise ConfigError(
            f"{path} is of the run in {run}, but its output = {config.output!r} leads to another folder: give "
            f"{run} itself in place of the config, or output=..."
        )


def _replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, metavar="RUN/dumps/STEP")
    parser.add_argument("--rank", type=int, default=0, help="replay the images of this rank (default: 0)")


def _replay(options: argparse.Namespace) -> int:
    from automix_dist import distributed
    from automix_dist.config_file import from_dict
    from automix_dist.model import restored_model
    from automix_dist.replay import find_dump, replay

    saved = find_dump(options.dump)
    config = distributed.for_this_machine(from_dict(saved.manifest["config"]))
    process = distributed.start(config.engine)
    sound = replay(restored_model(saved, config, process.device), config, saved, options.rank, print)
    print("everything was finite this time" if sound else "not finite again")
    distributed.finish()
    return 0


def _conditions(options: argparse.Namespace):
    from automix_dist.evaluate import Conditions, fraction
    from automix_dist.robustness import STRENGTHS

    if options.epsilon is not None and options.attack is None:
        raise ConfigError(f"--epsilon {options.epsilon} is the attack's: add --attack fgsm or pgd, or leave it out")
    try:
        epsilon = fraction("8/255" if options.epsilon is None else options.epsilon)
    except ValueError as error:
        raise ConfigError(f"--epsilon {options.epsilon}: expected a number in (0, 1], such as 8/255") from error
    if options.encoder == "ensemble" and options.head == "mix":
        raise ConfigError("--encoder ensemble averages the heads trained on clean images: remove --head mix")
    names = STRENGTHS if options.corruptions == "all" else filter(None, (options.corruptions or "").split(","))
    return Conditions(
        answer=options.encoder + ("_mix" if options.head == "mix" else ""),
        attack=options.attack,
        epsilon=epsilon,
        corruptions=tuple(names),
        occlusion=tuple(options.occlusion),
        flip=options.tta == "flip",
        seed=options.seed,
    )


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("--data", help="another .beton file than the run's validation set")
    _add_checkpoint_choice(parser)
    parser.add_argument("--batch-size", type=int, help="images per rank and batch")
    parser.add_argument("--out", type=Path, help="a folder for eval.json and eval.html, with all classes")
    parser.add_argument(
        "--encoder", choices=["query", "momentum", "ensemble"], default="query", help="which one is reported in detail"
    )
    parser.add_argument("--head", choices=["one", "mix"], default="one", help="trained on clean or on mixed images")
    parser.add_argument("--tta", choices=["flip"], help="average each image's answer with its mirror image's")
    parser.add_argument("--attack", choices=["fgsm", "pgd"], help="on the chosen encoder and head")
    parser.add_argument(
        "--epsilon",
        help="largest change of a value by the attack, on the [0, 1] scale (default: 8/255)",
    )
    parser.add_argument("--corruptions", nargs="?", const="all", help="all, or names with commas between")
    parser.add_argument("--occlusion", type=float, nargs="+", default=[], help="hide these shares of the images")
    parser.add_argument("--cam", type=int, metavar="N", help="Grad-CAM of so many images on the page of --out")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the noise, the hidden cells and the attack's random starts"
    )


def _evaluate(options: argparse.Namespace) -> int:
    conditions = _conditions(options)
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: expected 1 or more")
    if options.cam is not None and options.out is None:
        raise ConfigError("--cam: its pictures are part of the page; set --out to a folder, such as RUN/eval")

    from automix_dist.checkpoint_files import find_checkpoint
    from automix_dist.evaluate import evaluate, summary

    saved = find_checkpoint(options.run_folder, options.step, options.best)
    evaluate(
        saved,
        conditions,
        data=options.data,
        batch_size=options.batch_size,
        cam_images=options.cam,
        out=options.out,
        tell=lambda result: print(json.dumps(summary(result), indent=1)),
    )
    return 0


def _check_suffix(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: expected a file that ends in .safetensors, which is what it will hold")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--encoder", choices=["query", "momentum"], default="query")
    parser.add_argument("--head", choices=["one", "mix"], default="one", help="trained on clean or on mixed images")
    _add_checkpoint_choice(parser)


def _export(options: argparse.Namespace) -> int:
    _check_suffix(options.out)

    from automix_dist.checkpoint_files import find_checkpoint
    from automix_dist.export import export_encoder

    saved = find_checkpoint(options.run_folder, options.step, options.best)
    code = export_encoder(saved, options.out, options.encoder, options.head)
    print(f"# {options.encoder} encoder with head_{options.head} of step {saved.step}; load it with:\n{code}")
    return 0


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "verify", "reshard", "to-safetensors"])
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="reshard: the run folder to write; to-safetensors: the file")
    parser.add_argument(
        "--step",
        type=int,
        help="reshard or convert the checkpoint of this step (default: the newest); verify: only this one",
    )
    parser.add_argument("--ranks", type=int, help="reshard: how many shards to write (default: 1)")


def _checkpoint(options: argparse.Namespace) -> int:
    takes = {"list": [], "verify": ["step"], "reshard": ["out", "step", "ranks"], "to-safetensors": ["out", "step"]}
    for name in ("out", "step", "ranks"):
        if getattr(options, name) is not None and name not in takes[options.action]:
            actions = [action for action, names in takes.items() if name in names]
            raise ConfigError(f"checkpoint {options.action} takes no --{name}: it belongs to {', '.join(actions)}")
    if options.action in ("list", "verify"):
        return _list_checkpoints(options)

    from automix_dist.checkpoint_files import export_tensors, find_checkpoint, load_module_state, reshard

    if options.action == "reshard":
        ranks = 1 if options.ranks is None else options.ranks
        if options.out is None:
            raise ConfigError("reshard needs --out, another run folder")
        if ranks < 1:
            raise ConfigError(f"--ranks {ranks}: expected 1 or more")
        saved = find_checkpoint(options.run_folder, options.step)
        print(f"{reshard(saved, options.out, ranks)}: step {saved.step} in {ranks} shard(s)")
        settings = options.out / "config.yaml"
        if not settings.exists():  # of a folder that is there already they may be others
            write_whole(settings, to_yaml(from_dict(saved.manifest["config"] | {"output": str(options.out)})))
        return 0
    if options.out is None:
        raise ConfigError("to-safetensors needs --out FILE.safetensors")
    _check_suffix(options.out)
    saved = find_checkpoint(options.run_folder, options.step)
    export_tensors(load_module_state(saved, ""), options.out, metadata={"step": str(saved.step)})
    print(f"{options.out}: weights and statistics of query encoder, momentum encoder and Mix Block, step {saved.step}")
    return 0


def _list_checkpoints(options: argparse.Namespace) -> int:
    """A line for each checkpoint, the newest first; `verify` checks their files too."""
    from automix_dist.checkpoint_files import CheckpointError, saved_steps, step_folder, verify

    run, verifying = options.run_folder, options.action == "verify"
    steps = saved_steps(run)
    if options.step is not None and options.step not in steps:
        raise CheckpointError(f"{run} has no checkpoint of step {options.step}; it has {steps}")
    broken, best_step = 0, None
    for step in steps[::-1] if options.step is None else [options.step]:
        try:
            manifest = verify(step_folder(run, step), checksums=verifying).manifest
        except CheckpointError as error:
            if not step_folder(run, step).is_dir():  # a run that trains on has removed it
                steps.remove(step)
                continue
            broken += 1
            print(f"step {step}: broken: {error}")
            continue
        if options.step is None:
            best_step = best_step or manifest["state"].get("best_step")  # the newest manifest names the best step
        size = sum(entry["bytes"] for entry in manifest["files"]) / 2**20
        best = "  best" if step == best_step else ""
        print(f"step {step}: {size:,.1f} MiB from {manifest['world_size']} rank(s), engine {manifest['engine']}{best}")
    if verifying:
        looked_at = len(steps) if options.step is None else 1
        print(f"{broken} of {looked_at} broken" if broken else f"all {looked_at} whole")
    return EXIT_FAILED if broken else 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="the page; the picture is put beside it (default: RUN/parser.html)")


def _report(options: argparse.Namespace) -> int:
    if options.out and options.out.suffix != ".html":
        raise ConfigError(f"--out {options.out}: expected the page, a .html; the picture is put beside it as a .png")

    from automix_dist.report import write_report
    from automix_dist.summary_picture import write_picture

    print(write_report(options.run_folder, options.out))
    print(write_picture(options.run_folder, options.out and options.out.with_suffix(".png")))
    return 0


def _watch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("--once", action="store_true", help="show it once and exit")
    parser.add_argument("--seconds", type=float, default=2.0, help="between two looks (default: 2)")


def _watch(options: argparse.Namespace) -> int:
    if not 0 < options.seconds < math.inf:
        raise ConfigError(f"--seconds {options.seconds:g}: expected a positive number of seconds")

    from automix_dist.watch import watch

    watch(options.run_folder, once=options.once, seconds=options.seconds)
    return 0


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file (docs/evaluation.md)")
    _add_overrides(parser, "settings over the file's, for all runs; output=FOLDER for the comparison's own folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, on a GPU each if there are enough (default: 1)"
    )
    how.add_argument("--launcher", help="what trains each run on several GPUs: 'torchrun ... -m automix_dist'")


def _compare(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: expected 1 or more")

    from automix_dist.compare import compare

    launcher = shlex.split(options.launcher) if options.launcher else [sys.executable, "-m", "automix_dist"]
    return compare(options.config, launcher, _to_stderr, options.jobs, options.overrides)


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["checkpoint", "kernels", "loader", "memory", "scaling", "step", "throughput"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def _bench(options: argparse.Namespace) -> int:
    names = {"kernels": "automix_kernels.benchmark"}
    module = importlib.import_module(names.get(options.name, f"automix_dist.bench.{options.name}"))
    return module.run(options.arguments)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="check its settings, model, data and output folder too")
    _add_overrides(parser, "settings that replace the file's")
    parser.add_argument(
        "--all-ranks", action="store_true", help="under a launcher: every host of the job, and the network between them"
    )
    parser.add_argument("--seconds", type=float, default=60, help="--all-ranks: how long to wait for the other ranks")


def _doctor(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides) if options.config else None
    if options.all_ranks:
        from automix_dist import preflight

        return preflight.run(config, options.seconds)

    from automix_dist.doctor import diagnose, print_table

    return print_table(diagnose(config))


COMMANDS = (
    ("prepare", _prepare, _prepare_options, "write a dataset to a .beton file"),
    ("train", _train, _train_options, "train from a config"),
    (
        "eval",
        _evaluate,
        _evaluate_options,
        "accuracy, calibration and robustness of a run's checkpoint (docs/evaluation.md)",
    ),
    ("export", _export, _export_options, "write an encoder as a timm state dict"),
    ("replay", _replay, _replay_options, "compute a step again that was skipped, and say where it went wrong"),
    ("checkpoint", _checkpoint, _checkpoint_options, "look after a run's checkpoints"),
    ("report", _report, _report_options, "write a page of a run's curves, numbers and mixed samples"),
    ("watch", _watch, _watch_options, "a run at a glance in the terminal, while it trains or after"),
    ("compare", _compare, _compare_options, "train policies over seeds with equal budgets, and write one table"),
    ("verify", _verify, _verify_options, "check every sample of a .beton file"),
    ("bench", _bench, _bench_options, "measure; `automix bench NAME --help` lists a benchmark's own options"),
    ("doctor", _doctor, _doctor_options, "what this machine lacks, and how to get it"),
)
"""By name: what runs it, what adds its options, and a line on what it does."""
