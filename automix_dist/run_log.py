"""What a run leaves to look at while it trains: console, metrics.jsonl, the gallery's pictures, and other trackers."""

import json
import math
import resource
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from automix_dist.gallery import Gallery, cut_gallery, gallery_picture, write_gallery
from automix_dist.metrics_file import METRICS, accuracy_name, cut_metrics, percent, waiting
from automix_dist.trackers import LABELS, Tracker, forget_runs, open_tracker

PLAIN_LINE_SECONDS = 5.0  # how often, at most, a progress line goes to a console that is no terminal


class RunLog:
    """Writes the records of a run; on every rank but the main one, an object of the same methods that does nothing.

    No write of a log stops the training: the first that fails is told on the console, and the run goes on. A tracker is
    then left out; the others and the files are tried again.
    The methods cost microseconds, except those that write (`train`, `evaluation`, `event`, `gallery`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        tensorboard: bool,
        trackers: Sequence[str] = (),
        start_step: int,
        config: dict[str, Any],
    ) -> None:
        """Open the logs in `folder` for a training that goes on after `start_step` steps.

        Whatever an earlier attempt logged about later steps is cut off, so that no curve has a gap or a double; with
        start_step 0, a new training, everything is. `trackers` are names of log.trackers; `config` is the resolved tree
        of settings, which all of them keep.
        Accelerate's process state must exist already where there is more than one process.
        """
        self.is_main = is_main
        self._folder = Path(folder)
        self._bar: tqdm | None = None
        self._metrics: Any = None
        self._trackers: list[Tracker] = []
        self._warned: set[str] = set()
        self._nonfinite: set[str] = set()
        self._torn = self._closed = False
        self._progress = {"loss": "", "accuracy": "", "speed": ""}
        self._step, self._total_steps, self._steps_per_epoch = 0, 0, 1
        self._session = (time.perf_counter(), 0)  # when this session started, and at which step
        self._last_line = -math.inf
        self._restart_clock()
        if not is_main:
            return
        self._start_step = start_step
        self._attempt("metrics.jsonl", self._open_metrics)
        self._attempt("the gallery", lambda: cut_gallery(self._folder, start_step))
        if not start_step:
            self._attempt("trackers.json", lambda: forget_runs(self._folder))
        for name in [*(["tensorboard"] if tensorboard else []), *trackers]:
            self._open_tracker(name, start_step, config)

    def start(self, total_steps: int, steps_per_epoch: int, step: int) -> None:
        """Show the progress bar, standing at `step` of `total_steps`, and record the start of this session."""
        self._step, self._total_steps, self._steps_per_epoch = step, total_steps, max(steps_per_epoch, 1)
        if not self.is_main:
            return
        self.event("start", step, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self._session = (time.perf_counter(), step)
        if _is_terminal():
            self._bar = tqdm(
                total=total_steps,
                initial=step,
                desc=f"{self._epoch(step)} ",
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
            self._describe()

    def step(self, step: int, images: int) -> None:
        """Count one optimizer step, the run's `step`-th, of `images` images over all ranks; touches no tensor."""
        self._step = step
        self._images += images
        if self._bar is not None:
            self._console(lambda: self._bar.update(1))

    def train(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Record training values, and with them the images/s since the last record and the peak memory in GiB.

        The clock of the images/s starts anew after each evaluation, event and gallery: it measures training alone.
        """
        if not self.is_main:
            return
        values = dict(values)
        seconds = time.perf_counter() - self._clock
        if self._images and seconds > 0:
            values["images_per_second"] = self._images / seconds
            self._progress["speed"] = f"{values['images_per_second']:,.0f} images/s{waiting(values)}"
        values["memory_gib"] = _peak_memory() / 2**30
        self._record("train", step, epoch, values)
        self._progress["loss"] = f"loss {values['loss']:.3f}" if "loss" in values else ""
        if top1 := _top1(values):
            self._progress["accuracy"] = f"train {top1}"
        self._restart_clock()
        self._describe()

    def evaluation(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Record the results of an evaluation and show its top-1 accuracies on the console."""
        if not self.is_main:
            return
        self._record("eval", step, epoch, values)
        self._progress["accuracy"] = _top1(values)
        shown = [f"{key.removeprefix('top1_')} {percent(value)}" for key, value in values.items() if "top1" in key]
        self.message(f"{self._place(step)}  top-1: {', '.join(shown)}")
        self._restart_clock()

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Record something that happened: a checkpoint with its stall, a resume, an interruption."""
        if self.is_main:
            self._append({"kind": kind, "step": step, "time": _now(), **values})
            self._restart_clock()

    def gallery(self, step: int, gallery: Gallery) -> None:
        """Keep image pairs, their masks and mixed samples for the report, and show them in the trackers."""
        if not self.is_main:
            return
        self._attempt("the gallery", lambda: write_gallery(self._folder, step, gallery))
        if self._trackers:
            pixels = gallery_picture(gallery)
            self._track(lambda tracker: tracker.picture("gallery", pixels, step))
        self._restart_clock()

    def message(self, text: str) -> None:
        """Show one line on the console, above the bar if there is one."""
        if self.is_main:
            self._console(lambda: tqdm.write(text, file=sys.stderr) if self._bar else print(text, file=sys.stderr))

    def close(self, failed: bool = False) -> None:
        """Close the bar and the files; may be called twice."""
        if self._bar is not None:
            self._console(self._bar.close)
            self._bar = None
        self._track(lambda tracker: tracker.finish(failed))
        self._trackers, self._closed = [], True
        if self._metrics is not None:
            self._attempt("metrics.jsonl", self._metrics.close)
            self._metrics = None

    def _open_metrics(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS
        cut_metrics(path, self._start_step)
        # Without a buffer of ours a record is in the file when `train` returns, whatever kills the process after it.
        self._metrics = path.open("ab", buffering=0)

    def _open_tracker(self, name: str, start_step: int, config: dict[str, Any]) -> None:
        try:
            self._trackers.append(open_tracker(name, self._folder, start_step, config))
        except Exception as error:
            self._warn(LABELS[name], error)

    def _record(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        values = {key: float(value) for key, value in values.items()}
        self._append({"kind": kind, "step": step, "epoch": epoch, "time": _now(), **values})
        bad = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
        news = [key for key in bad if key not in self._nonfinite]
        self._nonfinite = (self._nonfinite - values.keys()) | bad.keys()
        for value in sorted({bad[key] for key in news}):
            keys = [key for key in news if bad[key] == value]
            self.message(f"step {step}: {', '.join(keys)} {'is' if len(keys) == 1 else 'are'} {value}")
        # Trackers have no way to show a NaN that is seen at a distance; the report and the console tell of it.
        finite = {f"{kind}/{key}": value for key, value in values.items() if math.isfinite(value)}
        self._track(lambda tracker: tracker.log(finite, step))

    def _append(self, record: dict[str, Any]) -> None:
        record = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
        nonfinite = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        if nonfinite:
            record = {**record, **dict.fromkeys(nonfinite), "nonfinite": nonfinite}
        line = json.dumps(record, allow_nan=False, default=str).encode() + b"\n"
        if self.is_main and not self._closed:
            self._attempt("metrics.jsonl", lambda: self._write_line(line))

    def _write_line(self, line: bytes) -> None:
        if self._metrics is None:  # the disk was full when it should have been opened
            self._open_metrics()
        if self._torn:
            line = b"\n" + line  # what a full disk left of the last record must not swallow this one
        self._torn = True
        if self._metrics.write(line) != len(line):
            raise OSError("the disk took only a part of the record")
        self._torn = False

    def _track(self, action: Callable[[Tracker], object]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # of any type: these are other projects' programs, and none is worth a training
                self._trackers.remove(tracker)  # TensorBoard's writer's thread, for one, is dead after a failed write
                self._warn(tracker.label, error)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Run an action that writes one of our own files."""
        try:
            action()
        except OSError as error:
            self._warn(f"{what} in {self._folder}", error)

    def _warn(self, what: str, error: Exception) -> None:
        """Tell of a failed write, in one line and once for each log."""
        if what not in self._warned:
            self._warned.add(what)
            text = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
            self.message(f"warning: cannot write {what} ({text}); training goes on without")

    def _console(self, action: Callable[[], object]) -> None:
        try:
            action()
        except RuntimeError:  # a signal's handler spoke in the middle of another line, which Python refuses
            pass
        except (OSError, ValueError):  # the terminal is gone (ValueError: stderr was closed); there is nobody to tell
            self._bar = None

    def _describe(self) -> None:
        if self._bar is not None:
            self._console(lambda: self._bar.set_description_str(f"{self._epoch(self._step)} ", refresh=False))
            text = ", ".join(part for part in self._progress.values() if part)
            self._console(lambda: self._bar.set_postfix_str(text))
        elif self._total_steps and time.perf_counter() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.perf_counter()
            parts = [self._place(self._step), *self._progress.values(), self._left()]
            self.message("  ".join(part for part in parts if part))

    def _epoch(self, step: int) -> str:
        """The epoch, counted from 1, that the run's `step`-th step belongs to."""
        epochs = -(-self._total_steps // self._steps_per_epoch)
        return f"epoch {max(-(-step // self._steps_per_epoch), 1)}/{epochs}"

    def _place(self, step: int) -> str:
        return f"step {step}/{self._total_steps}  {self._epoch(step)}"

    def _left(self) -> str:
        started, first_step = self._session
        done = self._step - first_step
        if not done:
            return ""
        seconds = (time.perf_counter() - started) / done * (self._total_steps - self._step)
        return f"{tqdm.format_interval(seconds)} left"

    def _restart_clock(self) -> None:
        self._clock = time.perf_counter()
        self._images = 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _top1(values: dict[str, float]) -> str:
    top1 = next((value for key, value in values.items() if accuracy_name(key) == "top-1"), None)
    return "" if top1 is None else f"top-1 {percent(top1)}"


def _peak_memory() -> int:
    """The most memory in use so far, in bytes: PyTorch's on the GPU if it is used, else the process's."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
