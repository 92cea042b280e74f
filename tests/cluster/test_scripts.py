"""What the launching scripts do without any host: plans, refusals, quoting, and the files other systems read."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from hosts import write_programs

from automix_dist.errors import EXIT_STOPPED, EXIT_USAGE

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
CONFIG = "configs/digits/automix_resnet10.yaml"
SCRIPTS = ["deepspeed.sh", "torchrun.sh", "accelerate.sh", "slurm.sbatch", "stage_data.sh"]
HOSTILE = ["output=a b; touch {0} $(touch {0}) `touch {0}` \" ' \\ *", "x=${{HOME}}\nnew line", "", "ünïcode %n %h"]

pytestmark = pytest.mark.skipif(shutil.which("ip") is None, reason="not installed: iproute2")


def bash(*arguments: str | Path, code: int = 0, timeout: float = 60, **options) -> str:
    """Run a script; its output and errors together."""
    done = subprocess.run(
        ["bash", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        **options,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_the_whole_header(script):
    text = bash(LAUNCH / script, "--help")
    assert script in text and "--dry-run" in text and "#" not in text.splitlines()[0]
    assert "no config" in bash(LAUNCH / script, code=2) or script == "stage_data.sh"


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("accelerate.sh", ["--num_processes", "8", "--dry-run", CONFIG], "--ranks-per-node N"),
        ("torchrun.sh", ["--nproc-per-node=8", CONFIG], "--ranks-per-node N"),
        ("torchrun.sh", ["--nnodes", "2", CONFIG], "--nodes MIN:MAX"),
        ("torchrun.sh", [CONFIG, "--nodes=2"], "--nodes MIN:MAX"),
        ("deepspeed.sh", [CONFIG, "--dry-run"], "--dry-run"),
        ("deepspeed.sh", ["--num_gpus", "8", CONFIG], None),  # the hostfile's to say
        ("slurm.sbatch", [CONFIG, "--dry-run"], None),
        ("stage_data.sh", ["--dest", "a.beton", "/tmp"], None),
    ],
)
def test_an_unknown_option_starts_nothing(script, arguments, expected):
    text = bash(LAUNCH / script, *arguments, code=2)
    option = next(each for each in arguments if each.startswith("-"))
    hint = f"; expected before CONFIG: {expected}" if expected else ""
    assert text == f"automix: error: unknown option {option}{hint}; see --help\n"


def test_the_trainings_own_options_are_passed_on():
    text = bash(LAUNCH / "accelerate.sh", "--dry-run", "--debug", CONFIG, "--overwrite")
    assert f"automix train --debug {CONFIG} --overwrite" in text


@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh", "slurm.sbatch"])
def test_a_dry_run_shows_the_command_the_settings_and_why(script):
    text = bash(LAUNCH / script, "--dry-run", CONFIG, "epochs=3", "output=a b")
    assert "automix train --resume configs/digits/automix_resnet10.yaml epochs=3 output=a\\ b" in text
    settings = [line for line in text.splitlines() if line.startswith("  ") and "=" in line and "#" not in line]
    reasons = [line for line in text.splitlines() if line.startswith("      # ")]
    assert len(settings) == len(reasons) >= 6


def test_a_restart_does_not_discard_the_run_again():
    torchrun = LAUNCH / "torchrun.sh"
    assert "would discard the run again" in bash(torchrun, "--dry-run", CONFIG, "--overwrite", code=2)
    assert "--overwrite" in bash(torchrun, "--restarts", "0", "--dry-run", CONFIG, "--overwrite")


def test_settings_of_the_user_win():
    environment = os.environ | {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "mine"}
    text = bash(LAUNCH / "rank.sh", "--explain", env=environment)
    assert "NCCL_DEBUG=INFO" in text and "PYTHONUNBUFFERED=1" in text
    shown = bash(LAUNCH / "rank.sh", "bash", "-c", "echo $NCCL_DEBUG $GLOO_SOCKET_IFNAME", env=environment)
    assert shown == "INFO mine\n"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder that comes first on PATH, filled by `programs(name=script)`."""
    folder = tmp_path / "programs"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return partial(write_programs, folder)


