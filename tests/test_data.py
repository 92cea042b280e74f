"""Loaders: position, exact evaluation, and that nothing hangs, leaks or is overwritten."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from automix_dist import beton, control_group, data, prepare, sources
from automix_dist.beton import BetonError
from automix_dist.config import ConfigError, DataConfig
from automix_dist.config_file import load_config
from automix_dist.cores import cores_of_rank, usable_cores
from automix_dist.data import Batch, EvalLoader, LoaderError, TrainLoader
from automix_dist.random_streams import CROP, ERASE, FLIP, JITTER, POLICY, stream_key, uniform
from automix_dist.sampling import epoch_order

CPU = torch.device("cpu")
COUNT = 53
RESIZED = DataConfig(image_size=24, crop="resized", workers=1)
AUGMENTED = replace(
    RESIZED, resize="bicubic", rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.5,
    order="quasi_random", chunk_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """53 images of 32 x 32 in 5 classes, half of them JPEG."""
    out = tmp_path_factory.mktemp("data") / "small.beton"
    prepare.prepare(f"synthetic:{COUNT}x32@5", out, prepare.PrepareOptions(write_mode="proportion"), progress=False)
    return out


def train_loader(path, config=RESIZED, *, seed=1, batch_size=8, rank=0, world_size=1, accumulation_steps=1, device=CPU):
    return TrainLoader(
        path,
        config,
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        device=device,
    )


def eval_loader(path, config=RESIZED, *, batch_size=8, rank=0, world_size=1, device=CPU):
    return EvalLoader(path, config, batch_size=batch_size, rank=rank, world_size=world_size, device=device)


def by_sample(batches) -> dict[int, np.ndarray]:
    """The pixels of each sample of some batches."""
    return {int(i): image.numpy() for b in batches for i, image in zip(b.indices, b.images, strict=True)}


def same(a, b) -> bool:
    """Whether two sequences of batches are equal in everything."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "automix-loader"]


@pytest.mark.parametrize(("accumulation_steps", "config"), [(1, RESIZED), (2, RESIZED), (1, AUGMENTED)])
def test_the_same_stream_for_any_world_size(path, accumulation_steps, config):
    def stream(world_size):
        loaders = [
            train_loader(path, config, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps)
            for rank in range(world_size)
        ]
        micro_batches = zip(*[loader.epoch(2) for loader in loaders], strict=True)
        return [torch.cat(parts) for batches in micro_batches for parts in zip(*batches, strict=True)]

    whole = stream(1)
    for world_size in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(stream(world_size), whole, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        RESIZED,
        AUGMENTED,
        DataConfig(image_size=32, crop="padded", workers=1),
        DataConfig(image_size=30, crop="padded", pad=2, pad_mode="reflect", workers=1),
        DataConfig(image_size=32, crop="none", workers=1),
        DataConfig(image_size=32, crop="none", flip=False, workers=1),
    ],
    ids=["resized", "augmented", "padded", "reflected", "none", "none without flip"],
)
def test_the_same_pixels_for_any_batch_size_and_workers(path, config):
    batches = list(train_loader(path, config).epoch(0))
    base = by_sample(batches)
    assert len(base) == COUNT // 8 * 8
    labels = beton.read_index(path).records["label"]
    assert all(np.array_equal(b.labels, labels[b.indices]) for b in batches)
    assert all(
        (b.images.dtype, b.labels.dtype, b.indices.dtype) == (torch.uint8, torch.int64, torch.int64) for b in batches
    )
    assert batches[0].images.shape == (8, config.image_size, config.image_size, 3)
    for other in (
        by_sample(train_loader(path, config, batch_size=53).epoch(0)),
        by_sample(train_loader(path, replace(config, workers=0, batches_ahead=1), batch_size=6).epoch(0)),
    ):
        common = base.keys() & other.keys()
        assert len(common) >= 40
        assert all(np.array_equal(base[i], other[i]) for i in common)
    if config.flip:
        another_epoch = by_sample(train_loader(path, config).epoch(1))
        common = base.keys() & another_epoch.keys()
        assert any(not np.array_equal(base[i], another_epoch[i]) for i in common)


def test_the_same_stream_for_any_number_of_threads(path):
    code = f"""
import hashlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import *
for workers in (1, 2, 4):
    digest = hashlib.sha256()
    for batch in train_loader({str(path)!r}, replace(AUGMENTED, workers=workers)).epoch(0):
        for tensor in batch:
            digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())
"""
    env = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    digests = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()
    assert len(digests) == 3
    assert len(set(digests)) == 1


