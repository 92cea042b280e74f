"""Weights & Biases and MLflow beside TensorBoard, with the real packages and without a network."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import mlflow
import numpy as np
import pytest
import wandb
from accelerate import PartialState
from PIL import Image
from test_run_log import events, open_log, random_gallery, read_strictly
from wandb.proto import wandb_internal_pb2

from automix_dist import run as runs
from automix_dist import trackers
from automix_dist.config import ConfigError
from automix_dist.config_file import from_dict, load_config
from automix_dist.gallery import gallery_picture

BOTH = ("wandb", "mlflow")
LOCAL = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No network, nothing of the user's environment, nothing left behind in this process or its current directory."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    wandb.teardown()
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
    PartialState._reset_state()
    assert not any(folder.iterdir())


def train(folder: Path, start_step: int, stop_step: int, **changes) -> None:
    """A record at every second step, an evaluation and a gallery at every tenth."""
    log = open_log(folder, start_step, **{"trackers": BOTH} | changes)
    for step in range(start_step + 2, stop_step + 1, 2):
        log.train(step, 0, {"loss": 1 / step, "lr": 0.1 if step != 4 else np.nan})
        if step % 10 == 0:
            log.evaluation(step, 0, {"top1": step / 100})
            log.gallery(step, random_gallery())
    log.close()


def wandb_records(path: Path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # too little for a record's head
            place += left
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_session(path: Path) -> tuple[object, dict, dict[int, dict]]:
    """What one session left: the run, its settings, and its values by step."""
    run, config, history = None, {}, defaultdict(dict)
    for record in wandb_records(path):
        if record.HasField("run"):
            run = record.run
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            history[record.history.step.num][key] = json.loads(item.value_json)
    return run, config, history


def wandb_files(folder: Path) -> list[Path]:
    """One for each session, in their order."""
    wandb.teardown()  # its process writes the last of them when it ends
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def mlflow_client(folder: Path, monkeypatch) -> mlflow.MlflowClient:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return mlflow.MlflowClient((folder / "mlruns").as_uri())


def mlflow_runs(client: mlflow.MlflowClient) -> list:
    experiment = client.get_experiment_by_name("automix-dist")
    return client.search_runs([experiment.experiment_id], order_by=["attribute.start_time"])


def history(client: mlflow.MlflowClient, run, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def test_wandb_gets_values_settings_and_pictures(tmp_path):
    train(tmp_path / "first", 0, 10, trackers=("wandb",), config={"optimizer": {"lr": 0.1}, "data": {"mean": [0.5]}})
    (path,) = wandb_files(tmp_path / "first")
    run, config, history = wandb_session(path)
    assert (run.project, run.display_name) == ("automix-dist", "first")
    assert config["optimizer"] == {"lr": 0.1} and config["data"] == {"mean": [0.5]}
    assert sorted(history) == [2, 4, 6, 8, 10]
    assert history[2]["train/loss"] == 0.5 and "train/memory_gib" in history[2]
    assert "train/lr" in history[2] and "train/lr" not in history[4]  # it was NaN
    both = history[10]
    assert (both["train/loss"], both["eval/top1"]) == (0.1, 0.1)
    with Image.open(path.parent / "files" / both["gallery/filenames"][0]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), gallery_picture(random_gallery()))


def test_mlflow_gets_values_settings_and_pictures(tmp_path, monkeypatch):
    config = {"optimizer": {"lr": 0.1}, "policy": {"settings": {}}, "data": {"crop": "", "mean": [0.5, 0.25]}}
    train(tmp_path / "first", 0, 10, trackers=("mlflow",), config=config)
    assert "MLFLOW_TRACKING_URI" not in os.environ  # another run of this process has a store of its own
    client = mlflow_client(tmp_path / "first", monkeypatch)
    (run,) = mlflow_runs(client)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {
        "optimizer.lr": "0.1",
        "policy.settings": "{}",
        "data.crop": "",
        "data.mean": "[0.5, 0.25]",
    }
    assert history(client, run, "train/loss") == [(step, 1 / step) for step in (2, 4, 6, 8, 10)]
    assert [step for step, _ in history(client, run, "train/lr")] == [2, 6, 8, 10]
    assert history(client, run, "eval/top1") == [(10, 0.1)]
    names = [each.path for each in client.list_artifacts(run.info.run_id, "images")]
    (name,) = [name for name in names if name.endswith(".png")]
    assert "gallery" in name and "step+10" in name
    with Image.open(client.download_artifacts(run.info.run_id, name, str(tmp_path))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), gallery_picture(random_gallery()))


def test_a_training_that_fails_is_shown_as_failed(tmp_path, monkeypatch):
    for failed in (False, True):
        folder = tmp_path / str(failed)
        log = open_log(folder, 0, trackers=BOTH)
        log.train(2, 0, {"loss": 1.0})
        log.close(failed)
        log.close()
        (run,) = mlflow_runs(mlflow_client(folder, monkeypatch))
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        (path,) = wandb_files(folder)
        ends = [record.exit.exit_code for record in wandb_records(path) if record.HasField("exit")]
        assert ends == [int(failed)]


def test_the_environment_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "flowers")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "birds")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(tmp_path / "run", 0, 2)
    assert wandb_session(wandb_files(tmp_path / "run")[0])[0].project == "flowers"
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
    assert run.info.run_name == "run"
    assert not (tmp_path / "run" / "mlruns").exists()


def test_a_resumed_training_goes_on_in_the_same_runs_and_a_new_one_does_not(tmp_path, monkeypatch):
    train(tmp_path, 0, 20)
    first = json.loads((tmp_path / "trackers.json").read_text())
    train(tmp_path, 20, 30, config={"optimizer": {"lr": 0.2}})  # a setting that may change
    assert json.loads((tmp_path / "trackers.json").read_text()) == first
    train(tmp_path, 0, 2)
    second = json.loads((tmp_path / "trackers.json").read_text())
    assert first.keys() == second.keys() == set(BOTH)
    assert all(first[name] != second[name] for name in BOTH)

    sessions = [wandb_session(path) for path in wandb_files(tmp_path)]
    assert [run.run_id for run, _, _ in sessions] == [first["wandb"], first["wandb"], second["wandb"]]
    assert [sorted(history)[-1] for _, _, history in sessions] == [20, 30, 2]
    assert sessions[1][1]["optimizer"] == {"lr": 0.2}

    client = mlflow_client(tmp_path, monkeypatch)
    runs = mlflow_runs(client)
    assert [run.info.run_id for run in runs] == [first["mlflow"], second["mlflow"]]
    assert [step for step, _ in history(client, runs[0], "train/loss")] == list(range(2, 31, 2))
    assert runs[0].data.params == {"optimizer.lr": "0.1"}


def test_a_tracker_chosen_at_a_resume_begins_its_run_there(tmp_path, monkeypatch):
    train(tmp_path, 0, 10, trackers=("wandb",))
    before = json.loads((tmp_path / "trackers.json").read_text())
    train(tmp_path, 10, 20)
    ids = json.loads((tmp_path / "trackers.json").read_text())
    assert ids == before | {"mlflow": mlflow_runs(mlflow_client(tmp_path, monkeypatch))[0].info.run_id}
    train(tmp_path, 0, 2, trackers=())
    assert not (tmp_path / "trackers.json").exists()


def test_what_wandb_has_already_is_not_sent_again(tmp_path, monkeypatch, capfd):
    train(tmp_path, 0, 30, trackers=("wandb",))
    monkeypatch.setattr(wandb.Run, "starting_step", 31)  # what its server answers
    train(tmp_path, 10, 40, trackers=("wandb",))
    steps = sorted(wandb_session(wandb_files(tmp_path)[1])[2])
    assert steps == [32, 34, 36, 38, 40]
    assert "monotonically" not in capfd.readouterr().err


def test_other_ranks_open_none(tmp_path):
    train(tmp_path / "run", 0, 10, is_main=False)
    assert not (tmp_path / "run").exists()


LOSE = """
import sys
from pathlib import Path
import psutil
sys.path.insert(0, {tests!r})
from test_run_log import random_gallery, open_log
folder = Path({folder!r})
log = open_log(folder, tensorboard=True, trackers=("wandb", "mlflow"))
for step in range(1, 41):
    if step == 11:
        for child in psutil.Process().children():
            child.kill()
            child.wait()
    if step == 21:
        (folder / "mlruns").rename(folder / "gone")  # in one step: MLflow's thread may be writing there
    log.train(step, 0, {{"loss": 1.0}})
    if step % 10 == 0:
        log.gallery(step, random_gallery())
