"""The type that forward passes compute in (engine.precision), and the loss scale that float16 needs.

float16 knows nothing below 6e-8: gradients of activations would vanish. They are computed times a power of two (arXiv
1710.03740, section 3.2), which the optimizer divides by in float32. It halves when something overflows, in a step that
is skipped, and doubles after many steps in which nothing did. It lives on the device, and nobody waits for it.
"""

import torch
from torch import Tensor

from automix_dist.config import Config, EngineConfig

INITIAL, BACKOFF, GROWTH, GROWTH_INTERVAL = 2.0**16, 0.5, 2.0, 2000
"""As torch.amp.GradScaler has them."""


def autocast_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """What engine.precision means on a device: "auto" leaves bfloat16 to GPUs that do not have to emulate it."""
    if engine.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, engine.precision)


def autocast_name(config: Config, device: torch.device) -> str:
    return str(autocast_dtype(config.engine, device)).removeprefix("torch.")


def surrounding_autocast(device: torch.device, otherwise: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype of the torch.autocast around a call, or another if there is none."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


def scaled(number: Tensor, scale: Tensor | None) -> Tensor:
    """A loss to differentiate, or another number: times the scale, if there is one."""
    return number if scale is None else number * scale


class LossScale:
    """The scale of one run, on the device: `value`, by which losses are multiplied and gradients divided."""

    def __init__(self, device: torch.device):
        self.value = torch.full((), INITIAL, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        """Since the value last changed."""

    def update(self, skipped: Tensor) -> None:
        """After a step, whose `skipped` is a float32 scalar on the device: 1 if it was skipped, else 0."""
        torch._amp_update_scale_(self.value, self._good_steps, skipped, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def state(self) -> dict[str, float]:
        """Plain numbers, for a checkpoint."""
        return {"loss_scale": float(self.value), "loss_scale_good_steps": float(self._good_steps)}

    def load(self, state: dict[str, float]) -> None:
        """What `state` gave; without it, as that of a run in another precision, the scale stays as it is."""
        if "loss_scale" in state:
            self.value.fill_(state["loss_scale"])
            self._good_steps.fill_(int(state["loss_scale_good_steps"]))
