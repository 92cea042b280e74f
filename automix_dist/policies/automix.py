"""AutoMix (arXiv 2103.13027): the model is automix_dist/automix.py, its settings are the section `automix`."""

from dataclasses import dataclass

from automix_dist.automix import AutoMix as Model

__all__ = ["Model", "Settings"]


@dataclass(frozen=True)
class Settings:
    """None of its own."""
