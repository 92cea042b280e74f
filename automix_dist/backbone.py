"""timm models as AutoMix sees them: a feature map for the Mix Block and a pooled embedding for the heads."""

import argparse
import contextlib
import importlib
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors.torch import load_file
from timm.models import group_parameters
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from automix_dist.config import ConfigError, DataConfig, ModelConfig
from automix_dist.errors import did_you_mean

STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Under which training programs keep the weights in a checkpoint, in timm's order: a moving average before the weights
that it is of; OpenMMLab's and timm's, torchvision's and DeiT's."""

_LOADS_PRETRAINED = ContextVar("loads_pretrained", default=True)


class Backbone(nn.Module):
    """A timm model without its classifier. Raises ConfigError if what it pools is not one vector for each image.

    A module with `features`, `forward`, `feature_channels` and `width` can stand in for it under AutoMix and SAMix;
    `automix.feature_source=query` and AdAutoMix call `features_and_embedding` as well, AlignMix `last_map` and `pool`.
    """

    feature_channels: int
    """C of the feature map."""
    feature_size: tuple[int, int]
    """h, w of the feature map."""
    width: int
    """Length of the pooled embedding."""

    def __init__(self, model: nn.Module, feature: int | None, image_size: int):
        super().__init__()
        self.model = model
        self.feature = feature
        with torch.no_grad():
            training = model.training
            model.eval()
            images = torch.zeros(2, 3, image_size, image_size)
            if feature is not None:
                _, self.feature_channels, *size = self.features(images).shape
                self.feature_size = tuple(size)
            pooled = self(images)
            if pooled.ndim != 2:
                raise ConfigError(
                    f"model.backbone: expected an embedding [images, width] of {type(model).__name__}, got shape "
                    f"{list(pooled.shape)}: in model.timm_kwargs leave global_pool out, or choose one that pools"
                )
            self.width = pooled.shape[1]
            model.train(training)

    def features(self, images: Tensor, *, full: bool = False) -> Tensor:
        """[B, 3, H, W] -> the feature map [B, C, h, w] for the Mix Block, before any final norm.

        With `full`, the layers behind it run too, for the sake of their BatchNorm statistics.
        """
        if full:
            _, maps = self.model.forward_intermediates(images, indices=[self.feature])
        else:
            maps = self.model.forward_intermediates(
                images, indices=[self.feature], stop_early=True, intermediates_only=True
            )
        return maps[0]

    def features_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`features` and `forward` from one pass."""
        last, maps = self.model.forward_intermediates(images, indices=[self.feature])
        return maps[0], self.model.forward_head(last, pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the embedding [B, width] that the model's own classifier would see."""
        return self.pool(self.last_map(images))

    def last_map(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last feature map: [B, C, h, w] of most CNNs."""
        return self.model.forward_features(images)

    def describe_feature(self) -> str:
        """Which of the model's feature maps the Mix Block reads, and its shape, for people to check."""
        maps = self.model.feature_info
        shape = " x ".join(map(str, (self.feature_channels, *self.feature_size)))
        text = f"{maps[self.feature]['module']} (automix.feature {self.feature} of 0 to {len(maps) - 1}), {shape}"
        if self.feature == len(maps) - 2 and len({each["reduction"] for each in maps}) == 1:
            text += f"; its maps are all of one size: the recipes take the middle, automix.feature={len(maps) // 2 - 1}"
        return text

    def layers_from_top(self) -> dict[nn.Parameter, int]:
        """For each parameter the number of layers from its own to the classifier's, in the order that timm gives them.

        Raises ConfigError for a model without one.
        """
        if not hasattr(self.model, "group_matcher"):
            name = type(self.model).__name__
            raise ConfigError(f"optimizer.layer_decay: timm knows no order of the layers of {name}; set it to 1")
        named = list(self.model.named_parameters())
        top = f"{next(iter(classifier_names(self.model)), 'head')}.weight"
        with_classifier = SimpleNamespace(named_parameters=lambda: [*named, (top, None)])
        layer = group_parameters(with_classifier, self.model.group_matcher(coarse=False), reverse=True)
        return {parameter: layer[top] - layer[name] for name, parameter in named}

    def pool(self, last_map: Tensor) -> Tensor:
        """The last feature map -> the embedding [B, width]."""
        return self.model.forward_head(last_map, pre_logits=True)


@contextlib.contextmanager
def pretrained_not_loaded() -> Iterator[None]:
    """Meanwhile timm's pretrained weights need only be within reach, and are not loaded: a check must not download."""
    token = _LOADS_PRETRAINED.set(False)
    try:
        yield
    finally:
        _LOADS_PRETRAINED.reset(token)


def create_timm_model(config: ModelConfig, image_size: int, num_classes: int = 0) -> nn.Module:
    """The timm model that a run trains: without a classifier (num_classes 0) inside AutoMix, with one for an export.

    Raises ConfigError for an unknown name, a module that cannot be imported, keywords with which timm cannot build the
    model, a stem that cannot be made small, or starting weights that are not there or do not fit.
    """
    if config.module:
        _import_module(config.module)
    if not timm.is_model(config.backbone):
        raise ConfigError(f"model.backbone = {config.backbone!r} is not a timm model{_nearest_model(config.backbone)}")
    kwargs = layer_kwargs(config, image_size)
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path

    def build(pretrained: bool) -> nn.Module:
        return timm.create_model(config.backbone, pretrained=pretrained, num_classes=num_classes, **kwargs)

    loads_pretrained = config.pretrained and _LOADS_PRETRAINED.get()
    if kwargs or not loads_pretrained:  # first without weights: what fails after that is to do with them
        try:
            model = build(pretrained=False)
        except Exception as error:
            raise ConfigError(
                f"model.backbone = {config.backbone!r} cannot be built with {kwargs} (model.timm_kwargs, and what "
                f"model.drop_path and data.image_size add): {_first_words(error)}"
            ) from error
    if config.pretrained:
        try:
            _require_reachable(config)
            if loads_pretrained:
                model = build(pretrained=True)
        except RuntimeError as error:  # timm's and torch's; no network raises it
            raise ConfigError(
                f"model.pretrained: timm has no weights that fit {config.backbone!r} with model.timm_kwargs = "
                f"{config.timm_kwargs}: {_first_words(error)}; set it to false, or change model.timm_kwargs"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"model.pretrained: no weights for {config.backbone!r} in timm's cache, and they could not be "
                f"downloaded ({type(error).__name__}); set model.weights to a file with a timm state dict"
            ) from error
    if config.small_stem:
        _shrink_stem(model, config.backbone)
    if config.weights:
        _load_weights(model, Path(config.weights))
    return model


def _import_module(name: str) -> None:
    """Import the module that registers the backbone; from the current directory too, as `python -m` does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except Exception as error:
        hint = f"; it must be on PYTHONPATH or in the current directory ({here})"
        raise ConfigError(
            f"model.module = {name!r} cannot be imported: {_first_words(error)}"
            f"{hint if isinstance(error, ModuleNotFoundError) else ''}"
        ) from error


def _first_words(error: Exception) -> str:
    """An error's type and the beginning of its text, which may be long or empty."""
    return textwrap.shorten(f"{type(error).__name__}: {error}".rstrip(": "), 200)


def layer_kwargs(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """The keyword arguments of `timm.create_model` that decide the model's layers, besides the number of classes."""
    kwargs = dict(config.timm_kwargs)
    pretrained_config = timm.get_pretrained_cfg(config.backbone)
    if pretrained_config is not None and pretrained_config.fixed_input_size:
        kwargs.setdefault("img_size", image_size)
    return kwargs


def create_backbone(
    config: ModelConfig, feature: int | None, image_size: int, other_sizes: Sequence[int] = ()
) -> Backbone:
    """Build the backbone and check that its feature map can carry a mask.

    Args:
        feature: index into timm's feature list, negative from the end (AutoMixConfig.feature); None: not needed.
        image_size: side in pixels of the images it will see.
        other_sizes: further sizes that it must be able to read (DataConfig.resolution_schedule).

    Raises:
        ConfigError: if the model exposes no intermediate features, has no such feature, or the image size is not a
            whole multiple of the feature map's.
    """
    model = create_timm_model(config, image_size)
    if feature is None:
        return _read(config, model, None, image_size, other_sizes)
    names = [info["module"] for info in getattr(model, "feature_info", [])]
    if not hasattr(model, "forward_intermediates") or not names:
        raise ConfigError(f"model.backbone = {config.backbone!r}: timm exposes no intermediate features of this model")
    index = feature + len(names) if feature < 0 else feature
    if not 0 <= index < len(names):
        raise ConfigError(
            f"automix.feature = {feature}: {config.backbone} has {len(names)} feature maps, 0 to {len(names) - 1} "
            f"({', '.join(names)})"
        )
    backbone = _read(config, model, index, image_size, other_sizes)
    h, w = backbone.feature_size
    if image_size % h or image_size % w:
        raise ConfigError(
            f"data.image_size = {image_size}: feature {index} ({names[index]}) of {config.backbone} is {h} x {w} "
            f"there, and a mask of this size cannot be enlarged by a whole factor; use a size that is a multiple of "
            f"it, or another automix.feature"
        )
    if h * w < 4:
        raise ConfigError(
            f"automix.feature = {feature}: feature {index} ({names[index]}) of {config.backbone} is only {h} x {w} at "
            f"data.image_size = {image_size}; set model.small_stem=true for small images, or choose an earlier feature"
        )
    return backbone


def _read(
    config: ModelConfig, model: nn.Module, feature: int | None, image_size: int, other_sizes: Sequence[int]
) -> Backbone:
    """The backbone for images of `image_size`, when it can read the other sizes too."""
    for key, size in [*(("data.resolution_schedule", size) for size in other_sizes), ("data.image_size", image_size)]:
        try:
            backbone = Backbone(model, feature, size)
        except ConfigError:
            raise
        except Exception as error:
            given = f" with model.timm_kwargs = {config.timm_kwargs}" if config.timm_kwargs else ""
            raise ConfigError(
                f"model.backbone = {config.backbone!r} cannot read images of {size} px ({key}){given}: "
                f"{_first_words(error)}"
            ) from error
    return backbone


def _nearest_model(name: str) -> str:
    return did_you_mean(name, timm.list_models(), most=3) or (
        " (see timm.list_models(); model.module names a module that registers one of your own)"
    )


def _require_reachable(config: ModelConfig) -> None:
    """Ask once for pretrained weights that are not in the cache: without network timm would retry for a minute."""
    if config.timm_kwargs.get("pretrained_cfg_overlay"):  # which may name a file
        return
    known = timm.get_pretrained_cfg(config.backbone)
    if not getattr(known, "has_weights", False) and "pretrained_cfg" not in config.timm_kwargs:
        raise RuntimeError("no pretrained weights exist")
    repository = getattr(known, "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin")
    if repository and not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        HfApi().model_info(repository, timeout=10)


def stem_of(model: nn.Module) -> tuple[str, str | None] | None:
    """The names of the first convolution and, if there is one, of the pooling behind it, in a stem that can be made
    small: of a ResNet, one with pre-activation, or a ConvNeXt. None for any other model."""
    if isinstance(model, ConvNeXt):
        return ("stem.0", None) if len(model.stem) == 2 else None
    modules = dict(model.named_modules())
    pairs = (("conv1", "maxpool"), ("stem.conv", "stem.pool"))
    return next((each for each in pairs if isinstance(modules.get(each[0]), nn.Conv2d) and each[1] in modules), None)


def _shrink_stem(model: nn.Module, name: str) -> None:
    """Replace the stem (a ResNet's 7x7 stride 2 and max-pool, a ConvNeXt's 4x4 patches) by a 3x3 of stride 1, as
    OpenMixup's ResNet_CIFAR and ConvNeXt_CIFAR have it."""
    stem = stem_of(model)
    if stem is None:
        raise ConfigError(f"model.small_stem: {name} has no stem that can be made small (ResNets and ConvNeXts have)")
    conv_name, pool_name = stem
    conv = model.get_submodule(conv_name)
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None)
    if pool_name is None:
        nn.init.trunc_normal_(small.weight, std=0.02)
        nn.init.zeros_(small.bias)
    else:
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        model.set_submodule(pool_name, nn.Identity())
    model.set_submodule(conv_name, small)


def _load_weights(model: nn.Module, path: Path) -> None:
    state = _read_weights(path)
    # timm's own conversion, of published names and of position embeddings for another image size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, model) if convert else state
    except Exception as error:
        raise ConfigError(
            f"model.weights = {str(path)!r} does not fit the model: timm's conversion fails ({type(error).__name__}: "
            f"{error})"
        ) from error
    own = model.state_dict()
    heads = tuple(_classifier_prefixes(model))
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    wrong = [k for k, v in state.items() if k not in own or own[k].shape != v.shape]
    missing = [k for k in own if k not in state and not k.startswith(heads)]
    if wrong or missing:
        whole = "; `automix export` writes what fits" if any(k.startswith("query.backbone.") for k in state) else ""
        raise ConfigError(
            f"model.weights = {str(path)!r} does not fit the model: "
            f"{len(wrong)} unknown or misshapen tensors {wrong[:3]}, {len(missing)} missing {missing[:3]}{whole}"
        )
    model.load_state_dict(state, strict=False)


def classifier_names(model: nn.Module) -> Sequence[str]:
    """The modules that are a timm model's classifier: two of a distilled one, which averages their logits."""
    named = _published(model).get("classifier") or ()
    return [named] if isinstance(named, str) else named


def _published(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's published weights; nothing of a module that timm has not built."""
    return getattr(model, "pretrained_cfg", None) or {}


def _classifier_prefixes(model: nn.Module) -> Iterator[str]:
    """With what the names of a classifier's tensors begin, in a model that was built without one."""
    for name in classifier_names(model):
        parent = f"{name.rpartition('.')[0]}."  # as of LeViT's norm and linear layer
        has_more = parent == "." or any(key.startswith(parent) for key in model.state_dict())
        yield f"{name}." if has_more else parent


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote: a state dict, or one inside a checkpoint."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in a checkpoint of timm's train.py
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"model.weights = {str(path)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        if path.suffix == ".safetensors":
            reason = f"as safetensors: {error}"
        else:  # torch's own words advise to run what the file holds
            reason = "as tensors of torch.save: it is another kind of file, damaged, or holds more than tensors"
        raise ConfigError(f"model.weights = {str(path)!r} cannot be read {reason}") from error
    while isinstance(state, dict) and (inner := next((key for key in STATE_KEYS if key in state), None)):
        state = state[inner]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"the keys {list(state)[:5]}" if isinstance(state, dict) else type(state).__name__
        raise ConfigError(
            f"model.weights = {str(path)!r}: expected a state dict, alone or in a checkpoint; got {found}"
        )
    # What data parallel training and torch.compile put before a name.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def foreign_normalisation(model: nn.Module, config: ModelConfig, data: DataConfig) -> str | None:
    """What to set where timm's pretrained weights of a model expect another normalisation; None if they do not."""
    if not (config.pretrained or config.weights) or "mean" not in _published(model):
        return None
    theirs = {key: tuple(_published(model)[key]) for key in ("mean", "std")}
    if theirs == {"mean": data.mean, "std": data.std}:
        return None
    settings = " ".join(f"'data.{key}={list(values)}'" for key, values in theirs.items())
    which = "model.pretrained: these weights expect" if config.pretrained else "model.weights: timm's own expect"
    return (
        f"{which} images of another normalisation than data.mean = {list(data.mean)}, data.std = {list(data.std)}: "
        f"set {settings}{'' if config.pretrained else ', if these are they'}"
    )


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm, timm's fused ones too, taking its statistics over all ranks' micro batches."""
    return timm.layers.convert_sync_batchnorm(model)
