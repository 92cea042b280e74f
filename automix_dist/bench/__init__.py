"""Benchmarks, one subject a file; `automix bench NAME` runs them. Here is what their commands share."""

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from automix_dist.whole_file import write_whole


def results_folder(text: str) -> Path:
    """The value of an option --out: a folder, made before anything is measured in vain."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return folder


def write_results(folder: Path, name: str, result: dict[str, Any], text: str, drawing: str = "") -> None:
    """The numbers as NAME.json, and what people read as NAME.md and NAME.svg. Raises OSError."""
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
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
