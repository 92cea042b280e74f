"""Augmentations: their distribution, their pixels, and that they depend on (seed, epoch, sample) alone."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data.random_erasing import RandomErasing as TimmsRandomErasing
from torchvision import transforms
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from automix_dist import augment, beton, compiled_loops, prepare, resize, sources
from automix_dist.augment import (
    AugmentKey,
    ColorJitter,
    CropResizeDecoder,
    PaddedCropDecoder,
    RandomErasing,
    RandomFlip,
)
from automix_dist.random_streams import CROP, ERASE, JITTER, splitmix64, stream_key, uniform

COUNT = 24
FILTERS = [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]


def picture(i: int) -> Image.Image:
    """A smooth picture in one of three shapes."""
    random = np.random.default_rng(i)
    grid = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
    return grid.resize([(90, 60), (60, 90), (70, 70)][i % 3], Image.Resampling.BICUBIC)


def stored_picture(i: int) -> Image.Image:
    """The picture as a JPEG file holds it, decoded by Pillow."""
    return Image.open(io.BytesIO(prepare._encode_jpeg(picture(i), 90, restart_markers=True)))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "all").mkdir()
    for i in range(COUNT):
        picture(i).save(root / "all" / f"{i:02d}.png")
    return root


def write(tree: Path, mode: str) -> Path:
    out = tree.parent / f"{tree.name}_{mode}.beton"
    prepare.prepare(str(tree), out, prepare.PrepareOptions(write_mode=mode), progress=False)
    return out


@pytest.fixture(scope="module")
def raw_file(tree) -> Path:
    return write(tree, "raw")


@pytest.fixture(scope="module")
def jpeg_file(tree) -> Path:
    return write(tree, "jpg")


def run(path: Path, operations: list, indices) -> tuple[np.ndarray, np.ndarray]:
    """Images and status of some samples, through operations as a loader runs them."""
    index = beton.read_index(path)
    records, indices = index.records["image"], np.asarray(indices)
    storage = (np.memmap(path, np.uint8, "r"), records["data_ptr"].copy(), index.sizes.copy())
    size = operations[0].size
    images, status = np.full((len(indices), size, size, 3), 77, np.uint8), np.zeros((len(indices), 1), np.int32)
    operations[0].accept_globals(records, None)
    operations[0].generate_code()(indices, (images, status), records, storage)
    for operation in operations[1:]:
        operation.generate_code()(images, None, indices)
    return images, status[:, 0]


def boxes(height: int, width: int, scale, ratio, count: int) -> np.ndarray:
    """[count, 4] (top, left, height, width) of our random crops of samples 0 .. count - 1."""
    keys = [stream_key(5, 0, i, CROP) for i in range(count)]
    return np.array([augment.random_box(height, width, *scale, *ratio, np.uint64(key)) for key in keys])


def test_hash_is_splitmix64():
    # The published test values of splitmix64 for seed 1234567.
    step = 0x9E3779B97F4A7C15
    values = [int(splitmix64(np.uint64((1234567 + (i + 1) * step) % 2**64))) for i in range(3)]
    assert values == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_and_independent():
    def draw(seed, epoch, operation, i):
        return np.array([uniform(np.uint64(stream_key(seed, epoch, s, operation)), i) for s in range(4000)])

    base = draw(1, 0, 1, 0)
    assert base.min() >= 0 and base.max() < 1
    histogram = np.histogram(base, 20, (0, 1))[0]
    assert ((histogram - 200) ** 2 / 200).sum() < 43.8  # chi square, 19 degrees of freedom, 0.1 %
    for other in (draw(2, 0, 1, 0), draw(1, 1, 1, 0), draw(1, 0, 2, 0), draw(1, 0, 1, 1), np.roll(base, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 333, (0.5, 1.0), (3 / 4, 4 / 3)),
        (64, 64, (0.2, 0.4), (0.5, 2.0)),
        (100, 400, (0.9, 1.0), (3 / 4, 4 / 3)),  # no box fits: always the fallback
        (400, 100, (0.1, 1.0), (3 / 4, 4 / 3)),  # often the fallback
    ],
)
def test_random_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    count = 3000
    ours = boxes(height, width, scale, ratio, count)
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    bound = 1.95 * np.sqrt(2 / count)  # Kolmogorov-Smirnov, two samples, 0.1 %
    for values in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
    ):
        assert kolmogorov_smirnov(values(ours), values(theirs)) < bound


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.union1d(a, b)
    return np.abs(
        np.searchsorted(np.sort(a), points, "right") / len(a) - np.searchsorted(np.sort(b), points, "right") / len(b)
    ).max()


@pytest.mark.parametrize(("height", "width", "ratio", "box"), [
    (256, 256, 224 / 256, (16, 16, 224, 224)),
    (375, 500, 224 / 256, (23, 86, 328, 328)),
    (32, 32, 1.0, (0, 0, 32, 32)),
    (1, 9, 0.1, (0, 4, 1, 1)),
])  # fmt: skip
def test_centre_box(height, width, ratio, box):
    assert augment.centre_box(height, width, ratio) == box


def test_flips_half():
    key = AugmentKey(3)
    images = np.zeros((4000, 1, 2, 3), np.uint8)
    images[:, :, 1] = 1
    RandomFlip(key).generate_code()(images, None, np.arange(4000))
    assert abs(images[:, 0, 0, 0].mean() - 0.5) < 0.03


def test_crop_and_resize_is_opencvs_area_resize(raw_file):
    size = 32
    key = AugmentKey(5)
    images, status = run(raw_file, [CropResizeDecoder(size, (0.08, 1.0), (3 / 4, 4 / 3), key=key)], range(COUNT))
    assert (status == augment.OK).all()
    for i in range(COUNT):
        pixels = np.asarray(picture(i))
        box = augment.random_box(
            *pixels.shape[:2],
            0.08,
            1.0,
            3 / 4,
            4 / 3,
            np.uint64(stream_key(5, 0, i, CROP)),
        )
        top, left, h, w = box
        expected = cv2.resize(pixels[top : top + h, left : left + w], (size, size), interpolation=cv2.INTER_AREA)
        assert np.abs(images[i].astype(int) - expected).max() <= 1, (i, box)


@pytest.mark.parametrize(("method", "pillows"), FILTERS, ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [9, 32, 101])
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_crop_and_resize_is_pillows(raw_file, jpeg_file, mode, method, pillows, size):
    key = AugmentKey(5)
    method = resize.RESIZE_METHODS[method]
    decoder = CropResizeDecoder(size, (0.08, 1.0), (3 / 4, 4 / 3), method=method, key=key)
    images, status = run(raw_file if mode == "raw" else jpeg_file, [decoder], range(COUNT))
    assert (status == augment.OK).all()
    for i in range(COUNT):
        whole = picture(i) if mode == "raw" else stored_picture(i)
        stream = np.uint64(stream_key(5, 0, i, CROP))
        top, left, h, w = augment.random_box(whole.height, whole.width, 0.08, 1.0, 3 / 4, 4 / 3, stream)
        expected = whole.crop((left, top, left + w, top + h)).resize((size, size), pillows)
        assert np.array_equal(images[i], np.asarray(expected))


@pytest.mark.parametrize("method", resize.RESIZE_METHODS)
@pytest.mark.parametrize(
    ("height", "width", "out_height", "out_width"),
    [
        (61, 47, 23, 35),
        (31, 77, 64, 200),
        (500, 375, 32, 17),
        (500, 375, 224, 224),
        (100, 60, 50, 90),
        (64, 96, 32, 32),
        (7, 9, 48, 48),
        (40, 40, 40, 40),
        (1, 1, 7, 6),
        (90, 60, 32, 32),
    ],
)
def test_resize_of_noise_is_opencvs_or_pillows(method, height, width, out_height, out_width):
    """Noise shows every weight, and that neither the image's neighbour in memory nor the result's is touched."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    memory = np.concatenate([noise.ravel(), np.full(resize.SLACK, 255, np.uint8)])
    results = np.full((3, out_height, out_width, 3), 7, np.uint8)
    resize.resample(
        np.uint64(memory.ctypes.data),
        width,
        (0, 0, height, width),
        (out_height, out_width),
        (0, 0),
        resize.RESIZE_METHODS[method],
        results[1],
    )
    if method == "area":
        expected = cv2.resize(noise, (out_width, out_height), interpolation=cv2.INTER_AREA)
    else:
        expected = np.asarray(Image.fromarray(noise).resize((out_width, out_height), dict(FILTERS)[method]))
    assert np.abs(results[1].astype(int) - expected).max() <= (1 if method == "area" else 0)
    assert (results[[0, 2]] == 7).all()


