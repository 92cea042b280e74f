"""Where labelled images come from: datasets on local disks, as they are distributed, behind one interface.

A source is a class derived from Source; the class statement enters it in SOURCES under the kind that its `usage` begins
with, and nothing else needs to know of it. Image files are handed over as the bytes they are, never decoded here.
Nothing is downloaded.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import sys
import tarfile
import textwrap
import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from PIL import Image

from automix_dist.errors import AutomixError, did_you_mean, some

Split = Literal["train", "val"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

SPLIT_NAMES = {"train": ("train", "training"), "val": ("validation", "valid", "val", "dev", "test")}
"""How shards of a split are called; of the names for "val", the first that is there counts."""

SPLIT_WORDS = {name for names in SPLIT_NAMES.values() for name in names}

NO_IMAGES = (".txt", ".json", ".xml", ".csv", ".md", ".db", ".ini")
"""What often lies beside images and needs no remark."""

MAX_CLASSES = 1 << 20
"""A class number from here on is taken for a mistake where a source does not say how many classes it has."""

HOLDOUT_SALT = b"automix holdout\0"
"""Goes before the keys that are hashed to choose held-out images; another one would choose others."""

ROWS_IN_MEMORY = 1024
"""Parquet row groups are kept until they have more rows than this; two are kept always."""


class SourceError(AutomixError, ValueError):
    """A source that is unknown, missing or laid out otherwise; the message says what was expected."""


class Source(ABC):
    """Labelled images that can be read in any order, from several threads."""

    usage: ClassVar[str]
    """How the source is written on the command line."""
    kind: ClassVar[str]
    """The word that the usage begins with."""
    layout: ClassVar[str] = ""
    """The files that are expected; shown when something is missing."""

    argument: str
    """What the user wrote after the kind."""
    classes: list[str]
    labels: np.ndarray
    """[count] int64, indices into classes; -1 where the class is unknown."""
    unknown: dict[int, str]
    """Why, for each image with an unknown class."""
    remarks: list[str]
    """What is unusual but no mistake, such as a different number of images than was published."""
    empty: list[str]
    """Folders of classes without images: a mistake, unless the class list is given."""
    unused: list[str]
    """Class numbers that no image has: unusual, unless the class list is given."""
    ignored: list[str]
    """Files in the folders of classes that are taken for no images."""
    has_splits: bool = True
    """Whether the split chooses among the images; of those of a source without splits a share can be held out."""

    def __init_subclass__(cls, usage: str | None = None) -> None:
        if usage is not None:
            cls.usage, cls.kind = usage, re.split(r"[:\[]", usage)[0]
            SOURCES[cls.kind] = cls

    def __init__(self, argument: str, split: Split) -> None:
        """Find the images of one split. Raises SourceError or OSError."""
        self.argument = argument
        self.remarks, self.empty, self.unused, self.ignored = [], [], [], []

    @abstractmethod
    def load(self, i: int) -> bytes | Image.Image:
        """Image number i: the bytes of an image file, or pixels. What it raises marks the image as broken."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What to call image number i in messages; its path where it has one."""

    def key(self, i: int) -> str:
        """What tells image number i from the others, the same on every machine: by it images are held out."""
        return str(i)

    def label(self, classes: list[str], labels: Iterable[int | str]) -> None:
        """Take over the classes and, as a number or a class name, the label of each image."""
        number = {name: i for i, name in enumerate(classes)}
        found, unknown = [], {}
        for i, label in enumerate(labels):
            label_id = number.get(label, -1) if isinstance(label, str) else label
            if not 0 <= label_id < len(classes):
                unknown[i] = (
                    f"class {label!r} is not one of the {len(classes)} classes"
                    if isinstance(label, str)
                    else f"label {label} is not in 0 .. {len(classes) - 1}"
                )
                label_id = -1
            found.append(label_id)
        self.classes, self.labels, self.unknown = classes, np.array(found, np.int64), unknown

    def numbers(self, labels: Iterable[int | str]) -> list[str]:
        """The classes of a source that has numbers only: 0 to the largest. Notes which of them no image has."""
        used = {label for label in labels if isinstance(label, int) and 0 <= label < MAX_CLASSES}
        classes = range(max(used, default=0) + 1)
        self.unused = [str(label) for label in classes if used and label not in used]
        return [str(label) for label in classes]

    def use_classes(self, classes: list[str]) -> None:
        """Number the images by another list of class names. Raises SourceError for images of a class not in it, and
        for a name that one of two different lists has twice."""
        if classes == self.classes:
            return
        for each, names in (("the class list given", classes), ("its own class list", self.classes)):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise SourceError(
                    f"source '{self.kind}:{self.argument}': {each} has {some(twice)} more than once, and the lists "
                    "differ: which class is meant cannot be told; give every class a name of its own"
                )
        number = {name: i for i, name in enumerate(classes)}
        used = [self.classes[label] for label in np.unique(self.labels) if label >= 0]
        if foreign := [name for name in used if name not in number]:
            raise SourceError(
                f"source '{self.kind}:{self.argument}' has images of {some(foreign)}, not in the class list given"
            )
        numbers = np.array([number.get(name, -1) for name in self.classes] + [-1])  # the last is for unknown ones
        self.classes, self.labels = classes, numbers[self.labels]

    def error(self, what: str) -> SourceError:
        expected = f"; expected\n{textwrap.indent(textwrap.dedent(self.layout).strip(), '  ')}" if self.layout else ""
        return SourceError(f"source '{self.kind}:{self.argument}': {what}{expected}")


