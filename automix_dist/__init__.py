"""AutoMix-Dist: train image classifiers with AutoMix (arXiv 2103.13027), from one machine to many nodes."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

__version__ = "0.1.0"

if importlib.util.find_spec("automix_kernels") is None:  # a checkout that is not installed: setup.py gives this name
    _spec = ModuleSpec("automix_kernels", None, is_package=True)
    _spec.submodule_search_locations.append(str(Path(__file__).parent.parent / "kernels"))
    sys.modules["automix_kernels"] = importlib.util.module_from_spec(_spec)
