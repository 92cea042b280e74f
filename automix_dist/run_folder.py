"""A run's folder: taken by one training at a time, tried before it is relied on, and cleared only when it is sure."""

import fcntl
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from automix_dist.checkpoint_files import CHECKPOINTS, committed_steps, step_folder
from automix_dist.config import Config
from automix_dist.config_file import to_yaml
from automix_dist.distributed import Process
from automix_dist.errors import AutomixError
from automix_dist.gallery import GALLERY
from automix_dist.metrics_file import METRICS, is_foreign
from automix_dist.profiling import PROFILE
from automix_dist.replay import DUMPS
from automix_dist.trackers import FOLDERS
from automix_dist.whole_file import write_whole


class RunError(AutomixError):
    """A run's folder that cannot be trained in; the message says why and what to do."""


def on_rank_0(process: Process, write: Callable[[], str | None]) -> None:
    """Let rank 0 write; if it returns a reason why it could not, every rank raises RunError."""
    if problem := process.broadcast(write() if process.is_main else None):
        raise RunError(problem)


def open_folder(run: Path, resume: bool, overwrite: bool) -> str | None:
    """Make the run's folder, and take it for this process; a reason if that cannot or should not be done."""
    try:
        steps = committed_steps(run)
        if steps and not (resume or overwrite):
            return (
                f"{run} holds a run already (checkpoint of step {max(steps)}): continue it with --resume, discard it "
                f"with --overwrite, or choose another folder with output=..."
            )
        if is_foreign(run):
            return f"{run / METRICS} is another program's: set output=... to another folder, or move it away"
        run.mkdir(parents=True, exist_ok=True)
        holder = _lock(run)
        if holder is not None:
            return (
                f"{run} is being trained in by another process ({holder}): wait for it, stop it, or set output=...; if "
                f"its machine is dead, a network file system may hold its lock for long: delete {run / 'lock'}"
            )
    except FileExistsError:
        what = f"a link to {run.readlink()}, which is not there" if run.is_symlink() else "a file"
        return f"output = {str(run)!r} is {what}: expected a folder, or the name of a new one"
    except OSError as error:
        return f"cannot write to output = {str(run)!r}: {error.strerror}"
    return None


def try_saving(process: Process, run: Path) -> None:
    """Write as a checkpoint is written, a file for each rank in a folder that rank 0 makes: better than to find out
    after hours that a run cannot save. Raises RunError on all ranks."""

    def attempt(action: Callable[[], object]) -> str | None:
        try:
            action()
        except OSError as error:
            return f"{platform.node()}: {error.strerror}: {str(error.filename)!r}"
        return None

    place = process.broadcast(step_folder(run, 0).with_name(f".step_try-{secrets.token_hex(4)}"))
    problem = process.broadcast(attempt(lambda: place.mkdir(parents=True)) if process.is_main else None)
    problems = [problem] if problem else process.gather(attempt((place / f"rank_{process.rank:05d}").touch))
    if process.is_main:
        shutil.rmtree(place, ignore_errors=True)
    if found := [each for each in problems if each]:
        raise RunError(
            f"checkpoints cannot be written ({found[0]}): every rank writes a part of them under output = "
            f"{str(run)!r}, which has to be one folder for all hosts, and writable"
        )


def discard(run: Path) -> str | None:
    """Delete the run that a folder holds, but for the ranks' logs, which go on; a reason if that cannot be done."""
    try:
        if not committed_steps(run) and not (run / METRICS).exists():
            return None  # the folder of something else
        for name in (METRICS, CHECKPOINTS, GALLERY, DUMPS, PROFILE, *FOLDERS):
            _clear(run / name)
        steps = sorted(committed_steps(run))
    except OSError as error:
        return f"cannot write to output = {str(run)!r}: {error.strerror}"
    return f"{run / CHECKPOINTS}: steps {steps} could not be deleted: delete them, or set output=..." if steps else None


def _clear(folder: Path) -> None:
    """Delete a folder as far as it can be; of a link, as to a scratch disk, what is in the folder."""
    for path in folder.glob("*") if folder.is_symlink() else [folder]:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_of_this_job(run: Path) -> bool:
    """Whether the folder's run was begun by an earlier start of the Slurm job that this process belongs to."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    try:
        environment = json.loads((run / "environment.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return environment.get("slurm_job") == os.environ.get("SLURM_JOB_ID")


def store_settings(run: Path, config: Config, about: dict[str, Any]) -> str | None:
    """Keep config and environment in the run's folder; a reason if that cannot be done."""
    environment = about["environment"] | {key: about[key] for key in ("classes", "index_checksums")}
    environment["slurm_job"] = os.environ.get("SLURM_JOB_ID")
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
