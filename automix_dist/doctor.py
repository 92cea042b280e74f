"""What this machine has and lacks for a training: one table, each problem with how to mend it.

Nothing here trains, compiles, installs or downloads. Versions are read from the installed packages' metadata; torch is
imported only where there is a GPU to ask it about, or a config to check, so that the doctor also works where half of
the packages are missing.
"""

import ctypes
import importlib.util
import ipaddress
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from automix_dist.config import Config, EngineConfig
from automix_dist.cores import cores_of_rank, usable_cores
from automix_dist.errors import AutomixError
from automix_dist.provenance import PACKAGES, installed_version

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parent.parent
GIB = 2**30
SHM_NEEDED = 1 * GIB  # NCCL and gloo between the ranks of a host, and the loader of a large set
DISK_NEEDED = 10 * GIB  # checkpoints of a large model
FILES_NEEDED = 4096
CORES_NEEDED = 4  # per rank with a GPU, as launch/env.sh has it
MIN_PYTHON = (3, 11)
PIP = f"{sys.executable} -m pip install"  # of this Python: a `pip` on the path may be another's

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    """ok; warn: a training runs, but may be slow or break later; fail: a training cannot run."""
    found: str
    mend: str = ""
    """What to do about it; empty if nothing, or if `found` says it."""


def diagnose(config: Config | None = None) -> list[Check]:
    """Look at this machine and, if a config is given, at its output folder, its data files and all that `train` checks.

    Never raises for what it finds: everything that is missing is a check that warns or fails.
    """
    checks = [_python(), *_packages(), *_gpus(), _compiler(), *_libraries(), _decoder()]
    checks += [_shared_memory(), _open_files(), _host_name(), _cores()]
    checks.append(_disk(Path(config.output) if config else Path.cwd()))
    if config is not None:
        data = [_data_file(f"data.{key}", getattr(config.data, key)) for key in ("train", "val")]
        checks += [*data, _config(config, with_data=all(check.status == "ok" for check in data))]
    return checks


