"""A pytest plugin, for `-p on_ptx_machine`: each launch of a kernel runs its compiled code on the PTX machine.

The operators take tensors on the CPU then, as in Triton's interpreter. PTX_TARGET says for which GPU: sm80 or sm90.
"""

import os

import pytest
import triton

import automix_dist  # noqa: F401 - in a checkout that is not installed it makes automix_kernels known

# isort: split
from automix_kernels import batch_norm_relu, mask_blend, mix_attention, momentum, normalize, split_weights  # noqa: F401

triton.knobs.runtime.interpret = True  # for api alone: the kernels above are compiled ones
from automix_kernels import api  # noqa: E402

triton.knobs.runtime.interpret = False

from launches import machine_run  # noqa: E402

assert api.INTERPRETED


@pytest.fixture(autouse=True)
def launches_on_the_machine(monkeypatch):
    target = os.environ["PTX_TARGET"]
    monkeypatch.setattr(triton.runtime.JITFunction, "run", machine_run(target))
    monkeypatch.setattr(mix_attention, "_architecture", lambda device: target)
    # The assembler takes most of the time, and its code is not run.
    monkeypatch.setattr(triton.backends.nvidia.compiler.CUDABackend, "make_cubin", lambda *_: b"")
