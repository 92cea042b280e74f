"""Ranks that die, hang, stop, fail or fall behind, as real processes: who is named, where, how soon; and who is not."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import torch
from ranks import run

from automix_dist import distributed, heartbeat
from automix_dist.config import EngineConfig
from automix_dist.heartbeat import Beat, Heartbeat, silence, standstill, stragglers
from automix_dist.progress import Progress
from automix_dist.rank_log import RankLog

STALL = 3.0
BOUND = 40.0
"""Seconds from the fault to the end of all ranks: about three times what a busy machine was seen to need."""
FAULT_STEP = 12


def sleep() -> None:
    time.sleep(1000)


def fail() -> None:
    raise ValueError("sample 7: its JPEG is damaged\nand a second line")


def disconnect() -> None:
    raise RuntimeError("[pair.cc:561] Connection closed by peer [10.0.0.2]:4711")


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def break_watcher() -> None:
    heartbeat._where = lambda thread: 1 / 0


def save_slowly(progress: Progress) -> None:
    progress.enter("saving", patient=True)
    time.sleep(2 * STALL)


def rank_loop(rank: int, world_size: int, port: int, folder: Path, fault, steps: int) -> None:
    """A training's skeleton on one rank; `fault`, for this rank or none, strikes while it loads a batch."""
    console = os.open(folder / "console", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(console, 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    heartbeat.STORE_SECONDS = 1.0
    engine = EngineConfig(device="cpu", stall_seconds=STALL, timeout_minutes=2)
    process = distributed.start(engine)
    progress = process.progress
    with Heartbeat(process, engine, RankLog(folder, rank)):
        for step in range(steps):
            progress.begin_step(step, patient=step == 0)
            progress.enter("loading")
            if fault is not None and step >= FAULT_STEP:
                if fault is save_slowly:
                    if step == FAULT_STEP:
                        save_slowly(progress)
                elif fault == "slow":
                    time.sleep(0.1)
                elif step == FAULT_STEP:
                    fault()
            progress.enter("forward")
            time.sleep(0.05)
            progress.enter("backward")
            process.sum(torch.ones(4))
            progress.end_step()
    distributed.finish()
    (folder / f"notes_{rank}.json").write_text(json.dumps(list(progress.notes)))


class Job:
    """Ranks that run `rank_loop` in a folder; one of them has a fault."""

    def __init__(self, folder: Path, faults: dict, world_size: int = 3, steps: int = 4000):
        self.folder, port = folder, ranks.free_port()
        self.ranks = [
            ranks.own_process(rank_loop, rank, world_size, port, folder, faults.get(rank), steps)
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def wait(self, but: int | None = None) -> list[int | None]:
        """Exit codes, once all ranks have ended but one that cannot; nothing is left behind."""
        deadline = time.monotonic() + BOUND + 20  # and the start
        try:
            for rank, process in enumerate(self.ranks):
                if rank != but:
                    process.join(max(deadline - time.monotonic(), 0))
            return [process.exitcode for process in self.ranks]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    @property
    def console(self) -> list[str]:
        return (self.folder / "console").read_text().splitlines()

    def verdicts(self) -> list[str]:
        return [line for line in self.console if line.startswith("automix: error:")]

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank_{rank:05d}.log").read_text()


def name(rank: int) -> str:
    return rf"rank {rank} on {re.escape(socket.gethostname())} \(process \d+\)"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_line_and_stack(tmp_path):
    job = Job(tmp_path, {1: sleep})
    assert job.wait() == [1, 1, 1]
    (verdict,) = job.verdicts()  # once per host
    assert re.search(rf"{name(1)} stands still for \d+ s in step 12, loading at .*\bsleep, last collective", verdict)
    assert "gloo:all_reduce" in verdict and "the others wait for it" in verdict
    assert all(verdict in job.log(rank) for rank in range(3))
    assert re.search(r"test_heartbeat.py\", line \d+ in sleep", job.log(1))
    assert re.search(r"test_heartbeat.py\", line \d+ in rank_loop", job.log(0))


@contextlib.contextmanager
def at_once(folder: Path, faults: list[dict], steps: int = 4000) -> Iterator[list[Job]]:
    """Jobs at the same time; nothing of them is left behind."""
    for number in range(len(faults)):
        (folder / str(number)).mkdir()
    jobs = [Job(folder / str(number), fault, steps=steps) for number, fault in enumerate(faults)]
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()


@pytest.mark.slow
def test_a_killed_rank_is_named_instead_of_a_closed_connection(tmp_path):
    with at_once(tmp_path, [{0: kill}, {1: kill}]) as jobs:  # rank 0 keeps the store
        for rank, job in enumerate(jobs):
            assert job.wait() == [-signal.SIGKILL if each == rank else 1 for each in range(3)]
            assert job.verdicts()
            for verdict in job.verdicts():
                assert re.search(name(rank), verdict)
            assert not any("Traceback" in line for line in job.console)
            assert "Traceback" in job.log(2)  # what the collective said is kept, for whom it may concern
    assert "its process is gone" in job.verdicts()[0]


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path):
    with at_once(tmp_path, [{0: stop}, {1: stop}]) as jobs:
        for rank, job in enumerate(jobs):
            codes = job.wait(but=rank)
            assert [code for each, code in enumerate(codes) if each != rank] == [1, 1]
            assert job.verdicts()
            for verdict in job.verdicts():
                assert re.search(name(rank), verdict)
    assert "has not responded" in job.verdicts()[0] and "stopped, as by SIGSTOP" in job.verdicts()[0]


@pytest.mark.slow
def test_the_other_ranks_learn_why_one_failed(tmp_path):
    reasons = ("failed in step 12, loading: sample 7: its JPEG is damaged", "failed in step 12, loading: Keyboard")
    reasons += ("lost contact with another rank in step 12, loading, though all are alive",)
    with at_once(tmp_path, [{1: fail}, {1: interrupt}, {1: disconnect}]) as jobs:
        for reason, job in zip(reasons, jobs, strict=True):
            assert job.wait()[0] == job.wait()[2] == 1
            assert re.search(rf"{name(1)} {reason}", job.verdicts()[0])
            assert reason in job.log(0)


@pytest.mark.slow
def test_patience_and_a_job_suspended_as_a_whole(tmp_path):
    """Saving may take long; and nobody is blamed for the time in which nobody ran."""
    job = Job(tmp_path, {1: save_slowly}, steps=100)
    while not (tmp_path / "logs" / "rank_00002.log").exists():
        time.sleep(0.05)
    time.sleep(STALL)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in job.ranks:
            os.kill(process.pid, number)
        time.sleep(1.5 * STALL)
    assert job.wait() == [0, 0, 0]
    assert job.verdicts() == []


@pytest.mark.slow
def test_a_defect_of_the_watcher_ends_no_healthy_run(tmp_path):
    with at_once(tmp_path, [{0: break_watcher}, {1: break_watcher}], steps=120) as jobs:
        for rank, job in enumerate(jobs):
            assert job.wait() == [0, 0, 0]
            assert job.verdicts() == [] and "ZeroDivisionError" in job.log(rank)


@pytest.mark.slow
def test_a_slow_rank_is_reported(tmp_path):
    job = Job(tmp_path, {2: "slow"}, steps=70)
    assert job.wait() == [0, 0, 0]
    (note,) = json.loads((tmp_path / "notes_0.json").read_text())
    assert note["slow_rank"] == 2
    assert re.match(rf"{name(2)} falls behind: 0\.\d+ s .*loading 0\.\d+, forward 0\.\d+\), the median", note["text"])


@pytest.mark.slow
def test_a_training_that_lost_a_rank_names_it_and_resumes(settings, tmp_path):
    output = tmp_path / "run"
    arguments = [
        "train",
        settings,
        "log.every_steps=1",
        "engine.stall_seconds=10",
        "epochs=2",
        "checkpoint.every_steps=5",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "automix_dist", *map(str, arguments)]
    console = tmp_path / "console"
    with console.open("w") as file:
        job = subprocess.Popen(command, stderr=file, cwd=ranks.ROOT)
        while job.poll() is None and not any((output / "checkpoints").glob("step_*")):
            time.sleep(0.05)
        pid = re.search(r"process (\d+)", (output / "logs" / "rank_00001.log").read_text())[1]
        os.kill(int(pid), signal.SIGKILL)
        assert job.wait(timeout=BOUND) != 0
    verdicts = [line for line in console.read_text().splitlines() if line.startswith("automix: error:")]
    assert re.search(rf"rank 1 on .* \(process {pid}\) has not responded .* is gone", verdicts[0])
    resumed = run(*arguments, "--resume", ranks=2)
    assert "resuming from" in resumed.stderr and "done: 30 steps" in resumed.stderr
    assert "done: 30 steps" in (output / "logs" / "rank_00000.log").read_text()


def beat(rank: int, advances: int = 10, **values) -> Beat:
    host = f"node{rank // 2}"
    return Beat(rank, host, 100 + rank, step=7, phase="backward", advances=advances, where="x.py:1 f", **values)


def test_the_least_advanced_rank_is_the_culprit():
    waiting = [beat(rank, stuck=True, still_seconds=50) for rank in range(4)]
    assert standstill([*waiting, beat(4, advances=9)]) is None  # the culprit has its own, longer limit
    verdict = standstill([*waiting, beat(4, advances=9, stuck=True, still_seconds=46)])
    assert verdict.startswith("rank 4 on node2 (process 104) stands still for 46 s in step 7, backward at x.py:1 f")
    assert standstill([*waiting, beat(4, advances=9, finished=True)]).count("all ranks") == 0
    assert "all ranks wait alike" in standstill(waiting)
    fewer = [*waiting, beat(4, collectives=3, stuck=True)]
    assert standstill([*map(lambda b: beat(b.rank, collectives=4, stuck=True), waiting), fewer[-1]]).startswith(
        "rank 4"
    )
    assert standstill([beat(0), beat(1, advances=9)]) is None


def test_while_all_save_the_rank_at_its_disk_is_the_culprit():
    """NCCL, whose collectives are counted on GPUs, has no part in a save."""
    waiting = [beat(rank, stuck=True, still_seconds=550) for rank in range(3)]
    verdict = standstill([*waiting, beat(3, stuck=True, still_seconds=550, writing=True)])
    assert verdict.startswith("rank 3 on node1 (process 103) stands still for 550 s in step 7, backward, writing to ")
    assert "the others wait for it" in verdict
    everyone = [beat(rank, stuck=True, still_seconds=550, writing=True) for rank in range(3)]
    assert "all ranks wait for their disks" in standstill(everyone)


def test_a_background_save_is_no_excuse_in_a_step():
    process = distributed.Process(0, 0, 2, torch.device("cpu"), None)
    watch = Heartbeat(process, EngineConfig(), None)
    process.progress.writing = True
    for phase, writing in (("forward", False), ("saving", True)):
        process.progress.enter(phase)
        watch._look_at_main_thread(1.0)
        assert watch._beat.writing is writing


def test_silent_ranks_are_listed_by_host():
    beats = [beat(rank) for rank in range(6)]
    silent = dict.fromkeys(range(6), 30.0) | {2: 60.0, 3: 42.0}
    assert silence(beats, silent, 70, "node0") is None
    verdict = silence(beats, silent, 45, "node0")  # the last beat of rank 3 came later
    assert verdict.startswith("each of 2 ranks (2, 3 on node1) has not responded for 42 s (is its host down?)")
    beats[3].finished = True
    assert silence(beats, silent, 45, "node0").startswith("rank 2 on node1 (process 102) has not responded for 60 s")
    beats[2].finished = True
    assert silence(beats, silent, 45, "node0") is None


def test_stragglers_against_the_median():
    def work(steps: int, loading: list[float], step_seconds: float = 0.5) -> list[Beat]:
        return [
            beat(rank, steps=steps, step_seconds=steps * step_seconds,
                 own_seconds={"loading": steps * each, "forward": steps * 0.1})
            for rank, each in enumerate(loading)
        ]  # fmt: skip

    start = work(0, [0] * 4)
    assert stragglers(start, work(9, [0.0, 0.0, 0.0, 0.3])) == {}  # too few steps
    assert stragglers(start, work(20, [0.01, 0.01, 0.02, 0.02])) == {}
    assert stragglers(start, work(20, [0.0, 0.0, 0.0, 0.04], step_seconds=1.0)) == {}  # 1.4 times, but of no matter
    found = stragglers(start, work(20, [0.0, 0.0, 0.3, 0.01]))
    assert list(found) == [2]
    assert "0.400 s of its own work in a step (loading 0.300, forward 0.100), the median rank's is 0.100 s" in found[2]


def test_a_step_that_is_slow_by_nature_gets_its_time():
    process = distributed.Process(0, 0, 2, torch.device("cpu"), None)
    watch = Heartbeat(process, EngineConfig(stall_seconds=10, timeout_minutes=10), None)

    def stuck_after(seconds: float) -> bool:
        process.progress.advance()
        watch._look_at_main_thread(1.0)
        watch._look_at_main_thread(seconds)
        return watch._beat.stuck

    process.progress.begin_step(1, patient=False)
    assert not stuck_after(500) and stuck_after(600)  # no step was measured yet: 0.9 of ten minutes
    process.progress.end_step()
    assert not stuck_after(9) and stuck_after(11)
    process.progress.usual_seconds = 4.0
    assert not stuck_after(19) and stuck_after(21)
    process.progress.enter("evaluation", patient=True)
    assert not stuck_after(500) and stuck_after(600)


@pytest.fixture
def watch(monkeypatch):
    """Rank 0's heartbeat without store and thread; what it says is in `said`."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(heartbeat, "STORE_SECONDS", 0.0)
    process = distributed.Process(0, 0, 2, torch.device("cpu"), None)
    watch = Heartbeat(process, EngineConfig(stall_seconds=0.01, timeout_minutes=10), None)
    watch._thread, watch.said = threading.Thread(), []
    watch._thread.start()
    watch._say = lambda verdict, on_console: watch.said.append(verdict)
    return watch


def test_an_error_is_told_before_trackers_are_closed_and_once(watch):
    watch._progress.enter("loading")
    error = ValueError("a damaged sample")
    watch._failed(error)
    assert watch._stop.is_set() and watch._beat.finished  # nobody ends this process while it closes trackers
    watch._progress.enter("closing")
    watch.__exit__(ValueError, error, None)
    (said,) = watch.said
    assert said.endswith("failed in step 0, loading: a damaged sample")


@pytest.mark.parametrize("suspended", [False, True])
def test_a_lost_rank_is_looked_for_while_trackers_are_closed(watch, suspended, monkeypatch):
    clock = iter([0.0, 2.0, 2000.0 if suspended else 4.0])
    turns = iter([False, False, True])
    with monkeypatch.context() as asleep:
        asleep.setattr(time, "monotonic", lambda: next(clock))
        asleep.setattr(watch._stop, "wait", lambda _: next(turns))
        asleep.setattr(watch, "_without_store", lambda _: None)
        watch._watch()
    error = RuntimeError("gloo: timed out")
    watch._failed(error)
    assert watch._suspect and watch._progress.patient and not watch._stop.is_set() and not watch.said
    with pytest.raises(heartbeat.PeerError, match="the job was suspended for 1998 s" if suspended else "the network?"):
        watch.__exit__(RuntimeError, error, None)
    assert len(watch.said) == 1


def test_progress_adds_up_own_work_apart_from_patient_steps(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    progress = Progress()
    for step, patient in enumerate([True, False, False]):
        progress.begin_step(step, patient)
        for phase in ("loading", "forward", "backward"):
            progress.enter(phase)
        progress.end_step()
    assert (progress.step, progress.phase, progress.advances, progress.measured_steps) == (2, "backward", 9, 2)
    assert progress.own_seconds == {"loading": 2.0, "forward": 2.0}
    assert progress.usual_seconds == 4.0


def test_the_share_of_the_steps_time_that_the_loader_takes(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress, shares = Progress(), []
    for step in range(6):
        progress.begin_step(step, patient=step == 0)  # the first step counts too
        for phase, seconds in (("loading", 1.0 + step), ("drawing", 0.5), ("forward", 2.0), ("backward", 1.5)):
            progress.enter(phase)
            now += seconds
        if step in (1, 4):
            progress.enter("logging")
            shares.append(progress.loading_share())
            now += 3.0  # of the next record
        progress.end_step()
        now += 100.0  # an evaluation
    assert shares == [3 / 11, 12 / 27]
    assert Progress().loading_share() == 0.0


def test_one_process_or_zero_seconds_need_no_heartbeat():
    for world_size, seconds in ((1, 45), (2, 0)):
        process = distributed.Process(0, 0, world_size, torch.device("cpu"), None)
        before = signal.getsignal(signal.SIGTERM)
        with Heartbeat(process, EngineConfig(stall_seconds=seconds), None):
            assert signal.getsignal(signal.SIGTERM) is before
    assert "heartbeat" not in [thread.name for thread in heartbeat.threading.enumerate()]


def test_rank_logs_keep_what_is_said_and_survive_a_full_disk(tmp_path):
    """Rank 0 speaks to both, progress bars to the console alone; the last rank to its file, compiled code included."""
    code = (
        "import os, sys; from pathlib import Path; from automix_dist.rank_log import RankLog\n"
        "log = RankLog(Path(sys.argv[1]), int(sys.argv[2]))\n"
        "print('said'); print('\\rbar', file=sys.stderr); os.write(2, b'compiled\\n')\n"
        "log.say('verdict', on_console=True); raise ValueError('traceback')"
    )
    for rank, on_console in ((0, {"said", "bar", "compiled", "verdict", "traceback"}), (1, {"verdict"})):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path, str(rank)], capture_output=True, text=True, cwd=ranks.ROOT
        )
        shown, kept = done.stdout + done.stderr, (tmp_path / "logs" / f"rank_0000{rank}.log").read_text()
        words = {"said", "bar", "compiled", "verdict", "traceback"}
        assert {word for word in words if word in shown} == on_console
        assert {word for word in words if word in kept} >= (
            {"said", "verdict", "traceback"} | ({"compiled"} if rank else set())
        )
    logs = tmp_path / "full" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank_00000.log").symlink_to("/dev/full")
    command = [sys.executable, "-c", code, logs.parent, "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT)
    assert "said" in done.stdout and "verdict" in done.stderr and "cannot write" in done.stderr
