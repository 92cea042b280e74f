"""What Triton compiles for a GPU, without one: on the machine of ptx_machine.py.

test_kernels_numerics.py runs there in a process of its own; here are the instructions counted that kernels execute.
"""

import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_kernels_interpreter import passed_in_a_process

triton = pytest.importorskip("triton")

from automix_kernels import batch_norm_relu, mask_blend, mix_attention, momentum, normalize  # noqa: E402
from automix_kernels.projection import joined_rows  # noqa: E402
from launches import machine_run  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "tests"),
    [
        ("sm90", "(torch.bfloat16 and not optional and not repeat) or 0.999-None or extreme"),
        (
            "sm80",
            "(torch.float16 and not torch.bfloat16 and (shapes or low or norm)) or margin or channels_last-nearest",
        ),
    ],
)
def test_numerics(target, tests, tmp_path):
    """The cache of its own: what is compiled here lacks the assembler's part."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {"PTX_TARGET": target, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    assert passed_in_a_process(["numerics"], "-p", "on_ptx_machine", "-k", tests, **environment) > 30


IMAGES = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PARTNER, LAM = torch.tensor([1, 0]), torch.tensor([0.3, 0.6])


def run_normalize():
    normalize.launch(IMAGES, MEAN, STD, torch.bfloat16)
    return IMAGES.numel()


def run_blend(mode):
    arguments = torch.randn(2, 14, 14), IMAGES, PARTNER, LAM
    mixed, *means = mask_blend.launch_forward(*arguments, MEAN, STD, mode, 0.08, torch.bfloat16)
    mask_blend.launch_backward(mixed, *means, *arguments, STD, mode, 0.08)
    return IMAGES.numel()


def run_attention():
    projection = torch.randn(2, 196, joined_rows(512)).bfloat16(), None
    partner, lam = torch.stack([PARTNER, PARTNER]), torch.stack([LAM, LAM])
    query = torch.randn(512), torch.randn(512)
    logits, _, *saved = mix_attention.launch_forward(
        *projection, partner, lam, *query, torch.ones(1), torch.ones(1), 512
    )
    mix_attention.launch_backward(logits, *projection, PARTNER, LAM, *query, *saved, 512)
    return 2 * 196 * 196  # scores of one draw


def run_norm():
    """In 8 parts, which are as long then as those of 256 images of 14 x 14 x 1024."""
    x = torch.randn(16, 256, 14, 14).bfloat16().contiguous(memory_format=torch.channels_last)
    parameters = [torch.rand(256) for _ in range(4)]
    with mock.patch.object(batch_norm_relu, "PROGRAMS", 8):
        moments = batch_norm_relu.launch_moments(x, *parameters[:2], torch.tensor(0), 0.1, 1e-5, 1)
        y = batch_norm_relu.launch_apply(x, *moments, *parameters[2:], x)
        batch_norm_relu.launch_backward(y, x, *moments, *parameters[2:], y)
    return x.numel()


def run_momentum():
    momentum.launch([torch.randn(64, 64, 7, 7)], [torch.randn(64, 64, 7, 7)], 0.999, None)
    return 64 * 64 * 49


@pytest.mark.parametrize(
    ("run", "most"),
    [
        (run_normalize, {"_normalize_kernel": 7.5}),
        (lambda: run_blend("nearest"), {"_forward_kernel": 12.5, "_backward_kernel": 13.5}),
        (lambda: run_blend("bilinear"), {"_forward_kernel": 26, "_backward_kernel": 29, "_sum_taps_kernel": 0.5}),
        (run_attention, {"_key_products_kernel": 30, "_forward_kernel": 65, "_backward_kernel": 180}),
        (
            run_norm,
            {"_moments_kernel": 7.5, "_apply_kernel": 10.5, "_backward_sums_kernel": 14, "_input_grad_kernel": 11},
        ),
        (run_momentum, {"_lerp_kernel": 8}),
    ],
    ids=["normalize", "nearest", "bilinear", "attention", "norm", "momentum"],
)
def test_instructions_for_32_elements(run, most, monkeypatch):
    """Of a warp, for 32 numbers of the images, scores of one draw, numbers of the map or parameters, on sm_90.

    While an H200 moves a byte for each thread of a warp, at 4.3 TB/s, its multiprocessors can issue about seven: 21 for
    the three bytes of a number that is normalised, 28 for the four of one that is blended.
    """
    executed: dict[str, Counter] = {}
    monkeypatch.setattr(triton.runtime.JITFunction, "run", machine_run("sm90", executed))
    monkeypatch.setattr(mix_attention, "_architecture", lambda device: "sm90")
    elements = run()
    for kernel, limit in most.items():
        count = executed[kernel].total() / (elements / 32)
        lines = ", ".join(f"{line} {n / (elements / 32):.1f}" for line, n in executed[kernel].most_common(5))
        print(f"{kernel} {count:.2f}: {lines}")
        assert count <= limit, f"{kernel}: {count:.1f} instructions, {lines}"
