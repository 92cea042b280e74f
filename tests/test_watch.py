"""`automix watch` on the records of runs at every stage, torn lines included."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from test_report import STEPS, make_run

from automix_dist.recorded_run import ReportError
from automix_dist.watch import describe, watch

START = datetime(2026, 1, 1, tzinfo=UTC)


def append(run, **record) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_a_run_in_the_middle(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lines, finished = describe(run, START + timedelta(seconds=STEPS + 10))
    text = "\n".join(lines)
    assert not finished
    assert "training, last record 10 s ago" in text
    assert "step 120 of 240 (50%), epoch 6 of 12, 2 min 00 s left" in text  # one second a step
    assert "query 90.93 %" in text and "loss_mask 0.01" in text and "801 images/s" in text
    assert "checkpoint step 120, 10 s ago" in text
    assert "(silent)" in describe(run, START + timedelta(hours=1))[0][0] and "loader" not in text
    speed = {"images_per_second": 400.0, "loader_wait": 0.314}
    append(run, kind="train", step=121, epoch=6, time="2026-01-01T00:02:01Z", **speed)
    assert "400 images/s (waits for the loader 31%)" in "\n".join(describe(run, START)[0])


def test_trouble_is_told_and_torn_lines_are_not_read(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    moment = "2026-01-01T00:02:05Z"
    append(run, kind="straggler", step=121, time=moment, text="rank 3 on node7 is slow")
    append(run, kind="skipped", step=121, time=moment, images=2)
    values = {"loss": None, "skipped_steps": 4.0, "nonfinite": {"loss": "nan"}}
    append(run, kind="train", step=125, epoch=6, time=moment, **values)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 130, "ti')
    text = "\n".join(describe(run, START + timedelta(seconds=130))[0])
    for part in ("step 125 of", "loss nan", "4 steps", "2 training images", "rank 3 on node7 is slow"):
        assert part in text
    append(run, kind="none")
    append(run, kind="stopped", step=130, time=moment, signal=15)
    assert "stopped by SIGTERM; continue" in describe(run, START)[0][0]
    append(run, kind="stopped", step=130, time=moment, signal=14)
    assert "stopped by its time limit" in describe(run, START)[0][0]
    append(run, kind="failed", step=130, time=moment, error="no batch")
    assert describe(run, START)[0][0].endswith("failed: no batch")


def test_a_finished_run_ends_the_watch(tmp_path):
    shown = []
    watch(make_run(tmp_path / "run"), once=False, say=shown.append)
    assert len(shown) == 1 and "finished" in shown[0] and "left" not in shown[0]


def test_a_run_has_finished_when_its_last_checkpoint_is_there(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    append(run, kind="train", step=240, epoch=11, time="2026-01-01T00:04:00Z", loss=1.0)
    assert not describe(run, START + timedelta(seconds=250))[1]
    append(run, kind="checkpoint", step=240, time="2026-01-01T00:04:10Z")
    assert describe(run, START + timedelta(seconds=250))[1]


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ReportError, match="no such run"):
        watch(tmp_path / "nowhere", once=True)
    with pytest.raises(ReportError, match="neither"):
        watch(tmp_path, once=True)
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    assert describe(tmp_path, START) == ([f"{tmp_path}: nothing recorded yet"], False)
