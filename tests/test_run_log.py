"""The logs of a run: records, resume without gaps or doubles, failures that must not stop a training, the console."""

import fcntl
import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from automix_dist import gallery, metrics_file
from automix_dist.run_log import RunLog
from automix_dist.whole_file import whole_file


@pytest.fixture(autouse=True)
def no_process_state():
    yield
    PartialState._reset_state()


def random_gallery(pairs: int = 2, side: int = 8) -> gallery.Gallery:
    rng = np.random.default_rng(0)
    images, partners, mixed = rng.integers(0, 256, (3, pairs, side, side, 3), dtype=np.uint8)
    labels = np.arange(pairs)
    return gallery.Gallery(
        images=images,
        partners=partners,
        masks=rng.random((pairs, side, side), dtype=np.float32).astype(np.float16),
        mixed=mixed,
        lam=np.linspace(0.1, 0.9, pairs, dtype=np.float32),
        labels=labels,
        partner_labels=labels[::-1],
        sweep_masks=rng.random((3, side, side), dtype=np.float32).astype(np.float16),
        sweep_mixed=rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8),
        sweep_lam=np.linspace(0, 1, 3, dtype=np.float32),
    )


def open_log(folder: Path, start_step: int = 0, **changes) -> RunLog:
    options = {"is_main": True, "tensorboard": False, "config": {"optimizer": {"lr": 0.1}}}
    return RunLog(folder, start_step=start_step, **options | changes)


