"""Which CPU cores this process may use, and which share of them is this rank's."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or its quota is "max"
        return cores


def local_world_size() -> int:
    """Ranks on this host: what torchrun and accelerate say, or DeepSpeed, or all there are."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 1))


def cores_of_rank() -> int:
    """This rank's share of the usable cores, 1 or more."""
    sharers = int(os.environ.get("AUTOMIX_CORE_SHARERS") or local_world_size())  # 1 where launch/env.sh has bound cores
    return max(1, usable_cores() // sharers)
