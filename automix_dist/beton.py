"""Writing and checking `.beton` files: labelled images -> one file in FFCV's format, with a manifest beside it.

The file is FFCV's (version 2) with two fields, `image` (RGBImageField) and `label` (IntField), so that FFCV itself can
read it. FFCV's own writer waits forever when one image cannot be read and can only store pixels that it encoded itself;
this one lists broken images, keeps JPEG bytes that need no change, and gives the same bytes for any number of workers.

    header | two field descriptions | one record per image | stored images | one sum per image | allocation table

The sums lie in a gap that FFCV ignores; they are how training notices a damaged image before it trains on it.
Nothing that looks finished exists before it is: the file is written under another name, synced and renamed, and the
manifest, without which nothing reads the file, comes last.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from automix_dist import datasets  # noqa: F401 - enters the published datasets in the table of sources
from automix_dist.cores import usable_cores
from automix_dist.errors import AutomixError
from automix_dist.jpeg import decodes, restart_interval
from automix_dist.sources import Source, SourceError, Split, open_source, some

FORMAT_VERSION = 1
"""Version of the manifest and of the sums; FFCV's own format is version 2."""

FFCV_VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = ((2, b"image"), (1, b"label"))  # FFCV's numbers for RGBImageField and IntField
JPEG, RAW = 0, 1

PAGE = 1 << 23
"""Unit in bytes that FFCV's page-wise reading loads; no image crosses a multiple of it."""

ALIGNMENT = 64
"""Every stored image starts at a multiple of this, so that its sum can be taken in whole words."""

SMART_RATIO = 4
"""Mode "smart" stores a JPEG where it is at least this many times smaller than the pixels."""


WriteMode = Literal["raw", "jpg", "proportion", "smart"]


class BetonError(AutomixError, ValueError):
    """A source, a .beton file or a manifest that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a .beton file holds and how it was made; stored as JSON beside it."""

    source: str
    """The source as given to `prepare`."""
    split: str
    options: dict[str, Any]
    """Storage options: write_mode, max_resolution, quality, restart_markers, skip_broken."""
    count: int
    """Number of images."""
    classes: list[str]
    """Class names; a label is an index into this list."""
    class_counts: list[int]
    """Images of each class."""
    jpeg_count: int
    """Images stored as JPEG; the others are raw pixels."""
    height_range: tuple[int, int]
    """Smallest and largest image height in pixels."""
    width_range: tuple[int, int]
    skipped: list[str]
    """Images that were left out because they could not be read or have an unknown class."""
    file_size: int
    checksum: str
    """SHA-256 of the file."""
    index_checksum: str
    """SHA-256 of everything in the file but the stored images: cheap to check at every start."""
    versions: dict[str, str]
    """Software that wrote the file."""
    format_version: int = FORMAT_VERSION


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


