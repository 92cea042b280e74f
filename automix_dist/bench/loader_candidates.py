"""The loaders that `automix bench loader` compares, each as one function that gives epochs of batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np

from automix_dist import beton

BATCH, SIDE, QUALITY = 64, 224, 90
"""Of a batch; of an image, in pixels; of its JPEG."""

DALI_LEAD = 4
"""Batches of DALI's endless stream between two measured epochs, more than it prepares ahead."""


@dataclass(frozen=True)
class Candidate:
    """One way of reading. `epoch_of(job)` prepares it and returns a function that gives an epoch, an iterator over
    batches of images that does nothing before its first batch is asked for."""

    name: str
    kinds: tuple[str, ...]
    """Storage kinds it reads: jpg, raw."""
    epoch_of: Callable[[dict], Callable[[], Iterable]]
    module: str = ""
    """What must be installed for it."""
    package: str = ""
    """Name of the package that brings the module."""


# All of this runs in the candidates' own processes; what they import stays out of the others.


def ours(job: dict, resize: str = "area", order: str = "random") -> Callable[[], Iterator]:
    import torch

    from automix_dist.config import DataConfig
    from automix_dist.data import TrainLoader

    config = DataConfig(image_size=SIDE, resize=resize, order=order, workers=job["workers"])
    loader = TrainLoader(
        job["beton"], config, seed=0, batch_size=BATCH, rank=0, world_size=1, accumulation_steps=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    numbers = count()

    def epoch() -> Iterator:
        for batch in loader.epoch(next(numbers)):
            yield batch.images

    return epoch


def ours_plain(job: dict) -> Callable[[], Iterator]:
    return ours(job | {"beton": job["plain"]})


def ours_bicubic(job: dict) -> Callable[[], Iterator]:
    return ours(job, resize="bicubic")


def ffcv(job: dict) -> Callable[[], Iterator]:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    images = [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        job["plain"], batch_size=BATCH, num_workers=job["workers"], order=OrderOption.RANDOM, os_cache=True,
        pipelines={"image": images, "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip
    return partial(_first_of_each, loader)


def _first_of_each(batches: Iterable) -> Iterator:
    """A generator, so that nothing starts before the clock does."""
    for images, _ in batches:
        yield images


def _pil_transform() -> Callable:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _tensor_transform() -> Callable:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])


def _data_loader(dataset, job: dict, **options) -> Callable[[], Iterator]:
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, num_workers=job["workers"], persistent_workers=True, **options)
    return partial(_first_of_each, loader)


def data_loader_pil(job: dict) -> Callable[[], Iterator]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(job["folder"], _pil_transform())
    return _data_loader(dataset, job, batch_size=BATCH, shuffle=True, drop_last=True)


def data_loader_decode_jpeg(job: dict) -> Callable[[], Iterator]:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    def load(path: str):
        return decode_jpeg(read_file(path), ImageReadMode.RGB)

    dataset = ImageFolder(job["folder"], _tensor_transform(), loader=load)
    return _data_loader(dataset, job, batch_size=BATCH, shuffle=True, drop_last=True)


class RawImages:
    """A map-style dataset of the raw images of a .beton file, mapped into memory by numpy."""

    def __init__(self, path: str, transform: Callable):
        self.records = beton.read_index(path).records
        self.file = np.memmap(path, np.uint8, "c")  # private, so that torch gets arrays that it may write to
        self.transform = transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int):
        import torch

        image = self.records["image"][i]
        height, width, start = int(image["height"]), int(image["width"]), int(image["data_ptr"])
        pixels = self.file[start : start + 3 * height * width].reshape(height, width, 3)
        return self.transform(torch.from_numpy(pixels).permute(2, 0, 1)), int(self.records["label"][i])


def data_loader_memmap(job: dict) -> Callable[[], Iterator]:
    dataset = RawImages(job["beton"], _tensor_transform())
    return _data_loader(dataset, job, batch_size=BATCH, shuffle=True, drop_last=True)


def webdataset(job: dict) -> Callable[[], Iterator]:
    import webdataset as wds

    dataset = (
        wds.WebDataset(job["shards"], shardshuffle=len(job["shards"]), workersplitter=wds.split_by_worker)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_pil_transform(), int)
        .batched(BATCH, partial=True)
    )
    return _data_loader(dataset, job, batch_size=None)


def dali(job: dict) -> Callable[[], Iterator]:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=BATCH, num_threads=job["workers"], device_id=None, seed=0)
    def pipeline():
        files, labels = fn.readers.file(file_root=job["folder"], random_shuffle=True)
        images = fn.decoders.image_random_crop(
            files, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, resize_x=SIDE, resize_y=SIDE, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    endless = (outputs[0]["images"] for outputs in DALIGenericIterator(pipeline(), ["images", "labels"]))

    def epoch() -> Iterator:
        # Batches are prepared across the ends of epochs. Those that wait since the last epoch were made while no clock
        # ran: they are passed over.
        deque(islice(endless, DALI_LEAD), maxlen=0)
        return islice(endless, job["images"] // BATCH)

    return epoch


CANDIDATES = (
    Candidate("ours", ("jpg", "raw"), ours),
    Candidate("ours, bicubic", ("jpg", "raw"), ours_bicubic),
    Candidate("ours, plain JPEG", ("jpg",), ours_plain),
    Candidate("FFCV's Loader", ("jpg", "raw"), ffcv, "ffcv", "ffcv"),
    Candidate("DataLoader + PIL", ("jpg",), data_loader_pil),
    Candidate("DataLoader + decode_jpeg", ("jpg",), data_loader_decode_jpeg),
    Candidate("DataLoader + numpy.memmap", ("raw",), data_loader_memmap),
    Candidate("WebDataset + PIL", ("jpg",), webdataset, "webdataset", "webdataset"),
    Candidate("DALI on the CPU", ("jpg",), dali, "nvidia.dali", "nvidia-dali-cuda120"),
)
