"""The step benchmark: what it counts is right, it tells slower from noise, and no step of ours waits for the device.
No timing is judged."""

import dataclasses
import json
import time
import xml.etree.ElementTree

import pytest
import torch
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone
from automix_dist.bench import step as bench
from automix_dist.bench.published import PublishedStep
from automix_dist.draws import draw_step
from automix_dist.momentum import MomentumUpdate


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    ways = ["vanilla", "AutoMix, one backward", "AutoMix, cut", "published, float32"]
    arguments = [
        "--networks",
        "cifar_resnet18",
        "--batch",
        "2",
        "--size",
        "16",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--ways",
        *ways,
    ]
    assert bench.run([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "step.json").read_text())
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == ways and not any(row["note"] for row in rows.values())

    for way in ways[:3]:
        assert rows[way]["host_reads"] == 0
    assert rows["published, float32"]["host_reads"] > 10
    # F forward, f of it up to the feature: vanilla 3F, AutoMix 9F, cut (8 + f) F; docs/throughput.md
    flops = {way: rows[way]["gflop_per_image"] / rows["vanilla"]["gflop_per_image"] for way in ways}
    assert flops["AutoMix, one backward"] == pytest.approx(3.0, abs=0.02)
    assert flops["AutoMix, cut"] == pytest.approx((8 + 0.758) / 3, abs=0.02)
    peaks = {way: rows[way]["peak_mib"] / rows["vanilla"]["peak_mib"] for way in ways}
    assert peaks["AutoMix, cut"] < 1.2 < 2 < peaks["AutoMix, one backward"]

    parts = result["parts"]["cifar_resnet18@16"]
    names = ["normalise", "feature pass", "projection", "attention", "mask loss", "blend"]
    for branch in ("mixed momentum", "clean query", "mixed query"):
        names += [f"{branch}, forward", f"{branch}, backward"]
    assert list(parts) == [*names, "optimizer", "momentum update"] and min(parts.values()) > 0

    table = (tmp_path / "step.md").read_text()
    assert table == bench.markdown(result) and table in capsys.readouterr().out
    drawing = xml.etree.ElementTree.parse(tmp_path / "step.svg").getroot()
    assert len(drawing.findall("{*}path")) == len(ways)

    for row in result["rows"]:
        row["ms"], row["ms_80"] = row["ms"] / 100, row["ms_80"] / 100
    (tmp_path / "before.json").write_text(json.dumps(result))
    arguments = [*arguments[:-4], "vanilla", "--compare", str(tmp_path / "before.json")]
    assert bench.run(arguments) == 1 and "vanilla: " in capsys.readouterr().out


def test_vanilla_flops_are_known():
    """ResNet-18 at 224: 1.814 G multiplications forward, three times that in a step but for the inputs of the stem."""
    case = bench.Case(bench.NETWORKS[0], 2, torch.device("cpu"), torch.float32)
    trained = bench.vanilla(case)
    counted = bench.counted_flops(lambda: trained.step(0)) / 2
    stem = 2 * 7 * 7 * 3 * 64 * 112**2
    assert counted == pytest.approx(3 * 2 * 1.814e9 - stem, rel=1e-3)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("image_gradient", [False, True])
def test_convolutions_count_their_groups(groups, image_gradient):
    images = torch.randn(2, 8, 5, 5, requires_grad=image_gradient)
    layer = torch.nn.Conv2d(8, 16, 3, groups=groups, bias=False)
    forward = 2 * (2 * 16 * 3 * 3) * (8 // groups) * 3 * 3
    assert bench.counted_flops(lambda: layer(images).sum().backward()) == forward * (2 + image_gradient)


def test_the_fused_attention_counts_as_its_definition():
    block = [torch.randn(3, 16, 8, requires_grad=True), torch.randn(3, 16), torch.randperm(3), torch.rand(3)]
    operator = torch.ops.automix.mix_attention
    fused = bench.counted_flops(lambda: operator(*block, None, None, None, None)[0].sum().backward())
    scores = 2 * 3 * 16 * 16 * 8
    assert fused == pytest.approx(4 * scores, rel=0.01)


def test_the_published_step_is_the_same_method():
    """Its losses equal ours, which tests/test_reference.py holds against recordings of the published code."""
    network = bench.NETWORKS[-1]
    config = network.config(feature_pass="full")
    torch.manual_seed(0)
    ours = AutoMix(create_backbone(config.model, -2, 32), 10, config.automix).train()
    theirs = PublishedStep(create_backbone(config.model, -2, 32), 10, config.automix).train()
    theirs.query.load_state_dict(ours.query.state_dict())
    theirs.momentum.load_state_dict(ours.momentum.state_dict())
    block = ours.mix_block
    with torch.no_grad():
        for weight in (block.query_weight, block.value_weight):
            weight.normal_(std=0.1)  # at 0.3 what cancels in their softmax is so large that float32 loses 3 digits
        theirs.projection.weight.copy_(block.query_weight[:, :, None, None])
        theirs.projection.bias.copy_(block.query_bias)
        theirs.value.weight.copy_(block.value_weight[:, :, None, None])
        theirs.value.bias.copy_(block.value_bias)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (6,))
    pixels = ((images / 255 - ours.mean) / ours.std).permute(0, 3, 1, 2).contiguous()
    for step in range(3):
        draws = draw_step(config.automix, 6, seed=1, step=step)
        lams = [float(draw.lam[0]) for draw in draws[:2]]
        loss = theirs(pixels, labels, lams, torch.stack([draw.partner for draw in draws[:2]]))
        expected = ours(images, labels, draws, config.automix.mask_loss_weight).total
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    gradient = block.query_weight.grad
    torch.testing.assert_close(theirs.projection.weight.grad.squeeze(), gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"feature_pass": "cut", "upsampling": ["bilinear"], "mask_adjust": 1.0}])
