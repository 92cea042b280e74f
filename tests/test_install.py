"""The installation script's answers where it cannot go on: one message with the line to run, and nothing half done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "dirname", "id", "sha256sum", "cat", "apt-get", "sh"]


def install(tmp_path: Path, *arguments: str, tools: list[str], user: int | None = None, python: str = sys.executable):
    """Run launch/install.sh with nothing on PATH but these tools."""
    programs = tmp_path / "bin"
    programs.mkdir(parents=True)
    for tool in tools:
        (programs / tool).symlink_to(shutil.which(tool))
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", copy / "launch")
    for name in ("constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    tmp_path.chmod(0o755)
    prefix = [shutil.which("setpriv"), f"--reuid={user}", "--clear-groups"] if user else []
    result = subprocess.run(
        [*prefix, str(programs / "bash"), str(copy / "launch" / "install.sh"), *arguments],
        env={"PATH": str(programs), "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not (copy / ".venv").exists()
    return result


@pytest.fixture
def open_folder():
    """A folder that other users can enter, unlike pytest's."""
    folder = Path("/tmp") / f"automix-install-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root to become another user")
def test_without_compiler_and_root_the_line_to_run_is_printed(open_folder):
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    result = install(open_folder, tools=TOOLS, user=65534, python=python)
    assert result.returncode == 1
    assert "sudo sh -c" in result.stderr and "g++" in result.stderr and "libturbojpeg0-dev" in result.stderr
    assert "or without root: in a conda environment" in result.stderr and "docs/installation.md" in result.stderr


def bare_python(folder: Path, executable: str) -> str:
    """A Python 3.12 that says it is this file, and lacks what Debian packs apart."""
    pretended = "sys.modules['ensurepip'] = None; sys.version_info = (3, 12, 4, 'final', 0)"
    pretended += f"; sys.executable = {executable!r}; sysconfig.get_path = lambda name: '/nowhere'"
    path = folder / "bare-python"
    pretended += "; exec(sys.argv[2])"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys, sysconfig; {pretended}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_the_packages_of_the_chosen_python_are_asked_for(open_folder):
    """python3-venv would be another Python's: Ubuntu 22.04 has 3.11 beside its own 3.10."""
    python = bare_python(open_folder, "/usr/bin/python3.12")
    result = install(open_folder, tools=[tool for tool in TOOLS if tool != "apt-get"], python=python)
    assert result.returncode == 1 and "python3.12-venv python3.12-dev (Debian's names)" in result.stderr
    assert "opencv-devel" in result.stderr and "python3.12-devel" in result.stderr  # RHEL's


def test_no_package_mends_a_python_that_is_not_the_distributions(open_folder):
    python = bare_python(open_folder, "/opt/python/bin/python3.12")
    result = install(open_folder, tools=TOOLS, python=python)
    assert result.returncode == 1 and "/opt/python/bin/python3.12 has no ensurepip or no Python.h" in result.stderr


def test_without_apt_the_packages_are_named(open_folder):
    result = install(open_folder, tools=[tool for tool in TOOLS if tool != "apt-get"])
    assert result.returncode == 1
    assert "this system's package manager" in result.stderr and "libopencv-dev" in result.stderr


def test_no_python_or_an_old_one(open_folder):
    assert "not found: install Python 3.11" in install(open_folder / "a", tools=TOOLS, python="python9").stderr


def test_an_old_python_is_refused(open_folder):
    old = open_folder / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10 && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = install(open_folder / "b", tools=TOOLS, python=str(old))
    assert result.returncode == 1 and "Python 3.8.10 is too old" in result.stderr


def test_unknown_options_are_refused(open_folder):
    result = install(open_folder, "--devel", tools=TOOLS)
    assert result.returncode == 1 and "unknown option --devel" in result.stderr


@pytest.mark.parametrize(("arguments", "errors"), [(["-m", "gpu"], 1), (["-m", "gpu or not gpu"], 2)])
def test_gpu_tests_need_no_more_than_they_import(arguments, errors, pytester):
    """What else is missing is named, and is an error in a whole run; a mistake of ours is one in both."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(
        test_one="import a_package_that_is_not_here",
        test_two="import automix_dist.a_file_that_is_not_here",
        test_three="import pytest\n\n@pytest.mark.gpu\ndef test_three():\n    pass",
    )
    found = pytester.runpytest_inprocess("--collect-only", "--strict-markers", "-o", "markers=gpu", *arguments)
    found.stdout.fnmatch_lines(["*ModuleNotFoundError: No module named 'automix_dist.a_file_that_is_not_here'"])
    found.stdout.fnmatch_lines([f"*{errors} error*"])
    assert ("left out 1 file(s) of tests: No module named 'a_package_that_is_not_here'" in found.outlines) == (
        errors == 1
    )
