"""What can be wrong with a run: found before any process group, folder or file exists, by `train` and by the doctor."""

import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from automix_dist import beton, provenance
from automix_dist.checkpoint_files import committed_steps
from automix_dist.config import Config, ConfigError
from automix_dist.data import check_batch_size, check_crop
from automix_dist.distributed import launched_ranks, resolve_device
from automix_dist.engines import deepspeed_settings
from automix_dist.errors import some
from automix_dist.model import new_model, without_weights
from automix_dist.trackers import check_installed


class Checked(NamedTuple):
    """What is known of a run before it begins."""

    train: beton.Manifest
    val: beton.Manifest
    model: nn.Module
    weights_error: ConfigError | None
    """The error to raise if there is no checkpoint to take the weights from."""


def check_run(config: Config, resumed: Path | None = None) -> Checked:
    """All that can be wrong with a config. Constructing the model is a check of its own.

    A run that is resumed in the folder `resumed`, with checkpoints, can do without the weights with which it began.

    Raises ConfigError or BetonError.
    """
    device = _check_settings(config)
    train, val = _check_data(config)
    try:
        return Checked(train, val, new_model(config, len(train.classes), device), None)
    except ConfigError as error:
        if resumed is None or not committed_steps(resumed):
            raise
        return Checked(train, val, new_model(without_weights(config), len(train.classes), device), error)


def check_without_data(config: Config) -> nn.Module:
    """What of it needs no data files; the model, for some number of classes. Raises ConfigError."""
    return new_model(config, 1000, _check_settings(config))


def _check_settings(config: Config) -> torch.device:
    """What needs neither data nor model; the kind of device to train on."""
    check_installed(config.log)
    world_size = launched_ranks()
    config.micro_batch_size(world_size)
    device = torch.device(resolve_device(config.engine))
    for key in ("sync_batchnorm", "cuda_graph"):
        if getattr(config.engine, key) and device.type == "cpu":
            raise ConfigError(f"engine.{key} needs a GPU and there is none here: set it to false")
    if config.engine.name == "deepspeed" and provenance.installed_version("deepspeed") is None:
        raise ConfigError(
            "engine.name = 'deepspeed': the package deepspeed is not installed here; bash launch/install.sh installs "
            "it, or set engine.name to ddp or fsdp2"
        )
    deepspeed_settings(config, world_size, device)
    return device


def _check_data(config: Config) -> tuple[beton.Manifest, beton.Manifest]:
    """The files of data.train and data.val, and whether they belong together."""
    for key in ("train", "val"):
        path = getattr(config.data, key)
        if not path:
            hint = " (of one folder of images: with --split val --holdout 0.1)" if key == "val" else ""
            raise ConfigError(
                f"data.{key} is not set: expected the path of a .beton file written by `automix prepare`{hint}"
            )
        if Path(path).is_dir():
            raise beton.BetonError(
                f"data.{key} = {path!r} is a folder: expected a .beton file; `automix prepare {shlex.quote(path)} "
                "FILE.beton` writes one"
            )
        if not Path(path).is_file():
            raise beton.BetonError(
                f"data.{key} = {path!r} does not exist: write it with automix prepare (a recipe has the line beside "
                f"data.{key}), or set data.{key} to another file{beton.looked_for_in(Path(path))}"
            )
    train, val = beton.check(Path(config.data.train)), beton.check(Path(config.data.val))
    check_batch_size(config.batch_size, train.count, config.data.train)
    check_crop(config.data, train)
    if train.index_checksum == val.index_checksum:
        raise ConfigError(
            f"data.val = {config.data.val!r} holds the images of data.train = {config.data.train!r}: write it from the "
            f"validation images, with automix prepare --split val or from their own folder; of one folder without "
            f"splits, write both, with --split train --holdout 0.1 and --split val --holdout 0.1"
        )
    shares = [manifest.options.get("holdout") for manifest in (val, train)]
    if train.source == val.source and shares[0] != shares[1]:
        how = " and ".join("all of it" if share is None else f"with --holdout {share}" for share in shares)
        raise ConfigError(
            f"data.val = {config.data.val!r} and data.train = {config.data.train!r} share images: they were "
            f"written from {train.source!r}, {how}: write both with the same --holdout"
        )
    if train.classes != val.classes:
        missing = [name for name in train.classes if name not in val.classes]
        foreign = [name for name in val.classes if name not in train.classes]
        lists = (("lacks", missing), ("has the extra classes", foreign))
        differences = " and ".join(f"{what} {some(names)}" for what, names in lists if names) or "has another order"
        raise ConfigError(
            f"the class list of data.val = {config.data.val!r} {differences}, "
            f"compared with data.train: write it again with automix prepare --overwrite --classes "
            f"{shlex.quote(config.data.train)}"
        )
    return train, val
