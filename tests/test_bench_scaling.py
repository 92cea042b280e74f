"""The scaling benchmark: its byte counts against real engines, its formulas against figures worked out elsewhere."""

import argparse
import json
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from automix_dist import distributed
from automix_dist.bench import ENGINES, checkpoint, memory, scaling
from automix_dist.bench.scaling import Link, Sizes, Work, collective_seconds, fit, predict, sent, traffic
from automix_dist.config import EngineConfig

NODE_400G = Link(host=50e9, hop_seconds=5e-6, gpu=400e9, gpus_per_host=8)
RESNET50 = Sizes(trained=25_600_000, momentum=25_600_000, idle=0, optimizer_states=1)


def options(**values) -> argparse.Namespace:
    network = {"backbone": "test_resnet", "feature": -2, "image_size": 32, "batch_size": 2}
    return argparse.Namespace(**network, rounds=1, count_only=True, **values)


def state_sizes() -> dict[str, tuple[int, int]]:
    """Bytes of optimizer state, and of weights that live on this rank between steps, under each engine."""
    process = distributed.start(EngineConfig(device="cpu"))
    found = {}
    for name in ("ddp", "zero1", "zero3", "fsdp2"):
        work = Work(scaling.settings(options(), ENGINES[name], process), process, engine=True)
        state = sum(v.nbytes for s in work.engine.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
        found[name] = (state, work.sizes.trained)
    return found


@pytest.mark.slow
def test_optimizer_state_is_sharded_as_predicted():
    for name, (state, trained) in run_ranks(2, state_sizes)[0].items():
        expected = 4 * trained / (1 if name == "ddp" else 2)
        assert state == pytest.approx(expected, rel=2e-3), name


def known_collectives() -> tuple[dict, dict]:
    distributed.start(EngineConfig(device="cpu"))
    with scaling.Counter() as counter:
        dist.all_reduce(torch.ones(100))
        dist.all_reduce(torch.ones(50, dtype=torch.float64))
        dist.all_gather_into_tensor(torch.empty(60), torch.ones(30))
        dist.reduce_scatter_tensor(torch.empty(30), torch.ones(60))
    torch.ones(3) + 1
    return counter.calls, counter.moved


def test_the_counter_counts_whole_tensors():
    (calls, moved), _ = run_ranks(2, known_collectives)
    assert calls == {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    assert moved == {"all_reduce": 800, "all_gather": 240, "reduce_scatter": 240}


@pytest.mark.parametrize(
    ("gpus", "host", "milliseconds"),
    [(64, 50e9, 4.7), (1024, 50e9, 5.3), (64, 400e9, 1.04), (1024, 400e9, 1.15)],
)
def test_all_reduce_of_a_resnet50(gpus, host, milliseconds):
    """Figures of the same model from a table worked out before this file was written."""
    link = Link(host=host, hop_seconds=5e-6, gpu=400e9, gpus_per_host=8)
    assert 1000 * collective_seconds("all_reduce", 4 * 25.6e6, gpus, link) == pytest.approx(milliseconds, rel=0.02)


def test_rings_send_what_rings_send():
    moved = traffic("zero1", RESNET50)
    assert sent(moved, 1) == 0
    assert sent(moved, 2) == 4 * 25.6e6 * (1 + 0.5)
    assert sent(traffic("ddp", RESNET50), 1024) == pytest.approx(205e6, rel=2e-3)
    assert sent(moved, 1024) == pytest.approx(307e6, rel=2e-3)


def test_predictions_behave():
    """Efficiency falls with GPUs and rises with bandwidth; hidden reductions cost little; shards shrink."""
    fast = Link(host=400e9, hop_seconds=5e-6, gpu=400e9, gpus_per_host=8)
    for name in ENGINES:
        rows = predict(name, RESNET50, 0.098, NODE_400G, 8_000_000, 200)
        efficiencies = [row["efficiency"] for row in rows]
        assert efficiencies == sorted(efficiencies, reverse=True) and 0.8 < efficiencies[-1] < efficiencies[0] < 1
        better = [row["efficiency"] for row in predict(name, RESNET50, 0.098, fast, 8_000_000, 200)]
        assert all(b >= a for a, b in zip(efficiencies, better, strict=True))
        memory = [row["state_gib"] for row in rows]
        assert memory == sorted(memory, reverse=True) and (memory[0] > memory[-1]) == (name not in ("ddp", "zero0"))
        assert all(row["step_ms"] == pytest.approx(98 / row["efficiency"]) for row in rows)
    hidden, open_ = (predict(name, RESNET50, 0.098, NODE_400G, 8_000_000, 200)[-1] for name in ("ddp", "zero0"))
    assert hidden["efficiency"] > 0.99 > open_["efficiency"]


def test_fit_recovers_latency_and_bandwidth():
    sizes = [2.0**k for k in range(10, 25)]
    alpha, beta = fit(sizes, [5e-4 + 1e-9 * n for n in sizes])
    assert (alpha, beta) == (pytest.approx(5e-4), pytest.approx(1e-9))
    assert fit(sizes, [1e-9 * n for n in sizes])[0] == pytest.approx(0, abs=1e-9)


def test_times_are_those_of_the_slowest_rank():
    def action(rank: int) -> None:
        time.sleep(0.02 * rank)

    class Alone:
        device = torch.device("cpu")

        def barrier(self) -> None: ...

        def gather(self, seconds: float) -> list[float]:
            return [seconds, 1.0]

    assert scaling.seconds_of(lambda: action(0), Alone(), 2) == 1.0


@pytest.mark.slow
def test_bytes_of_every_engine_are_those_of_the_formulas(tmp_path, monkeypatch, capfd):
    """The whole command on two real ranks; and its tables keep what is counted, given and predicted apart."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = "--backbone test_resnet --image-size 32 --batch-size 2 --count-only --step-ms 50 --link-gbps 100"
    assert scaling.run([*arguments.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    sizes = Sizes(**result["sizes"])
    assert 4 * sizes.idle > 100_000 and sizes.trained > sizes.momentum > 400_000
    for name in ENGINES:
        moved, formula = result["here"]["engines"][name]["moved"], traffic(name, sizes)
        for kind in moved.keys() | formula.keys():  # flags, norms and paddings are a few KB
            assert moved.get(kind, 0) == pytest.approx(formula.get(kind, 0), abs=8_000), (name, kind)
    text = (tmp_path / "scaling.md").read_text()
    assert "Times: not measured" in text and "50.0 ms (given)" in text and "100 Gb/s per host" in text
    assert "## Predicted, not measured" in text and capfd.readouterr().out.strip() in text
    assert set(result["predicted"]) == set(ENGINES)
    picture = (tmp_path / "scaling.svg").read_text()
    assert picture.count("<polyline") == len(ENGINES) and "nan" not in picture


def test_mistakes_are_told(capsys):
    for arguments in (["--count-only"], ["--ranks", "1"]):
        with pytest.raises(SystemExit):
            scaling.parse(arguments)
        assert "expected 2 or more" in (errors := capsys.readouterr().err) or "needs --step-ms" in errors


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (scaling.run, [], "CUDA_VISIBLE_DEVICES= automix bench scaling --ranks 2"),
        (checkpoint.run, ["--ranks", "3"], "CUDA_VISIBLE_DEVICES= automix bench checkpoint --ranks 3"),
        (checkpoint.run, ["--ranks", "0"], "--ranks 0: expected 1 or more"),
        (checkpoint.run, ["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (memory.run, ["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_beside_one_gpu_is_refused(run, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        run(arguments)
    assert message in capsys.readouterr().err


def test_one_gpu_is_enough_for_the_benchmark_of_saving(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started = []
    monkeypatch.setattr(checkpoint, "run_on_ranks", lambda name, arguments, ranks: started.append(ranks) or 0)
    assert checkpoint.run([]) == 0 and started == [1]