@pytest.mark.parametrize("config", [RESIZED, AUGMENTED], ids=["resized", "augmented"])
def test_resume_at_every_step_of_an_epoch(path, config):
    whole = list(train_loader(path, config, accumulation_steps=2).epoch(3))
    loader = train_loader(path, config, accumulation_steps=2)
    assert loader.steps_per_epoch == 6
    for step in range(7):
        assert same(loader.epoch(3, start_step=step), whole[2 * step :])
    for step in (-1, 8):
        with pytest.raises(ValueError, match="start_step"):
            loader.epoch(3, start_step=step)


def test_skipped_images_are_not_read(path, tmp_path):
    """Resuming behind damaged images does not notice them."""
    loader = train_loader(path)
    first = epoch_order(COUNT, 1, 0)[:8]
    copy = damage(path, tmp_path, [int(i) for i in first])
    assert same(train_loader(copy).epoch(0, start_step=1), loader.epoch(0, start_step=1))
    with pytest.raises(LoaderError):
        next(train_loader(copy).epoch(0))


def test_the_epochs_of_one_loader_do_not_disturb_each_other(path):
    loader = train_loader(path)
    expected = [list(loader.epoch(e)) for e in range(2)]
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert same([a for a, _ in pairs], expected[0])
    assert same([b for _, b in pairs], expected[1])


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("batch_size", [1, 7, 8, 100])
def test_evaluation_sees_every_image_once(path, world_size, batch_size):
    loaders = [eval_loader(path, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):
        batches = [list(loader) for loader in loaders]
        assert {loader.num_batches for loader in loaders} == {max(len(b) for b in batches)}
        seen = torch.cat([b.indices for rank in batches for b in rank])
        assert torch.equal(seen.sort().values, torch.arange(COUNT))
        assert all(
            torch.equal(b.indices % world_size, torch.full_like(b.indices, r))
            for r, rank in enumerate(batches)
            for b in rank
        )


def test_a_rank_without_images_evaluates_nothing(path, tmp_path):
    prepare.prepare("synthetic:3x8@3", tmp_path / "tiny.beton", progress=False)
    loader = eval_loader(tmp_path / "tiny.beton", DataConfig(image_size=8), rank=4, world_size=5)
    assert (loader.num_batches, list(loader)) == (1, [])
    assert loader.blank().shape == (1, 8, 8, 3)


def test_evaluation_pixels(path):
    source = sources.open_source(f"synthetic:{COUNT}x32@5", "train")
    raw = range(0, COUNT, 2)  # the others are JPEG
    as_is = by_sample(eval_loader(path, DataConfig(image_size=32, crop="padded", eval_crop_ratio=1.0)))
    assert all(np.array_equal(as_is[i], np.asarray(source.load(i))) for i in raw)
    cropped = by_sample(eval_loader(path, DataConfig(image_size=24, eval_crop_ratio=0.75)))
    assert all(np.array_equal(cropped[i], np.asarray(source.load(i))[4:28, 4:28]) for i in raw)


def test_batches_can_be_kept(path):
    """FFCV overwrites a batch as soon as the next but one is asked for."""
    loader = train_loader(path, replace(RESIZED, batches_ahead=1))
    kept = list(loader.epoch(0))
    copies = []
    for batch in loader.epoch(0):
        copies.append(Batch(*(tensor.clone() for tensor in batch)))
        time.sleep(0.01)  # a training step, during which the loader works ahead
    assert same(kept, copies)
    kept[0].images.zero_()
    assert same(kept[1:], copies[1:])


def test_leaving_epochs_early_leaks_no_thread(path):
    """FFCV leaves a thread and its buffers behind each time."""
    gc.collect()
    before = len(loader_threads())
    loader, evaluation = train_loader(path), eval_loader(path)
    for epoch in range(10):
        for _ in loader.epoch(epoch):
            break
        for _ in evaluation:
            break
    assert len(loader_threads()) == before + 2
    assert same(loader.epoch(0), train_loader(path).epoch(0))
    loader.close()
    del evaluation
    gc.collect()
    deadline = time.time() + 10
    while len(loader_threads()) > before and time.time() < deadline:
        time.sleep(0.01)
    assert len(loader_threads()) <= before
    with pytest.raises(LoaderError, match="closed"):
        next(loader.epoch(0))
    loader.close()


def damage(path: Path, folder: Path, samples: list[int]) -> Path:
    """A copy of a file in which some images are not what was written."""
    copy = folder / "damaged.beton"
    shutil.copy(path, copy)
    shutil.copy(beton.manifest_path(path), beton.manifest_path(copy))
    index = beton.read_index(copy)
    with open(copy, "r+b") as file:
        for i in samples:
            file.seek(int(index.records["image"]["data_ptr"][i]) + 50)
            file.write(b"damage")
    return copy


@pytest.mark.parametrize("config", [RESIZED, replace(RESIZED, crop="padded", pad=2)], ids=["resized", "padded"])
def test_copies_of_an_image_are_augmented_each_in_its_own_way(path, config):
    """The first copy has the pixels that the image has without copies, and any number of ranks sees the same ones."""
    whole = by_sample(train_loader(path, config, batch_size=53).epoch(2))
    loader = train_loader(path, replace(config, repeats=3), batch_size=12)
    batches = list(loader.epoch(2))
    labels = beton.read_index(path).records["label"]
    assert all(np.array_equal(batch.labels, labels[batch.indices]) for batch in batches)
    numbers = torch.cat([batch.indices for batch in batches]).tolist()
    images = torch.cat([batch.images for batch in batches]).numpy()
    assert numbers == np.repeat(epoch_order(COUNT, 1, 2)[: len(numbers) // 3], 3).tolist()
    assert all(np.array_equal(images[i], whole[numbers[i]]) for i in range(0, len(numbers), 3))
    differing = sum(not np.array_equal(images[i], images[i + c]) for i in range(0, len(numbers), 3) for c in (1, 2))
    assert differing > 0.8 * 2 / 3 * len(numbers)
    ranks = [
        list(train_loader(path, replace(config, repeats=3), batch_size=12, rank=r, world_size=4).epoch(2))
        for r in range(4)
    ]
    for step, batch in enumerate(batches):
        joined = torch.stack([share[step].images for share in ranks], dim=1).flatten(0, 1)
        assert torch.equal(joined, batch.images)
    assert same(loader.epoch(2, start_step=2), batches[2:])


def test_a_damaged_image_has_a_stand_in_for_each_copy(path, tmp_path):
    order = epoch_order(COUNT, 1, 0)
    damaged = int(order[1])
    copy = damage(path, tmp_path, [damaged])
    config = replace(RESIZED, on_corrupt="skip", repeats=2)
    loader = train_loader(copy, config)
    batch = next(loader.epoch(0))
    stand_in = (damaged + 1) % COUNT
    assert batch.indices[2:4].tolist() == [stand_in] * 2 and loader.skipped == 2
    assert not torch.equal(batch.images[2], batch.images[3])
    with pytest.raises(LoaderError, match=f"sample {damaged}: "):
        list(train_loader(copy, replace(RESIZED, repeats=2)).epoch(0))


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
@pytest.mark.parametrize("sample", [6, 7], ids=["raw", "jpeg"])
def test_a_damaged_sample_is_an_error_with_its_number(path, tmp_path, sample, crop):
    """FFCV trains on whatever the decoder left in the buffer."""
    copy, config = damage(path, tmp_path, [sample]), DataConfig(image_size=32, crop=crop, workers=1)
    for batches in (train_loader(copy, config, batch_size=53).epoch(0), iter(eval_loader(copy, config))):
        with pytest.raises(LoaderError, match=rf"damaged\.beton: sample {sample}: its bytes have changed on disk"):
            list(batches)


def test_damaged_training_images_can_be_skipped(path, tmp_path):
    """The next readable image of the file stands in, for any number of ranks, and evaluation does not skip."""
    order = epoch_order(COUNT, 1, 0)
    first, other = int(order[0]), int(order[20])
    damaged = sorted({first, (first + 1) % COUNT, other})
    copy = damage(path, tmp_path, damaged)
    config = replace(RESIZED, on_corrupt="skip")
    loader = train_loader(copy, config)
    batches = list(loader.epoch(0))
    read = torch.cat([batch.indices for batch in batches]).tolist()
    assert loader.skipped == sum(int(i) in damaged for i in order[: len(read)])
    assert not set(read) & set(damaged)
    for was, now in zip(order.tolist(), read, strict=False):
        while was in damaged:
            was = (was + 1) % COUNT
        assert now == was
    labels = beton.read_index(path).records["label"]
    assert all(np.array_equal(batch.labels, labels[batch.indices]) for batch in batches)
    whole = by_sample(train_loader(path, batch_size=53).epoch(0))
    assert all(np.array_equal(pixels, whole[i]) for i, pixels in by_sample(batches).items())
    ranks = [list(train_loader(copy, config, rank=rank, world_size=2).epoch(0)) for rank in range(2)]
    assert [torch.cat([a.images, b.images]).tolist() for a, b in zip(*ranks, strict=True)] == [
        batch.images.tolist() for batch in batches
    ]
    with pytest.raises(LoaderError):
        list(eval_loader(copy, config))


def test_a_file_of_damaged_images_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SKIP_ATTEMPTS", 3)
    copy = damage(path, tmp_path, range(COUNT))
    with pytest.raises(LoaderError, match=r"its bytes have changed on disk"):
        next(train_loader(copy, replace(RESIZED, on_corrupt="skip")).epoch(0))


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(data, "_free_memory", lambda: 1000)


@pytest.fixture
def limit(tmp_path, monkeypatch):
    """Sets limits of control groups, as the kernel's files; the process is in the group /job/step."""
    monkeypatch.setattr(control_group, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_group, "MEMBERSHIP", tmp_path / "membership")
    lines = ["9:cpu,cpuacct:/job/step", "4:memory:/job/step", "0::/job/step"]
    (tmp_path / "membership").write_text("\n".join(lines) + "\n")

    def limit(name: str, text: str) -> None:
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(f"{text}\n")

    return limit


@pytest.mark.parametrize("group", ["", "job/", "job/step/"])
@pytest.mark.parametrize("name", ["{}memory.max", "memory/{}memory.limit_in_bytes"])
def test_free_memory_knows_the_limits_of_containers_and_jobs(group, name, limit):
    machine = data._free_memory()
    assert machine > 2**20
    limit(name.format(group), str(2**20))
    limit("memory.max", "max") if group else None
    assert data._free_memory() == 2**20
    limit(name.format(group), "max")
    assert data._free_memory() > 2**20


@pytest.fixture
def asked(monkeypatch):
    """(start, end) of what the kernel is asked to read ahead."""
    spans = []

    def posix_fadvise(file, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        spans.append((start, start + length))

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    return spans


def test_reading_is_planned_by_memory_and_said(path, little_memory, asked, monkeypatch):
    loader = train_loader(path)
    assert re.search(
        r"small\.beton: 0\.00 GB, free memory 0\.00 GB: .*image by image.*quasi_random", loader.storage_note
    )
    quasi_random = train_loader(path, AUGMENTED)
    assert "4 neighbouring images at a time" in quasi_random.storage_note
    records = beton.read_index(path).records["image"]
    sizes = beton.read_index(path).sizes
    monkeypatch.setattr(data, "PIECE", 1000)
    for reader in (loader, quasi_random):
        asked.clear()
        expected = list(reader.epoch(0))
        spans = sorted(asked)
        assert all(0 < end - start <= 1000 for start, end in spans)  # the kernel may forget the rest of a longer one
        assert all(before[1] <= after[0] for before, after in pairwise(spans))  # no byte twice
        wanted = {byte for start, end in spans for byte in range(start, end)}
        for batch in expected:
            for i in batch.indices:
                start = int(records["data_ptr"][i])
                assert wanted.issuperset(range(start, start + int(sizes[i])))
        asked.clear()
        monkeypatch.setattr(data, "_free_memory", lambda: 10**12)
        plenty = train_loader(path, reader._config)
        assert "stays in memory" in plenty.storage_note
        assert same(plenty.epoch(0), expected)
        assert not asked


def test_a_window_is_asked_for_while_the_one_before_is_used():
    """Of 4 windows of 8 chunks and 4 batches, whose first batch needs 6 of its chunks and whose third the others."""
    needs = [(4 * window + 2 * (chunk > 5), window, chunk) for window in range(4) for chunk in range(8)]
    asked_at = {}

    def first_uses():
        for number, window, chunk in needs:
            yield number, 1000 * window + chunk, 1000 * window + chunk + 1
            asked_at[window, chunk] = current

    current = 0
    read_ahead = data._ReadAhead(os.open("/dev/zero", os.O_RDONLY), first_uses(), horizon=4, pace=2)
    for current in range(16):
        read_ahead.before(current)
        for number, window, chunk in needs:
            assert number > current + 1 or (window, chunk) in asked_at
    assert len(asked_at) == 32
    lead = [number - asked_at[window, chunk] for number, window, chunk in needs]
    assert all(each <= 4 for each in lead)
    per_batch = Counter(at for (window, _), at in asked_at.items() if window)
    assert max(per_batch.values()) <= 4  # without a pace six


def test_the_quasi_random_loader_reads_few_chunks_at_a_time(path):
    loader = train_loader(path, replace(AUGMENTED, window_chunks=2))
    records = beton.read_index(path).records["image"]
    place = np.argsort(np.argsort(records["data_ptr"]))
    for batch in loader.epoch(0):  # batches of 8, windows of 2 x 4: each reaches into two windows at most
        assert len(set((place[batch.indices] // 4).tolist())) <= 4


def test_resolution_follows_the_epoch(path):
    config = replace(RESIZED, resolution_schedule=((0, 32), (3, 64)))
    loader = train_loader(path, config)
    sizes = [next(loader.epoch(epoch)).images.shape[1:] for epoch in range(5)]
    assert sizes == [(32, 32, 3)] * 3 + [(64, 64, 3)] * 2
    fixed = train_loader(path, replace(RESIZED, image_size=64))
    assert same(loader.epoch(4), fixed.epoch(4))
    assert next(iter(eval_loader(path, config))).images.shape[1:] == (24, 24, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution_schedule": ((1, 32),)}, "first of them 0"),
        ({"resolution_schedule": ((0, 32), (0, 64))}, "rising epochs"),
        ({"resolution_schedule": ((0, 40),)}, "multiples of 32"),
        ({"resolution_schedule": ((0, 32),), "crop": "padded"}, r"data\.crop=resized"),
        ({"image_size": 5}, "6 or more"),
        ({"color_jitter": -0.1}, r"data\.color_jitter"),
        ({"random_erasing": 1.1}, r"data\.random_erasing"),
        ({"chunk_size": 0}, r"data\.chunk_size"),
        ({"window_chunks": 0}, r"data\.window_chunks"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_schedules_come_from_yaml():
    config = load_config(None, ["data.resolution_schedule=[[0, 128], [10, 160]]", "data.image_size=224"]).data
    assert [config.train_size(epoch) for epoch in (0, 9, 10, 99)] == [128, 128, 160, 160]
    assert DataConfig().train_size(5) == 224


def test_a_failing_operation_reaches_the_consumer(path, monkeypatch):
    """FFCV waits forever."""
    loader = train_loader(path)

    def boom(*_):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(loader._pipeline, "_decode", boom)
    with pytest.raises(ZeroDivisionError, match="boom"):
        next(loader.epoch(0))
    monkeypatch.undo()
    assert len(list(loader.epoch(0))) == 6  # the loader is still good


def test_a_stuck_loader_is_reported(path, monkeypatch):
    loader = train_loader(path)
    next(loader.epoch(0))
    monkeypatch.setattr(data, "STALL_SECONDS", 0.3)
    with (
        data._COMPILED_LOOPS,
        pytest.raises(
            LoaderError, match=r"no batch from .*small\.beton for 0\.3 s; its thread stands at .*data\.py:\d+ in _read"
        ),
    ):
        next(loader.epoch(0))
    assert len(list(loader.epoch(0))) == 6


def test_the_sleep_of_a_suspended_job_is_not_the_storage_s_silence(path, monkeypatch):
    naps = iter([0.0, 1000.0])
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(naps, None) or time.monotonic()))
    monkeypatch.setattr(data, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(data, "LOOK_SECONDS", 0.1)
    worker = data._Worker(1)
    assert worker.result(worker.submit(lambda: time.sleep(0.3) or 7), path) == 7
    worker.close()


def test_a_process_with_a_stuck_loader_can_end(path):
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import *
loader = train_loader({str(path)!r})
data.STALL_SECONDS, data.EXIT_SECONDS = 0.3, 0.5
with data._COMPILED_LOOPS:
    try:
        next(loader.epoch(0))
    except LoaderError:
        print("reported")
    sys.exit(7)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (7, "reported"), run.stderr


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_torn_files_of_compiled_loops_are_made_anew(ending, size, tmp_path):
    """As a host leaves them that loses power."""
    (tmp_path / "loops.py").write_text(
        "from automix_dist.compiled_loops import compiled\n@compiled()\ndef double(x):\n    return 2 * x\n"
    )
    command = [
        sys.executable,
        "-c",
        "import loops; print(loops.double(21), sum(loops.double.stats.cache_hits.values()))",
    ]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    said = []
    for _ in range(3):
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout)
        if len(said) == 1:
            for torn in (tmp_path / "cache").rglob(f"*.{ending}"):
                torn.write_bytes(bytes(size))
    assert [each.split() for each in said] == [["42", "0"], ["42", "0"], ["42", "1"]]


def test_a_process_can_end_in_the_middle_of_an_epoch(path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import *
batches = [train_loader({str(path)!r}, DataConfig(image_size=2000), batch_size=8).epoch(e) for e in range(2)]
for epoch in batches:
    next(epoch)
sys.exit(7)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (7, "")


def test_two_loaders_may_work_at_once(path):
    """numba's workqueue layer, the fallback where neither TBB nor OpenMP is found, aborts on concurrent loops."""
    code = f"""
import sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import *
loaders = [train_loader({str(path)!r}, replace(RESIZED, workers=2)) for _ in range(2)]
for pair in zip(*[loader.epoch(e) for e in range(20) for loader in loaders], strict=True):
    pass
import numba
print(numba.threading_layer())
"""
    env = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "workqueue"


def test_torch_keeps_its_threads(path):
    threads = torch.get_num_threads()
    list(train_loader(path).epoch(0))
    assert torch.get_num_threads() == threads


def test_workers_follow_affinity_and_local_ranks(path, monkeypatch):
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    for name in ("AUTOMIX_CORE_SHARERS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert data.count_workers(DataConfig()) == min(most, usable_cores())
    assert data.count_workers(DataConfig(workers=1)) == 1
    monkeypatch.setenv("LOCAL_SIZE", "1000")
    assert data.count_workers(DataConfig()) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert data.count_workers(DataConfig()) == min(most, usable_cores())
    with pytest.raises(ConfigError, match=rf"data\.workers = {most + 1}.*{most} core"):
        train_loader(path, replace(RESIZED, workers=most + 1))


@pytest.mark.parametrize("group", ["", "job/", "job/step/"])
def test_cores_follow_affinity_and_quota(group, limit, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cores() == 64
    for quota, expected in (("max", 64), (100000, 1), (50000, 1), (1600000, 16), (9900000, 64)):
        limit(f"{group}cpu.max", f"{quota} 100000")
        assert usable_cores() == expected
    for quota, expected in ((-1, 64), (800000, 8)):
        limit(f"cpu/{group}cpu.cfs_period_us", "100000")
        limit(f"cpu/{group}cpu.cfs_quota_us", str(quota))
        assert usable_cores() == expected


def test_ranks_share_a_quota_also_where_each_has_cores_of_its_own(limit, monkeypatch):
    limit("cpu.max", "1600000 100000")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.delenv("AUTOMIX_CORE_SHARERS", raising=False)
    assert cores_of_rank() == 2
    monkeypatch.setenv("AUTOMIX_CORE_SHARERS", "1")  # launch/env.sh has bound the rank to 16 of them
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert cores_of_rank() == 2
    limit("cpu.max", "max 100000")
    assert cores_of_rank() == 16


def test_runs_side_by_side_share_a_quota(limit, monkeypatch):
    """As `automix compare --jobs 4` starts them."""
    limit("cpu.max", "1600000 100000")
    monkeypatch.setenv("AUTOMIX_CORE_SHARERS", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cores_of_rank() == 4


def test_one_core_of_many(path):
    """FFCV 1.0.2 asks for all of the machine's cores and fails when the process may use fewer."""
    code = f"""
import os, sys
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import *
loader = train_loader({str(path)!r}, replace(RESIZED, workers=0))
assert data.count_workers(replace(RESIZED, workers=0)) == 1
assert len(list(loader.epoch(0))) == 6
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_construction_is_cheap_at_imagenets_size(tmp_path):
    """FFCV's bookkeeping costs 450 bytes and 4 microseconds for each image, in every process."""
    out = large_file(tmp_path / "large.beton", 1_281_167)
    code = f"""
import resource, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import *
from automix_dist import augment
import psutil
kept = lambda: psutil.Process().memory_info().rss / 2**20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
start, before = time.process_time(), (kept(), peak())
loader = train_loader({str(out)!r}, DataConfig(image_size=6, crop="none"))
print(time.process_time() - start, kept() - before[0], peak() - before[1])
"""
    seconds, kept, peak = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert seconds < 3
    assert kept < 150  # MiB
    assert peak < 200


def large_file(path: Path, count: int) -> Path:
    """A sound file of `count` images of 6 x 6, put together from arrays: one by one it would take long."""
    head = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    start = prepare._align(head + count * beton.RECORD.itemsize, beton.ALIGNMENT)
    records, table = np.zeros(count, beton.RECORD), np.zeros(count, beton.ALLOCATION)
    records["image"]["mode"], records["image"]["width"], records["image"]["height"] = beton.RAW, 6, 6
    records["image"]["data_ptr"] = start + 2 * beton.ALIGNMENT * np.arange(count)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), records["image"]["data_ptr"], 108
    sums_start = start + 2 * beton.ALIGNMENT * count
    with open(path, "wb") as file:
        file.write(beton.file_head(beton.PAGE, count, sums_start + 8 * count) + records.tobytes())
        file.seek(sums_start)
        file.write(np.zeros(count, np.uint64).tobytes() + table.tobytes())
    small = path.with_name("one.beton")
    manifest = prepare.prepare("synthetic:1x6@1", small, progress=False)
    index = beton.read_index(path)
    manifest = replace(manifest, count=count, file_size=path.stat().st_size, index_checksum=index.checksum)
    beton.manifest_path(path).write_text(json.dumps(asdict(manifest)))
    return path


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (RESIZED, {"batch_size": 54}, r"54.*at most 53"),
        (RESIZED, {"batch_size": 9, "world_size": 2}, r"batch_size = 9: expected a multiple of 2 rank"),
        (RESIZED, {"batch_size": 10, "accumulation_steps": 4}, r"4 micro"),
        (DataConfig(image_size=24, crop="none"), {}, r"data\.image_size = 24.*32.*data\.crop=none"),
        (DataConfig(image_size=41, crop="padded"), {}, r"data\.image_size = 41.*32 \+ 2 x data\.pad \(4\)"),
        (DataConfig(image_size=32, crop="padded", pad=32, pad_mode="reflect"), {}, r"data\.pad = 32.*32"),
    ],
)
def test_settings_that_do_not_fit(path, config, arguments, message):
    with pytest.raises(ConfigError, match=message):
        train_loader(path, config, **arguments)


def test_files_are_checked_before_they_are_mapped(path, tmp_path):
    torn = tmp_path / "torn.beton"
    torn.write_bytes(path.read_bytes()[:5000])
    shutil.copy(beton.manifest_path(path), beton.manifest_path(torn))
    for load in (train_loader, eval_loader):
        with pytest.raises(BetonError, match="torn"):
            load(torn)
        with pytest.raises(BetonError, match="does not exist"):
            load(tmp_path / "none.beton")


@pytest.mark.gpu
def test_gpu_batches_are_those_of_the_cpu(path):
    pytest.importorskip("ffcv")
    device = torch.device("cuda", torch.cuda.current_device())
    expected = list(train_loader(path).epoch(0))
    loader = train_loader(path, device=device)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            kept = []
            for batch in loader.epoch(0):
                busy = torch.randn(2000, 2000, device=device)
                for _ in range(5):
                    busy = busy @ busy  # keeps the stream behind the host, as training does
                kept.append(Batch(*(tensor + 0 for tensor in batch)))
        stream.synchronize()
        assert all(tensor.is_cuda for batch in kept for tensor in batch)
        assert same([Batch(*(tensor.cpu() for tensor in batch)) for batch in kept], expected)


RAW = range(0, COUNT, 2)  # the others are JPEG


PLAIN = DataConfig(image_size=32, crop="none", flip=False, workers=1)


WHOLE = DataConfig(image_size=32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=False, workers=1)


def originals() -> dict[int, np.ndarray]:
    source = sources.open_source(f"synthetic:{COUNT}x32@5", "train")
    return {i: np.asarray(source.load(i)) for i in RAW}


def pixels(path, config, **options) -> dict[int, np.ndarray]:
    seen = by_sample(train_loader(path, config, batch_size=COUNT, **options).epoch(0))
    return {i: seen[i] for i in RAW}


@pytest.mark.parametrize("config", [PLAIN, WHOLE], ids=["none", "whole box"])
def test_without_augmentation_images_stay_what_they_are(path, config):
    got = pixels(path, config)
    assert all(np.array_equal(got[i], image) for i, image in originals().items())


def test_half_of_the_images_are_mirrored_where_flips_are_on(path):
    got = pixels(path, replace(PLAIN, flip=True))
    mirrored = [not np.array_equal(got[i], image) for i, image in originals().items()]
    assert all(
        np.array_equal(got[i], image[:, ::-1] if m else image)
        for m, (i, image) in zip(mirrored, originals().items(), strict=True)
    )
    assert 0.2 < np.mean(mirrored) < 0.8


def test_another_seed_augments_otherwise(path):
    one, other = (pixels(path, DataConfig(image_size=24, workers=1), seed=seed) for seed in (1, 2))
    assert np.mean([not np.array_equal(one[i], other[i]) for i in RAW]) > 0.9


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("pad", [1, 6])
def test_padded_crops_are_cuts_of_the_padded_image(path, mode, pad):
    got = pixels(path, DataConfig(image_size=32, crop="padded", pad=pad, pad_mode=mode, flip=False, workers=1))
    places = set()
    for i, image in originals().items():
        kind = {"zero": "constant", "reflect": "reflect"}[mode]
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=kind)
        found = [
            (y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)
            if np.array_equal(got[i], padded[y : y + 32, x : x + 32])
        ]  # fmt: skip
        assert found, i
        places.add(found[0])
    assert {max(y for y, _ in places), max(x for _, x in places)} == {2 * pad} if pad == 1 else len(places) > 10


def test_crops_are_resized_as_the_config_says(path):
    for method, pillows in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        expected = {i: np.asarray(Image.fromarray(each).resize((16, 16), pillows)) for i, each in originals().items()}
        train = pixels(path, replace(WHOLE, image_size=16, resize=method))
        evaluated = by_sample(eval_loader(path, DataConfig(image_size=16, resize=method, eval_crop_ratio=1.0)))
        for i, image in expected.items():
            assert np.array_equal(train[i], image) and np.array_equal(evaluated[i], image), (method, i)


def test_erased_boxes_hold_the_mean_where_it_is_asked_for(path):
    color = (0.2, 0.4, 0.8)
    got = pixels(path, replace(PLAIN, random_erasing=1.0, erasing_mode="mean", mean=color, std=(0.1, 0.1, 0.1)))
    for i, image in originals().items():
        changed = (got[i] != image).any(axis=2)
        assert changed.any() and (got[i][changed] == np.rint(255 * np.array(color))).all()
    assert all(np.array_equal(a, b) for a, b in zip(pixels(path, PLAIN).values(), originals().values(), strict=True))
    noise = pixels(path, replace(PLAIN, random_erasing=1.0, mean=color))
    assert any(
        len(np.unique(noise[i][(noise[i] != image).any(axis=2)], axis=0)) > 10 for i, image in originals().items()
    )


def test_the_colour_jitter_is_as_strong_as_asked_for(path):
    """Three factors in 1 -+ s: no value leaves (1 + s)^3 times itself and its distance from the mean."""
    moved = {}
    for strength in (0.05, 0.8):
        got = pixels(path, replace(PLAIN, color_jitter=strength))
        moved[strength] = [np.abs(got[i].astype(int) - image).max() for i, image in originals().items()]
    assert 0 < max(moved[0.05]) <= 255 * (1.05**3 - 1) + 3 and max(moved[0.8]) > 80


def test_what_randaugment_brings_in_is_the_mean(path):
    config = replace(PLAIN, rand_augment="rand-m10-n2-p1-inc1", mean=(0.0, 1.0, 0.0))
    got = pixels(path, config)
    filled = [((got[i] == (0, 255, 0)).all(axis=2)).sum() for i in RAW]
    assert np.mean([count > 20 for count in filled]) > 0.2
    assert not any((image == (0, 255, 0)).all(axis=2).any() for image in originals().values())


def test_operations_draw_independently():
    streams = (CROP, FLIP, JITTER, ERASE, POLICY)
    drawn = np.array([[uniform(np.uint64(stream_key(3, 1, i, each)), 0) for each in streams] for i in range(2000)])
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.1


def test_random_boxes_have_the_area_and_the_ratio_asked_for(path):
    """Twice as wide as high and half of the area: all columns, and 16 neighbouring rows."""
    config = replace(WHOLE, crop_scale=(0.5, 0.5), crop_ratio=(2, 2), resize="bicubic")
    got = pixels(path, config)
    tops = set()
    for i, image in originals().items():
        boxes = [Image.fromarray(image[top : top + 16]).resize((32, 32), Image.Resampling.BICUBIC) for top in range(17)]
        found = [top for top, each in enumerate(boxes) if np.array_equal(got[i], np.asarray(each))]
        assert found, i
        tops.add(found[0])
    assert len(tops) > 5
