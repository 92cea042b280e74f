"""The order of the images and each rank's share of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from automix_dist.sampling import epoch_order, quasi_random_order, rank_batches, repeated

counts, seeds, epochs = st.integers(1, 400), st.integers(0, 2**63 - 1), st.integers(0, 10_000)


@given(counts, seeds, epochs)
def test_an_epoch_is_a_permutation(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, epoch_order(count, seed, epoch))


def test_orders_differ_and_never_change():
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400
    # Old runs are resumed by new versions: these numbers may not change.
    assert epoch_order(10, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert epoch_order(10, 123456789, 7).tolist() == [9, 2, 4, 0, 1, 5, 7, 8, 3, 6]


def test_every_place_is_equally_likely():
    places = np.array([np.argsort(epoch_order(10, 3, epoch)) for epoch in range(3000)])
    counts = np.array([np.bincount(column, minlength=10) for column in places.T])
    assert ((counts - 300) ** 2 / 300).sum() < 149.4  # chi square, 100 cells, 0.1 %


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 6), st.integers(0, 300))
def test_shares_cut_one_global_stream(world_size, accumulation_steps, micro, extra):
    batch_size = world_size * accumulation_steps * micro
    order = epoch_order(batch_size + extra, 1, 0)
    steps = len(order) // batch_size
    shares = [rank_batches(order, batch_size, accumulation_steps, world_size, rank) for rank in range(world_size)]
    assert all(share.shape == (steps, accumulation_steps, micro) for share in shares)
    joined = np.stack(shares, axis=2).reshape(steps, batch_size)
    assert np.array_equal(joined.ravel(), order[: steps * batch_size])


@given(counts, st.integers(1, 5))
def test_repeated_images_fill_an_epoch(count, repeats):
    order = epoch_order(count, 1, 0)
    samples = repeated(order, repeats)
    images, copies = samples % count, samples // count
    assert len(set(samples.tolist())) == len(samples) == count and copies.max() < repeats
    assert images[::repeats].tolist() == order[: -(-count // repeats)].tolist()
    assert np.array_equal(images, np.repeat(images[::repeats], repeats)[:count])
    assert repeats > 1 or np.array_equal(samples, order)


def test_repeated_orders_never_change():
    assert repeated(epoch_order(10, 0, 0), 3).tolist() == [0, 10, 20, 7, 17, 27, 8, 18, 28, 2]


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 6), st.integers(0, 300))
def test_copies_are_dealt_out_to_different_slices(world_size, accumulation_steps, micro, extra):
    """Every step has the samples that it has on one rank."""
    batch_size, slices = world_size * accumulation_steps * micro, world_size * accumulation_steps
    count = batch_size + extra
    order = repeated(epoch_order(count, 1, 0), 3)
    ranks = range(world_size)
    shares = [rank_batches(order, batch_size, accumulation_steps, world_size, rank, dealt=True) for rank in ranks]
    steps = np.stack(shares, axis=2).reshape(-1, batch_size)
    assert np.array_equal(np.sort(steps), np.sort(order[: steps.size].reshape(steps.shape)))
    if slices >= 3:
        micro_batches = np.stack(shares).reshape(-1, micro) % count
        assert all(len(set(row)) == micro for row in micro_batches.tolist())


chunk_sizes, windows = st.integers(1, 20), st.integers(1, 10)


@given(counts, seeds, epochs, chunk_sizes, windows)
def test_a_quasi_random_epoch_is_a_permutation(count, seed, epoch, chunk_size, window_chunks):
    order = quasi_random_order(count, seed, epoch, chunk_size, window_chunks)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, quasi_random_order(count, seed, epoch, chunk_size, window_chunks))


@given(counts, seeds, epochs, chunk_sizes, windows)
def test_a_quasi_random_epoch_reads_window_after_window(count, seed, epoch, chunk_size, window_chunks):
    """No chunk is needed again after its window, and no more than one window's chunks at a time."""
    chunks = quasi_random_order(count, seed, epoch, chunk_size, window_chunks) // chunk_size
    full, read = count // chunk_size, 0
    while read < count:
        # A window holds window_chunks whole chunks; the file's last chunk, and the last window, may be smaller.
        opened = list(dict.fromkeys(chunks[read:].tolist()))[:window_chunks]
        length = sum(chunk_size if c < full else count - full * chunk_size for c in opened)
        assert set(chunks[read : read + length].tolist()) == set(opened)
        read += length


def test_quasi_random_orders_mix_and_never_change():
    order = quasi_random_order(4096, 1, 0, 16, 32)
    window = order[:512]
    assert len(set((window // 16).tolist())) == 32
    assert np.abs(np.corrcoef(np.arange(512), window)[0, 1]) < 0.2
    assert len({tuple(quasi_random_order(100, seed, epoch, 4, 5)) for seed in range(9) for epoch in range(9)}) == 81
    # Old runs are resumed by new versions: these numbers may not change.
    assert quasi_random_order(12, 5, 3, 2, 2).tolist() == [5, 0, 1, 4, 2, 8, 3, 9, 6, 7, 10, 11]
