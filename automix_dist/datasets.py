"""Published datasets, read from the files as they are distributed: folders, lists and annotations.

Each is a source (see sources.py) that knows its layout and its classes; what is missing is answered with the layout.
"""

import csv
import io
import json
import os
import shlex
import tarfile
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from automix_dist.errors import some
from automix_dist.sources import IMAGE_SUFFIXES, Files, Source, SourceError, Split, similar, subfolders, whole_number


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


class Cifar10(Source, usage="cifar10:DIR"):
    """CIFAR through torchvision, which checks the files' sums."""

    layout = "DIR/cifar-10-batches-py/    unpacked from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    dataset = "CIFAR10"

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        import torchvision  # slow to import

        try:
            data = getattr(torchvision.datasets, self.dataset)(argument or ".", train=split == "train", download=False)
        except RuntimeError as error:
            raise self.error(f"{self.dataset} is not in {argument or '.'!r}, or damaged") from error
        self.pixels, self.split = data.data, split
        self.label(list(data.classes), data.targets)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return f"{self.dataset} {self.split} {i}"


class Cifar100(Cifar10, usage="cifar100:DIR"):
    layout = "DIR/cifar-100-python/    unpacked from https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    dataset = "CIFAR100"


class Dataset(Files):
    """A published dataset in the folders in which it is distributed."""

    folder: ClassVar[str] = ""
    """The folder in DIR that the archive unpacks to; DIR may also be that folder itself."""
    num_classes: ClassVar[int]
    num_images: ClassVar[dict[str, int]]
    """Published number of images by split."""

    def __init__(self, argument: str, split: Split) -> None:
        super().__init__(argument, split)
        self.given = Path(argument)
        self.root = self.given / self.folder if (self.given / self.folder).is_dir() else self.given
        classes, self.files, labels = self.index(split)
        if len(classes) != self.num_classes:
            raise self.error(f"{len(classes)} classes found where the dataset has {self.num_classes}")
        if not self.files:
            raise self.error(f"there are no images for {split}")
        self.label(classes, labels)
        if len(self.files) != self.num_images[split]:
            self.remarks.append(f"{len(self.files):,} {split} images where {self.num_images[split]:,} were published")

    @abstractmethod
    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        """(classes, path of each image, label of each image)."""

    def need(self, *parts: str) -> Path:
        """A file or folder below the root. Raises SourceError if it is not there."""
        path = self.root.joinpath(*parts)
        if path.exists():
            return path
        near = self._folder_that_has(*parts)
        meant = shlex.quote(f"{self.kind}:{near}")
        raise self.error(f"{path} is missing{f'; did you mean {meant}?' if near else similar(path)}")

    def _folder_that_has(self, *parts: str) -> Path | None:
        """The folder above DIR or directly in it, if it has what DIR lacks."""
        folders = [self.given.parent]
        if self.given.is_dir():
            folders += sorted(Path(entry.path) for entry in os.scandir(self.given) if entry.is_dir())
        places = ((folder, folder.joinpath(inner, *parts)) for folder in folders for inner in (self.folder, ""))
        return next((folder for folder, path in places if path.exists()), None)

    def lines(self, *parts: str, fields: int) -> Iterator[list[str]]:
        """The lines of a text file, each split at most into the given number of fields. Raises SourceError."""
        path = self.need(*parts)
        try:
            for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
                values = line.strip().split(None, fields - 1)
                if len(values) == fields:
                    yield values
                elif line.strip():
                    raise self.error(f"{path}, line {number} is {line!r}: expected {fields} values")
        except UnicodeDecodeError as error:
            raise self.error(f"{path} is not a text file") from error