def test_another_environment_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "conda" / "bin").mkdir(parents=True)
    monkeypatch.setenv("AUTOMIX_VENV", "conda")
    monkeypatch.chdir(tmp_path)
    command = ["bash", LAUNCH / "accelerate.sh", "--dry-run", ROOT / CONFIG]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {tmp_path}/conda/bin/automix is not there: run launch/install.sh, or set AUTOMIX_V" in done.stderr
    (tmp_path / "conda" / "bin" / "automix").symlink_to("/bin/true")
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"{tmp_path}/conda/bin/python -m accelerate" in done.stdout and "conda/bin/automix train" in done.stdout


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(code)`: an environment whose `automix train` is this Python program."""

    def make(code: str) -> None:
        config = "[[ $* != *--print-config ]] || exec echo 'batch_size: 64\naccumulation_steps: 1'"
        automix, python = f"{config}\nexec {sys.executable} -c '{code}'", f'exec {sys.executable} "$@"'
        write_programs(tmp_path / "bin", automix=automix, python=python)
        monkeypatch.setenv("AUTOMIX_VENV", str(tmp_path))

    return make


def test_what_accelerate_config_has_written_does_not_count(stand_in, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ngpu_ids: 2,3\nmixed_precision: fp16\n"
        "machine_rank: 0\nnum_machines: 1\nnum_processes: 2\nuse_cpu: false\ndebug: false\n"
    )
    stand_in("""import os; print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)""")
    home = {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}
    for ranks in ("1", "2"):
        text = bash(LAUNCH / "accelerate.sh", "--ranks-per-node", ranks, CONFIG, env=os.environ | home, timeout=120)
        assert text.count("sees 0,1") == int(ranks) and "sees 2,3" not in text


def test_ranks_that_are_started_again_find_no_addresses_of_dead_ones(stand_in):
    stand_in("""if True:
        import os, sys
        from torch.distributed import TCPStore
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        opens = os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=opens, wait_for_workers=False)
        print("found" if store.check(["left"]) else "clean", flush=True)
        store.set("left", "")
        sys.exit(not again)""")
    text = bash(LAUNCH / "torchrun.sh", CONFIG, timeout=200)
    assert text.count("clean") == 2 and "found" not in text


@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [("comes before the ranks", EXIT_STOPPED), ("comes while they start", EXIT_STOPPED), ("makes them fail", 1)],
)
def test_a_request_to_stop_is_final(script, fault, expected, stand_in, tmp_path):
    """Whenever it comes: no rank begins after it, or again."""
    stand_in(f"""if True:
        import pathlib, signal, sys, time
        if "{fault}" == "makes them fail":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        with open("{tmp_path}/begun", "a") as file:
            file.write("x")
        time.sleep(150)""")
    launcher, begun = tmp_path / "launcher", tmp_path / "begun"
    python = (tmp_path / "bin" / "python").read_text()
    early = fault == "comes before the ranks"
    wait = f"touch {launcher}; {'sleep 2' if early else ''}"
    (tmp_path / "bin" / "python").write_text(python.replace("\nexec", f"\n{wait}\nexec"))
    job = subprocess.Popen(["bash", LAUNCH / script, CONFIG], cwd=ROOT)
    deadline = time.monotonic() + 100
    while not (launcher if early else begun).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()
    try:
        assert job.wait(timeout=100) == expected
    finally:
        job.kill()
    assert not begun.exists() if early else begun.read_text() == "x"


def test_few_cores_for_gpus_are_told_once_a_node(programs, monkeypatch):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")  # `nproc` would believe it
    ranks = str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    programs(nvidia_smi="exit 9")
    assert bash(LAUNCH / "rank.sh", "true") == ""
    programs(nvidia_smi="echo GPU 0: NVIDIA H200")
    text = bash(LAUNCH / "rank.sh", "true")
    assert text.count("\n") == 1 and f"{ranks} core(s) for {ranks} rank(s), fewer than 4 each" in text
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert bash(LAUNCH / "rank.sh", "true") == ""


def test_a_task_of_a_job_array_goes_back_into_the_queue_alone(programs, tmp_path, monkeypatch):
    programs(
        srun=f"echo 'automix: rank 0 on n1 ended with exit code {EXIT_STOPPED}' >&2",
        squeue="[[ $* == *'-j 5_2 '* ]] && echo RUNNING",
        scontrol=f"echo $* >>{tmp_path}/calls",
    )
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "2", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    text = bash(LAUNCH / "slurm.sbatch", CONFIG, code=EXIT_STOPPED)
    assert "saved; back into the queue" in text
    assert (tmp_path / "calls").read_text() == "requeue 5_2\n"


def in_slurm(programs, monkeypatch, tmp_path, rank: str, **scripts: str) -> Path:
    """Programs that play a job of Slurm whose only rank does what `rank` says; where calls of scontrol are noted."""
    count = f"echo >>{tmp_path}/$1; [ $(wc -l <{tmp_path}/$1) -gt 2 ]"  # works the third time
    programs(count=count, sleep="exec /bin/sleep 0.1", srun=rank, **scripts)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return tmp_path / "calls"


def test_a_controller_that_does_not_answer_is_asked_again(programs, tmp_path, monkeypatch):
    saved = f"echo 'automix: rank 0 on n1 ended with exit code {EXIT_STOPPED}' >&2"
    scontrol = f"count scontrol && echo $* >>{tmp_path}/calls"
    calls = in_slurm(programs, monkeypatch, tmp_path, saved, squeue="count squeue && echo RUNNING", scontrol=scontrol)
    assert "saved; back into the queue" in bash(LAUNCH / "slurm.sbatch", CONFIG, code=EXIT_STOPPED)
    assert calls.read_text() == "requeue 7\n"
    programs(squeue="echo CANCELLED")
    bash(LAUNCH / "slurm.sbatch", CONFIG, code=EXIT_STOPPED)
    assert calls.read_text() == "requeue 7\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preemption_of_the_first_seconds_lets_the_job_come_round(programs, tmp_path, monkeypatch, number):
    died = f"echo 'automix: rank 0 on n1 ended with exit code {128 + number}' >&2; exit {128 + number}"
    scontrol = f"echo $* >>{tmp_path}/calls"
    calls = in_slurm(programs, monkeypatch, tmp_path, died, squeue="echo RUNNING", scontrol=scontrol)
    text = bash(LAUNCH / "slurm.sbatch", CONFIG, code=EXIT_STOPPED)
    assert "stopped before training has begun; back into the queue" in text
    assert calls.read_text() == "requeue 7\n"
    bash(LAUNCH / "slurm.sbatch", CONFIG, "--overwrite", code=EXIT_STOPPED)
    assert calls.read_text() == "requeue 7\n" * 2


def test_numbers_of_a_rank_that_starts_a_job_are_not_the_jobs(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    in_slurm(programs, monkeypatch, tmp_path, "echo rank [${RANK:-}${WORLD_SIZE:-}${LOCAL_RANK:-}]")
    assert "rank []" in bash(LAUNCH / "slurm.sbatch", CONFIG)


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [(None, 2), ("", 1), ("-1", 1), ("0", 1), ("0,1,3", 3), ("GPU-a,GPU-b", 2), ("MIG-a", 1), ("MIG-a,MIG-b", 1)],
)
def test_hidden_gpus_get_no_ranks(programs, visible, ranks):
    """Of several MIG slices a process sees the first one only."""
    programs(nvidia_smi="echo GPU 0: NVIDIA H200; echo GPU 1: NVIDIA H200")
    hidden = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"} | hidden
    assert bash("-c", f". {LAUNCH}/job.sh; ranks_per_node", env=environment) == f"{ranks}\n"


def test_the_ranks_save_though_the_reader_of_the_output_is_gone(tmp_path):
    """`launch/x.sh ... | tee log`: Ctrl-C ends tee too, which must cost neither the stop nor its exit code."""
    rank = f"trap 'echo saved >{tmp_path}/saved; echo told >&2; exit {EXIT_STOPPED}' TERM; echo $$ >{tmp_path}/pid; "
    rank += "sleep 0.5; echo ready >&2; while :; do sleep 0.1; done"
    script = f'. {LAUNCH}/job.sh; new_job; signal_job() {{ kill "-$1" "$(cat {tmp_path}/pid)"; }}; supervise . "$@"'
    command = ["bash", "-c", script, "bash", "bash", "-c", rank]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert job.stdout.readline() == b"ready\n"
    job.stdout.close()
    job.terminate()
    assert job.wait(timeout=30) == EXIT_STOPPED
    assert (tmp_path / "saved").exists()


def test_a_closed_terminal_stops_the_job_and_is_told_how_it_ended(tmp_path):
    """The whole session of the script hears of it."""
    rank = f"trap 'echo saved >{tmp_path}/saved; exec {LAUNCH}/rank.sh bash -c \"exit {EXIT_STOPPED}\"' TERM; "
    rank += f"echo $$ >{tmp_path}/pid; echo ready >&2; while :; do sleep 0.1; done"
    script = f'. {LAUNCH}/job.sh; new_job; signal_job() {{ kill "-$1" "$(cat {tmp_path}/pid)"; }}; supervise . "$@"'
    command = ["bash", "-c", script, "bash", "bash", "-c", rank]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while job.stdout.readline() != b"ready\n":
        assert job.poll() is None
    os.killpg(job.pid, signal.SIGHUP)
    said = job.communicate(timeout=30)[0].decode()
    assert job.returncode == EXIT_STOPPED, said
    assert (tmp_path / "saved").exists() and f"ended with exit code {EXIT_STOPPED}" in said


@pytest.mark.slow
def test_accelerate_trains_with_one_process_too(settings, tmp_path):
    """Its launcher of one sets half of what it sets for several."""
    text = bash(LAUNCH / "accelerate.sh", "--ranks-per-node", "1", settings, "epochs=2", timeout=200)
    assert "training on 1 rank(s)" in text and "done: 30 steps" in text


def test_a_signal_to_a_fork_of_the_script_takes_nothing_from_the_job(tmp_path):
    """Ctrl-C and `pkill -f` reach all processes, also those that bash has only just forked."""
    script = f'. {LAUNCH}/job.sh; new_job; echo "$scratch"; trap : TERM; while [ -e {tmp_path}/go ]; do '
    script += "sleep 0.001 & wait $! || true; done"  # as `supervise` waits
    (tmp_path / "go").touch()
    job = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    scratch = Path(job.stdout.readline().strip())
    children, hit = os.open(f"/proc/{job.pid}/task/{job.pid}/children", os.O_RDONLY), set()
    deadline = time.monotonic() + 30
    while len(hit) < 500 and time.monotonic() < deadline:
        for child in map(int, os.pread(children, 4096, 0).split()):
            if child not in hit:
                hit.add(child)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
    os.close(children)
    assert scratch.is_dir() and len(hit) == 500
    (tmp_path / "go").unlink()
    assert job.wait(timeout=30) == 0 and not scratch.exists()


def own_address() -> str:
    """This machine's, other than loopback."""
    show = ["ip", "-o", "-4", "addr", "show", "scope", "global"]
    address = subprocess.run(show, capture_output=True, text=True).stdout.partition(" inet ")[2].partition("/")[0]
    return address or pytest.skip("this machine has no address but loopback")


def test_a_hostfile_may_begin_with_an_address(programs, tmp_path):
    """This machine plays both hosts; the first is known by its address alone."""
    address = own_address()
    programs(ssh="exec bash -s", pdsh="true")
    (tmp_path / "hosts").write_text(f"{address} slots=2\nother slots=2\n")
    text = bash(LAUNCH / "deepspeed.sh", "--hostfile", tmp_path / "hosts", "--dry-run", CONFIG)
    assert re.search(rf"2 hosts meet at {re.escape(address)}:\d+ \({re.escape(address)}\)", text)
    assert f"--master_addr={address}" in text


def test_arguments_and_variables_survive_the_packing(tmp_path):
    """Through `pack` and rank.sh, in a folder with a space, to a program that prints what it got."""
    trap, folder = tmp_path / "trap", tmp_path / "a b; $(id)"
    folder.mkdir()
    arguments = [text.format(trap) for text in HOSTILE]
    found = "os.getcwd(), os.environ['NCCL_X'], os.environ['MLFLOW_X'], *sys.argv[1:]"
    code = f"import json, os, sys; print(json.dumps([{found}]))"
    script = f'. {LAUNCH}/job.sh; job_settings=(); cd "$1"; shift; pack "$@"'
    variables = {"NCCL_X": arguments[0], "MLFLOW_X": arguments[1]}
    packed = bash("-c", script, "bash", folder, "python3", "-c", code, *arguments, env=os.environ | variables)
    assert packed.isascii() and not set(packed) & set(" ;$&|<>'\"\\`*?()")
    assert json.loads(bash(LAUNCH / "rank.sh", "--packed", packed)) == [str(folder), *arguments[:2], *arguments]
    assert not trap.exists()


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=id slots=1",
        "a;b slots=1",
        "$(id) slots=2",
        "n1",
        "n1 slots=0",
        "user@n1 slots=1",
        "n[1-2] slots=1",
    ],
)
def test_a_line_of_a_hostfile_that_is_no_host_is_named(tmp_path, line):
    (tmp_path / "hosts").write_text(f"# comment\n\nn0 slots=1\n{line}\n")
    text = bash(LAUNCH / "deepspeed.sh", "--hostfile", tmp_path / "hosts", CONFIG, code=2)
    assert f"{tmp_path}/hosts:4: " in text and "expected HOST slots=N" in text


