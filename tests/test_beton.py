"""Writing, describing and checking .beton files."""

import ctypes
import errno
import fcntl
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from automix_dist import beton, prepare, sources
from automix_dist.beton import BetonError
from automix_dist.config import ConfigError
from automix_dist.jpeg import DecoderError, library
from automix_dist.prepare import PrepareOptions


def write(source, out, *, split="train", classes=None, workers=0, overwrite=False, **options) -> beton.Manifest:
    return prepare.prepare(
        str(source),
        out,
        PrepareOptions(**{"write_mode": "raw"} | options),
        split=split,
        classes=classes,
        workers=workers,
        overwrite=overwrite,
        progress=False,
    )


def stored(path: Path, i: int) -> bytes:
    """The bytes of image number i as they lie in the file."""
    index = beton.read_index(path)
    start = int(index.records["image"]["data_ptr"][i])
    return path.read_bytes()[start : start + int(index.sizes[i])]


def raw_pixels(path: Path, i: int) -> np.ndarray:
    image = beton.read_index(path).records["image"][i]
    assert image["mode"] == beton.RAW
    return np.frombuffer(stored(path, i), np.uint8).reshape(image["height"], image["width"], 3)


def photo(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A smooth picture with a few shapes, which JPEG keeps well."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(image).ellipse([5, 5, width // 2, height // 2], fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def make_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A tree of two classes with 6 JPEGs each."""
    files = {f"{name}/{i}.jpg": jpeg(photo(10 * k + i), quality=92) for k, name in enumerate("ab") for i in range(6)}
    return make_tree(tmp_path_factory.mktemp("photos"), files)


@pytest.fixture(scope="module")
def mixed_file(photos, tmp_path_factory) -> Path:
    """A .beton file of both storage modes; tests copy it before they damage it."""
    out = tmp_path_factory.mktemp("mixed") / "mixed.beton"
    manifest = write(photos, out, write_mode="proportion")
    assert (manifest.count, manifest.jpeg_count) == (12, 6)
    return out


@pytest.fixture
def copy(mixed_file, tmp_path) -> Path:
    target = tmp_path / "copy.beton"
    target.write_bytes(mixed_file.read_bytes())
    beton.manifest_path(target).write_bytes(beton.manifest_path(mixed_file).read_bytes())
    return target


def test_layout_is_ffcvs():
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    assert types.CURRENT_VERSION == beton.FFCV_VERSION
    assert types.HeaderType == beton.HEADER
    assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
    assert types.FieldDescType.itemsize == beton.FIELD.itemsize
    assert [types.FieldDescType.fields[n][1] for n in beton.FIELD.names] == [
        beton.FIELD.fields[n][1] for n in beton.FIELD.names
    ]
    ours, theirs = beton.RECORD, types.get_metadata_type([RGBImageField(), IntField()])
    assert ours.itemsize == theirs.itemsize
    assert [ours.fields[n] for n in ours.names] == [theirs.fields[n] for n in theirs.names]
    assert [types.TYPE_ID_HANDLER[t] for t, _ in beton.FIELDS] == [RGBImageField, IntField]


def test_ffcvs_reader_reads_it(mixed_file):
    from ffcv.reader import Reader

    reader, index = Reader(str(mixed_file)), beton.read_index(mixed_file)
    assert reader.field_names == ["image", "label"]
    assert reader.num_samples == 12
    assert reader.page_size == beton.PAGE
    assert np.array_equal(reader.metadata["f0"].tolist(), index.records["image"].tolist())
    assert np.array_equal(reader.metadata["f1"], index.records["label"])
    assert np.array_equal(reader.alloc_table["size"], index.sizes)


@given(st.lists(st.integers(1, 3 * beton.PAGE), min_size=1, max_size=40), st.integers(0, 10 * beton.PAGE))
def test_no_image_crosses_a_page(sizes, end):
    page, images = beton.PAGE, []
    for size in sizes:
        start, unit = prepare._place(end, size)
        assert start >= end
        assert start % beton.ALIGNMENT == 0
        images.append((start, size))
        end, page = start + size, max(page, unit)
    assert all(start // page == (start + size - 1) // page for start, size in images)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_sum_sees_any_changed_byte(data, draw):
    place = draw.draw(st.integers(0, len(data) - 1))
    value = draw.draw(st.integers(0, 255).filter(lambda v: v != data[place]))
    assert beton.word_sum(data) != beton.word_sum(data[:place] + bytes([value]) + data[place + 1 :])


def test_import_is_light():
    code = "import sys, automix_dist.prepare; assert not {'torch', 'ffcv', 'numba', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits(tmp_path):
    train, val = write("digits", tmp_path / "t.beton"), write("digits", tmp_path / "v.beton", split="val")
    assert (train.count, val.count) == (1442, 355)
    assert train.classes == val.classes == list("0123456789")
    assert all(abs(4 * v - t) <= 4 for t, v in zip(train.class_counts, val.class_counts, strict=True))
    assert train.height_range == train.width_range == (32, 32)
    seen = {
        raw_pixels(tmp_path / name, i).tobytes() for name, n in (("t.beton", 50), ("v.beton", 50)) for i in range(n)
    }
    assert len(seen) == 100

    from sklearn.datasets import load_digits

    first = Image.fromarray(np.round(load_digits().images[0] * 255 / 16).astype(np.uint8))
    expected = np.asarray(first.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
    assert np.array_equal(raw_pixels(tmp_path / "t.beton", 0), expected)

    few, rest = write("digits:20", tmp_path / "f.beton"), write("digits:20", tmp_path / "r.beton", split="val")
    assert few.class_counts == [20] * 10 and (few.count, rest.count) == (200, 1597)
    halves = ((few, "f.beton"), (rest, "r.beton")), ((train, "t.beton"), (val, "v.beton"))
    digits, every = (
        sorted(raw_pixels(tmp_path / name, i).tobytes() for manifest, name in half for i in range(manifest.count))
        for half in halves
    )
    assert digits == every


def test_same_file_for_any_number_of_workers(photos, tmp_path):
    sums = {write(photos, tmp_path / f"{w}.beton", write_mode="smart", workers=w).checksum for w in (1, 2, 5)}
    assert len(sums) == 1
    assert write("digits", tmp_path / "a.beton", workers=1).checksum == write("digits", tmp_path / "b.beton").checksum


@pytest.mark.parametrize("taken", ["o.beton", "o.beton.json"])
def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(taken, tmp_path):
    (tmp_path / taken).mkdir()
    with pytest.raises(BetonError, match=rf"{tmp_path / taken} is a folder: expected the name of a file"):
        write("synthetic:4x8@2", tmp_path / "o.beton")
    assert os.listdir(tmp_path) == [taken]


def test_image_folder_orders_as_torchvision(photos, tmp_path):
    from torchvision.datasets import ImageFolder

    root = make_tree(
        tmp_path / "tree",
        {f"{c}/{n}": jpeg(photo(1)) for c in ("b", "A", "a10", "a9") for n in ("2.JPG", "x/1.jpeg", "10.jpg")},
    )
    (root / "a9" / "notes.txt").write_text("not an image")
    reference, source = ImageFolder(str(root)), sources.open_source(str(root), "train")
    assert source.classes == reference.classes
    assert [(source.name(i), int(label)) for i, label in enumerate(source.labels)] == reference.samples


def test_folder_with_train_and_val(tmp_path):
    make_tree(tmp_path, {"train/a/1.png": jpeg(photo(1)), "val/a/1.png": jpeg(photo(2)), "val/a/2.png": jpeg(photo(3))})
    assert write(f"imagefolder:{tmp_path}", tmp_path / "t.beton").count == 1
    assert write(tmp_path, tmp_path / "v.beton", split="val").count == 2


@pytest.mark.parametrize("names", ["train test", "Train Val", "training validation", "train test extra", "train"])
def test_folders_of_splits_are_no_classes(tmp_path, names):
    make_tree(tmp_path, {f"{name}/a/1.png": jpeg(photo(1)) for name in names.split()})
    for split in ("train", "val"):
        with pytest.raises(BetonError, match=rf"'{names.split()[0]}'.* splits, not classes: call .* train and val"):
            write(tmp_path, tmp_path / "t.beton", split=split)


def test_a_folder_above_that_of_the_splits(tmp_path):
    make_tree(tmp_path, {f"imagenet/{name}/a/1.png": jpeg(photo(1)) for name in ("train", "val")})
    with pytest.raises(BetonError, match=rf"did you mean imagefolder:{tmp_path}/imagenet\?"):
        write(tmp_path, tmp_path / "t.beton")
    (tmp_path / "train").mkdir()  # a class of vehicles, beside another class
    assert sources.open_source(str(tmp_path), "train", classes=["imagenet", "train"]).classes == ["imagenet", "train"]


def test_what_a_folder_of_classes_has_besides_is_told(tmp_path):
    names = ("a/1.jpg", "a/2.gif", "a/3", "a/.DS_Store", "a/notes.txt", "b/4.jpg", ".ipynb_checkpoints/1.jpg")
    make_tree(tmp_path, dict.fromkeys(names, jpeg(photo(1))))
    source = sources.open_source(str(tmp_path), "train")
    assert source.classes == ["a", "b"]
    hidden, ignored = source.remarks
    assert hidden == "folders whose names begin with a dot are no classes: '.ipynb_checkpoints'"
    assert ignored == f"2 other files are ignored, such as {tmp_path}/a/2.gif"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "did you mean digits"),
        ("/no/such/folder", "existing folder"),
        ("imagefolder:/no/such/folder", "no such folder"),
        ("digits:x", "1 to 173 training images"),
        ("digits:0", "1 to 173 training images"),
        ("digits:174", "1 to 173 training images"),
        ("synthetic:", "COUNT"),
        ("synthetic:0", "COUNT"),
        ("synthetic:5x0", "COUNT"),
        ("cifar10:/no/such", r"cifar-10-batches-py.*https://"),
        ("cifar100:/no/such", r"cifar-100-python.*https://"),
    ],
)
def test_bad_sources(source, message, tmp_path):
    with pytest.raises(BetonError, match=message):
        write(source, tmp_path / "x.beton")
    assert list(tmp_path.iterdir()) == []