class TinyImageNet(Dataset, usage="tiny-imagenet:DIR"):
    folder = "tiny-imagenet-200"
    num_classes = 200
    num_images: ClassVar = {"train": 100_000, "val": 10_000}
    layout = """
        DIR/tiny-imagenet-200/wnids.txt                  the 200 classes
        DIR/tiny-imagenet-200/train/n01443537/images/    500 images of the class
        DIR/tiny-imagenet-200/val/images/
        DIR/tiny-imagenet-200/val/val_annotations.txt    lines `val_0.JPEG n03444034 0 32 44 62`
        (DIR may also be tiny-imagenet-200 itself)
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        classes = sorted(name for (name,) in self.lines("wnids.txt", fields=1))
        if split == "val":
            folder = self.need("val", "images")
            rows = list(self.lines("val", "val_annotations.txt", fields=3))
            return classes, [str(folder / name) for name, _, _ in rows], [name for _, name, _ in rows]
        present = set(subfolders(self.need("train")))
        if present != set(classes):
            raise self.error(f"{self.root / 'train'} {_difference(present, set(classes))}")
        files, labels = [], []
        for name in classes:
            found = self.images_below(self.need("train", name, "images"))
            files += found
            labels += [name] * len(found)
        return classes, files, labels


class Cub200(Dataset, usage="cub200:DIR"):
    """CUB-200-2011 with its official split."""

    folder = "CUB_200_2011"
    num_classes = 200
    num_images: ClassVar = {"train": 5_994, "val": 5_794}
    layout = """
        DIR/CUB_200_2011/classes.txt               lines `1 001.Black_footed_Albatross`
        DIR/CUB_200_2011/images.txt                lines `1 001.Black_footed_Albatross/NAME.jpg`
        DIR/CUB_200_2011/image_class_labels.txt    lines `1 1`
        DIR/CUB_200_2011/train_test_split.txt      lines `1 0`; 1 is for training
        DIR/CUB_200_2011/images/
        (DIR may also be CUB_200_2011 itself)
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        folder = self.need("images")
        name_of = dict(self.lines("classes.txt", fields=2))
        file_of = dict(self.lines("images.txt", fields=2))
        class_of = dict(self.lines("image_class_labels.txt", fields=2))
        is_train = dict(self.lines("train_test_split.txt", fields=2))
        incomplete = file_of.keys() ^ is_train.keys()
        if incomplete:
            raise self.error(f"images.txt and train_test_split.txt differ in image {min(incomplete)}")
        chosen = [i for i in file_of if is_train[i] == ("1" if split == "train" else "0")]
        labels = [name_of.get(number, number) for number in (class_of.get(i, "none") for i in chosen)]
        return list(name_of.values()), [str(folder / file_of[i]) for i in chosen], labels


class Aircraft(Dataset, usage="aircraft:DIR"):
    """FGVC-Aircraft by variant; training takes train and val, as published results do, evaluation takes test."""

    folder = "fgvc-aircraft-2013b"
    num_classes = 100
    num_images: ClassVar = {"train": 6_667, "val": 3_333}
    layout = """
        DIR/fgvc-aircraft-2013b/data/variants.txt                   the 100 classes
        DIR/fgvc-aircraft-2013b/data/images_variant_trainval.txt    lines `1025794 707-320`
        DIR/fgvc-aircraft-2013b/data/images_variant_test.txt
        DIR/fgvc-aircraft-2013b/data/images/1025794.jpg
        (DIR may also be fgvc-aircraft-2013b itself)
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        classes = [name for (name,) in self.lines("data", "variants.txt", fields=1)]
        folder = self.need("data", "images")
        name = f"images_variant_{'trainval' if split == 'train' else 'test'}.txt"
        rows = list(self.lines("data", name, fields=2))
        return classes, [str(folder / f"{name}.jpg") for name, _ in rows], [label for _, label in rows]


class Cars(Dataset, usage="cars:DIR"):
    """Stanford Cars through torchvision."""

    folder = "stanford_cars"
    num_classes = 196
    num_images: ClassVar = {"train": 8_144, "val": 8_041}
    layout = """
        DIR/stanford_cars/devkit/cars_meta.mat
        DIR/stanford_cars/devkit/cars_train_annos.mat
        DIR/stanford_cars/cars_test_annos_withlabels.mat
        DIR/stanford_cars/cars_train/00001.jpg
        DIR/stanford_cars/cars_test/00001.jpg
        (DIR may also be stanford_cars itself)
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        from scipy.io.matlab import MatReadError
        from torchvision.datasets import StanfordCars  # slow to import

        self.need("devkit", "cars_meta.mat")
        self.need(*(("devkit", "cars_train_annos.mat") if split == "train" else ("cars_test_annos_withlabels.mat",)))
        self.need("cars_train" if split == "train" else "cars_test")
        if self.root.name != self.folder:
            raise self.error(f"the folder {self.root} has another name than {self.folder}")
        try:
            data = StanfordCars(self.root.parent, "train" if split == "train" else "test", loader=str)
        except (ValueError, KeyError, TypeError, NotImplementedError, MatReadError) as error:
            raise self.error(f"the .mat files cannot be read ({error})") from error
        samples = [data[i] for i in range(len(data))]
        return list(data.classes), [file for file, _ in samples], [int(label) for _, label in samples]


