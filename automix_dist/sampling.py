"""Which images each rank sees, and in which order: functions of (seed, epoch, rank) alone, for any number of ranks."""

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""What splitmix64 counts by: 2^64 over the golden ratio, made odd."""


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Splitmix64's mixing of uint64: a bijection in which each bit of x decides about half of the result's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 .. count - 1, [count] int64, that depends on seed and epoch only.

    Sorting by a hash of our own keeps it the same in all versions of numpy, so that any old run can be resumed.
    """
    key = splitmix64(splitmix64(np.array([seed], np.uint64) + GOLDEN_GAMMA) + np.uint64(epoch) + GOLDEN_GAMMA)
    return np.argsort(splitmix64(key + GOLDEN_GAMMA * np.arange(1, count + 1, dtype=np.uint64)), kind="stable")


def quasi_random_order(count: int, seed: int, epoch: int, chunk_size: int, window_chunks: int) -> np.ndarray:
    """A permutation of the places 0 .. count - 1 in a file, [count] int64, that reads one window after another.

    The file is cut into chunks of chunk_size places. Each window is a random set of window_chunks of them, whose places
    come in random order. Depends on seed and epoch only.
    """
    chunks = epoch_order(-(-count // chunk_size), int(splitmix64(np.array([seed], np.uint64))[0]), epoch)
    window_of_chunk = np.argsort(chunks) // window_chunks
    order = epoch_order(count, seed, epoch)
    return order[np.argsort(window_of_chunk[order // chunk_size], kind="stable")]


def repeated(order: np.ndarray, repeats: int) -> np.ndarray:
    """An epoch of as many samples over fewer images: the first of the order, each with its copies behind it.

    Copy c of image i is sample i + c * len(order): copies are augmented each in its own way (repeated augmentation;
    Hoffer et al., arXiv 1901.09335; timm's RepeatAugSampler).
    """
    count = len(order)
    images = order[: -(-count // repeats)]
    return (images[:, None] + count * np.arange(repeats)).ravel()[:count]


def rank_batches(
    order: np.ndarray, batch_size: int, accumulation_steps: int, world_size: int, rank: int, *, dealt: bool = False
) -> np.ndarray:
    """The micro batches of one rank, [steps, accumulation_steps, micro batch size], rows of samples from `order`.

    Step s takes order[s * batch_size : (s + 1) * batch_size], whatever the world size; micro step a of rank r takes
    slice a * world_size + r of it. If `dealt`, neighbours go to different slices, which take them in turn. An
    incomplete last batch is left out.
    """
    steps = len(order) // batch_size
    micro = batch_size // (accumulation_steps * world_size)
    order = order[: steps * batch_size]
    if dealt:
        return order.reshape(steps, micro, accumulation_steps, world_size)[..., rank].transpose(0, 2, 1)
    return order.reshape(steps, accumulation_steps, world_size, micro)[:, :, rank]
