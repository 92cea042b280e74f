"""`automix doctor --all-ranks`: all hosts of a job and the network between them, looked at before a training.

Runs under any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The ranks report through the store of
torch.distributed, so that there is a table even where no collective works; every wait has a limit, and rank 0 names the
ranks that did not come. Bandwidths are payload: all-reduce and all-gather as bus bandwidth (what each rank's link
carries), pairs one way.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from automix_dist import distributed
from automix_dist.config import Config, EngineConfig
from automix_dist.distributed import Process
from automix_dist.doctor import PACKAGES, Check, diagnose, print_table
from automix_dist.errors import AutomixError, first_line

PAYLOAD = {"cuda": 64 << 20, "cpu": 8 << 20}  # bytes
MATMUL = {"cuda": 8192, "cpu": 768}
SLOW = 0.5
"""Below this share of the median of its kind, a pair or a rank is reported as slow."""
SLOW_LINK = 0.3
"""Below this share of the interface's speed, the link between two hosts is reported."""
CLOCK_SECONDS = 1.0
MOST_KINDS = 4
MOST_PAIRED = 64
"""With more ranks than this, only one per host is paired."""


class PreflightError(AutomixError, RuntimeError):
    """This rank cannot take part; one message for the user."""


@dataclass(frozen=True)
class Seat:
    """This process as its launcher describes it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: str
    port: int

    @property
    def host(self) -> str:
        """This host's name with the address that it has towards the master: containers often share a name."""
        return f"{socket.gethostname()} ({distributed.address_towards(self.master) or 'no address'})"


def run(config: Config | None, seconds: float) -> int:
    """Called by every rank; rank 0 prints the table. The exit code, the same on all ranks that can talk.

    Raises PreflightError on a rank that does not reach the master within `seconds`.
    """
    try:
        code = _look(config, seconds)
    except dist.DistError as error:
        raise PreflightError(f"the store of rank 0 is gone: read what rank 0 printed ({first_line(error)})") from error
    if dist.is_initialized():  # a collective has failed or hangs: to leave in good order would wait for it
        sys.stdout.flush()
        os._exit(code)
    return code


def _look(config: Config | None, seconds: float) -> int:
    seat = _seat()
    store = _meet(seat, seconds)
    first_of_host = seat.local_rank == 0
    report = {"host": seat.host, "first": first_of_host, "link": link_speed()}
    report["checks"] = [asdict(check) for check in diagnose(config)] if first_of_host else []
    store.set(f"machine/{seat.rank}", json.dumps(report))
    if seat.rank:
        return _follow(store, seat, seconds)
    reports = _collect(store, "machine", seat.world_size, seconds)
    checks = merge({r["host"]: [Check(**check) for check in r["checks"]] for r in reports.values() if r["first"]})
    checks += [_attendance(reports, seat), *_loopback(reports, seat)]
    complete = len(reports) == seat.world_size
    store.set("go", "1" if complete else "0")
    if complete:
        _report_network(store, seat, seconds)
        network = _collect(store, "network", seat.world_size, 4 * seconds)
        checks += judge_network(network, reports)
    code = print_table(checks)
    store.set("code", str(code))
    _collect(store, "read", seat.world_size, min(seconds, 5.0) if complete else 1.0)  # before the store ends with us
    return code


