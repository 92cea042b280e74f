"""`.beton` files: labelled images in one file of FFCV's format, with a manifest beside it; reading and checking them.

The file is FFCV's (version 2) with two fields, `image` (RGBImageField) and `label` (IntField), so that FFCV itself can
read it. `prepare.py` writes it.

    header | two field descriptions | one record per image | stored images | one sum per image | allocation table

The sums lie in a gap that FFCV ignores; they are how training notices a damaged image before it trains on it.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from automix_dist.cores import usable_cores
from automix_dist.errors import AutomixError
from automix_dist.jpeg import decodes
from automix_dist.ordered_threads import in_order

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


class BetonError(AutomixError, ValueError):
    """A source, a .beton file or a manifest that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a .beton file holds and how it was made; stored as JSON beside it."""

    source: str
    """The source as given to `prepare`."""
    split: str
    options: dict[str, Any]
    """What was chosen and how it is stored: holdout, per_class, write_mode, max_resolution, quality, restart_markers,
    skip_broken."""
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


def looked_for_in(path: Path) -> str:
    """For messages on a file that is not there: the directory that a relative path starts from."""
    if path.is_absolute():
        return ""
    return f" (looked for in {Path.cwd()}; paths are relative to the directory that the command runs in)"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a .beton file. Raises BetonError if there is none or it cannot be read."""
    file = manifest_path(path)
    try:
        values = json.loads(file.read_text())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise BetonError(
                f"{file} has format {version}, this version reads {FORMAT_VERSION}; run automix prepare again, with "
                "--overwrite"
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
        raise BetonError(f"{file} is not a manifest ({error}); run automix prepare again, with --overwrite") from error


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
            return parse_index(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise BetonError(f"cannot read {path}: {error.strerror}") from error


def parse_index(file: BinaryIO, file_size: int) -> Index:
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
    if head != file_head(int(header["page_size"]), count, table_start):
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
        raise BetonError(f"{path} does not exist; write it with automix prepare{looked_for_in(path)}")
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
    with in_order(sample_is_sound, range(manifest.count), workers) as results:
        bar = tqdm(results, "verify", manifest.count, unit="img", disable=not progress)
        bad = [i for i, sound in enumerate(bar) if not sound]
    if bad:
        shown = ", ".join(map(str, bad[:100])) + (", ..." if len(bad) > 100 else "")
        raise BetonError(
            f"{path}: {len(bad)} of {manifest.count} images are damaged ({shown}); run automix prepare again"
        )
    with open(path, "rb") as file:
        found = file_checksum(file, manifest.file_size, progress)
    if found != manifest.checksum:
        raise BetonError(
            f"{path} is damaged outside of its images: its checksum is {found}, the manifest says "
            f"{manifest.checksum}; copy it again or run automix prepare again"
        )
    return manifest


def file_head(page: int, count: int, table_start: int) -> bytes:
    """Header and field descriptions, with which a file begins."""
    header = np.array((FFCV_VERSION, len(FIELDS), page, count, table_start), HEADER)
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (type_id, name) in zip(fields, FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return header.tobytes() + fields.tobytes()


def word_sum(data: bytes) -> int:
    """A 64-bit sum of the data's words, each folded and weighted by its place; data is taken as padded with zeros to
    whole words. Any change within one word changes it."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    weights = np.arange(1, 2 * len(words), 2, dtype=np.uint64)
    return int(np.dot(words ^ (words >> np.uint64(32)), weights))


def file_checksum(file: BinaryIO, size: int, progress: bool) -> str:
    """SHA-256 of an open file of so many bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    with tqdm(desc="checksum", total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        while block := file.read(PAGE):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
