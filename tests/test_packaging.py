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

ROOT = Path(__file__).parent.parent

# An import may only point to a lower row (docs/architecture.md).
ROWS = {
    0: [
        "errors", "config", "config_file", "cores", "schedules", "draws", "sampling", "provenance", "gallery",
        "run_log", "trackers", "rank_log", "progress", "sources", "datasets", "jpeg", "robustness", "whole_file",
        "ordered_threads", "ffcv_parts", "compiled_loops",
    ],
    1: [
        "backbone", "convolutions", "mix_block", "loss", "loss_scale", "policy", "distributed", "batchnorm",
        "fused_batchnorm", "activation_checkpointing", "beton", "prepare", "random_streams", "resize", "augment",
        "rand_augment", "profiling", "page",
    ],
    2: [
        "automix", "captured_step", "classifier", "momentum", "data", "optimizer", "engines", "engine_state",
        "checkpoint", "heartbeat",
    ],
    3: [
        "policies", "validate", "replay", "trainer", "report", "export", "doctor", "preflight", "cam", "evaluate",
        "watch", "compare", "run_folder", "run_check",
    ],
    4: [
        "run", "cli", "__main__", "bench.checkpoint", "bench.loader", "bench.loader_candidates", "bench.loader_report",
        "bench.memory", "bench.published", "bench.scaling", "bench.step", "bench.step_report", "bench.step_ways",
        "bench.throughput",
    ],
}  # fmt: skip
# Files in one row that stand on each other, in this order.
SAME_ROW = {
    ("config", "errors"), ("config_file", "config"), ("config_file", "errors"), ("gallery", "whole_file"),
    ("run_log", "gallery"), ("sources", "errors"), ("jpeg", "errors"),
    ("schedules", "config"), ("draws", "config"), ("run_log", "trackers"), ("trackers", "config"),
    ("trackers", "whole_file"), ("trackers", "provenance"), ("run_log", "whole_file"),
    ("datasets", "sources"), ("prepare", "beton"),
    ("augment", "random_streams"), ("augment", "resize"), ("rand_augment", "augment"),
    ("rand_augment", "random_streams"), ("rand_augment", "resize"),
    ("classifier", "automix"), ("captured_step", "automix"),
    ("momentum", "automix"), ("checkpoint", "engine_state"),
    ("trainer", "validate"), ("trainer", "replay"), ("engine_state", "engines"),
    ("preflight", "doctor"), ("doctor", "run_check"), ("evaluate", "cam"), ("evaluate", "validate"),
    ("watch", "report"), ("checkpoint", "engines"), ("batchnorm", "distributed"), ("mix_block", "convolutions"),
    ("cli", "run"), ("__main__", "cli"), ("bench.throughput", "run"),
}  # fmt: skip
OWNERS = {
    "ffcv": {"ffcv_parts", "bench.loader_candidates"},
    "timm": {"backbone", "fused_batchnorm"},
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
    """A file's name in ROWS: the policies have one for all, so that a new one needs no line here."""
    return "policies" if name.startswith("policies.") else name


def test_every_file_has_a_row():
    assert {name for row in ROWS.values() for name in row} == {place(name) for name in modules()}


def test_imports_point_downwards():
    row_of = {name: row for row, names in ROWS.items() for name in names}
    for name, tree in modules().items():
        for target in imported(tree):
            parts, own = target.split("."), place(name)
            if parts[0] != "automix_dist" or len(parts) < 2 or parts[1] not in row_of or parts[1] == own == "policies":
                continue
            downwards = row_of[parts[1]] < row_of[own] or (own, parts[1]) in SAME_ROW
            assert downwards, f"{name}.py (row {row_of[own]}) imports {parts[1]}.py (row {row_of[parts[1]]})"


@pytest.mark.parametrize("library", OWNERS)
def test_each_big_library_is_imported_only_where_it_belongs(library):
    users = {name for name, tree in modules().items() if any(t.split(".")[0] == library for t in imported(tree))}
    assert users == OWNERS[library]


def test_kernels_know_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        foreign = roots - {"torch", "triton", "automix_kernels"} - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {foreign}"


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
    assert {"automix_dist/page.css", "automix_dist/report.html", "automix_dist/report.js"} <= names
    assert any(name.startswith("automix_dist/_jpeg.") for name in names), "the compiled decoder"
    assert {"automix_dist/automix.py", "automix_dist/cli.py", "automix_kernels/api.py"} <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)


def test_ruff_is_content():
    import subprocess

    assert "ruff" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    result = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
