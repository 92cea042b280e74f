"""The kernel benchmark without a GPU: what it checks, writes and refuses."""

import json
import math
import xml.etree.ElementTree
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from automix_kernels import benchmark, benchmark_cases
from automix_kernels import benchmark_report as report
from automix_kernels.benchmark_cases import Shape, Work
from automix_kernels.benchmark_report import Machine, Row
from torch.utils._python_dispatch import TorchDispatchMode

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is the run of a machine without a GPU")
RESNET50 = Shape("resnet50", 256, 14, 1024, 512, 16)
SMALL = Shape("small", 4, 4, 16, 8, 2)


@pytest.fixture(autouse=True)
def keep_thread_count():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@without_gpu
def test_runs_on_the_cpu(tmp_path, capsys):
    arguments = ["--shapes", "cifar_resnet18", "--seconds", "0.01", "--out", str(tmp_path)]
    assert benchmark.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "No GPU here" in printed
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["device"].startswith("CPU") and result["copy_bytes_per_s"] is None
    rows = result["rows"]
    assert {row["operation"] for row in rows} == {
        "mix attention", "blend nearest", "blend bilinear", "whole block nearest", "whole block bilinear", "normalize",
        "momentum update", "batch norm", "batch norm and shortcut",
    }  # fmt: skip
    timed = [row for row in rows if row["direction"] != "backward"]  # the difference of two times may come out negative
    assert all(row["ms"] > 0 and row["graph_ms"] is None and not row["note"] for row in timed)
    assert {row["shape"] for row in rows if row["operation"] == "mix attention"} == {"cifar_resnet18/4"}
    table = (tmp_path / "kernels.md").read_text()
    assert "| published | both |" in table and "| published | both |" in printed
    assert {target["met"] for target in result["targets"]} == {None}
    assert table.count("| not measured |") == len(result["targets"])
    assert not (tmp_path / "roofline.svg").exists() and not list(tmp_path.glob("*.tmp"))
    assert benchmark.run(["--tune"]) == 2


