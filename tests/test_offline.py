"""A node without network: the bundle is made here and installed and used where there is no network at all."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUNDLE, INSTALL = ROOT / "launch" / "offline_bundle.sh", ROOT / "launch" / "offline_install.sh"


def bash(*command, code: int = 0, **options) -> subprocess.CompletedProcess:
    result = subprocess.run(["bash", *map(str, command)], capture_output=True, text=True, timeout=400, **options)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def offline(*command) -> subprocess.CompletedProcess:
    """Run in a network namespace of its own, which has no way out, as an ordinary user."""
    line = 'ip link set lo up 2>/dev/null || true; exec "$@"'
    return bash("-c", f'exec unshare --map-root-user --net bash -c {line!r} - "$@"', "-", *command, cwd=ROOT.parent)


def node(folder: Path) -> Path:
    """A virtual environment that has what this one has, but searched last: what a bundle brings comes first."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "zz_node.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return site


def test_a_node_without_torch_gets_all_its_libraries():
    """torch 2.15 asks for them as extras of another package; all that are here are here because torch needs them."""
    listed = {line.split("==")[0] for line in bash(BUNDLE, "--list").stdout.splitlines()}
    libraries = {d.name.lower().replace("_", "-") for d in metadata.distributions() if d.name.startswith("nvidia")}
    assert {"torch", "timm", "ffcv"} <= listed and libraries <= listed


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode != 0,
    reason="unshare may not make a network namespace here",
)
def test_bundle_and_installation(tmp_path):
    """Only what is compiled is bundled here, and one package from the index; the rest counts as there already."""
    brought = {"ffcv", "automix-dist", "fastargs"}
    have = {d.name: d.version for d in metadata.distributions() if d.name.lower().replace("_", "-") not in brought}
    freeze = "".join(f"{name}=={version}\n" for name, version in have.items() if name != "packaging")
    (tmp_path / "have.txt").write_text(freeze + "packaging @ file:///build/packaging\n")
    index = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path / "probe", "fastargs"],
        capture_output=True,
    )
    if index.returncode:
        pytest.skip("no package index can be reached from here")
    bundle = tmp_path / "a b.tar.xz"
    bash(BUNDLE, "--have", tmp_path / "have.txt", bundle)
    assert bundle.stat().st_size < 20e6
    with tarfile.open(bundle) as packed:
        names = [Path(name).name for name in packed.getnames() if name.endswith(".whl")]
    assert {name.partition("-")[0] for name in names} == {"ffcv", "automix_dist", "fastargs", "pip"}
    assert {name.split("-", 2)[2] for name in names if name[0] in "fa"} == {
        "cp311-abi3-linux_x86_64.whl", "py3-none-any.whl"}  # fmt: skip

    with tarfile.open(bundle) as packed:
        wheels = [io.BytesIO(packed.extractfile(name).read()) for name in packed.getnames() if name.endswith(".whl")]
    compiled = [name for wheel in wheels for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert sorted(compiled) == ["automix_dist/_jpeg.abi3.so", "ffcv/_libffcv.abi3.so"], "for any Python"

    venv = tmp_path / "a node"
    site = node(venv)
    offline("bash", INSTALL, bundle, venv)
    (tmp_path / "config.yaml").write_text(
        f"output: {tmp_path}/run\nepochs: 1\nbatch_size: 8\n"
        f"data: {{train: {tmp_path}/train.beton, val: {tmp_path}/val.beton, image_size: 64}}\n"
        "model: {backbone: resnet10t}\nengine: {device: cpu}\n"
    )
    automix = [venv / "bin" / "python", "-m", "automix_dist"]
    for source, split in (("synthetic:16x64@4", "train"), ("synthetic:8x64@4", "val")):
        offline(*automix, "prepare", source, tmp_path / f"{split}.beton")
    offline(*automix, "train", tmp_path / "config.yaml")
    assert (tmp_path / "run" / "checkpoints").is_dir()

    code = "import automix_dist.augment, ffcv; print(open('/proc/self/maps').read())"
    loaded = offline(venv / "bin" / "python", "-c", code).stdout
    for library in ("libopencv_core", "libopencv_imgproc", "libturbojpeg"):
        assert f"{site}/automix_native/{library}" in loaded, "the libraries are those of the bundle"
    assert f"{site}/automix_dist/_jpeg" in loaded and f"{site}/ffcv/_libffcv.abi3.so" in loaded


def small_bundle(folder: Path, python: str, content: bytes = b"wheel") -> Path:
    """A bundle of one file, whose checksum is that of b"wheel"."""
    inside = folder / "automix-bundle"
    inside.mkdir()
    (inside / "python").write_text(python + "\n")
    (inside / "file").write_bytes(content)
    (inside / "SHA256SUMS").write_text(f"{hashlib.sha256(b'wheel').hexdigest()}  ./file\n")
    with tarfile.open(folder / "bundle.tar.xz", "w:xz") as packed:
        packed.add(inside, "automix-bundle")
    return folder / "bundle.tar.xz"


def refusal(bundle: Path, folder: Path) -> str:
    environment = os.environ | {"PYTHON": sys.executable}
    return bash(INSTALL, bundle, folder / "venv", code=1, env=environment).stderr


def test_installing_tells_what_is_wrong_with_a_bundle(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.tar.xz", tmp_path)
    bundle = small_bundle(tmp_path, "3.99")
    assert "the bundle is for Python 3.99" in refusal(bundle, tmp_path)
    bundle.write_bytes(bundle.read_bytes()[:-100])
    assert "cannot be unpacked" in refusal(bundle, tmp_path)
    (tmp_path / "damaged").mkdir()
    assert "is damaged" in refusal(small_bundle(tmp_path / "damaged", "3.99", b"whee1"), tmp_path)
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which file?"),
        (["a", "b"], "one output file"),
        (["--python", "3.9", "a"], "expected 3.11 or newer"),
        (["--have", "/nowhere", "a"], "no such file"),
        (["--python"], "needs a value"),
        (["--fast", "a"], "unknown option"),
    ],
)
def test_bundling_refuses(arguments, message):
    assert message in bash(BUNDLE, *arguments, code=1).stderr


def test_help_says_how():
    for script in (BUNDLE, INSTALL):
        text = bash(script, "--help").stdout
        assert "BUNDLE.tar.xz" in text or "OUT.tar.xz" in text
        assert not any(line.startswith("#") for line in text.splitlines())
