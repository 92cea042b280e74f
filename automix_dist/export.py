"""A trained encoder as a safetensors file that plain timm loads."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from torch import nn

from automix_dist.backbone import STEMS, create_timm_model, layer_kwargs
from automix_dist.checkpoint import CheckpointError, Saved, export_tensors, load_module_state
from automix_dist.config import from_dict


def export_encoder(saved: Saved, out: Path, encoder: Literal["query", "momentum"], head: Literal["one", "mix"]) -> str:
    """Write one encoder with one of its heads as a timm state dict.

    BatchNorm statistics are the mean over the ranks of the run. The file's metadata tell timm's model name, its
    keyword arguments, the class names and the normalisation.

    Returns:
        Python that loads the file.

    Raises:
        CheckpointError: if there is no such encoder or head, the model's own classifier is not one linear layer, or the
            file cannot be written.
    """
    config = from_dict(saved.manifest["config"])
    state = load_module_state(saved, f"{encoder}.")
    if f"head_{head}.weight" not in state:
        raise CheckpointError(
            f"{saved.folder}: the model of policy {config.policy.name} has no {encoder} encoder with head_{head}; "
            f"use --encoder query --head one"
        )
    num_classes = state[f"head_{head}.weight"].shape[0]
    model_config = dataclasses.replace(config.model, pretrained=False, weights="")
    model = create_timm_model(model_config, config.data.image_size, num_classes)
    classifier = model.pretrained_cfg.get("classifier")
    if not isinstance(classifier, str) or not isinstance(model.get_submodule(classifier), nn.Linear):
        raise CheckpointError(
            f"{config.model.backbone}: its classifier {classifier!r} is not one linear layer to export to"
        )

    prefix = "backbone.model."
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    tensors |= {f"{classifier}.{k}": state[f"head_{head}.{k}"] for k in ("weight", "bias")}
    model.load_state_dict(tensors)  # strict: what timm cannot load is never written

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
        "classes": json.dumps(saved.manifest.get("classes")),
        "commit": str(saved.manifest["environment"]["commit"]),
    }
    export_tensors({k: v.contiguous() for k, v in tensors.items()}, out, metadata)
    return loading_code(out, config.model.backbone, kwargs, model)


def loading_code(path: Path, architecture: str, kwargs: dict, model: nn.Module) -> str:
    """Python that rebuilds the model with timm alone and loads the file."""
    arguments = "".join(f", {k}={v!r}" for k, v in kwargs.items())
    lines = ["import timm, torch", "from safetensors.torch import load_file", ""]
    lines.append(f"model = timm.create_model({architecture!r}{arguments})")
    modules = dict(model.named_modules())
    for conv_name, pool_name in STEMS:
        if isinstance(modules.get(pool_name), nn.Identity):
            conv = modules[conv_name]
            small = f"torch.nn.Conv2d({conv.in_channels}, {conv.out_channels}, 3, padding=1, bias=False)"
            lines += [f"model.{conv_name} = {small}", f"model.{pool_name} = torch.nn.Identity()"]
    lines.append(f"model.load_state_dict(load_file({str(path)!r}))")
    return "\n".join(lines)
