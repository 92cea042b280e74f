"""Benchmarks, one subject a file; `automix bench NAME` runs them."""

import argparse

import torch


def check_counts(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """End the command with a message if an option is less than it may be, or if there are GPUs, but not one for each of
    `--ranks`."""
    for name, lowest in least.items():
        if getattr(options, name) < lowest:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {lowest} or more")
    gpus = torch.cuda.device_count()
    if "ranks" in least and 0 < gpus < options.ranks:
        parser.error(
            f"--ranks {options.ranks}: one GPU each, and there are {gpus}; on the CPU: "
            f"CUDA_VISIBLE_DEVICES= {parser.prog} --ranks {options.ranks}"
        )