def test_the_classes_of_a_folder_with_splits_are_those_of_train(tmp_path):
    places = ("train/a", "train/b", "train/c", "val/b")
    root = make_tree(tmp_path, {f"{place}/1.jpg": jpeg(photo(0)) for place in places})
    (root / "val" / "c").mkdir()
    manifest = write(root, tmp_path / "x.beton", split="val")
    assert (manifest.classes, manifest.class_counts) == (["a", "b", "c"], [0, 1, 0])
    (root / "val" / "d").mkdir()
    with pytest.raises(BetonError, match=r"val has 'd', not in .*train"):
        write(root, tmp_path / "x.beton", split="val")


def test_a_folder_without_splits_is_not_taken_for_validation(photos, tmp_path):
    with pytest.raises(BetonError, match=r"no folders train and val to choose from.*--split val --holdout"):
        write(photos, tmp_path / "x.beton", split="val")


@pytest.fixture
def collection(tmp_path) -> Path:
    """A folder of classes with 1, 2, 10 and 17 images, of which each has its own pixels."""
    counts = {"a": 1, "b": 2, "c": 10, "d": 17}
    names = [f"{name}/{'' if i % 2 else 'deep/'}{i}.jpg" for name, count in counts.items() for i in range(count)]
    return make_tree(tmp_path / "my photos", {name: jpeg(photo(i)) for i, name in enumerate(names)})


def pictures(path: Path) -> list[bytes]:
    return [stored(path, i) for i in range(len(beton.read_index(path).records))]


@pytest.mark.filterwarnings("ignore:source")
def test_a_share_of_each_class_is_held_out(collection, tmp_path, monkeypatch):
    counts = {}
    for split in ("train", "val"):
        manifest = write(collection, tmp_path / f"{split}.beton", split=split, holdout=0.2, write_mode="jpg")
        counts[split] = manifest.class_counts
        assert (manifest.classes, manifest.split, manifest.options["holdout"]) == ([*"abcd"], split, 0.2)
    assert counts == {"train": [1, 1, 8, 14], "val": [0, 1, 2, 3]}
    train, val = (pictures(tmp_path / f"{split}.beton") for split in counts)
    every = [path.read_bytes() for path in collection.rglob("*.jpg")]
    assert sorted(train + val) == sorted(every) and len(set(every)) == 30

    # By the names below the folder alone, not by where it lies, how it is given or what the images hold.
    elsewhere = tmp_path / "other"
    os.rename(collection, elsewhere)
    (elsewhere / "c/1.jpg").write_bytes(jpeg(photo(99)))
    monkeypatch.chdir(elsewhere)
    held = sources.open_source(".", "val", holdout=0.2)
    assert [os.path.normpath(held.name(i)) for i in range(6)] == [
        "b/1.jpg", "c/deep/2.jpg", "c/deep/8.jpg", "d/15.jpg", "d/deep/12.jpg", "d/deep/4.jpg",
    ]  # fmt: skip
    assert held.remarks == ["classes with one image only, which is for training: 'a'"]


