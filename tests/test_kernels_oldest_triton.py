"""The kernels under Triton 3.6, the oldest that they are written for, beside the one that is installed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_kernels_interpreter import passed_in_the_interpreter

OLDEST = "3.6"


@pytest.fixture
def path():
    """A search path on which the oldest Triton comes first; its 640 MB are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--retries", "0", "--timeout", "5", "--disable-pip-version-check"]
        command = [*pip, "install", "-q", "--no-deps", "--target", folder, f"triton=={OLDEST}.*"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"Triton {OLDEST} cannot be installed: {reason}")
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
        version = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path}, text=True)
        assert version.startswith(f"{OLDEST}.")
        yield path


@pytest.mark.slow
def test_it_compiles_for_sm_90_and_agrees_with_float64_in_bfloat16(path):
    file = Path(__file__).with_name("test_kernels_aot.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [file, "-k", "sm90 and (196 or momentum or batch_norm_relu)"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert passed_in_the_interpreter("-k", "bfloat16 or momentum or margin", PYTHONPATH=path) > 20
