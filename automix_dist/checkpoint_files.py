"""Checkpoints on disk: whole or not there at all, verified by checksums, read by name and place.

    RUN/checkpoints/step_00001200/
        manifest.json       step, files with sizes and checksums, world size, config, versions, training position
        shard_00000.safetensors ... one per rank: named slices of whole tensors (see engine_state.py)

A step's folder is written under a hidden name; when every rank's file is on disk and the manifest names them all, one
rename makes it visible. Tensors and JSON only: nothing is ever unpickled. Slices are found by name and place, so a
checkpoint can be restored by another number of ranks or another engine.
"""

import contextlib
import errno
import hashlib
import json
import math
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from automix_dist.errors import AutomixError
from automix_dist.whole_file import sync

FORMAT = 1
CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(AutomixError, ValueError):
    """A checkpoint that cannot be used or written; the message names the file and what to do."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be whole, but cannot be read here and now."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    folder: Path
    step: int
    manifest: dict[str, Any]


class Index(NamedTuple):
    """Where the tensors of a checkpoint are."""

    slices: dict[str, list[tuple[int, int, int]]]
    """Of each name: where a slice of the flattened whole starts, its length, and the number of its file."""
    shapes: dict[str, tuple[int, ...]]


class ShardReader:
    """Random access to the tensors of a checkpoint by name, whatever the ranks that wrote their slices.

    It and its methods raise CheckpointError for a shard that cannot be opened, and for elements that are in none.

    Args:
        index: another reader's of the same checkpoint; without it, all shards are opened. With it, those that are read.
    """

    def __init__(self, saved: Saved, index: Index | None = None):
        self.saved = saved
        self._files: dict[int, Any] = {}
        self.index = index or self._read_index()
        self._slices, self._shapes = self.index

    def _read_index(self) -> Index:
        slices, shapes = defaultdict(list), {}
        for number in range(len(self.saved.manifest["files"])):
            file = self._file(number)
            for name, (start, shape) in json.loads(file.metadata()["slices"]).items():
                slices[name].append((start, file.get_slice(name).get_shape()[0], number))
                shapes[name] = tuple(shape)
        return Index(dict(slices), shapes)

    def _file(self, number: int) -> Any:
        if number not in self._files:
            path = self.saved.folder / self.saved.manifest["files"][number]["name"]
            try:
                self._files[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
        return self._files[number]

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._slices if name.startswith(prefix)]

    def check_names(self, wanted: set[str], partial: bool) -> None:
        """Raise CheckpointError unless the model's tensors are those of the checkpoint."""
        missing = sorted(wanted - self._slices.keys())
        unused = [] if partial else sorted(self._slices.keys() - wanted)
        if missing or unused:
            of_optimizer = all(name.startswith("optimizer/") for name in missing + unused)
            changed = "optimizer.*" if of_optimizer else "model.* or automix.*"  # a momentum of 0 has no tensors
            raise CheckpointError(
                f"{self.saved.folder} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unused)} not wanted {unused[:3]}; was {changed} changed since?"
            )

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the model's tensor is of the checkpoint's shape."""
        if self._shapes[name] != shape:
            raise CheckpointError(
                f"{self.saved.folder}: {name} has shape {self._shapes[name]}, the model wants {shape}; "
                f"was model.* or automix.* changed since?"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape; buffers as the mean over ranks."""
        shape = self._shapes[name]
        flat = self._mean_of_ranks(name) if name.startswith("buffer/") else self.elements(name, 0, math.prod(shape))
        return flat.view(shape)

    def buffer_of(self, name: str, rank: int) -> Tensor:
        """The flattened buffer of one of the ranks that wrote the checkpoint."""
        return self._file(rank).get_tensor(name)

    def _mean_of_ranks(self, name: str) -> Tensor:
        values = torch.stack([self._file(number).get_tensor(name) for _, _, number in self._slices[name]])
        if (values == values[0]).all():  # their mean would be a rounding away
            return values[0]
        return values.mean(dim=0) if values.is_floating_point() else values[0]

    def elements(self, name: str, start: int, length: int) -> Tensor:
        """The elements [start, start + length) of the flattened whole, gathered from the slices that hold them."""
        end = start + length
        parts, position = [], start
        for slice_start, slice_length, index in sorted(self._slices[name]):
            if slice_start <= position < min(end, slice_start + slice_length):
                stop = min(end, slice_start + slice_length)
                parts.append(self._file(index).get_slice(name)[position - slice_start : stop - slice_start])
                position = stop
        if position != end:
            raise CheckpointError(f"{self.saved.folder}: elements {position} to {end} of {name} are in no shard")
        return torch.cat(parts) if parts else torch.empty(0)


