"""Checkpoints that are whole or not there at all: commit, verify, agree, restore, keep.

    RUN/checkpoints/step_00001200/
        manifest.json       step, files with sizes and checksums, world size, config, versions, training position
        shard_00000.safetensors ... one per rank: named slices of whole tensors (see engine_state.py)

A step's folder is written under a hidden name; when every rank's file is on disk and the manifest names them all, one
rename makes it visible. Tensors and JSON only: nothing is ever unpickled. Slices are found by name and place, so a
checkpoint can be restored by another number of ranks or another ZeRO stage.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from automix_dist.config import CheckpointConfig
from automix_dist.distributed import Process
from automix_dist.engine_state import Piece, after_loading, create_optimizer_state, optimizer_scalars, pieces

FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message names the file and what to do."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    folder: Path
    step: int
    manifest: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. All methods but `newest` are called by all ranks together."""

    def __init__(self, run: Path, config: CheckpointConfig, process: Process, say: Callable[[str], None]):
        self.root = run / "checkpoints"
        self.config = config
        self.process = process
        self.say = say

    def save(self, engine: Any, state: dict[str, Any], about: dict[str, Any]) -> float | None:
        """Commit a checkpoint of the step `state["step"]`.

        Args:
            state: the trainer's own position and counters; plain JSON values.
            about: config, versions: what a person or a later version may want to know.

        Returns:
            the seconds it took, or None if it could not be written (said on the console; older ones are untouched).
        """
        began = time.perf_counter()
        step = state["step"]
        staging, final = self.root / f".step_{step:08d}.partial", self.root / f"step_{step:08d}"
        if self.process.broadcast(self.process.is_main and _is_whole(final)):
            return time.perf_counter() - began  # a run that was resumed here and stopped again at once
        error = self._on_main(lambda: _fresh_folder(staging))
        written: dict[str, Any] | None = None
        if error is None:
            try:
                written = self._write_shard(engine, staging)
            except (OSError, SafetensorError) as problem:
                error = f"rank {self.process.rank}: {_reason(problem)}"
        results = self.process.gather((error, written))
        error = next((e for e, _ in results if e), None)
        if error is None:
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": self.process.world_size,
                "zero_stage": engine.zero_optimization_stage(),
                "state": state,
                "optimizer_scalars": optimizer_scalars(engine),
                "files": [files for _, files in results],
                **about,
            }
            error = self._on_main(lambda: _commit(staging, final, manifest))
        if error is not None:
            self._on_main(lambda: shutil.rmtree(staging, ignore_errors=True))
            self.say(f"checkpoint of step {step} NOT written ({error}); earlier checkpoints are untouched")
            return None
        return time.perf_counter() - began

    def load(self, engine: Any, saved: Saved) -> dict[str, Any]:
        """Fill the engine from a checkpoint of any world size and ZeRO stage; returns the trainer's state."""
        reader = ShardReader(saved)
        keys: dict[str, set[str]] = defaultdict(set)
        for name in reader.names("optimizer/"):
            parameter, key = name.removeprefix("optimizer/").rsplit("/", 1)
            keys[parameter].add(key)
        create_optimizer_state(engine, keys, saved.manifest["optimizer_scalars"])
        own = pieces(engine, self.process.rank, self.process.world_size)
        reader.check_names({piece.name for piece in own}, partial=engine.zero_optimization_stage() > 0)
        for piece in own:
            reader.fill(piece, rank=self.process.rank, world_size=self.process.world_size)
        after_loading(engine)
        return saved.manifest["state"]

    def agree_on_newest(self) -> Saved | None:
        """Rank 0's choice of the newest whole checkpoint, on all ranks; says what was passed over and why."""
        return self.process.broadcast(newest(self.root.parent, self.say) if self.process.is_main else None)

    def prune(self, best_step: int | None) -> None:
        """Remove what the retention rule does not keep; never the newest. Leftovers of interrupted saves go too."""
        if not self.process.is_main:
            return
        steps = sorted(committed(self.root))
        every = self.config.keep_every_steps
        keep = set(steps[-self.config.keep_last :]) | {step for step in steps if every and step % every == 0}
        if self.config.keep_best and best_step is not None:
            keep.add(best_step)
        for step in steps:
            if step not in keep:
                _remove(self.root / f"step_{step:08d}")
        for leftover in self.root.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _write_shard(self, engine: Any, folder: Path) -> dict[str, Any]:
        path = folder / f"shard_{self.process.rank:05d}.safetensors"
        tensors, slices = {}, {}
        for piece in pieces(engine, self.process.rank, self.process.world_size):
            if piece.save:
                tensors[piece.name] = piece.view
                slices[piece.name] = [piece.start, list(piece.shape)]
        tensors = {name: view.detach().to("cpu", copy=True) for name, view in tensors.items()}
        save_file(tensors, path, metadata={"slices": json.dumps(slices)})
        _fsync(path)
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Run on rank 0 what may fail for want of space or rights; the reason on all ranks, or None."""
        reason = None
        if self.process.is_main:
            try:
                action()
            except OSError as error:
                reason = f"rank 0: {_reason(error)}"
        return self.process.broadcast(reason)


class ShardReader:
    """Random access to the tensors of a checkpoint by name, whatever the ranks that wrote their slices."""

    def __init__(self, saved: Saved):
        self.saved = saved
        self._files = []
        self._slices: dict[str, list[tuple[int, int, int]]] = defaultdict(list)  # name -> (start, length, file)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for index, entry in enumerate(saved.manifest["files"]):
            path = saved.folder / entry["name"]
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
            self._files.append(file)
            for name, (start, shape) in json.loads(file.metadata()["slices"]).items():
                self._slices[name].append((start, file.get_slice(name).get_shape()[0], index))
                self._shapes[name] = tuple(shape)

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._slices if name.startswith(prefix)]

    def check_names(self, wanted: set[str], partial: bool) -> None:
        """Raise CheckpointError unless the model's tensors are those of the checkpoint."""
        missing = sorted(wanted - self._slices.keys())
        unused = [] if partial else sorted(self._slices.keys() - wanted)
        if missing or unused:
            raise CheckpointError(
                f"{self.saved.folder} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unused)} not wanted {unused[:3]}; was model.* or automix.* changed since?"
            )

    def fill(self, piece: Piece, rank: int, world_size: int) -> None:
        """Fill one live view. Buffers are each rank's own; for another world size, the mean of all ranks'."""
        if self._shapes[piece.name] != piece.shape:
            raise CheckpointError(
                f"{self.saved.folder}: {piece.name} has shape {self._shapes[piece.name]}, the model wants "
                f"{piece.shape}; was model.* or automix.* changed since?"
            )
        if piece.name.startswith("buffer/"):
            piece.view.copy_(self._buffer(piece.name, rank, world_size))
        else:
            piece.view.copy_(self._range(piece.name, piece.start, piece.view.numel()))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape; buffers as the mean over ranks."""
        flat = self._buffer(name, 0, 0) if name.startswith("buffer/") else self._range(name, 0, None)
        return flat.view(self._shapes[name])

    def _buffer(self, name: str, rank: int, world_size: int) -> Tensor:
        copies = sorted(self._slices[name], key=lambda entry: entry[2])
        if len(copies) == world_size:
            return self._files[copies[rank][2]].get_tensor(name)
        values = torch.stack([self._files[index].get_tensor(name) for _, _, index in copies])
        return values.mean(dim=0) if values.is_floating_point() else values[0]

    def _range(self, name: str, start: int, length: int | None) -> Tensor:
        """The elements [start, start + length) of the flattened whole, gathered from the slices that hold them."""
        total = 1
        for size in self._shapes[name]:
            total *= size
        end = total if length is None else start + length
        parts, position = [], start
        for slice_start, slice_length, index in sorted(self._slices[name]):
            if slice_start <= position < min(end, slice_start + slice_length):
                stop = min(end, slice_start + slice_length)
                parts.append(self._files[index].get_slice(name)[position - slice_start : stop - slice_start])
                position = stop
        if position != end:
            raise CheckpointError(f"{self.saved.folder}: elements {position} to {end} of {name} are in no shard")
        return torch.cat(parts) if parts else torch.empty(0)


def committed(root: Path) -> list[int]:
    """Steps whose folder is visible under a run's checkpoints/, in no particular order; their content is unchecked."""
    if not root.is_dir():
        return []
    return [int(match[1]) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]


