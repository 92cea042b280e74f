"""AutoMix-Dist: train image classifiers with AutoMix (arXiv 2103.13027), from one machine to many nodes."""
