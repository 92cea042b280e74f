"""What is installed, what is pinned, and that the two agree; and which file may import which."""

import ast
import contextlib
import importlib.metadata
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from automix_dist.compiled_loops import SOURCES

ROOT = Path(__file__).parent.parent

OWNERS = {
    "ffcv": {"ffcv_parts", "bench.loader_candidates"},
    "timm": {"backbone", "fused_batchnorm", "policies.transmix"},
    "deepspeed": {"engines"},
    "accelerate": {"distributed", "trackers"},
    "triton": set(),
}


def modules() -> dict[str, ast.Module]:
    root = ROOT / "automix_dist"
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    return {name: ast.parse(path.read_text()) for name, path in paths.items() if path.name != "__init__.py"}


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place(name: str) -> str:
    """A file's name in the list of docs/architecture.md, where the files of a folder have one together."""
    return name.split(".")[0]


def listed() -> list[str]:
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Files, in order")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")][2:]
    return [name.strip().replace("\\", "") for row in rows for name in row.split(",")]


def test_every_file_is_listed_once():
    assert sorted(listed()) == sorted({place(name) for name in modules()})


def test_files_import_only_what_stands_before_them():
    order = listed()
    for name, tree in modules().items():
        for target in imported(tree):
            package, _, rest = target.partition(".")
            used = place(rest)
            if package == "automix_dist" and used in order and used != place(name):
                assert order.index(used) < order.index(place(name)), f"{name}.py imports {used}.py, listed after it"


@pytest.mark.parametrize("library", OWNERS)
def test_each_big_library_is_imported_only_where_it_belongs(library):
    users = {name for name, tree in modules().items() if any(t.split(".")[0] == library for t in imported(tree))}
    assert users == OWNERS[library]


def test_compiled_code_is_kept_for_all_its_sources():
    """One that were left out could change, and the code that was compiled before would be taken."""
    files = {name: imported(tree) for name, tree in modules().items()}
    with_loops = {name for name, names in files.items() if "automix_dist.compiled_loops.compiled" in names}
    called = {name for name in files for each in with_loops if {f"automix_dist.{name}"} & files[each]}
    assert with_loops | (called - {"config"}) == set(SOURCES)  # RandAugmentPolicy is none of the loops' business


def test_kernels_know_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        foreign = roots - {"torch", "triton", "automix_kernels"} - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {foreign}"


def test_kernels_do_not_import_their_definitions():
    """What both are built from may be wrong in both."""
    for path in (ROOT / "kernels").glob("*.py"):
        names = set(imported(ast.parse(path.read_text())))
        assert not {"triton.language", "automix_kernels.reference"} <= names, path.name


def test_kernels_folder_hides_no_package():
    """A kernels/__init__.py would hide the package `kernels` of that name from every library, in any checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def requirements() -> list[Requirement]:
    """install_requires and all extras, read from setup.py without running it."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    call = next(node for node in calls if any(k.arg == "install_requires" for k in node.keywords))
    values = {
        k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("install_requires", "extras_require")
    }
    lists = [values["install_requires"], *values["extras_require"].values()]
    return [Requirement(each) for names in lists for each in names]


def test_pins_lie_within_the_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in requirements():
        assert requirement.name in pins, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} excludes the pinned version"
    needed, seen = [each.name for each in requirements()], set()
    while needed:
        name = canonicalize_name(needed.pop())
        if name not in seen:
            seen.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another platform
                needed += [Requirement(each).name for each in importlib.metadata.requires(name) or []]
    assert not pins.keys() - seen, "pinned, though nothing asks for them"


def test_imports_are_declared():
    declared = {each.name for each in requirements()}
    names = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "automix_dist": None,
        "automix_kernels": None,
    }
    names |= {"cv2": None, "llvmlite": None}  # FFCV asks for the one, numba for the other
    names |= {"webdataset": None, "nvidia": None}  # the loader's benchmark names them if they are missing
    names |= {"huggingface_hub": "huggingface-hub", "mlflow": "mlflow-skinny"}
    for name, tree in modules().items():
        for root in {target.split(".")[0] for target in imported(tree)} - sys.stdlib_module_names:
            package = names.get(root, root)
            assert package is None or package in declared, f"{name}.py imports {root}, which setup.py does not ask for"


@pytest.mark.slow
def test_wheel_holds_both_packages(tmp_path):
    import subprocess

    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "automix_dist/imagenet_wnids.txt",
        "automix_dist/page.css",
        "automix_dist/report.html",
        "automix_dist/report.js",
    } <= names
    assert any(name.startswith("automix_dist/_jpeg.") for name in names), "the compiled decoder"
    assert {"automix_dist/automix.py", "automix_dist/cli.py", "automix_kernels/api.py"} <= names
    assert {"automix_dist/py.typed", "automix_kernels/py.typed"} <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)


def test_ruff_is_content():
    import subprocess

    assert "ruff" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    result = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
