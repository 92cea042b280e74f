"""Training on several hosts, reached by ssh as a user reaches them: launched, stopped, resumed, broken, diagnosed."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from ranks import records

from automix_dist.checkpoint_files import newest
from automix_dist.errors import EXIT_STOPPED

ROOT = Path(__file__).parent.parent.parent
DEEPSPEED = ROOT / "launch" / "deepspeed.sh"
TORCHRUN = ROOT / "launch" / "torchrun.sh"
QUICK = ["epochs=2", "log.every_steps=1", "log.gallery_pairs=0"]


def until(reached, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def trained(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(run, "train"))


def no_rank_is_left(hosts) -> None:
    for name in hosts.names:
        until(lambda name=name: not hosts.processes(name, "automix"), 15, f"the ranks on {name} have ended")


@pytest.fixture(autouse=True)
def a_job_ends_with_its_test(hosts):
    """Also where the test has failed: the next ones count the processes of a host."""
    yield
    for name in hosts.names:
        hosts.run(name, "pkill", "-KILL", "-f", r"launch/[a-z]+\.sh|\.venv/bin/")


def launch(hosts, *arguments, code: int = 0, cwd: Path = ROOT, **options) -> str:
    done = hosts.run("n1", *arguments, timeout=240, cwd=cwd, **options)  # what hangs fails by this
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def test_a_launching_script_that_is_killed_takes_no_other_job_with_it(hosts, two, waiting):
    """DeepSpeed's runner would look for what to kill by name, on every host."""

    def ranks(job: str) -> int:
        return sum(len(hosts.processes(name, f"waits train --resume CONFIG {job}")) for name in ("n1", "n2"))

    jobs = []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {"AUTOMIX_VENV": waiting}}
    for job in ("job=0", "job=1"):
        jobs.append(hosts.popen("n1", DEEPSPEED, "--hostfile", two, "CONFIG", job, cwd=ROOT, **quiet))
        until(lambda job=job: ranks(job) == 2, 90, f"{job} runs")
    hosts.run("n1", "pkill", "-KILL", "-f", "bash .*launch/deepspeed.sh.*job=0")
    until(lambda: not ranks("job=0"), 60, "its ranks have ended")
    time.sleep(5)
    assert ranks("job=1") == 2 and jobs[1].poll() is None


