"""Ahead-of-time compilation of every kernel, exactly as it would be launched, for GPUs that are not here.

The launchers run on meta tensors with the kernels replaced by recorders; what they would have launched is compiled for
each target, and its code is inspected: no register spills but for those named in SPILLED, shared memory within the
chip's limit, and matrix instructions in the attention's products.
"""

import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")

from automix_kernels import batch_norm_relu, mask_blend, mix_attention, momentum, normalize, split_weights  # noqa: E402
from automix_kernels.projection import joined_rows  # noqa: E402
from launches import TARGETS, Recorder, compile_launch  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

SPILLED = {  # bytes a thread
    ("sm90", "_backward_kernel"): 32,  # float32, and float16 beyond 256 positions, by Triton 3.9
    ("sm100", "_moments_kernel"): 16,  # by Triton 3.6
}
SHARED_MEMORY = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "hip": 65_536}  # bytes a block can have
MATRIX_INSTRUCTION = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "hip": "v_mfma"}


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


def spilled_bytes(compiled, architecture, tmp_path) -> int:
    """What one thread keeps in memory for want of registers, of the very binary that would be launched."""
    if architecture == "hip":
        return 4 * sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report).group(1))


def fused_butterflies(code: str) -> list[str]:
    """Multiply-adds on what another lane has sent. Two lanes of a butterfly add the same numbers, in another order, and
    get the same bits only where neither is a product that is not rounded yet."""
    sent = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", code))
    return [line for line in re.findall(r"fma\.rn\.f32.*", code) if sent & set(re.findall(r"%r\d+", line)[1:])]


def assert_fits(launches, architecture, tmp_path, products=()):
    assert launches
    for kernel, arguments in launches:
        assert arguments["enable_fp_fusion"], "from Triton 3.10 on it is off unless it is asked for"
        compiled = compile_launch(kernel, dict(arguments), architecture)
        name = kernel.__name__
        assert compiled.metadata.shared <= SHARED_MEMORY[architecture], name
        assert spilled_bytes(compiled, architecture, tmp_path) <= SPILLED.get((architecture, name), 0), name
        if architecture != "hip":
            assert not fused_butterflies(compiled.asm["ptx"]), f"{name}: lanes store other bits to one word"
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
    ("sm90", 512, 256, 128, torch.bfloat16),
    ("sm90", 256, 196, 128, torch.bfloat16),
    ("sm90", 128, 196, 192, torch.bfloat16),
    ("sm90", 128, 49, 384, torch.bfloat16),
    ("sm90", 64, 784, 1024, torch.bfloat16),
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
    """As the Mix Block has it: the value inside the projection, and rows that begin at multiples of 16."""
    projection = meta(batch, positions, joined_rows(channels), dtype=dtype), None
    query = meta(channels), meta(channels)
    check_attention(record, tmp_path, architecture, projection, query, (meta(1), meta(1)), channels)


def test_mix_attention_with_a_value_apart_and_a_column_for_lambda(record, tmp_path):
    projection = meta(256, 196, 512, dtype=torch.bfloat16), meta(256, 196, dtype=torch.bfloat16)
    query = meta(512, 1025)[:, -1], meta(512)
    check_attention(record, tmp_path, "sm90", projection, query, (meta(1), meta(1)))


def test_mix_attention_with_a_bias_alone(record, tmp_path):
    """As without lambda among the channels (automix.lam_concat)."""
    projection = meta(100, 64, 144, dtype=torch.bfloat16), None
    check_attention(record, tmp_path, "sm90", projection, (None, meta(128)), (None, meta(1)), 128)