def print_table(checks: list[Check]) -> int:
    """Print a table and one line of verdict; returns the exit code, 1 if a check failed."""
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    colors = {"ok": "32", "warn": "33", "fail": "31"}
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    name_width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        mark = marks[check.status]
        mark = f"\x1b[{colors[check.status]}m{mark}\x1b[0m" if colored else mark
        print(f"{mark}  {check.name:<{name_width}}  {check.found}")
        if check.mend:
            print(f"{'':<{name_width + 6}}  -> {check.mend}")
    print()
    failed = [check.name for check in checks if check.status == "fail"]
    warned = [check.name for check in checks if check.status == "warn"]
    if failed:
        print(f"Not ready to train: {', '.join(failed)}.")
        return 1
    print(f"Ready to train; worth a look: {', '.join(warned)}." if warned else "Ready to train.")
    return 0


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return Check("Python", "fail", found, f"use Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Check("Python", "ok", found)


def _packages() -> list[Check]:
    """The installed versions against the pins of a checkout and the ranges that our package asks for."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Check("packaging", "fail", "not installed, so versions cannot be compared", f"{PIP} packaging")]
    required = {requirement.name.lower(): requirement for requirement in map(Requirement, _requirements())}
    pins = _pins(CHECKOUT / "constraints.txt")
    return [_package(name, pins.get(name), required.get(name)) for name in PACKAGES]


def _package(name: str, pin: str | None, required: "Requirement | None") -> Check:
    from packaging.version import Version

    install = f"{PIP} -e . -c constraints.txt" if pin else f'{PIP} "{name}{required.specifier if required else ""}"'
    version = installed_version(name)
    if version is None:
        if required is not None and required.marker is not None and not required.marker.evaluate():
            return Check(name, "ok", "not needed on this platform")
        return Check(name, "fail", "not installed", install)
    if required is not None and not required.specifier.contains(version, prereleases=True):
        return Check(name, "fail", f"{version}, but {required.specifier} is needed", install)
    # A build's own suffix, as in 2.11.0+cu130, is another build of the pinned version.
    if pin is not None and Version(version).public != Version(pin).public:
        return Check(name, "warn", f"{version}; tested with {pin}", install)
    return Check(name, "ok", version)


def _pins(path: Path) -> dict[str, str]:
    """The exact versions in a constraints file; empty if there is none, as outside a checkout."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = (re.match(r"\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def _requirements() -> list[str]:
    """What our installed package requires; empty if it is not installed."""
    try:
        return metadata.requires("automix-dist") or []
    except metadata.PackageNotFoundError:
        return []


def _gpus() -> list[Check]:
    """NVIDIA's and AMD's GPUs, and whether torch can use them."""
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if listed is None and not Path("/dev/kfd").exists():
        if Path("/dev/nvidia0").exists():
            return [Check("GPU", "fail", "a GPU, but nvidia-smi does not answer", "install or reload NVIDIA's driver")]
        return [Check("GPU", "ok", "none: training runs on the CPU")]
    names = [line.strip() for line in (listed or "an AMD GPU").splitlines() if line.strip()]
    gpus = Check("GPU", "ok", "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))
    return [gpus, *_gpu_health(), _torch_on_gpu(), *_triton_compiler()]


def _gpu_health() -> list[Check]:
    """Memory errors and clocks that heat or power hold down, GPU by GPU, as NVIDIA's driver counts them."""
    listed = None
    for reasons in ("clocks_event_reasons", "clocks_throttle_reasons"):  # the second before driver 535
        fields = f"index,ecc.errors.uncorrected.volatile.total,{reasons}.hw_slowdown,clocks.max.sm"
        listed = listed or _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (listed or "").splitlines()]
    rows = [row for row in rows if len(row) == 4]
    if not rows:
        return []
    broken = [index for index, errors, _, _ in rows if errors.isdigit() and int(errors)]
    held_down = [index for index, _, slowed, _ in rows if slowed == "Active"]
    checks = [Check("GPU memory", "ok", "no uncorrected errors")]
    if broken:
        found, mend = (
            f"uncorrected errors on GPU {', '.join(broken)}",
            "drain the host and have the GPU reset or replaced",
        )
        checks = [Check("GPU memory", "fail", found, mend)]
    clocks = " or ".join(sorted({row[3] for row in rows}))
    if held_down:
        found = f"held down by the hardware on GPU {', '.join(held_down)}"
        return [*checks, Check("GPU clocks", "warn", found, "check cooling and power: nvidia-smi -q -d PERFORMANCE")]
    return [*checks, Check("GPU clocks", "ok", f"up to {clocks} MHz")]


def _torch_on_gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing
        return Check("torch on the GPU", "fail", f"torch cannot be imported: {error}", "install torch again")
    from automix_dist.distributed import why_no_gpu
    from automix_dist.precision import autocast_dtype

    if torch.cuda.is_available():
        found = f"CUDA {torch.version.cuda or torch.version.hip}"
        if autocast_dtype(EngineConfig(), torch.device("cuda")) == torch.float32:
            found += "; no bfloat16, so that runs are in float32 unless they have engine.precision=float16"
        return Check("torch on the GPU", "ok", found)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Check("torch on the GPU", "warn", "CUDA_VISIBLE_DEVICES is empty", "unset CUDA_VISIBLE_DEVICES")
    reason, remedy = why_no_gpu()
    return Check("torch on the GPU", "fail", reason, f"{remedy}, or train with engine.device=cpu")


def _triton_compiler() -> list[Check]:
    """Triton compiles a small C module against Python's headers before its first kernel."""
    if installed_version("triton") is None:
        return []
    command = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    headers = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"  # python3-dev may be another Python's
    lacking = [*([] if command and shutil.which(command) else ["gcc"]), *([] if header.is_file() else [headers])]
    if lacking:
        mend = f"{_apt(' '.join(lacking))}; or train with engine.kernels=reference"
        return [Check("C compiler for Triton", "fail", f"{' and '.join(lacking)} not found", mend)]
    return [Check("C compiler for Triton", "ok", command)]


def _compiler() -> Check:
    """FFCV is built from source when it is installed."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and (path := shutil.which(command)):
            version = (_output(path, "--version") or "").splitlines()
            return Check("C++ compiler", "ok", version[0] if version else path)
    return Check("C++ compiler", "warn" if installed_version("ffcv") else "fail", "none", _apt("g++"))


def _libraries() -> list[Check]:
    """OpenCV and libturbojpeg, as an installed FFCV finds them, wherever they lie; else what building it, and our
    decoder, needs."""
    if installed_version("ffcv") is not None:
        try:
            (package,) = importlib.util.find_spec("ffcv").submodule_search_locations
            (library,) = Path(package).glob("_libffcv*.so")
            ctypes.CDLL(str(library))
        except (AttributeError, ValueError):
            return [Check("FFCV's libraries", "fail", "its package is incomplete", "install it again")]
        except OSError as error:
            return [Check("FFCV's libraries", "fail", str(error), _apt("libopencv-dev libturbojpeg0-dev"))]
        return [Check("FFCV's libraries", "ok", "loaded")]
    tool = shutil.which("pkg-config")
    version = (_output(tool, "--version") or tool).strip() if tool else ""
    checks = [Check("pkg-config", "ok" if tool else "fail", version or "none", "" if tool else _apt("pkg-config"))]
    for name, modules, package in (
        ("OpenCV", ("opencv4", "opencv"), "libopencv-dev"),
        ("libturbojpeg", ("libturbojpeg",), "libturbojpeg0-dev"),
        ("libjpeg", ("libjpeg",), "libjpeg-dev"),
    ):
        versions = [_output(tool, "--modversion", module) for module in modules] if tool else []
        found = next((version.strip() for version in versions if version), None)
        checks.append(
            Check(name, "ok", found) if found else Check(name, "fail", "not found by pkg-config", _apt(package))
        )
    return checks


def _decoder() -> Check:
    from automix_dist import jpeg

    try:
        return Check("JPEG decoder", "ok", Path(jpeg.library()._name).name)
    except jpeg.DecoderError as error:
        return Check("JPEG decoder", "fail", str(error.__cause__), "run launch/install.sh, which compiles it")


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Check("/dev/shm", "warn", "there is none", "mount a tmpfs there: ranks of one host exchange data in it")
    found = f"{_gib(free)} free"
    if free < SHM_NEEDED:
        mend = "start the container with --shm-size=8g (Kubernetes: an emptyDir with medium: Memory)"
        return Check("/dev/shm", "warn", found, mend)
    return Check("/dev/shm", "ok", found)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES_NEEDED:
        mend = f"ulimit -n {FILES_NEEDED}"
        if hard != resource.RLIM_INFINITY and hard < FILES_NEEDED:
            mend += f" needs root to raise the hard limit of {hard} first (/etc/security/limits.conf)"
        return Check("open files", "warn", f"limit {soft}", mend)
    return Check("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"limit {soft}")


def _host_name() -> Check:
    """Launchers give other hosts this host's name as the meeting point; they cannot reach a loopback address."""
    name = socket.gethostname()
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(name, None)})
    except OSError:
        mend = f"add a line with this host's address and {name} to /etc/hosts"
        return Check("host name", "warn", f"{name} resolves to no address", mend)
    found = f"{name} is {', '.join(addresses)}"
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        mend = "one machine: nothing to do; several: give the launcher an address that the others can reach"
        return Check("host name", "ok", f"{found} (loopback)", mend)
    return Check("host name", "ok", found)


