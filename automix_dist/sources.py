"""Where labelled images come from: datasets on local disks, as they are distributed, behind one interface.

A source is a class derived from Source; the class statement enters it in SOURCES under the kind that its `usage` begins
with, and nothing else needs to know of it. Image files are handed over as the bytes they are, never decoded here.
Nothing is downloaded.
"""

import hashlib
import os
import re
import shlex
import textwrap
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

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

    def numbered_classes(self, labels: Iterable[int | str]) -> list[str]:
        """The classes of a source that has numbers only: 0 to the largest. Those that no image has go into `unused`."""
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
        self.kind, self.argument = whole.kind, whole.argument
        self.layout, self.has_splits = whole.layout, whole.has_splits
        self.remarks, self.empty, self.unused, self.ignored = whole.remarks, whole.empty, whole.unused, whole.ignored
        self.classes, self.labels = whole.classes, whole.labels[chosen]
        self.unknown = {place: whole.unknown[i] for place, i in enumerate(chosen) if i in whole.unknown}

    def load(self, i: int) -> bytes | Image.Image:
        return self.whole.load(self.chosen[i])

    def name(self, i: int) -> str:
        return self.whole.name(self.chosen[i])

    def key(self, i: int) -> str:
        return self.whole.key(self.chosen[i])


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
        folder, class_root = self._split_folders(root, split)
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

    def _split_folders(self, root: Path, split: Split) -> tuple[Path, Path]:
        """(the folder of the images, the folder whose subfolders are the classes); notes where there are no splits."""
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root / split, root / "train"
        names = subfolders(root)
        splits = [name for name in names if name.lower() in SPLIT_WORDS]
        if splits and (len(splits) > 1 or len(names) == 1):
            raise self.error(
                f"{some(splits)} are splits, not classes: call the folders train and val, or give one of them alone"
            )
        if len(names) == 1 and any(name.lower() in SPLIT_WORDS for name in subfolders(root / names[0])):
            meant = shlex.quote(f"{self.kind}:{root / names[0]}")
            raise self.error(f"its only folder has the splits; did you mean {meant}?")
        if split == "val":
            raise self.error(
                "it has no folders train and val to choose from: leave --split val out to write all of it, or hold "
                "out a share of each class: write --split train --holdout 0.1 and --split val --holdout 0.1"
            )
        self.has_splits = False
        return root, root

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
