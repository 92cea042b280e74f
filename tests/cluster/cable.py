"""A bad cable: carries packets between two new tap devices, each after a delay, and loses some. For kernels without
`tc netem`. Ready when it has said so; the devices live as long as it does.

    python cable.py NAME OTHER MILLISECONDS LOST-SHARE
"""

import contextlib
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h


def tap(name: str) -> int:
    """A new network device; what it sends is read from this file, what is written there it receives."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


def carry(one: int, other: int, seconds: float, lost: float) -> None:
    underway: deque[tuple[float, int, bytes]] = deque()
    across = {one: other, other: one}
    while True:
        wait = max(underway[0][0] - time.monotonic(), 0) if underway else None
        for file in select.select([one, other], [], [], wait)[0]:
            packet = os.read(file, 65536)
            if random.random() >= lost:
                underway.append((time.monotonic() + seconds, across[file], packet))
        while underway and underway[0][0] <= time.monotonic():
            _, file, packet = underway.popleft()
            with contextlib.suppress(OSError):  # the device at that end is down
                os.write(file, packet)


if __name__ == "__main__":
    ends = tap(sys.argv[1]), tap(sys.argv[2])
    print("ready", flush=True)
    carry(*ends, float(sys.argv[3]) / 1000, float(sys.argv[4]))