def test_held_out_images_are_a_source_like_any_other(collection):
    whole, held = (
        sources.open_source(str(collection), "train"),
        sources.open_source(str(collection), "val", holdout=0.2),
    )
    assert [held.key(i) for i in range(6)] == [os.path.relpath(held.name(i), collection) for i in range(6)]
    assert (held.kind, held.argument, held.has_splits) == (whole.kind, whole.argument, whole.has_splits)
    assert (held.empty, held.unused, held.ignored) == (whole.empty, whole.unused, whole.ignored)
    held.use_classes([*"dcba"])
    assert held.labels.tolist() == [2, 1, 1, 0, 0, 0]
    with pytest.raises(sources.SourceError, match=r"^source 'imagefolder:.*my photos' has images of 'b', not in the"):
        held.use_classes([*"cd"])


def test_at_most_all_but_one_of_a_class_are_held_out(photos):
    for share, expected in ((0.001, [1, 1]), (0.999, [5, 5])):
        held = sources.open_source(str(photos), "val", holdout=share)
        assert np.bincount(held.labels).tolist() == expected


def test_a_share_of_shards_without_splits_is_held_out(tmp_path):
    members = {
        f"{i}.{kind}": data for i in range(8) for kind, data in (("jpg", jpeg(photo(i))), ("cls", b"%d" % (i % 2)))
    }
    make_shard(tmp_path / "s.tar", members | {"8.jpg": b"", "8.cls": b"x", "9.jpg": b"", "9.cls": b"x"})
    parts = [sources.open_source(f"webdataset:{tmp_path}", split, holdout=0.25) for split in ("train", "val")]
    assert [np.bincount(part.labels[part.labels >= 0]).tolist() for part in parts] == [[3, 3], [1, 1]]
    assert [[*part.unknown.values()] for part in parts] == [["class 'x' is not one of the 2 classes"]] * 2
    names = sorted(part.name(i) for part in parts for i in range(len(part.labels)))
    assert names == [f"{tmp_path}/s.tar:{i}.jpg" for i in range(10)]


def test_what_has_splits_or_too_few_images_for_a_holdout(tmp_path):
    root = make_tree(tmp_path, {f"{name}/1.jpg": jpeg(photo(1)) for name in ("train/a", "val/a")})
    make_shard(root / "train.tar", {"1.jpg": b"", "1.cls": b"0"})
    for source in ("digits", "synthetic:4", root, f"webdataset:{root}"):
        with pytest.raises(BetonError, match=r"has splits of its own: leave --holdout out"):
            write(source, tmp_path / "x.beton", holdout=0.5)
    with pytest.raises(BetonError, match=r"no class has two images"):
        write(root / "train", tmp_path / "x.beton", holdout=0.5)


def test_the_class_list_of_another_file(tmp_path):
    root = make_tree(tmp_path / "val", {"c/1.jpg": jpeg(photo(0)), "a/1.jpg": jpeg(photo(1))})
    (root / "b").mkdir()
    (tmp_path / "classes.txt").write_text("c\nb\n\na\nz\n")
    named = beton.read_classes(tmp_path / "classes.txt")
    manifest = write(root, tmp_path / "x.beton", classes=named)
    assert (manifest.classes, manifest.class_counts) == (["c", "b", "a", "z"], [1, 0, 1, 0])
    assert beton.read_index(tmp_path / "x.beton").records["label"].tolist() == [2, 0]  # in the order of the folders
    assert beton.read_classes(tmp_path / "x.beton") == named
    with pytest.raises(BetonError, match=r"has images of 'a', not in the class list given"):
        write(root, tmp_path / "x.beton", classes=["b", "c"])
    (tmp_path / "classes.txt").write_text("a\nb\na\n")
    with pytest.raises(BetonError, match="each of them once"):
        beton.read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")  # as Windows writes it
    assert beton.read_classes(tmp_path / "classes.txt") == ["a", "b"]

    make_shard(tmp_path / "s.tar", {"1.jpg": jpeg(photo(0)), "1.cls": b"1", "2.jpg": jpeg(photo(1)), "2.cls": b"x"})
    manifest = write(f"webdataset:{tmp_path}", tmp_path / "y.beton", classes=["0", "1", "2"], skip_broken=True)
    assert (manifest.classes, manifest.class_counts, len(manifest.skipped)) == (["0", "1", "2"], [0, 1, 0], 1)


def test_folders_without_images(tmp_path):
    with pytest.raises(BetonError, match="no subfolders"):
        write(tmp_path, tmp_path / "x.beton")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BetonError, match="empty has no images"):
        write(tmp_path, tmp_path / "x.beton")


def make_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path):
    pictures = [jpeg(photo(i)) for i in range(5)]
    make_shard(
        tmp_path / "s-1.tar", {"a/03.jpg": pictures[3], "a/03.cls": b"2", "a/04.cls": b"0\n", "a/04.JPEG": pictures[4]}
    )
    members = {
        f"{i:02d}.{kind}": data
        for i in range(3)
        for kind, data in (("jpg", pictures[i]), ("cls", b"1"), ("json", b"{}"))
    }
    make_shard(tmp_path / "s-0.tar", members)
    for source in (f"webdataset:{tmp_path}", f"webdataset:{tmp_path}/s-*.tar"):
        manifest = write(source, tmp_path / "x.beton", write_mode="jpg", workers=3, overwrite=True)
        assert (manifest.count, manifest.classes, manifest.class_counts) == (5, ["0", "1", "2"], [1, 3, 1])
        assert [stored(tmp_path / "x.beton", i) for i in range(5)] == pictures
        assert beton.read_index(tmp_path / "x.beton").records["label"].tolist() == [1, 1, 1, 2, 0]
    assert sources.open_source(source, "train").name(3) == f"{tmp_path}/s-1.tar:a/03.jpg"