def newest(run: Path, say: Callable[[str], None] = print) -> Saved | None:
    """The newest checkpoint of a run that is whole, checksums included; None if there is none."""
    root = run / "checkpoints"
    for step in sorted(committed(root), reverse=True):
        try:
            return verify(root / f"step_{step:08d}")
        except CheckpointError as error:
            say(f"passing over a broken checkpoint: {error}")
    return None


def verify(folder: Path, *, checksums: bool = True) -> Saved:
    """Check a checkpoint's manifest, every file's size and, unless told not to, checksum. Raises CheckpointError."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version, files, checksum = manifest["format"], manifest["files"], manifest.pop("sha256")
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: written in format {version}, this version reads {FORMAT}")
    if checksum != _manifest_checksum(manifest):
        raise CheckpointError(f"{path}: its own checksum does not match: the file is damaged")
    for entry in files:
        file = folder / entry["name"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {entry['bytes']}"
            )
        if checksums and _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: the checksum does not match the manifest: the file is damaged")
    return Saved(folder, step, manifest)


def load_module_state(saved: Saved, prefix: str) -> dict[str, Tensor]:
    """Weights and buffers below `prefix` ("query.", "momentum.", "mix_block.", or "" for all) as a state dict."""
    reader = ShardReader(saved)
    state = {}
    for kind in ("param/", "buffer/"):
        for name in reader.names(f"{kind}{prefix}"):
            state[name.removeprefix(f"{kind}{prefix}")] = reader.tensor(name)
    return state


def _is_whole(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(verify(folder))
    except CheckpointError:
        return False


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _commit(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    path = staging / "manifest.json"
    path.write_text(json.dumps(manifest | {"sha256": _manifest_checksum(manifest)}, indent=1))
    _fsync(path)
    _fsync(staging)
    if final.exists():  # a broken one that a resume passed over
        _remove(final)
    staging.rename(final)
    _fsync(final.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows it half there: hide it first."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
