"""The loader benchmark at its smallest: what it measures, writes and refuses. No timing is judged."""

import io
import json
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from automix_dist import beton
from automix_dist.bench import loader, loader_candidates, loader_report

RATES = {"median", "min", "max"}
IN_THIS_PROCESS = ("ours, bicubic", "ours, plain JPEG", "DataLoader + PIL", "DataLoader + decode_jpeg")


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    # Each is a process that imports and compiles: of raw storage two will do, and some are tried in this one, below.
    apart = [each for each in loader.CANDIDATES if each.name not in IN_THIS_PROCESS]
    both_kinds = ("ours", "DataLoader + numpy.memmap")
    fewer = [each if each.name in both_kinds else replace(each, kinds=("jpg",)) for each in apart]
    monkeypatch.setattr(loader, "CANDIDATES", tuple(fewer))
    step = tmp_path / "step.json"
    step.write_text('{"images_per_second": 100, "device": "an abacus"}')
    out = tmp_path / "out"
    arguments = ["--images", "64", "--sizes", "jpg@96", "raw@96", "--rounds", "1", "--workers", "1"]
    arguments += ["--step-json", str(step), "--data", str(tmp_path / "data"), "--out", str(out)]
    assert loader.run(arguments) == 0
    result = json.loads((out / "loader.json").read_text())

    expected = [
        (storage, each.name)
        for storage in ("jpg@96", "raw@96")
        for each in loader.CANDIDATES
        if storage[:3] in each.kinds
    ]
    assert [(row["storage"], row["candidate"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        if row["note"]:  # an optional library, with the way to get it
            assert row["candidate"] in ("WebDataset + PIL", "DALI on the CPU") and "pip install" in row["note"], row
            continue
        assert [epoch["images"] for epoch in row["epochs"]] == [64]
        assert row["per_second"].keys() == row["per_cpu_second"].keys() == RATES
        assert 0 < row["anonymous_mib"] < row["rss_mib"]
    assert result["need"] == {"images_per_second": 100.0, "device": "an abacus"}
    assert result["machine"]["workers"] == 1 and result["machine"]["versions"]["torch"]

    table = (out / "loader.md").read_text()
    assert table == loader.markdown(result), "all of the table comes from loader.json"
    assert table in capsys.readouterr().out
    assert all(candidate in table for _, candidate in expected) and "an abacus asks for 100 images/s" in table
    drawing = xml.etree.ElementTree.parse(out / "loader.svg").getroot()
    measured = sum(not row["note"] for row in result["rows"])
    assert len(drawing.findall("{*}path")) == measured


def test_candidates_give_batches_of_images(tmp_path):
    job = loader.make_data(tmp_path, "jpg@96", 64, 1) | {"images": 64, "workers": 1}
    for candidate in (each for each in loader.CANDIDATES if each.name in IN_THIS_PROCESS):
        (batch,) = candidate.epoch_of(job)()
        assert batch.element_size() == 1 and sorted(batch.shape) == [3, 64, 224, 224], candidate.name
        assert batch.float().std() > 10  # pixels


@pytest.mark.slow
def test_reading_stays_within_a_memory_limit(tmp_path):
    """A file of four times the limit, which where possible is one of a control group: page cache included."""
    data = loader.make_data(tmp_path, "jpg@500", 64, 1)
    memory = loader.measure_memory(tmp_path, tmp_path / "jpg500_64" / "classes", 100, 1)
    assert memory["note"] == "" and memory["file_mib"] >= 4 * 100
    count = beton.read_manifest(tmp_path / "memory_100.beton").count
    assert memory["images"] == 2 * (count // 64 * 64)
    anonymous = [sample["RssAnon"] for sample in memory["samples"]]
    assert max(anonymous) - anonymous[0] < 100 and "RLIMIT_DATA" in loader_report.memory_text(memory)
    assert data["bytes"] == (tmp_path / "jpg500_64.beton").stat().st_size
    if memory["group_mib"] is None:
        pytest.skip("no control group can be made here: the page cache was not limited")
    assert 50 < memory["group_mib"] <= 100
    assert "page cache included, to 100 MiB" in loader_report.memory_text(memory)


def stored(path: Path) -> list[bytes]:
    index, whole = beton.read_index(path), path.read_bytes()
    starts = index.records["image"]["data_ptr"].tolist()
    return [whole[start : start + size] for start, size in zip(starts, index.sizes.tolist(), strict=True)]


def test_every_form_has_the_same_pixels(tmp_path):
    data = loader.make_data(tmp_path, "jpg@64", 64, 2)
    files = {path.stem: path.read_bytes() for path in (tmp_path / "jpg64_64" / "classes").glob("*/*.jpg")}
    plain, ours = stored(Path(data["plain"])), stored(Path(data["beton"]))
    assert [files[f"{i:06d}"] for i in range(64)] == plain != ours
    for pair in zip(plain, ours, strict=True):
        assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(each))) for each in pair))
    assert len(data["shards"]) == 2 * loader.SHARDS_PER_WORKER
    written = (tmp_path / "jpg64_64.beton").stat().st_mtime_ns
    assert loader.make_data(tmp_path, "jpg@64", 64, 2) == data
    assert (tmp_path / "jpg64_64.beton").stat().st_mtime_ns == written, "a file that is there is used again"


