"""The checkpoints of a training, by all its ranks together: save, agree, restore, keep.

Their files are checkpoint_files.py's.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from automix_dist.checkpoint_files import (
    FORMAT,
    CheckpointError,
    Saved,
    ShardReader,
    best_committed,
    clear_leftovers,
    commit,
    committed_steps,
    fresh_folder,
    listed_steps,
    newest,
    reason_of,
    remove,
    renew,
    staging_folder,
    step_folder,
    write_shard,
)
from automix_dist.config import CheckpointConfig
from automix_dist.distributed import Process
from automix_dist.engine_state import after_loading, optimizer_scalars, pieces
from automix_dist.engines import Engine
from automix_dist.errors import first_line


class SaveResult(NamedTuple):
    """What became of a save."""

    step: int
    stall_seconds: float
    """How long training stood still for it: waiting for the save before, and copying to host memory."""
    seconds: float
    """From the call to the rename."""
    bytes: int
    """Bytes written by all ranks together."""
    written: bool
    """Whether the checkpoint is on disk; else older ones are untouched."""


class Checkpoints:
    """The checkpoints of one run. Methods are called by all ranks together.

    A save copies this rank's state to host memory, for which training stands still, and writes it in a thread while
    training goes on. The thread has a process group of its own, so that its collectives cannot be confused with the
    main thread's.
    """

    def __init__(self, run: Path, config: CheckpointConfig, process: Process, say: Callable[[str], None]):
        self.run = run
        self.config = config
        self.process = process
        self.say = say
        self._channel = process.channel()
        self._lost = False  # contact with another rank over the channel
        self._thread: threading.Thread | None = None
        self._broken: set[int] = set()  # steps that a resume has passed over
        self._files: list[dict[str, Any]] = []  # of the newest checkpoint that this process has written or loaded
        self._host: dict[str, Tensor] = {}  # kept from save to save: fresh pages cost more than the copy
        self._written = self._last_written = True  # by this rank's account; as all ranks agreed
        self._results: list[SaveResult] = []

    def save(self, engine: Engine, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Begin to commit a checkpoint of the step `state["step"]`; failures are printed and returned by `wait`,
        and leave older checkpoints untouched.

        Args:
            state: the trainer's own position and counters; plain JSON values.
            about: config, versions: what a person or a later version may want to know.
        """
        began = time.perf_counter()
        self.wait()
        tensors, slices = {}, {}
        for piece in pieces(engine, self.process.rank, self.process.world_size):
            if piece.save:
                if piece.name not in self._host:
                    self._host[piece.name] = torch.empty_like(piece.view, device="cpu", pin_memory=piece.view.is_cuda)
                tensors[piece.name] = self._host[piece.name].copy_(piece.view, non_blocking=True)
                slices[piece.name] = [piece.start, list(piece.shape)]
        manifest = {
            "format": FORMAT,
            "step": state["step"],
            "world_size": self.process.world_size,
            "engine": engine.name,
            "state": dict(state),
            "optimizer_scalars": optimizer_scalars(engine),
            **about,
        }
        if self.process.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        stall = time.perf_counter() - began

        def write() -> None:
            error, size, self._lost = "interrupted", 0, True
            try:
                error, size = self._write(tensors, slices, manifest)
                self._lost = False
            except RuntimeError as problem:
                error = first_line(problem)
            finally:
                self._written = not error
                seconds = time.perf_counter() - began
                self._results.append(SaveResult(manifest["step"], stall, seconds, size, not error))
                if error:
                    self.say(f"checkpoint of step {manifest['step']} NOT written ({error}); {self._what_is_left()}")

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> bool:
        """Wait until the save that was begun is committed or has failed; whether the last one was written, by rank 0's
        account."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            outcomes = self.process.gather((self._written, self._lost))
            self._last_written = outcomes[0][0]
            if any(lost for _, lost in outcomes):  # gloo has closed the connections: no later save would get through
                self._channel = self.process.channel()
        return self._last_written

    def let_finish(self, seconds: float) -> None:
        """Let the save that is being written end, for so long at most; without the other ranks' main threads, which
        may be waiting for this one."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _what_is_left(self) -> str:
        try:
            return "earlier checkpoints are untouched" if committed_steps(self.run) else "there is none before it"
        except OSError:
            return "earlier ones cannot be seen"

    def finished(self) -> list[SaveResult]:
        """What became of saves since the last call; never waits."""
        results, self._results = self._results, []
        return results

    def _write(self, tensors: dict, slices: dict, manifest: dict) -> tuple[str | None, int]:
        """This rank's shard, and when all ranks have theirs, rank 0's commit: what went wrong, and the bytes of all."""
        step = manifest["step"]
        final = step_folder(self.run, step)
        staging = staging_folder(final)
        renewed = []

        def begin() -> None:
            clear_leftovers(self.run)  # they may be what fills the disk
            renewed.append(renew(final, manifest, self._files))

        error = self._on_main(begin)
        if self._channel.broadcast(renewed == [True]):
            self._prune(step, manifest["state"].get("best_step"))
            return None, 0
        error = error or self._on_main(lambda: fresh_folder(staging))
        written: dict[str, Any] | None = None
        if error is None:
            try:
                with self._at_disk():
                    written = write_shard(staging / f"shard_{self.process.rank:05d}.safetensors", tensors, slices)
            except (OSError, SafetensorError, RuntimeError, MemoryError) as problem:
                error = f"rank {self.process.rank}: {reason_of(problem)}"
        outcomes = self._channel.gather((error, written))
        error = next((e for e, _ in outcomes if e), None)
        if error is None:
            manifest["files"] = [files for _, files in outcomes]
            error = self._on_main(lambda: commit(staging, final, manifest))
        if error is not None:
            self._on_main(lambda: shutil.rmtree(staging, ignore_errors=True))
            return error, 0
        self._files = manifest["files"]
        self._broken.discard(step)
        self._prune(step, manifest["state"].get("best_step"))
        return None, sum(files["bytes"] for files in manifest["files"])

    def load(self, engine: Engine, saved: Saved) -> dict[str, Any]:
        """Fill the engine from a checkpoint of any world size and engine; returns the trainer's state.

        Raises CheckpointError if the files cannot be read or do not fit the model.

        Rank 0 alone opens all shards, and of another world size averages the buffers: a thousand ranks that each
        opened a thousand files would keep a file system busy for minutes.
        """
        rank, world_size = self.process.rank, self.process.world_size
        reader = ShardReader(saved, self._told_by_main(lambda: ShardReader(saved).index))
        engine.create_optimizer_state(saved.manifest["optimizer_scalars"])
        own = pieces(engine, rank, world_size)
        reader.check_names({piece.name for piece in own}, partial=engine.sharded)
        for piece in own:
            reader.check_shape(piece.name, piece.shape)
        means = {}
        if world_size != saved.manifest["world_size"]:
            names = [piece.name for piece in own if piece.name.startswith("buffer/")]
            means = self._told_by_main(lambda: {name: reader.tensor(name).flatten() for name in names})
        for piece in own:
            if piece.name in means:
                piece.view.copy_(means[piece.name])
            elif piece.name.startswith("buffer/"):
                piece.view.copy_(reader.buffer_of(piece.name, rank))
            else:
                piece.view.copy_(reader.elements(piece.name, piece.start, piece.view.numel()))
        after_loading(engine)
        self._files = saved.manifest["files"]
        return saved.manifest["state"]

    def agree_on_newest(self) -> Saved | None:
        """Rank 0's choice of the newest whole checkpoint, on all ranks; says what was passed over and why.

        Raises UnreadableError as `newest` does, on all ranks."""

        def choose() -> Saved | None:
            found = newest(self.run, self.say)
            first_broken = 0 if found is None else found.step + 1
            self._broken = {each for each in listed_steps(self.run) if each >= first_broken}
            return found

        return self._told_by_main(choose)

    def _told_by_main(self, action: Callable[[], Any]) -> Any:
        """What rank 0 finds, or the CheckpointError that it raises, on all ranks."""
        found = None
        if self.process.is_main:
            try:
                found = action()
            except CheckpointError as error:
                found = error
            except (OSError, SafetensorError) as error:
                found = CheckpointError(f"{self.run}: a checkpoint cannot be read: {reason_of(error)}")
        found = self.process.broadcast(found)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def _prune(self, step: int, best_step: int | None) -> None:
        """Remove what the retention rule does not keep; never `step`, just written. What a resume has passed over as
        broken does not count: it goes when training has come past it, and stays until then."""
        if not self.process.is_main:
            return
        try:
            with self._at_disk():
                reached = sorted(each for each in committed_steps(self.run) if each <= step)
                steps = [each for each in reached if each not in self._broken]
                every = self.config.keep_every_steps
                keep = set(steps[-self.config.keep_last :])
                if self.config.keep_best and best_step is not None:
                    keep.add(best_step if best_step in steps else best_committed(self.run, steps))
                keep |= {each for each in steps if every and each % every == 0}
                for each in reached:
                    if each not in keep:
                        remove(step_folder(self.run, each))
        except OSError as problem:
            self.say(f"old checkpoints could not be removed: {problem}")

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Run on rank 0 what may fail, as for want of space or rights; the reason on all ranks, or None."""
        reason = None
        if self.process.is_main:
            try:
                with self._at_disk():
                    action()
            except Exception as error:  # whatever it is: the others wait for the answer
                reason = f"rank 0: {reason_of(error)}"
        return self._channel.broadcast(reason)

    @contextlib.contextmanager
    def _at_disk(self) -> Iterator[None]:
        """What the others wait for meanwhile is this rank's disk: the heartbeat names it."""
        self.process.progress.writing = True
        try:
            yield
        finally:
            self.process.progress.writing = False
