"""Processes and the engine: Accelerate for the process and device state, DeepSpeed for the sharded step.

Accelerate's wrappers of DeepSpeed, loaders and schedulers are not used: they step inside `backward`, look one batch
ahead into reused buffers, and step schedules once per rank. docs/architecture.md has the reasons.
"""

import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from automix_dist.config import Config, ConfigError, EngineConfig


@dataclass(frozen=True)
class Process:
    """This process among all others of the run."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control: Any
    """A gloo group for small host-side messages that must not wait for the GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, a small picklable object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def resolve_device(engine: EngineConfig) -> str:
    """ "cuda" or "cpu". Raises ConfigError if a GPU is asked for and there is none."""
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device = 'cuda', but torch sees no GPU here: set engine.device=cpu, or check the "
            "driver with `automix doctor`"
        )
    device = "cuda" if engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    if engine.kernels == "triton" and device == "cpu":
        raise ConfigError("engine.kernels = 'triton' needs a GPU and there is none here: set engine.kernels=reference")
    return device


def autocast_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[engine.precision]


def start(engine: EngineConfig) -> Process:
    """Join the processes that a launcher started, or be the only one. Sets what users should not have to set:
    DeepSpeed's accelerator, gloo's interface, thread counts. Call once, before the first collective.
    """
    device = resolve_device(engine)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if world_size > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        _name_gloo_interface(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    threads = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

    from accelerate import PartialState

    timeout = timedelta(minutes=engine.timeout_minutes)
    state = PartialState(cpu=device == "cpu", timeout=timeout)
    if not dist.is_initialized():  # a single process: a store in memory needs no port
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; Accelerate takes it for a launcher's
    return Process(
        rank=state.process_index,
        local_rank=max(state.local_process_index, 0),
        world_size=state.num_processes,
        local_world_size=local_world_size,
        device=state.device,
        control=dist.new_group(backend="gloo", timeout=timeout),
    )


def finish() -> None:
    """Leave the process group; without it torch warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _name_gloo_interface(master: str) -> None:
    """Tell gloo the interface that reaches the master: by default it takes the one of the host's name, which often
    resolves to loopback, and the other hosts then wait for their timeout."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # no packet is sent; the kernel only picks a route
            address = probe.getsockname()[0]
    except OSError:
        return  # not reachable by IPv4: gloo's own choice, and its own message
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
    if ipaddress.ip_address(address).is_loopback:  # 127.0.1.1 and the like belong to no entry of their own
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def deepspeed_settings(config: Config, world_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from the one config; nothing that it would default is left out.

    Its own bf16 block stays off: it breaks BatchNorm and loses the momentum update; the model autocasts itself.
    """
    engine = config.engine
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": engine.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": device.type == "cuda" and engine.zero_stage > 0,
            "contiguous_gradients": True,
            "reduce_bucket_size": engine.bucket_size,
            "allgather_bucket_size": engine.bucket_size,
            "stage3_prefetch_bucket_size": engine.bucket_size,
            # Norms and biases stay whole: gathering hundreds of tiny tensors per pass costs more than they weigh.
            "stage3_param_persistence_threshold": 10_000,
            "stage3_model_persistence_threshold": 2**62,
        },
    }


def build_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, process: Process):
    """A DeepSpeedEngine around the model, whose weights are laid out contiguously: channels-last ones crash DeepSpeed
    0.19, and convolutions take channels-last images with contiguous weights."""
    import logging

    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Used by inference only, but compiled for a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model.to(memory_format=torch.contiguous_format),
        optimizer=optimizer,
        model_parameters=[p for group in optimizer.param_groups for p in group["params"]],
        config=deepspeed_settings(config, process.world_size, process.device),
        dist_init_required=False,
    )
    return engine


@contextlib.contextmanager
def averaged_statistics(model: nn.Module, process: Process) -> Iterator[None]:
    """Within the block, BatchNorm's running statistics are the mean over ranks, so that every rank evaluates the same
    model. Afterwards each rank has its own again: training never depends on when it was evaluated."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    own = [b.clone() for b in buffers]
    try:
        if process.world_size > 1 and buffers:
            flat = process.sum(torch.cat([b.flatten() for b in buffers])) / process.world_size
            for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))
        yield
    finally:
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)


class StopRequest:
    """Ctrl-C, SIGTERM or SIGUSR1 asks all ranks to stop after the same step.

    A handler only notes the signal; `agreed` spreads it. A second signal ends the process at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, process: Process, say: Callable[[str], None]):
        self._process = process
        self._say = say
        self._signal = 0
        self._agreed = 0
        self._pending: tuple[Any, Tensor] | None = None
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, _frame: Any) -> None:
        self._signal = number
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._say(f"{signal.Signals(number).name}: stopping after this step, then saving (again: quit at once)")

    def agreed(self) -> int:
        """The signal that any rank has received, or 0: the same answer on every rank in the same call.

        Call it equally often on all ranks. The exchange of one call is awaited in the next, so it costs no waiting.
        """
        if self._process.world_size == 1:
            return self._signal
        if self._pending is not None:
            work, noted = self._pending
            work.wait()
            self._agreed = max(self._agreed, int(noted))
        noted = torch.tensor(self._signal)
        self._pending = (dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._process.control, async_op=True), noted)
        return self._agreed

    def close(self) -> None:
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
