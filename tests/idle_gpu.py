"""Builds idle_gpu.cpp, a GPU that computes nothing, and says what a process needs in its environment to have it.

python tests/idle_gpu.py COMMAND [ARGUMENT ...] runs a command with it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("idle_gpu.cpp")
PACKAGES = Path(sysconfig.get_path("purelib"))
HEADERS = {"cupti.h": PACKAGES / "nvidia/cu13/include", "crt": PACKAGES / "triton/backends/nvidia/include"}
"""By what has to be there: torch's CUDA has the headers but for a folder, which Triton has."""
NAMES = ("libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1")


def missing() -> str | None:
    """Why it cannot be built here; None if it can."""
    if shutil.which("g++") is None:
        return "not installed: g++"
    absent = [str(folder / name) for name, folder in HEADERS.items() if not (folder / name).exists()]
    return f"not there: {', '.join(absent)}" if absent else None


def build(folder: Path, caches: Path) -> dict[str, str]:
    """The environment of a process that is to have the GPU; compilers keep what they have compiled in `caches`."""
    (folder / "include").mkdir()
    (folder / "include" / "crt").symlink_to(HEADERS["crt"] / "crt")
    library = folder / "idle_gpu.so"
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    command += [f"-I{folder / 'include'}", f"-I{HEADERS['cupti.h']}", str(SOURCE), "-o", str(library), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for name in NAMES:
        (folder / name).symlink_to(library)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": paths,
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more processes take longer to start than what there is to compile
    }


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, **build(Path(folder), Path(folder))}).returncode)
