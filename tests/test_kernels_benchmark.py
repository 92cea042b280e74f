"""The kernel benchmark without a GPU: what it checks, writes and refuses."""

import json
import xml.etree.ElementTree

import pytest
import torch
from automix_kernels import benchmark


@pytest.fixture(autouse=True)
def keep_thread_count():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the run of a machine without a GPU")
def test_runs_on_the_cpu(tmp_path, capsys):
    operations = ["attention", "blend", "block", "momentum"]
    arguments = ["--shapes", "cifar_resnet18", "--seconds", "0.01", "--out", str(tmp_path), "--operations", *operations]
    assert benchmark.run(arguments) == 0
    assert "No GPU here" in capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["device"].startswith("CPU") and result["copy_bytes_per_s"] is None
    rows = result["rows"]
    assert {row["operation"] for row in rows} == {
        "mix attention", "blend nearest", "blend bilinear", "whole block", "momentum update"
    }  # fmt: skip
    assert all(row["ms"] > 0 and row["graph_ms"] is None and not row["note"] for row in rows)
    assert {row["shape"] for row in rows if row["operation"] == "mix attention"} == {"cifar_resnet18/4"}
    assert "published eager" in (tmp_path / "kernels.md").read_text()
    assert not (tmp_path / "roofline.svg").exists()
    assert benchmark.run(["--tune"]) == 2


def test_a_wrong_candidate_is_not_timed():
    case = benchmark.attention_case(benchmark.SHAPES[6], "cpu", torch.float32)

    def without_bias(inputs):
        return benchmark.attention_ours({**inputs, "query_bias": 0 * inputs["query_bias"]})

    machine = benchmark.describe_machine()
    assert "wrong" in benchmark.check(case, without_bias)
    assert all(
        row.ms is None and "wrong" in row.note for row in benchmark.measure(case, "x", without_bias, machine, 0.01)
    )


def test_refuses_unknown_shapes(capsys):
    with pytest.raises(SystemExit):
        benchmark.run(["--shapes", "resnet51"])
    assert "unknown shapes resnet51; choose from" in capsys.readouterr().err


def test_resnet50_has_its_parameters():
    assert (len(benchmark.resnet50_sizes()), sum(benchmark.resnet50_sizes())) == (161, 25_557_032)


def test_floor_takes_the_longer_of_bytes_and_flops():
    machine = benchmark.Machine("x", {}, copy_bytes_per_s=2e12, matmul_flops_per_s=1e14)
    memory_bound, product_bound = benchmark.Work(1e9, 2e9), benchmark.Work(1e12, 1e6)
    assert benchmark.floor_ms([memory_bound], machine) == pytest.approx(1.0)
    assert benchmark.floor_ms([product_bound], machine) == pytest.approx(10.0)
    assert benchmark.floor_ms([memory_bound, product_bound], machine) == pytest.approx(11.0)


def test_table_and_plot_of_measured_rows():
    row = benchmark.Row("mix attention", "a/1", "ours", "forward", 0.2, 0.1, 0.3, 0.1, 0.05, 3.0, 1e11, 1e9)
    slow = benchmark.Row("mix attention", "a/1", "eager", "forward", 0.4, 0.3, 0.5, 0.3, 0.05, 9.0, 1e11, 1e9)
    refused = benchmark.Row("mix attention", "a/1", "SDPA flash", "forward", note="RuntimeError: too wide")
    machine = benchmark.Machine("GPU", {"torch": "2"}, 4e12, 8e14, rows=[row, slow, refused])
    table = benchmark.markdown(machine)
    assert "| 50 % | 3 |" in table and "3.00x faster" in table and "RuntimeError: too wide" in table
    tree = xml.etree.ElementTree.fromstring(benchmark.roofline_svg(machine))
    assert len(tree.findall("{http://www.w3.org/2000/svg}circle")) == 1