def prepare(
    source: str,
    out: Path,
    *,
    split: Split = "train",
    classes: list[str] | None = None,
    per_class: int | None = None,
    write_mode: WriteMode = "raw",
    max_resolution: int | None = None,
    quality: int = 90,
    restart_markers: bool = True,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write a source's images to a .beton file with a manifest beside it, and return the manifest.

    classes: the class list to number the images by, as of the training set; None = the source's own.
    per_class: only the first so many images of each class, in the source's order; None = all.
    write_mode: "raw" pixels; "jpg"; "proportion" = every second image as JPEG; "smart" = JPEG where it is at least
    four times smaller. max_resolution: images with a longer side are reduced to it (antialiased bicubic).
    quality: of the JPEGs made here. restart_markers: in the JPEGs made here, so that training decodes crops faster.
    workers: threads, 0 = one for each core that this process may use.
    An image is read as torchvision reads it, `Image.open(...).convert("RGB")`: no EXIF rotation, first frame, alpha
    dropped. A file that exists is replaced; where `out` is a link, the file that it leads to.

    Raises BetonError for an unknown or missing source, for images that cannot be read or have an unknown class (all
    are listed; with skip_broken they are left out and named in the manifest), where the system fails to read one that
    is there, and for a file that cannot be written. Warns of what is unusual in the source, of classes of which no
    image is left, and of images with more than 8 bits a pixel.
    """
    out = Path(out)
    _check_options(out, split, per_class, write_mode, max_resolution, quality, workers)
    try:
        images = open_source(source, split, classes)
    except SourceError as error:
        raise BetonError(str(error)) from error
    except OSError as error:
        raise BetonError(f"cannot read source {source!r}: {error}") from error
    for remark in images.remarks:
        warnings.warn(f"source {source!r}: {remark}", stacklevel=2)
    options = {
        "per_class": per_class,
        "write_mode": write_mode,
        "max_resolution": max_resolution,
        "quality": quality,
        "restart_markers": restart_markers,
        "skip_broken": skip_broken,
    }
    # Where `out` is a link, the file that it leads to is written, on the disk where that lies.
    place, manifest_place = (Path(os.path.realpath(path)) for path in (out, manifest_path(out)))
    unfinished = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(unfinished) as file:
            records, skipped = _write_file(file, images, options, workers or usable_cores(), progress)
            lost = np.setdiff1d(images.labels[images.labels >= 0], records["label"])
            if len(lost):
                names = some([images.classes[label] for label in lost])
                warnings.warn(f"classes of which no image is left: {names}", stacklevel=2)
            file_size = os.fstat(file.fileno()).st_size
            manifest = Manifest(
                source=source,
                split=split,
                options=options,
                count=len(records),
                classes=images.classes,
                class_counts=np.bincount(records["label"], minlength=len(images.classes)).tolist(),
                jpeg_count=int(np.sum(records["image"]["mode"] == JPEG)),
                height_range=_range(records["image"]["height"]),
                width_range=_range(records["image"]["width"]),
                skipped=skipped,
                file_size=file_size,
                checksum=_checksum(file, file_size, progress),
                index_checksum=_parse_index(file, file_size).checksum,
                versions=_versions(),
            )
            _replace_both(unfinished, place, manifest_place, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    except OSError as error:
        raise BetonError(f"cannot write {out}: {error.strerror or error}") from error
    return manifest


def _check_options(
    out: Path,
    split: str,
    per_class: int | None,
    write_mode: str,
    max_resolution: int | None,
    quality: int,
    workers: int,
) -> None:
    if out.suffix != ".beton":
        raise BetonError(f"output {str(out)!r}: expected a name that ends in .beton")
    if split not in ("train", "val"):
        raise BetonError(f"split = {split!r}: expected train or val")
    if per_class is not None and per_class < 1:
        raise BetonError(f"images per class = {per_class}: expected 1 or more")
    if write_mode not in ("raw", "jpg", "proportion", "smart"):
        raise BetonError(f"write mode = {write_mode!r}: expected raw, jpg, proportion or smart")
    if max_resolution is not None and not 1 <= max_resolution <= 65535:
        raise BetonError(f"max resolution = {max_resolution}: expected 1 to 65535 pixels")
    if not 1 <= quality <= 100:
        raise BetonError(f"quality = {quality}: expected 1 to 100")
    if workers < 0:
        raise BetonError(f"workers = {workers}: expected 0 (one per core) or a number of threads")


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
    file: BinaryIO, images: Source, options: dict[str, Any], workers: int, progress: bool
) -> tuple[np.ndarray, list[str]]:
    """Write the whole file and sync it; returns the records and the names of the images that were left out."""
    usable = np.ones(len(images.labels), bool)
    chosen = _first_of_each_class(images.labels, usable, options["per_class"])
    count = len(chosen)
    records = np.zeros(count, RECORD)
    allocations = np.zeros(count, ALLOCATION)
    sums = np.zeros(count, np.uint64)
    end = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + records.nbytes
    page, kept, broken, cut = PAGE, 0, [], []

    todo = chosen
    while len(todo):
        numbered = enumerate(todo.tolist(), start=len(chosen) - len(todo))
        with _ctrl_c_held() as stop_if_asked:
            encoded = _in_order(partial(_encode, images, options), numbered, workers, stop_if_asked)
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
        wanted = _first_of_each_class(images.labels, usable, options["per_class"])
        todo = np.setdiff1d(wanted, chosen) if options["skip_broken"] else chosen[:0]
        chosen = np.concatenate([chosen, todo])
    _judge(broken, len(chosen), options["skip_broken"])
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
    file.write(_head(page, kept, sums_start + sums.nbytes) + records.tobytes())
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


def _in_order(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, stop_if_asked: Callable[[], None]
) -> Iterator[Any]:
    """The function of each item, computed by threads, of which a few results at most wait in memory."""
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * workers:
                stop_if_asked()
                yield pending.popleft().result()
        while pending:
            stop_if_asked()
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_held() -> Iterator[Callable[[], None]]:
    """Ctrl-C interrupts only the function that is yielded: elsewhere it may leave a lock taken that threads need."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = []

    def note(*_: Any) -> None:
        if came:  # twice: whatever it leaves behind
            raise KeyboardInterrupt
        came.append(True)

    def stop_if_asked() -> None:
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


def _encode(images: Source, options: dict[str, Any], numbered: tuple[int, int]) -> Stored | Broken:
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
    loaded: bytes | Image.Image, image: Image.Image, options: dict[str, Any], place: int
) -> tuple[int, int, int, bytes]:
    """(mode, height, width, data) of one image."""
    limit = options["max_resolution"] or 65535
    mode = options["write_mode"]
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
        if options["max_resolution"] is None:
            raise ValueError(f"{width} x {height} pixels; the largest side that the format holds is {limit}")
        scale = limit / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if wants_jpeg and jpeg is None:
        jpeg = _encode_jpeg(image, options["quality"], options["restart_markers"])
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


