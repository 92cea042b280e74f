"""Runs functions and the command `automix` on real processes, as a launcher would, without a start's seconds:
every process is a fork of one that has imported everything."""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

# DeepSpeed settles on its accelerator when it is imported, in the server.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "torch", "torch._dynamo", "deepspeed", "timm", "accelerate", "automix_dist.run", "automix_dist.augment",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which ZeRO imports at its start, and Inductor with it
])  # fmt: skip


def own_process(target: Callable, *arguments: Any) -> multiprocessing.Process:
    """A process for a function, not yet started."""
    with mock.patch.dict(os.environ, ON_CPU):  # in which the first call starts the server
        forkserver.ensure_running()
    return _CONTEXT.Process(target=target, args=arguments, daemon=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(world_size: int, function: Callable, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Call `function(*arguments)` on every rank; the results by rank. A rank's exception is raised here."""
    port = free_port()
    queue = _CONTEXT.Queue()
    ranks = [own_process(_rank, rank, world_size, port, queue, function, arguments) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        results = {}
        for _ in ranks:
            rank, result, error = queue.get(timeout=timeout)
            if error:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{error}")
            results[rank] = pickle.loads(result)
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()


def _rank(rank: int, world_size: int, port: int, queue, function: Callable, arguments: tuple) -> None:
    os.environ |= rank_environment(rank, world_size, port) | ON_CPU
    try:
        # As bytes: a tensor in a queue is a handle that dies with its process.
        queue.put((rank, pickle.dumps(function(*arguments)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Command:
    """`automix ARGUMENTS` in a folder on one process or several ranks, started at once; `errors` is what they write to
    stderr."""

    def __init__(self, *arguments: str | Path, ranks: int = 1, folder: Path = ROOT):
        self.arguments = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory()
        self._files = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        port = free_port()
        environments = [rank_environment(rank, ranks, port) if ranks > 1 else {} for rank in range(ranks)]
        self.processes = [own_process(_command, self.arguments, folder, e, *self._files) for e in environments]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its end, with the first exit code that is not 0; what still runs after `timeout` seconds is killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.running():
            for process in self.processes:
                process.kill()
            raise AssertionError(f"automix {self.arguments} still ran after {timeout} s\n{self._written(1)}")
        code = next((process.exitcode for process in self.processes if process.exitcode), 0)
        return subprocess.CompletedProcess(self.arguments, code, *map(self._written, (0, 1)))

    def _written(self, which: int) -> str:
        path = Path(self._files[which])
        return path.read_text() if path.exists() else ""


def run(*arguments: str | Path, ranks: int = 1, code: int = 0, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """`automix ARGUMENTS` in a folder to its end, which is to have this exit code."""
    result = Command(*arguments, ranks=ranks, folder=folder).wait()
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def records(folder: Path, kind: str) -> list[dict]:
    """A run's log: the records of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _command(arguments: list[str], folder: Path, environment: dict[str, str], *files: str) -> None:
    for number, path in enumerate(files, start=1):
        sys.stderr.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.chdir(folder)
    os.environ |= environment
    sys.argv = ["automix", *arguments]
    if environment:
        import torch

        torch.set_num_threads(1)  # as torchrun's ranks have
    from automix_dist.cli import main

    main(arguments)