SOURCES: dict[str, type[Source]] = {}
"""Every source by its kind."""


class Part(Source):
    """Some of the images of another source."""

    def __init__(self, whole: Source, chosen: list[int]) -> None:
        self.whole, self.chosen = whole, chosen
        self.classes, self.labels, self.remarks = whole.classes, whole.labels[chosen], whole.remarks
        self.unknown = {place: whole.unknown[i] for place, i in enumerate(chosen) if i in whole.unknown}

    def load(self, i: int) -> bytes | Image.Image:
        return self.whole.load(self.chosen[i])

    def name(self, i: int) -> str:
        return self.whole.name(self.chosen[i])


def open_source(source: str, split: Split, classes: list[str] | None = None, holdout: float | None = None) -> Source:
    """Open a source as written on the command line: `KIND:ARGUMENT`, or an existing folder with a subfolder per class.

    `classes` is the class list to number the images by, in place of the source's own. With `holdout`, that share of
    each class of a source without splits is "val" and the rest "train". Raises SourceError or OSError.
    """
    images = _find_source(source, split if holdout is None else "train")
    if holdout is not None and images.has_splits:
        raise SourceError(f"source {source!r} has splits of its own: leave --holdout out, --split chooses between them")
    if classes is not None:
        images.use_classes(classes)
    elif images.empty:
        raise SourceError(
            f"{images.empty[0]} has no images ({' '.join(IMAGE_SUFFIXES)}); remove it or fill it, or give the class "
            f"list with --classes"
        )
    elif images.unused:
        images.remarks.append(f"of {len(images.classes)} class numbers these have no images: {some(images.unused)}")
    if images.ignored:
        images.remarks.append(f"{len(images.ignored)} other files are ignored, such as {images.ignored[0]}")
    return images if holdout is None else _part(images, split, holdout)


def _part(images: Source, split: Split, share: float) -> Part:
    """The held-out images, or the others: of each class those whose keys have the smallest hashes are held out, at
    least one, but never all."""

    def place(i: int) -> bytes:
        return hashlib.sha256(HOLDOUT_SALT + os.fsencode(images.key(i))).digest()

    members = defaultdict(list)
    for i, label in enumerate(images.labels.tolist()):
        members[label].append(i)
    held = set()
    for each in members.values():
        count = min(max(1, round(share * len(each))), len(each) - 1)
        held.update(sorted(each, key=place)[:count])
    if not held:
        raise SourceError(
            f"source '{images.kind}:{images.argument}': no class has two images, of which one could be held out"
        )
    if single := [images.classes[label] for label, each in sorted(members.items()) if len(each) == 1 and label >= 0]:
        images.remarks.append(f"classes with one image only, which is for training: {some(single)}")
    return Part(images, [i for i in range(len(images.labels)) if (i in held) == (split == "val")])


def _find_source(source: str, split: Split) -> Source:
    kind, _, argument = source.partition(":")
    if kind in SOURCES:
        return SOURCES[kind](os.path.expanduser(argument), split)  # a shell expands ~ at the start of a word only
    if source and Path(source).is_dir():
        return ImageFolder(source, split)
    hint = did_you_mean(kind.lower(), SOURCES.keys())
    usages = ", ".join(each.usage for each in SOURCES.values())
    raise SourceError(f"source {source!r}: expected an existing folder or one of {usages}{hint}")