def test_hostfiles_that_cannot_be_used(tmp_path):
    (tmp_path / "twice").write_text("n1 slots=1\nn1 slots=2\n")
    (tmp_path / "empty").write_text("# nothing\n")
    for name, message in (("twice", "n1 is there twice"), ("empty", "no hosts"), ("absent", "no such hostfile")):
        assert message in bash(LAUNCH / "deepspeed.sh", "--hostfile", tmp_path / name, CONFIG, code=2)


def test_ranks_that_cannot_share_the_batch_are_told_before_anything_starts():
    text = bash(LAUNCH / "torchrun.sh", "--dry-run", "--ranks-per-node", "3", CONFIG, code=2)
    assert "batch_size = 64 cannot be shared evenly" in text
    text = bash(LAUNCH / "torchrun.sh", "--dry-run", "--nodes", "1:4", "--rendezvous", socket.gethostname(), CONFIG)
    assert "by 3 node(s)" in text and "1 2 4 would do" in text


def test_a_rendezvous_that_no_other_node_can_reach_is_refused():
    text = bash(LAUNCH / "torchrun.sh", "--dry-run", "--nodes", "2", "--rendezvous", "localhost", CONFIG, code=2)
    assert "localhost resolves to" in text and "this node itself" in text
    text = bash(LAUNCH / "torchrun.sh", "--dry-run", "--nodes", "2", CONFIG, code=2)
    assert "needs --rendezvous HOST" in text


