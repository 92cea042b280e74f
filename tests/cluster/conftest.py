"""Hosts, Slurm and data, made once for all tests of this folder."""

import sys
from pathlib import Path

import hosts as hosts_module
import pytest
import slurm as slurm_module


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Four hosts; most tests use the first two. What a test breaks on them it mends again."""
    reason = hosts_module.missing()
    if reason:
        pytest.skip(reason)
    made = hosts_module.Hosts(tmp_path_factory.mktemp("hosts"), 4)
    yield made
    made.close()


@pytest.fixture(scope="session")
def slurm(hosts):
    reason = slurm_module.missing()
    if reason:
        pytest.skip(reason)
    return slurm_module.Slurm(hosts, ["n1", "n2"])


@pytest.fixture
def two(hosts, tmp_path) -> Path:
    """A hostfile of the first two hosts."""
    path = tmp_path / "hostfile"
    path.write_text("n1 slots=1\nn2 slots=1\n")
    return path


@pytest.fixture
def on_n2(hosts):
    """Bind a file or folder over another on host n2, or on another host, for one test."""
    bound = []

    def bind(path: Path | str, over: Path | str, name: str = "n2") -> None:
        done = hosts.run(name, "mount", "--bind", path, over)
        assert done.returncode == 0, done.stdout
        bound.append((name, over))

    yield bind
    for name, over in bound:
        hosts.run(name, "umount", over)


@pytest.fixture
def waiting(tmp_path) -> str:
    """An environment whose `automix` waits until a signal ends it."""
    folder = tmp_path / "waiting"
    automix, python = 'exec -a "waits $*" sleep 300', f'exec {sys.executable} "$@"'
    hosts_module.write_programs(folder / "bin", automix=automix, python=python)
    return str(folder)