@pytest.mark.slow
def test_pdsh_stops_after_saving_and_openmpi_mpich_and_four_nodes_go_on(hosts, two, settings, tmp_path):
    """ZeRO 2, then 1, then 3; two nodes, then four; hostile arguments and a checkout in a folder with a space."""
    run, trap = tmp_path / "run $(touch trap); `touch trap`", ROOT / "trap"
    arguments = [settings, *QUICK, "epochs=40", "checkpoint.every_epochs=0", f"output={run}"]
    process = hosts.popen("n1", DEEPSPEED, "--hostfile", two, *arguments, "engine.zero_stage=2", cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    until(lambda: process.poll() is not None or trained(run, 3), 120, "training has begun")
    hosts.run("n1", "pkill", "-TERM", "-f", "bash .*launch/deepspeed.sh")
    output, _ = process.communicate(timeout=150)
    assert process.returncode == EXIT_STOPPED, output
    assert "stopping: all ranks save first" in output and "stopped by SIGTERM at step" in output
    stopped = newest(run)
    assert stopped.manifest["world_size"] == 2 and stopped.manifest["config"]["engine"]["zero_stage"] == 2
    no_rank_is_left(hosts)

    checkout = tmp_path / "a check out; $(touch trap)"
    checkout.mkdir()
    for name in ("launch", "automix_dist", "kernels", ".venv", "configs"):
        (checkout / name).symlink_to(ROOT / name)
    arguments[4:6] = [f"epochs={max(2, stopped.step // 15 + 1)}", "checkpoint.every_epochs=1"]
    output = launch(
        hosts, checkout / "launch/deepspeed.sh", "--hostfile", two, *arguments, "engine.zero_stage=1", cwd=checkout
    )
    assert f"step {stopped.step}\n" in output and "done:" in output and "engine.zero_stage: 2 -> 1" in output
    second = newest(run).step
    assert second > stopped.step and newest(run).manifest["config"]["engine"]["zero_stage"] == 1

    arguments[4] = f"epochs={second // 15 + 1}"
    hostfile = hosts.folder / "hostfile"
    output = launch(hosts, DEEPSPEED, "--over", "openmpi", "--hostfile", hostfile, *arguments, "engine.zero_stage=3")
    assert f"step {second}\n" in output and newest(run).manifest["world_size"] == 4
    assert not trap.exists() and not (checkout / "trap").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun.mpich") is None, reason="not installed: mpich")
def test_mpich_trains_and_its_swallowed_exit_codes_are_found(hosts, two, settings, tmp_path):
    launch(hosts, DEEPSPEED, "--over", "mpich", "--hostfile", two, settings, *QUICK)
    assert newest(tmp_path / "run").manifest["world_size"] == 2
    output = launch(hosts, DEEPSPEED, "--over", "mpich", "--hostfile", two, settings, "optimizer.lrr=1", code=2)
    assert "optimizer.lr?" in output


@pytest.mark.slow
def test_torchrun_goes_on_without_a_lost_node_and_with_it_again(hosts, settings, tmp_path):
    """The lost node is the one of rank 0; the two meet at the other one."""
    run, processes = tmp_path / "run", {}
    arguments = ["--nodes", "1:2", "--rendezvous", "n2", settings, *QUICK, "epochs=200", "checkpoint.every_steps=5"]

    def start(name: str) -> None:
        with open(tmp_path / f"{name}.log", "a") as log:
            processes[name] = hosts.popen(name, TORCHRUN, *arguments, cwd=ROOT, env={"AUTOMIX_LAST_CALL": "5"},
                                          stdout=log, stderr=subprocess.STDOUT)  # fmt: skip

    def said() -> str:
        return "".join((tmp_path / f"{name}.log").read_text() for name in processes)

    def saved_by(ranks: int) -> bool:
        return newest(run, lambda _: None) is not None and newest(run).manifest["world_size"] == ranks

    for name in ("n1", "n2"):
        start(name)
    until(lambda: saved_by(2), 120, f"both train:\n{said()}")
    hosts.kill("n1")
    until(lambda: saved_by(1), 240, "the second node goes on alone")
    assert "rank 0 on n1" in (tmp_path / "n2.log").read_text()  # named before the restart
    hosts.start("n1")
    start("n1")
    until(lambda: saved_by(2), 240, "both train again")
    hosts.run("n1", "pkill", "-TERM", "-f", "bash .*launch/torchrun.sh")
    for process in processes.values():
        assert process.wait(timeout=150) == EXIT_STOPPED, said()
    assert said().count("stopped by SIGTERM") == 2  # for the node that came, and for us
    steps = [record["step"] for record in records(run, "train")]
    assert steps == sorted(set(steps))
    no_rank_is_left(hosts)


@pytest.mark.slow
def test_accelerate_trains_on_two_nodes(hosts, settings, tmp_path):
    arguments = [ROOT / "launch" / "accelerate.sh", "--nodes", "2", "--head", "n1", settings, *QUICK]
    other = hosts.popen("n2", *arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    output = launch(hosts, *arguments)
    assert other.wait(timeout=120) == 0 and "done: 30 steps" in output
    assert newest(tmp_path / "run").manifest["world_size"] == 2


def refused(hosts, hostfile: Path, *options, **keywords) -> str:
    """A launch that must not start, and must not hang: what it says."""
    return launch(hosts, DEEPSPEED, "--hostfile", hostfile, "configs/digits/automix_resnet10.yaml", code=2, **keywords)


@pytest.fixture
def lossy_n2(hosts):
    with hosts.bad_cable("n2", milliseconds=2, lost=0.003):
        yield


def test_every_host_that_cannot_take_part_is_named_with_what_to_do(hosts, tmp_path, on_n2):
    """ssh key refused, unknown name, unknown host key: found before anything starts, all in one go."""
    (tmp_path / "keys").write_text("")
    on_n2(tmp_path / "keys", "/root/.ssh/authorized_keys")
    known = hosts.run("n1", "cat", "/root/.ssh/known_hosts").stdout
    (tmp_path / "known_hosts").write_text(known.replace("n*,10.77.0.*", "n1,n2"))
    on_n2(tmp_path / "known_hosts", "/root/.ssh/known_hosts", "n1")
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\nnowhere slots=1\n")
    output = refused(hosts, tmp_path / "hostfile")
    assert "n2: ssh fails" in output and "Permission denied" in output and "ssh-copy-id n2" in output
    assert "nowhere: ssh fails" in output and "mend the name in" in output
    assert "n3: ssh fails: Host key verification failed" in output and "compare the key it shows" in output
    assert "3 of 4 hosts cannot take part; nothing was started" in output


def test_a_host_that_is_down_is_named(hosts, two):
    hosts.run("n2", "ip", "link", "set", "e0", "down")
    try:
        assert "is it up, with an sshd, and no firewall between?" in refused(hosts, two)
    finally:
        hosts.run("n2", "ip", "link", "set", "e0", "up")


def test_a_host_without_the_checkout_or_with_another_one_is_named(hosts, two, tmp_path, on_n2):
    (tmp_path / "other.py").write_text("# another version\n")
    on_n2(tmp_path / "other.py", ROOT / "automix_dist" / "__init__.py")
    assert "n2: its files in" in refused(hosts, two)
    (tmp_path / "empty").mkdir()
    on_n2(tmp_path / "empty", ROOT / ".venv")
    output = refused(hosts, two)
    assert "n2: " in output and ".venv does not work there: run launch/install.sh on it" in output
    on_n2(tmp_path / "empty", ROOT / "launch")
    assert "env.sh is not there: every node needs this checkout at the same path" in refused(hosts, two)


def test_a_host_with_other_versions_is_named(hosts, two, tmp_path, on_n2):
    import torch

    (installed,) = Path(torch.__file__).parent.parent.glob("torch-*.dist-info")
    text = (installed / "METADATA").read_text()
    (tmp_path / "METADATA").write_text(text.replace("\nVersion: ", "\nVersion: 1.13.0+old", 1))
    on_n2(tmp_path / "METADATA", installed / "METADATA")
    output = refused(hosts, two)
    assert "n2: has Python" in output and "torch 1.13.0+old" in output and "install the same" in output


def test_a_port_that_is_taken_and_a_name_that_is_loopback_are_named(hosts, two, tmp_path, on_n2):
    code = "import socket, time; s = socket.create_server(('', 29500)); print('ready', flush=True); time.sleep(60)"
    holder = hosts.popen("n1", "python3", "-c", code, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        assert "MASTER_PORT = 29500: taken on n1" in refused(hosts, two, env={"MASTER_PORT": "29500"})
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    (tmp_path / "hosts").write_text("127.0.1.1 n1\n10.77.0.2 n2\n")
    on_n2(tmp_path / "hosts", "/etc/hosts")
    assert "n2: resolves n1 to 127.0.1.1, which is itself: mend its /etc/hosts" in refused(hosts, two)


def test_debians_loopback_name_of_the_first_host_is_worked_around_and_said(hosts, two, tmp_path):
    """Debian's /etc/hosts gives the own name 127.0.1.1: the others' view of the address is taken."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 n1\n10.77.0.2 n2\n")
    script = 'mount --bind "$0" /etc/hosts; trap "umount /etc/hosts" EXIT; "$@"'
    output = launch(
        hosts, "bash", "-c", script, tmp_path / "hosts", DEEPSPEED, "--hostfile", two, "--dry-run", "CONFIG"
    )
    assert "n1 resolves itself to 127.0.1.1 (loopback); using 10.77.0.1, which n2 sees" in output
    assert "--master_addr=10.77.0.1" in output


def test_a_clock_that_is_off_is_told(hosts, two, tmp_path, on_n2):
    (tmp_path / "date").write_text("#!/bin/sh\necho 1000000000\n")
    (tmp_path / "date").chmod(0o755)
    on_n2(tmp_path / "date", shutil.which("date"))
    visible = {"CUDA_VISIBLE_DEVICES": "2,3"}
    output = launch(hosts, DEEPSPEED, "--hostfile", two, "--dry-run", "CONFIG", env=visible)
    assert "warning: n2: its clock is off by -" in output
    assert "warning: CUDA_VISIBLE_DEVICES = 2,3 stays here" in output and "  CUDA_VISIBLE_DEVICES=2,3\n" not in output
    output = launch(
        hosts,
        DEEPSPEED,
        "--hostfile",
        two,
        "--dry-run",
        "CONFIG",
        env=visible | {"AUTOMIX_CARRY": "CUDA_VISIBLE_DEVICES"},
    )
    assert "stays here" not in output and "  CUDA_VISIBLE_DEVICES=2,3\n" in output


def test_data_reaches_the_disk_of_every_node(hosts, two, digits, tmp_path, on_n2):
    """Each host's own /mnt: copied by those who see the file, sent through ssh to those who do not, then skipped."""
    source = tmp_path / "a b; $(touch trap)"
    source.mkdir()
    for name in ("val.beton", "val.beton.json"):
        shutil.copy(digits / name, source)
    (tmp_path / "empty").mkdir()
    on_n2(tmp_path / "empty", source)
    stage = [ROOT / "launch" / "stage_data.sh", "--hostfile", two, source / "val.beton", "/mnt/fast disk"]
    assert launch(hosts, *stage).count("copied") == 4
    for name in ("n1", "n2"):
        assert hosts.run(name, "cmp", digits / "val.beton", "/mnt/fast disk/val.beton").returncode == 0
    assert launch(hosts, *stage).count("there already") == 4
    hosts.run("n2", "mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", "/mnt/fast disk")
    output = launch(hosts, *stage, code=2)
    assert "n2: /mnt/fast disk/val.beton could not be written" in output
    # Both files are copied at once: the other one fits only where the first has not yet filled the disk.
    assert "1 of 4 copies failed" in output or "2 of 4 copies failed" in output
    hosts.run("n2", "umount", "/mnt/fast disk")


def test_an_older_file_at_the_same_path_is_not_taken_for_the_one_to_copy(hosts, two, digits, tmp_path, on_n2):
    for folder, name in (("new", "val"), ("old", "train")):
        (tmp_path / folder).mkdir()
        for suffix in ("", ".json"):
            shutil.copy(digits / f"{name}.beton{suffix}", tmp_path / folder / f"data.beton{suffix}")
    on_n2(tmp_path / "old", tmp_path / "new")
    stage = ROOT / "launch" / "stage_data.sh"
    assert launch(hosts, stage, "--hostfile", two, tmp_path / "new/data.beton", "/mnt/staged").count("copied") == 4
    assert hosts.run("n2", "cmp", digits / "val.beton", "/mnt/staged/data.beton").returncode == 0
    # And where the copy of an older one is what lies at the path itself.
    hosts.run("n2", "cp", digits / "train.beton", "/mnt/staged/data.beton")
    launch(hosts, stage, "--hostfile", two, "/mnt/staged/data.beton", "/mnt/staged")
    assert hosts.run("n2", "cmp", digits / "val.beton", "/mnt/staged/data.beton").returncode == 0


@pytest.mark.slow
def test_one_node_without_the_data_ends_the_job_and_is_named(hosts, two, settings, digits, tmp_path, on_n2):
    (tmp_path / "empty").mkdir()
    on_n2(tmp_path / "empty", digits)
    output = launch(hosts, DEEPSPEED, "--hostfile", two, settings, *QUICK, code=1, env={"AUTOMIX_GRACE": "5"})
    assert "n2: automix [rank 1]: error: " in output and "train.beton" in output
    assert "automix: rank 1 on n2 ended with exit code 1" in output and "ending the other ranks" in output
    no_rank_is_left(hosts)


@pytest.mark.slow
def test_the_doctor_looks_at_all_nodes_and_the_network_between_them(hosts, settings, digits, tmp_path, on_n2):
    """First all is well; then n2 lacks the data, and sends to n3 as if through a slow cable."""
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    doctor = [DEEPSPEED, "--hostfile", tmp_path / "hostfile", "--doctor", settings, "batch_size=48"]
    output = launch(hosts, *doctor)
    assert "all 3 on 3 host(s) reached 10.77.0.1:" in output and "ok    collectives" in output
    assert "Ready to train" in output

    (tmp_path / "empty").mkdir()
    on_n2(tmp_path / "empty", digits)
    slow = """tc qdisc add dev e0 root handle 1: htb default 1
        tc class add dev e0 parent 1: classid 1:1 htb rate 40gbit
        tc class add dev e0 parent 1: classid 1:2 htb rate 200mbit
        tc filter add dev e0 parent 1: protocol ip u32 match ip dst 10.77.0.3 flowid 1:2"""
    done = hosts.run("n2", "sh", "-ec", slow)
    assert done.returncode == 0, done.stdout
    try:
        output = launch(hosts, *doctor, code=1)
    finally:
        hosts.run("n2", "tc", "qdisc", "del", "dev", "e0", "root")
    assert "slow: ranks 1 on n2 (10.77.0.2) and 2 on n3 (10.77.0.3): 0." in output, output
    assert re.search(r"on n2 \(10\.77\.0\.2\): /\S+/train\.beton does not exist; write it", output), output
    assert "Not ready to train: data.train" in output


@pytest.mark.slow
def test_a_stop_before_there_are_ranks_is_not_lost(hosts, two, settings, tmp_path):
    own = {"TMPDIR": "/mnt", "AUTOMIX_GRACE": "5"}  # what the script notes in a file is for its own host alone
    with open(tmp_path / "log", "w") as log:
        process = hosts.popen("n1", DEEPSPEED, "--hostfile", two, settings, *QUICK, cwd=ROOT, env=own,
                              stdout=log, stderr=log)  # fmt: skip
    until(lambda: hosts.processes("n1", "--master_addr="), 120, "DeepSpeed's launcher runs")
    hosts.run("n1", "pkill", "-TERM", "-f", "bash .*launch/deepspeed.sh")
    text = (tmp_path / "log").read_text
    assert process.wait(timeout=150) == EXIT_STOPPED, text()
    assert "stopped before training has begun" in text() and not trained(tmp_path / "run", 1)
    no_rank_is_left(hosts)


@pytest.mark.slow
def test_the_launching_script_is_killed_and_the_ranks_save_and_leave(hosts, two, settings, tmp_path):
    run = tmp_path / "run"
    process = hosts.popen("n1", DEEPSPEED, "--hostfile", two, settings, *QUICK, "epochs=200", cwd=ROOT,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    until(lambda: trained(run, 3), 120, "training has begun")
    hosts.run("n1", "pkill", "-KILL", "-f", "bash .*launch/deepspeed.sh")
    process.wait(timeout=10)
    until(lambda: newest(run, lambda _: None) is not None, 120, "the ranks have saved")
    assert json.loads((newest(run).folder / "manifest.json").read_text())["world_size"] == 2
    no_rank_is_left(hosts)


@pytest.mark.slow
def test_faults_of_a_running_job_are_named_and_cost_no_state(hosts, settings, tmp_path, lossy_n2):
    """Delay and loss all the time; a full disk, a slow rank and a frozen one; a cut link; a killed rank."""
    run, log = hosts.disk / "run", tmp_path / "log"
    arguments = [settings, *QUICK, "epochs=500", "batch_size=16", "checkpoint.every_steps=5", "checkpoint.keep_last=2",
                 "engine.stall_seconds=8", f"output={run}"]  # fmt: skip

    def start(slots: int) -> subprocess.Popen:
        (tmp_path / "hostfile").write_text(f"n1 slots={slots}\nn2 slots={slots}\n")
        command = [DEEPSPEED, "--hostfile", tmp_path / "hostfile", *arguments]
        with open(log, "w") as file:
            return hosts.popen("n1", *command, cwd=ROOT, env={"AUTOMIX_GRACE": "5"}, stdout=file, stderr=file)

    def saved() -> int:
        found = newest(hosts.disk_here / "run", lambda _: None)
        return found.step if found else 0

    def goes_on(seconds: float = 120) -> None:
        before = saved()
        until(lambda: job.poll() is not None or saved() > before, seconds, "a new checkpoint")
        assert job.poll() is None, log.read_text()

    def resumes() -> None:
        """From the newest checkpoint that there is."""
        goes_on()
        assert f"resuming from {run}/checkpoints/step_{before:08d}, step {before}\n" in log.read_text()

    def ends(code: int, *said: str) -> None:
        """Soon the fault of just now is in the first line of error, and the job over, its state on disk."""
        assert job.wait(timeout=120) == code, log.read_text()
        first = next(line for line in log.read_text().splitlines() if "automix: error: " in line)
        assert all(part in first for part in said), first
        no_rank_is_left(hosts)

    def on_n2(script: str) -> None:
        done = hosts.run("n2", "bash", "-c", f"rank=$(pgrep -of bin/automix); {script}")
        assert done.returncode == 0, done.stdout

    job = start(slots=1)
    goes_on()
    filler = hosts.disk_here / "filler"
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    until(lambda: "No space left on device" in log.read_text(), 120, "the full disk is told")
    filler.unlink()
    goes_on()
    slowing = "for i in {1..400}; do kill -STOP $rank; sleep 0.15; kill -CONT $rank; sleep 0.05; done"
    slower = hosts.popen("n2", "bash", "-c", f"rank=$(pgrep -of bin/automix); {slowing}")
    until(lambda: "rank 1 on n2" in log.read_text(), 150, "the slow rank is named")
    slower.kill()
    slower.wait()
    assert "falls behind" in log.read_text()
    on_n2("kill -STOP $rank")
    ends(1, "rank 1 on n2 (process ", " has not responded for ", "last seen in step ", ".py:")

    before, job = saved(), start(slots=2)
    resumes()
    on_n2("ip link set e0 down")
    try:
        ends(1, "each of 2 ranks (2, 3 on n2) has not responded for ", "is its host down?", "last seen in step ")
    finally:
        on_n2("ip link set e0 up")

    before, job = saved(), start(slots=1)
    resumes()
    on_n2("kill -KILL $rank")
    ends(137, "rank 1 on n2 (process ", "last seen in step ")
    steps = [record["step"] for record in records(hosts.disk_here / "run", "train")]
    assert steps == sorted(set(steps)) and saved() > before
