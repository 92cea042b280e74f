"""Manifold Mixup (arXiv 1806.05236): mixup of the images, or of the output of an early part of the network."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from automix_dist import policy
from automix_dist.config import ConfigError
from automix_dist.policy import BetaSettings, Draw


@dataclass(frozen=True)
class Settings(BetaSettings):
    alpha: float = 2.0
    layers: tuple[str, ...] = ("", "layer1", "layer2")
    """Modules of the timm model whose outputs are mixed, "" for the images; one is drawn per micro batch. The default,
    the paper's, fits ResNets; a ConvNeXt has stages.0 and stages.1."""

    def __post_init__(self):
        super().__post_init__()
        policy.require(len(self.layers) > 0, "layers", self.layers, "at least one module, or '' for the images")


class Policy(policy.Policy):
    def check(self, backbone: nn.Module) -> None:
        modules = dict(_model(backbone).named_modules())
        for name in self.settings.layers:
            if name not in modules:
                children = ", ".join(child for child, _ in _model(backbone).named_children())
                raise ConfigError(f"policy.settings.layers: the backbone has no module {name!r}; it has {children}")

    def changed_layers(self, backbone: nn.Module) -> dict[str, nn.Module]:
        return {name: _model(backbone).get_submodule(name) for name in self.settings.layers if name}

    def draw_extra(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> dict[str, Any]:
        return {"layer": self.settings.layers[rng.integers(len(self.settings.layers))]}

    def mix(self, images: Tensor, draw: Draw) -> None:
        return None

    def forward(self, encoder: nn.Module, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        def mixed(hidden: Tensor) -> Tensor:
            lam = draw.lam.to(hidden.dtype).view(-1, *[1] * (hidden.ndim - 1))
            return lam * hidden + (1 - lam) * hidden[draw.partner]

        layer = draw.extra["layer"]
        if not layer:
            return encoder(mixed(images), "one"), draw.lam
        hook = _model(encoder.backbone).get_submodule(layer).register_forward_hook(lambda _, __, out: mixed(out))
        try:
            # Not through a call that engine.compile has replaced: it knows the hooks of its first time only.
            return encoder.forward(images, "one"), draw.lam
        finally:
            hook.remove()


def _model(backbone: nn.Module) -> nn.Module:
    return getattr(backbone, "model", backbone)
