"""What runs on a GPU but for its numbers, on one that computes nothing: what is launched, waited for and recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import idle_gpu
import pytest
import torch
from ranks import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA"),
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory) -> dict[str, str]:
    if reason := idle_gpu.missing():
        pytest.skip(reason)
    # Caches for all workers of pytest-xdist, whose folders lie side by side.
    return idle_gpu.build(
        tmp_path_factory.mktemp("idle_gpu"), tmp_path_factory.getbasetemp().parent / "idle_gpu_caches"
    )


def run(gpu: dict[str, str], *arguments: str | Path, code: int = 0) -> str:
    """Output and errors of python with these arguments."""
    environment = {**os.environ, **gpu, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def test_a_capture_is_spoilt_by_what_waits_and_by_streams_that_do_not_come_back(gpu):
    said = run(
        gpu,
        "-c",
        """
import torch
number, aside = torch.tensor(1.0).cuda(), torch.cuda.Stream()
print(torch.cuda.get_device_name(), number.cpu().item())

def capture(step):
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        return "recorded"
    except RuntimeError as error:
        return str(error).splitlines()[0]

def fork(comes_back):
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        number + 1
    if comes_back:
        torch.cuda.current_stream().wait_stream(aside)

for step in (lambda: number + 1, lambda: number.item(), lambda: fork(True), lambda: fork(False)):
    before = torch.cuda.current_stream()
    print(capture(step))
    torch.cuda.set_stream(before)
""",
    )
    assert said.splitlines()[-5:] == [
        "idle GPU of sm_90 1.0",
        "recorded",
        "CUDA error: operation failed due to a previous error during capture",
        "recorded",
        "CUDA error: capturing stream has unjoined work",
    ]


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "ddp"},
        {"name": "ddp", "cuda_graph": True, "fused_batchnorm": True},
        {"name": "ddp", "immediate_backward": False, "fused_batchnorm": True},
        {"name": "deepspeed"},
    ],
    ids=str,
)
def test_a_steady_step_waits_for_nothing(engine, gpu):
    run(gpu, "-c", f"import test_gpu_steps; test_gpu_steps.train({engine})")


def test_a_step_that_waits_is_noticed(gpu):
    said = run(gpu, "-c", "import test_gpu_steps; test_gpu_steps.train_and_wait()", code=1)
    assert "synchronizing CUDA operation" in said


@pytest.mark.parametrize(
    "settings_of_engine",
    [
        "engine.name=ddp engine.fused_batchnorm=true engine.activation_checkpointing=true",
        "engine.name=ddp engine.joint_query=true engine.fused_batchnorm=true engine.immediate_backward=false",
        "engine.name=ddp engine.compile=true engine.cuda_graph=true automix.feature_pass=cut",
        "engine.name=fsdp2 engine.fused_batchnorm=true",
        "engine.zero_stage=1 engine.cuda_graph=true engine.fused_batchnorm=true engine.joint_query=true",
        "engine.zero_stage=2 engine.offload_optimizer=true engine.accumulation_steps=2",
        "engine.zero_stage=3",
        "policy.name=fmix engine.padded_stem=true",
    ],
)
def test_training(settings_of_engine, gpu, settings):
    assert "done: 6 steps" in train(gpu, settings, *settings_of_engine.split(), "epochs=2")


def train(gpu: dict[str, str], settings: Path, *arguments: str) -> str:
    options = ("engine.device=cuda", "batch_size=128", "log.gallery_pairs=0")
    return run(gpu, "-m", "automix_dist", "train", settings, *options, *arguments)


def test_a_run_goes_on(gpu, settings, tmp_path):
    """With another engine, and is evaluated."""
    train(gpu, settings, "epochs=2", "engine.name=ddp")
    said = train(gpu, settings, "epochs=3", "engine.zero_stage=2", "--resume")
    assert "resuming from" in said and "done: 9 steps" in said
    assert '"loss_ensemble"' in run(gpu, "-m", "automix_dist", "eval", tmp_path / "run")


def test_the_block_takes_few_launches(gpu):
    """Forward pass: weights, products, keys' offsets, attention, two blends. Backward pass: blend, attention and its
    parameters, products, weights."""
    said = run(
        gpu,
        "-c",
        """
import torch, automix_dist
from automix_kernels import benchmark, benchmark_cases
case = benchmark_cases.block_case(benchmark_cases.SHAPES[0], "cuda", torch.bfloat16, "nearest")
for backward in (False, True):
    [call] = benchmark.prepare(case, case.candidates["ours"], [case.draw(0)], backward)
    call()
    print(benchmark.count_launches(call))
""",
    )
    assert [line for line in said.splitlines() if line.isdigit()] == ["6", "11"]


def test_bench_kernels(gpu, tmp_path):
    """All columns of the table, from the code that measures on a GPU."""
    operations = (
        "block",
        "attention",
        "blend",
        "normalize",
        "batch-norm",
    )  # momentum's results are compared with numbers
    run(
        gpu, "-m", "automix_dist", "bench", "kernels", "--shapes", "cifar_resnet18/100", "--modes", "nearest",
        "--operations", *operations, "--candidates", "ours", "published", "sdpa-math", "--seconds", "0.01",
        "--out", tmp_path,
    )  # fmt: skip
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["candidate"] for row in rows} == {"ours", "published", "sdpa-math"}
    for row in rows:
        assert row["graph_ms"] or row["direction"] == "backward", row
        assert row["launches"] or row["direction"] != "both", row


def test_bench_step(gpu, tmp_path):
    ways = ("vanilla, channels-last", "AutoMix, cut", "AutoMix, cut, CUDA graph", "AutoMix, cut, fused BatchNorm")
    run(
        gpu, "-m", "automix_dist", "bench", "step", "--networks", "cifar_resnet18", "--ways", *ways, "--rounds", "1",
        "--batch-size", "16", "--out", tmp_path,
    )  # fmt: skip
    rows = {row["way"]: row for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert set(rows) == set(ways)
    for row in rows.values():
        assert not row["note"] and row["host_reads"] == 0 and row["launches"], row
    assert rows["AutoMix, cut, fused BatchNorm"]["launches"] < rows["AutoMix, cut"]["launches"]
