"""One of several hand-crafted policies, drawn for each micro batch of all ranks: the recipes of DeiT and of RSB."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from automix_dist import policy
from automix_dist.config import ConfigError, PolicyConfig
from automix_dist.config_file import build_section
from automix_dist.policy import Draw, Mix, load, require


@dataclass(frozen=True)
class Settings:
    policies: tuple[dict[str, Any], ...] = ({"name": "mixup"}, {"name": "cutmix"})
    """Which: {name: ..., settings: {...}} each; none of them a switch."""
    shares: tuple[float, ...] = ()
    """How often each is drawn, relative to the others; empty = all alike."""

    def __post_init__(self):
        require(len(self.policies) > 0, "policies", self.policies, "at least one")
        fits = len(self.shares) in (0, len(self.policies)) and all(share > 0 for share in self.shares)
        require(fits, "shares", self.shares, "a positive number for each policy, or none")


class Policy(policy.Policy):
    def __init__(self, settings: Settings, *normalisation: tuple[float, ...]):
        super().__init__(settings, *normalisation)
        shares = np.array(settings.shares or [1.0] * len(settings.policies))
        self.shares = shares / shares.sum()
        self.policies = nn.ModuleList()
        for each in settings.policies:
            inner = build_section(PolicyConfig, each, "policy.settings.policies")
            if inner.name == "switch":  # both would mark their draws under the same name
                raise ConfigError(
                    "policy.settings.policies: a switch inside a switch: list its policies here, with "
                    "policy.settings.shares"
                )
            module, own = load(inner)
            if not hasattr(module, "Policy"):
                raise ConfigError(f"policy.settings.policies: {inner.name} is not a hand-crafted policy")
            self.policies.append(module.Policy(own, *normalisation))

    def check(self, backbone: nn.Module) -> None:
        for each in self.policies:
            each.check(backbone)

    def changed_layers(self, backbone: nn.Module) -> dict[str, nn.Module]:
        return {name: layer for each in self.policies for name, layer in each.changed_layers(backbone).items()}

    def draw(self, rng: np.random.Generator, shared: np.random.Generator, images: Tensor) -> Draw:
        chosen = int(shared.choice(len(self.policies), p=self.shares))
        return self._mark(chosen, self.policies[chosen].draw(rng, shared, images))

    def finish_draw(self, rng: np.random.Generator, lam: np.ndarray, partner: np.ndarray, images: Tensor) -> Draw:
        return self._mark(0, self.policies[0].finish_draw(rng, lam, partner, images))

    def prepare(self, encoder: nn.Module, images: Tensor, labels: Tensor | None, draw: Draw) -> Draw:
        return self.policies[draw.extra["policy"]].prepare(encoder, images, labels, draw)

    def mix(self, images: Tensor, draw: Draw) -> Mix | None:
        return self.policies[draw.extra["policy"]].mix(images, draw)

    def forward(self, encoder: nn.Module, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.policies[draw.extra["policy"]](encoder, images, draw)

    def _mark(self, chosen: int, draw: Draw) -> Draw:
        return draw._replace(extra=draw.extra | {"policy": chosen})
