"""launch/slurm.sbatch on a real Slurm of two hosts."""

import re
import time
from pathlib import Path

import pytest
import yaml
from ranks import records
from test_hosts import no_rank_is_left, trained, until

from automix_dist.checkpoint_files import newest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "launch" / "slurm.sbatch"


def change(settings: Path, **values) -> None:
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | values))


@pytest.mark.slow
def test_a_job_comes_round_at_its_time_limit_and_after_preemption(slurm, settings, tmp_path):
    run, log = tmp_path / "run with $(a) space", tmp_path / "job.log"
    change(settings, epochs=500, log={"every_steps": 1, "gallery_pairs": 0}, checkpoint={"every_epochs": 0})
    # The job's own run must not be what its second start discards.
    job = slurm.submit("--nodes=2", f"--output={log}", SCRIPT, settings, f"output={run}", "--overwrite", cwd=ROOT)

    def comes_round(times: int) -> int:
        """The step that it resumes from."""
        until(lambda: slurm.state(job).endswith(f" {times}"), 150, f"{times} restarts")
        assert newest(run).manifest["world_size"] == 2
        return newest(run).step

    until(lambda: trained(run, 3), 120, "training has begun")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # less than five minutes are left
    first = comes_round(1)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    until(lambda: trained(run, first + 3), 120, "it trains on")
    change(settings, epochs=(records(run, "train")[-1]["step"] + 30) // 15)  # the third start comes to the end
    slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=ROOT)
    second = comes_round(2)
    slurm.wait(job, "COMPLETED 2", 240)
    text = log.read_text()
    assert "stopped by SIGUSR1" in text and "stopped by SIGTERM" in text
    assert text.count("saved; back into the queue") == 2 and "attempt 3" in text and "0: done: " in text
    assert first < second and f"step {first}\n" in text and f"step {second}\n" in text
    steps = [record["step"] for record in records(run, "train")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_signal_of_the_first_seconds_lets_a_job_come_round(slurm, hosts, settings, tmp_path):
    log = tmp_path / "job.log"
    job = slurm.submit("--nodes=2", f"--output={log}", SCRIPT, settings, cwd=ROOT)
    # Not srun, which is there before the step that a signal goes to.
    until(lambda: hosts.processes("n1", f"bash {ROOT}/launch/rank.sh"), 120, "a rank starts")
    slurm.run("scancel", "--signal=USR1", job)
    until(lambda: slurm.state(job).endswith(" 1"), 150, "the job is in the queue again")
    slurm.run("scancel", job)
    text = log.read_text()
    assert "stopped before training has begun; back into the queue" in text
    assert not re.search(r": line \d+: ", text), text  # a complaint or comment of bash's; srun may say Terminated
    no_rank_is_left(hosts)


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled_and_a_failed_one_fails(slurm, hosts, settings, tmp_path):
    output, run = f"--output={tmp_path}/%j.log", tmp_path / "run"
    change(settings, epochs=500, log={"every_steps": 1, "gallery_pairs": 0})
    own = tmp_path / "own.sbatch"  # a user's script, in which the training is not the job's first step
    own.write_text(f'#!/bin/bash\nsrun true\nexec bash {SCRIPT} "$@"\n')
    job = slurm.submit("--nodes=2", "--requeue", output, own, settings, cwd=ROOT)
    until(lambda: trained(run, 2), 120, "training has begun")
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    until(lambda: slurm.state(job).endswith(" 1"), 150, "the script's signal has let the ranks save")
    before = newest(run).step
    until(lambda: trained(run, before + 2), 120, "it trains on")
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED 1", 60)
    no_rank_is_left(hosts)
    assert newest(run).step >= before + 2  # saved within Slurm's KillWait
    time.sleep(2)
    assert slurm.state(job) == "CANCELLED 1"

    # With variables of one's own Slurm's srun would leave out those of the script.
    own = "--export=WANDB_PROJECT=mine"
    job = slurm.submit("--nodes=2", own, output, SCRIPT, settings, "optimizer.lrr=1", cwd=ROOT)
    slurm.wait(job, "FAILED 0", 120)
    said = (tmp_path / f"{job}.log").read_text()
    assert re.search(r"(\d): automix \[rank \1\]: error: .*optimizer\.lr\?", said), said  # Slurm ends who is slower


@pytest.mark.slow
def test_a_job_that_can_never_begin_does_not_come_round_for_ever(slurm, hosts, waiting, on_n2, tmp_path):
    """One whose time is over before Slurm's signal, and one with a node on which no rank can start."""
    log, environment = tmp_path / "job.log", f"--export=ALL,AUTOMIX_VENV={waiting}"
    job = slurm.submit("--nodes=2", "--time=4", environment, f"--output={log}", SCRIPT, "CONFIG", cwd=ROOT)
    slurm.wait(job, "FAILED 0", 150)
    assert "before training has begun, as its time limit is that short" in log.read_text()
    (tmp_path / "empty").mkdir()
    on_n2(tmp_path / "empty", ROOT / "launch")
    job = slurm.submit("--nodes=2", environment, f"--output={log}", SCRIPT, "CONFIG", cwd=ROOT)
    slurm.wait(job, "FAILED 0", 120)
    text = log.read_text()
    assert "Exited with exit code 2" in text and "back into the queue" not in text, text
    no_rank_is_left(hosts)
