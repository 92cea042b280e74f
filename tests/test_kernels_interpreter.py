"""Runs test_kernels_numerics.py and test_kernels_opcheck.py without a GPU: the Triton code, in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def passed_in_a_process(files: list[str], *arguments: str, **environment: str) -> int:
    """How many tests of these files passed; `arguments` choose among them."""
    files = [Path(__file__).with_name(f"test_kernels_{name}.py") for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *files, *arguments]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return int(re.search(r"(\d+) passed", result.stdout).group(1))


def passed_in_the_interpreter(*arguments: str, **environment: str) -> int:
    return passed_in_a_process(["numerics", "opcheck"], *arguments, TRITON_INTERPRET="1", **environment)


@pytest.mark.slow
def test_in_the_interpreter():
    assert passed_in_the_interpreter() > 130
