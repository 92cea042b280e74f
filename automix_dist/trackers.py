"""Where a run can be followed live besides its own files: TensorBoard, Weights & Biases and MLflow, through Accelerate.

All three have a `label` for the console and the methods log(values, step), picture(name, pixels, step), finish(failed).
Whatever one of them raises means that this tracker is lost; run_log.py then goes on without it. None of them lets a
training step wait for a network: TensorBoard writes files, W&B has a process of its own, MLflow gets a thread here.

A resumed training goes on in the same run of W&B and MLflow, whose ids are in OUTPUT/trackers.json.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from automix_dist.config import ConfigError, LogConfig, flatten
from automix_dist.provenance import installed_version
from automix_dist.whole_file import write_whole

PROJECT = "automix-dist"
"""Of W&B, and experiment of MLflow, where the environment names no other."""
RUN_IDS = "trackers.json"
MLFLOW_FILES = "mlruns"
FOLDERS = ("tensorboard", "wandb", MLFLOW_FILES)
"""Where trackers keep files in a run's folder."""
ANSWER_SECONDS = 60.0
"""How long a run may wait for a server at its start, and at its end for what was not sent yet."""
LABELS = {"tensorboard": "TensorBoard", "wandb": "W&B", "mlflow": "MLflow"}
"""On the console."""
INSTALLED_AS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "mlflow-skinny")}


