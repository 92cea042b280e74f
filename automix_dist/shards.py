"""Sources of many images a file: WebDataset's tar shards and Hugging Face's Parquet files, found by a folder or a
pattern."""

import glob
import json
import os
import re
import shlex
import sys
import tarfile
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from automix_dist.errors import some
from automix_dist.sources import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLIT_WORDS,
    Source,
    SourceError,
    Split,
    similar,
    walk,
    whole_number,
)

ROWS_IN_MEMORY = 1024
"""Parquet row groups are kept until they have more rows than this; two are kept always."""


class WebDataset(Source, usage="webdataset:GLOB_OR_DIR"):
    """Uncompressed tar shards: an image and its .cls, a number, share a key; other members are ignored."""

    layout = """
        *.tar    uncompressed; of each sample an image KEY.jpg and its class number KEY.cls; if their names have the
                 words train and validation, valid, val, dev or test, those of the split are read
    """

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        self.images: list[tuple[str, int, int, str]] = []
        texts: list[bytes] = []
        chosen, _ = find_shards(self, ".tar", split)
        for shard in chosen:
            images, labels = self._read_shard(shard)
            unpaired = images.keys() ^ labels.keys()
            if unpaired:
                raise self.error(f"{shard}: sample {min(unpaired)!r} lacks its image or its .cls")
            self.images += [(shard, *images[key]) for key in images]
            texts += [labels[key] for key in images]
        if not self.images:
            raise self.error(f"there are no images in {len(chosen)} shard(s)")
        labels = [whole_number(text.decode(errors="replace")) for text in texts]
        self.label(self.numbered_classes(labels), labels)

    def _read_shard(self, shard: str) -> tuple[dict[str, tuple[int, int, str]], dict[str, bytes]]:
        """By sample key: each image's (place, size, name), and the text of each label."""
        images, labels, longer = {}, {}, {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")  # WebDataset's rule: the key ends at the name's first dot
                    key, suffix = f"{folder}/{stem}", "." + suffix.lower()
                    if not member.isfile() or not stem:
                        continue
                    if suffix in IMAGE_SUFFIXES:
                        found, value = images, (member.offset_data, member.size, member.name)
                    elif suffix == ".cls":
                        found, value = labels, tar.extractfile(member).read()
                    else:
                        if suffix.endswith(IMAGE_SUFFIXES):
                            longer[key] = member.name
                        continue
                    if key in found:
                        raise self.error(f"{shard} has sample {key!r} twice, the second time as {member.name!r}")
                    found[key] = value
                self._check_end(shard, tar.fileobj, tar.offset)
        except tarfile.TarError as error:
            raise self.error(f"{shard} is not a readable, uncompressed WebDataset shard: {error}") from error
        if lost := longer.keys() - images.keys():
            raise self.error(
                f"{shard}: {longer[min(lost)]!r} is no image of a sample, whose key ends at the name's first dot; "
                "rename it"
            )
        return images, labels

    def _check_end(self, shard: str, file: BinaryIO, end: int) -> None:
        """Raise unless zeros, a block at least, and nothing else follow: tarfile takes damage for the end."""
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise self.error(f"{shard} is cut off or damaged at byte {end}; write or download it again")
        while block := file.read(1 << 20):
            if rest := block.lstrip(b"\0"):
                raise self.error(
                    f"{shard} ends at byte {end}, but goes on at byte {file.tell() - len(rest)}: it is damaged, or "
                    "several were joined with cat; keep them apart, or join them with tar -A"
                )

    def load(self, i: int) -> bytes:
        shard, start, size, _ = self.images[i]
        with open(shard, "rb") as file:
            return os.pread(file.fileno(), size, start)

    def name(self, i: int) -> str:
        return f"{self.images[i][0]}:{self.images[i][3]}"


class Parquet(Source, usage="parquet:GLOB_OR_DIR"):
    """Hugging Face shards: an image column of {bytes, path} or bytes, a label column of numbers or names."""

    layout = """
        *.parquet    of a column with images ({bytes, path}, or bytes) and a column `label` (a number or a name); if
                     their names have the words train and validation, valid, val, dev or test, as in
                     data/train-00000-of-00042.parquet, those of the split are read
    """

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        try:
            import pyarrow.parquet  # optional, and slow to import
        except ImportError as error:
            install = f"{shlex.quote(sys.executable)} -m pip install pyarrow"
            raise SourceError(f"Parquet files need pyarrow, which is not installed: {install}") from error
        self._parquet = pyarrow.parquet
        self.files, every_split = find_shards(self, ".parquet", split)
        opened = {file: self._open(file) for file in every_split}
        first = opened[self.files[0]].schema.to_arrow_schema()
        self.image_column, label_column, classes = self._columns(first)
        for file, metadata in opened.items():
            if self._columns(metadata.schema.to_arrow_schema()) != (self.image_column, label_column, classes):
                raise self.error(f"{file} has other columns or classes than {self.files[0]}")
        self._metadata = [opened[file] for file in self.files]

        labels = {file: self._labels(file, label_column) for file in (self.files if classes else every_split)}
        if classes is None:
            observed = [label for each in labels.values() for label in each]
            classes = sorted({label for label in observed if isinstance(label, str)}) or self.numbered_classes(observed)
        groups = [
            (number, group, metadata.row_group(group).num_rows)
            for number, metadata in enumerate(self._metadata)
            for group in range(metadata.num_row_groups)
        ]
        self.groups = [(number, group) for number, group, _ in groups]
        self.starts = np.cumsum([0] + [rows for _, _, rows in groups])
        self.file_starts = np.cumsum([0] + [metadata.num_rows for metadata in self._metadata])
        self.label(classes, (label for file in self.files for label in labels[file]))
        if not len(self.labels):
            raise self.error(f"there are no images in {len(self.files)} file(s)")
        self._lock = threading.Lock()
        self._loaded: OrderedDict[int, Future] = OrderedDict()

    def _open(self, file: str) -> Any:
        try:
            return self._parquet.read_metadata(file)
        except (ValueError, NotImplementedError) as error:  # pyarrow's errors are these, or OSError
            raise self.error(f"{file} is not a readable Parquet file: {error}") from error

    def _columns(self, schema: Any) -> tuple[str, str, list[str] | None]:
        """(image column, label column, class names if the file has them)."""
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, ValueError, TypeError):
            features = {}  # not written by Hugging Face's datasets
        kinds = {name: each.get("_type") for name, each in features.items() if isinstance(each, dict)}
        types = {name: str(schema.field(name).type) for name in schema.names}
        holds_bytes = [name for name, kind in types.items() if re.match(r"(large_)?binary|struct<.*\bbytes: ", kind)]
        image = _choose(
            [name for name in holds_bytes if kinds.get(name) == "Image"] or holds_bytes, ("image", "img", "jpg", "png")
        )
        scalars = [name for name, kind in types.items() if re.match(r"u?int|(large_)?string|dictionary", kind)]
        label = _choose(
            [name for name in scalars if kinds.get(name) == "ClassLabel"] or scalars,
            ("label", "labels", "fine_label", "class", "cls"),
        )
        if image is None or label is None:
            shown = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            which = "images" if image is None else "labels"
            raise self.error(f"cannot tell which column holds the {which}; there are: {shown}")
        names = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
        return image, label, names

    def _labels(self, file: str, column: str) -> list[int | str]:
        try:
            with self._parquet.ParquetFile(file) as opened:
                values = opened.read(columns=[column], use_threads=False)
        except (ValueError, NotImplementedError) as error:
            raise self.error(f"{file} is not a readable Parquet file: {error}") from error
        return [-1 if value is None else value for value in values.column(0).to_pylist()]

    def load(self, i: int) -> bytes:
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        value = self._group(group)[i - int(self.starts[group])].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the table holds no bytes for it")
        return data

    def _group(self, number: int) -> Any:
        """The image column of a row group, read once for all threads."""
        with self._lock:
            reads = number not in self._loaded
            future = self._loaded.setdefault(number, Future())
            self._loaded.move_to_end(number)
            rows = sum(int(self.starts[each + 1] - self.starts[each]) for each in self._loaded)
            while rows > ROWS_IN_MEMORY and len(self._loaded) > 2:
                oldest, _ = self._loaded.popitem(last=False)
                rows -= int(self.starts[oldest + 1] - self.starts[oldest])
        if reads:
            try:
                file, group = self.groups[number]
                with self._parquet.ParquetFile(self.files[file], metadata=self._metadata[file]) as opened:
                    table = opened.read_row_group(group, columns=[self.image_column], use_threads=False)
                future.set_result(table.column(0))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def name(self, i: int) -> str:
        file = int(np.searchsorted(self.file_starts, i, "right")) - 1
        return f"{self.files[file]}: row {i - int(self.file_starts[file])}"


