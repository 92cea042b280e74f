"""A trained encoder as a safetensors file that plain timm loads."""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from automix_dist.backbone import classifier_names, create_timm_model, layer_kwargs, stem_of
from automix_dist.checkpoint_files import CheckpointError, Saved, export_tensors, load_module_state
from automix_dist.config import Config, DataConfig
from automix_dist.config_file import from_dict
from automix_dist.errors import some
from automix_dist.model import without_weights

_UNFIT = "its classifier is not linear in the embedding, so that the trained head cannot take its place"


def export_encoder(saved: Saved, out: Path, encoder: Literal["query", "momentum"], head: Literal["one", "mix"]) -> str:
    """Write one encoder with one of its heads as a timm state dict.

    BatchNorm statistics are the mean over the ranks of the run. The file's metadata tell timm's model name, its
    keyword arguments, the class names, and how evaluation cuts, resizes and normalises images.

    Returns:
        Python that loads the file.

    Raises:
        CheckpointError: if there is no such encoder or head, the model's own classifier is no linear layer, or the file
            cannot be written.
    """
    config = from_dict(saved.manifest["config"])
    state = load_module_state(saved, f"{encoder}.")
    if f"head_{head}.weight" not in state:
        raise CheckpointError(
            f"{saved.folder}: the model of policy {config.policy.name} has no {encoder} encoder with head_{head}; "
            f"use --encoder query --head one"
        )
    num_classes = state[f"head_{head}.weight"].shape[0]
    model_config = without_weights(config).model
    model = create_timm_model(model_config, config.data.image_size, num_classes)
    weight, bias = (state[f"head_{head}.{k}"] for k in ("weight", "bias"))
    prefix = "backbone.model."
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing = _fill_classifiers(model, tensors, weight, bias)
    if missing or not _answers(model, tensors, weight, bias, config.data.image_size):
        lacks = f", and has tensors beside it: {some(missing)}" if missing else ""
        raise CheckpointError(f"{config.model.backbone}: {_UNFIT}{lacks}")

    kwargs = {"num_classes": num_classes, **layer_kwargs(model_config, config.data.image_size)}
    metadata = {
        "architecture": config.model.backbone,
        "timm_kwargs": json.dumps(kwargs),
        "small_stem": json.dumps(config.model.small_stem),
        "encoder": encoder,
        "head": head,
        "step": str(saved.step),
        "image_size": str(config.data.image_size),
        "mean": json.dumps(config.data.mean),
        "std": json.dumps(config.data.std),
        "resize": config.data.resize,
        "eval_crop_ratio": str(config.data.eval_crop_ratio),
        "classes": json.dumps(saved.manifest.get("classes")),
        "commit": str(saved.manifest["environment"]["commit"]),
    }
    export_tensors({k: v.contiguous() for k, v in tensors.items()}, out, metadata)
    return loading_code(out, config, kwargs, model)


def foreseen_refusal(config: Config, trained: nn.Module) -> str | None:
    """Why the timm model that is to be trained will not be exported; None if nothing is known to be in the way.

    Only layers are compared, without weights; the export itself also compares answers.
    """
    backbone, head = trained.query.backbone.model, trained.query.head_one
    try:
        with torch.device("meta"):
            model = create_timm_model(without_weights(config).model, config.data.image_size, len(head.bias))
    except Exception:  # a model of the user's own need not know this device
        return None
    missing = _fill_classifiers(model, backbone.state_dict(), head.weight, head.bias)
    return f"{config.model.backbone} cannot be exported to timm: {_UNFIT}: {some(missing)}" if missing else None


def _fill_classifiers(model: nn.Module, tensors: dict[str, Tensor], weight: Tensor, bias: Tensor) -> list[str]:
    """Add the head's tensors in the place of the model's classifiers: linear layers, or convolutions of one pixel.

    A norm just before them (LeViT, RepViT) is none of the trained backbone's, and is set to change nothing.

    Returns:
        What the model has beside these.
    """
    own = model.state_dict()
    for name in classifier_names(model):
        for key, value in ((f"{name}.weight", weight), (f"{name}.bias", bias)):
            if key in own and own[key].numel() == value.numel():
                tensors[key] = value.reshape(own[key].shape).clone()  # safetensors writes no tensor twice
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d) and f"{name}.weight" not in tensors:
            module.reset_parameters()
            module.running_var.fill_(1 - module.eps)
            tensors |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
    return sorted(own.keys() - tensors.keys())


def _answers(model: nn.Module, tensors: dict[str, Tensor], weight: Tensor, bias: Tensor, image_size: int) -> bool:
    """Whether the model, having loaded the tensors, answers with our head's logits of its embedding."""
    model.load_state_dict(tensors)  # strict: what timm cannot load is never written
    model.eval()
    with torch.inference_mode():
        image = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        embedding = model.forward_head(model.forward_features(image), pre_logits=True)
        expected = nn.functional.linear(embedding, weight, bias)
        return not ((model(image) - expected).abs() > 1e-3 * expected.abs().max()).any()  # a NaN is no difference


def loading_code(path: Path, config: Config, kwargs: dict, model: nn.Module) -> str:
    """Python that rebuilds the model with timm alone, loads the file, and makes the evaluation's transform."""
    arguments = "".join(f", {k}={v!r}" for k, v in kwargs.items())
    lines = ["import json, timm, torch", "from safetensors import safe_open", "from safetensors.torch import load_file"]
    if config.model.module:
        lines.append(f"import {config.model.module}")
    lines += ["", f"model = timm.create_model({config.model.backbone!r}{arguments})"]
    if config.model.small_stem:
        conv_name, pool_name = stem_of(model)
        conv = model.get_submodule(conv_name)
        sizes = f"{conv.in_channels}, {conv.out_channels}, 3, padding=1, bias={conv.bias is not None}"
        lines.append(f"model.set_submodule({conv_name!r}, torch.nn.Conv2d({sizes}))")
        if pool_name is not None:
            lines.append(f"model.set_submodule({pool_name!r}, torch.nn.Identity())")
    lines += [
        f"model.load_state_dict(load_file({str(path)!r}))",
        "model.eval()",
        *transform_code(config.data),
        f'classes = json.loads(safe_open({str(path)!r}, "pt").metadata()["classes"])',
        "# Of a PIL image: classes[model(transform(image.convert('RGB'))[None]).argmax()]",
    ]
    return "\n".join(lines)


def transform_code(data: DataConfig) -> list[str]:
    """Python that makes timm's counterpart of our evaluation: [3, H, W] normalised from a PIL image."""
    size, ratio = data.image_size, data.eval_crop_ratio
    whole = round(size / ratio)  # the shorter side before the crop, which timm rounds down
    crop_pct = ratio if math.floor(size / ratio) == whole else size / (whole + 0.5)
    arguments = f"crop_pct={crop_pct!r}, mean={data.mean!r}, std={data.std!r}"
    remark, interpolation = [], data.resize
    if data.resize == "area":  # which timm has not
        interpolation = "bilinear"
        remark = ["# The run's own evaluation averaged areas (data.resize=area): pixels differ by a few of 255 levels."]
    call = f"timm.data.create_transform((3, {size}, {size}), interpolation={interpolation!r}, {arguments})"
    return [*remark, f"transform = {call}"]
