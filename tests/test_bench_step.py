"""The step benchmark: what it counts is right, it tells slower from noise, and no step of ours waits for the device.
No timing is judged."""

import dataclasses
import importlib
import itertools
import json
import time
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

import pytest
import torch
from test_captured_step import Tape
from tiny import micro_batch, rank_draws, tiny_config, tiny_model

from automix_dist.automix import AutoMix
from automix_dist.backbone import create_backbone, create_timm_model
from automix_dist.bench import step as bench
from automix_dist.bench import step_report, step_ways
from automix_dist.bench.published import PublishedStep
from automix_dist.captured_step import capture_steps
from automix_dist.config import IMAGENET_MEAN, IMAGENET_STD
from automix_dist.draws import draw_step
from automix_dist.momentum import MomentumUpdate

NETWORKS = {network.name: network for network in step_ways.NETWORKS}
TINY = step_ways.Network("tiny", "test_resnet", -2, 32, 4, classes=10)


def tiny_case(batch: int = 4) -> step_ways.Case:
    return step_ways.Case(TINY, batch, torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    ways = ["vanilla", "AutoMix, one backward", "AutoMix, cut", "published, float32"]
    arguments = [
        "--networks",
        "cifar_resnet18",
        "--batch-size",
        "2",
        "--image-size",
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
    assert table == step_report.markdown(result) and table in capsys.readouterr().out
    drawing = xml.etree.ElementTree.parse(tmp_path / "step.svg").getroot()
    assert len(drawing.findall("{*}path")) == len(ways)

    for row in result["rows"]:
        row["ms"], row["ms_80"] = row["ms"] / 100, row["ms_80"] / 100
    (tmp_path / "before.json").write_text(json.dumps(result))
    arguments = [*arguments[:-4], "vanilla", "--compare", str(tmp_path / "before.json")]
    assert bench.run(arguments) == 1 and "vanilla: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"channels_last": True},
        {"channels_last": True, "padded": True},
        {"channels_last": True, "graph": True},
        {"channels_last": True, "fused": True, "graph": True},
    ],
)
def test_vanilla_is_plain_training(how, monkeypatch):
    """Whatever the layout, padded or recorded: against a loop in the open."""
    monkeypatch.setattr(step_ways, "capture_steps", partial(capture_steps, recorder=lambda: Tape))
    case = tiny_case()
    torch.manual_seed(0)
    trained = step_ways.vanilla(case, **how)
    torch.manual_seed(0)
    model = create_timm_model(TINY.config().model, 32, 10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=TINY.config().optimizer.lr, momentum=0.9)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    for step in range(3):
        trained.step(step)
        pixels = ((case.images[step] / 255 - mean) / std).permute(0, 3, 1, 2)
        torch.nn.functional.cross_entropy(model(pixels), case.labels[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for got, expected in zip(trained.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_steps_that_alternate_are_measured_over_a_period():
    """Judging costs 2 F of (8 + f) F, in every second step 1 F on average; docs/throughput.md."""
    names = ["vanilla", "AutoMix, cut", "inexact: every second step judged", "inexact: Mix Block at rest"]
    rows = {row.way: row for row in bench.measure(tiny_case(), [w for w in step_ways.WAYS if w.name in names], 1, 1)}
    vanilla, cut, alternating, resting = (rows[name].gflop_per_image for name in names)
    assert (cut - alternating) / vanilla == pytest.approx(1 / 3, abs=0.01)
    assert (cut - resting) / vanilla == pytest.approx(2 / 3, abs=0.01)
    assert rows[names[2]].host_reads == 0 and rows[names[2]].peak_mib == pytest.approx(rows[names[1]].peak_mib, rel=0.1)


def test_a_period_takes_its_steps_in_turn():
    done = []

    def loss(number: int) -> torch.Tensor:
        done.append(number)
        return torch.zeros(1).requires_grad_()

    trained = step_ways.Trained(torch.nn.Identity(), loss, torch.optim.SGD([torch.zeros(1)]), period=3)
    trained.cycle(0)
    trained.cycle(1)
    assert done == [0, 1, 2, 3, 4, 5]


def test_what_decides_comes_first():
    groups = bench.groups(list(step_ways.WAYS))
    assert sorted(way.name for group in groups for way in group) == sorted(way.name for way in step_ways.WAYS)
    assert all(len(group) == 1 for group in groups if group[0].graph)
    first = [way.name for way in groups[0]]
    assert {"vanilla, channels-last", "AutoMix", "AutoMix, cut", "published, float32"} <= set(first)
    unasked = [way for way in step_ways.WAYS if way.unasked == "always"]
    assert bench.groups(unasked) == [unasked], "on a CPU all take turns"
    place = {way.name: index for index, way in enumerate(way for group in groups for way in group)}
    for way in step_ways.WAYS:
        assert not way.twin or place[way.twin] < place[way.name], "its FLOPs have been counted"


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path, monkeypatch):
    measure = bench.measure

    def ended(case, *arguments):
        if case.name == "resnet18@16":
            raise KeyboardInterrupt
        return measure(case, *arguments)

    monkeypatch.setattr(bench, "measure", ended)
    small = ["--image-size", "16", "--batch-size", "2", "--rounds", "1", "--steps", "1", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.run(["--networks", "cifar_resnet18", "resnet18", "--ways", "vanilla", *small])
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(row["network"], row["note"], bool(row["ms"])) for row in rows] == [
        ("cifar_resnet18@16", "", True), ("resnet18@16", "not reached", False)
    ]  # fmt: skip
    assert "| resnet18@16 | vanilla | 2 | not reached |" in (tmp_path / "step.md").read_text()


def test_minutes(tmp_path, monkeypatch):
    arguments = ["--networks", "cifar_resnet18", "--image-size", "16", "--batch-size", "2", "--minutes", "1e-9"]
    assert bench.run([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "step.json").read_text())
    assert {row["note"] for row in result["rows"]} == {"not reached"} and result["parts"] == {}

    ways = [way for way in step_ways.WAYS if way.name in ("vanilla", "vanilla, channels-last")]
    with monkeypatch.context() as patch:
        patch.setattr(bench.time, "monotonic", itertools.count().__next__)  # two ways are begun, then one more round
        rows = bench.measure(tiny_case(), ways, 5, 1, None, 2.5)
    assert [row.note for row in rows] == ["2 of 5 rounds"] * 2 and all(row.ms > 0 for row in rows)


def test_vanilla_flops_are_known():
    """ResNet-18 at 224: 1.814 G multiplications forward, three times that in a step but for the inputs of the stem."""
    case = step_ways.Case(NETWORKS["resnet18"], 2, torch.device("cpu"), torch.float32)
    trained = step_ways.vanilla(case)
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
    block[2:] = torch.stack([block[2], block[2]]), torch.rand(2, 3)
    both = bench.counted_flops(lambda: operator(*block, None, None, None, None)[0].sum().backward())
    assert both == pytest.approx(5 * scores, rel=0.01)


def test_the_published_step_is_the_same_method():
    """Its losses equal ours, which tests/test_reference.py holds against recordings of the published code."""
    network = NETWORKS["cifar_resnet18"]
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
        loss = theirs(pixels, labels, draws.lam[:, 0].tolist(), draws.partner)
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
    case = step_ways.Case(NETWORKS["cifar_resnet18"], 8, torch.device("cuda"), torch.bfloat16)
    trained = step_ways.policy(case)
    trained.step(0)
    assert bench.host_reads(lambda: trained.step(1), case.device) == 0


def test_a_failure_is_a_reason_not_a_gap():
    def broken(case):
        raise RuntimeError("no such luck\nat all")

    case = step_ways.Case(NETWORKS["cifar_resnet18"], 2, torch.device("cpu"), torch.float32)
    rows = bench.measure(case, [step_ways.Way("broken", broken), step_ways.Way("vanilla", step_ways.vanilla)], 1, 1)
    assert rows[0].note == "failed: RuntimeError: no such luck" and rows[0].ms is None
    assert rows[1].ms > 0 and rows[1].note == ""
    assert [row.ms for row in bench.measure(case, [step_ways.Way("broken", broken)], 1, 1)] == [None]
    machine = {"device": "abacus", "versions": {}, "load_average": 0.0, "date": "2026-01-01"}
    result = {"machine": machine, "gpu": False, "dtype": "float32", "rounds": 1, "steps": 1, "parts": {}}
    result |= {"rows": [dataclasses.asdict(row) for row in rows], "targets": []}
    assert "no such luck" in step_report.markdown(result) and step_report.drawing(result).count("<path") == 1
    result["rows"] = result["rows"][:1]
    assert step_report.drawing(result).count("<path") == 0, "without a vanilla step there are no ratios"


@pytest.mark.slow
def test_every_way_runs():
    """What cannot, on this network, is a policy that needs another one, and says so."""
    ways = [way for way in step_ways.WAYS if not way.twin and way.name != "attentivemix"]
    rows = {row.way: row for row in bench.measure(tiny_case(), ways, 1, 1)}
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
    text, slower = step_report.compare(after, before)
    assert text == "n, b: 10.00 -> 15.00 ms, slower by 50.0%\nn, c: 10.00 -> 6.00 ms, faster by 40.0%" and slower
    assert step_report.compare(before, before) == ("nothing moved beyond the spread", False)
    assert step_report.compare(result_of(new=(1, 1, 1)), before) == (
        "nothing in common: the same --networks, --batch-size and --ways can be compared", True
    )  # fmt: skip
    text, slower = step_report.compare(result_of(a=None), before)
    assert "no figures any more" in text and slower


def targets_of(device: str, network: str, **milliseconds: float) -> dict:
    """Of steps of 256 images; FLOPs are 10 and for AutoMix 30."""
    rows = [
        {"network": network, "way": way.replace("_", ", "), "ms": ms, "images_per_second": 256e3 / ms,
         "gflop_per_image": 30.0 if way.startswith("AutoMix") else 10.0}
        for way, ms in milliseconds.items()
    ]  # fmt: skip
    found = step_report.targets({"rows": rows, "machine": {"device": device}})
    return {(each["network"], each["what"]): (each["value"], each["met"]) for each in found}


def test_targets():
    steps = {
        "vanilla": 60.0,
        "vanilla_compiled": 40.0,
        "AutoMix": 130.0,
        "AutoMix_cut_compiled": 124.0,
        "published_float32": 400.0,
    }
    network, speed = "resnet50@224", "AutoMix over published, float32, images/s"
    found = targets_of("NVIDIA H200", network, **steps)
    assert found[network, "vanilla, images/s"] == (pytest.approx(6400), True)
    assert found[network, "AutoMix, images/s"] == (pytest.approx(256 / 0.124), True)
    assert found[network, step_report.TIME_RATIO] == (pytest.approx(3.1), True)
    assert found[network, speed] == (pytest.approx(400 / 124), True)
    assert found["cifar_resnet18@32", speed] == (None, None), "not measured"
    assert found[network, f"{step_report.TIME_RATIO}, over that of FLOPs"] == (None, None), "another machine"
    early = {way: ms for way, ms in steps.items() if way != "AutoMix_cut_compiled"}  # compiled: vanilla only, so far
    ratio, _ = targets_of("NVIDIA H200", network, **early)[network, step_report.TIME_RATIO]
    assert ratio == pytest.approx(130 / 60)
    suspect = targets_of("NVIDIA H200", network, vanilla=50.0, AutoMix=130.0)
    assert suspect[network, step_report.TIME_RATIO] == (pytest.approx(2.6), False), "vanilla is slow"
    assert suspect[network, speed] == (None, None)
    assert set(targets_of("NVIDIA H100", network, **steps).values()) == {(None, None)}
    on_cpu = targets_of("CPU, 2 threads", "n", vanilla=10.0, AutoMix=32.0)
    assert on_cpu.pop(("n", f"{step_report.TIME_RATIO}, over that of FLOPs")) == (pytest.approx(3.2 / 3), False)
    assert set(on_cpu.values()) == {(None, None)}


def test_verdicts_in_the_table():
    target = {"machine": "X", "network": "n", "what": "w", "value": 7000.0, "met": True, "least": 5000, "stretch": 7950}
    assert step_report._target_line(target) == "| X | n | w | at least 5,000 | 7,950 | 7,000 | met, stretch missed |"
    assert step_report._target_line(target | {"value": 8000.0}).endswith("8,000 | met, stretch too |")
    assert step_report._target_line(target | {"value": 4.0, "met": False}).endswith("4.00 | **missed** |")
    assert step_report._target_line(target | {"value": None, "met": None}).endswith("|  | not measured |")
    ratio = {"machine": "X", "network": "n", "what": "w", "value": 3.0, "met": True, "least": 2.9, "most": 3.15,
             "stretch": 3.05}  # fmt: skip
    assert step_report._target_line(ratio).endswith("| 2.9 to 3.15 | 3.05 | 3.00 | met, stretch too |")


def test_launches_have_a_column_where_they_were_counted():
    result = json.loads((Path(__file__).parent.parent / "docs/benchmarks/step.json").read_text())
    assert "launches" not in step_report.markdown(result)
    result["rows"][0]["launches"] = 2959
    result["rows"][1] = vars(bench.Row("resnet18@224", "AutoMix", 8))
    of_rows, _ = step_report.markdown(result).split("## Targets")
    header, _, first, reached_not, second, *_ = table = [x for x in of_rows.splitlines() if x.startswith("|")]
    assert header.endswith("| host reads | launches |") and first.endswith("| 0 | 2,959 |")
    assert bench.NOT_REACHED in reached_not and second.endswith("| 0 |  |")
    assert len({each.count("|") for each in table}) == 1


def test_the_published_table_is_made_from_its_json():
    folder = Path(__file__).parent.parent / "docs/benchmarks"
    result = json.loads((folder / "step.json").read_text())
    assert step_report.markdown(result) == (folder / "step.md").read_text()
    assert step_report.targets(result) == result["targets"]


def test_clock():
    clock = bench.Clock(torch.device("cpu"))
    for name in ("start", "nap", "rest", "nap"):
        clock.mark(name)
        time.sleep(0.01)
    assert [name for name, _ in clock.spans()] == ["nap", "rest", "nap"]
    sums = clock.milliseconds()
    assert sums["nap"] >= 20 and sums["rest"] >= 10


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "1"],
        ["--rounds", "0"],
        ["--image-size", "0"],
        ["--networks", "alexnet"],
        ["--ways", "magic"],
        ["--minutes", "0"],
    ],
)
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.run(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "expected" in error or "invalid choice" in error


@pytest.mark.parametrize("name", ["checkpoint", "loader", "memory", "scaling", "step", "throughput"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    module = importlib.import_module(f"automix_dist.bench.{name}")
    with pytest.raises(SystemExit) as stop:
        module.run([*["config.yaml"] * (name == "throughput"), "--out", str(tmp_path / "file" / "results")])
    assert stop.value.code == 2
    assert f"argument --out: {tmp_path}/file/results: Not a directory" in capsys.readouterr().err


def test_refuses_a_result_of_another_machine(tmp_path, capsys):
    for content in ("{}", "no JSON", json.dumps({"machine": {"device": "an abacus"}, "dtype": "float32"})):
        (tmp_path / "step.json").write_text(content)
        with pytest.raises(SystemExit):
            bench.run(["--compare", str(tmp_path / "step.json")])
    assert "measured on an abacus" in capsys.readouterr().err