def _cores() -> Check:
    """Loader threads share the cores that their rank may use, which can be fewer than the machine has."""
    usable, total = usable_cores(), os.cpu_count() or 1
    mend = "in a Slurm job ask for more with --exclusive or --cpus-per-gpu; else see taskset and the container's cpuset"
    if cores_of_rank() < CORES_NEEDED and "GPU" in (_output("nvidia-smi", "-L") or ""):
        found = f"{cores_of_rank()} for each rank ({usable} of {total} usable here), fewer than {CORES_NEEDED}"
        return Check("CPU cores", "warn", f"{found}: GPUs will wait for data", mend)
    if usable < total:
        return Check("CPU cores", "ok" if usable > 1 else "warn", f"{usable} of {total} usable here", mend)
    return Check("CPU cores", "ok", str(total))


def _disk(folder: Path) -> Check:
    """Space for the run, at the nearest folder above it that exists already."""
    existing = folder.absolute()
    while not os.path.exists(existing) and existing != existing.parent:  # False too where a folder may not be entered
        existing = existing.parent
    name = f"disk at {folder}"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{existing} cannot be written", "choose another folder with output=...")
    total, _, free = shutil.disk_usage(existing)
    if not total:
        return Check(name, "fail", f"{existing} is on a file system of size 0", "choose another folder with output=...")
    if free < DISK_NEEDED:
        return Check(name, "warn", f"{_gib(free)} free", "make room, or choose another folder with output=...")
    return Check(name, "ok", f"{_gib(free)} free")


def _data_file(key: str, path: str) -> Check:
    if not path:
        return Check(key, "fail", "not set", f"set {key} to a .beton file written by `automix prepare`")
    try:
        from automix_dist import beton

        manifest = beton.check(Path(path))
    except ImportError as error:
        return Check(key, "fail", f"{path} cannot be checked: {error}", "install the missing package")
    except OSError as error:
        return Check(key, "fail", str(error), "make it readable for this user")
    except AutomixError as error:
        return Check(key, "fail", str(error))
    numbers = f"{manifest.count:,} images, {len(manifest.classes):,} classes, checksum {manifest.checksum[:8]}"
    return Check(key, "ok", f"{path}: {numbers}")


def _config(config: Config, with_data: bool) -> Check:
    """What `train` checks before it begins, the model too; without whole data files, whose rows tell, all the rest."""
    try:
        from automix_dist.backbone import foreign_normalisation, pretrained_not_loaded
        from automix_dist.model import describe_model
        from automix_dist.policy import with_policy_settings
        from automix_dist.run_check import check_run, check_without_data

        config = with_policy_settings(config)
        with pretrained_not_loaded():
            model = check_run(config).model if with_data else check_without_data(config)
        note = foreign_normalisation(model.query.backbone.model, config.model, config.data)
        return Check("config", "warn" if note else "ok", describe_model(config, model), note or "")
    except AutomixError as error:
        return Check("config", "fail", str(error))
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing
        return Check("config", "fail", f"cannot be checked: {error}", "install the missing package")
    except Exception as error:  # a defect of ours must not cost the other rows
        found = f"cannot be checked: {type(error).__name__}: {error}"
        return Check("config", "fail", found, "unexpected; please report it with what `automix train` prints")


def _apt(package: str) -> str:
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install -y {package}"


def _output(command: str, *arguments: str) -> str | None:
    """What a command prints, None if there is no such command or it fails."""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
