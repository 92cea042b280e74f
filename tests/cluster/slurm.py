"""A real Slurm on the hosts of hosts.py: munged and slurmctld on the first, a slurmd on each."""

import shutil
import time
from pathlib import Path

from hosts import Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "sinfo")


def missing() -> str | None:
    """Which of Slurm's programs are not there; None if all are."""
    absent = [name for name in PROGRAMS if shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin") is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Slurm:
    def __init__(self, hosts: Hosts, names: list[str]):
        self.hosts = hosts
        self.first = names[0]
        self.folder = hosts.folder / "slurm"
        self._write_files(names)
        munged = ["munged", "--force", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket"]
        munged += [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
        self._must(self.first, *munged)
        self._must(self.first, "slurmctld")
        for name in names:
            self._must(name, "slurmd", "-N", name)
        self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == str(len(names)), 30)

    def run(self, *command: str | Path, **options):
        return self.hosts.run(self.first, *command, env={"SLURM_CONF": f"{self.folder}/slurm.conf"}, **options)

    def submit(self, *arguments: str | Path, cwd: Path) -> str:
        """The number of a new job."""
        submitted = self.run("sbatch", "--parsable", *arguments, cwd=cwd)
        assert submitted.returncode == 0, submitted.stdout
        return submitted.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..., and how often it was started again."""
        shown = self.run("scontrol", "show", "job", job).stdout
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return f"{fields['JobState']} {fields['Restarts']}"

    def wait(self, job: str, state: str, seconds: float) -> None:
        self._wait(lambda: self.state(job) == state, seconds, lambda: f"job {job} is {self.state(job)}, not {state}")

    def _must(self, name: str, *command: str) -> None:
        done = self.hosts.run(name, *command, env={"SLURM_CONF": f"{self.folder}/slurm.conf"})
        assert done.returncode == 0, done.stdout

    def _wait(self, reached, seconds: float, explain=lambda: "Slurm's nodes are not idle") -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, explain()
            time.sleep(0.3)

    def _write_files(self, names: list[str]) -> None:
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o755)  # munged is particular about who may write
        key = self.folder / "munge.key"
        key.write_bytes(bytes(range(256)) * 4)
        key.chmod(0o400)
        addresses = "".join(f"NodeName={name} NodeAddr=10.77.0.{name[1:]} CPUs=2 RealMemory=1000\n" for name in names)
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={self.first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool_%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd_%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{addresses}PartitionName=all Nodes={",".join(names)} Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes={",".join(names)} PriorityTier=10 PreemptMode=OFF State=UP
"""
        )
        version = 1 if Path("/sys/fs/cgroup/freezer").exists() else 2
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v{version}\n")
