"""The command `automix` as a user runs it: real processes, real .beton files of the embedded digits, real signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from ranks import ROOT, Command, free_port, own_process, rank_environment, records, run, run_ranks
from tiny import tiny_config

from automix_dist import checkpoint, cli, data
from automix_dist import evaluate as evaluate_module
from automix_dist import run as runs
from automix_dist.checkpoint_files import find_checkpoint, newest
from automix_dist.cli import main
from automix_dist.config import Config, ConfigError, to_dict
from automix_dist.errors import EXIT_STOPPED
from automix_dist.evaluate import evaluate
from automix_dist.metrics_file import is_finished, read_metrics
from automix_dist.run_folder import is_of_this_job, store_settings

AUTOMIX = [sys.executable, "-m", "automix_dist"]


def shards(folder: Path) -> list[str]:
    """The checksums of the newest checkpoint's files: weights, optimizer, momentum encoder, BatchNorm statistics."""
    return [entry["sha256"] for entry in newest(folder).manifest["files"]]


def interrupt(settings: Path, output: Path, number: int, after_step: int, *extra: str) -> None:
    """Train until metrics show `after_step`, send a signal, and expect a saved, orderly stop."""
    command = Command("train", settings, f"output={output}", "log.every_steps=1", "--resume", *extra)
    wait_for_step(command, output, after_step)
    command.signal(number)
    stopped = command.wait()
    assert stopped.returncode == EXIT_STOPPED, stopped.stderr
    assert "continue with --resume" in stopped.stderr


def wait_for_step(command: Command, output: Path, step: int = 1) -> None:
    """Until the metrics show a step, or the command ends."""
    while command.running():
        if (output / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(output, "train")):
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_interrupted_and_resumed_ends_bit_for_bit_like_undisturbed(settings, tmp_path):
    run("train", settings, f"output={tmp_path / 'through'}")
    broken = tmp_path / "broken"
    for number, after_step in ((signal.SIGINT, 7), (signal.SIGHUP, 20), (signal.SIGUSR1, 33)):
        interrupt(settings, broken, number, after_step)
        stopped = newest(broken).step
        assert after_step <= stopped < 60
    resumed = run("train", settings, f"output={broken}", "--resume")
    assert f"resuming from {broken}/checkpoints/step_{stopped:08d}, step {stopped}" in resumed.stderr
    assert shards(broken) == shards(tmp_path / "through")
    assert newest(broken).manifest["state"] == newest(tmp_path / "through").manifest["state"]

    evals = [[(r["step"], r["top1_query"]) for r in records(f, "eval")] for f in (broken, tmp_path / "through")]
    assert evals[0] == evals[1] and len(evals[0]) == 2
    steps = [r["step"] for r in records(broken, "train")]
    assert steps == sorted(set(steps))
    assert all(0 <= r["loader_wait"] < 1 and 0 < r["grad_norm"] < 1e3 for r in records(broken, "train"))

    best = newest(broken).manifest["state"]["best_step"]
    listed = run("checkpoint", "verify", broken).stdout
    assert listed.splitlines()[-1] == f"all {len(listed.splitlines()) - 1} whole"
    one = run("checkpoint", "verify", broken, "--step", best).stdout.splitlines()
    assert len(one) == 2 and one[0].startswith(f"step {best}:") and one[1] == "all 1 whole"
    assert "no checkpoint of step 1; it has" in run("checkpoint", "verify", broken, "--step", 1, code=1).stderr
    assert f"step {best}:" in listed and listed.count("  best") == 1

    elsewhere = ["--out", tmp_path / "elsewhere", "--ranks"]
    assert "--ranks 0: expected 1" in run("checkpoint", "reshard", broken, *elsewhere, 0, code=2).stderr
    again = run("train", settings, f"output={broken}", "--resume")  # a finished run is not disturbed
    assert "done: 60 steps" in again.stderr
    assert shards(broken) == shards(tmp_path / "through")


@pytest.mark.slow
def test_ctrl_c_saves_where_the_console_is_a_pipe_that_dies_first(settings, tmp_path):
    """As in `automix train ... 2>&1 | tee log`: the signal goes to both."""
    output, pipe = tmp_path / "run", 'trap : INT; "$@" 2>&1 | tee "$0" > /dev/null; exit "${PIPESTATUS[0]}"'
    command = [*AUTOMIX, "train", str(settings), "log.every_steps=1", "epochs=100"]
    shell = subprocess.Popen(["bash", "-c", pipe, tmp_path / "log", *command], cwd=ROOT, start_new_session=True)
    while shell.poll() is None and not ((output / "metrics.jsonl").exists() and records(output, "train")):
        time.sleep(0.05)
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.wait(timeout=120) == EXIT_STOPPED
    assert newest(output).step == records(output, "stopped")[-1]["step"] > 0