def step_folder(run: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is, or would be."""
    return run / CHECKPOINTS / f"step_{step:08d}"


def staging_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is renamed."""
    return final.with_name(f".{final.name}.partial")


def committed_steps(run: Path) -> list[int]:
    """Steps whose folder is visible among a run's checkpoints, in no particular order; their content is unchecked.

    Raises OSError, also where the folder is a link that leads nowhere: its disk may be away for a moment.
    """
    root = run / CHECKPOINTS
    if not root.is_dir():
        if root.is_symlink():
            raise FileNotFoundError(errno.ENOENT, f"a link to {root.readlink()}, which is not there", str(root))
        return []
    return [int(match[1]) for path in root.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()]


def listed_steps(run: Path) -> list[int]:
    """As `committed_steps`; a folder that cannot be listed may hold whole ones. Raises UnreadableError."""
    try:
        return committed_steps(run)
    except OSError as error:
        raise UnreadableError(f"{run / CHECKPOINTS}: {reason_of(error)}") from error


def best_committed(run: Path, steps: list[int]) -> int | None:
    """The best of these rising steps, where the best of all is not among them: the newest manifest whose best is there
    tells."""
    for step in reversed(steps):
        with contextlib.suppress(CheckpointError):
            best = verify(step_folder(run, step), checksums=False).manifest["state"].get("best_step")
            if best in steps:
                return best
    return None


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def newest(run: Path, say: Callable[[str], None] = _warn) -> Saved | None:
    """The newest checkpoint of a run that is whole, checksums included; None if there is none.

    Raises UnreadableError if a newer one cannot be read, but may be whole: to train on from an older one, or from the
    beginning, would throw it away because its disk was away for a moment.
    """
    passed: set[int] = set()
    while steps := set(listed_steps(run)) - passed:  # anew each time: a run that trains on removes old ones
        folder = step_folder(run, max(steps))
        passed.add(max(steps))
        try:
            return verify(folder)
        except UnreadableError as error:
            raise UnreadableError(
                f"{error}: this checkpoint, the newest, may be whole. Try again when it can be read; to go on without "
                f"it, move {folder} away"
            ) from error
        except CheckpointError as error:
            if folder.is_dir():
                say(f"passing over a broken checkpoint: {error}")
    return None


def saved_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, in order. Raises CheckpointError without a run folder or a checkpoint."""
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    steps = sorted(committed_steps(run))
    if not steps:
        hint = ""
        if step := _STEP.fullmatch(run.name):
            hint = f": it is one; give the run's folder, {run.absolute().parent.parent}, and --step {int(step[1])}"
        raise CheckpointError(f"{run} has no checkpoint{hint}")
    return steps


def find_checkpoint(run: Path, step: int | None = None, best: bool = False) -> Saved:
    """A run's checkpoint of this step, or with the best validation top-1, or else the newest that is whole.

    Where the best could not be written, the best before it is taken, and that is said.

    Raises CheckpointError if there is none, or it is damaged.
    """
    steps = saved_steps(run)
    if step is None:
        saved = newest(run)
        if saved is None:
            raise CheckpointError(f"{run} has no whole checkpoint")
        if not best:
            return saved
        step = saved.manifest["state"].get("best_step")
        if step is None:
            raise CheckpointError(f"{run} has no best checkpoint: no evaluation up to step {saved.step}; omit --best")
        if step not in steps and (instead := best_committed(run, steps)) is not None:
            _warn(f"the best checkpoint, of step {step}, is not there; taking step {instead}, the best before it")
            step = instead
    if step not in steps:
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {steps}")
    return verify(step_folder(run, step))


def verify(folder: Path, *, checksums: bool = True) -> Saved:
    """Check a checkpoint's manifest, its folder's name, every file's size and, unless told not to, checksum.

    Raises CheckpointError; UnreadableError where the file system or another format is the reason, and not the files.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version, files, checksum = manifest["format"], manifest["files"], manifest.pop("sha256")
        step = int(manifest["step"])
    except OSError as error:
        raise _not_read(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {reason_of(error)}") from error
    if version != FORMAT:
        raise UnreadableError(f"{path}: written in format {version}, this version reads {FORMAT}")
    if checksum != _manifest_checksum(manifest):
        raise CheckpointError(f"{path}: its own checksum does not match: the file is damaged")
    if (named := _STEP.fullmatch(folder.name)) and int(named[1]) != step:
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {step}: rename it to {step_folder(Path(), step).name}"
        )
    for entry in files:
        file = folder / entry["name"]
        try:
            size = file.stat().st_size if file.is_file() else None
            damaged = checksums and size == entry["bytes"] and _sha256(file) != entry["sha256"]
        except OSError as error:
            raise _not_read(file, error) from error
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {entry['bytes']}"
            )
        if damaged:
            raise CheckpointError(f"{file}: the checksum does not match the manifest: the file is damaged")
    return Saved(folder, step, manifest)