def test_webdataset_that_cannot_be_used(tmp_path):
    shard, picture = tmp_path / "s.tar", jpeg(photo(0))
    with pytest.raises(BetonError, match=r"no \.tar files in that folder"):
        write(f"webdataset:{tmp_path}", tmp_path / "x.beton")
    with pytest.raises(BetonError, match="no such file"):
        write(f"webdataset:{tmp_path}/*.tar", tmp_path / "x.beton")
    for members, message in (
        ({"1.jpg": picture}, "sample '/1' lacks"),
        ({"1.cls": b"0"}, "sample '/1' lacks"),
        ({"1.jpg": picture, "1.cls": b"cat"}, r"s\.tar:1\.jpg: class 'cat' is not one"),
        ({"1.jpg": picture, "1.cls": b"-1"}, r"s\.tar:1\.jpg: label -1 is not in"),
        ({"1.jpg": picture, "1.cls": b"5000000"}, r"s\.tar:1\.jpg: label 5000000 is not in"),
        ({"1.txt": b"hello"}, "there are no images in 1 shard"),
    ):
        make_shard(shard, members)
        with pytest.raises(BetonError, match=message):
            write(f"webdataset:{tmp_path}", tmp_path / "x.beton")
    shard.write_bytes(b"nonsense" * 1000)
    with pytest.raises(BetonError, match="is not a readable"):
        write(f"webdataset:{tmp_path}", tmp_path / "x.beton")
    make_shard(shard, {"1.jpg": picture, "1.cls": b"0", "2.jpg": picture[:100], "2.cls": b"0"})
    with pytest.raises(BetonError, match=r"1 of 2 images.*\n.*s\.tar:2\.jpg"):
        write(f"webdataset:{tmp_path}", tmp_path / "x.beton")


def test_cifar_from_local_files(tmp_path, monkeypatch):
    import torchvision

    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": pixels, "labels": list(range(10)) * 2}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {i}" for i in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    manifest = write(f"cifar10:{tmp_path}", tmp_path / "x.beton")
    assert (manifest.count, manifest.classes[3]) == (100, "thing 3")
    assert np.array_equal(raw_pixels(tmp_path / "x.beton", 25), pixels[5].reshape(3, 32, 32).transpose(1, 2, 0))


def test_synthetic_is_deterministic_and_learnable(tmp_path):
    train, val = (sources.open_source("synthetic:60x48@3", split) for split in ("train", "val"))
    again = sources.open_source("synthetic:60x48@3", "train")
    assert np.array_equal(np.asarray(train.load(7)), np.asarray(again.load(7)))
    assert not np.array_equal(np.asarray(train.load(7)), np.asarray(val.load(7)))
    colours, val_colours = (np.array([np.asarray(s.load(i)).mean((0, 1)) for i in range(60)]) for s in (train, val))
    centres = np.array([colours[train.labels == c].mean(0) for c in range(3)])
    nearest = ((val_colours[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == val.labels).mean() > 0.9


def test_synthetic_weighs_as_imagenet(tmp_path):
    manifest = write("synthetic:24", tmp_path / "x.beton", write_mode="jpg")
    assert 80_000 < manifest.file_size / manifest.count < 120_000  # ImageNet's mean is about 110 KB
    assert manifest.height_range == manifest.width_range == (333, 500)


def exotic_images() -> dict[str, bytes]:
    """One image file of each kind that needs care."""
    base = photo(3)
    gradient = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))))
    palette = base.quantize(16)
    frames = [photo(i) for i in range(3)]
    kinds = {
        "gray.jpg": ("JPEG", base.convert("L"), {}),
        "cmyk.jpg": ("JPEG", base.convert("CMYK"), {}),
        "progressive.jpg": ("JPEG", base, {"progressive": True}),
        "unsampled.jpg": ("JPEG", base, {"subsampling": 0}),
        "rotated.jpg": ("JPEG", base, {"exif": _rotated()}),
        "gray.png": ("PNG", base.convert("L"), {}),
        "gray_alpha.png": ("PNG", base.convert("LA"), {}),
        "alpha.png": ("PNG", alpha, {}),
        "sixteen.png": ("PNG", Image.fromarray(gradient), {}),
        "palette.png": ("PNG", palette, {}),
        "palette_alpha.png": ("PNG", palette, {"transparency": 3}),
        "one_bit.png": ("PNG", base.convert("1"), {}),
        "animated.png": ("PNG", frames[0], {"save_all": True, "append_images": frames[1:]}),
        "animated.webp": ("WEBP", frames[0], {"save_all": True, "append_images": frames[1:], "lossless": True}),
        "pages.tiff": ("TIFF", frames[0], {"save_all": True, "append_images": frames[1:]}),
        "plain.bmp": ("BMP", base, {}),
        "two.jpg": ("MPO", frames[0], {"save_all": True, "append_images": frames[1:]}),
    }
    files = {}
    for name, (form, image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[name] = buffer.getvalue()
    return files


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to show
    return exif


@pytest.fixture(scope="module")
def exotic(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("exotic"), {f"all/{name}": data for name, data in exotic_images().items()})


@pytest.mark.filterwarnings("ignore:Palette images", "ignore:1 images have more than 8 bits")
def test_images_are_read_as_torchvision_reads_them(exotic, tmp_path):
    from torchvision.datasets.folder import default_loader

    write(exotic, tmp_path / "x.beton")
    source = sources.open_source(str(exotic), "train")
    assert len(source.labels) == len(exotic_images())
    for i in range(len(source.labels)):
        expected = np.asarray(default_loader(source.name(i)))
        assert np.array_equal(raw_pixels(tmp_path / "x.beton", i), expected), source.name(i)
        assert expected.shape == (40, 60, 3)


@pytest.mark.filterwarnings("ignore:Palette images", "ignore:1 images have more than 8 bits")
def test_which_jpegs_are_kept(exotic, tmp_path):
    manifest = write(exotic, tmp_path / "x.beton", write_mode="jpg")
    assert manifest.jpeg_count == manifest.count
    source = sources.open_source(str(exotic), "train")
    kept = {
        Path(source.name(i)).name for i in range(manifest.count) if stored(tmp_path / "x.beton", i) == source.load(i)
    }
    assert kept == {"gray.jpg", "progressive.jpg", "unsampled.jpg", "rotated.jpg", "two.jpg"}  # CMYK had to change
    beton.verify(tmp_path / "x.beton")


def test_a_jpeg_that_the_decoder_complains_about_is_encoded_anew(tmp_path):
    # Pillow reads it without a word; our decoder reports junk before the end marker, which training takes as damage.
    data = jpeg(photo(5))
    make_tree(tmp_path, {"a/odd.jpg": data[:-2] + b"\x00\x11\x22\x33\x44\x55" + data[-2:], "a/plain.jpg": data})
    write(tmp_path, tmp_path / "x.beton", write_mode="jpg")
    assert stored(tmp_path / "x.beton", 0) != (tmp_path / "a/odd.jpg").read_bytes()
    assert stored(tmp_path / "x.beton", 1) == data
    beton.verify(tmp_path / "x.beton")


def test_restart_markers_change_no_pixel(photos, tmp_path):
    for markers in (True, False):
        manifest = write(
            photos, tmp_path / f"{markers}.beton", write_mode="jpg", max_resolution=50, restart_markers=markers
        )
        assert manifest.options["restart_markers"] is markers
    with_markers, plain = stored(tmp_path / "True.beton", 0), stored(tmp_path / "False.beton", 0)
    assert b"\xff\xdd" in with_markers and b"\xff\xdd" not in plain
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(data))) for data in (with_markers, plain)))