def _choose(candidates: list[str], preferred: tuple[str, ...]) -> str | None:
    if len(candidates) == 1:
        return candidates[0]
    return next((name for name in preferred if name in candidates), None)


def find_shards(source: Source, suffix: str, split: Split) -> tuple[list[str], list[str]]:
    """(files of the split, files of all splits) of a pattern or a folder; notes where there are no splits. Raises
    SourceError."""
    if not os.path.isdir(source.argument):
        files = _shards_of_pattern(source)
        source.has_splits = False
        return files, files
    files = _shards_of_folder(source, suffix)
    return _shards_of_split(source, files, split), files


def _shards_of_pattern(source: Source) -> list[str]:
    """The files that a name means, in which braces and wildcards may stand."""
    whole = Path(source.argument)
    patterns = [source.argument] if whole.exists() else expand_braces(source.argument)
    found = {each: [each] if os.path.exists(each) else glob.glob(each, recursive=True) for each in patterns}
    missing = [each for each, files in found.items() if not files]
    if missing == [source.argument]:
        raise source.error(f"there is no such folder and no such file{similar(whole)}")
    if missing:
        raise source.error(f"{len(missing)} of {len(found)} files are missing: {some(missing)}")
    files = sorted({file for files in found.values() for file in files})
    if left_out := missing_shards(files):
        source.remarks.append(f"the pattern leaves out {len(left_out)} shards: {some(left_out)}")
    return files


