"""Runs that are killed and damaged at random, again and again: each time they resume from a whole checkpoint, and in
the end they have the weights, optimizer state and statistics of a run that nobody disturbed.

A kill comes at the n-th call of a function of this package, in any thread: in a step, in the loader, in an evaluation,
at every stage of a save. The random numbers are fixed, so a failure can be repeated.
"""

import multiprocessing.connection
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import _CONTEXT, _rank, free_port, own_process
from test_trainer import train
from tiny import tiny_config

import automix_dist
from automix_dist.checkpoint_files import ShardReader, committed_steps, newest

PACKAGE = str(Path(automix_dist.__file__).parent)
CALLS = 1200
"""Kills are drawn from so many calls; a whole run makes about 3,000, a third of them before its first checkpoint."""
SESSIONS = 6
FAULTS: list[str] = []


def config(**engine):
    return tiny_config(
        epochs=4, eval_every_epochs=2, log={"every_steps": 2, "gallery_pairs": 2},
        checkpoint={"every_epochs": 1, "every_steps": 2, "keep_last": 3}, engine=engine,
    )  # fmt: skip


def doomed(settings, folder: Path, calls: int | None) -> None:
    """Train, and die at the given call."""
    remaining = [calls]

    def count(frame, event, _argument) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if calls is not None:
        threading.setprofile(count)
        sys.setprofile(count)
    train(settings, folder)


def session(settings, folder: Path, kills: list[int | None]) -> bool:
    """One process per entry, killed at that call or left alone; whether all came to the end."""
    port, results = free_port(), _CONTEXT.Queue()
    ranks = [
        own_process(_rank, rank, len(kills), port, results, doomed, (settings, folder, calls))
        for rank, calls in enumerate(kills)
    ]
    for process in ranks:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in ranks], timeout=120)
    for process in ranks:
        process.join(timeout=3 if any(kills) else 120)
        process.kill()  # as a launcher does with those who wait for a rank that is gone
        process.join()
    outcomes = [results.get(timeout=10) for process in ranks if process.exitcode == 0]
    errors = [error for _, _, error in outcomes if error]
    if all(process.exitcode == 0 for process in ranks):
        assert not errors, errors[0]
    return all(process.exitcode == 0 for process in ranks)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = ShardReader(newest(folder))
    return {name: reader.tensor(name) for name in reader.names("")}


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    assert newest(folder).step == newest(undisturbed).step == 12
    got, expected = tensors(folder), tensors(undisturbed)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    ends = [newest(f).manifest["state"] for f in (folder, undisturbed)]
    assert ends[0] == ends[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Finished runs by (ranks, ZeRO stage), made once."""
    runs = {}

    def run(ranks: int, stage: int) -> Path:
        if (ranks, stage) not in runs:
            runs[ranks, stage] = tmp_path_factory.mktemp("undisturbed")
            assert session(config(zero_stage=stage), runs[ranks, stage], [None] * ranks)
        return runs[ranks, stage]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again(seed, tmp_path, undisturbed):
    generator = random.Random(seed)
    for _ in range(SESSIONS):
        call = generator.randrange(1, CALLS)
        if session(config(), tmp_path, [call]):
            break  # the rest of the run had fewer calls
        FAULTS.append(f"process killed at call {call}")
    assert session(config(), tmp_path, [None])
    assert_same_end(tmp_path, undisturbed(1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("victims", ["one", "all"])
def test_ranks_killed_again_and_again(victims, seed, tmp_path, undisturbed):
    generator = random.Random(f"{victims} {seed}")
    settings = config(zero_stage=(0, 1, 2, 3)[seed])
    for _ in range(3):
        call = generator.randrange(1, CALLS)
        kills = [call, call] if victims == "all" else generator.sample([call, None], 2)
        if session(settings, tmp_path, kills):
            break
        FAULTS.append(f"{victims} of 2 ranks killed at call {call}")
    assert session(settings, tmp_path, [None, None])
    assert_same_end(tmp_path, undisturbed(2, settings.engine.zero_stage))


def truncate(path: Path, generator: random.Random) -> None:
    os.truncate(path, generator.randrange(path.stat().st_size))


def flip_a_bit(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def zero_a_block(path: Path, generator: random.Random) -> None:
    """What a crash of the file system leaves: the right size, and zeros where the data had not arrived."""
    data = bytearray(path.read_bytes())
    start = generator.randrange(len(data))
    stop = min(len(data), start + 4096)
    if not any(data[start:stop]):
        start, stop = 0, 64
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def lengthen(path: Path, generator: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(generator.randbytes(100))


def remove(path: Path, _generator: random.Random) -> None:
    path.unlink()


def replace_by_folder(path: Path, _generator: random.Random) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path: Path, _generator: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES = [truncate, flip_a_bit, zero_a_block, lengthen, remove, replace_by_folder, replace_by_dangling_link]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["manifest.json", "*.safetensors"])
def test_damaged_again_and_again(damage, kind, tmp_path, undisturbed):
    """Killed somewhere, then the newest checkpoint is damaged, and sometimes the one before too."""
    generator = random.Random(f"{damage.__name__} {kind}")
    for _ in range(3):
        session(config(), tmp_path, [generator.randrange(CALLS, 2 * CALLS)])
        steps = sorted(committed_steps(tmp_path))
        for step in steps[-generator.choice([1, 1, 2]) :]:
            folder = tmp_path / "checkpoints" / f"step_{step:08d}"
            files = [path for path in folder.glob(kind) if path.is_file()]
            if files:
                damage(generator.choice(files), generator)
                FAULTS.append(f"{damage.__name__} of {kind} at step {step}")
    assert session(config(), tmp_path, [None])
    assert_same_end(tmp_path, undisturbed(1, 0))


def test_all_checkpoints_damaged_starts_from_the_beginning(tmp_path, undisturbed):
    assert not session(config(), tmp_path, [2 * CALLS])
    steps = committed_steps(tmp_path)
    assert steps
    for step in steps:
        remove(tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json", random)
        FAULTS.append(f"manifest of step {step} gone, as all others")
    (tmp_path / "checkpoints" / "latest").symlink_to("nowhere")
    (tmp_path / "checkpoints" / "step_junk").mkdir()
    (tmp_path / "checkpoints" / ".step_00000099.partial").mkdir()
    FAULTS.append("a dangling `latest`, a foreign folder, a leftover")
    assert session(config(), tmp_path, [None])
    assert_same_end(tmp_path, undisturbed(1, 0))


def test_there_were_enough_faults(request):
    """The last test: it counts what the others did."""
    ours = [item for item in request.session.items if item.fspath == request.node.fspath]
    expected = len(DAMAGES) * 2 + 6 + 8 + 2
    if len(ours) < expected:
        pytest.skip(f"only {len(ours)} of this file's {expected} tests were chosen")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(FAULTS)} faults, and after each the run ended as the undisturbed one")
    assert len(FAULTS) >= 100
