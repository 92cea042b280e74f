"""Writing `.beton` files: the images of a source -> one file, with a manifest beside it (beton.py has the format).

FFCV's own writer waits forever when one image cannot be read and can only store pixels that it encoded itself; this one
lists broken images, keeps JPEG bytes that need no change, and gives the same bytes for any number of workers.

Nothing that looks finished exists before it is: the file is written under another name, synced and renamed, and the
manifest, without which nothing reads the file, comes last.
"""

import fcntl
import io
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from automix_dist import __version__, datasets, shards  # noqa: F401 - they enter their own in the table of sources
from automix_dist.beton import (
    ALIGNMENT,
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    JPEG,
    PAGE,
    RAW,
    RECORD,
    BetonError,
    Manifest,
    file_checksum,
    file_head,
    manifest_path,
    parse_index,
    read_index,
    read_manifest,
    word_sum,
)
from automix_dist.config import ConfigError
from automix_dist.cores import usable_cores
from automix_dist.errors import some
from automix_dist.jpeg import decodes, library, restart_interval
from automix_dist.ordered_threads import in_order
from automix_dist.sources import Source, SourceError, Split, open_source
from automix_dist.whole_file import sync

SMART_RATIO = 4
"""Mode "smart" stores a JPEG where it is at least this many times smaller than the pixels."""

WriteMode = Literal["raw", "jpg", "proportion", "smart"]


class Stored(NamedTuple):
    """One image as it goes into the file."""

    mode: int
    height: int
    width: int
    data: bytes
    sum: int
    label: int
    cut: bool
    """Whether the image has values of more than 8 bits, which become RGB by cutting them off."""


class Broken(NamedTuple):
    """An image that cannot be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class PrepareOptions:
    """Which images of a source are written, and how they are stored; the manifest keeps it. Raises ConfigError."""

    holdout: float | None = None
    """Of a source without splits, the share of each class that is "val"; the rest is "train". Which images these are
    depends on their names alone, so that two calls on the same images part them exactly."""
    per_class: int | None = None
    """Only the first so many images of each class, in the source's order; None = all."""
    write_mode: WriteMode = "jpg"
    """Pixels with "raw"; "proportion" = every second image as JPEG; "smart" = JPEG where it is at least four times
    smaller."""
    max_resolution: int | None = None
    """Images with a longer side are reduced to it (antialiased bicubic)."""
    quality: int = 90
    """Of the JPEGs made here."""
    restart_markers: bool = True
    """In the JPEGs made here, so that training decodes crops faster."""
    skip_broken: bool = False
    """Images that cannot be read or have an unknown class are left out, and named in the manifest."""

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ConfigError(f"--holdout {self.holdout}: expected a share of the images between 0 and 1, such as 0.1")
        if self.per_class is not None and self.per_class < 1:
            raise ConfigError(f"--per-class {self.per_class}: expected 1 or more")
        if self.write_mode not in get_args(WriteMode):
            raise ConfigError(f"--write-mode {self.write_mode}: expected raw, jpg, proportion or smart")
        if self.max_resolution is not None and not 1 <= self.max_resolution <= 65535:
            raise ConfigError(f"--max-resolution {self.max_resolution}: expected 1 to 65535 pixels")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality}: expected 1 to 100")