def test_the_head_knows_itself_by_any_of_its_names():
    """By its address too, every time; a name without an address is told."""
    address = own_address()
    for _ in range(10):
        text = bash(LAUNCH / "accelerate.sh", "--dry-run", "--nodes", "2", "--head", address, CONFIG)
        assert "--machine_rank=0" in text
    for script, option in (("accelerate.sh", "--head"), ("torchrun.sh", "--rendezvous")):
        text = bash(LAUNCH / script, "--dry-run", "--nodes", "2", option, "no-such-host.invalid", CONFIG, code=2)
        assert "no-such-host.invalid: this name has no address here" in text


def test_secrets_stay_off_command_lines():
    script = f". {LAUNCH}/job.sh; job_settings=(); name_secrets; pack true"
    secrets = {"WANDB_API_KEY": "s3cr3t", "HF_TOKEN": "s3cr3t", "WANDB_PROJECT": "flowers", "NCCL_IB_PKEY": "7"}
    packed = bash("-c", f"{script} | base64 -d | tr '\\0' '\\n'", env=os.environ | secrets)
    assert "WANDB_PROJECT=flowers" in packed and "NCCL_IB_PKEY=7" in packed and "s3cr3t" not in packed
    assert "note: WANDB_API_KEY stays here" in packed and "note: HF_TOKEN stays here" in packed
    wanted = os.environ | secrets | {"AUTOMIX_CARRY": "HF_TOKEN"}
    assert "HF_TOKEN=s3cr3t" in bash("-c", f"{script} | base64 -d | tr '\\0' '\\n'", env=wanted)


