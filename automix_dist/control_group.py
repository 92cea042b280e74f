"""Limits that this process's control groups set: those of a container, a Slurm job, a systemd service."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_limit() -> int | None:
    """Bytes that the processes of a group may have together, page cache included; None without a limit."""
    texts = [*_texts("", "memory.max"), *_texts("memory", "memory.limit_in_bytes")]
    return min((int(text) for text in texts if text.isdigit()), default=None)  # else "max"


def cpu_quota() -> float | None:
    """Cores that the processes of a group may keep busy together; None without a quota."""
    texts = [*_texts("", "cpu.max"), *_texts("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    pairs = [text.split() for text in texts]
    quotas = [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0].isdigit()]  # else "max", "-1"
    return min(quotas, default=None)


def _texts(controller: str, *names: str) -> Iterator[str]:
    """What these files hold, for this process's group and each around it: of version 2 with controller "", or of a
    controller of version 1. In a container the outermost one is its own."""
    for group in _groups(controller):
        with contextlib.suppress(OSError):
            yield " ".join((group / name).read_text().strip() for name in names)


def _groups(controller: str) -> Iterator[Path]:
    mount = GROUPS / controller
    with contextlib.suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            inner = Path(path.lstrip("/"))
            if controller in controllers.split(",") and ".." not in inner.parts:
                yield from (mount / each for each in (inner, *inner.parents) if each != Path())
    yield mount
