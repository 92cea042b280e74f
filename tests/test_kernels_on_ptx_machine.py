"""Runs test_kernels_numerics.py without a GPU: what Triton compiles for one, on the machine of ptx_machine.py."""

import os
from pathlib import Path

import pytest
from test_kernels_interpreter import passed_in_a_process

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "tests"),
    [
        ("sm90", "torch.bfloat16 or uint8 or 0.999 or repeat or extreme"),
        ("sm80", "(torch.float16 and not torch.bfloat16) or channels_last or lambda_at_its_ends or margin"),
    ],
)
def test_on_the_ptx_machine(target, tests, tmp_path):
    """The cache of its own: what is compiled here lacks the assembler's part."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {"PTX_TARGET": target, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    assert passed_in_a_process(["numerics"], "-p", "on_ptx_machine", "-k", tests, **environment) > 50
