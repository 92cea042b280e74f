"""AutoMix-Dist: train image classifiers with AutoMix (arXiv 2103.13027), from one machine to many nodes."""

__version__ = "0.1.0"