def check_attention(record, tmp_path, architecture, projection, query, constant, width=None):
    launches = record(mix_attention, architecture)
    batch = len(projection[0])
    partner, lam = meta(2, batch, dtype=torch.int64), meta(2, batch)
    logits, _, *saved = mix_attention.launch_forward(*projection, partner, lam, *query, *constant, width)
    mix_attention.launch_backward(logits, *projection, partner[0], lam[0], *query, *saved, width)
    unit = ["_unit_kernel"] if projection[0].dtype == torch.float16 else []
    assert [kernel.__name__ for kernel, _ in launches] == [
        "_key_products_kernel", "_forward_kernel", *unit, "_backward_kernel", "_parameter_grad_kernel"
    ]  # fmt: skip
    assert_fits(launches, architecture, tmp_path, products=("_forward_kernel", "_backward_kernel"))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("architecture", "cells", "factor", "kind"),
    [
        ("sm80", 14, 16, "uint8"),
        ("sm90", 14, 16, "uint8"),
        ("sm90", 8, 4, "uint8"),
        ("sm90", 7, 32, "uint8"),
        ("sm90", 16, 2, "uint8"),
        ("sm90", 14, 16, "channels_last"),
        ("sm90", 8, 4, "planar"),
        ("sm100", 14, 16, "uint8"),
        ("hip", 14, 16, "uint8"),
    ],
)
def test_mask_blend(record, tmp_path, architecture, cells, factor, kind, mode):
    """uint8 images become bfloat16; floating-point ones stay float32."""
    launches = record(mask_blend, architecture)
    logits, size = meta(64, cells, cells), cells * factor
    if kind == "uint8":
        images, dtype = meta(64, size, size, 3, dtype=torch.uint8), torch.bfloat16
    else:
        layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
        images, dtype = meta(64, 3, size, size).contiguous(memory_format=layout), torch.float32
    arguments = (logits, images, meta(64, dtype=torch.int64), meta(64))
    mixed, *means = mask_blend.launch_forward(*arguments, meta(3), meta(3), mode, 0.08, dtype)
    mask_blend.launch_backward(mixed, *means, *arguments, meta(3), mode, 0.08)
    assert len(launches) == (3 if mode == "bilinear" else 2)
    assert_fits(launches, architecture, tmp_path)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("columns", [1024, 1025])
def test_split_weights(record, tmp_path, architecture, columns):
    launches = record(split_weights, architecture)
    parts = split_weights.launch_split(meta(512, columns), meta(1, columns), 1024, torch.bfloat16)
    split_weights.launch_join(*parts, 512)
    assert [kernel.__name__ for kernel, _ in launches] == ["_split_kernel", "_join_kernel"]
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


NORM_CASES = [
    # architecture, dtype, shape, residual, groups
    ("sm90", torch.bfloat16, (256, 64, 112, 112), False, 1),
    ("sm90", torch.bfloat16, (256, 1024, 14, 14), True, 1),
    ("sm90", torch.bfloat16, (64, 2048, 7, 7), False, 2),
    ("sm90", torch.bfloat16, (100, 80, 8, 8), True, 1),
    ("sm90", torch.float32, (256, 1024, 14, 14), True, 1),
    *((each, torch.bfloat16, (256, 1024, 14, 14), True, 1) for each in ("sm80", "sm100", "hip")),
    *((each, torch.float32, (64, 2048, 7, 7), False, 2) for each in ("sm80", "sm100", "hip")),
]


@pytest.mark.parametrize(("architecture", "dtype", "shape", "with_residual", "groups"), NORM_CASES)
def test_batch_norm_relu(record, tmp_path, architecture, dtype, shape, with_residual, groups):
    launches = record(batch_norm_relu, architecture)
    x = meta(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    of_channels = [meta(shape[1]) for _ in range(4)]
    moments = batch_norm_relu.launch_moments(x, *of_channels[:2], meta((), dtype=torch.int64), 0.1, 1e-5, groups)
    y = batch_norm_relu.launch_apply(x, *moments, *of_channels[2:], x if with_residual else None)
    batch_norm_relu.launch_backward(y, x, *moments, *of_channels[2:], y if with_residual else None)
    assert [kernel.__name__ for kernel, _ in launches] == [
        "_moments_kernel", "_finish_moments_kernel", "_apply_kernel",
        "_backward_sums_kernel", "_finish_backward_kernel", "_input_grad_kernel",
    ]  # fmt: skip
    assert_fits(launches, architecture, tmp_path)
    if architecture != "hip" and shape[1] % 64 == 0:
        for kernel, arguments in launches:
            if "finish" not in kernel.__name__:
                code = compile_launch(kernel, dict(arguments), architecture).asm["ptx"]
                assert "ld.global.v4.b32" in code, kernel.__name__