def test_max_resolution(photos, tmp_path):
    small = write(photos, tmp_path / "s.beton", max_resolution=30)
    assert (small.height_range, small.width_range) == ((20, 20), (30, 30))
    source = sources.open_source(str(photos), "train")
    image = Image.open(source.name(0)).convert("RGB").resize((30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(raw_pixels(tmp_path / "s.beton", 0), np.asarray(image))
    large = write(photos, tmp_path / "l.beton", max_resolution=60, write_mode="jpg")
    assert large.width_range == (60, 60)
    assert stored(tmp_path / "l.beton", 0) == source.load(0)
    reduced = write(photos, tmp_path / "j.beton", max_resolution=30, write_mode="jpg", quality=50)
    finer = write(photos, tmp_path / "f.beton", max_resolution=30, write_mode="jpg", quality=95)
    assert reduced.jpeg_count == finer.jpeg_count == 12
    assert reduced.file_size < finer.file_size


def test_smart_mode_compresses_what_compresses_well(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    make_tree(tmp_path, {"a/noise.jpg": jpeg(noise, quality=95), "a/smooth.jpg": jpeg(photo(1, 300, 200))})
    assert write(tmp_path, tmp_path / "x.beton", write_mode="smart").jpeg_count == 1
    modes = beton.read_index(tmp_path / "x.beton").records["image"]["mode"]
    assert modes.tolist() == [beton.RAW, beton.JPEG]


def test_an_image_larger_than_a_page(tmp_path):
    make_tree(tmp_path, {"a/1.jpg": jpeg(photo(1)), "a/2.jpg": jpeg(photo(2, 2000, 1500)), "a/3.jpg": jpeg(photo(3))})
    write(tmp_path, tmp_path / "x.beton")
    from ffcv.reader import Reader

    assert Reader(str(tmp_path / "x.beton")).page_size == 2 * beton.PAGE
    beton.verify(tmp_path / "x.beton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "train or val"),
        ({"holdout": 1.0}, "--holdout 1.0: expected a share"),
        ({"holdout": float("nan")}, "--holdout nan"),
        ({"per_class": 0}, "--per-class 0"),
        ({"write_mode": "jpeg"}, "raw, jpg"),
        ({"max_resolution": 0}, "1 to 65535"),
        ({"quality": 0}, "1 to 100"),
        ({"workers": -1}, "--workers -1"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        write("digits", tmp_path / "x.beton", **options)


def test_a_missing_decoder_is_no_broken_image(tmp_path, monkeypatch):
    load = ctypes.CDLL
    library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: load(f"{path}.missing"))
    with pytest.raises(DecoderError, match=r"cannot open .*launch/install\.sh"):
        write("digits:4", tmp_path / "x.beton", write_mode="jpg", skip_broken=True)
    assert write("digits:4", tmp_path / "x.beton").jpeg_count == 0


def test_output_must_be_a_beton_file(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.beton"):
        write("digits", tmp_path / "digits")


def test_the_first_images_of_each_class(tmp_path):
    labels = [1, 0, 1, 1, 0, 2, 0, 1]  # mixed, as shards have them; the third class has one image only
    images = {f"{i}.jpg": jpeg(photo(i)) for i in range(8)}
    make_shard(
        tmp_path / "s.tar",
        {k: v for i in range(8) for k, v in {f"{i}.jpg": images[f"{i}.jpg"], f"{i}.cls": b"%d" % labels[i]}.items()},
    )
    manifest = write(f"webdataset:{tmp_path}", tmp_path / "x.beton", write_mode="jpg", per_class=2)
    assert (manifest.count, manifest.class_counts, manifest.options["per_class"]) == (5, [2, 2, 1], 2)
    assert beton.read_index(tmp_path / "x.beton").records["label"].tolist() == [1, 0, 1, 0, 2]
    assert [stored(tmp_path / "x.beton", k) for k in range(5)] == [images[f"{i}.jpg"] for i in (0, 1, 2, 4, 5)]
    beton.verify(tmp_path / "x.beton", progress=False)


def test_the_next_images_stand_in_for_unreadable_ones(tmp_path):
    good = {f"{name}/{i}.jpg": jpeg(photo(i)) for name in "ab" for i in range(4)}
    root = make_tree(tmp_path / "tree", good | {"a/0.jpg": b"", "a/1.jpg": b"<html>", "b/3.jpg": b""})
    out = tmp_path / "x.beton"
    with pytest.raises(BetonError, match="1 of 2 images"):
        write(root, out, per_class=1)
    manifest = write(root, out, per_class=1, skip_broken=True, write_mode="jpg")
    assert (manifest.class_counts, len(manifest.skipped)) == ([1, 1], 2)
    assert [stored(out, k) for k in range(2)] == [good["b/0.jpg"], good["a/2.jpg"]]
    manifest = write(root, out, per_class=3, skip_broken=True, write_mode="jpg", overwrite=True)
    assert (manifest.class_counts, len(manifest.skipped)) == ([2, 3], 2)
    for workers in (1, 5):  # every second image of the file, not of the folder
        out = tmp_path / f"{workers}.beton"
        manifest = write(root, out, per_class=2, skip_broken=True, write_mode="proportion", workers=workers)
        assert (manifest.count, manifest.jpeg_count) == (4, 2)


def test_images_of_no_class_are_told_of_few_as_of_all(tmp_path):
    make_shard(tmp_path / "s.tar", {"1.jpg": jpeg(photo(0)), "1.cls": b"1", "2.jpg": jpeg(photo(1)), "2.cls": b"x"})
    with pytest.raises(BetonError, match="1 of 2 images"):
        write(f"webdataset:{tmp_path}", tmp_path / "x.beton", per_class=1, classes=["0", "1", "2"])


@pytest.fixture
def damaged_tree(tmp_path) -> Path:
    good = jpeg(photo(1, 200, 150))
    return make_tree(
        tmp_path / "tree",
        {
            "a/good.jpg": good,
            "a/truncated.jpg": good[: len(good) // 2],
            "b/empty.jpg": b"",
            "b/good.jpg": good,
            "b/text.png": b"<html>404</html>",
            "b/zeros.jpg": bytes(5000),
        },
    )


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_broken_images_are_listed_and_fail(damaged_tree, tmp_path, mode):
    with pytest.raises(BetonError) as error:
        write(damaged_tree, tmp_path / "x.beton", write_mode=mode)
    text = str(error.value)
    assert "4 of 6 images" in text
    assert "--skip-broken" in text
    assert all(
        str(damaged_tree / name) in text for name in ("a/truncated.jpg", "b/empty.jpg", "b/text.png", "b/zeros.jpg")
    )
    assert "good.jpg" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_skip_broken_leaves_them_out_and_says_so(damaged_tree, tmp_path, mode):
    manifest = write(damaged_tree, tmp_path / "x.beton", write_mode=mode, skip_broken=True)
    assert (manifest.count, manifest.class_counts) == (2, [1, 1])
    assert [Path(p).name for p in manifest.skipped] == ["truncated.jpg", "empty.jpg", "text.png", "zeros.jpg"]
    assert beton.verify(tmp_path / "x.beton") == manifest
    assert beton.read_index(tmp_path / "x.beton").records["label"].tolist() == [0, 1]


@pytest.mark.parametrize("skip_broken", [False, True])
def test_what_the_system_cannot_read_is_no_broken_image(damaged_tree, tmp_path, monkeypatch, skip_broken):
    (damaged_tree / "a/nowhere.jpg").symlink_to("nothing")
    (damaged_tree / "b/mem.jpg").symlink_to("/proc/self/mem")  # whose first byte gives EIO, as a dying disk does
    with pytest.raises(BetonError, match=r"^cannot read .*/b/mem\.jpg: Input/output error; "):
        write(damaged_tree, tmp_path / "x.beton", skip_broken=skip_broken)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
    (damaged_tree / "b/mem.jpg").unlink()
    with pytest.raises(BetonError, match=r"(?s)5 of 7 .*nowhere\.jpg: FileNotF.*zeros\.jpg: no known image format"):
        write(damaged_tree, tmp_path / "x.beton")

    def load(self, i):
        raise MemoryError

    monkeypatch.setattr("automix_dist.sources.Files.load", load)
    with pytest.raises(BetonError, match=r"^cannot read .*/a/good\.jpg: out of memory"):
        write(damaged_tree, tmp_path / "x.beton", skip_broken=skip_broken)


def test_a_shard_that_went_away_is_no_broken_image(tmp_path):
    make_shard(tmp_path / "s.tar", {"1.jpg": jpeg(photo(0)), "1.cls": b"0"})
    images = sources.open_source(f"webdataset:{tmp_path}", "train")
    (tmp_path / "s.tar").unlink()
    with pytest.raises(BetonError, match=r"cannot read .*s\.tar:1\.jpg: No such file"):
        prepare._encode(images, PrepareOptions(), (0, 0))


def test_skip_broken_tells_how_many_and_which_classes_are_lost(damaged_tree, tmp_path):
    (damaged_tree / "b/good.jpg").unlink()
    out = tmp_path / "x.beton"
    run = subprocess.run(
        [sys.executable, "-m", "automix_dist", "prepare", damaged_tree, out, "--skip-broken"],
        capture_output=True,
        text=True,
        check=True,
    )
    manifest = beton.read_manifest(out)
    assert (manifest.class_counts, len(manifest.skipped)) == ([1, 0], 4)
    assert f"left out: 4 images, named in {out}.json under `skipped`\n" in run.stdout
    assert "classes of which no image is left: 'b'\n" in run.stderr


def test_images_of_more_than_8_bits_are_told(tmp_path):
    deep = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    kinds = {"16.png": deep, "int.tiff": deep.astype(np.int32), "float.tiff": deep.astype(np.float32), "8.png": None}
    for name, pixels in kinds.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (photo(0) if pixels is None else Image.fromarray(pixels)).save(tmp_path / "a" / name)
    with pytest.warns(UserWarning, match=rf"3 images have more than 8 bits a pixel, such as {tmp_path}/a/16\.png"):
        write(tmp_path, tmp_path / "x.beton")
    index = beton.read_index(tmp_path / "x.beton")
    white = [(raw_pixels(tmp_path / "x.beton", i) == 255).mean() > 0.99 for i in range(len(index.records))]
    assert white == [True, False, True, True]  # in the order of the names: 16, 8, float, int


def test_no_text_of_an_image_goes_into_its_jpeg(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    for name, length in (("long", 70_000), ("short", 7), ("none", 0)):
        text = PngInfo()
        if length:
            text.add_text("comment", "x" * length)
        (tmp_path / "a").mkdir(exist_ok=True)
        photo(0).save(tmp_path / "a" / f"{name}.png", pnginfo=text)
    write(tmp_path, tmp_path / "x.beton", write_mode="jpg")
    assert len({stored(tmp_path / "x.beton", i) for i in range(3)}) == 1


def test_nothing_but_broken_images_fails_always(tmp_path):
    make_tree(tmp_path, {"a/1.jpg": b"x"})
    with pytest.raises(BetonError, match="every one"):
        write(tmp_path, tmp_path / "x.beton", skip_broken=True)


SLOW_WRITER = """
import signal
import sys
from pathlib import Path
from automix_dist import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a shell's background job
prepare.prepare("synthetic:100000x64@10", Path(sys.argv[1]), workers=1, overwrite=True, progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_write_leaves_nothing_that_looks_finished(tmp_path, how, existed):
    out = tmp_path / "x.beton"
    before = write("digits", out) if existed else None
    writer = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(out)], stderr=subprocess.DEVNULL)
    unfinished = tmp_path / "x.beton.partial"
    while not (unfinished.exists() and unfinished.stat().st_size > 200_000):
        assert writer.poll() is None
        time.sleep(0.02)
    with pytest.raises(BetonError, match="another process"):
        write("digits", out)
    writer.send_signal(how)
    assert writer.wait(timeout=30) != 0
    if existed:
        assert beton.verify(out) == before
    else:
        assert not out.exists()
        with pytest.raises(BetonError, match="does not exist"):
            beton.check(out)
    write("digits", out)
    beton.verify(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def test_ctrl_c_in_the_midst_of_a_lock_leaves_it_to_the_threads(tmp_path):
    """The signal comes when the main thread has just taken a lock that a worker needs to deliver its image."""
    code = """
import os, signal, sys, threading
from automix_dist import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)
take, taken = threading.Condition.__enter__, []
def interrupted(condition):
    result = take(condition)
    if threading.get_ident() == main:
        taken.append(condition)
        if len(taken) == 20:
            os.kill(os.getpid(), signal.SIGINT)
            threading.get_ident()  # where the interpreter looks for signals
    return result
main = threading.get_ident()
threading.Condition.__enter__ = interrupted
try:
    prepare.prepare("synthetic:100000x64@10", sys.argv[1], workers=1, progress=False)
except KeyboardInterrupt:
    print("stopped")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.beton")], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "stopped\n", run.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_dataset_is_replaced_only_if_told_to(photos, tmp_path):
    out = tmp_path / "x.beton"
    before = write(photos, out)
    assert write(photos, out, workers=1) == before  # the same again
    changes = [
        ("digits", {}, "source: .* -> 'digits', another class list"),
        (photos, {"holdout": 0.5}, "holdout: None -> 0.5"),
        (photos, {"split": "val", "holdout": 0.5}, "split: 'train' -> 'val', holdout: None -> 0.5"),
        (photos, {"per_class": 1, "write_mode": "jpg"}, "per_class: None -> 1, write_mode: 'raw' -> 'jpg'"),
        (photos, {"classes": ["b", "a"]}, "another class list"),
    ]
    for source, options, change in changes:
        with pytest.raises(BetonError, match=rf"x\.beton holds another dataset already \({change}\): .* --overwrite$"):
            write(source, out, **options)
    assert beton.verify(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]
    assert write(photos, out, write_mode="jpg", overwrite=True) == beton.verify(out) != before

    older = json.loads(beton.manifest_path(out).read_text())
    del older["options"]["holdout"]  # an option that its version did not know
    beton.manifest_path(out).write_text(json.dumps(older))
    write(photos, out, write_mode="jpg")


@pytest.mark.parametrize("damage", ["half", "empty", "text", "manifest is text", "manifest of the future"])
def test_what_cannot_be_told_is_replaced_only_if_told_to(copy, photos, damage):
    DAMAGES[damage](copy)
    if "manifest" not in damage:
        beton.manifest_path(copy).unlink()
    before = copy.read_bytes()
    with pytest.raises(BetonError, match="--overwrite"):
        write(photos, copy)
    assert copy.read_bytes() == before
    write(photos, copy, overwrite=True)


def test_a_file_that_was_killed_before_its_manifest_is_written_again(copy):
    beton.manifest_path(copy).unlink()
    assert write("digits", copy) == beton.verify(copy)


def test_killed_between_file_and_manifest(copy):
    beton.manifest_path(copy).unlink()
    with pytest.raises(BetonError, match=r"no manifest.*interrupted"):
        beton.check(copy)


def test_killed_between_a_new_file_and_its_manifest(copy, photos, tmp_path):
    write(photos, tmp_path / "new.beton", write_mode="proportion", quality=91, max_resolution=59)
    os.replace(tmp_path / "new.beton", copy)
    with pytest.raises(BetonError, match="manifest"):
        beton.check(copy)


def test_a_full_disk_gives_one_message(tmp_path):
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom automix_dist import beton, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))\n"
        "try: prepare.prepare('digits', Path(sys.argv[1]), progress=False)\n"
        "except beton.BetonError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.beton")], capture_output=True, text=True)
    assert run.stdout.startswith(f"cannot write {tmp_path}/x.beton: File too large"), run
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_cannot_be_written_leaves_the_older_pair(tmp_path, monkeypatch):
    out = tmp_path / "x.beton"
    before = write("digits:3", out)
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".json.partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BetonError, match="No space left on device"):
        write("digits:4", out, overwrite=True)
    monkeypatch.undo()
    assert calls and beton.verify(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, monkeypatch):
    large, small = tmp_path / "large", tmp_path / "small"
    large.mkdir(), small.mkdir()
    (small / "x.beton").symlink_to(large / "data.beton")
    write("digits:3", small / "x.beton")
    lock, places = prepare._locked, []
    monkeypatch.setattr(prepare, "_locked", lambda path: places.append(path) or lock(path))
    manifest = write("digits:4", small / "x.beton", overwrite=True)
    assert places == [large / "data.beton.partial"]
    assert [path.name for path in large.iterdir()] == ["data.beton"]
    assert (small / "x.beton").is_symlink() and beton.verify(small / "x.beton") == manifest


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert write("digits:3", tmp_path / "x.beton").count == 30


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BetonError, match="cannot write"):
        write("digits", tmp_path / "file" / "x.beton")