@pytest.mark.slow
def test_ctrl_c_after_all_is_saved_ends_at_once_as_stopped(settings, tmp_path):
    command = [*AUTOMIX, "train", str(settings), "log.every_steps=1", "epochs=100"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (
        (tmp_path / "run" / "metrics.jsonl").exists() and records(tmp_path / "run", "train")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "continue with --resume" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == EXIT_STOPPED


@pytest.mark.slow
def test_a_run_shorter_than_a_record_s_steps_has_one_and_tells_of_skipped_steps(settings, tmp_path):
    short = ["epochs=1", "log.every_steps=50", "optimizer.lr=1e30", "optimizer.mix_lr=1e30", "optimizer.min_lr=0"]
    result = run("train", settings, *short, "optimizer.warmup_epochs=0", "engine.max_skipped_steps=1000")
    (record,) = records(tmp_path / "run", "train")
    assert record["step"] == 15 and record["skipped_steps"] > 0
    assert f"done: 15 steps, {record['skipped_steps']:.0f} of them skipped as not finite" in result.stderr


@pytest.mark.slow
def test_a_terminal_that_is_closed_costs_nothing(settings, tmp_path):
    output, (ours, theirs) = tmp_path / "run", os.openpty()
    command = [*AUTOMIX, "train", str(settings), "log.every_steps=1", "epochs=100"]
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    while process.poll() is None and not ((output / "metrics.jsonl").exists() and records(output, "train")):
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(timeout=120) == EXIT_STOPPED
    assert newest(output).step == records(output, "stopped")[-1]["step"] > 0


@pytest.mark.slow
def test_two_ranks_train_stop_together_resume_and_evaluate_exactly(settings, tmp_path):
    output = tmp_path / "run"
    command = Command("train", settings, "engine.zero_stage=2", "log.every_steps=1", ranks=2)
    wait_for_step(command, output)
    command.signal(signal.SIGTERM, rank=1)  # one rank only: the other must learn of it
    errors = command.wait().stderr
    assert "stopped by SIGTERM" in errors, errors
    stopped = newest(output)
    assert stopped.manifest["world_size"] == 2 and len(stopped.manifest["files"]) == 2

    run("train", settings, "engine.zero_stage=2", "--resume", ranks=2)
    assert newest(output).step == 60
    one = json.loads(run("eval", output).stdout)
    two = json.loads(run("eval", output, ranks=2).stdout)
    assert one["images"] == two["images"] == 355
    for key, value in one.items():
        if key.startswith("top"):
            assert value * 355 == pytest.approx(round(value * 355))  # an exact count
            assert two[key] == value
    assert records(output, "eval")[-1]["top1_query"] == one["top1_query"]
    refused = run("eval", output, "--out", settings, code=1)  # before anything is evaluated
    assert f"--out '{settings}' is a file: expected a folder" in refused.stderr and not refused.stdout
    for refused in (["--cam", 0], ["--cam", 4, "--encoder", "ensemble"]):
        run("eval", output, "--out", tmp_path / "page", *refused, code=2)
        assert not (tmp_path / "page").exists()
    saved = find_checkpoint(output)
    first, second = run_ranks(2, evaluate, saved)
    assert first == second and {key: first[key] for key in two} == two
    (hidden,) = run_ranks(1, what_hides, saved)
    data = saved.manifest["config"]["data"]
    assert list(hidden) == list(data["mean"]) != list(data["std"])


def what_hides(saved) -> tuple[float, ...]:
    """The colour that an evaluation of this checkpoint hides parts of images with."""
    seen, evaluate_model = [], evaluate_module.evaluate_model
    evaluate_module.evaluate_model = lambda *arguments: seen.append(arguments[4]) or evaluate_model(*arguments)
    evaluate(saved)
    return seen[0]


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_back(settings, tmp_path):
    output = tmp_path / "run"
    short = ["epochs=1", "optimizer.warmup_epochs=0"]
    run("train", settings, *short, "engine.zero_stage=3", "checkpoint.every_steps=5", ranks=2)
    for step in (10, 15):
        shutil.rmtree(output / "checkpoints" / f"step_{step:08d}")
    resumed = run("train", settings, *short, "engine.zero_stage=0", "--resume")
    assert "step_00000005, step 5" in resumed.stderr and "engine.zero_stage: 3 -> 0" in resumed.stderr
    run("train", settings, "epochs=2", "engine.zero_stage=3", "--resume", ranks=2)
    assert newest(output).step == 30
    first, second = records(output, "changed")
    assert first["step"] == 5 and {"engine.zero_stage: 3 -> 0", "ranks 2 -> 1"} <= set(first["changes"])
    assert second["step"] == 15 and {"epochs: 1 -> 2", "ranks 1 -> 2"} <= set(second["changes"])
    losses = [r["loss"] for r in records(output, "train")]
    assert losses[-1] < losses[0]
    kept = (output / "config.yaml").read_text()
    refused = run("train", settings, *short, "--resume", code=2)
    assert "epochs = 1 is 15 steps; the run is at step 30" in refused.stderr
    assert (output / "config.yaml").read_text() == kept


@pytest.mark.slow
def test_a_run_goes_on_without_the_weights_that_it_began_with(settings, tmp_path):
    weights, started = tmp_path / "weights.safetensors", tmp_path / "first"
    short = ["epochs=1", "optimizer.warmup_epochs=0", "checkpoint.every_steps=10"]
    run("train", settings, *short, f"output={started}")
    run("export", started, weights)
    short.append(f"model.weights={weights}")
    assert f"parameters, at first those of '{weights}': " in run("train", settings, *short).stderr
    whole = shards(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000015")
    weights.unlink()
    assert "resuming from" in run("train", settings, *short, "--resume").stderr
    assert shards(tmp_path / "run") == whole
    assert str(weights) in run("train", settings, *short, f"output={tmp_path / 'new'}", "--resume", code=2).stderr


def test_a_run_is_not_overwritten_by_accident(settings, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "step_00000007").mkdir(parents=True)
    result = run("train", settings, code=1)
    assert "holds a run already (checkpoint of step 7)" in result.stderr and "--resume" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_two_processes_cannot_train_in_one_folder(settings, tmp_path):
    first = Command("train", settings, "log.every_steps=1", "epochs=100")
    wait_for_step(first, tmp_path / "run")
    second = run("train", settings, "--resume", code=1)
    assert f"another process ({os.uname().nodename}, process {first.processes[0].pid})" in second.stderr
    first.signal(signal.SIGINT)
    assert first.wait().returncode == EXIT_STOPPED


def failing(capsys, *arguments: str) -> str:
    """Run a command that must fail in this process; its message. No traceback, a non-zero exit."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code not in (0, None)
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert re.match(r"automix: error: [^\n]+\n$", errors), errors
    return errors


def test_mistakes_in_the_config_are_one_line(settings, capsys):
    assert "did you mean" in failing(capsys, "train", settings.with_name("confg.yaml"))
    assert "optimizer.lr?" in failing(capsys, "train", settings, "optimizer.lrr=1")
    assert "resnet18" in failing(capsys, "train", settings, "model={backbone: resnet81, timm_kwargs: {}}")
    message = failing(capsys, "train", settings, "batch_size=4000")
    assert "4000" in message and "480" in message
    with pytest.raises(SystemExit):
        main(["train", str(settings), "--resume", "--overwrite"])
    assert "--overwrite: not allowed with argument --resume" in capsys.readouterr().err
    assert "data.val" in failing(capsys, "train", settings, "data.val=")
    if not torch.cuda.is_available():
        assert "no GPU" in failing(capsys, "train", settings, "engine.device=cuda")
        assert "needs a GPU" in failing(capsys, "train", settings, "engine.kernels=triton")


def test_data_that_cannot_be_used(settings, digits, tmp_path, capsys):
    from automix_dist.prepare import prepare  # here: other files take fixtures from this one without the JPEG decoder

    missing, folder = tmp_path / "no.beton", tmp_path / "a folder"
    folder.mkdir()
    assert f"data.val = '{missing}' does not exist: write" in failing(capsys, "train", settings, f"data.val={missing}")
    message = failing(capsys, "train", settings, "data.train=data/no.beton")
    assert f"(looked for in {Path.cwd()}; paths are relative to the directory that the command runs in)" in message
    message = failing(capsys, "train", settings, f"data.train={digits}")
    assert f"data.train = '{digits}' is a folder: expected a .beton file" in message
    torn = tmp_path / "torn.beton"
    torn.write_bytes((digits / "train.beton").read_bytes()[:100_000])
    torn.with_name("torn.beton.json").write_bytes((digits / "train.beton.json").read_bytes())
    assert "torn.beton" in failing(capsys, "train", settings, f"data.train={torn}")
    assert "torn.beton" in failing(capsys, "verify", torn)
    assert "holds the images of data.train" in failing(capsys, "train", settings, f"data.val={digits / 'train.beton'}")
    part = tmp_path / "part of it.beton"
    shutil.copy(digits / "val.beton", part)
    manifest = json.loads((digits / "val.beton.json").read_text())
    manifest["source"] = json.loads((digits / "train.beton.json").read_text())["source"]
    manifest["options"]["holdout"] = 0.1
    part.with_name("part of it.beton.json").write_text(json.dumps(manifest))
    message = failing(capsys, "train", settings, f"data.val={part}")
    assert f"written from {manifest['source']!r}, with --holdout 0.1 and all of it: write both" in message
    assert "automix prepare '" in failing(capsys, "train", settings, f"data.val={folder}")
    classes = [*"9876543210", "ten"]
    prepare("digits", tmp_path / "other.beton", split="val", classes=classes, progress=False)
    message = failing(capsys, "train", settings, f"data.val={tmp_path / 'other.beton'}")
    assert "has the extra classes 'ten'" in message and f"--classes {digits / 'train.beton'}" in message


@pytest.mark.slow
def test_one_class_is_told(settings, tmp_path):
    for split, count in (("train", 32), ("val", 8)):
        run("prepare", f"synthetic:{count}x32@1", tmp_path / f"{split}.beton", "--write-mode", "raw")
    data = [f"data.{split}={tmp_path / split}.beton" for split in ("train", "val")]
    told = run("train", settings, *data, "epochs=1", "optimizer.warmup_epochs=0").stderr
    assert "has one class only" in told


def fail_without_heartbeat(config, console: Path) -> None:
    """On both ranks, each with a console of its own."""
    manifest = SimpleNamespace(classes=[], index_checksum="")
    runs.check_run = lambda *_: SimpleNamespace(train=manifest, val=manifest)
    runs._train = lambda _, process, *__: 1 / 0
    rank = os.environ["RANK"]
    with open(console / rank, "w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        with pytest.raises(ZeroDivisionError):
            runs.train(config)
        print("automix: error: what it was", file=sys.stderr)
        sys.stderr.flush()


def test_an_error_of_any_rank_is_on_the_console_without_a_heartbeat_too(tmp_path):
    config = tiny_config(output=str(tmp_path / "run"), engine={"stall_seconds": 0.0})
    run_ranks(2, fail_without_heartbeat, config, tmp_path)
    for rank in (0, 1):
        for path in (tmp_path / str(rank), tmp_path / "run" / "logs" / f"rank_{rank:05d}.log"):
            assert path.read_text().count("error: what it was") == 1, path


def fail_beside_a_slow_save(rank: int, port: int, settings: Path, output: Path) -> None:
    """Rank 1's data end with an error while both ranks are writing a checkpoint to a slow disk."""
    os.environ |= rank_environment(rank, 2, port)
    write, epoch = checkpoint.write_shard, data.TrainLoader.epoch

    def slowly(*arguments):
        time.sleep(3)
        return write(*arguments)

    def damaged(self, *arguments, **options):
        for number, batch in enumerate(epoch(self, *arguments, **options)):
            if number == 5 and rank == 1:
                raise data.LoaderError("damaged")
            yield batch

    checkpoint.write_shard, data.TrainLoader.epoch = slowly, damaged
    main(["train", str(settings), f"output={output}", "checkpoint.every_steps=4", "log.tensorboard=false"])


@pytest.mark.slow
def test_an_error_of_a_rank_does_not_cost_the_save_under_way(settings, tmp_path):
    port = free_port()
    ranks = [own_process(fail_beside_a_slow_save, rank, port, settings, tmp_path / "run") for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(timeout=100)
    assert all(each.exitcode for each in ranks)
    assert "failed in step 5, loading: damaged" in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    assert newest(tmp_path / "run").step == 4


@pytest.mark.slow
def test_records_that_a_crash_has_lost_are_made_again(settings, tmp_path):
    """Those of the last evaluation and checkpoint, whose files were on disk already."""
    output = tmp_path / "run"
    run("train", settings, "epochs=2")
    (result,), before = records(output, "eval"), shards(output)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text(
        "".join(each for each in lines if '"kind": "train"' in each or '"start"' in each)
    )
    assert not is_finished(read_metrics(output)[0])
    run("train", settings, "epochs=2", "--resume")
    (again,) = records(output, "eval")
    assert again["top1_query"] == result["top1_query"] and shards(output) == before
    assert is_finished(read_metrics(output)[0])


@pytest.mark.slow
def test_a_job_that_slurm_starts_again_discards_once(settings, tmp_path, monkeypatch):
    output, short = tmp_path / "run", ["optimizer.warmup_epochs=0", "--overwrite"]
    run("train", settings, "epochs=1", *short)
    assert json.loads((output / "environment.json").read_text())["slurm_job"] is None
    for job, count, resumes in (("7", "0", False), ("7", "1", True), ("8", "1", False)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        assert is_of_this_job(output) == resumes  # job 8 was ended, the first time, before it had discarded anything
        if not resumes:
            store_settings(output, Config(), dict.fromkeys(("classes", "index_checksums")) | {"environment": {}})
    assert is_of_this_job(output)
    command = [*AUTOMIX, "train", str(settings), "epochs=2", *short]
    started = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert started.returncode == 0 and "resuming from" in started.stderr, started.stderr
    assert [r["step"] for r in records(output, "start")] == [0, 15]


@pytest.mark.slow
def test_a_copied_run_goes_on_in_its_own_folder(settings, tmp_path):
    run("train", settings, "epochs=2")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    told = run("train", copy / "config.yaml", "--resume", "epochs=3", code=2).stderr
    assert f"leads to another folder: give {copy} itself" in told
    run("train", copy, "--resume", "epochs=3")
    assert (newest(copy).step, newest(tmp_path / "run").step) == (45, 30)
    run("train", copy, "--local_rank=0", "--print-config", ranks=2)  # which DeepSpeed's launcher adds


def test_a_foreign_log_is_not_written_over(settings, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    for flags in ([], ["--resume"], ["--overwrite"]):
        told = run("train", settings, "epochs=1", "optimizer.warmup_epochs=0", *flags, code=1).stderr
        assert f"{output}/metrics.jsonl is another program's" in told
    assert (output / "metrics.jsonl").read_text() == '{"loss": 1.0}\n'


def test_an_output_that_is_no_folder_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, what in (("file", "a file"), ("link", f"a link to {tmp_path}/nowhere, which is not there")):
        told = run("train", settings, f"output={tmp_path / name}", code=1).stderr
        assert f"output = '{tmp_path / name}' is {what}: expected a folder" in told


def test_an_output_folder_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("train", settings, f"output={tmp_path / 'file' / 'run'}", code=1)
    assert "cannot write to output" in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback(settings):
    result = run("train", settings, "batch_size=4000", "--debug", code=2)
    assert "Traceback" in result.stderr and "automix: error: batch_size = 4000" in result.stderr


def test_check_finds_what_training_would(settings, tmp_path):
    """Without a run's folder, and without training."""
    assert run("train", settings, "--check").stdout == ""
    assert "seed: 7" in run("train", settings, "--check", "--print-config", "seed=7").stdout
    for change, code, message in (
        ("data.train=none.beton", 1, "none.beton' does not exist"),
        ("data={crop: none, image_size: 64}", 2, "data.crop=none takes images of exactly that size"),
        ("model.backbone=resnet1000", 2, "is not a timm model"),
    ):
        assert message in run("train", settings, "--check", change, code=code).stderr
    assert not (tmp_path / "run").exists()


def test_a_home_folder_is_expanded(settings, tmp_path):
    text = run("train", settings, "--print-config", "output=~/x", "data.train=~/y", "model.weights=~/z").stdout
    assert "~" not in text and f"output: {Path.home()}/x\n" in text and f"train: {Path.home()}/y\n" in text


def test_print_config_is_a_config(settings, tmp_path):
    printed = run("train", settings, "--print-config", "seed=7").stdout
    (tmp_path / "printed.yaml").write_text(printed)
    again = run("train", tmp_path / "printed.yaml", "--print-config").stdout
    assert again == printed and yaml.safe_load(printed)["seed"] == 7
    other = run("train", settings, "--print-config", "model.backbone=resnet34")
    assert other.stderr.startswith(f"model.timm_kwargs of {settings} left out, as model.backbone is another one: {{")
    assert yaml.safe_load(other.stdout)["model"]["timm_kwargs"] == {}


def test_commands_on_a_run_that_is_not_there(tmp_path, capsys):
    assert "no such run" in failing(capsys, "eval", tmp_path / "nowhere")
    assert "no such run" in failing(capsys, "eval", tmp_path / "nowhere", "--corruptions", "contrast,")
    assert "--batch-size 0: expected 1 or more" in failing(capsys, "eval", tmp_path / "nowhere", "--batch-size", "0")
    both = ["--encoder", "ensemble", "--head", "mix"]
    assert "trained on clean images: remove --head mix" in failing(capsys, "eval", tmp_path / "nowhere", *both)
    assert "no such run" in failing(capsys, "checkpoint", "list", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint" in failing(capsys, "checkpoint", "list", tmp_path / "empty")
    assert "has no checkpoint" in failing(capsys, "export", tmp_path / "empty", tmp_path / "x.safetensors")
    assert "ends in .safetensors" in failing(capsys, "export", tmp_path / "empty", tmp_path / "x.pth")
    failing(capsys, "report", tmp_path / "nowhere")
    for name in ("x.png", "x.txt", "x"):
        assert "expected the page, a .html" in failing(capsys, "report", tmp_path / "nowhere", "--out", tmp_path / name)
    message = failing(capsys, "eval", tmp_path / "nowhere", "--epsilon", "4/255")
    assert "--epsilon 4/255 is the attack's: add --attack fgsm or pgd" in message
    for seconds in ("-1", "0", "nan"):
        assert "expected a positive number" in failing(capsys, "watch", tmp_path / "nowhere", "--seconds", seconds)
    assert "is not a dump: expected RUN/dumps/STEP" in failing(capsys, "replay", tmp_path / "nowhere")
    refused = failing(capsys, "checkpoint", "list", tmp_path / "empty", "--step", "3")
    assert "list takes no --step: it belongs to verify, reshard, to-safetensors" in refused
    assert "takes no --ranks" in failing(capsys, "checkpoint", "verify", tmp_path / "empty", "--ranks", "2")
    out = ["--out", tmp_path / "w.bin"]
    assert "ends in .safetensors" in failing(capsys, "checkpoint", "to-safetensors", tmp_path / "empty", *out)


def test_help_and_mistakes_answer_at_once():
    """Nothing heavy is imported before it is needed."""
    code = "import sys\nfrom automix_dist import cli\ncli._parser()\n"
    code += "heavy = {'torch', 'deepspeed', 'ffcv', 'timm', 'accelerate', 'numba'} & sys.modules.keys()\n"
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


BARE = """
import json, sys
from importlib import metadata
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
installed = metadata.version
def version(name):
    if name in ("automix-dist", "ffcv", "deepspeed"):
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.version = version
sys.modules["ffcv"] = sys.modules["deepspeed"] = None  # importing them says that they are not there
from automix_dist.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        print(f"-> {end.code}", file=sys.stderr, flush=True)
"""


def test_a_checkout_without_an_installation_says_what_is_missing(settings, tmp_path):
    """As on a machine where the checkout is on Python's path alone, with some of the packages."""
    commands = [
        ["prepare", "digits:4", str(tmp_path / "few.beton")],
        ["train", str(settings), "engine.name=deepspeed"],
        ["train", str(settings), "engine.name=ddp"],
        ["--version"],
    ]
    command = [sys.executable, "-c", BARE, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    prepared, no_engine, no_loader, version, _ = re.split(r"(?<=-> \d\n)", done.stderr)
    assert prepared.endswith("-> 0\n") and version == "-> 0\n" and "automix-dist 0." in done.stdout
    assert "deepspeed is not installed here" in no_engine and no_engine.endswith("-> 2\n")
    assert f"error: ffcv is not installed in {sys.prefix}: bash launch/install.sh" in no_loader
    assert "Traceback" not in no_loader and no_loader.endswith("-> 1\n")


@pytest.mark.parametrize(
    ("arguments", "command", "said"),
    [
        ("trian c.yaml", "[-h]", "there is no command 'trian'; did you mean train?"),
        ("train c.yaml --epochs 3", "train", "--epochs 3; settings are written key=value: epochs=3"),
        ("train --lr 0.1 c.yaml --batch-size=64", "train", "key=value: optimizer.lr=0.1, batch_size=64"),
        ("train c.yaml --momentum 0.8", "train", "automix.momentum=0.8 or optimizer.momentum=0.8"),
        ("train --config c.yaml", "train", "--config; the YAML file stands without a flag: c.yaml"),
        ("doctor c.yaml --zero-stage 3", "doctor", "key=value: engine.zero_stage=3"),
        ("train c.yaml --gpus 2", "train", "--gpus 2; settings are written key=value\n"),
        ("eval run --epochs 3", "eval", "unrecognized arguments: --epochs 3\n"),
    ],
)
def test_settings_written_as_options(arguments, command, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and errors.startswith(f"usage: automix {command} ") and said in errors


@pytest.mark.parametrize(
    "wrong",
    ["x", "x.beton --workers -4", "x.beton --quality 900", "x.beton --max-resolution 0", "x.beton --holdout 10"],
)
def test_options_of_prepare_that_cannot_be_used_are_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", "digits", *wrong.split()])
    assert caught.value.code == 2 and wrong.removeprefix("x.beton ") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_is_allocated_as_launchers_say_unless_the_user_says_otherwise(name, monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    users, found = {name: "backend:native"} if name else {}, {}
    with mock.patch.dict(os.environ, users):
        for other in set(names) - set(users):
            os.environ.pop(other, None)
        command = ("look", lambda options: found.update(os.environ) or 0, lambda parser: None, "at the environment")
        monkeypatch.setattr(cli, "COMMANDS", (command,))
        with pytest.raises(SystemExit):
            main(["look"])
    told = {each: found[each] for each in names if each in found}
    assert told == (users or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.slow
def test_changes_that_a_checkpoint_cannot_survive(settings, digits, tmp_path):
    told = run("train", settings, "epochs=1", "optimizer.warmup_epochs=0", "engine.accumulation_steps=2").stderr
    expected = (
        "training on 1 rank(s) on the CPU, 16 images x 2 micro batch(es) each, DeepSpeed ZeRO 0, float32, kernels"
    )
    assert told.splitlines()[0] == f"{expected} reference"
    expected = (
        "resnet18, N parameters, at first random: the Mix Block reads layer1 (automix.feature 1 of 0 to 4), 8 x 8 x 8"
    )
    assert re.sub(r"[\d,]+(?= parameters)", "N", told.splitlines()[1]) == expected
    kept = (tmp_path / "run" / "config.yaml").read_text()
    refused = run("train", settings, "--resume", "batch_size=16", code=2)
    assert "batch_size: 32 -> 16" in refused.stderr
    fewer = tmp_path / "fewer.beton"
    run("prepare", "digits:100", fewer)
    refused = run("train", settings, "--resume", f"data.train={fewer}", code=2)
    assert "has other images than those" in refused.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    moved = tmp_path / "moved.beton"  # as to a node's own disk
    for name in ("train.beton", "train.beton.json"):
        shutil.copy(digits / name, tmp_path / name.replace("train", "moved"))
    told = run("train", settings, "--resume", "epochs=1", "optimizer.warmup_epochs=0", "optimizer.lr=0.01",
               f"data.train={moved}")  # fmt: skip
    assert "optimizer.lr: 0.05 -> 0.01" in told.stderr

    # Other images to be evaluated on: the best so far was the best of others.
    others, once = tmp_path / "others.beton", ["epochs=1", "optimizer.warmup_epochs=0", f"data.train={moved}"]
    run("prepare", "digits:100", others, "--split", "val")
    told = run("train", settings, "--resume", *once, f"data.val={others}").stderr
    assert "other images than before: there is no best checkpoint yet" in told and "best top-1" in told
    assert newest(tmp_path / "run").manifest["config"]["data"]["val"] == str(others)
    # Labels that mean other classes than the model's.
    reversed_classes, renamed = tmp_path / "reversed.txt", tmp_path / "renamed.beton"
    reversed_classes.write_text("\n".join(reversed(newest(tmp_path / "run").manifest["classes"])))
    run("prepare", "digits:100", renamed, "--split", "val", "--classes", reversed_classes)
    assert "the model's classes in another order" in run("eval", tmp_path / "run", "--data", renamed, code=1).stderr
    # A run whose checkpoints were deleted to make room: what it has logged is no one's to delete.
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "what it logged is kept as lost_" in run("train", settings, *once).stderr
    assert next((tmp_path / "run").glob("lost_*_metrics.jsonl")).read_bytes() == before
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for wrong in ("data.workers=999", "data.image_size=64"):  # found late, by the loader
        run("train", settings, *once, "--overwrite", wrong, code=2)
    for path in kept.keys() - {tmp_path / "run" / "lock", tmp_path / "run" / "logs" / "rank_00000.log"}:
        assert path.read_bytes() == kept[path]
    run("train", settings, *once, "--overwrite")
    assert len(list((tmp_path / "run").glob("lost_*_metrics.jsonl"))) == 1


@pytest.mark.slow
def test_steps_that_are_not_finite_end_the_run_with_a_reason_and_a_dump(settings, tmp_path):
    result = run("train", settings, "optimizer.lr=1e30", "optimizer.min_lr=0", "optimizer.mix_lr=1e30", code=1)
    assert "steps in a row were not finite" in result.stderr and "Traceback" not in result.stderr
    (dump,) = (tmp_path / "run" / "dumps").iterdir()
    assert f"automix replay {dump}" in result.stderr
    replayed = run("replay", dump).stdout
    assert "first output that is not finite: " in replayed and "not finite again" in replayed
    assert "the dump has batches of ranks [0]" in run("replay", dump, "--rank", "3", code=1).stderr
    for other in (tmp_path / "run", dump.parent, dump.with_name("step_1")):
        assert f"{other} is not a dump: expected one of {dump}" in run("replay", other, code=1).stderr


@pytest.mark.slow
def test_a_signal_while_the_parts_are_built_is_not_lost(settings, tmp_path):
    command = [*AUTOMIX, "train", str(settings), "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    said = [process.stderr.readline()]  # what will run, and where: no engine yet
    process.send_signal(signal.SIGUSR1)
    said.append(process.communicate(timeout=120)[1])
    assert process.returncode == EXIT_STOPPED, said
    assert "at step 0" in said[1] and newest(tmp_path / "run") is None


@pytest.mark.slow
def test_full_disk_while_training(settings, tmp_path):
    """The run goes on without a checkpoint, says so, and fails at its end because the last one is missing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        result = run("train", settings, f"output={disk / 'run'}", "epochs=2", "log.tensorboard=false", code=1)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "NOT written" in result.stderr and "the last checkpoint, of step 30, could not be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_goes_on_under_a_version_with_more_settings():
    """What its checkpoint does not say was what is the default now."""
    config = tiny_config()
    about = {"config": to_dict(config), "index_checksums": {"train": "the same"}}
    saved = SimpleNamespace(manifest={"config": to_dict(config)}, folder="step_00000010", step=10)
    del saved.manifest["config"]["data"]["repeats"], saved.manifest["config"]["engine"]["fused_batchnorm"]
    said = []
    about["environment"], about["classes"] = {"device": "cpu", "threads": 2, "world_size": 1}, ["a"]
    runs._check_continuation(saved, config, about, 20, said.append)
    assert not said
    saved.manifest["environment"], saved.manifest["classes"] = {"device": "cpu", "threads": 1, "world_size": 1}, ["b"]
    runs._check_continuation(saved, config, about, 20, said.append)
    assert said.pop().startswith("resuming with other class names")
    assert said.pop() == "resuming, but not bit for bit: threads of a rank 1 -> 2"
    del saved.manifest["environment"], saved.manifest["classes"]
    about["config"]["engine"]["fused_batchnorm"] = True
    changed = runs._check_continuation(saved, config, about, 20, said.append)
    assert changed == ["engine.fused_batchnorm: False -> True"]
    assert said == [f"resuming with another setting: {changed[0]}"]
    about["config"]["data"]["repeats"] = 2
    with pytest.raises(ConfigError, match=r"^data\.repeats: 1 -> 2: cannot change when resuming; put it back"):
        runs._check_continuation(saved, config, about, 20, said.append)
    about["config"]["seed"] = 5
    with pytest.raises(ConfigError, match=r"^data\.repeats: 1 -> 2, seed: 0 -> 5: cannot change .* put them back"):
        runs._check_continuation(saved, config, about, 20, said.append)