def _shards_of_folder(source: Source, suffix: str) -> list[str]:
    """The shards in a folder and all below it, each once and all that their names promise."""
    root = Path(source.argument)
    files = sorted(os.path.join(place, name) for place, names in walk(root) for name in names if name.endswith(suffix))
    if not files:
        raise source.error(f"there are no {suffix} files in that folder")
    by_content: dict[str, str] = {}
    for file in files:
        if (other := by_content.setdefault(os.path.realpath(file), file)) != file:
            raise source.error(f"{other} and {file} are one file: give the folder of one of them, or a pattern")
    if missing := missing_shards(files):
        raise source.error(
            f"{len(missing)} shards are missing: {some(missing)}; download them, or give a pattern of those to be read"
        )
    return files


def _shards_of_split(source: Source, files: list[str], split: Split) -> list[str]:
    """Those of a folder's shards whose names, or folders' names, say this split; all if no name says any."""
    split_of = {}
    for file in files:
        parts = reversed(Path(file).relative_to(source.argument).parts)
        words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
        split_of[file] = next((word for word in words if word in SPLIT_WORDS), None)
    present = set(split_of.values())
    if present == {None}:
        source.has_splits = False
        return files
    wanted = next((name for name in SPLIT_NAMES[split] if name in present), None)
    if None in present or wanted is None:
        example = {name: file for file, name in split_of.items()}
        found = ", ".join(f"{file} ({name or 'no split in its name'})" for name, file in example.items())
        raise source.error(f"cannot tell which files belong to {split}: there are {found}; give a pattern of files")
    return [file for file in files if split_of[file] == wanted]


def missing_shards(files: Iterable[str]) -> list[str]:
    """Shards START-00007-of-00042 that are not among the files where others of the 42 are."""
    groups = defaultdict(set)
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.[^/]*", file):
            groups[match[1], match[3]].add(int(match[2]))
    missing = []
    for (start, total), present in groups.items():
        every = range(1, int(total) + 1) if int(total) in present else range(int(total))  # some count from 1
        missing += [f"{start}-{number:0{len(total)}}-of-{total}" for number in every if number not in present]
    return missing


def expand_braces(pattern: str) -> list[str]:
    """The patterns that a shell makes of {0000..0146} and {a,b}."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{},]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        low, high = sorted((int(first), int(last)))
        words = ",".join(f"{number:0{len(first)}}" for number in range(low, high + 1))
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [each for word in words.split(",") for each in expand_braces(start + word + end)]