def train(folder: Path, start_step: int, stop_step: int, total_steps: int = 40) -> None:
    """A training with a record at every second step, an evaluation and a gallery at every tenth."""
    log = open_log(folder, start_step, tensorboard=True)
    log.start(total_steps, 10, start_step)
    for step in range(start_step + 1, stop_step + 1):
        log.step(step, 32)
        if step % 2 == 0:
            log.train(step, (step - 1) // 10, {"loss": 1 / step})
        if step % 10 == 0:
            log.evaluation(step, step // 10, {"top1_query": step / 100})
            log.gallery(step, random_gallery())
    log.close()


def read_strictly(folder: Path) -> list[dict]:
    """metrics.jsonl as a parser reads it that knows no NaN."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={IMAGES: 0})
    accumulator.Reload()
    return accumulator


def test_a_record_tells_when_where_and_how_fast(tmp_path):
    log = open_log(tmp_path)
    log.start(10, 5, 0)
    log.step(1, 32)
    log.step(2, 32)
    log.train(2, 0, {"loss": np.float32(0.5), "lr": 0.1})
    log.event("checkpoint", 2, seconds=np.float64(0.25), folder=Path("step_2"))
    log.close()
    start, record, checkpoint = read_strictly(tmp_path)
    assert (start["kind"], start["total_steps"], start["steps_per_epoch"]) == ("start", 10, 5)
    assert (record["kind"], record["step"], record["epoch"], record["loss"]) == ("train", 2, 0, 0.5)
    assert record["images_per_second"] > 0
    assert 0.01 < record["memory_gib"] < 1000
    assert (checkpoint["kind"], checkpoint["seconds"], checkpoint["folder"]) == ("checkpoint", 0.25, "step_2")
    assert abs(datetime.fromisoformat(record["time"]) - datetime.now(UTC)).total_seconds() < 60


def test_images_per_second_leaves_out_evaluations(tmp_path):
    log = open_log(tmp_path)
    log.start(10, 5, 0)
    for step in range(1, 7):
        time.sleep(0.01)
        log.step(step, 10)
        if step % 3 == 0:
            log.train(step, 0, {"loss": 1.0})
            time.sleep(0.5)
            log.evaluation(step, 0, {"top1": 0.5})
    log.close()
    first, second = (r["images_per_second"] for r in read_strictly(tmp_path) if r["kind"] == "train")
    assert second > first / 3  # 30 images in 0.03 s; with the evaluation it would be 0.53 s


def test_resume_leaves_no_gap_and_no_double(tmp_path):
    train(tmp_path, 0, 27)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 28, "lo')  # as a kill leaves it
    train(tmp_path, 20, 33)
    train(tmp_path, 30, 40)

    records = read_strictly(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(2, 41, 2))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, 30, 40]
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, 20, 30]
    assert [gallery.gallery_step(path) for path in gallery.gallery_files(tmp_path)] == [10, 20, 30, 40]

    board = events(tmp_path)
    assert [event.step for event in board.Scalars("train/loss")] == list(range(2, 41, 2))
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx([1 / s for s in range(2, 41, 2)])
    assert [event.step for event in board.Scalars("eval/top1_query")] == [10, 20, 30, 40]
    assert [event.step for event in board.Images("gallery")] == [10, 20, 30, 40]
    picture = Image.open(io.BytesIO(board.Images("gallery")[0].encoded_image_string))
    assert picture.size == (2 * 10, 4 * 10)  # two columns of pairs, four rows, a margin of one pixel around each
    assert "config/text_summary" in board.Tags()["tensors"]


def test_what_a_lost_run_has_logged_is_kept(tmp_path):
    train(tmp_path, 0, 20)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    metrics_file.set_aside(tmp_path)
    train(tmp_path, 0, 10)
    assert len(gallery.gallery_files(tmp_path)) == 1
    assert next(tmp_path.glob("lost_*_metrics.jsonl")).read_bytes() == before
    assert len(list(next(tmp_path.glob("lost_*_gallery")).iterdir())) == 2


def test_a_new_training_starts_from_nothing(tmp_path):
    train(tmp_path, 0, 20)
    train(tmp_path, 0, 10)
    assert [r["step"] for r in read_strictly(tmp_path) if r["kind"] == "train"] == [2, 4, 6, 8, 10]
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [2, 4, 6, 8, 10]
    assert len(gallery.gallery_files(tmp_path)) == 1


def test_numbers_that_are_not_finite_stay_json_and_are_seen(tmp_path, capsys):
    log = open_log(tmp_path, tensorboard=True)
    log.train(1, 0, {"loss": math.nan, "lr": 0.1})
    log.train(2, 0, {"loss": math.nan, "lr": math.inf})
    log.train(3, 0, {"loss": 1.0, "lr": 0.1})
    log.event("note", 3, value=np.float32("-inf"))
    log.train(4, 0, {"loss": math.nan, "lr": 0.1, "loss_mask": math.nan})
    log.close()
    first, second, third, note, _ = read_strictly(tmp_path)
    assert first["loss"] is None and first["nonfinite"] == {"loss": "nan"}
    assert second["nonfinite"] == {"loss": "nan", "lr": "inf"}
    assert "nonfinite" not in third
    assert note["value"] is None and note["nonfinite"] == {"value": "-inf"}
    said = capsys.readouterr().err
    assert said.count("loss is nan") == said.count("lr is inf") == said.count("loss, loss_mask are nan") == 1
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [3]


def test_other_ranks_are_silent(tmp_path, capfd):
    folder = tmp_path / "run"
    log = open_log(folder, is_main=False, tensorboard=True)
    log.start(10, 5, 0)
    log.step(1, 32)
    log.train(1, 0, {"loss": 1.0})
    log.evaluation(1, 0, {"top1": 0.5})
    log.event("checkpoint", 1, seconds=0.1)
    log.gallery(1, random_gallery())
    log.message("hello")
    log.close()
    assert not folder.exists()
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_costs_one_warning_a_log(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    log = open_log(tmp_path / "file" / "run", tensorboard=True)
    log.start(4, 2, 0)
    for step in range(1, 5):
        log.step(step, 8)
        log.train(step, 0, {"loss": 1.0})
        log.gallery(step, random_gallery())
    log.close()
    said = capsys.readouterr().err
    assert said.count("warning: cannot write metrics.jsonl") == 1
    assert said.count("warning: cannot write TensorBoard") == 1
    assert said.count("warning: cannot write the gallery") == 1


def test_records_are_kept_once_there_is_room(tmp_path):
    """The folder cannot be made when the log is opened."""
    (tmp_path / "run").write_text("")
    log = open_log(tmp_path / "run")
    log.start(4, 2, 0)
    (tmp_path / "run").unlink()
    log.train(2, 0, {"loss": 1.0})
    log.close()
    assert [record["step"] for record in read_strictly(tmp_path / "run")] == [2]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run_log import random_gallery, open_log
folder = Path({folder!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))  # a file takes this many bytes, then fails
log = open_log(folder, tensorboard=True)
log.start(100, 10, 0)
for step in range(1, 61):
    log.train(step, 0, {{"loss": 1.0, "lr": 0.1}})
    log.gallery(step, random_gallery(8, 32))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # somebody made room
for step in range(61, 64):
    log.train(step, 0, {{"loss": 1.0, "lr": 0.1}})
log.gallery(63, random_gallery(8, 32))
log.close()
print("trained to the end")
"""


def test_a_full_disk_does_not_stop_the_training(tmp_path):
    script = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "trained to the end\n", done.stderr
    for log in ("metrics.jsonl", "TensorBoard", "the gallery"):
        assert done.stderr.count(f"warning: cannot write {log}") == 1
    assert "Traceback" not in done.stderr
    records, unreadable = metrics_file.read_metrics(tmp_path)
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps[:3] == [1, 2, 3] and steps[-3:] == [61, 62, 63] and 10 < len(steps) < 40
    assert unreadable == 1  # what the disk took of the record that met its end
    assert [path.name for path in (tmp_path / "gallery").iterdir()] == ["step_00000063.npz"]


BAR = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run_log import open_log
log = open_log(Path({folder!r}))
log.start(40, 10, 20)
for step in range(21, 41):
    time.sleep(0.01)
    log.step(step, 32)
    if step % 5 == 0:
        log.train(step, 2, {{"loss": 0.123, "top1_train": 0.5}})
    if step == 30:
        log.message("a line from elsewhere")
        log.evaluation(step, 3, {{"top1_query": 0.9, "loss_query": 0.25}})
log.close()
"""


def test_progress_on_a_terminal(tmp_path):
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    script = BAR.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=terminal)
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(master, 65536)
        except OSError:  # the terminal is closed at its other end
            break
    assert process.wait(60) == 0
    lines = said.decode().replace("\r", "\n").splitlines()
    assert "a line from elsewhere" in [line.strip() for line in lines]
    assert any(line.startswith("step 30/40  epoch 3/4  top-1: query 90.00 %") for line in lines)
    bars = [line for line in lines if "|" in line]
    assert bars[0].startswith("epoch 2/4  50% |") and "20/40" in bars[0]
    assert bars[-1].startswith("epoch 4/4 100% |") and "40/40" in bars[-1]
    for part in ("loss 0.123", "top-1 50.00 %", "images/s", "00:00<"):
        assert part in bars[-1]


def test_progress_elsewhere_is_a_plain_line_now_and_then(tmp_path, capsys):
    log = open_log(tmp_path)
    log.start(2000, 100, 0)
    for step in range(1, 1001):
        log.step(step, 32)
        log.train(step, 0, {"loss": 0.5, "top1_train": 0.25})
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("step 1/2000  epoch 1/20  loss 0.500  train top-1 25.00 %")
    assert lines[0].endswith(" left")


def test_a_step_costs_next_to_nothing(tmp_path):
    """Counted in calls of functions, Python's and built-in ones: a few microseconds together."""
    log = open_log(tmp_path)
    log.start(100_000, 100, 0)
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    for step in range(10_000):
        log.step(step, 32)
    sys.setprofile(None)
    log.close()
    assert calls["call"] + calls["c_call"] < 10 * 10_000


def test_gallery_file_holds_what_it_was_given(tmp_path):
    given = random_gallery(pairs=3)
    path = gallery.write_gallery(tmp_path, 7, given)
    assert path == tmp_path / "gallery" / "step_00000007.npz"
    for most in (2, 3, 4):
        stored = gallery.read_gallery(path, most)
        for name, array in given._asdict().items():
            wanted = array if name.startswith("sweep_") else array[:most]
            np.testing.assert_array_equal(getattr(stored, name), wanted)
            assert getattr(stored, name).dtype == wanted.dtype


def test_a_gallery_whose_arrays_do_not_fit_is_refused(tmp_path):
    given = random_gallery()
    for name in gallery.Gallery._fields:
        spoiled = given._replace(**{name: getattr(given, name)[:1]})
        with pytest.raises(ValueError):
            gallery.read_gallery(gallery.write_gallery(tmp_path, 7, spoiled), 8)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="full"), whole_file(path) as file:
        file.write(b"half of it")
        raise OSError("disk full")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(IsADirectoryError, match=f"expected a file: '{tmp_path}'"), whole_file(tmp_path):
        pass


def test_mask_colors_run_from_the_image_over_white_to_the_partner():
    colors = gallery.mask_colors(np.array([-1, 0, 0.5, 1, 2, np.nan], np.float16))
    image, partner = gallery.IMAGE_COLOR, gallery.PARTNER_COLOR
    assert colors.tolist() == [[*image], [*image], [255, 255, 255], [*partner], [*partner], [*image]]


lines = st.one_of(
    st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["kind", "step"]), inner),
        max_leaves=4,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(lines, max_size=6))
def test_reading_survives_any_line(tmp_path_factory, foreign):
    folder = tmp_path_factory.mktemp("run")
    good = b'{"kind": "train", "step": 3}'
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*foreign, good, good[:-5]]))
    records, unreadable = metrics_file.read_metrics(folder)
    assert records[-1] == {"kind": "train", "step": 3}
    assert all(isinstance(r["kind"], str) and r["step"] >= 0 for r in records)
    assert unreadable >= 1