class INat2017(Dataset, usage="inat2017:DIR"):
    """iNaturalist 2017 from its COCO-style annotations, in their order of categories."""

    num_classes = 5089
    num_images: ClassVar = {"train": 579_184, "val": 95_986}
    year: ClassVar = 2017
    layout = """
        DIR/train2017.json
        DIR/val2017.json
        DIR/train_val_images/Aves/...    or wherever the annotations' file_name points below DIR
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        path = self.need(f"{split}{self.year}.json")
        try:
            content = json.loads(path.read_bytes())
            order = sorted(content["categories"], key=lambda category: category["id"])
            number = {category["id"]: i for i, category in enumerate(order)}
            classes = [str(category["name"]) for category in order]
            category_of = {each["image_id"]: each["category_id"] for each in content["annotations"]}
            files = [str(self.root / image["file_name"]) for image in content["images"]]
            given = [category_of.get(image["id"]) for image in content["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self.error(f"{path} is not an annotation file of the challenge ({error!r})") from error
        if files:
            self.need(content["images"][0]["file_name"].split("/")[0])
        return classes, files, [number.get(category, f"category {category}") for category in given]


class INat2018(INat2017, usage="inat2018:DIR"):
    num_classes = 8142
    num_images: ClassVar = {"train": 437_513, "val": 24_426}
    year: ClassVar = 2018
    layout = """
        DIR/train2018.json
        DIR/val2018.json
        DIR/train_val2018/Aves/...    or wherever the annotations' file_name points below DIR
    """


class Places205(Dataset, usage="places205:DIR"):
    num_classes = 205
    num_images: ClassVar = {"train": 2_448_873, "val": 20_500}
    layout = """
        DIR/trainvalsplit_places205/train_places205.csv    lines `a/abbey/gsun_0003586c.jpg 0`
        DIR/trainvalsplit_places205/val_places205.csv
        DIR/data/vision/torralba/deeplearning/images256/a/abbey/gsun_0003586c.jpg
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        folder = self.need("data", "vision", "torralba", "deeplearning", "images256")
        rows = {}
        for each in {"train", split}:  # the names of the classes are those of the training images' folders
            lines = self.lines("trainvalsplit_places205", f"{each}_places205.csv", fields=2)
            rows[each] = [(name, whole_number(label)) for name, label in lines]
        name_of: dict[int, str] = {}
        for name, label in rows["train"]:
            if isinstance(label, int) and 0 <= label < self.num_classes:
                name_of.setdefault(label, "/".join(name.strip("/").split("/")[1:-1]))
        classes = [name_of[label] for label in sorted(name_of)]
        return classes, [f"{folder}/{name.lstrip('/')}" for name, _ in rows[split]], [label for _, label in rows[split]]


