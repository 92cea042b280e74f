"""Which CPU cores this process may use, and which share of them is this rank's."""

import os

from automix_dist.control_group import cpu_quota


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container or job."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def local_world_size() -> int:
    """Ranks on this host: what torchrun and accelerate say, or DeepSpeed, or all there are."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 1))


def cores_of_rank() -> int:
    """This rank's share of the usable cores, 1 or more."""
    ranks = local_world_size()
    sharers = int(os.environ.get("AUTOMIX_CORE_SHARERS") or ranks)  # 1 where launch/env.sh has bound cores
    share, quota = len(os.sched_getaffinity(0)) // sharers, cpu_quota()
    if quota is not None:  # which is for all ranks, bound or not
        share = min(share, int(quota) // max(sharers, ranks))
    return max(1, share)
