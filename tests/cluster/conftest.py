"""Hosts, Slurm and data, made once for all tests of this folder."""

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