def _head(page: int, count: int, table_start: int) -> bytes:
    header = np.array((FFCV_VERSION, len(FIELDS), page, count, table_start), HEADER)
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (type_id, name) in zip(fields, FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return header.tobytes() + fields.tobytes()


def _range(values: np.ndarray) -> tuple[int, int]:
    return int(values.min()), int(values.max())


def _versions() -> dict[str, str]:
    return {
        "automix-dist": importlib.metadata.version("automix-dist"),
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
        folder = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def word_sum(data: bytes) -> int:
    """A 64-bit sum of the data's words, each folded and weighted by its place; data is taken as padded with zeros to
    whole words. Any change within one word changes it."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    weights = np.arange(1, 2 * len(words), 2, dtype=np.uint64)
    return int(np.dot(words ^ (words >> np.uint64(32)), weights))


class Index(NamedTuple):
    """Everything in a .beton file but the stored images."""

    records: np.ndarray
    """[count] RECORD: storage mode, size, place and label of each image."""
    sums: np.ndarray
    """[count] uint64: word_sum of each stored image."""
    sizes: np.ndarray
    """[count] uint64: bytes of each stored image."""
    checksum: str
    """SHA-256 of the bytes that make up the index."""


def manifest_path(path: Path) -> Path:
    """Where the manifest of a .beton file lies: beside it, with .json added."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a .beton file. Raises BetonError if there is none or it cannot be read."""
    file = manifest_path(path)
    try:
        values = json.loads(file.read_text())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise BetonError(
                f"{file} has format {version}, this version reads {FORMAT_VERSION}; run automix prepare again"
            )
        for key in ("height_range", "width_range"):
            values[key] = tuple(values[key])
        return Manifest(**values)
    except FileNotFoundError as error:
        raise BetonError(
            f"{path} has no manifest {file.name} beside it: its writing was interrupted, or another "
            "program wrote it; run automix prepare again"
        ) from error
    except OSError as error:
        raise BetonError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BetonError):
            raise
        raise BetonError(f"{file} is not a manifest ({error}); run automix prepare again") from error


def read_classes(path: Path) -> list[str]:
    """The class list of a .beton file, or of a text file with one name a line. Raises BetonError."""
    if path.suffix == ".beton":
        return read_manifest(path).classes
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BetonError(f"cannot read the class list {path}: {error}") from error
    if not names or len(set(names)) < len(names):
        raise BetonError(f"{path}: expected one class name a line, each of them once")
    return names


def read_index(path: Path) -> Index:
    """Read and check everything in a .beton file but the stored images. Raises BetonError."""
    try:
        with open(path, "rb") as file:
            return _parse_index(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise BetonError(f"cannot read {path}: {error.strerror}") from error


def _parse_index(file: BinaryIO, file_size: int) -> Index:
    """The index of an open file, with every pointer in it proven to stay inside the file. Raises BetonError."""

    def refuse(what: str) -> BetonError:
        return BetonError(f"{file.name} {what}; write it with automix prepare")

    head_size = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    file.seek(0)
    head = file.read(head_size)
    if len(head) < head_size:
        raise refuse(f"is not a .beton file: {file_size} bytes are too few for a header")
    header = np.frombuffer(head, HEADER, 1)[0]
    count, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if header["version"] != FFCV_VERSION:
        raise refuse(f"is not a .beton file of FFCV format {FFCV_VERSION} (its header says {header['version']})")
    if head != _head(int(header["page_size"]), count, table_start):
        raise refuse("has other fields than image and label")
    sums_start = table_start - 8 * count
    if (
        count < 1
        or table_start + count * ALLOCATION.itemsize != file_size
        or sums_start < head_size + count * RECORD.itemsize
    ):
        raise refuse(
            f"is torn or damaged: its header places the tables of {count} images outside of its {file_size} bytes"
        )

    records_bytes = file.read(count * RECORD.itemsize)
    file.seek(sums_start)
    tables = file.read(file_size - sums_start)
    records = np.frombuffer(records_bytes, RECORD)
    sums = np.frombuffer(tables, "<u8", count)
    allocations = np.frombuffer(tables, ALLOCATION, count, offset=8 * count)
    image, start, size = records["image"], records["image"]["data_ptr"], allocations["size"]
    pixels = 3 * image["height"].astype(np.uint64) * image["width"]
    sound = (
        (allocations["sample_id"] == np.arange(count, dtype=np.uint64))
        & (allocations["ptr"] == start)
        & (start >= np.uint64(head_size + len(records_bytes)))
        & (start % ALIGNMENT == 0)
        & (start <= np.uint64(sums_start))
        & (size <= np.uint64(sums_start) - start)
        & (size > 0)
        & (pixels > 0)
        & ((image["mode"] == JPEG) | ((image["mode"] == RAW) & (size == pixels)))
    )
    if not sound.all():
        raise refuse(f"is damaged: the record of image {np.argmin(sound)} contradicts itself")
    checksum = hashlib.sha256(head + records_bytes + tables).hexdigest()
    return Index(records, sums, size, checksum)


def check(path: Path) -> Manifest:
    """Check at start-up, without reading the stored images, that a file is whole and its manifest's; returns it.

    Raises BetonError if file or manifest is missing, torn, damaged, foreign or does not belong to the other.
    """
    return load(path)[0]


def load(path: Path) -> tuple[Manifest, Index]:
    """Manifest and index of a file, checked as `check` does. Raises BetonError."""
    path = Path(path)
    if not path.is_file():
        raise BetonError(f"{path} does not exist; write it with automix prepare")
    manifest = read_manifest(path)
    size = path.stat().st_size
    if size != manifest.file_size:
        raise BetonError(
            f"{path} has {size} bytes, its manifest says {manifest.file_size}: it is torn or belongs to "
            "another manifest; copy it again or run automix prepare again"
        )
    index = read_index(path)
    if index.checksum != manifest.index_checksum or len(index.records) != manifest.count:
        raise BetonError(
            f"{path} is not the file that its manifest describes, or is damaged; "
            "copy both again or run automix prepare again"
        )
    labels = index.records["label"]
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise BetonError(f"{path} has labels outside 0 .. {len(manifest.classes) - 1}; run automix prepare again")
    return manifest, index


def verify(path: Path, *, workers: int = 0, progress: bool = False) -> Manifest:
    """Check everything: `check`, the file's checksum, and that each image decodes to its size; returns the manifest.

    Raises BetonError, naming up to 100 damaged images.
    """
    path = Path(path)
    manifest, index = load(path)
    data = np.memmap(path, np.uint8, "r")

    def sample_is_sound(i: int) -> bool:
        image = index.records["image"][i]
        start = int(image["data_ptr"])
        stored = data[start : start + int(index.sizes[i])].tobytes()
        whole = word_sum(stored) == int(index.sums[i])
        return whole and (image["mode"] == RAW or decodes(stored, int(image["height"]), int(image["width"])))

    workers = workers or usable_cores()
    with _ctrl_c_held() as stop_if_asked:
        results = _in_order(sample_is_sound, range(manifest.count), workers, stop_if_asked)
        bar = tqdm(results, "verify", manifest.count, unit="img", disable=not progress)
        bad = [i for i, sound in enumerate(bar) if not sound]
    if bad:
        shown = ", ".join(map(str, bad[:100])) + (", ..." if len(bad) > 100 else "")
        raise BetonError(
            f"{path}: {len(bad)} of {manifest.count} images are damaged ({shown}); run automix prepare again"
        )
    with open(path, "rb") as file:
        checksum = _checksum(file, manifest.file_size, progress)
    if checksum != manifest.checksum:
        raise BetonError(
            f"{path} is damaged outside of its images: its checksum is {checksum}, the manifest says "
            f"{manifest.checksum}; copy it again or run automix prepare again"
        )
    return manifest


def _checksum(file: BinaryIO, size: int, progress: bool) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    with tqdm(desc="checksum", total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        while block := file.read(PAGE):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
