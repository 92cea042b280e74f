"""launch/slurm.sbatch on a real Slurm of two hosts."""

from pathlib import Path

import pytest
from test_hosts import QUICK, trained, until

from automix_dist.checkpoint import newest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_job_is_stopped_goes_back_into_the_queue_and_resumes(slurm, hosts, settings, tmp_path):
    run, log = tmp_path / "run with $(a) space", tmp_path / "job.log"
    arguments = ["--nodes=2", f"--output={log}", ROOT / "launch" / "slurm.sbatch", settings, *QUICK, "epochs=5"]
    job = slurm.submit(*arguments, f"output={run}", "checkpoint.every_epochs=0", cwd=ROOT)
    until(lambda: trained(run, 3), 120, "training has begun")
    slurm.run("scancel", "--signal=USR1", job)  # what Slurm sends five minutes before the time limit
    until(lambda: slurm.state(job).endswith(" 1"), 60, f"the job was started again: {log.read_text()}")
    stopped = newest(run)
    assert stopped.manifest["world_size"] == 2
    slurm.wait(job, "COMPLETED 1", 120)
    text = log.read_text()
    assert "stopped by SIGUSR1" in text and "saved; back into the queue" in text and "attempt 2" in text
    assert f"step {stopped.step}\n" in text and "0: done: 75 steps" in text