log.close()
print("trained to the end")
"""


def test_a_tracker_that_is_lost_costs_one_line(tmp_path):
    """W&B's own process is killed in the middle, later MLflow's store is gone."""
    script = LOSE.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "trained to the end\n", done.stderr
    assert done.returncode == 0
    for label in ("W&B", "MLflow"):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"warning: cannot write {label} (")]
        assert line.endswith("); training goes on without")
    assert done.stderr.count("warning:") == 2
    assert [r["step"] for r in read_strictly(tmp_path / "run") if r["kind"] == "train"] == list(range(1, 41))
    assert [event.step for event in events(tmp_path / "run").Scalars("train/loss")] == list(range(1, 41))
    assert len(list((tmp_path / "run" / "gallery").iterdir())) == 4


def test_any_error_of_a_tracker_is_told_in_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def refuse(*_, step, **__):
        if step == 6:
            raise mlflow.MlflowException("the server\n  says no" + " and no" * 100)
        log_metrics(*_, step=step, **__)

    log_metrics = mlflow.log_metrics
    monkeypatch.setattr(mlflow, "log_metrics", refuse)
    train(tmp_path, 0, 20)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("warning: cannot write MLflow (the server says no and no")
    assert len(lines[0]) < 400
    assert sorted(wandb_session(wandb_files(tmp_path)[0])[2]) == list(range(2, 21, 2))


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        train(tmp_path, 0, 10, trackers=("mlflow",))
    assert capsys.readouterr().err.count("warning: cannot write MLflow (no answer within 1 s)") == 1
    assert len(read_strictly(tmp_path)) == 6
    assert not (tmp_path / "trackers.json").exists()


def test_a_server_that_stops_answering_does_not_hold_up_the_training(tmp_path, monkeypatch, capsys):
    answer = threading.Event()
    monkeypatch.setattr(trackers, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(mlflow, "log_metrics", lambda *_, **__: answer.wait())
    train(tmp_path, 0, 8, trackers=("mlflow",))
    assert capsys.readouterr().err.count("warning: cannot write MLflow (no answer within 1 s)") == 1
    assert len(read_strictly(tmp_path)) == 4
    client = mlflow_client(tmp_path, monkeypatch)
    assert mlflow_runs(client)[0].info.status == "RUNNING"
    answer.set()
    while mlflow_runs(client)[0].info.status != "FINISHED":
        time.sleep(0.01)


def without(package: str):
    """importlib.metadata.version of a machine on which a package is not installed."""

    def version(name: str) -> str:
        if name.startswith(package):
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    installed = metadata.version
    return version


@pytest.mark.parametrize(
    ("package", "setting", "remedy"),
    [
        ("wandb", "log.trackers = ['mlflow', 'wandb']", "remove it"),
        ("mlflow", "log.trackers = ['mlflow', 'wandb']", "remove it"),
        ("tensorboard", "log.tensorboard = True", "set it"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_starts(tmp_path, monkeypatch, package, setting, remedy):
    config = from_dict({"output": str(tmp_path / "run"), "log": {"trackers": ["mlflow", "wandb"]}})
    monkeypatch.setattr(metadata, "version", without(package))
    with pytest.raises(ConfigError) as caught:
        runs.train(config)
    install = f"{sys.executable} -m pip install {package}"
    assert str(caught.value).startswith(f"{setting}: {package} is not installed; {install}, or {remedy}")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"data\.train is not set"):  # the next check
        runs.train(config)


@pytest.mark.parametrize(("value", "expected"), [("[tensorboard]", "wandb, mlflow"), ("[wandb, wandb]", "each once")])
def test_what_is_no_choice_of_trackers_is_refused(value, expected):
    with pytest.raises(ConfigError, match=rf"log\.trackers.*{expected}"):
        load_config(None, [f"log.trackers={value}"])