def edit(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def header_field(name: str) -> int:
    return beton.HEADER.fields[name][1]


def tables_start(path: Path) -> int:
    return int(np.fromfile(path, beton.HEADER, 1)["alloc_table_ptr"][0])


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "a few bytes": lambda path: path.write_bytes(path.read_bytes()[:10]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_bytes((b"not a beton " * path.stat().st_size)[: path.stat().st_size]),
    "wrong version": lambda path: edit(path, header_field("version"), b"\x07"),
    "wrong number of fields": lambda path: edit(path, header_field("num_fields"), b"\x05"),
    "page size": lambda path: edit(path, header_field("page_size"), b"\x01"),
    "too many samples": lambda path: edit(path, header_field("num_samples"), b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
    "no samples": lambda path: edit(path, header_field("num_samples"), bytes(8)),
    "table past the end": lambda path: edit(path, header_field("alloc_table_ptr"), (2**40).to_bytes(8, "little")),
    "table at 2**64 - 1": lambda path: edit(path, header_field("alloc_table_ptr"), b"\xff" * 8),
    "field name": lambda path: edit(path, beton.HEADER.itemsize + 1, b"I"),
    "image pointer past the end": lambda path: edit(path, 24 + 2 * 1041 + 5, (2**50).to_bytes(8, "little")),
    "image size": lambda path: edit(path, 24 + 2 * 1041 + 1, b"\xff\xff\xff\xff"),
    "label": lambda path: edit(path, 24 + 2 * 1041 + 16, b"\x09"),
    "table": lambda path: edit(path, tables_start(path) + 8, b"\xff" * 8),
    "JPEG past the end": lambda path: edit(path, tables_start(path) + 24 + 16, b"\xff\xff\xff\xff"),
    "sum": lambda path: edit(path, tables_start(path) - 3, b"\x5a\xa5"),
    "no manifest": lambda path: beton.manifest_path(path).unlink(),
    "manifest is text": lambda path: beton.manifest_path(path).write_text("count: 3"),
    "manifest is empty": lambda path: beton.manifest_path(path).write_text(""),
    "manifest is a list": lambda path: beton.manifest_path(path).write_text("[1]"),
    "manifest is binary": lambda path: beton.manifest_path(path).write_bytes(b"\xff\xfe\x00\x80"),
    "manifest lacks keys": lambda path: beton.manifest_path(path).write_text('{"format_version": 1}'),
    "manifest of the future": lambda path: beton.manifest_path(path).write_text('{"format_version": 99}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_refuses_damaged_files(copy, damage):
    DAMAGES[damage](copy)
    with pytest.raises(BetonError) as error:
        beton.check(copy)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)
    assert "prepare" in str(error.value)


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGES if "manifest" not in d and d not in ("sum", "label", "page size")]
)
def test_the_index_alone_refuses_what_would_crash(copy, damage):
    """Even where the manifest agrees with the damage, nothing outside of the file would be touched."""
    DAMAGES[damage](copy)
    with pytest.raises(BetonError):
        beton.read_index(copy)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_the_index_gets_past_it(copy, mixed_file, draw):
    """Random bytes anywhere in the index: `check` refuses, and what the index alone lets pass stays inside the file."""
    whole = mixed_file.read_bytes()
    index = beton.read_index(mixed_file)
    head = 24 + 2 * 1041 + 12 * beton.RECORD.itemsize
    places = st.integers(0, head - 1) | st.integers(tables_start(mixed_file) - 96, len(whole) - 1)
    place = draw.draw(places)
    data = draw.draw(st.binary(min_size=1, max_size=8))[: len(whole) - place]
    damaged = whole[:place] + data + whole[place + len(data) :]
    copy.write_bytes(damaged)
    if damaged == whole:
        return
    with pytest.raises(BetonError):
        beton.check(copy)
    try:
        index = beton.read_index(copy)
    except BetonError:
        return
    starts = index.records["image"]["data_ptr"].astype(object)
    assert all(s > 0 and s + n <= len(whole) for s, n in zip(starts, index.sizes.astype(object), strict=True))


def test_the_manifest_of_another_file_is_refused(copy, mixed_file, photos, tmp_path):
    other = tmp_path / "other.beton"
    write(photos, other, write_mode="raw")
    copy.write_bytes(other.read_bytes())
    with pytest.raises(BetonError, match="its manifest says"):
        beton.check(copy)
    digits = write("digits", other, overwrite=True)
    relabelled = bytearray(other.read_bytes())
    relabelled[24 + 2 * 1041 + 16] ^= 1  # the same size, another label
    other.write_bytes(relabelled)
    assert other.stat().st_size == digits.file_size
    with pytest.raises(BetonError, match="not the file that its manifest describes"):
        beton.check(other)


def test_missing_file(tmp_path, monkeypatch):
    with pytest.raises(BetonError, match=r"does not exist; write it with automix prepare$"):
        beton.check(tmp_path / "x.beton")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BetonError, match=rf"automix prepare \(looked for in {tmp_path}; paths are relative to"):
        beton.check(Path("x.beton"))


