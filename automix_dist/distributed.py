"""The processes of a run: who they are, how they talk, how they stop together. Accelerate gives their state."""

import contextlib
import glob
import hashlib
import ipaddress
import json
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automix_dist.config import Config, ConfigError, EngineConfig
from automix_dist.cores import cores_of_rank
from automix_dist.errors import EXIT_STOPPED
from automix_dist.progress import Progress

CHANNEL_TIMEOUT = timedelta(hours=12)
"""Of a thread's own group: a disk may keep a rank longer than a collective of the training may take, and a rank that is
gone is the heartbeat's business."""


@dataclass(frozen=True)
class Process:
    """This process among all others of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any
    """A gloo group for small host-side messages that must not wait for the GPU."""
    progress: Progress = field(default_factory=Progress)
    """Where the main thread stands, for the heartbeat."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def channel(self) -> "Process":
        """The same processes with a control group of their own, for another thread."""
        return replace(self, control=dist.new_group(backend="gloo", timeout=CHANNEL_TIMEOUT))

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

    def agree(self, settings: dict[str, Any]) -> None:
        """Raise ConfigError unless all ranks have the same settings: they may have read different files."""
        text = json.dumps(settings, sort_keys=True, default=str)
        if len(set(self.gather(hashlib.sha256(text.encode()).hexdigest()))) == 1:
            return
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            for key in sorted(first.keys() | other.keys()):
                if first.get(key) != other.get(key):
                    values = f"{other.get(key)!r} and rank 0 {first.get(key)!r}"
                    raise ConfigError(f"rank {rank} has {key} = {values}: give all nodes the same config and data")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


NVIDIA_DEVICES = "/dev/nvidia[0-9]*"


def why_no_gpu() -> tuple[str, str]:
    """Why torch sees no GPU on a host that has one, and what to do about it."""
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "torch is a CPU build", "install torch from the package index"
    return (
        f"torch was built for CUDA {built} and finds no usable GPU",
        f"update the driver to one for CUDA {built}, or install a torch built for this driver",
    )


def resolve_device(engine: EngineConfig) -> str:
    """ "cuda" or "cpu". Raises ConfigError if a GPU is asked for and there is none, or if the choice is free and torch
    cannot use the GPU that is there: a training on the CPU by accident is noticed late."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if engine.device == "auto" and not torch.cuda.is_available() and not hidden and glob.glob(NVIDIA_DEVICES):
        reason, remedy = why_no_gpu()
        raise ConfigError(
            f"engine.device = 'auto', and this host has an NVIDIA GPU that cannot be used: {reason}; {remedy}, or set "
            f"engine.device=cpu (CUDA_VISIBLE_DEVICES=-1 where a run says auto) for the CPU"
        )
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device = 'cuda', but torch sees no GPU here: set engine.device=cpu, or check the "
            "driver with `automix doctor`"
        )
    device = "cuda" if engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    if engine.kernels == "triton" and device == "cpu":
        raise ConfigError("engine.kernels = 'triton' needs a GPU and there is none here: set engine.kernels=reference")
    if engine.kernels == "triton":
        from automix_kernels.api import device_obstacle  # slow to import, and few ask for it by name

        if obstacle := device_obstacle(torch.device(device)):
            raise ConfigError(f"engine.kernels = 'triton' cannot run: {obstacle}; set engine.kernels=auto")
    return device


def for_this_machine(config: Config) -> Config:
    """A run's settings for another machine, which may lack the GPU that the run asked for."""
    device, kernels = config.engine.device, config.engine.kernels
    engine = replace(
        config.engine,
        device="auto" if device == "cuda" else device,
        kernels="auto" if kernels == "triton" else kernels,
    )
    return replace(config, engine=engine)


def _threads() -> int:
    """For this rank's operations on the CPU: what OMP_NUM_THREADS says, else its share of the cores it may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    launched = "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if asked.isdecimal() and int(asked) > launched:  # 1 is what torchrun and accelerate set by themselves
        return int(asked)
    return cores_of_rank()


def launched_ranks() -> int:
    """How many ranks a launcher has started, by the environment; 1 without one. Raises ConfigError for half of one."""
    numbers = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise ConfigError(f"the environment has {name} = {value!r}: expected a whole number, as launchers set it")
    world_size = int(numbers.get("WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise ConfigError(
            f"the environment has WORLD_SIZE = {world_size}, but not {', '.join(missing)}: start with a launcher "
            f"(launch/*.sh, torchrun), or unset WORLD_SIZE for a single process"
        )
    return world_size


def _set_up_torch(engine: EngineConfig) -> None:
    """This process's threads, and which algorithms its operations may choose."""
    threads = _threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = not engine.deterministic
    torch.backends.cudnn.allow_tf32 = engine.precision != "float32"
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be so; read at its start
        torch.use_deterministic_algorithms(True)