def test_a_shell_of_salloc_is_one_rank_and_a_task_of_srun_one_of_many():
    code = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])"
    launchers = ("RANK", "WORLD_SIZE", "SLURM_", "PMI_", "OMPI_")
    shell = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    shell |= {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert bash(LAUNCH / "rank.sh", "python3", "-c", code, env=shell) == "0 1\n"
    task = shell | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}
    assert bash(LAUNCH / "rank.sh", "python3", "-c", code, env=task) == "3 8\n"


def test_ports_in_use_are_seen():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = f". {LAUNCH}/env.sh; port_taken {listener.getsockname()[1]}"
        bash("-c", taken)
    bash("-c", taken, code=1)


def test_cores_are_shared_out_by_numa_node():
    """Two nodes, hyperthreads numbered last, as on most servers: a rank's threads are siblings of one node."""
    topology = "".join(f"{cpu % 8 // 4},{cpu % 8},{cpu}\n" for cpu in range(16))
    script = f'. {LAUNCH}/env.sh; lscpu() {{ printf "# NODE,CORE,CPU\\n{topology}"; }}; ordered_cores 0-11,13'
    assert bash("-c", script).split() == [*"08192", "10", "3", "11", "4", "5", "13", "6", "7"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_each_rank_of_a_node_gets_cores_of_its_own():
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['AUTOMIX_CORE_SHARERS'])"
    seen = [
        bash(LAUNCH / "rank.sh", "python3", "-c", code, env=os.environ | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank})
        for rank in "01"
    ]
    cores = [set(json.loads(line.rsplit(" ", 1)[0])) for line in seen]
    assert not cores[0] & cores[1] and cores[0] | cores[1] == os.sched_getaffinity(0)