class Digits(Source, usage="digits[:COUNT]"):
    """scikit-learn's handwritten digits, 8x8 gray enlarged to 32x32 RGB; every fifth of a class is for validation, or
    with COUNT all but so many of each class."""

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        from sklearn.datasets import load_digits  # 1 s to import, needed by this source only

        data = load_digits()
        rank_in_class = np.zeros(len(data.target), np.int64)
        for label in range(10):
            rank_in_class[data.target == label] = np.arange(np.sum(data.target == label))
        most = int(np.bincount(data.target).min()) - 1
        if argument and not (argument.isdecimal() and 1 <= int(argument) <= most):
            raise SourceError(
                f"source 'digits:{argument}': expected digits, or digits:COUNT for 1 to {most} training images a class"
            )
        for_training = rank_in_class < int(argument) if argument else rank_in_class % 5 != 4
        self.chosen = np.flatnonzero(for_training == (split == "train"))
        self.pixels = np.round(data.images[self.chosen] * (255 / 16)).astype(np.uint8)
        self.label([str(d) for d in range(10)], data.target[self.chosen].tolist())

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).resize((32, 32), Image.Resampling.BICUBIC)

    def name(self, i: int) -> str:
        return f"digit {self.chosen[i]}"


class Synthetic(Source, usage="synthetic:COUNT[xSIZE][@CLASSES]"):
    """Generated images: ImageNet's shapes, or SIZE x SIZE; the class sets colours and the angle of a stripe pattern."""

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        match = re.fullmatch(r"(\d+)(?:x(\d+))?(?:@(\d+))?", argument)
        if not match or int(match[1]) < 1 or match[2] == "0" or match[3] == "0":
            raise SourceError(f"source 'synthetic:{argument}': expected {self.usage}, as synthetic:5000x256@100")
        self.split, self.size, num_classes = split, int(match[2] or 0), int(match[3] or 1000)
        self.label([f"class {c}" for c in range(num_classes)], (i % num_classes for i in range(int(match[1]))))

    def load(self, i: int) -> Image.Image:
        style = np.random.default_rng([int(self.labels[i]), 2])
        colours = style.uniform(0, 255, (2, 3)).astype(np.float32)
        angle, stripes = style.uniform(0, np.pi), style.uniform(2, 6)
        random = np.random.default_rng([i, self.split == "val"])
        shapes = ((375, 500), (375, 500), (333, 500), (500, 375), (500, 333), (500, 500))
        height, width = (self.size, self.size) if self.size else shapes[random.integers(len(shapes))]

        # Noise of every scale; the finest, a value per pixel, gives JPEGs the size that photographs of this shape have.
        pixels = np.full((height, width, 3), 127.5, np.float32)
        for cells, strength in ((4, 0.4), (12, 0.3), (40, 0.3), (120, 0.3), (max(height, width), 0.4)):
            grid = random.integers(0, 256, (min(cells, height), min(cells, width), 3), np.uint8)
            layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)
            pixels += strength * (np.asarray(layer) - np.float32(127.5))

        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width)
        phase = 2 * np.pi * stripes * (np.cos(angle) * columns + np.sin(angle) * rows) + random.uniform(0, 2 * np.pi)
        share = (0.5 + 0.5 * np.sin(phase))[..., None].astype(np.float32)
        pixels = 0.5 * pixels + 0.5 * (share * colours[0] + (1 - share) * colours[1])
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def name(self, i: int) -> str:
        return f"synthetic {i}"


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
        self.label(self.numbers(labels), labels)

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
            classes = sorted({label for label in observed if isinstance(label, str)}) or self.numbers(observed)
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


def find_shards(source: Source, suffix: str, split: Split) -> tuple[list[str], list[str]]:
    """(files of the split, files of all splits) of a pattern or a folder; notes where there are no splits. Raises
    SourceError."""
    root = Path(source.argument)
    if not root.is_dir():
        patterns = [source.argument] if root.exists() else expand_braces(source.argument)
        found = {each: [each] if os.path.exists(each) else glob.glob(each, recursive=True) for each in patterns}
        missing = [each for each, files in found.items() if not files]
        if missing == [source.argument]:
            raise source.error(f"there is no such folder and no such file{similar(root)}")
        if missing:
            raise source.error(f"{len(missing)} of {len(found)} files are missing: {some(missing)}")
        files = sorted({file for files in found.values() for file in files})
        if left_out := missing_shards(files):
            source.remarks.append(f"the pattern leaves out {len(left_out)} shards: {some(left_out)}")
        source.has_splits = False
        return files, files
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
    split_of = {}
    for file in files:
        parts = reversed(Path(file).relative_to(root).parts)
        words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
        split_of[file] = next((word for word in words if word in SPLIT_WORDS), None)
    present = set(split_of.values())
    if present == {None}:
        source.has_splits = False
        return files, files
    wanted = next((name for name in SPLIT_NAMES[split] if name in present), None)
    if None in present or wanted is None:
        example = {name: file for file, name in split_of.items()}
        found = ", ".join(f"{file} ({name or 'no split in its name'})" for name, file in example.items())
        raise source.error(f"cannot tell which files belong to {split}: there are {found}; give a pattern of files")
    return [file for file in files if split_of[file] == wanted], files


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