def start(engine: EngineConfig) -> Process:
    """Join the processes that a launcher started, or be the only one. Sets what users should not have to set:
    DeepSpeed's accelerator, gloo's interface, threads, cuDNN. Call once, before the first collective.
    """
    device = resolve_device(engine)
    world_size = launched_ranks()
    if world_size == 1 and "MASTER_ADDR" not in os.environ:  # `accelerate launch` of one process says half of it
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if world_size > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        _name_gloo_interface(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    _set_up_torch(engine)

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
        device=state.device,
        control=dist.new_group(backend="gloo", timeout=timeout),
        progress=Progress(on_gpu=device == "cuda"),
    )


def finish() -> None:
    """Leave the process group; without it torch warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def address_towards(master: str) -> str | None:
    """The IPv4 address that this host has on the way to another; None if there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # no packet is sent; the kernel only picks a route
            return probe.getsockname()[0]
    except OSError:
        return None


def _name_gloo_interface(master: str) -> None:
    """Tell gloo the interface that reaches the master: by default it takes the one of the host's name, which often
    resolves to loopback, and the other hosts then wait for their timeout."""
    import psutil

    address = address_towards(master)
    if address is None:
        return  # not reachable by IPv4: gloo's own choice, and its own message
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
    if ipaddress.ip_address(address).is_loopback:  # 127.0.1.1 and the like belong to no entry of their own
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _job_start() -> float:
    """When this process began; under launch/*.sh when the job did, whose ranks may have been started again since."""
    import psutil

    began = psutil.Process().create_time()
    job = re.match(r"(\d{10})-", os.environ.get("AUTOMIX_JOB", ""))  # date +%s, then what makes it unique
    return min(began, float(job[1])) if job else began


SAME_STOP_SECONDS = 2.0
"""Launchers often signal a process and its group, or signal twice: within this time it is one request."""

RANKS_A_CALL = 64
"""Over so many ranks an exchange of gloo's is taken to come within a step: some tens of microseconds a rank, twice."""


class StopRequest:
    """Ctrl-C, SIGTERM, SIGUSR1, a terminal that is closed (SIGHUP, unless ignored, as under nohup) or a time limit asks
    all ranks to stop after the same step.

    A handler only notes the signal; `agreed` spreads it. The same signal again ends the process at once; another one
    does not, as a scheduler sends SIGUSR1 first and SIGTERM after it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, process: Process, say: Callable[[str], None], minutes: float = 0.0):
        """`minutes` is the time limit, counted from the start of the job; 0 = none. It is told as SIGALRM."""
        self._process = process
        self._say = say
        self._deadline = time.monotonic() + _job_start() - time.time() + 60 * minutes if minutes else math.inf
        self._signal = 0
        self._noted: dict[int, float] = {}  # when each signal came first
        self._agreed = 0
        self._calls = 0
        self._pending: tuple[Any, Tensor] | None = None
        self._interrupt = signal.getsignal(signal.SIGINT)
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if number in self._noted:
            if now - self._noted[number] > SAME_STOP_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if not self._noted:
            self._signal = number
            self._say(f"{signal.Signals(number).name}: stopping after this step, then saving (again: quit at once)")
        self._noted[number] = now

    def agreed(self) -> int:
        """The signal that any rank has received, or 0: the same answer on every rank in the same call.

        Call it equally often on all ranks. The exchange that one call begins is awaited in a later one. gloo passes a
        number from rank to rank, so the more there are, the more calls one exchange is for.
        """
        if not self._signal and time.monotonic() > self._deadline:
            self._signal = signal.SIGALRM
            self._say("the time limit is reached: stopping after this step, then saving")
        if self._process.world_size == 1:
            return self._signal
        self._calls += 1
        if self._calls % max(1, self._process.world_size // RANKS_A_CALL):
            return self._agreed
        if self._pending is not None:
            work, noted = self._pending
            work.wait()
            self._agreed = max(self._agreed, int(noted))
        noted = torch.tensor(self._signal)
        self._pending = (dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._process.control, async_op=True), noted)
        return self._agreed

    def nothing_to_lose(self) -> None:
        """All is saved: from `close` on, Ctrl-C ends the process as stopped, whatever it still waits for."""
        self._interrupt = lambda *_: os._exit(EXIT_STOPPED)

    def close(self) -> None:
        """Training is over. A launcher's signal that comes now, when this rank has stopped by agreement already, must
        not spoil its exit code; Ctrl-C works again."""
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # another rank is gone: an error is on its way up, or the next one
                self._pending[0].wait()
            self._pending = None
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN if number != signal.SIGINT else self._interrupt)
