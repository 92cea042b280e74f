"""Packaging of AutoMix-Dist: `automix_dist` and the kernels, which are imported as `automix_kernels`.

The folder `kernels/` has no `__init__.py` and another import name, because a top-level package called `kernels` exists
on the package index and would be hidden by ours in every process that starts in a checkout.
Exact versions that are known to work together stand in constraints.txt.
"""

import re
from pathlib import Path

from setuptools import Extension, setup

INIT = Path("automix_dist/__init__.py").read_text(encoding="utf-8")

setup(
    name="automix-dist",
    version=re.search(r'__version__ = "(.+)"', INIT)[1],
    description="Train stronger image classifiers with AutoMix, from one machine to many nodes",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["automix_dist", "automix_dist.bench", "automix_dist.policies", "automix_kernels"],
    package_data={
        "automix_dist": ["imagenet_wnids.txt", "page.css", "report.html", "report.js", "py.typed"],
        "automix_kernels": ["py.typed"],
    },
    package_dir={"automix_dist": "automix_dist", "automix_kernels": "kernels"},
    # It calls nothing of Python's: one file for every version.
    ext_modules=[Extension("automix_dist._jpeg", ["automix_dist/jpeg.c"], libraries=["jpeg"], py_limited_api=True)],
    install_requires=[
        "torch>=2.11,<3",
        "torchvision>=0.26,<1",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "deepspeed>=0.19.8,<0.20",
        "accelerate>=1.15,<2",
        "ffcv>=1.0.2,<2",
        "huggingface-hub>=0.30",
        "timm>=1.0.31,<2",
        "numba>=0.60",
        "numpy>=2.0,<3",
        "packaging>=24",
        "pillow>=11",
        "psutil>=6",
        "pyyaml>=6",
        "safetensors>=0.8",  # those before hold the interpreter while they write
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "setuptools>=77",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "build>=1.2",
            "hypothesis>=6",
            "mlflow-skinny>=3.7,<4",
            "pyarrow>=18",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "torchmetrics>=1.6",
            "wandb>=0.22",
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings-python>=2"],
        "parquet": ["pyarrow>=18"],
    },
    entry_points={"console_scripts": ["automix = automix_dist.cli:main"]},
)