def _seat() -> Seat:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PreflightError(
            f"--all-ranks needs a launcher: {', '.join(missing)} not set; for example "
            f"`torchrun --nproc-per-node=8 -m automix_dist doctor --all-ranks`, or without --all-ranks for this machine"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    local_rank = int(os.environ.get("LOCAL_RANK", rank % local_world_size))
    return Seat(
        rank, world_size, local_rank, local_world_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    )


def _meet(seat: Seat, seconds: float) -> dist.Store:
    """The store at the master's port: torchrun's, or one that rank 0 opens."""
    opens = seat.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            seat.master,
            seat.port,
            is_master=opens,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        try:
            address = socket.getaddrinfo(seat.master, seat.port, type=socket.SOCK_STREAM)[0][4][0]
        except OSError:
            address = "no address"
        raise PreflightError(
            f"rank {seat.rank} on {seat.host} cannot {'open' if opens else 'reach'} the master's port within "
            f"{seconds:.0f} s: MASTER_ADDR = {seat.master} ({address}), MASTER_PORT = {seat.port}; is rank 0 there, "
            f"the way to it free, and the port open in the firewall? ({first_line(error)})"
        ) from error
    return dist.PrefixStore("preflight", store)


def _follow(store: dist.Store, seat: Seat, seconds: float) -> int:
    """What every rank but the first does once it has reported."""
    if not _appears(store, "go", 2 * seconds):
        raise PreflightError(f"rank {seat.rank} on {seat.host} reached rank 0, which then fell silent")
    if store.get("go") == b"1":
        _report_network(store, seat, seconds)
    code = int(store.get("code")) if _appears(store, "code", 5 * seconds) else 1
    store.set(f"read/{seat.rank}", "1")
    return code


def _report_network(store: dist.Store, seat: Seat, seconds: float) -> None:
    """Join the others as a training does, measure, and leave the result or the reason why not.

    In a thread, which is given up if it hangs: NCCL and torch.cuda.synchronize() wait for a lost partner for ever.
    """
    outcome: Future[dict[str, Any]] = Future()

    def join() -> None:
        try:
            process = distributed.start(EngineConfig(timeout_minutes=seconds / 60))
            measured = measure(process)
            distributed.finish()
            outcome.set_result(measured)
        except Exception as error:
            outcome.set_exception(error)

    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else its watchdog ends the ranks before the table
    threading.Thread(target=join, name="network", daemon=True).start()
    try:
        result = outcome.result(3 * seconds)
    except TimeoutError:
        result = {"error": f"hangs: not measured within {3 * seconds:.0f} s"}
    except Exception as error:
        result = {"error": first_line(error)}
    store.set(f"network/{seat.rank}", json.dumps(result))


def _appears(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether a key appears in time; asked again and again, for a store that waits cannot be interrupted."""
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _collect(store: dist.Store, kind: str, world_size: int, seconds: float) -> dict[int, Any]:
    """What the ranks have reported within the time, by rank."""
    deadline = time.monotonic() + seconds
    return {
        rank: json.loads(store.get(f"{kind}/{rank}"))
        for rank in range(world_size)
        if _appears(store, f"{kind}/{rank}", max(deadline - time.monotonic(), 0))
    }


def _attendance(reports: dict[int, dict], seat: Seat) -> Check:
    hosts = sorted({report["host"] for report in reports.values()})
    missing = [rank for rank in range(seat.world_size) if rank not in reports]
    if not missing:
        found = f"all {seat.world_size} on {len(hosts)} host(s) reached {seat.master}:{seat.port}"
        return Check("ranks", "ok", found)
    nodes = {rank // seat.local_world_size: f"node {rank // seat.local_world_size}" for rank in missing}
    named = dict(enumerate(_slurm_hosts()))
    named |= {rank // seat.local_world_size: report["host"] for rank, report in reports.items()}
    where = [named.get(node, name) for node, name in nodes.items()]
    return Check(
        "ranks",
        "fail",
        f"{', '.join(map(str, missing))} of {seat.world_size} did not come: {', '.join(where)}; present: "
        f"{', '.join(hosts)}",
        f"start them by hand there and read what they print; they must reach {seat.master}:{seat.port}",
    )


def _slurm_hosts() -> list[str]:
    """The job's hosts in the order of their ranks, where Slurm started it."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    try:
        command = ["scontrol", "show", "hostnames", nodes or ""]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def _loopback(reports: dict[int, dict], seat: Seat) -> list[Check]:
    """With several hosts, an address that means "myself" cannot be the meeting point."""
    hosts = {report["host"] for report in reports.values()}
    looped = sorted(host for host in hosts if "(127." in host)
    if len(hosts) < 2 or not looped:
        return []
    mend = "set MASTER_ADDR to an address that all hosts reach, and take this host's name off 127.0.x.1 in /etc/hosts"
    return [Check("master address", "fail", f"{seat.master} is loopback on {', '.join(looped)}", mend)]


def merge(by_host: dict[str, list[Check]]) -> list[Check]:
    """One table of several hosts: a row for what they have in common, a row for each kind where they differ."""
    merged = []
    for name in dict.fromkeys(check.name for checks in by_host.values() for check in checks):
        kinds: dict[Check, list[str]] = defaultdict(list)
        for host, checks in by_host.items():
            for check in checks:
                if check.name == name:
                    kinds[check].append(host)
        if len(kinds) == 1 and len(by_host) > 1:
            (check,) = kinds
            merged.append(Check(name, check.status, f"{check.found} (all {len(by_host)} hosts)", check.mend))
            continue
        must_agree = len(kinds) > 1 and (name in (*PACKAGES, "Python") or name.startswith("data."))
        good = [check.found for check in kinds if check.status == "ok"]
        if len(good) > MOST_KINDS and not must_agree:  # what differs on every host, as its name does
            shown = "; ".join(good[:MOST_KINDS])
            merged.append(Check(name, "ok", f"{shown}; ... ({len(good)} kinds)"))
            kinds = {check: hosts for check, hosts in kinds.items() if check.status != "ok"}
        for check, hosts in kinds.items():
            found, where = check.found, f"on {', '.join(hosts)}"
            if len(by_host) > 1:  # an error's message may end with what to do
                found = f"{where}: {found}" if check.status == "fail" else f"{found} {where}"
            if must_agree:
                merged.append(Check(name, "fail", found, check.mend or "make it the same on all hosts"))
            else:
                merged.append(Check(name, check.status, found, check.mend))
    return merged


def measure(process: Process) -> dict[str, Any]:
    """Clock offset to rank 0, a matrix product, collectives over all ranks and transfers between pairs, as seen by this
    rank: seconds and bytes per second."""
    device = process.device
    payload = torch.ones(PAYLOAD[device.type] // 4, device=device)
    tiny = torch.ones(1, device=device)
    shard = payload[: max(payload.numel() // process.world_size, 1024)]  # gathered by many ranks, it must fit
    gathered = torch.empty(process.world_size * shard.numel(), device=device)
    size, dtype = MATMUL[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)  # a product of ones draws less power, and is faster
    share = (process.world_size - 1) / process.world_size
    all_reduce = _seconds(process, lambda: dist.all_reduce(payload), 3)
    all_gather = _seconds(process, lambda: dist.all_gather_into_tensor(gathered, shard), 3)
    return {
        "clock": _clock_offset(process),
        "flops": 2 * size**3 / _seconds(process, lambda: matrix @ matrix, 5),
        "latency": _seconds(process, lambda: dist.all_reduce(tiny), 20),
        "all_reduce": 2 * share * payload.nbytes / all_reduce,
        "all_gather": share * gathered.nbytes / all_gather,
        "pairs": _pairs(process, payload),
    }


def _seconds(process: Process, action: Callable[[], Any], repeats: int) -> float:
    """Of one action, after a first one that is not counted."""
    action()
    process.barrier()
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def _clock_offset(process: Process) -> float:
    """This host's clock against rank 0's, in seconds, from the quickest of five exchanges."""
    offsets = []
    for rank in range(1, process.world_size):
        for _ in range(5):
            stamp = torch.zeros(1, dtype=torch.float64)
            if process.rank == rank:
                sent = time.time()
                dist.send(stamp, 0, group=process.control)
                dist.recv(stamp, 0, group=process.control)
                received = time.time()
                offsets.append((received - sent, (sent + received) / 2 - stamp.item()))
            elif process.is_main:
                dist.recv(stamp, rank, group=process.control)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), rank, group=process.control)
    return min(offsets)[1] if offsets else 0.0


def rounds(participants: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds in which nobody has two partners: a tournament by the circle method."""
    seats: list[int | None] = [*participants, *([None] if len(participants) % 2 else [])]
    played = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        played.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return played


def _pairs(process: Process, payload: torch.Tensor) -> dict[str, float]:
    """Bytes per second to each partner of a higher rank, "0-3": there and back, halved."""
    firsts = [rank for rank, local in enumerate(process.gather(process.local_rank)) if local == 0]
    participants = range(process.world_size) if process.world_size <= MOST_PAIRED else firsts
    rates = {}
    for pairs in rounds(participants):
        process.barrier()
        for low, high in pairs:
            if process.rank in (low, high):
                other = high if process.rank == low else low
                for attempt in range(2):  # the first one opens the connection
                    began = time.perf_counter()
                    for sends in (True, False) if process.rank == low else (False, True):
                        (dist.send if sends else dist.recv)(payload, other)
                    if process.device.type == "cuda":
                        torch.cuda.synchronize()
                    if attempt and process.rank == low:
                        rates[f"{low}-{high}"] = 2 * payload.nbytes / (time.perf_counter() - began)
    return rates


def link_speed() -> float | None:
    """Bytes per second of the fastest InfiniBand port, else of the interface named for gloo or NCCL, if known."""
    rates = []
    for path in Path("/sys/class/infiniband").glob("*/ports/*/rate"):
        rates.append(float(path.read_text().split()[0]) * 1e9 / 8)  # "400 Gb/sec (4X NDR)"
    name = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    if not rates and name:
        try:
            speed = int(Path(f"/sys/class/net/{name.lstrip('=^').split(',')[0]}/speed").read_text())
        except (OSError, ValueError):  # loopback and bridges have none
            return None
        rates = [speed * 1e6 / 8] if speed > 0 else []
    return max(rates, default=None)


def judge_network(network: dict[int, dict], reports: dict[int, dict]) -> list[Check]:
    """Rows for what `measure` found on each rank; `reports` give each rank's host and link."""
    host = {rank: report["host"] for rank, report in reports.items()}
    failed = {rank: network.get(rank, {"error": "no answer"}).get("error") for rank in host}
    failed = {rank: reason for rank, reason in failed.items() if reason}
    if failed:
        shown = "; ".join(f"rank {rank} on {host[rank]}: {reason}" for rank, reason in list(failed.items())[:8])
        mend = "name the interface that joins the hosts with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return [Check("collectives", "fail", shown, mend)]
    checks = []
    skew = max(network, key=lambda rank: abs(network[rank]["clock"]))
    offset = network[skew]["clock"]
    found = f"at most {abs(offset) * 1000:.1f} ms from rank 0's (rank {skew} on {host[skew]})"
    late = abs(offset) > CLOCK_SECONDS
    checks.append(Check("clocks", "warn" if late else "ok", found, "set the clocks by chrony or NTP" if late else ""))
    flops = {f"rank {rank} on {host[rank]}": result["flops"] / 1e12 for rank, result in network.items()}
    mend = "look for other processes, heat and power limits there (nvidia-smi -q -d PERFORMANCE)"
    checks.append(_outliers("matrix product", flops, "TFLOP/s", mend))
    if len(network) == 1:
        return checks
    slowest = {key: min(result[key] for result in network.values()) for key in ("all_reduce", "all_gather")}
    latency = max(result["latency"] for result in network.values())
    checks.append(
        Check(
            "collectives",
            "ok",
            f"all-reduce {slowest['all_reduce'] / 1e9:.2f} GB/s, all-gather {slowest['all_gather'] / 1e9:.2f} GB/s, "
            f"latency {latency * 1e6:.0f} us",
        )
    )
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for result in network.values():
        for pair, rate in result["pairs"].items():
            low, high = map(int, pair.split("-"))
            kind = "pairs in a host" if host[low] == host[high] else "pairs of hosts"
            kinds[kind][f"ranks {low} on {host[low]} and {high} on {host[high]}"] = rate / 1e9
    mend = "look at the cable, the port's counters and the interface of the host that appears most"
    checks += [_outliers(kind, rates, "GB/s", mend) for kind, rates in kinds.items()]
    links = [report["link"] for report in reports.values() if report["link"]]
    if links and "pairs of hosts" in kinds:
        rate, link = statistics.median(kinds["pairs of hosts"].values()), min(links) / 1e9
        slow = rate < SLOW_LINK * link
        found = f"{rate:.2f} GB/s between hosts, of {link:.2f} GB/s that the interface has"
        mend = "check which interface and protocol is used: launch/env.sh, NCCL_DEBUG=INFO, NCCL_IB_HCA"
        checks.append(Check("link", "warn" if slow else "ok", found, mend if slow else ""))
    return checks


def _outliers(name: str, values: dict[str, float], unit: str, mend: str) -> Check:
    """A row that names what is far below the median of its kind."""
    median = statistics.median(values.values())
    slow = sorted((value, who) for who, value in values.items() if value < SLOW * median)
    found = f"median of {len(values)}: {median:.2f} {unit}, least {min(values.values()):.2f}"
    if not slow:
        return Check(name, "ok", found)
    shown = "; ".join(f"{who}: {value:.2f} {unit}" for value, who in slow[:8])
    more = f" and {len(slow) - 8} more" if len(slow) > 8 else ""
    return Check(name, "warn", f"{found}; slow: {shown}{more}", mend)
