"""Files of generated images for the benchmarks that read some."""

from pathlib import Path
from typing import Any

from automix_dist import beton
from automix_dist.config import ConfigError
from automix_dist.distributed import launched_ranks
from automix_dist.prepare import PrepareOptions, prepare
from automix_dist.sources import Split


def synthetic_file(file: Path, images: int, storage: str, split: Split = "train", **options: Any) -> None:
    """Have a file of so many images, stored as KIND@SIZE, prepared with more options unless it is there and whole.

    Raises ConfigError in one of several ranks, which would all write it.
    """
    try:
        beton.check(file)
    except beton.BetonError:
        if launched_ranks() > 1:
            raise ConfigError(f"{file} is not there: run the same command without torchrun first") from None
        kind, _, size = storage.partition("@")
        chosen = PrepareOptions(write_mode=kind, max_resolution=int(size), **options)
        prepare(f"synthetic:{images}", file, chosen, split=split, overwrite=True, progress=False)
