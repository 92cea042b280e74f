"""Every kernel under NVIDIA's compute-sanitizer: no access outside an allocation, no race in shared memory.

Races in global memory it does not see; that the attention's backward reads what it stored is for the numbers to show,
the same bits every time (test_kernels_numerics.py).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from automix_kernels import api, batch_norm_relu, mask_blend, mix_attention, momentum, normalize, split_weights

MODULES = (batch_norm_relu, mask_blend, mix_attention, momentum, normalize, split_weights)
KERNELS = sorted({name for module in MODULES for name in vars(module) if name.endswith("_kernel")})
FAILED = 77
# One that need not be installed: importing automix_dist makes automix_kernels known.
IN_A_CHECKOUT = "import runpy, sys, automix_dist; runpy.run_path(sys.argv[1], run_name='__main__')"


def sanitizer() -> str | None:
    """compute-sanitizer of the path, of the toolkit, or of NVIDIA's packages for Python."""
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, wheels)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.hip is not None, reason="compute-sanitizer is for NVIDIA's GPUs")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_errs(tool):
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit (nvidia-cuda-sanitizer-api)")
    command = [program, "--tool", tool, "--error-exitcode", str(FAILED), "--target-processes", "application-only"]
    command += ["--launch-timeout", "0"]
    command += ["--report-api-errors", "no"]  # looking for a driver's functions that are not there is none of ours
    for name in KERNELS:
        command += ["--kernel-name", f"kne={name}"]
    command += [sys.executable, "-c", IN_A_CHECKOUT, __file__]
    # Every tensor an allocation of its own, so that what lies beside it is not another tensor's memory.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parent.parent
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "every kernel ran" in result.stdout


def run_every_kernel(device: str) -> None:
    """Odd sizes, so that every mask has something to keep out; more than one tile of rows and of columns."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    for columns in (70, 71):
        weights = draw(5, columns), draw(1, columns)
        parts = api.split_weights(*weights, 70, torch.bfloat16, implementation="triton")
        torch.autograd.grad(sum(part.float().sum() for part in parts if part is not None), weights)
    for positions, channels, dtype in ((37, 24, torch.bfloat16), (289, 40, torch.float16), (67, 17, torch.float32)):
        leaves = draw(2, positions, channels, dtype=dtype), draw(2, positions, dtype=dtype)
        parameters = draw(channels), draw(channels), draw(1), draw(1)
        partner, lam = torch.tensor([1, 1], device=device), torch.tensor([0.3, 0.6], device=device)
        logits = api.mix_attention(*leaves, partner, lam, *parameters, implementation="triton")
        torch.autograd.grad(logits.sum(), (*leaves, *parameters))
        joined = draw(2, positions, channels + 3, dtype=dtype)
        logits = api.mix_attention(joined, None, partner, lam, *parameters, channels, implementation="triton")
        torch.autograd.grad(logits.sum(), (joined, *parameters))
    mean, std = (torch.tensor([value] * 3, device=device) for value in (0.45, 0.22))
    uint8 = torch.randint(0, 256, (2, 15, 15, 3), generator=generator, dtype=torch.uint8).to(device)
    api.normalize(uint8, mean, std, torch.float16, implementation="triton")
    for images in (uint8, draw(2, 3, 15, 15).detach()):
        for mode in ("nearest", "bilinear"):
            logits = draw(2, 3, 5)
            outputs = api.mask_blend(logits, images, partner, lam, mean, std, mode, 0.08, implementation="triton")
            torch.autograd.grad(sum(output.sum() for output in outputs), logits)
    for dtype, residual in ((torch.bfloat16, None), (torch.float32, draw(4, 130, 5, 9))):
        leaves = draw(4, 130, 5, 9, dtype=dtype), draw(130), draw(130)
        running = draw(130).detach(), draw(130).detach(), torch.tensor(0, device=device)
        y = api.batch_norm_relu(*leaves, *running, 0.1, 1e-5, residual, 2, implementation="triton")
        torch.autograd.grad(y.float().sum(), [*leaves, *(() if residual is None else (residual,))])
    targets = [draw(size).detach() for size in (9, 8195)]
    sources = [draw(9).detach(), draw(8195, dtype=torch.bfloat16).detach()]
    api.momentum_update(targets, sources, 0.9, torch.zeros((), device=device), implementation="triton")


if __name__ == "__main__":
    run_every_kernel("cpu" if api.INTERPRETED else "cuda")
    if not api.INTERPRETED:
        torch.cuda.synchronize()
    print("every kernel ran")