class ImageNet(Dataset, usage="imagenet:DIR"):
    """ImageNet-1k; classes are the sorted WordNet ids, as a folder of classes gives them."""

    folder = "ILSVRC/Data/CLS-LOC"  # of the archive on Kaggle
    num_classes = 1000
    num_images: ClassVar = {"train": 1_281_167, "val": 50_000}
    images_of_class: ClassVar = {"train": (732, 1300), "val": (50, 50)}
    layout = """
        DIR/train/n01440764/*.JPEG                 1,000 such folders, 1,281,167 images
        DIR/val/n01440764/*.JPEG                   1,000 such folders, 50,000 images
        or DIR/val/ILSVRC2012_val_00000001.JPEG    50,000 images, and beside val either
           DIR/ILSVRC2012_devkit_t12.tar.gz        (or unpacked), or
           DIR/LOC_val_solution.csv                (Kaggle)
        (with Kaggle's archive, train and val lie in DIR/ILSVRC/Data/CLS-LOC)
    """

    def index(self, split: Split) -> tuple[list[str], list[str], list[int | str]]:
        classes, folder = imagenet_classes(), self.need(split)
        present = set(subfolders(folder))
        if split == "val" and not present:
            files, labels = self._flat_val(folder)
        else:
            if present != set(classes):
                packed = [name for name in classes if (folder / f"{name}.tar").exists()]
                hint = f"; {len(packed)} of the .tar files in it are not unpacked" if packed else ""
                if present < set(classes) and present:
                    hint += f"; for a subset of the classes use {shlex.quote(f'imagefolder:{self.root}')}"
                raise self.error(f"{folder} {_difference(present, set(classes))}{hint}")
            files, labels = [], []
            for name in classes:
                found = self.images_below(folder / name)
                files += found
                labels += [name] * len(found)
        fewest, most = self.images_of_class[split]
        counts = Counter(labels)
        odd = [f"{name} has {counts[name]}" for name in classes if not fewest <= counts[name] <= most]
        if odd:
            usual = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            self.remarks.append(f"{len(odd)} classes do not have {usual} images: {some(odd, most=20)}")
        return classes, files, labels

    def _flat_val(self, folder: Path) -> tuple[list[str], list[int | str]]:
        """(paths, classes) of validation images that lie in one folder."""
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES))
        if not names:
            raise self.error(f"there are no images in {folder}")
        truth = self._ground_truth()
        missing = sorted(truth.keys() - {Path(name).stem for name in names})
        if missing:
            self.remarks.append(f"{len(missing)} images are missing in {folder}: {some(missing, most=20)}")
        return [str(folder / name) for name in names], [truth.get(Path(name).stem, "unknown") for name in names]

    def _ground_truth(self) -> dict[str, str]:
        """The WordNet id of each validation image, by the image's name without its suffix."""
        for place in (self.given, self.root):
            table, archive = place / "LOC_val_solution.csv", place / "ILSVRC2012_devkit_t12.tar.gz"
            devkit = place / "ILSVRC2012_devkit_t12" / "data"
            found = table
            try:
                if table.is_file():
                    with open(table, newline="", encoding="utf-8-sig") as file:
                        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
                if archive.is_file():
                    found = archive
                    with tarfile.open(archive) as tar:
                        members = [f"ILSVRC2012_devkit_t12/data/{name}" for name in _DEVKIT_FILES]
                        return _devkit_truth(*(tar.extractfile(name).read() for name in members))
                if devkit.is_dir():
                    found = devkit
                    return _devkit_truth(*((devkit / name).read_bytes() for name in _DEVKIT_FILES))
            except (ValueError, LookupError, AttributeError, EOFError, zlib.error, tarfile.TarError) as error:
                raise self.error(f"{found} cannot be read ({error!r})") from error
        raise self.error("val has no class folders, and nothing says which image has which class")


_DEVKIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")


def _devkit_truth(meta: bytes, numbers: bytes) -> dict[str, str]:
    """The WordNet id of each validation image, from the two files of the development kit."""
    import scipy.io  # slow to import

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    except (TypeError, NotImplementedError, scipy.io.matlab.MatReadError) as error:
        raise ValueError(f"meta.mat: {error}") from error
    wnid_of = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    return {f"ILSVRC2012_val_{i:08d}": wnid_of[int(number)] for i, number in enumerate(numbers.split(), 1)}


def _difference(present: set[str], expected: set[str]) -> str:
    """How a list of class folders differs from the one expected."""
    missing, extra = sorted(expected - present), sorted(present - expected)
    parts = [f"lacks {len(missing)} of {len(expected)} class folders: {some(missing, most=20)}"] if missing else []
    parts += [f"has {len(extra)} folders that are no classes of the dataset: {some(extra, most=20)}"] if extra else []
    return " and ".join(parts)


@cache
def imagenet_classes() -> list[str]:
    """The WordNet ids of the 1,000 classes of ImageNet-1k, sorted."""
    return (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()
