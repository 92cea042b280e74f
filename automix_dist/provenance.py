"""What a run was made with: versions, source revision, machine. Stored with the run and in every checkpoint."""

import functools
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from automix_dist import __version__

PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "accelerate", "ffcv", "timm", "numpy")


def installed_version(package: str) -> str | None:
    """A package's version, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions of what shapes a run's numbers, the revision of a git checkout ("+" = with changes), the hardware."""
    import torch  # here, for versions are also asked for where torch may not load

    versions = {"automix-dist": __version__} | {package: installed_version(package) for package in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "platform": platform.platform(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "command": sys.argv,
    }


@functools.cache  # what this process has imported, however often it asks
def commit() -> str | None:
    """The revision of the checkout that this file lies in, "+" = with changes; None where it is installed otherwise."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