@pytest.mark.parametrize("i", [0, 1], ids=["raw", "jpeg"])
def test_verify_names_damaged_images(copy, i):
    start = int(beton.read_index(copy).records["image"]["data_ptr"][i])
    edit(copy, start + 300, b"\x5a\xa5\x5a")
    beton.check(copy)  # does not read the images
    with pytest.raises(BetonError, match=rf"1 of 12 images are damaged \({i}\)"):
        beton.verify(copy)


def test_verify_sees_what_lies_between_images(copy):
    index = beton.read_index(copy)
    starts, sizes = index.records["image"]["data_ptr"], index.sizes
    gap = next(int(s + n) for s, n, after in zip(starts, sizes, starts[1:], strict=False) if after - s - n >= 16)
    edit(copy, gap + 9, b"\x01")
    with pytest.raises(BetonError, match="outside of its images"):
        beton.verify(copy)


def test_manifest_tells_how_the_file_was_made(mixed_file, photos):
    manifest = beton.read_manifest(mixed_file)
    assert manifest == beton.check(mixed_file) == beton.verify(mixed_file, progress=False)
    assert manifest.source == str(photos)
    assert manifest.options == {
        "holdout": None,
        "per_class": None,
        "write_mode": "proportion",
        "max_resolution": None,
        "quality": 90,
        "restart_markers": True,
        "skip_broken": False,
    }
    assert (manifest.classes, manifest.class_counts, manifest.jpeg_count) == (["a", "b"], [6, 6], 6)
    assert (manifest.height_range, manifest.width_range) == ((40, 40), (60, 60))
    assert manifest.file_size == mixed_file.stat().st_size
    assert manifest.checksum == subprocess.check_output(["sha256sum", mixed_file], text=True).split()[0]
    assert {"python", "pillow", "numpy", "automix-dist"} <= set(manifest.versions)
    assert json.loads(beton.manifest_path(mixed_file).read_text())["count"] == 12