@pytest.mark.parametrize("immediate", [False, True])
def test_no_step_waits_for_the_device(settings, immediate):
    config = tiny_config(automix=settings, engine={"immediate_backward": immediate})
    model = tiny_model(config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, fused=True)
    update = MomentumUpdate(model)
    images, labels = micro_batch(0, 0, 8)

    def step() -> None:
        model(images, labels, rank_draws(config, 0, 0, 8), 0.1).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        update(0.99)

    step()
    with bench.HostReads() as reads:
        step()
    assert reads.found == {}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
    ],
)
def test_waiting_is_noticed(wait):
    with bench.HostReads() as reads:
        wait(torch.randn(5))
    assert sum(reads.found.values()) >= 1


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu():
    case = bench.Case(bench.NETWORKS[-1], 8, torch.device("cuda"), torch.bfloat16)
    trained = bench.policy(case)
    trained.step(0)
    assert bench.host_reads(lambda: trained.step(1), case.device) == 0


def test_a_failure_is_a_reason_not_a_gap():
    def broken(case):
        raise RuntimeError("no such luck\nat all")

    case = bench.Case(bench.NETWORKS[-1], 2, torch.device("cpu"), torch.float32)
    rows = bench.measure(case, [bench.Way("broken", broken), bench.Way("vanilla", bench.vanilla)], 1, 1)
    assert rows[0].note == "failed: RuntimeError: no such luck" and rows[0].ms is None
    assert rows[1].ms > 0 and rows[1].note == ""
    assert [row.ms for row in bench.measure(case, [bench.Way("broken", broken)], 1, 1)] == [None]
    machine = {"device": "abacus", "versions": {}, "load_average": 0.0, "date": "2026-01-01"}
    result = {"machine": machine, "gpu": False, "dtype": "float32", "rounds": 1, "steps": 1, "parts": {}}
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    assert "no such luck" in bench.markdown(result) and bench.bars_svg(result).count("<path") == 1
    result["rows"] = result["rows"][:1]
    assert bench.bars_svg(result).count("<path") == 0, "without a vanilla step there are no ratios"


@pytest.mark.slow
def test_every_way_runs():
    """What cannot, on this network, is a policy that needs another one, and says so."""
    network = bench.Network("tiny", "test_resnet", -2, 32, 4, classes=10)
    case = bench.Case(network, 4, torch.device("cpu"), torch.float32)
    ways = [way for way in bench.WAYS if not way.twin and way.name != "attentivemix"]
    rows = {row.way: row for row in bench.measure(case, ways, 1, 1)}
    notes = {name: row.note for name, row in rows.items() if row.note}
    assert set(notes) <= {"AutoMix, cut, joint query", "transmix"}, notes
    assert all(note.startswith("not for this network: ") for note in notes.values()), notes
    waiting = {name for name, row in rows.items() if row.host_reads}
    assert waiting <= {"published, float32", "published, autocast"}, "no policy of ours waits for the device"
    assert rows["inexact: query's features"].gflop_per_image < rows["AutoMix, cut"].gflop_per_image


def result_of(**milliseconds: tuple[float, float, float] | None) -> dict:
    rows = []
    for way, times in milliseconds.items():
        low, middle, high = times or (None, None, None)
        row = {"network": "n", "way": way, "batch": 4, "ms": middle, "ms_20": low, "ms_80": high, "note": "failed"}
        rows.append(row)
    return {"rows": rows}


def test_comparing_tells_a_change_from_noise():
    before = result_of(a=(9, 10, 11), b=(9, 10, 11), c=(9, 10, 11), d=(9.9, 10, 10.05), e=(9, 10, 11))
    after = result_of(a=(10, 12, 13), b=(14, 15, 16), c=(5, 6, 7), d=(10.1, 10.2, 10.3), new=(1, 1, 1))
    text, slower = bench.compare(after, before)
    assert text == "n, b: 10.00 -> 15.00 ms, slower by 50.0%\nn, c: 10.00 -> 6.00 ms, faster by 40.0%" and slower
    assert bench.compare(before, before) == ("nothing moved beyond the spread", False)
    assert bench.compare(result_of(new=(1, 1, 1)), before) == (
        "nothing in common: the same --networks, --batch and --ways can be compared", True
    )  # fmt: skip
    text, slower = bench.compare(result_of(a=None), before)
    assert "no figures any more" in text and slower


def test_clock():
    clock = bench.Clock(torch.device("cpu"))
    for name in ("start", "nap", "rest", "nap"):
        clock.mark(name)
        time.sleep(0.01)
    assert [name for name, _ in clock.spans()] == ["nap", "rest", "nap"]
    sums = clock.milliseconds()
    assert sums["nap"] >= 20 and sums["rest"] >= 10


@pytest.mark.parametrize(
    "arguments", [["--batch", "1"], ["--rounds", "0"], ["--size", "0"], ["--networks", "alexnet"], ["--ways", "magic"]]
)
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.run(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "expected" in error or "invalid choice" in error


def test_refuses_a_result_of_another_machine(tmp_path, capsys):
    for content in ("{}", "no JSON", json.dumps({"machine": {"device": "an abacus"}, "dtype": "float32"})):
        (tmp_path / "step.json").write_text(content)
        with pytest.raises(SystemExit):
            bench.run(["--compare", str(tmp_path / "step.json")])
    assert "measured on an abacus" in capsys.readouterr().err