def test_a_failure_is_a_reason_not_a_gap(tmp_path):
    job = {"storage": "jpg@500", "candidate": "ours", "beton": str(tmp_path / "none.beton"), "workers": 1}
    contestant = loader.Contestant(job)
    for _ in range(2):
        contestant.ask()
        assert contestant.answer() is None
    contestant.close()
    assert "none.beton does not exist" in contestant.note


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    absent = loader_candidates.Candidate("of tomorrow", ("jpg",), loader.ours, "automix_absent.part", "automix-absent")
    broken = loader_candidates.Candidate("ours", ("jpg",), loader.ours)
    monkeypatch.setattr(loader, "CANDIDATES", (broken, absent))
    rows = loader.measure_storage("jpg@64", {"beton": str(tmp_path / "none.beton")}, 64, 1, 1)
    assert "does not exist" in rows[0]["note"] and "per_second" not in rows[0]
    assert rows[1]["note"] == "not installed (pip install automix-absent)"


def row(storage: str, candidate: str, rate: float) -> dict:
    epochs = [{"images": 1000, "wall_s": 500 / rate, "cpu_s": 1000 / rate}]
    return {"storage": storage, "candidate": candidate, **loader.summary(epochs)}


def test_targets():
    rows = [
        row("jpg@500", "ours", 300), row("jpg@500", "FFCV's Loader", 310), row("jpg@500", "DataLoader + PIL", 99),
        row("raw@256", "ours", 1000), {"storage": "raw@256", "candidate": "FFCV's Loader", "note": "failed"},
    ]  # fmt: skip
    met = {
        (each["storage"], each["opponent"], each["by"]): (each["ratio"], each["met"])
        for each in loader_report.targets(rows)
    }
    assert met == {
        ("jpg@500", "FFCV's Loader", "per_cpu_second"): (pytest.approx(300 / 310), False),
        ("jpg@500", "FFCV's Loader", "per_second"): (pytest.approx(300 / 310), False),
        ("jpg@500", "DataLoader + PIL", "per_cpu_second"): (pytest.approx(300 / 99), True),
        ("jpg@500", "DataLoader + decode_jpeg", "per_cpu_second"): (None, None),
        ("raw@256", "FFCV's Loader", "per_cpu_second"): (None, None),
        ("raw@256", "FFCV's Loader", "per_second"): (None, None),
        ("raw@256", "DataLoader + PIL", "per_cpu_second"): (pytest.approx(1000 / 99), True),
    }


def test_need_and_supply():
    rows = [row("jpg@500", "ours", 300), row("raw@256", "ours", 900)]  # in all, on two cores: 600 and 1,800
    text = loader_report.need_text({"rows": rows, "need": {"images_per_second": 1000.0, "device": "X"}})
    jpeg, raw = (line for line in text.splitlines() if "@" in line)
    assert "0.60 times that, not enough" in jpeg and "4.0 of its cores" in jpeg
    assert "1.80 times that, enough" in raw and "1.3 of its cores" in raw
    assert loader_report.need_text({"rows": rows, "need": None}).endswith("not measured.")


@pytest.mark.parametrize(
    "arguments",
    [["--images", "100"], ["--sizes", "png@500"], ["--rounds", "0"], ["--workers", "1000"], ["--memory-limit", "0"]],
)
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        loader.run(arguments)
    assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"images_per_second": 0}', '{"images_per_second": true}', "no JSON"])
def test_refuses_what_is_no_step_benchmark(tmp_path, text, capsys):
    (tmp_path / "step.json").write_text(text)
    with pytest.raises(SystemExit):
        loader.run(["--step-json", str(tmp_path / "step.json")])
    assert "step.json" in capsys.readouterr().err
