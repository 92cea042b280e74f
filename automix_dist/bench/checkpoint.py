"""`automix bench checkpoint`: seconds and bytes of saving and restoring a run's state, beside the alternatives.

The same live tensors of a real engine (weights, optimizer state, momentum encoder, BatchNorm statistics) go through
ours, `torch.save` and `torch.distributed.checkpoint`, in turns, to the same folder. "stall" is how long training would
stand still, "written" when the state is on disk. Ours and `torch.save` end with fsync; ours also hashes every file,
checks the hashes before it restores, and ends with a rename that makes the checkpoint visible.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from automix_dist import distributed
from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone
from automix_dist.bench import ENGINES, check_counts, cpu_name, results_folder, run_on_ranks, write_results
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import step_folder, verify
from automix_dist.config import CheckpointConfig
from automix_dist.config_file import from_dict
from automix_dist.engine_state import pieces
from automix_dist.engines import Engine, build_engine
from automix_dist.optimizer import build_optimizer


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="automix bench checkpoint", description=__doc__)
    parser.add_argument("--backbone", default="resnet50", help="a timm model (default: resnet50)")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--engine", choices=ENGINES, default="zero2")
    ranks = torch.cuda.device_count() or 2
    parser.add_argument("--ranks", type=int, default=ranks, help="processes (default: one per GPU; two on the CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--out", type=results_folder, help="folder for checkpoint.json and checkpoint.md")
    options = parser.parse_args(arguments)
    check_counts(parser, options, ranks=1, rounds=1)
    if "WORLD_SIZE" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="automix-bench-", dir=options.folder) as folder:
            return run_on_ranks("checkpoint", [*arguments, "--folder", folder], options.ranks)
    if options.folder is None:
        parser.error("--folder FOLDER is needed under a launcher: all ranks share it")
    config = from_dict(
        {
            "batch_size": 2 * options.ranks,
            "model": {"backbone": options.backbone},
            "engine": ENGINES[options.engine],
            "optimizer": {"name": options.optimizer},
        }
    )
    process = distributed.start(config.engine)
    backbone = create_backbone(config.model, config.automix.feature, 224)
    model = AutoMix(backbone, 1000, config.automix).to(process.device)
    engine = build_engine(model, build_optimizer(model, config.optimizer), config, process)
    rows = measure(engine, process, options.folder, options.rounds)
    distributed.finish()
    if not process.is_main:
        return 0
    about = {
        "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "cores": os.cpu_count(),
        "machine": cpu_name(), "backbone": options.backbone, "optimizer": options.optimizer,
        "engine": options.engine, "ranks": options.ranks, "rounds": options.rounds,
    }  # fmt: skip
    text = markdown(about, rows)
    print(text)
    if options.out:
        write_results(options.out, "checkpoint", about | {"rows": rows}, f"{__doc__.strip()}\n\n{text}\n")
    return 0


def measure(engine: Engine, process: distributed.Process, folder: Path, rounds: int) -> list[dict]:
    """Medians over rounds, the slowest rank of each, for every way: what `markdown` shows."""
    ways = [
        Ours(engine, process, folder / "ours"),
        TorchSave(engine, process, folder / "torch_save"),
        Distributed(engine, process, folder / "distributed"),
    ]
    samples: list[dict[str, list[float]]] = [{"stall": [], "written": [], "restored": []} for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, samples, strict=True):
            if process.is_main:
                shutil.rmtree(way.folder, ignore_errors=True)
                way.folder.mkdir(parents=True)
            process.barrier()
            began = time.perf_counter()
            wait = way.save()
            stall = time.perf_counter() - began
            wait()
            written = time.perf_counter() - began
            process.barrier()
            began = time.perf_counter()
            way.restore()
            restored = time.perf_counter() - began
            slowest = (max(each) for each in zip(*process.gather((stall, written, restored)), strict=True))
            for name, value in zip(times, slowest, strict=True):
                times[name].append(value)
    sizes = [sum(p.stat().st_size for p in way.folder.rglob("*") if p.is_file()) for way in ways]
    return [
        {"way": way.name, "bytes": size} | {k: statistics.median(v) for k, v in times.items()} | {"samples": times}
        for way, size, times in zip(ways, sizes, samples, strict=True)
    ]


class Way:
    """One way to save and restore: `save` returns what waits until all is on disk."""

    name: str

    def __init__(self, engine: Engine, process: distributed.Process, folder: Path):
        self.engine, self.process, self.folder = engine, process, folder
        own = pieces(engine, process.rank, process.world_size)
        self.views: dict[str, Tensor] = {p.name: p.view for p in own if p.save}

    def save(self) -> Callable[[], None]:
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError


class Ours(Way):
    name = "ours"

    def __init__(self, engine: Engine, process: distributed.Process, folder: Path):
        super().__init__(engine, process, folder)
        self.checkpoints = Checkpoints(folder, CheckpointConfig(), process, print)

    def save(self) -> Callable[[], None]:
        self.checkpoints.save(self.engine, {"step": 1}, {})

        def wait() -> None:
            if not self.checkpoints.wait():
                raise RuntimeError("the checkpoint could not be written")

        return wait

    def restore(self) -> None:
        self.checkpoints.load(self.engine, verify(step_folder(self.folder, 1)))


class TorchSave(Way):
    """A file per rank of the same tensors, with fsync."""

    name = "torch.save, a file per rank"

    def save(self) -> Callable[[], None]:
        with open(self._path, "wb") as file:
            torch.save(self.views, file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    def restore(self) -> None:
        loaded = torch.load(self._path, map_location=self.process.device.type, weights_only=True)
        for name, view in self.views.items():
            view.copy_(loaded[name])

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.process.rank}.pt"


class Distributed(Way):
    """torch.distributed.checkpoint of the same tensors, each under its rank's own key."""

    name = "torch.distributed.checkpoint"

    def save(self) -> Callable[[], None]:
        dcp.save(self._state(), checkpoint_id=self.folder, process_group=self.process.control)
        return lambda: None

    def restore(self) -> None:
        dcp.load(self._state(), checkpoint_id=self.folder, process_group=self.process.control)

    def _state(self) -> dict[str, Tensor]:
        return {f"{self.process.rank}/{name}": view for name, view in self.views.items()}


def markdown(about: dict, rows: list[dict]) -> str:
    lines = [
        f"{about['backbone']}, {about['optimizer']}, {about['engine']}, {about['ranks']} ranks, median of "
        f"{about['rounds']} rounds; PyTorch {about['torch']}, {about['cores']} CPU cores, {about['date']}.",
        "",
        "| | stall, s | written, s | restored, s | MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{row[name]:.2f}" for name in ("stall", "written", "restored"))
        lines.append(f"| {row['way']} | {times} | {row['bytes'] / 2**20:,.0f} |")
    return "\n".join(lines)
