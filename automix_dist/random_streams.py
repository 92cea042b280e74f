"""Random numbers for compiled loops: counter-based hashes of (seed, epoch, sample id, operation), so that it does not
matter which thread asks for them, when, or after what."""

import numpy as np

from automix_dist import sampling
from automix_dist.compiled_loops import compiled, uint64_at

CROP, FLIP, JITTER, ERASE, POLICY = 1, 2, 3, 4, 5
"""The operations' own streams."""

GOLDEN_GAMMA = sampling.GOLDEN_GAMMA
splitmix64 = compiled()(sampling.splitmix64)


@compiled()
def stream_key(seed, epoch, sample, operation):
    """Where one operation's random numbers for one sample in one epoch start."""
    key = splitmix64(np.uint64(seed) + GOLDEN_GAMMA)
    key = splitmix64(key + np.uint64(epoch) + GOLDEN_GAMMA)
    key = splitmix64(key + np.uint64(sample) + GOLDEN_GAMMA)
    return splitmix64(key + np.uint64(operation) + GOLDEN_GAMMA)


@compiled()
def stream_of(key, sample, operation):
    """`stream_key` where seed and epoch are two numbers in memory, at the address `key`."""
    return stream_key(uint64_at(key), uint64_at(key + np.uint64(8)), sample, operation)


@compiled()
def uniform(key, i):
    """Random number i of a stream, in [0, 1) with 53 bits."""
    bits = splitmix64(key + GOLDEN_GAMMA * np.uint64(i + 1))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)