@pytest.mark.parametrize(("method", "pillows"), FILTERS, ids=["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "ratio"), [(28, 224 / 256), (56, 224 / 256), (31, 0.6), (112, 1.0)])
def test_evaluation_crop_is_torchvisions(raw_file, method, pillows, size, ratio):
    """Resize and CenterCrop, the custom of ImageNet, on images of three shapes."""
    decoder = CropResizeDecoder(size, (ratio, ratio), method=resize.RESIZE_METHODS[method])
    images, _ = run(raw_file, [decoder], range(COUNT))
    mode = InterpolationMode(method)
    theirs = transforms.Compose([transforms.Resize(round(size / ratio), mode), transforms.CenterCrop(size)])
    for i in range(COUNT):
        assert np.array_equal(images[i], np.asarray(theirs(picture(i))))


def test_centre_crop_against_opencv_and_pillow(raw_file):
    images, _ = run(raw_file, [CropResizeDecoder(28, (0.8, 0.8))], range(COUNT))
    for i in range(COUNT):
        pixels = picture(i)
        top, left, h, w = augment.centre_box(pixels.height, pixels.width, 0.8)
        crop = pixels.crop((left, top, left + w, top + h))
        area = cv2.resize(np.asarray(crop), (28, 28), interpolation=cv2.INTER_AREA)
        assert np.abs(images[i].astype(int) - area).max() <= 1
        # Area averaging is Pillow's box filter up to how it weighs pixels on the edge of two boxes.
        box = np.asarray(crop.resize((28, 28), Image.Resampling.BOX))
        assert np.abs(images[i].astype(int) - box).mean() < 2


def test_whole_image_at_its_own_size_is_a_copy(tmp_path):
    prepare.prepare("synthetic:9x48@3", tmp_path / "x.beton", prepare.PrepareOptions(write_mode="raw"), progress=False)
    images, _ = run(tmp_path / "x.beton", [CropResizeDecoder(48, (1.0, 1.0))], range(9))
    source = sources.open_source("synthetic:9x48@3", "train")
    assert all(np.array_equal(images[i], np.asarray(source.load(i))) for i in range(9))


def test_jpeg_pixels_are_pillows(jpeg_file):
    images, status = run(jpeg_file, [CropResizeDecoder(70, (1.0, 1.0))], range(2, COUNT, 3))  # the 70 x 70 ones
    assert (status == augment.OK).all()
    for image, i in zip(images, range(2, COUNT, 3), strict=True):
        assert np.array_equal(image, np.asarray(stored_picture(i)))


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("reflect", [False, True])
def test_padded_crop(raw_file, jpeg_file, mode, reflect):
    path, size, pad = (raw_file if mode == "raw" else jpeg_file), 64, 5
    key = AugmentKey(9)
    images, status = run(path, [PaddedCropDecoder(size, pad, reflect=reflect, key=key)], range(COUNT))
    assert (status == augment.OK).all()
    places = []
    for i in range(COUNT):
        whole = picture(i) if mode == "raw" else stored_picture(i)
        pixels = np.pad(np.asarray(whole), ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if reflect else "constant")
        key_i = np.uint64(stream_key(9, 0, i, CROP))
        top = int(uniform(key_i, 0) * (pixels.shape[0] - size + 1))
        left = int(uniform(key_i, 1) * (pixels.shape[1] - size + 1))
        assert np.array_equal(images[i], pixels[top : top + size, left : left + size])
        places.append((top, left))
    assert len(set(places)) > COUNT // 2


@pytest.mark.parametrize("width", [8, 9])
def test_flip_mirrors(width):
    key, indices = AugmentKey(3), np.arange(50, 90)
    before = np.random.default_rng(0).integers(0, 256, (40, 5, width, 3), np.uint8)
    after = RandomFlip(key).generate_code()(before.copy(), None, indices)
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(after, before, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(after, before, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 30


ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.mark.parametrize("kind", [augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION])
def test_colours_are_adjusted_as_pillow_does(kind):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for factor in (0.0, 0.3, 0.77, 1.0, 1.4, 3.0):
        image = noise.copy()
        augment.adjust_colour(image.reshape(-1), kind, factor)
        assert np.array_equal(image, ENHANCERS[kind](Image.fromarray(noise)).enhance(factor))


def test_colour_jitter_takes_its_steps():
    pictures = np.stack([picture(2)] * 8)
    key = AugmentKey(4)
    jittered = ColorJitter(key, 0.4).generate_code()(pictures.copy(), None, np.arange(8))
    for i in range(8):
        expected = picture(2)
        for kind, factor in augment.jitter_steps(0.4, np.uint64(stream_key(4, 0, i, JITTER))):
            expected = ENHANCERS[kind](expected).enhance(factor)
        assert np.array_equal(jittered[i], expected)


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_colour_jitter_is_distributed_as_torchvisions(strength):
    count = 3000
    theirs = transforms.ColorJitter(strength, strength, strength)
    torch.manual_seed(0)
    drawn = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, None) for _ in range(count)]
    keys = [np.uint64(stream_key(1, 0, i, JITTER)) for i in range(count)]
    steps = [augment.jitter_steps(strength, key) for key in keys]
    bound = 1.95 * np.sqrt(2 / count)  # Kolmogorov-Smirnov, two samples, 0.1 %
    for kind in range(3):
        ours = np.array([dict(step)[kind] for step in steps])
        assert kolmogorov_smirnov(ours, np.array([params[1 + kind] for params in drawn])) < bound
    orders = [tuple(kind for kind, _ in step) for step in steps]
    assert set(orders) == {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    frequencies = np.array([orders.count(order) for order in set(orders)])
    assert ((frequencies - count / 6) ** 2 / (count / 6)).sum() < 20.5  # chi square, 5 degrees of freedom, 0.1 %


def test_erased_boxes_are_distributed_as_timms():
    import random

    count, height, width = 2000, 60, 90
    keys = [np.uint64(stream_key(1, 0, i, ERASE)) for i in range(count)]
    ours = np.array([augment.erased_box(height, width, key) for key in keys])
    theirs, erase = [], TimmsRandomErasing(probability=1.0, mode="const", device="cpu")
    random.seed(0)
    for _ in range(count):
        gone = erase(torch.ones(3, height, width))[0] == 0
        rows, columns = gone.any(1).nonzero(), gone.any(0).nonzero()
        theirs.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    theirs = np.array(theirs)
    bound = 1.95 * np.sqrt(2 / count)
    for column in range(4):
        assert kolmogorov_smirnov(ours[:, column], theirs[:, column]) < bound
    assert kolmogorov_smirnov(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) < bound


@pytest.mark.parametrize("pixel", [True, False])
def test_random_erasing(pixel):
    key, count, mean, std = AugmentKey(2), 400, (0.4, 0.5, 0.6), (0.1, 0.15, 0.2)
    white = np.full((count, 40, 50, 3), 255, np.uint8)
    erased = RandomErasing(key, 0.25, mean, std, pixel=pixel).generate_code()(white.copy(), None, np.arange(count))
    changed = 0
    values = []
    for i in range(count):
        stream = np.uint64(stream_key(2, 0, i, ERASE))
        top, left, height, width = augment.erased_box(40, 50, stream)
        if uniform(stream, 0) >= 0.25:
            assert (erased[i] == 255).all()
            continue
        changed += 1
        values.append(erased[i, top : top + height, left : left + width].reshape(-1, 3).copy())
        erased[i, top : top + height, left : left + width] = 255
        assert (erased[i] == 255).all()
    assert 70 < changed < 130
    values = np.concatenate(values) / 255
    assert np.abs(values.mean(0) - mean).max() < 0.003
    assert np.abs(values.std(0) - (std if pixel else 0)).max() < 0.004
    if pixel:
        assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.03  # channels are independent
        assert abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 0.03  # and so are neighbours


def every_operation(size: int, key: AugmentKey) -> list:
    return [
        CropResizeDecoder(size, (0.08, 1.0), (3 / 4, 4 / 3), method=resize.BICUBIC, key=key),
        RandomFlip(key),
        ColorJitter(key, 0.4),
        RandomErasing(key, 0.5, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), pixel=True),
    ]


def test_pixels_depend_on_seed_epoch_and_sample_only(jpeg_file):
    import numba

    def pixels(indices, seed=1, epoch=0, threads=2):
        key = AugmentKey(seed)
        key.set_epoch(epoch)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            return run(jpeg_file, every_operation(32, key), indices)[0]
        finally:
            numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)

    whole = pixels(range(COUNT))
    assert np.array_equal(whole, pixels(range(COUNT), threads=1))
    shuffled = np.random.default_rng(0).permutation(COUNT)
    assert np.array_equal(whole[shuffled], pixels(shuffled))
    assert np.array_equal(whole[5:6], pixels([5]))
    assert np.array_equal(whole[[5, 5, 5]], pixels([5, 5, 5]))
    for other in (pixels(range(COUNT), seed=2), pixels(range(COUNT), epoch=1)):
        assert all(not np.array_equal(a, b) for a, b in zip(whole, other, strict=True))


def test_no_epoch_and_no_crop_setting_compiles_again(raw_file):
    def run_once(epoch, scale, pad):
        key = AugmentKey(epoch)
        key.set_epoch(epoch)
        run(raw_file, [CropResizeDecoder(32, scale, (0.5, 2.0), key=key), RandomFlip(key)], range(4))
        run(raw_file, [PaddedCropDecoder(32, pad, reflect=epoch % 2 == 0, key=key)], range(4))
        run(raw_file, [CropResizeDecoder(24, scale)], range(4))
        run(raw_file, every_operation(24 + epoch, key), range(4))

    loops = (augment._crop_and_resize, augment._pad_and_crop, augment._flip, augment._jitter, augment._erase)
    run_once(0, (0.1, 1.0), 4)
    compiled = [len(loop.signatures) for loop in loops]
    for epoch in range(1, 4):
        run_once(epoch, (0.1 * epoch, 0.9), epoch)
    assert [len(loop.signatures) for loop in loops] == compiled


def test_compiled_code_is_kept_on_disk(raw_file):
    """A second process takes it from there: seconds per loader, rank and start."""
    loops = (augment._crop_and_resize, augment._pad_and_crop, augment._flip)
    run(raw_file, [CropResizeDecoder(24, (1.0, 1.0))], range(4))
    assert all(loop.stats.cache_path.startswith(compiled_loops._CACHE_FOLDER) for loop in loops)
    assert sum(loop.stats.cache_hits.total() + loop.stats.cache_misses.total() for loop in loops) > 0
    assert list(Path(augment._crop_and_resize.stats.cache_path).glob("augment._crop_and_resize*.nbi"))


def test_without_a_place_for_compiled_code_it_still_runs():
    code = (
        "from numba.core.caching import FunctionCache\n"
        "def nowhere(*_): raise RuntimeError('cannot cache function: no locator available')\n"
        "FunctionCache.__init__ = nowhere\n"
        "from automix_dist import augment\n"
        "assert augment.centre_box(4, 6, 0.5) == (1, 2, 2, 2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_disk_that_cannot_keep_compiled_code_stops_nothing(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("save", "load"):
        monkeypatch.setattr(f"numba.core.caching.IndexDataCacheFile.{name}", full)
    assert compiled_loops.compiled()(lambda x: x + 1)(2) == 3


def test_code_compiled_from_other_sources_or_for_another_processor_is_not_taken(monkeypatch):
    folders = {compiled_loops._cache_folder()}
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "another")
    folders.add(compiled_loops._cache_folder())
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"edited")
    assert len(folders | {compiled_loops._cache_folder()}) == 3


