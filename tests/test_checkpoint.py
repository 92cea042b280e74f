"""Checkpoints under mishaps: killed writers, damaged files, full disks. Whole ones stay, broken ones are skipped."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from engine_steps import (
    ENGINES,
    assert_same,
    engine_steps,
    save,
    save_after,
    start_engine,
    train_plain,
    whole_parameters,
)
from ranks import own_process, run_ranks
from tiny import tiny_config

from automix_dist import checkpoint, checkpoint_files, distributed, run_folder
from automix_dist.checkpoint import Checkpoints
from automix_dist.checkpoint_files import (
    CheckpointError,
    ShardReader,
    UnreadableError,
    committed_steps,
    find_checkpoint,
    load_module_state,
    newest,
    reshard,
    step_folder,
    verify,
)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 4, each written by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, save_two, tiny_config(engine={"zero_stage": 2}), folder)
    return folder


def save_two(config, folder: Path) -> None:
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    for first, last in ((0, 2), (2, 4)):
        engine_steps(config, process, model, engine, first, last)
        assert save(checkpoints, engine, last)


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["manifest.json", "shard_00000.safetensors", "shard_00001.safetensors"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(two_steps, tmp_path, name, damage):
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    damage(run / "checkpoints" / "step_00000004" / name)
    said = []
    assert newest(run, said.append).step == 2
    assert len(said) == 1 and f"step_00000004/{name}" in said[0]


def test_what_is_passed_over_is_told_beside_the_output(two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "run")
    damage_truncate(tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json")
    assert newest(tmp_path / "run").step == 2
    told = capsys.readouterr()
    assert told.out == "" and "step_00000004" in told.err


def test_the_best_checkpoint_is_asked_for(two_steps, tmp_path):
    with pytest.raises(CheckpointError, match="no evaluation up to step 4"):
        find_checkpoint(two_steps, best=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
        find_checkpoint(two_steps, 3)
    assert find_checkpoint(two_steps, 2).step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 99}, "format 99"),
        (lambda m: {k: v for k, v in m.items() if k != "files"}, "files"),
        (lambda m: [], "manifest"),
    ],
)
def test_manifests_of_another_making_are_refused(two_steps, tmp_path, change, message):
    folder = tmp_path / "step_00000004"
    shutil.copytree(two_steps / "checkpoints" / "step_00000004", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(CheckpointError, match=message):
        verify(folder)


def test_all_ranks_agree_on_the_whole_one(two_steps, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    damage_flip(run / "checkpoints" / "step_00000004" / "shard_00001.safetensors")
    assert run_ranks(2, agreed_step, tiny_config(engine={"zero_stage": 2}), run) == [2, 2]


def agreed_step(config, run: Path) -> int:
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(run, config.checkpoint, process, print)
    return checkpoints.load(engine, checkpoints.agree_on_newest())["step"]


KILL_POINTS = ["save_file", "_sha256", "sync", "sync#2", "sync#3", "commit", "rename"]


def save_and_die(config, folder: Path, point: str) -> None:
    """Save step 2 whole; die by SIGKILL at a point of saving step 4."""
    os.environ.update(RANK="0", WORLD_SIZE="1", CUDA_VISIBLE_DEVICES="")
    os.environ.pop("LOCAL_RANK", None)
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    engine_steps(config, process, model, engine, 0, 2)
    assert save(checkpoints, engine, 2)
    name, _, number = point.partition("#")
    owner = {"rename": Path, "commit": checkpoint}.get(name, checkpoint_files)
    original, calls = getattr(owner, name), []

    def deadly(*arguments, **keywords):
        calls.append(1)
        if len(calls) == int(number or 1):
            if name == "save_file":  # a torn file rather than none
                Path(arguments[1]).write_bytes(b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, deadly)
    engine_steps(config, process, model, engine, 2, 4)
    assert save(checkpoints, engine, 4)


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_while_saving_leaves_the_one_before(point, tmp_path):
    config = tiny_config()
    writer = own_process(save_and_die, config, tmp_path, point)
    writer.start()
    writer.join(timeout=120)
    assert writer.exitcode == -signal.SIGKILL
    assert committed_steps(tmp_path) == [2]
    assert newest(tmp_path).step == 2
    # The next run picks it up, saves the step again, and clears the leftovers away.
    (parameters,) = run_ranks(1, resume_and_prune, config, tmp_path)
    assert_same(parameters, train_plain(config, ranks=1, steps=4))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def resume_and_prune(config, folder: Path) -> dict[str, torch.Tensor]:
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    step = checkpoints.load(engine, checkpoints.agree_on_newest())["step"]
    engine_steps(config, process, model, engine, step, 4)
    assert save(checkpoints, engine, 4)
    state = load_module_state(newest(folder), "")
    return {name: state[name] for name, _ in engine.module.named_parameters()}


def rank_one_dies(config, folder: Path, results) -> None:
    """Rank 1 is killed while it writes its shard; rank 0 has long finished its own."""
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    engine_steps(config, process, model, engine, 0, 2)
    assert save(checkpoints, engine, 2)
    engine_steps(config, process, model, engine, 2, 4)
    if process.rank == 1:
        checkpoint_files.save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    assert save(checkpoints, engine, 4)


def test_one_killed_rank_publishes_nothing(tmp_path):
    """DeepSpeed's `latest` would point at a checkpoint that lacks this rank's shard."""
    with pytest.raises(AssertionError, match="rank 0 of 2 failed"):
        run_ranks(2, rank_one_dies, tiny_config(engine={"zero_stage": 2}), tmp_path, None, timeout=60)
    assert committed_steps(tmp_path) == [2]
    assert newest(tmp_path).step == 2


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A real file system of 600 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def train_while_saving(config, folder: Path) -> tuple[dict, dict, int]:
    """The disk answers only after two more steps of training."""
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    engine_steps(config, process, model, engine, 0, 2)
    at_save = whole_parameters(engine, folder / "before", process, config)
    disk, write = threading.Event(), checkpoint.write_shard
    checkpoint.write_shard = lambda *arguments: disk.wait(60) and write(*arguments)
    checkpoints.save(engine, {"step": 2}, {})
    engine_steps(config, process, model, engine, 2, 4)
    visible = len(committed_steps(folder))
    disk.set()
    assert checkpoints.wait()
    (result,) = checkpoints.finished()
    assert result.written and result.step == 2 and 0 < result.stall_seconds < result.seconds and result.bytes > 1000
    state = load_module_state(newest(folder), "")
    return at_save, {name: state[name] for name in at_save}, visible


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_training_goes_on_while_a_save_is_written_and_does_not_change_it(engine, tmp_path):
    for at_save, saved, visible in run_ranks(2, train_while_saving, tiny_config(engine=ENGINES[engine]), tmp_path):
        assert visible == 0
        assert_same(saved, at_save, tolerance=0.0)


def save_after_stalls(config, folder: Path) -> tuple[list[bool], list[str]]:
    """The disk of one rank, then of the other, answers after the patience of the checkpoint thread's group."""
    distributed.CHANNEL_TIMEOUT = timedelta(seconds=1)
    process, _, engine = start_engine(config)
    said = []
    checkpoints = Checkpoints(folder, config.checkpoint, process, said.append)
    write, outcomes = checkpoint.write_shard, []
    for step, stuck in enumerate((None, 0, None, 1, None)):
        slow = time.sleep if process.rank == stuck else lambda _: None
        checkpoint.write_shard = lambda *arguments, slow=slow: slow(2) or write(*arguments)
        outcomes.append(save(checkpoints, engine, step))
    distributed.finish()  # with the broken groups
    return outcomes, said