@without_gpu
def test_says_what_it_did_not_reach(tmp_path):
    assert benchmark.run(["--shapes", "cifar_resnet18", "--minutes", "0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["note"] for row in rows} == {"not reached"} and {row["ms"] for row in rows} == {None}
    assert {row["operation"] for row in rows} >= {"mix attention", "blend nearest", "momentum update"}


@without_gpu
def test_a_wrong_result_of_ours_fails_the_run(monkeypatch):
    monkeypatch.setattr(benchmark, "TOLERANCES", {4: 0})
    assert benchmark.run(["--shapes", "cifar_resnet18", "--operations", "attention", "--candidates", "published"]) == 0
    assert benchmark.run(["--shapes", "cifar_resnet18", "--operations", "attention", "--candidates", "ours"]) == 1


def measure(case, machine, names=None):
    return list(benchmark.measure_case(case, names or list(case.candidates), machine, 0.0, deadline=math.inf))


@without_gpu
def test_a_wrong_candidate_is_not_timed():
    case = benchmark_cases.attention_case(SMALL, "cpu", torch.float32)
    ours = case.candidates["ours"]
    case.candidates["ours"] = lambda inputs: ours({**inputs, "query_bias": 0 * inputs["query_bias"]})
    (row,) = measure(case, Machine("x", {}), ["ours"])
    assert row.ms is None and row.failed and "wrong" in row.note


class Products(TorchDispatchMode):
    """The types of what products are made of."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.convolution.default):
            self.types |= {each.dtype for each in arguments[:2]}
        return function(*arguments, **(keywords or {}))


@without_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("part", ["attention", "block"])
def test_the_published_way_makes_its_products_in_the_benchmarks_type(part, dtype):
    """In 16 bits it trains under autocast, which undoes its casts to float32; it is nearly exact all the same."""
    if part == "attention":
        case = benchmark_cases.attention_case(SMALL, "cpu", dtype)
    else:
        case = benchmark_cases.block_case(SMALL, "cpu", dtype, "nearest")
    inputs = case.draw(0)
    with Products() as products:
        case.candidates["published"](inputs)
    assert products.types == {dtype}
    assert [row.failed for row in measure(case, Machine("x", {}), ["published"])] == [False] * 3
    traced = torch.compile(case.candidates["published"], backend="eager", fullgraph=True)
    for ours, expected in zip(traced(inputs), case.candidates["published"](inputs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_bias_alone_is_checked():
    """A gradient of a single number is judged with another one, but not lost in it."""
    case = benchmark_cases.block_case(SMALL, "cpu", torch.float32, "nearest")
    inputs = case.draw(0)
    exact = benchmark.exact_result(case, inputs)

    def with_wrong_bias(inputs):
        bias = inputs["value_bias"]
        return case.candidates["ours"]({**inputs, "value_bias": bias.detach() + 2 * (bias - bias.detach())})

    benchmark.check(case, case.candidates["ours"], inputs, exact)
    with pytest.raises(ValueError, match="wrong"):
        benchmark.check(case, with_wrong_bias, inputs, exact)


@pytest.mark.parametrize("candidate", ["ours", "published", "rearranged"])
def test_the_block_mixes_two_draws_and_the_second_is_plain_near_the_ends(candidate):
    case = benchmark_cases.block_case(SMALL, "cpu", torch.float32, "bilinear")
    inputs = case.draw(0)
    inputs["lams"][1] = torch.tensor([0.05, 0.95, 0.5, 0.3])
    first, _, _, second, mean, _ = case.candidates[candidate](inputs)
    assert first.requires_grad and not second.requires_grad
    images = (inputs["images"].permute(0, 3, 1, 2) / 255 - inputs["mean"][:, None, None]) / inputs["std"][:, None, None]
    lam = inputs["lams"][1].view(-1, 1, 1, 1)
    mixup = lam * images + (1 - lam) * images[inputs["partners"][1]]
    torch.testing.assert_close(second[:2], mixup[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean[:2], 1 - lam[:2].flatten())
    assert not torch.allclose(second[2:], mixup[2:], atol=0.1)


def test_refuses_unknown_shapes_and_knows_other_names(capsys):
    with pytest.raises(SystemExit):
        benchmark.run(["--shapes", "resnet51"])
    error = capsys.readouterr().err
    assert "unknown shapes resnet51; choose from" in error and "usage: automix bench kernels" in error
    assert benchmark.parse(["--shapes", "convnext_tiny"]).shapes == ["deit_small"]
    assert set(benchmark.parse([]).shapes) >= {shape.label for shape in benchmark_cases.SHAPES}


def test_what_decides_is_measured_first():
    options = benchmark.parse([])
    steps = list(benchmark.plan(benchmark_cases.SHAPES, "cpu", torch.bfloat16, options))
    labels = [step.args[0].shape.label if step.func is benchmark.measure_case else "momentum" for step in steps]
    assert list(dict.fromkeys(labels))[:3] == ["resnet50/256", "cifar_resnet18/100", "momentum"]
    assert steps[0].args[0].operation == "whole block nearest" and steps[0].args[1] == ["ours"]
    last_of_ours = max(i for i, step in enumerate(steps) if step.args[1] == ["ours"] and labels[i] == "resnet50/256")
    assert all(step.args[1] == ["ours"] for step in steps[:last_of_ours])
    assert len(set(labels)) == len(benchmark_cases.SHAPES) + 1


def test_resnet50_has_its_parameters():
    sizes = benchmark_cases.resnet50_sizes()
    assert (len(sizes), sum(sizes)) == (161, 25_557_032)


def test_floor_takes_the_longer_of_bytes_and_flops():
    machine = Machine("x", {}, copy_bytes_per_s=2e12, matmul_flops_per_s=1e14)
    memory_bound, product_bound = Work("a", 1e9, 2e9), Work("b", 1e12, 1e6)
    assert machine.floor_ms([memory_bound]) == pytest.approx(1.0)
    assert machine.floor_ms([product_bound]) == pytest.approx(10.0)
    assert machine.floor_ms([memory_bound, product_bound]) == pytest.approx(11.0)
    read_twice = Work("c", 1e9, 2e9, bytes_read_again=1e9)
    assert machine.floor_ms([read_twice]) == pytest.approx(1.0)
    assert machine.floor_ms([read_twice], cached=False) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("operation", "forward", "backward"),
    [("attention", (51.4, 102.8), (102.8, 205.5)), ("blend", (115.6, 154.1), (115.6, 154.1))],
)
def test_bytes_are_counted_once_and_as_often_as_they_are_read(operation, forward, backward):
    """MB of ResNet-50, batch 256, one draw, bfloat16: the projection is 51.4, the uint8 images are 38.5."""
    build = {"attention": benchmark_cases.attention_case, "blend": benchmark_cases.blend_case}[operation]
    case = build(RESNET50, "cpu", torch.bfloat16, *(["nearest"] if operation == "blend" else []))
    for parts, expected in ((case.forward, forward), (case.backward, backward)):
        (work,) = parts
        counted = (work.bytes / 1e6, (work.bytes + work.bytes_read_again) / 1e6)
        assert counted == pytest.approx(expected, abs=0.06)


@without_gpu
def test_rows_have_both_floors():
    case = benchmark_cases.attention_case(SMALL, "cpu", torch.float32)
    rows = measure(case, Machine("x", {}, copy_bytes_per_s=1e9, matmul_flops_per_s=1e15), ["ours"])
    sizes = {row.direction: (row.floor_ms, row.uncached_floor_ms) for row in rows}
    projection = 1e3 * 4 * 16 * 8 * 4 / 1e9
    assert sizes["forward"] == pytest.approx((projection, 2 * projection))
    assert sizes["both"] == pytest.approx((3 * projection, 6 * projection))


def test_the_products_ceiling_is_that_of_the_benchmarks_own_type(monkeypatch):
    measured, before = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "randn", lambda *size, device, dtype=None: torch.ones([2] * len(size), dtype=dtype))

    def time_launched(calls, budget_s):
        measured.append((calls[0]().dtype, torch.get_float32_matmul_precision()))
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(benchmark, "time_launched", time_launched)
    for dtype in (torch.float16, torch.float32):
        benchmark.measure_ceilings(Machine("x", {}), dtype)
    assert measured[1::2] == [(torch.float16, "high"), (torch.float32, "high")]
    assert torch.get_float32_matmul_precision() == before
    names = [report.ceilings(Machine("x", {}, 1e12, 1e14, dtype=name)) for name in ("float16", "float32")]
    assert "float16 product" in names[0] and "tf32 product" in names[1]


def test_floor_of_the_whole_block():
    """ResNet-50, batch 256, two draws, at an H200's ceilings: 137 us forward and 132 us backward; without a cache 165
    and 151."""
    case = benchmark_cases.block_case(RESNET50, "cpu", torch.bfloat16, "nearest")
    product, copy = 790e12, 4.3e12
    positions, pixels = 256 * 196, 256 * 224 * 224 * 3
    projection = 2 * positions * 1024 * 512 / product  # more than its bytes take; the weights' gradient as well
    machine = Machine("x", {}, copy, product)
    for cached, expected in ((True, (137e-6, 132e-6)), (False, (165e-6, 151e-6))):
        two_products = 2 * 2 * positions * 196 * 512 / product  # of queries and keys
        attention = max(two_products, (1 if cached else 3) * positions * 512 * 2 / copy)  # queries, keys of two draws
        blend = pixels * ((1 if cached else 3) * 1 + 2 * 2) / copy  # images of bytes, and two of bfloat16
        blend_backward = pixels * ((1 if cached else 2) * 1 + 2) / copy
        attention_backward = max(1.5 * two_products, (2 if cached else 4) * positions * 512 * 2 / copy)
        forward, backward = projection + attention + blend, blend_backward + attention_backward + projection
        assert (forward, backward) == pytest.approx(expected, rel=0.01)
        assert machine.floor_ms(case.forward, cached) == pytest.approx(1e3 * forward, rel=0.01)
        assert machine.floor_ms(case.backward, cached) == pytest.approx(1e3 * backward, rel=0.01)


@without_gpu
def test_the_budget_sets_the_number_of_calls():
    calls = []
    benchmark.time_launched([lambda: calls.append(0)], budget_s=0.0)
    few = len(calls)
    benchmark.time_launched([lambda: calls.append(0)], budget_s=60.0)
    assert few < 20 and 500 <= len(calls) - few < 510


@without_gpu
def test_inputs_that_fit_into_the_cache_have_no_floor(monkeypatch):
    case = benchmark_cases.attention_case(SMALL, "cpu", torch.float32)
    size = sum(tensor.numel() * tensor.element_size() for tensor in case.draw(0).values())
    machine = Machine("x", {}, None, None, cache_bytes=10 * size)
    assert len(benchmark.buffer_sets(case, machine.cache_bytes)[0]) == 30
    assert not any(row.note for row in measure(case, machine, ["ours"]) if row.direction != "backward")
    monkeypatch.setattr(benchmark, "MAX_SETS", 5)
    assert {row.note for row in measure(case, machine, ["ours"]) if row.direction != "backward"} == {"from the cache"}


def test_after_a_failed_capture_no_graph_is_tried(monkeypatch):
    """And the stream is as before."""
    streams, before = [], SimpleNamespace(device_index=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: before)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (mock.Mock(),))

    def fail(calls, budget_s):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(benchmark, "time_in_graph", fail)
    machine = Machine("x", {})
    broken, next_one = Row("a", "b", "ours", "both", 1.0), Row("a", "b", "other", "both", 1.0)
    benchmark.add_graph_time(broken, [], machine, 0.0)
    benchmark.add_graph_time(next_one, [], machine, 0.0)
    assert broken.failed and "not permitted" in broken.note and streams == [before]
    assert not next_one.failed and next_one.note == "graph not tried after a b ours, both"
    assert broken.graph_ms is next_one.graph_ms is None
    machine.rows = [broken, next_one]
    assert "No CUDA graph after a b ours, both" in report.markdown(machine)


def test_ratios_are_of_like_times():
    own = Row("a", "b", "ours", "both", 0.2, 0.1, 0.3, 0.1)
    assert "3.00x as fast |" in report.table_line(Row("a", "b", "c", "both", 0.4, 0.3, 0.5, 0.3), own)
    assert "2.00x as fast, launched" in report.table_line(Row("a", "b", "c", "both", 0.4, 0.3, 0.5), own)
    assert "x as fast" not in report.table_line(Row("a", "b", "c", "both", note="too wide | narrow"), own)


def measured_machine(device="NVIDIA H200"):
    """Our blend reaches 90 and 80 % of the bandwidth, the block 0.4 ms in 9 launches."""
    block = Row("whole block nearest", "resnet50/256", "ours", "both", 0.5, graph_ms=0.4, launches=9)
    small = Row("whole block nearest", "cifar_resnet18/100", "ours", "both", 0.5, graph_ms=0.03)
    attention = Row(
        "mix attention", "resnet50/256", "ours", "both", 0.2, graph_ms=0.1, floor_ms=0.03, uncached_floor_ms=0.06
    )
    blends = [
        Row("blend nearest", "resnet50/256", "ours", direction, 1.0, graph_ms=0.04, floor_ms=0.03 * share,
            uncached_floor_ms=0.04 * share, flops=1e8, bytes=1.2e8, bytes_read_again=4e7)
        for direction, share in (("forward", 0.9), ("backward", 0.8))
    ]  # fmt: skip
    others = [
        Row("mix attention", "resnet50/256", name, "both", 0.4, graph_ms=ms)
        for name, ms in (("published", 0.9), ("rearranged", 0.25), ("flex-attention", None))
    ]
    momentum = [
        Row("momentum update", "25.6M", name, "forward", 0.1, graph_ms=ms, flops=7.5e7, bytes=3e8)
        for name, ms in (("ours", 0.08), ("definition", 0.2), ("foreach-lerp-without-skip", 0.07))
    ]
    rows = [block, small, attention, *blends, *others, *momentum]
    return Machine(device, {"torch": "2"}, 4.3e12, 7.9e14, dtype="bfloat16", rows=rows)


def test_targets_are_met_missed_or_not_measured():
    verdicts = {
        (target.operation, target.shape, target.wanted): target.met for target in report.targets(measured_machine())
    }
    met, missed = ([key for key, each in verdicts.items() if each is verdict] for verdict in (True, False))
    assert met == [
        ("whole block nearest", "resnet50/256", "at most 0.45 ms"),
        ("mix attention", "resnet50/256", "at most 1.7 floors, counted without a cache"),
        ("blend nearest, forward", "resnet50/256", "at least 0.85 of the copy bandwidth, counted without a cache"),
        ("momentum update", "25.6M", "as fast as definition"),
    ]
    assert missed == [
        ("whole block nearest", "cifar_resnet18/100", "at most 0.025 ms"),
        ("whole block nearest", "resnet50/256", "at most 6 launches"),
        ("mix attention", "resnet50/256", "3 times as fast as every alternative"),
        ("blend nearest, backward", "resnet50/256", "at least 0.85 of the copy bandwidth, counted without a cache"),
        ("momentum update", "25.6M", "as fast as foreach-lerp-without-skip"),
    ]
    table = report.targets_table(measured_machine())
    assert table.count("| met |") == 4 and table.count("| **missed** |") == 5 and table.count("| not measured |") == 7
    assert "2.50 times: rearranged, fastest of 2 measured" in table


def test_milliseconds_are_judged_on_the_device_that_they_were_aimed_at():
    verdicts = {(t.shape, t.wanted): t for t in report.targets(measured_machine("NVIDIA H100"))}
    limit = verdicts["resnet50/256", "at most 0.45 ms"]
    assert (limit.value, limit.found, limit.met) == (0.4, "0.4000 ms", None)
    assert verdicts["resnet50/256", "at most 1.7 floors, counted without a cache"].met


def test_floors_and_bandwidths_are_judged_in_the_type_that_they_were_aimed_at():
    machine = measured_machine()
    machine.dtype = "float16"
    counted = [target for target in report.targets(machine) if target.wanted.endswith("counted without a cache")]
    assert [target.value is None for target in counted] == [False, False, False, True, True]
    assert {target.met for target in counted} == {None}


def test_a_share_of_the_floor_is_of_what_must_be_moved():
    attention = measured_machine().find("mix attention", "resnet50/256", "ours", "both")
    assert "| 30 % |" in report.table_line(attention, None)


def test_roofline_shows_what_moves_bytes_too():
    svg = "{http://www.w3.org/2000/svg}"
    tree = xml.etree.ElementTree.fromstring(report.roofline_svg(measured_machine()))
    circles = tree.findall(f"{svg}circle")
    titles = {circle.find(f"{svg}title").text for circle in circles}
    assert titles == {
        "blend nearest resnet50/256 forward", "blend nearest resnet50/256 backward", "momentum update 25.6M forward"
    }  # fmt: skip
    _, _, width, height = map(float, tree.get("viewBox").split())
    assert all(0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height for circle in circles)


def test_compiled_candidates_stand_beside_their_case():
    """They are measured after those of other cases."""
    machine = Machine("x", {}, rows=[Row("a", "s/1", "ours", "both", 1.0), Row("b", "s/1", "ours", "both", 1.0)])
    machine.rows.append(Row("a", "s/1", "definition-compiled", "both", 2.0))
    lines = [line for line in report.markdown(machine).splitlines() if line.startswith(("| a |", "| b |"))]
    assert [line.split(" | ")[2] for line in lines] == ["ours", "definition-compiled", "ours"]