def prepare(
    source: str,
    out: Path,
    options: PrepareOptions = PrepareOptions(),
    *,
    split: Split = "train",
    classes: list[str] | None = None,
    workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write a source's images to a .beton file with a manifest beside it, and return the manifest.

    classes: the class list to number the images by, as of the training set; None = the source's own.
    workers: threads, 0 = one for each core that this process may use.
    An image is read as torchvision reads it, `Image.open(...).convert("RGB")`: no EXIF rotation, first frame, alpha
    dropped. A file that holds the same source with the same options is replaced, with overwrite any; where `out` is a
    link, the file that it leads to.

    Raises ConfigError for an argument that cannot be used. Raises BetonError for an unknown or missing source, for
    images that cannot be read or have an unknown class (all are listed), where the system fails to read one that is
    there, for a file that cannot be written, and, unless with overwrite, for one that holds something else. Warns of
    what is unusual in the source, of classes of which no image is left, and of images with more than 8 bits a pixel.
    """
    out = Path(out)
    _check_arguments(out, split, workers)
    if options.write_mode != "raw":
        library()  # if the decoder is missing, that is not to be said of each image
    images = _open(source, split, classes, options.holdout)
    # Where `out` is a link, the file that it leads to is written, on the disk where that lies.
    place, manifest_place = (Path(os.path.realpath(path)) for path in (out, manifest_path(out)))
    unfinished = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(unfinished) as file:
            if not overwrite and place.exists():
                _check_may_replace(out, {"source": source, "split": split, **asdict(options)}, images.classes)
            records, skipped = _write_file(file, images, options, workers or usable_cores(), progress)
            _warn_of_lost_classes(images, records)
            manifest = Manifest(
                source=source,
                split=split,
                options=asdict(options),
                classes=images.classes,
                skipped=skipped,
                versions=_versions(),
                **_contents(file, records, len(images.classes), progress),
            )
            _replace_both(unfinished, place, manifest_place, json.dumps(asdict(manifest), indent=1) + "\n")
    except OSError as error:
        raise BetonError(f"cannot write {out}: {error.strerror or error}") from error
    return manifest


def _check_arguments(out: Path, split: str, workers: int) -> None:
    for path in (out, manifest_path(out)):
        if path.is_dir():
            raise BetonError(
                f"{path} is a folder: expected the name of a file to write, such as {path / 'train.beton'}"
            )
    if out.suffix != ".beton":
        raise ConfigError(f"output {str(out)!r}: expected a name that ends in .beton")
    if split not in get_args(Split):
        raise ConfigError(f"--split {split}: expected train or val")
    if workers < 0:
        raise ConfigError(f"--workers {workers}: expected 0 (all cores) or a number of threads")


def _open(source: str, split: Split, classes: list[str] | None, holdout: float | None) -> Source:
    """The source's images; warns of what is unusual in it. Raises BetonError."""
    try:
        images = open_source(source, split, classes, holdout)
    except SourceError as error:
        raise BetonError(str(error)) from error
    except OSError as error:
        raise BetonError(f"cannot read source {source!r}: {error}") from error
    for remark in images.remarks:
        warnings.warn(f"source {source!r}: {remark}", stacklevel=3)
    return images


def _check_may_replace(out: Path, options: dict[str, Any], classes: list[str]) -> None:
    """Raise BetonError unless the file at `out` holds the same source with the same options, or was left by a writing
    that was interrupted before its manifest."""
    instead = "give another name, or replace it with --overwrite"
    if not manifest_path(out).exists():
        try:
            read_index(out)
        except BetonError as error:
            raise BetonError(f"{out} exists and is no whole file of automix prepare: {instead}") from error
        return
    manifest = read_manifest(out)
    found = {"source": manifest.source, "split": manifest.split, **manifest.options}  # an option may be younger
    changes = [f"{key}: {found.get(key)!r} -> {new!r}" for key, new in options.items() if found.get(key) != new]
    changes += ["another class list"] * (manifest.classes != classes)
    if changes:
        raise BetonError(f"{out} holds another dataset already ({', '.join(changes)}): {instead}")


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """An empty file, open for reading and writing, that no other process writes; removed if the block raises."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # a file system without locks: better unguarded than not at all
        else:
            mine = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not mine:
            raise BetonError(f"{path} is being written by another process")
        file.truncate()
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _write_file(
    file: BinaryIO, images: Source, options: PrepareOptions, workers: int, progress: bool
) -> tuple[np.ndarray, list[str]]:
    """Write the whole file and sync it; returns the records and the names of the images that were left out."""
    usable = np.ones(len(images.labels), bool)
    chosen = _first_of_each_class(images.labels, usable, options.per_class)
    count = len(chosen)
    records = np.zeros(count, RECORD)
    allocations = np.zeros(count, ALLOCATION)
    sums = np.zeros(count, np.uint64)
    end = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + records.nbytes
    page, kept, broken, cut = PAGE, 0, [], []

    todo = chosen
    while len(todo):
        numbered = enumerate(todo.tolist(), start=len(chosen) - len(todo))
        with in_order(partial(_encode, images, options), numbered, workers) as encoded:
            bar = tqdm(encoded, "write", len(todo), unit="img", disable=not progress)
            for i, stored in zip(todo, bar, strict=True):
                if isinstance(stored, Broken):
                    broken.append(stored)
                    usable[i] = False
                    continue
                start, unit = _place(end, len(stored.data))
                file.seek(start)
                file.write(stored.data)
                end, page = start + len(stored.data), max(page, unit)
                records[kept] = ((stored.mode, stored.width, stored.height, start), stored.label)
                allocations[kept] = (kept, start, len(stored.data))
                sums[kept] = stored.sum
                kept += 1
                cut += [i] if stored.cut else []
        # The next ones of their classes stand in for those that could not be read.
        wanted = _first_of_each_class(images.labels, usable, options.per_class)
        todo = np.setdiff1d(wanted, chosen) if options.skip_broken else chosen[:0]
        chosen = np.concatenate([chosen, todo])
    _judge(broken, len(chosen), options.skip_broken)
    if cut:
        warnings.warn(
            f"{len(cut)} images have more than 8 bits a pixel, such as {images.name(cut[0])}: as torchvision reads "
            "them, values below 0 or above 255 are cut off; scale them to 8 bits if that is not meant",
            stacklevel=3,
        )

    records, allocations, sums = records[:kept], allocations[:kept], sums[:kept]
    sums_start = _align(end, ALIGNMENT)
    file.seek(sums_start)
    file.write(sums.tobytes() + allocations.tobytes())
    file.seek(0)
    file.write(file_head(page, kept, sums_start + sums.nbytes) + records.tobytes())
    file.flush()
    os.fsync(file.fileno())
    return records, [image.name for image in broken]


def _first_of_each_class(labels: np.ndarray, usable: np.ndarray, per_class: int | None) -> np.ndarray:
    """The usable images to write, in order; those of no class (-1) are among them, to be told."""
    if per_class is None:
        return np.flatnonzero(usable)
    by_class = np.argsort(labels, kind="stable")
    by_class = by_class[usable[by_class]]
    sorted_labels = labels[by_class]
    place_in_class = np.arange(len(by_class)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(by_class[(place_in_class < per_class) | (sorted_labels < 0)])


def _place(end: int, size: int) -> tuple[int, int]:
    """Where an image of this size goes after `end`, and the page size it needs.

    It may not cross a multiple of the page size. A multiple of a larger power of two is one of every smaller too, so
    images larger than a page only raise the file's page size and leave the others where they are.
    """
    unit = max(PAGE, 1 << (size - 1).bit_length())
    start = _align(end, ALIGNMENT)
    if start // unit != (start + size - 1) // unit:
        start = _align(start, unit)
    return start, unit


def _align(offset: int, unit: int) -> int:
    return -(-offset // unit) * unit


def _encode(images: Source, options: PrepareOptions, numbered: tuple[int, int]) -> Stored | Broken:
    """An image, given as (its place in the file, its number in the source), in the form in which it is stored."""
    place, i = numbered
    if i in images.unknown:
        return Broken(images.name(i), images.unknown[i])
    try:
        loaded = images.load(i)
        image = Image.open(io.BytesIO(loaded)) if isinstance(loaded, bytes) else loaded
        mode, height, width, data = _stored_form(loaded, image, options, place)
        cut = image.mode.startswith(("I", "F"))
        return Stored(mode, height, width, data, word_sum(data), int(images.labels[i]), cut)
    except UnidentifiedImageError:  # its text names an object in memory
        return Broken(images.name(i), "no known image format")
    except Exception as error:  # on damaged files PIL raises nearly anything; all of it says: unreadable
        if reason := _reason_beside_the_image(error, images.name(i)):
            raise BetonError(f"cannot read {images.name(i)}: {reason}; the image may be sound, try again") from error
        return Broken(images.name(i), f"{type(error).__name__}: {error}")


def _reason_beside_the_image(error: Exception, name: str) -> str | None:
    """Why an image could not be read, if that says nothing about the image."""
    if isinstance(error, MemoryError):
        return "out of memory"
    # The system's errors have a number, Pillow's have none. A file that is not there counts as broken.
    missing = isinstance(error, FileNotFoundError) and Path(error.filename or "") == Path(name)
    return error.strerror if isinstance(error, OSError) and error.errno is not None and not missing else None


def _stored_form(
    loaded: bytes | Image.Image, image: Image.Image, options: PrepareOptions, place: int
) -> tuple[int, int, int, bytes]:
    """(mode, height, width, data) of one image."""
    limit = options.max_resolution or 65535
    mode = options.write_mode
    wants_jpeg = mode in ("jpg", "smart") or (mode == "proportion" and place % 2 == 1)
    width, height = image.size
    fits = max(width, height) <= limit

    jpeg = None
    if wants_jpeg and fits and image.format in ("JPEG", "MPO") and decodes(loaded, height, width):
        jpeg = loaded
        if mode == "jpg" or mode == "proportion":
            return JPEG, height, width, jpeg

    image = image.convert("RGB")
    if not fits:
        if options.max_resolution is None:
            raise ValueError(f"{width} x {height} pixels; the largest side that the format holds is {limit}")
        scale = limit / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if wants_jpeg and jpeg is None:
        jpeg = _encode_jpeg(image, options.quality, options.restart_markers)
    if jpeg is not None and (mode != "smart" or SMART_RATIO * len(jpeg) <= 3 * height * width):
        return JPEG, height, width, jpeg
    return RAW, height, width, image.tobytes()


def _encode_jpeg(image: Image.Image, quality: int, restart_markers: bool) -> bytes:
    interval = restart_interval(image.width) if restart_markers else 0
    # Into a descriptor Pillow encodes without holding the interpreter's lock, into a BytesIO it holds it.
    with open(os.memfd_create("jpeg"), "w+b") as file:
        # Pillow would take over the comment of a PNG or GIF, and fail where that is long.
        image.save(file, "JPEG", quality=quality, restart_marker_blocks=interval, comment=b"")
        file.seek(0)
        return file.read()


def _judge(broken: list[Broken], count: int, skip_broken: bool) -> None:
    """Raise if images cannot be used and may not be left out, or if none is left."""
    if len(broken) == count or (broken and not skip_broken):
        lines = [f"  {image.name}: {image.reason}" for image in broken[:100]]
        more = [f"  ... and {len(broken) - 100} more"] if len(broken) > 100 else []
        advice = (
            "every one of them"
            if len(broken) == count
            else "repair or remove them, or leave them out with --skip-broken"
        )
        raise BetonError(
            "\n".join(
                [f"{len(broken)} of {count} images cannot be read or have an unknown class; {advice}:", *lines, *more]
            )
        )


def _contents(file: BinaryIO, records: np.ndarray, num_classes: int, progress: bool) -> dict[str, Any]:
    """What the manifest says of a written file itself."""
    file_size = os.fstat(file.fileno()).st_size
    return {
        "count": len(records),
        "class_counts": np.bincount(records["label"], minlength=num_classes).tolist(),
        "jpeg_count": int(np.sum(records["image"]["mode"] == JPEG)),
        "height_range": _range(records["image"]["height"]),
        "width_range": _range(records["image"]["width"]),
        "file_size": file_size,
        "checksum": file_checksum(file, file_size, progress),
        "index_checksum": parse_index(file, file_size).checksum,
    }


def _warn_of_lost_classes(images: Source, records: np.ndarray) -> None:
    lost = np.setdiff1d(images.labels[images.labels >= 0], records["label"])
    if len(lost):
        names = some([images.classes[label] for label in lost])
        warnings.warn(f"classes of which no image is left: {names}", stacklevel=3)


def _range(values: np.ndarray) -> tuple[int, int]:
    return int(values.min()), int(values.max())


def _versions() -> dict[str, str]:
    return {
        "automix-dist": __version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def _replace_both(unfinished: Path, place: Path, manifest_place: Path, manifest: str) -> None:
    """Give a data file, which is on disk, and its manifest their names: both, or what can fail for want of space fails
    before the older pair is touched."""
    unfinished_manifest = manifest_place.with_name(manifest_place.name + ".partial")
    try:
        with open(unfinished_manifest, "w") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, place)  # until the manifest follows, an older one does not match and is refused
        os.replace(unfinished_manifest, manifest_place)
    except BaseException:
        unfinished_manifest.unlink(missing_ok=True)
        raise
    for parent in {place.parent, manifest_place.parent}:
        sync(parent)