def test_ctrl_c_ends_the_copies(digits, tmp_path):
    slow, disk = tmp_path / "bin" / "cat", tmp_path / "disk"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    job = subprocess.Popen(
        ["bash", LAUNCH / "stage_data.sh", digits / "val.beton", disk],
        env=os.environ | {"PATH": f"{slow.parent}:{os.environ['PATH']}"},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background job
    )
    deadline = time.monotonic() + 30
    while len(list(disk.glob(".val.beton*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=30) == 130
    while list(disk.glob(".val.beton*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(disk.iterdir()) == []


def test_stage_data_copies_once_and_only_what_is_whole(digits, tmp_path):
    target = tmp_path / "a b"
    assert "copied" in bash(LAUNCH / "stage_data.sh", digits / "train.beton", digits / "val.beton", target)
    for name in ("train.beton", "val.beton", "train.beton.json"):
        assert (target / name).read_bytes() == (digits / name).read_bytes()
    assert bash(LAUNCH / "stage_data.sh", digits / "train.beton", target).count("there already") == 2
    torn = bytearray((digits / "val.beton").read_bytes())
    torn[len(torn) // 2] ^= 1
    (tmp_path / "val.beton").write_bytes(torn)
    shutil.copy(digits / "val.beton.json", tmp_path)
    (target / "val.beton").unlink()
    text = bash(LAUNCH / "stage_data.sh", tmp_path / "val.beton", target, code=2)
    assert "does not have the manifest's checksum" in text
    assert sorted(path.name for path in target.iterdir()) == ["train.beton", "train.beton.json", "val.beton.json"]


def test_stage_data_takes_the_manifest_beside_a_link(digits, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.copy(digits / "val.beton", tmp_path / "disk" / "v1.beton")
    (tmp_path / "val.beton").symlink_to("disk/v1.beton")
    shutil.copy(digits / "val.beton.json", tmp_path)
    assert bash(LAUNCH / "stage_data.sh", tmp_path / "val.beton", tmp_path / "target").count("copied") == 2
    assert (tmp_path / "target" / "val.beton").read_bytes() == (digits / "val.beton").read_bytes()


def test_stage_data_refuses_two_files_of_one_name(digits, tmp_path):
    for name in ("val.beton", "val.beton.json"):
        shutil.copy(digits / name, tmp_path)
    text = bash(LAUNCH / "stage_data.sh", digits / "val.beton", tmp_path / "val.beton", tmp_path / "target", code=2)
    assert "two files are called val.beton" in text and not (tmp_path / "target").exists()


def test_stage_data_removes_what_a_killed_one_has_left(digits, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale, live = (target / f".val.beton.{socket.gethostname()}-{pid}" for pid in (dead.pid, os.getpid()))
    stale.write_text("part"), live.write_text("part")
    bash(LAUNCH / "stage_data.sh", digits / "val.beton", target)
    assert not stale.exists() and live.exists()


@pytest.mark.parametrize("pdeathsig", [True, False])
def test_a_rank_ends_with_the_script_that_has_started_it(pdeathsig, tmp_path):
    """Also where setpriv, as RHEL 8's, cannot tell the kernel so."""
    setpriv = tmp_path / "setpriv"
    if not pdeathsig:
        setpriv.write_text("#!/bin/sh\necho \"setpriv: unrecognized option '$1'\" >&2\nexit 1\n")
        setpriv.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    text = bash(LAUNCH / "rank.sh", "bash", "-c", "exit 7", env=environment, code=7)
    assert "ended with exit code 7" in text and "unrecognized" not in text
    pid = tmp_path / "pid"
    job = subprocess.Popen(
        ["bash", LAUNCH / "rank.sh", "bash", "-c", f"echo $$ >{pid}.part; mv {pid}.part {pid}; exec sleep 60"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    rank = int(pid.read_text())
    assert os.getsid(rank) == rank
    job.kill()
    job.wait()
    while os.path.exists(f"/proc/{rank}/cmdline") and Path(f"/proc/{rank}/cmdline").read_bytes():
        assert time.monotonic() < deadline + 10
        time.sleep(0.05)


def test_slurm_s_script_is_for_the_first_node():
    """A shell of salloc may be on another machine, whose address would be no use."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    text = bash(LAUNCH / "slurm.sbatch", CONFIG, env=outside | {"SLURM_JOB_ID": "1"}, code=2)
    assert "not on the first node of a Slurm job: sbatch" in text


KINDS = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def check(value, schema: dict, where: str) -> None:
    """A value against a structural schema: types, required and unknown fields, as the API server checks them."""
    if schema.get("x-kubernetes-int-or-string"):
        assert isinstance(value, int | str), where
    elif "type" in schema:
        assert isinstance(value, KINDS[schema["type"]]), f"{where} is no {schema['type']}"
    assert value in schema.get("enum", [value]), f"{where} = {value}: not one of {schema.get('enum')}"
    if isinstance(value, dict):
        assert set(schema.get("required", [])) <= value.keys(), f"{where} lacks {schema['required']}"
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            free = ".metadata" in where or schema.get("x-kubernetes-preserve-unknown-fields")
            assert known is not None or free, f"{where}.{key}: no such field"
            check(inner, known or {}, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check(inner, schema.get("items", {}), f"{where}[{index}]")


def test_the_kubernetes_manifest_fits_the_published_schema():
    schemas = json.loads(Path(__file__).with_name("kubeflow_trainer_schema.json").read_text())
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    for document in documents:
        check(document, schemas[document["kind"]], document["kind"])
    runtime, job = documents
    assert job["spec"]["runtimeRef"] | {"name": runtime["metadata"]["name"]} == job["spec"]["runtimeRef"]
    jobset = runtime["spec"]["template"]["spec"]
    node = jobset["replicatedJobs"][0]["template"]["spec"]
    pod = node["template"]["spec"]
    (wrong,), (end,) = node["podFailurePolicy"]["rules"], jobset["failurePolicy"]["rules"]
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [EXIT_USAGE])
    assert (end["action"], end["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])  # batch/v1's word for it
    assert pod["restartPolicy"] == "Never"  # batch/v1 refuses podFailurePolicy with JobSet's default, OnFailure
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]} >= {"shm"}
    for field in ("containers", "podTemplateOverrides"):  # what older versions took
        with pytest.raises(AssertionError, match="no such field"):
            check(job | {"spec": job["spec"] | {field: []}}, schemas["TrainJob"], "TrainJob")


def test_an_image_leaves_out_what_git_ignores():
    ignored = set((ROOT / ".dockerignore").read_text().splitlines())
    lines = (line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())
    assert {".git", *(line[1:] if line.startswith("/") else f"**/{line}" for line in lines)} <= ignored


def test_the_pods_command_starts_what_the_trainer_asks_for():
    job = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))[1]["spec"]["trainer"]
    told = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "automix-node-0-0.automix",
    }
    text = bash(*job["command"][1:], "--dry-run", *job["args"], env=os.environ | told)
    assert "--nproc-per-node=8 --max-restarts=0" in text and "--rdzv-backend" not in text
    assert "output=/runs/automix_resnet50_100ep" in text


def test_every_fault_that_the_documents_list_is_tried():
    """By a test whose name contains the last column."""
    page = (ROOT / "docs" / "multi_node.md").read_text()
    faults = dict(re.findall(r"^\| (.+?) \|.*\| `(\w+)` \|$", page, re.MULTILINE))
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = re.findall(r"def (test_\w+)", code)
    assert len(faults) >= 20
    for fault, name in faults.items():
        assert any(name in test for test in tests), f"{fault}: no test is named like {name}"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="not installed: shellcheck")
def test_shellcheck_is_content():
    files = [LAUNCH / name for name in (*SCRIPTS, "env.sh", "job.sh", "rank.sh")]
    # Sourced files and their variables, functions that other functions call, texts meant for another shell.
    allowed = "SC1091,SC2154,SC2034,SC2317,SC2016,SC2013,SC2029"
    done = subprocess.run(["shellcheck", "-x", "-e", allowed, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "accelerate.sh", "stage_data.sh"])
def test_an_option_without_its_value_is_named(script):
    option = "--nodes" if script in ("torchrun.sh", "accelerate.sh") else "--hostfile"
    done = subprocess.run(["bash", LAUNCH / script, option], capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {option} needs " in done.stderr