def test_a_disk_that_stalls_costs_one_save_and_not_the_later_ones(tmp_path):
    results = run_ranks(2, save_after_stalls, tiny_config(), tmp_path)
    assert all(outcomes == [True, False, True, False, True] for outcomes, _ in results)
    assert [line[:28] for line in results[0][1]] == ["checkpoint of step 1 NOT wri", "checkpoint of step 3 NOT wri"]
    assert newest(tmp_path).step == 4


def save_where_nothing_can_be_listed(config, folder: Path) -> tuple[bool, list[str]]:
    process, _, engine = start_engine(config)
    said = []
    checkpoints = Checkpoints(folder, config.checkpoint, process, said.append)

    def broken(root: Path) -> list[int]:
        raise OSError(errno.ESTALE, "Stale file handle")

    checkpoint.committed_steps = broken
    return save(checkpoints, engine, 1), said


def test_a_folder_that_cannot_be_listed_after_a_save_does_not_part_the_ranks(tmp_path):
    results = run_ranks(2, save_where_nothing_can_be_listed, tiny_config(), tmp_path)
    assert results == [(True, ["old checkpoints could not be removed: [Errno 116] Stale file handle"]), (True, [])]
    assert newest(tmp_path).step == 1


def reshard_both_ways(config, folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Continue from a checkpoint of two ranks that was written again for `ranks`."""
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    step = checkpoints.load(engine, checkpoints.agree_on_newest())["step"]
    engine_steps(config, process, model, engine, step, 6)
    return whole_parameters(engine, folder / "out", process, config)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resharded_checkpoint_goes_on_like_the_original(two_steps, tmp_path, ranks):
    reshard(newest(two_steps), tmp_path, ranks)
    saved = verify(tmp_path / "checkpoints" / "step_00000004")
    assert len(saved.manifest["files"]) == saved.manifest["world_size"] == ranks
    sizes = [entry["bytes"] for entry in saved.manifest["files"]]
    assert max(sizes) < 1.2 * min(sizes)
    shutil.copytree(two_steps / "checkpoints" / "step_00000004", tmp_path / "plain" / "checkpoints" / "step_00000004")
    config = tiny_config(engine={"name": "ddp"})
    outcomes = [run_ranks(1, reshard_both_ways, config, run, ranks)[0] for run in (tmp_path, tmp_path / "plain")]
    assert_same(*outcomes, tolerance=0.0)
    with pytest.raises(CheckpointError, match="exists already"):
        reshard(saved, tmp_path, ranks)


def test_a_resharded_checkpoint_knows_no_best_one_that_stays_behind(two_steps, tmp_path):
    saved = newest(two_steps)
    for best, known in ((2, None), (saved.step, saved.step), (None, None)):
        state = saved.manifest["state"] | {"best_step": best, "best_top1": 0.5 if best else -1.0}
        changed = replace(saved, manifest=saved.manifest | {"state": state})
        run = tmp_path / f"best_{best}"
        reshard(changed, run, 1)
        found = find_checkpoint(run).manifest["state"]
        assert (found["best_step"], found["best_top1"]) == (known, 0.5 if known else -1.0)


def test_a_reader_with_an_index_opens_what_it_reads_only(two_steps):
    saved = newest(two_steps)
    whole = ShardReader(saved)
    reader = ShardReader(saved, whole.index)
    assert not reader._files and reader.names("") == whole.names("")
    name = reader.names("buffer/")[0]
    assert torch.equal(reader.buffer_of(name, 1), whole.buffer_of(name, 1)) and list(reader._files) == [1]
    for name in reader.names("param/"):
        assert torch.equal(reader.tensor(name), whole.tensor(name))


def test_a_step_s_folder_is_no_run_but_names_it(two_steps):
    with pytest.raises(CheckpointError, match=rf"it is one; give the run's folder, {two_steps}, and --step 4"):
        find_checkpoint(two_steps / "checkpoints" / "step_00000004")


def fill_the_disk(config, folder: Path) -> tuple[list, list, list]:
    process, model, engine = start_engine(config)
    said = []
    checkpoints = Checkpoints(folder, config.checkpoint, process, said.append)
    engine_steps(config, process, model, engine, 0, 2)
    outcomes = [save(checkpoints, engine, 2)]
    ballast = folder / "ballast"
    if process.is_main:
        with pytest.raises(OSError):
            ballast.write_bytes(bytes(1 << 20))
    process.barrier()
    engine_steps(config, process, model, engine, 2, 4)
    outcomes.append(save(checkpoints, engine, 4))
    visible = sorted(p.name for p in (folder / "checkpoints").iterdir())
    process.barrier()
    if process.is_main:
        ballast.unlink()
    process.barrier()
    outcomes.append(save(checkpoints, engine, 4))
    return outcomes, visible, said


def test_a_full_disk_keeps_the_old_ones_and_training_goes_on(small_disk):
    for outcomes, visible, said in run_ranks(2, fill_the_disk, tiny_config(), small_disk):
        assert outcomes == [True, False, True]
        assert visible == ["step_00000002"]
        assert "step 4 NOT written" in said[0] and "o space left" in said[0]
        assert "earlier checkpoints are untouched" in said[0]
    assert newest(small_disk).step == 4


def save_where_it_cannot(config, run: Path) -> tuple[bool, list]:
    process, _, engine = start_engine(config)
    said = []
    return save(Checkpoints(run, config.checkpoint, process, said.append), engine, 1), said


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    ((written, said),) = run_ranks(1, save_where_it_cannot, tiny_config(), tmp_path)
    assert not written and "NOT written" in said[0] and "there is none before it" in said[0]


def try_saving_from_a_disk_of_its_own(folder: Path) -> str | None:
    process = distributed.start(tiny_config().engine)
    own = folder / f"host{process.rank}"
    own.mkdir()
    os.chdir(own)
    with pytest.raises(run_folder.RunError) as error:
        run_folder.try_saving(process, Path("run"))
    run_folder.try_saving(process, folder / "run")
    return str(error.value)


def test_a_folder_that_hosts_do_not_share_is_found_before_training(tmp_path):
    for told in run_ranks(2, try_saving_from_a_disk_of_its_own, tmp_path):
        assert "No such file or directory" in told and "output = 'run', which has to be one folder for all" in told
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def prune_many(config, folder: Path) -> list[list[int]]:
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    kept = []
    for step in range(1, 6):
        checkpoints.save(engine, {"step": step, "best_step": 2 if step >= 2 else None}, {})
        assert checkpoints.wait()
        kept.append(sorted(committed_steps(checkpoints.run)))
    return kept


def test_retention_keeps_the_last_ones_and_the_best(tmp_path):
    (kept,) = run_ranks(1, prune_many, tiny_config(checkpoint={"keep_last": 2}), tmp_path)
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    config = tiny_config(checkpoint={"keep_last": 1, "keep_every_steps": 3, "keep_best": False})
    (kept,) = run_ranks(1, prune_many, config, tmp_path / "every")
    assert kept == [[1], [2], [3], [3, 4], [3, 5]]


def save_after_a_broken_one(config, folder: Path) -> list[int | None]:
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    for step in (100, 200):
        assert save(checkpoints, engine, step)
    damage_flip(folder / "checkpoints" / "step_00000200" / "shard_00000.safetensors")
    found = []
    for step in (110, 120):
        assert save(checkpoints, engine, step)
        found.append(newest(folder, lambda _: None).step)
    return found


def test_a_broken_later_checkpoint_does_not_cost_those_after_a_resume(tmp_path):
    config = tiny_config(checkpoint={"keep_last": 1})
    assert run_ranks(1, save_after_a_broken_one, config, tmp_path) == [[110, 120]]


def resume_past_a_broken_one(config, folder: Path) -> list[list[int]]:
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    for step in (1, 2, 4):
        assert save(checkpoints, engine, step)
    damage_flip(folder / "checkpoints" / "step_00000004" / "shard_00000.safetensors")
    resumed, kept = Checkpoints(folder, config.checkpoint, process, lambda _: None), []
    assert resumed.agree_on_newest().step == 2
    for step in (3, 5, 6):
        assert save(resumed, engine, step)
        kept.append(sorted(committed_steps(folder)))
    return kept


def test_a_broken_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    config = tiny_config(checkpoint={"keep_last": 2})
    assert run_ranks(1, resume_past_a_broken_one, config, tmp_path) == [[[2, 3, 4], [3, 5], [5, 6]]]


def save_beside_leftovers(config, folder: Path) -> tuple[bool, list[str]]:
    process, _, engine = start_engine(config)
    said = []
    leftover = folder / "checkpoints" / ".step_00000001.partial"
    leftover.mkdir(parents=True)
    with pytest.raises(OSError):  # it fills the disk
        (leftover / "shard_00000.safetensors").write_bytes(bytes(1 << 20))
    return save(Checkpoints(folder, config.checkpoint, process, said.append), engine, 2), said


def test_what_a_killed_save_left_does_not_block_the_next(small_disk):
    assert run_ranks(1, save_beside_leftovers, tiny_config(), small_disk) == [(True, [])]
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_renamed_checkpoint_is_passed_over(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    renamed = tmp_path / "run" / "checkpoints" / "step_00000099"
    (renamed.parent / "step_00000002").rename(renamed)
    said = []
    assert newest(tmp_path / "run", said.append).step == 4
    assert said == [
        f"passing over a broken checkpoint: {renamed} holds the checkpoint of step 2: rename it to step_00000002"
    ]


def save_again(config, folder: Path) -> list[dict]:
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    found = []
    for evaluated in (0, 4):
        about = {"config": {"evaluated": evaluated}}
        checkpoints.save(engine, {"step": 4, "evaluated_step": evaluated, "best_step": evaluated or None}, about)
        assert checkpoints.wait()
        found.append(newest(folder).manifest)
    return found


def test_a_step_saved_again_keeps_its_files_and_takes_the_new_state(tmp_path):
    ((before, after),) = run_ranks(1, save_again, tiny_config(), tmp_path)
    assert before["state"]["evaluated_step"] == 0 and after["state"] == {"step": 4, "evaluated_step": 4, "best_step": 4}
    assert before["files"] == after["files"]
    assert after["config"] == {"evaluated": 4}  # the images that the new state was evaluated on
    names = sorted(path.name for path in newest(tmp_path).folder.iterdir())
    assert names == ["manifest.json", "shard_00000.safetensors"]


def save_as_another(config, folder: Path) -> list[list[str]]:
    """Step 4 of a run, of another run in the same folder, and of one that resumes the second."""
    process, model, engine = start_engine(config)
    found = []
    for steps in (2, 4, 0):
        checkpoints = Checkpoints(folder, config.checkpoint, process, print)
        if not steps:
            checkpoints.load(engine, checkpoints.agree_on_newest())
        engine_steps(config, process, model, engine, 0, steps)
        checkpoints.save(engine, {"step": 4, "resumed": not steps}, {"config": steps})
        assert checkpoints.wait()
        found.append(newest(folder).manifest)
    return found


def test_a_step_that_another_run_left_is_written_anew(tmp_path):
    ((first, second, resumed),) = run_ranks(1, save_as_another, tiny_config(), tmp_path)
    assert first["files"] != second["files"] and second["config"] == 4
    assert resumed["files"] == second["files"] and resumed["config"] == 0 and resumed["state"]["resumed"]


def miss_the_best(config, folder: Path) -> list[list[int]]:
    """Step 5 is the best so far, step 7 is better and cannot be written."""
    process, _, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, lambda _: None)
    write, kept = checkpoint.write_shard, []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step, best in ((5, 5), (6, 5), (7, 7), (8, 7), (9, 7)):
        checkpoint.write_shard = full if step == 7 else write
        checkpoints.save(engine, {"step": step, "best_step": best}, {})
        checkpoints.wait()
        kept.append(sorted(committed_steps(checkpoints.run)))
    return kept


def test_the_best_stays_until_a_better_one_is_written(tmp_path, capsys):
    (kept,) = run_ranks(1, miss_the_best, tiny_config(checkpoint={"keep_last": 1}), tmp_path)
    assert kept == [[5], [5, 6], [5, 6], [5, 8], [5, 9]]
    assert find_checkpoint(tmp_path, best=True).step == 5
    assert "the best checkpoint, of step 7, is not there; taking step 5" in capsys.readouterr().err


def test_checkpoints_on_a_disk_that_is_away_are_not_taken_for_none(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UnreadableError, match=r"a link to .*scratch, which is not there"):
        newest(run)
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        assert "which is not there" in run_folder.open_folder(run, resume, overwrite)


def test_overwriting_clears_what_a_link_leads_to_and_sees_what_stays(tmp_path, monkeypatch):
    run, scratch, other = tmp_path / "run", tmp_path / "scratch", tmp_path / "other"
    for folder in (run / "gallery", scratch / "step_00000004", other / "step_00000001"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (run / "checkpoints").symlink_to(scratch)
    (scratch / "link").symlink_to(other)
    with monkeypatch.context() as stubborn:
        stubborn.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert "steps [4] could not be deleted" in run_folder.discard(run)
    assert run_folder.discard(run) is None
    assert (run / "checkpoints").is_symlink() and list(scratch.iterdir()) == [] and (other / "step_00000001").is_dir()
    assert not (run / "gallery").exists()


def test_who_may_read_the_folder_may_read_the_shards(two_steps, tmp_path):
    for shared in (0o755, 0o700):
        run = tmp_path / f"{shared:o}"
        folder = reshard(newest(two_steps), run, 1)
        folder.chmod(shared)
        checkpoint_files.write_tensors({"x": torch.zeros(1)}, folder / "shard_00000.safetensors")
        assert (folder / "shard_00000.safetensors").stat().st_mode & 0o777 == shared & 0o666


def test_a_newest_checkpoint_that_cannot_be_read_just_now_is_not_passed_over(two_steps, monkeypatch):
    def broken(path: Path) -> str:
        if "step_00000004" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return sha256(path)

    sha256 = checkpoint_files._sha256
    monkeypatch.setattr(checkpoint_files, "_sha256", broken)
    with pytest.raises(UnreadableError, match=r"Input/output error: this checkpoint, .*move .*step_00000004 away"):
        newest(two_steps)


def test_checkpoints_that_a_training_removes_meanwhile_are_looked_for_anew(two_steps, tmp_path, monkeypatch):
    run = shutil.copytree(two_steps, tmp_path / "run")
    whole, said = checkpoint_files.verify, []

    def verify(folder: Path, **options):
        if folder.name == "step_00000004" and folder.is_dir():
            folder.rename(folder.with_name("step_00000006"))  # the next one is there, and this one gone
            manifest = folder.with_name("step_00000006") / "manifest.json"
            values = {**json.loads(manifest.read_text()), "step": 6}
            del values["sha256"]
            checkpoint_files._write_manifest(manifest, values)
        return whole(folder, **options)

    monkeypatch.setattr(checkpoint_files, "verify", verify)
    assert newest(run, said.append).step == 6 and not said


def test_equal_statistics_of_all_ranks_have_a_mean_without_a_rounding(two_steps, tmp_path):
    saved = newest(two_steps)
    once = checkpoint_files.reshard(saved, tmp_path / "one", 1)
    thrice = checkpoint_files.reshard(checkpoint_files.verify(once), tmp_path / "three", 3)
    one, three = (checkpoint_files.load_module_state(checkpoint_files.verify(each), "") for each in (once, thrice))
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_is_away_for_a_moment_does_not_look_like_no_checkpoint(two_steps, monkeypatch, number):
    def broken(_: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_files, "_sha256", broken)
    with pytest.raises(UnreadableError, match=f"{os.strerror(number)}: this checkpoint, the newest, may be whole"):
        newest(two_steps)
    monkeypatch.setattr(checkpoint_files, "committed_steps", broken)
    with pytest.raises(UnreadableError, match=f"checkpoints: {os.strerror(number)}"):
        newest(two_steps)


def what_is_found(config, run: Path) -> str:
    process, _, _ = start_engine(config)
    try:
        return str(Checkpoints(run, config.checkpoint, process, lambda _: None).agree_on_newest())
    except UnreadableError as error:
        return str(error)


def test_a_later_format_is_not_started_over_by_any_rank(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    for manifest in tmp_path.glob("run/checkpoints/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    found = run_ranks(2, what_is_found, tiny_config(), tmp_path / "run")
    assert all("may be whole" in message and "written in format 99" in message for message in found)
    for shard in tmp_path.glob("run/checkpoints/*/shard_00000.safetensors"):
        shard.unlink()
    damage_empty(next(tmp_path.glob("run/checkpoints/*2/manifest.json")))
    Path.unlink(next(tmp_path.glob("run/checkpoints/*4/manifest.json")))
    assert newest(tmp_path / "run", lambda _: None) is None  # damaged beyond doubt


def test_a_momentum_that_was_not_there_is_named(two_steps):
    config = tiny_config(engine={"zero_stage": 2}, optimizer={"mix_momentum": 0.9})
    with pytest.raises(AssertionError, match=r"does not fit.*optimizer/mix_block.*; was optimizer.\* changed since"):
        run_ranks(2, agreed_step, config, two_steps)


def test_another_model_is_refused_by_name(two_steps):
    config = tiny_config(automix={"norm": "batch"})
    with pytest.raises(AssertionError, match=r"CheckpointError.*does not fit this model.*mix_block.norm"):
        run_ranks(1, agreed_step, config, two_steps)
    config = tiny_config(automix={"reduction": 3})
    with pytest.raises(AssertionError, match=r"CheckpointError.*mix_block.query_weight has shape"):
        run_ranks(1, agreed_step, config, two_steps)


def test_shards_hold_every_tensor_once(tmp_path):
    """No element is written twice, none is missing, whatever the stage and the number of ranks."""
    for stage in range(4):
        folder = tmp_path / str(stage)
        config = tiny_config(batch_size=24, engine={"zero_stage": stage})
        run_ranks(3, save_after, config, folder, 1)
        saved = newest(folder)
        elements = 0
        for name in ("shard_00000", "shard_00001", "shard_00002"):
            from safetensors import safe_open

            with safe_open(saved.folder / f"{name}.safetensors", "pt") as file:
                elements += sum(file.get_slice(k).get_shape()[0] for k in list(file.keys()) if k.startswith("param/"))
        whole = load_module_state(saved, "")
        expected = sum(t.numel() for n, t in train_plain(config, 3, 0).items())
        assert elements == expected and len(whole) > 0


def test_nothing_is_unpickled():
    """What we load, we load as tensors and JSON: no file can run code."""
    unsafe = re.compile(r"import pickle|torch\.load\((?!.*weights_only=True)")
    sources = Path(checkpoint.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if unsafe.search(path.read_text())]


def test_whole_parameters_helper_sees_what_the_engine_has(tmp_path):
    """The tests' own way of reading shards, against ZeRO 0 where the weights are simply there."""
    ((through, direct),) = run_ranks(1, read_both_ways, tiny_config(), tmp_path)
    assert_same(through, direct, tolerance=0.0)


def read_both_ways(config, folder: Path) -> tuple[dict, dict]:
    process, model, engine = start_engine(config)
    engine_steps(config, process, model, engine, 0, 2)
    direct = {name: p.detach().clone() for name, p in model.named_parameters()}
    return whole_parameters(engine, folder, process, config), direct


def save_twice(config, folder: Path) -> list[dict]:
    """The second save is asked for while the first one is still being written."""
    process, model, engine = start_engine(config)
    checkpoints = Checkpoints(folder, config.checkpoint, process, print)
    write, disk, at_save = checkpoint.write_shard, threading.Event(), []

    def slowly(*arguments):
        disk.wait(10)
        return write(*arguments)

    checkpoint.write_shard = slowly
    for last in (2, 4):
        engine_steps(config, process, model, engine, last - 2, last)
        at_save.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if last == 4:
            threading.Timer(1.0, disk.set).start()
        checkpoints.save(engine, {"step": last}, {})
    assert checkpoints.wait()
    return at_save


def test_a_save_waits_for_the_one_before(tmp_path):
    (at_save,) = run_ranks(1, save_twice, tiny_config(engine={"name": "ddp"}), tmp_path)
    for step, parameters in zip((2, 4), at_save, strict=True):
        state = load_module_state(verify(step_folder(tmp_path, step)), "")
        assert_same({name: state[name] for name in parameters}, parameters, tolerance=0.0)


def write_a_broken_step_anew(config, folder: Path) -> list[list[int]]:
    process, _, engine = start_engine(config)
    checkpoints, kept = Checkpoints(folder, config.checkpoint, process, print), []
    for step in (1, 2, 4):
        assert save(checkpoints, engine, step)
    damage_flip(folder / "checkpoints" / "step_00000004" / "shard_00000.safetensors")
    resumed = Checkpoints(folder, config.checkpoint, process, lambda _: None)
    assert resumed.agree_on_newest().step == 2
    for step in (4, 6):
        assert save(resumed, engine, step)
        assert newest(folder, lambda _: None).step == step
        kept.append(sorted(committed_steps(folder)))
    return kept


def test_a_broken_step_that_is_written_anew_is_whole(tmp_path):
    config = tiny_config(checkpoint={"keep_last": 2})
    assert run_ranks(1, write_a_broken_step_anew, config, tmp_path) == [[[2, 4], [4, 6]]]