class Tracker(Protocol):
    label: str

    def log(self, values: dict[str, float], step: int) -> None:
        """Add finite values at a step; several calls at one step add up."""

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, uint8 [height, width, 3]."""

    def finish(self, failed: bool) -> None:
        """The training has ended or stopped; or failed, which its page should show."""


def check_installed(config: LogConfig) -> None:
    """Raise ConfigError for a chosen tracker whose package is not installed."""
    chosen = [("log.tensorboard = True", "tensorboard", "set it to false")] if config.tensorboard else []
    chosen += [(f"log.trackers = {list(config.trackers)}", name, "remove it") for name in config.trackers]
    for setting, name, without in chosen:
        if not any(map(installed_version, INSTALLED_AS[name])):
            install = f"{sys.executable} -m pip install {name}"
            raise ConfigError(f"{setting}: {name} is not installed; {install}, or {without}")


def open_tracker(name: str, folder: Path, start_step: int, config: dict[str, Any]) -> Tracker:
    """Open a tracker for a training that goes on after `start_step` steps; `config` is the resolved tree of settings.

    Accelerate's process state must exist already where there is more than one process.
    """
    from accelerate import PartialState

    PartialState()  # the trackers' own logger needs it; a training has made it before
    if name == "tensorboard":
        return TensorBoard(folder, start_step, config)
    kind = {"wandb": WeightsAndBiases, "mlflow": MLflow}[name]
    ids = _run_ids(folder)
    tracker = kind(folder, ids.get(name), config)
    if tracker.run_id != ids.get(name):
        write_whole(folder / RUN_IDS, json.dumps(ids | {name: tracker.run_id}) + "\n")
    return tracker


def forget_runs(folder: Path) -> None:
    """Let a new training in this folder begin new runs. Raises OSError."""
    if (folder / RUN_IDS).exists():
        (folder / RUN_IDS).unlink()


class TensorBoard:
    """Event files in OUTPUT/tensorboard; what earlier files hold of later steps is not shown."""

    label = LABELS["tensorboard"]

    def __init__(self, folder: Path, start_step: int, config: dict[str, Any]) -> None:
        from accelerate.tracking import TensorBoardTracker

        _silence_writer_thread()
        # TensorBoard drops what earlier event files hold from purge_step on.
        self._tracker = TensorBoardTracker("tensorboard", folder, purge_step=start_step + 1 if start_step else 0)
        _start(self._tracker)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self._tracker.log({"config": "\n".join(f"    {line}" for line in text.splitlines())}, step=start_step)

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")

    def finish(self, failed: bool) -> None:
        self._tracker.finish()


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT, else "automix-dist", named after the run folder; local files in OUTPUT/wandb.

    WANDB_MODE=offline keeps it there for `wandb sync`.
    """

    label = LABELS["wandb"]

    def __init__(self, folder: Path, run_id: str | None, config: dict[str, Any]) -> None:
        from accelerate.tracking import WandBTracker

        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=run_id,
            resume="allow",
            dir=folder,
            settings={
                "console": "off",  # its capture of the console would tear the progress bar
                "init_timeout": ANSWER_SECONDS,
                "finish_timeout": ANSWER_SECONDS,  # by itself it waits for ever
                "finish_timeout_raises": True,
            },
        )
        _start(self._tracker)
        self._tracker.store_init_configuration(config)
        self.run_id = self._tracker.tracker.id
        self._first_step = self._tracker.tracker.starting_step

    def log(self, values: dict[str, float], step: int) -> None:
        # After a resume from an earlier step W&B refuses what it has already, and would say so at every record.
        if step >= self._first_step:
            self._tracker.log(values, step=step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        if step >= self._first_step:
            self._tracker.log_images({name: [pixels]}, step=step)

    def finish(self, failed: bool) -> None:
        self._tracker.tracker.finish(exit_code=int(failed))


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, else "automix-dist", named after the run folder.

    Without MLFLOW_TRACKING_URI it goes to files in OUTPUT/mlruns. MLflow's own default is a SQLite file in the current
    directory, which mlflow-skinny cannot write and network file systems cannot lock. Its settings are those that the
    run began with: MLflow does not let them change.
    """

    label = LABELS["mlflow"]

    def __init__(self, folder: Path, run_id: str | None, config: dict[str, Any]) -> None:
        from accelerate.tracking import MLflowTracker

        self._tracker = MLflowTracker(PROJECT, run_id=run_id, run_name=folder.resolve().name)
        # MLflow tries a lost server again for minutes, longer than a rank may stand still; its runs belong to a thread.
        self._thread = _OwnThread()
        self._thread.submit(lambda: self._open(folder, {} if run_id else config))
        self._thread.wait()
        self.run_id = self._tracker.tracker.info.run_id

    def _open(self, folder: Path, config: dict[str, Any]) -> None:
        import mlflow

        self._own_store = not mlflow.is_tracking_uri_set()
        if self._own_store:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder / MLFLOW_FILES).resolve().as_uri())
        _start(self._tracker)
        self._tracker.store_init_configuration(flatten(config))

    def log(self, values: dict[str, float], step: int) -> None:
        self._thread.submit(lambda: self._tracker.log(values, step=step))

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        import mlflow

        self._thread.submit(lambda: mlflow.log_image(pixels, key=name, step=step, synchronous=True))

    def finish(self, failed: bool) -> None:
        self._thread.submit(lambda: self._close("FAILED" if failed else "FINISHED"))
        self._thread.wait()

    def _close(self, status: str) -> None:
        import mlflow

        mlflow.end_run(status=status)
        if self._own_store:
            mlflow.set_tracking_uri(None)  # it is kept in the environment too, for any later run of this process


class _OwnThread:
    """Does one thing after another; an error is raised by the next `submit` or `wait`."""

    def __init__(self) -> None:
        self._actions: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._error: Exception | None = None
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def submit(self, action: Callable[[], object]) -> None:
        if self._error is not None:
            raise self._error
        self._actions.put(action)

    def wait(self) -> None:
        """Until all is done. Raises TimeoutError."""
        done = threading.Event()
        self.submit(done.set)
        if not done.wait(ANSWER_SECONDS):
            raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} s")
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            action = self._actions.get()
            try:
                action()
            except Exception as error:  # of any type: it is the tracker's, and raised in the main thread
                self._error = error


def _start(tracker: Any) -> None:
    # Which rank logs is decided by RunLog, and not by Accelerate's idea of the main process.
    tracker.main_process_only = False
    tracker.start()


def _run_ids(folder: Path) -> dict[str, str]:
    path = folder / RUN_IDS
    return json.loads(path.read_text()) if path.exists() else {}


def _silence_writer_thread() -> None:
    """Keep the traceback of TensorBoard's writer thread off the console.

    The thread dies of a failed write (full disk); the next call raises the same error, and that one is reported.
    """
    show = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            show(args)

    threading.excepthook = hook
