"""What `automix doctor` says of this machine, and of machines that lack something."""

import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from automix_dist import doctor
from automix_dist.cli import main
from automix_dist.config import Config, DataConfig
from automix_dist.config_file import load_config
from automix_dist.doctor import Check, diagnose, print_table


def found(name: str, config: Config | None = None) -> Check:
    return next(check for check in diagnose(config) if check.name == name)


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def bare_path(tmp_path, monkeypatch) -> Path:
    """A machine whose PATH holds only the programs that a test puts into this folder, and /bin/sh for them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed."""

    def hide(*names: str) -> None:
        real = metadata.version

        def version(name: str) -> str:
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    return hide


def test_this_machine_can_train():
    checks = diagnose()
    missing = [check.name for check in checks if check.found == "not installed"]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    assert [check for check in checks if check.status == "fail"] == []
    names = [check.name for check in checks]
    assert names[: 1 + len(doctor.PACKAGES)] == ["Python", *doctor.PACKAGES]
    assert len(names) == len(set(names))
    assert all(check.mend for check in checks if check.status == "warn")
    assert found("torch").found.partition(";")[0] == metadata.version("torch")


def test_nothing_heavy_is_imported():
    script = "import sys; from automix_dist.doctor import diagnose; diagnose(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    if shutil.which("nvidia-smi") is None:
        assert not {"torch", "deepspeed", "ffcv", "timm", "triton"} & set(done.stdout.split())


def test_missing_packages_are_named(without):
    without(*doctor.PACKAGES, "automix-dist")
    for name in doctor.PACKAGES:
        check = found(name)
        assert (check.status, check.found) == ("fail", "not installed")
        assert check.mend.startswith(f"{sys.executable} -m pip install ")


def test_without_packaging_versions_are_not_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert found("packaging").status == "fail"


@pytest.mark.parametrize(
    "installed, status, part",
    [
        ("2.15.0", "ok", "2.15.0"),
        ("2.15.0+cu130", "ok", "2.15.0+cu130"),
        ("2.14.1", "warn", "2.14.1; tested with 2.15.0"),
        ("2.5.0", "fail", "2.5.0, but <3,>=2.11 is needed"),
    ],
)
def test_versions_against_pins_and_ranges(tmp_path, monkeypatch, installed, status, part):
    (tmp_path / "constraints.txt").write_text("# pins\nnumpy==2.4.6\ntorch==2.15.0  # with CUDA\ntimm>=1\n")
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch<3,>=2.11", 'ruff>=0.12; extra == "dev"'])
    check = found("torch")
    assert (check.status, check.found) == (status, part)
    assert bool(check.mend) == (status != "ok")


def test_a_package_of_another_platform_is_not_missed(monkeypatch, without):
    without("triton")
    monkeypatch.setattr(metadata, "requires", lambda name: ['triton>=3; platform_system == "Plan9"'])
    assert found("triton") == Check("triton", "ok", "not needed on this platform")


def test_what_building_ffcv_needs(bare_path, without):
    without("ffcv")
    for name, package in (
        ("C++ compiler", "g++"),
        ("pkg-config", "pkg-config"),
        ("OpenCV", "libopencv-dev"),
        ("libturbojpeg", "libturbojpeg0-dev"),
        ("libjpeg", "libjpeg-dev"),
    ):
        check = found(name)
        assert check.status == "fail"
        assert check.mend.endswith(f"apt-get install -y {package}")


def test_libraries_that_pkg_config_knows(bare_path, without):
    without("ffcv")
    program(
        bare_path, "pkg-config", '[ "$2" = libturbojpeg ] && echo 3.0.1 && exit 0; [ "$1" = --version ] && echo 2.1'
    )
    assert found("pkg-config").found == "2.1"
    assert found("libturbojpeg") == Check("libturbojpeg", "ok", "3.0.1")
    assert found("OpenCV").status == "fail"


def test_an_installed_ffcv_is_asked_for_its_libraries(bare_path, tmp_path, monkeypatch):
    """A bundle or a conda environment has them where no pkg-config looks."""
    assert found("FFCV's libraries") == Check("FFCV's libraries", "ok", "loaded")
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert found("FFCV's libraries").found == "its package is incomplete"
    (tmp_path / "_libffcv.so").write_bytes(b"nonsense")
    check = found("FFCV's libraries")
    assert check.status == "fail" and "_libffcv.so" in check.found and "libopencv-dev" in check.mend


def test_a_decoder_that_was_not_compiled(monkeypatch):
    import ctypes

    load = ctypes.CDLL
    assert found("JPEG decoder").status == "ok"
    monkeypatch.delitem(sys.modules, "automix_dist.jpeg")
    monkeypatch.delattr("automix_dist.jpeg")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: load(f"{path}.missing"))
    check = found("JPEG decoder")
    assert check.status == "fail" and "cannot open" in check.found and "install.sh" in check.mend


