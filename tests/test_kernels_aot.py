"""Ahead-of-time compilation of every kernel, exactly as it would be launched, for GPUs that are not here.

The launchers run on meta tensors with the kernels replaced by recorders; what they would have launched is compiled for
each target, and its code is inspected: no register spills, shared memory within the chip's limit, and matrix
instructions in the attention's products.
"""

import os
import re
import subprocess
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton")

from automix_kernels import mask_blend, mix_attention, momentum, normalize  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "hip": 65_536}  # bytes a block can have
MATRIX_INSTRUCTION = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "hip": "v_mfma"}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8"
}  # fmt: skip


@dataclass
class Recorder:
    """Stands in for a kernel: `kernel[grid](**arguments)` appends the launch to a list."""

    kernel: triton.runtime.JITFunction
    launches: list

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, arguments))


@pytest.fixture
def record(monkeypatch):
    """Recorders in place of a module's kernels, for one architecture."""
    launches = []

    def install(module, architecture):
        monkeypatch.setattr(mix_attention, "_architecture", lambda device: architecture)
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, launches))
        return launches

    return install


def compile_launch(kernel, arguments, architecture):
    """What Triton's launcher would compile for these arguments."""
    options = {key: arguments.pop(key) for key in ("num_warps", "num_stages") if key in arguments}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def spills(compiled, architecture, tmp_path) -> int:
    """Bytes of registers that the assembler had to keep in memory."""
    if architecture == "hip":
        return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    from triton.backends.nvidia.compiler import get_ptxas

    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    chip = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
    command = [get_ptxas(TARGETS[architecture].arch).path, "-v", f"--gpu-name={chip}", source, "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))


def assert_fits(launches, architecture, tmp_path, products=()):
    assert launches
    for kernel, arguments in launches:
        compiled = compile_launch(kernel, dict(arguments), architecture)
        name = kernel.__name__
        assert compiled.metadata.shared <= SHARED_MEMORY[architecture], name
        assert spills(compiled, architecture, tmp_path) == 0, name
        if name in products:
            assert MATRIX_INSTRUCTION[architecture] in compiled.asm["amdgcn" if architecture == "hip" else "ptx"], name


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


ATTENTION_CASES = [
    # architecture, batch, positions, channels, dtype
    ("sm80", 256, 196, 512, torch.bfloat16),
    ("sm80", 100, 64, 128, torch.float16),
    ("sm80", 128, 196, 192, torch.float32),
    ("sm90", 256, 196, 512, torch.bfloat16),
    ("sm90", 512, 256, 128, torch.float16),
    ("sm90", 100, 64, 128, torch.bfloat16),
    ("sm90", 64, 784, 200, torch.float16),
    ("sm90", 128, 196, 192, torch.float32),
    ("sm100", 256, 196, 512, torch.bfloat16),
    ("sm100", 128, 196, 192, torch.float32),
    ("sm100", 64, 784, 200, torch.float16),
    ("hip", 256, 196, 512, torch.bfloat16),
    ("hip", 128, 196, 192, torch.float32),
]


@pytest.mark.parametrize(("architecture", "batch", "positions", "channels", "dtype"), ATTENTION_CASES)
def test_mix_attention(record, tmp_path, architecture, batch, positions, channels, dtype):
    launches = record(mix_attention, architecture)
    projection = meta(batch, positions, channels, dtype=dtype)
    value = meta(batch, positions, dtype=dtype)
    partner, lam = meta(2, batch, dtype=torch.int64), meta(2, batch)
    query, constant = (meta(channels, 2 * channels + 1)[:, -1], meta(channels)), (meta(1), meta(1))
    logits, _, *saved = mix_attention.launch_forward(projection, value, partner, lam, *query, *constant)
    mix_attention.launch_backward(logits, projection, value, partner[0], lam[0], *query, *saved)
    assert [kernel.__name__ for kernel, _ in launches] == [
        "_key_offset_kernel", "_forward_kernel", "_backward_kernel", "_parameter_grad_kernel"
    ]  # fmt: skip
    assert_fits(launches, architecture, tmp_path, products=("_forward_kernel", "_backward_kernel"))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("architecture", "cells", "factor"),
    [("sm80", 14, 16), ("sm90", 14, 16), ("sm90", 8, 4), ("sm90", 7, 32), ("sm100", 14, 16), ("hip", 14, 16)],
)
def test_mask_blend(record, tmp_path, architecture, cells, factor, mode):
    launches = record(mask_blend, architecture)
    logits = meta(64, cells, cells)
    images = meta(64, cells * factor, cells * factor, 3, dtype=torch.uint8)
    arguments = (logits, images, meta(64, dtype=torch.int64), meta(64))
    mixed, *means = mask_blend.launch_forward(*arguments, meta(3), meta(3), mode, 0.08, torch.bfloat16)
    mask_blend.launch_backward(mixed, *means, *arguments, meta(3), mode, 0.08)
    assert len(launches) == (3 if mode == "bilinear" else 2)
    assert_fits(launches, architecture, tmp_path)


@pytest.mark.parametrize("architecture", TARGETS)
def test_normalize(record, tmp_path, architecture):
    launches = record(normalize, architecture)
    normalize.launch(meta(64, 224, 224, 3, dtype=torch.uint8), meta(3), meta(3), torch.bfloat16)
    assert_fits(launches, architecture, tmp_path)
    if architecture != "hip":
        ((kernel, arguments),) = launches
        code = compile_launch(kernel, dict(arguments), architecture).asm["ptx"]
        assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("skip", [None, meta(1)], ids=["always", "skip"])
def test_momentum_update(record, tmp_path, architecture, skip):
    launches = record(momentum, architecture)
    targets = [meta(64, 3, 7, 7), meta(1000)]
    momentum.launch(targets, [meta(64, 3, 7, 7), meta(1000, dtype=torch.bfloat16)], 0.999, skip)
    assert len(launches) == 2  # one a dtype
    assert_fits(launches, architecture, tmp_path)
    if architecture != "hip":
        kernel, arguments = launches[0]
        assert "ld.global.v4.b32" in compile_launch(kernel, dict(arguments), architecture).asm["ptx"]
