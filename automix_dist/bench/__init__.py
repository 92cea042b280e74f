"""Benchmarks, one subject a file; `automix bench NAME` runs them. Here is what their commands share."""

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from automix_dist import provenance
from automix_dist.whole_file import write_whole

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"}, "zero0": {"zero_stage": 0}, "zero1": {"zero_stage": 1}, "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3}, "fsdp2": {"name": "fsdp2"},
}  # fmt: skip
"""The section `engine` of each engine, by the name that Engine.name has."""


def results_folder(text: str) -> Path:
    """The value of an option --out: a folder, made before anything is measured in vain."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return folder


def write_results(folder: Path, name: str, result: dict[str, Any], text: str, drawing: str = "") -> None:
    """The numbers and the code's revision as NAME.json, what people read as NAME.md and NAME.svg. Raises OSError."""
    write_whole(folder / f"{name}.json", json.dumps({"commit": provenance.commit(), **result}, indent=1) + "\n")
    write_whole(folder / f"{name}.md", text)
    if drawing:
        write_whole(folder / f"{name}.svg", drawing)


def cpu_name() -> str:
    """What the processor calls itself; elsewhere than on Linux its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return model[1] if model else platform.machine()


def check_counts(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """End the command with a message if an option that is set is less than it may be, or if there are GPUs, but not one
    for each of `--ranks`."""
    for name, lowest in least.items():
        if getattr(options, name) is not None and getattr(options, name) < lowest:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {lowest} or more")
    gpus = torch.cuda.device_count()
    if "ranks" in least and 0 < gpus < options.ranks:
        parser.error(
            f"--ranks {options.ranks}: one GPU each, and there are {gpus}; on the CPU: "
            f"CUDA_VISIBLE_DEVICES= {parser.prog} --ranks {options.ranks}"
        )


def run_on_ranks(name: str, arguments: list[str], ranks: int) -> int:
    """Start `automix bench NAME` in so many processes of this machine, which find WORLD_SIZE set; their exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "automix_dist", "bench", name, *arguments]
    return subprocess.run(command, check=False).returncode


def describe_machine() -> dict[str, Any]:
    """What a measurement depends on besides the code: device, versions, load, date."""
    about = provenance.environment()
    device = about["gpus"][0] if about["gpus"] else f"CPU, {torch.get_num_threads()} threads, {cpu_name()}"
    return {
        "device": device,
        "versions": {k: about["versions"][k] for k in ("torch", "triton", "timm")} | {"python": about["python"]},
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
    }


class Clock:
    """Times between marks on the device's own line of work: events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def spans(self) -> list[tuple[str, float]]:
        """For each mark but the first its name and the milliseconds since the one before."""
        if self.device.type != "cuda":
            return [(name, (end - start) * 1e3) for (_, start), (name, end) in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [(name, start.elapsed_time(end)) for (_, start), (name, end) in pairwise(self.marks)]

    def milliseconds(self) -> dict[str, float]:
        """Sums of the spans by name."""
        sums: dict[str, float] = {}
        for name, ms in self.spans():
            sums[name] = sums.get(name, 0.0) + ms
        return sums


@contextlib.contextmanager
def replaced(owner: Any, attribute: str, value: Callable) -> Iterator[None]:
    """Within the block, the owner's attribute is another one."""
    own = vars(owner).get(attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        delattr(owner, attribute) if own is None else setattr(owner, attribute, own)