def test_a_gpu_that_torch_cannot_use(bare_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's torch can use a GPU")
    program(bare_path, "nvidia-smi", "echo 'NVIDIA H200, 143771 MiB, 580.1'; echo 'NVIDIA H200, 143771 MiB, 580.1'")
    assert found("GPU").found == "2 x NVIDIA H200, 143771 MiB, 580.1"
    check = found("torch on the GPU")
    assert check.status == "fail" and "engine.device=cpu" in check.mend


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_gpu_without_bfloat16(has_bfloat16, bare_path, monkeypatch):
    import torch

    program(bare_path, "nvidia-smi", "echo 'Tesla T4, 15360 MiB, 580.1'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    check = found("torch on the GPU")
    assert check.status == "ok" and ("engine.precision=float16" in check.found) != has_bfloat16


def test_gpus_with_memory_errors_or_held_down_clocks(bare_path):
    rows = "0, 0, Not Active, 1980\\n1, 3, Active, 1980\\n2, [N/A], [N/A], 1755"
    program(
        bare_path, "nvidia-smi", f"case $1 in *event*) exit 2;; *ecc*) printf '{rows}';; *) echo 'H200, 1, 2';; esac"
    )
    assert found("GPU memory").status == "fail" and "on GPU 1" in found("GPU memory").found
    assert found("GPU clocks").status == "warn" and "on GPU 1" in found("GPU clocks").found
    program(bare_path, "nvidia-smi", "case $1 in *ecc*) printf '0, 0, Not Active, 1980';; *) echo 'H200, 1, 2';; esac")
    assert (found("GPU memory").status, found("GPU clocks").found) == ("ok", "up to 1980 MHz")


def test_a_driver_that_does_not_answer(bare_path, monkeypatch):
    program(bare_path, "nvidia-smi", "exit 9")
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    assert found("GPU").status == "fail"


def test_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        check = found("open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (check.status, check.found) == ("warn", "limit 256")
    assert check.mend.startswith("ulimit -n")


def test_fewer_cores_than_the_machine_has():
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("needs two cores")
    os.sched_setaffinity(0, {min(usable)})
    try:
        check = found("CPU cores")
    finally:
        os.sched_setaffinity(0, usable)
    assert check.status == "warn" and check.found == f"1 of {os.cpu_count()} usable here"


def test_few_cores_for_the_ranks_of_a_host_with_gpus(bare_path, monkeypatch):
    usable = os.sched_getaffinity(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(usable)))
    assert "for each rank" not in found("CPU cores").found
    program(bare_path, "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'")
    check = found("CPU cores")
    assert check.status == "warn" and check.found.startswith("1 for each rank ")
    assert "--cpus-per-gpu" in check.mend


def test_small_shared_memory_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHM_NEEDED", 2**60)
    monkeypatch.setattr(doctor, "DISK_NEEDED", 2**60)
    assert "--shm-size" in found("/dev/shm").mend
    folder = tmp_path / "not" / "there"
    assert found(f"disk at {folder}", Config(output=str(folder))).status == "warn"
    assert not folder.parent.exists()


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        assert found(f"disk at {folder}", Config(output=str(folder))).status == "fail"


def test_an_output_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    closed, stat = tmp_path / "closed", os.stat
    closed.mkdir()

    def denied(path, **keywords):
        if closed in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **keywords)

    monkeypatch.setattr(os, "stat", denied)
    monkeypatch.setattr(os, "access", lambda path, _: path != closed)
    check = doctor._disk(closed / "run")
    assert (check.status, check.found) == ("fail", f"{closed} cannot be written")


def test_host_names(monkeypatch):
    def addresses(*found: str):
        return lambda *_: [(0, 0, 0, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.1.1", "::1"))
    assert "several" in found("host name").mend
    monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.1.1", "10.0.0.7"))
    assert found("host name") == Check("host name", "ok", "node7 is 10.0.0.7, 127.0.1.1")

    def nothing(*_):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    assert found("host name").status == "warn"


def test_data_files(tmp_path):
    torn = tmp_path / "torn.beton"
    torn.write_bytes(b"not much")
    config = Config(data=DataConfig(train=str(tmp_path / "none.beton"), val=str(torn)))
    for key in ("data.train", "data.val"):
        check = found(key, config)
        assert check.status == "fail" and str(tmp_path) in check.found
    assert found("data.train", config).found.endswith("; write it with automix prepare")
    assert found("data.val", Config()).found == "not set"


def test_a_good_data_file(tmp_path):
    prepare = pytest.importorskip("automix_dist.prepare")
    checksum = prepare.prepare("synthetic:20x8@5", tmp_path / "set.beton", workers=1, progress=False).checksum
    check = found("data.train", Config(data=DataConfig(train=str(tmp_path / "set.beton"))))
    assert (check.status, check.found) == ("ok", f"{tmp_path}/set.beton: 20 images, 5 classes, checksum {checksum[:8]}")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two files that belong together, and one with other classes."""
    prepare = pytest.importorskip("automix_dist.prepare").prepare
    folder = tmp_path_factory.mktemp("sets")
    for name, source in (("train", "64x32@4"), ("val", "32x32@4"), ("other", "32x32@5")):
        prepare(f"synthetic:{source}", folder / f"{name}.beton", workers=1, progress=False)
    return folder


@pytest.fixture
def recipe(sets, tmp_path, monkeypatch) -> Path:
    """A config that `automix train` takes."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    values = {"output": str(tmp_path / "run"), "batch_size": 32, "engine": {"name": "ddp", "device": "cpu"}}
    values["data"] = {"train": str(sets / "train.beton"), "val": str(sets / "val.beton"), "image_size": 32}
    values["model"] = {"backbone": "resnet18", "small_stem": True}
    values["log"] = {"tensorboard": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_config_that_can_be_trained(recipe):
    check = found("config", load_config(recipe))
    assert check.status == "ok" and not check.mend
    assert check.found.startswith(
        "resnet18, 11,168,832 parameters, at first random: the Mix Block reads layer3 (automix.feature 3 of "
    )
    check = found("config", load_config(recipe, ["policy.name=mixup"]))
    assert (check.status, check.found) == ("ok", "resnet18, 11,168,832 parameters, at first random")


@pytest.mark.parametrize(
    ("mistake", "part"),
    [
        ("model.backbone=resnet99", "model.backbone = 'resnet99' is not a timm model"),
        ("automix.feature=77", "automix.feature = 77: resnet18 has 5 feature maps, 0 to 4"),
        ("batch_size=5000", "batch_size = 5000: expected at most 64, the number of images in "),
        ("model.weights=nosuch.pth", "model.weights = 'nosuch.pth' cannot be read"),
        ("data.train={sets}/other.beton", "--classes {sets}/other.beton"),
        ("data.val={sets}/train.beton", "holds the images of data.train"),
        ("policy.settings.alfa=1", "alfa"),
        ("engine.accumulation_steps=3", "accumulation_steps"),
    ],
)
def test_what_train_refuses_is_one_row(recipe, sets, mistake, part, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(recipe), mistake.format(sets=sets)])
    table = capsys.readouterr()
    assert caught.value.code == 1 and "Traceback" not in table.out + table.err
    row = table.out.partition("FAIL  config ")[2]
    assert part.format(sets=sets) in row and "Not ready to train: " in row
    assert "ok    data.train " in table.out and "ok    data.val " in table.out


def test_a_config_is_checked_without_its_data_and_its_packages_too(recipe, without, monkeypatch):
    """The data's own rows tell of it, once."""
    gone = load_config(recipe, ["data.val=none.beton"])
    assert (found("data.val", gone).status, found("config", gone).status) == ("fail", "ok")
    assert found("config", load_config(recipe, ["data.val=none.beton", "automix.feature=77"])).status == "fail"
    without("deepspeed")
    check = found("config", load_config(recipe, ["engine.name=deepspeed"]))
    assert check.status == "fail" and "; bash launch/install.sh" in check.found
    monkeypatch.setitem(sys.modules, "automix_dist.run_check", None)
    check = found("config", load_config(recipe))
    assert check.status == "fail" and "run_check" in check.found and "install" in check.mend


def test_a_defect_costs_no_row(recipe, monkeypatch):
    from automix_dist import run_check

    monkeypatch.setattr(run_check, "check_run", lambda config: 1 / 0)
    check = found("config", load_config(recipe))
    assert check.status == "fail" and "ZeroDivisionError" in check.found and "report" in check.mend


@pytest.mark.parametrize("reachable", [True, False])
def test_pretrained_weights_are_asked_for_and_not_loaded(recipe, reachable, monkeypatch):
    import timm

    from automix_dist import backbone

    asked, build = [], timm.create_model

    class Hub:
        def model_info(self, repository: str, timeout: float) -> None:
            asked.append(repository)
            if not reachable:
                raise ConnectionError("nobody is there")

    def create(name: str, *, pretrained: bool, **kwargs):
        assert not pretrained
        return build(name, **kwargs)

    monkeypatch.setattr(backbone, "HfApi", Hub)
    monkeypatch.setattr(backbone, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", create)
    teacher = ["policy.name=attentivemix", "policy.settings.teacher=resnet10t"]
    for overrides in (["model.pretrained=true"], teacher):
        check = found("config", load_config(recipe, overrides))
        assert check.status == ("ok" if reachable else "fail")
        assert reachable or "could not be downloaded (ConnectionError)" in check.found
    assert asked == ["timm/resnet18.a1_in1k", "timm/resnet10t.c3_in1k"]
    check = found("config", load_config(recipe, ["model.pretrained=true", "model.backbone=resnet200"]))
    assert check.status == "fail" and "no pretrained weights exist" in check.found


def test_table(capsys):
    checks = [Check("Python", "ok", "3.11.7"), Check("open files", "warn", "limit 256", "ulimit -n 4096")]
    assert print_table(checks) == 0
    assert capsys.readouterr().out == (
        "ok    Python      3.11.7\n"
        "warn  open files  limit 256\n"
        "                  -> ulimit -n 4096\n"
        "\n"
        "Ready to train; worth a look: open files.\n"
    )
    assert print_table([*checks, Check("torch", "fail", "not installed", "pip install torch")]) == 1
    assert capsys.readouterr().out.endswith("\n\nNot ready to train: torch.\n")
    assert print_table(checks[:1]) == 0
    assert capsys.readouterr().out.endswith("\n\nReady to train.\n")