def _choose(candidates: list[str], preferred: tuple[str, ...]) -> str | None:
    if len(candidates) == 1:
        return candidates[0]
    return next((name for name in preferred if name in candidates), None)


def whole_number(text: str) -> int | str:
    """The number, or the text if it is none that a class could have."""
    return int(text) if re.fullmatch(r"\s*[+-]?\d{1,9}\s*", text) else text


def similar(path: Path) -> str:
    """What may have been meant by a path that does not exist, as the end of a message; "" if nothing is close."""
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name.lower(), {entry.name.lower(): entry.path for entry in os.scandir(path.parent)})


class Files(Source):
    """Images that are files of their own."""

    files: list[str]

    def images_below(self, folder: Path) -> list[str]:
        """The images in a folder and all below it, sorted; notes the files that are ignored."""
        files = [os.path.join(place, name) for place, names in sorted(walk(folder)) for name in sorted(names)]
        images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
        others = (file for file in files if not file.lower().endswith((*IMAGE_SUFFIXES, *NO_IMAGES)))
        self.ignored += [file for file in others if not os.path.basename(file).startswith(".")]
        return images

    def load(self, i: int) -> bytes:
        return Path(self.files[i]).read_bytes()

    def name(self, i: int) -> str:
        return self.files[i]


class ImageFolder(Files, usage="imagefolder:DIR"):
    """A folder with one subfolder per class; sorted names are the class ids. DIR/train and DIR/val win over DIR; the
    classes are those of train then."""

    layout = "DIR/CLASS/*.jpg    one subfolder per class, or DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        root = Path(argument)
        if not root.is_dir():
            raise self.error(f"no such folder{similar(root)}")
        folder = class_root = root
        names = subfolders(root)
        splits = [name for name in names if name.lower() in SPLIT_WORDS]
        if (root / "train").is_dir() and (root / "val").is_dir():
            folder, class_root = root / split, root / "train"
        elif splits and (len(splits) > 1 or len(names) == 1):
            raise self.error(
                f"{some(splits)} are splits, not classes: call the folders train and val, or give one of them alone"
            )
        elif len(names) == 1 and any(name.lower() in SPLIT_WORDS for name in subfolders(root / names[0])):
            meant = shlex.quote(f"{self.kind}:{root / names[0]}")
            raise self.error(f"its only folder has the splits; did you mean {meant}?")
        elif split == "val":
            raise self.error(
                "it has no folders train and val to choose from: leave --split val out to write all of it, or hold "
                "out a share of each class: write --split train --holdout 0.1 and --split val --holdout 0.1"
            )
        else:
            self.has_splits = False
        classes = subfolders(class_root)
        if not classes:
            raise SourceError(f"{class_root} has no subfolders; expected one per class, with the images inside")
        present = subfolders(folder)
        if foreign := [name for name in present if name not in classes]:
            raise SourceError(f"{folder} has {some(foreign)}, not in {class_root}: expected the same class folders")
        if hidden := [entry.name for entry in os.scandir(class_root) if entry.is_dir() and entry.name[0] == "."]:
            self.remarks.append(f"folders whose names begin with a dot are no classes: {some(hidden)}")
        self.files, labels = [], []
        class_of = {os.path.realpath(folder / name): name for name in present}
        for label, name in enumerate(classes):
            found = self.images_below(folder / name) if name in present else []
            for place in sorted({os.path.dirname(file) for file in found}):
                if class_of.get(os.path.realpath(place), name) != name:
                    raise self.error(
                        f"a link makes all of {os.path.realpath(place)} images of {name}: {place}; remove it"
                    )
            if not found and folder == class_root:  # validation may lack images of a class
                self.empty.append(str(folder / name))
            self.files += found
            labels += [label] * len(found)
        if not self.files and not self.empty:
            raise self.error(f"there are no images in {folder}")
        if stray := [each.name for each in os.scandir(folder) if each.name.lower().endswith(IMAGE_SUFFIXES)]:
            self.remarks.append(f"{len(stray)} images beside the class folders are left out: {some(sorted(stray))}")
        if hidden := [file for file in self.files if "/." in file[len(str(folder)) :]]:
            self.remarks.append(f"{len(hidden)} images are hidden, by names that begin with a dot: {some(hidden)}")
        self.label(classes, labels)

    def key(self, i: int) -> str:
        return os.path.relpath(self.files[i], self.argument)


def subfolders(folder: Path) -> list[str]:
    """Sorted; not those whose names begin with a dot, such as .ipynb_checkpoints."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, names of files) of a folder and all below it, links too; each once, even where links lead in a circle."""
    seen = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(folders) if real not in seen else []
        if real not in seen:
            yield place, names
        seen.add(real)


def _raise(error: OSError) -> None:
    raise error