def test_torch_keeps_its_threads():
    code = (
        "import torch; torch.set_num_threads(3); from automix_dist import augment; assert torch.get_num_threads() == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("sums", [True, False])
def test_damaged_samples_are_reported(jpeg_file, raw_file, tmp_path, sums):
    for source, expected in ((jpeg_file, augment.UNREADABLE), (raw_file, augment.OK)):
        path = tmp_path / source.name
        path.write_bytes(source.read_bytes())
        index = beton.read_index(path)
        with open(path, "r+b") as file:
            file.seek(int(index.records["image"]["data_ptr"][7]))
            file.write(bytes(200))
        decoder = CropResizeDecoder(32, (1.0, 1.0), sums=index.sums if sums else None)
        _, status = run(path, [decoder], range(COUNT))
        # Damaged raw pixels, and JPEGs whose damage decodes, are seen by their sum only.
        assert status[7] == (augment.ALTERED if sums else expected)
        assert np.count_nonzero(status) == (status[7] != augment.OK)


FFCVS_LOADER = """
import sys
import numpy as np
from ffcv.fields.decoders import IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
from automix_dist import beton
from automix_dist.augment import AugmentKey
from test_augment import every_operation

path, out = sys.argv[1:]
key, sums = AugmentKey(1), beton.read_index(path).sums
operations = [*every_operation(32, key), ToTensor()]
operations[0].sums = sums
loader = Loader(path, batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL,
                pipelines={"image": operations, "label": [IntDecoder(), ToTensor()]})
np.save(out, np.concatenate([batch[0].numpy().copy() for batch in loader]))
"""


@pytest.mark.slow
def test_the_operations_run_in_ffcvs_own_loader(jpeg_file, tmp_path):
    # In a process of its own: FFCV's reader changes a type that all of numba's compiled code shares, after which
    # functions compiled earlier fail with a KeyError.
    command = [sys.executable, "-c", FFCVS_LOADER, str(jpeg_file), str(tmp_path / "images.npy")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(command, check=True, timeout=120, env=env)
    images, _ = run(jpeg_file, every_operation(32, AugmentKey(1)), range(COUNT))
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)


GUARDED = """
import ctypes, sys
import numpy as np
from automix_dist import resize

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for height, width, size in [(8, 512, 32), (600, 40, 32), (300, 2000, 224), (7, 6, 8), (64, 4288, 16)]:
    needed = 3 * height * width + resize.SLACK
    pages = -(-needed // 4096)
    start = libc.mmap(None, (pages + 1) * 4096, 3, 0x22, -1, 0)
    assert libc.mprotect(start + pages * 4096, 4096, 0) == 0  # reading beyond the buffer ends the process
    image = np.uint64(start + pages * 4096 - needed)
    for method in (resize.AREA, resize.BILINEAR, resize.BICUBIC):
        target = np.zeros((size, size, 3), np.uint8)
        resize.resample(image, width, (0, 0, height, width), (size, size), (0, 0), method, target)
print("within")
"""


def test_a_resize_reads_no_further_than_its_buffer():
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "within\n"), done.stderr


def test_a_pipeline_is_one_compiled_stage():
    """FFCV 1.0.2 never returns when compiled and plain operations alternate; all of ours are compiled."""
    from ffcv.pipeline.graph import INITIAL_STATE

    key = AugmentKey(0)
    crop = CropResizeDecoder(32, (0.5, 1.0), (1.0, 1.0), key=key)
    for decoder in (crop, PaddedCropDecoder(32, 4, reflect=False, key=key)):
        state, _ = decoder.declare_state_and_memory(INITIAL_STATE)
        assert state.jit_mode
        assert (state.shape, state.dtype) == ((32, 32, 3), np.uint8)
        for operation in every_operation(32, key)[1:]:
            assert operation.declare_state_and_memory(state) == (state, None)
