"""The JPEG decoder: boxes have the pixels of Pillow's whole image, whatever the file's form; damage is a status."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from automix_dist import jpeg

GUARD = 256


def picture(height: int, width: int) -> np.ndarray:
    """Smooth shapes and noise, so that all coefficients and both kinds of upsampling matter."""
    random = np.random.default_rng(height * width)
    grid = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return (np.asarray(grid) * 0.8 + random.integers(0, 50, (height, width, 3))).astype(np.uint8)


def pillows(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def opencvs(pixels: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", pixels, list(options))[1].tobytes()


SAMPLING, RESTART = cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_RST_INTERVAL
FORMS = {
    "420": lambda p: pillows(p, quality=90),
    "422": lambda p: pillows(p, quality=80, subsampling="4:2:2"),
    "444": lambda p: pillows(p, quality=95, subsampling="4:4:4"),
    "411": lambda p: opencvs(p, SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
    "440": lambda p: opencvs(p, SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
    "gray": lambda p: pillows(p[:, :, 1]),
    "progressive": lambda p: pillows(p, progressive=True),
    "optimised": lambda p: pillows(p, optimize=True, quality=40),
    "ours": lambda p: pillows(p, quality=90, restart_marker_blocks=jpeg.restart_interval(p.shape[1])),
    "restart each group": lambda p: pillows(p, quality=90, restart_marker_blocks=1),
    "restart each row": lambda p: pillows(p, quality=90, restart_marker_rows=1),
    "restart across rows": lambda p: pillows(p, quality=90, restart_marker_blocks=7),
    "restart 422": lambda p: pillows(p, subsampling="4:2:2", restart_marker_blocks=2),
    "restart 444": lambda p: pillows(p, subsampling="4:4:4", restart_marker_blocks=2),
    "restart 411": lambda p: opencvs(p, SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411, RESTART, 2),
    "restart 440": lambda p: opencvs(p, SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440, RESTART, 2),
    "restart gray": lambda p: pillows(p[:, :, 1], restart_marker_blocks=2),
    "restart progressive": lambda p: pillows(p, progressive=True, restart_marker_blocks=2),
}


def decode(data: bytes, height: int, width: int, box: tuple[int, int, int, int]) -> tuple[int, np.ndarray]:
    """Status, and the box's pixels; what lies around the image must not be touched."""
    memory = np.full(2 * GUARD + 3 * height * width, 77, np.uint8)
    address = memory.ctypes.data + GUARD
    status = jpeg.library().automix_decode_box(data, len(data), height, width, *box, address)
    assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all()
    top, left, h, w = box
    return status, memory[GUARD:-GUARD].reshape(height, width, 3)[top : top + h, left : left + w]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 96), (65, 97), (203, 151), (17, 33), (16, 200), (9, 8), (1, 1)])
def test_boxes_are_pillows(form, shape):
    height, width = shape
    data = FORMS[form](picture(height, width))
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    random = np.random.default_rng(1)
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (0, 0, 1, 1), (height // 2, 0, 1, width)]
    for _ in range(40):
        h, w = random.integers(1, height + 1), random.integers(1, width + 1)
        boxes.append((random.integers(height - h + 1), random.integers(width - w + 1), h, w))
    for box in boxes:
        top, left, h, w = map(int, box)
        status, pixels = decode(data, height, width, (top, left, h, w))
        assert status == 0
        assert np.array_equal(pixels, whole[top : top + h, left : left + w]), box


@pytest.mark.parametrize("form", ["ours", "restart each group", "restart 422", "restart 440"])
def test_narrow_boxes_at_the_right_are_pillows(form):
    """Of an image whose last column of blocks has few pixels only a part that libjpeg upsamples in another way."""
    height = 40
    for width in range(33, 49):
        data = FORMS[form](picture(height, width))
        whole = np.asarray(Image.open(io.BytesIO(data)))
        for w in range(1, 8):
            status, pixels = decode(data, height, width, (5, width - w, 20, w))
            assert status == 0
            assert np.array_equal(pixels, whole[5:25, width - w :]), (width, w)


def test_a_progressive_image_that_lacks_scans_is_refused():
    """Pillow reads it without a word; its pixels are a guess, which differs between versions of libjpeg."""
    height, width = 150, 170
    data = FORMS["progressive"](picture(height, width))
    assert jpeg.decodes(data, height, width)
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    tables = [data.rindex(b"\xff\xc4", 0, scan) for scan in scans]  # each scan has its own before it
    for table in tables[1:]:
        cut = data[:table] + b"\xff\xd9"
        assert Image.open(io.BytesIO(cut)).convert("RGB").size == (width, height)
        assert not jpeg.decodes(cut, height, width)


def test_restart_intervals_make_whole_rows():
    for width in (1, 16, 17, 300, 333, 375, 400, 500, 4000):
        assert -(-width // 16) % jpeg.restart_interval(width) == 0
    assert [jpeg.restart_interval(width) for width in (400, 500, 300)] == [5, 4, 1]


def test_restart_markers_cost_little():
    plain, ours = FORMS["420"](picture(375, 500)), FORMS["ours"](picture(375, 500))
    assert len(plain) < len(ours) < 1.02 * len(plain)


@pytest.mark.parametrize("form", ["420", "ours", "progressive", "gray"])
def test_damage_is_a_status_and_never_a_crash(form):
    """Each prefix class and 300 random changes; a change that libjpeg cannot see may pass, but stays inside."""
    height, width = 65, 97
    data = FORMS[form](picture(height, width))
    random = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 10, 100, 200, len(data) // 2):
        assert decode(data[:length], height, width, (0, 0, height, width))[0] == 1, length
    for _ in range(300):
        changed = bytearray(data)
        for place in random.integers(0, len(data), 3):
            changed[place] = random.integers(256)
        box = (int(random.integers(30)), int(random.integers(40)), 33, 50)
        assert decode(bytes(changed), height, width, box)[0] in (0, 1)
    assert decode(data, height, width, (3, 4, 33, 50))[0] == 0


def test_other_sizes_and_colours_are_refused():
    data = FORMS["ours"](picture(65, 97))
    assert jpeg.decodes(data, 65, 97)
    assert not jpeg.decodes(data, 64, 97)
    assert not jpeg.decodes(data, 65, 98)
    assert not jpeg.decodes(data, 97, 65)
    cmyk = io.BytesIO()
    Image.fromarray(picture(65, 97)).convert("CMYK").save(cmyk, "JPEG")
    assert not jpeg.decodes(cmyk.getvalue(), 65, 97)
    assert not jpeg.decodes(b"", 65, 97)
    assert not jpeg.decodes(b"no JPEG", 65, 97)
