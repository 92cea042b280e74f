"""Runs a function on several real processes joined by gloo, as a launcher would, and returns what each returned."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest import mock

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

# The server process imports the heavy packages once; every rank is a fork of it. DeepSpeed settles on its accelerator
# when it is imported.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "deepspeed", "timm", "accelerate", "automix_dist.trainer"])


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
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **ON_CPU,
    }
    try:
        # As bytes: a tensor in a queue is a handle that dies with its process.
        queue.put((rank, pickle.dumps(function(*arguments)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