def reshard(saved: Saved, run: Path, ranks: int) -> Path:
    """Write a checkpoint again as `ranks` shards of equal size under another run folder; returns its folder.

    Any number of ranks resumes from any number of shards; this is for moving one, or so that a resume reads less.
    Each shard takes an equal part of every tensor; buffers become the mean over the ranks that wrote them. Of another
    step, which stays behind, it no longer says that it was the best.

    Raises CheckpointError if the run has that step already, or nothing can be written there.
    """
    reader, final = ShardReader(saved), step_folder(run, saved.step)
    staging = staging_folder(final)
    if final.exists():
        raise CheckpointError(f"{final} exists already: choose another folder")
    files = []
    try:
        fresh_folder(staging)
        for rank in range(ranks):
            path, tensors, slices = staging / f"shard_{rank:05d}.safetensors", {}, {}
            for name in reader.names(""):
                shape = reader.shape(name)
                length = math.prod(shape)
                part = -(-length // ranks)
                if name.startswith("buffer/"):
                    tensors[name], slices[name] = reader.tensor(name).flatten(), [0, shape]
                elif rank * part < length:
                    tensors[name] = reader.elements(name, rank * part, min(part, length - rank * part))
                    slices[name] = [rank * part, shape]
            files.append(write_shard(path, tensors, slices))
        manifest = {key: value for key, value in saved.manifest.items() if key not in ("files", "world_size")}
        if manifest["state"].get("best_step") not in (None, saved.step):
            manifest["state"] = manifest["state"] | {"best_step": None, "best_top1": -1.0}
        commit(staging, final, manifest | {"world_size": ranks, "files": files})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"{final} cannot be written: {reason_of(error)}") from error
    return final


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file for those who may read its folder: safetensors itself writes it for its owner alone.

    Raises OSError, SafetensorError.
    """
    save_file(tensors, path, metadata)
    with contextlib.suppress(OSError):  # a file system without modes
        path.chmod(path.parent.stat().st_mode & 0o644)


def export_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file where a user wants one. Raises CheckpointError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {reason_of(error)}") from error


def load_module_state(saved: Saved, prefix: str) -> dict[str, Tensor]:
    """Weights and buffers below `prefix` ("query.", "momentum.", "mix_block.", or "" for all) as a state dict.

    Raises CheckpointError as ShardReader does.
    """
    reader = ShardReader(saved)
    state = {}
    for kind in ("param/", "buffer/"):
        for name in reader.names(f"{kind}{prefix}"):
            state[name.removeprefix(f"{kind}{prefix}")] = reader.tensor(name)
    return state


def renew(folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> bool:
    """Give a step that is saved already, in these files, the newer manifest, and tell whether it is: a run stopped anew
    where it resumed, or saved before it was evaluated. Other files are another run's weights. Raises OSError."""
    if not folder.is_dir():
        return False
    try:
        older = verify(folder).manifest
    except CheckpointError:
        return False
    if older["files"] != files:
        return False
    manifest = manifest | {key: older[key] for key in ("files", "world_size", "engine")}  # who wrote them
    if older != manifest:
        newer = folder / ".manifest.json"
        try:
            _write_manifest(newer, manifest)
            newer.replace(folder / "manifest.json")
        finally:
            newer.unlink(missing_ok=True)
        sync(folder)
    return True


def clear_leftovers(run: Path) -> None:
    """Remove what saves and removals that were killed have left; only one save runs at a time, by the run's lock."""
    for leftover in (run / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_shard(path: Path, tensors: dict[str, Tensor], slices: dict[str, list]) -> dict[str, Any]:
    """One file of tensors, on disk when this returns; its entry in the manifest."""
    write_tensors(tensors, path, {"slices": json.dumps(slices)})
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def commit(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    _write_manifest(staging / "manifest.json", manifest)
    sync(staging)
    if final.exists():  # a broken one that a resume passed over
        remove(final)
    staging.rename(final)
    sync(final.parent)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    path.write_text(json.dumps(manifest | {"sha256": _manifest_checksum(manifest)}, indent=1))
    sync(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows it half there: hide it first."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_read(path: Path, error: OSError) -> CheckpointError:
    """What is missing, or a folder where a file should be, stays so; another error of the file system may pass."""
    kind = CheckpointError if isinstance(error, FileNotFoundError | IsADirectoryError) else UnreadableError
    return kind(f"{path}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
