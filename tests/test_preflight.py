"""`automix doctor --all-ranks`: real ranks that come, stay away or cannot connect; and what the table makes of it."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import free_port

from automix_dist.doctor import Check
from automix_dist.preflight import judge_network, merge, rounds

ROOT = Path(__file__).parent.parent


def doctor(
    present: list[int],
    world_size: int,
    *arguments: str,
    seconds: float = 30,
    module=("-m", "automix_dist"),
):
    """Start these ranks without a launcher's help; (exit code, output) of each."""
    port = free_port()
    command = [sys.executable, *module, "doctor", *arguments, "--all-ranks", f"--seconds={seconds}"]
    jobs = []
    for rank in present:
        place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        pipe = subprocess.PIPE
        jobs.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT))
    outputs = [job.communicate(timeout=120) for job in jobs]
    return [(job.returncode, out + errors) for job, (out, errors) in zip(jobs, outputs, strict=True)]


@pytest.mark.slow
def test_two_ranks_are_measured_and_their_data_looked_at(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"train": "/none.beton", "val": "/none.beton"}}))
    (code, table), other = doctor([0, 1], 2, str(tmp_path / "c.yaml"), f"output={tmp_path}")
    assert code == 1 and "/none.beton does not exist" in table and "Not ready to train: data.train, data.val." in table
    assert f"disk at {tmp_path}" in table and "ok    config " in table
    for name in ("ranks ", "clocks ", "matrix product ", "collectives ", "pairs in a host "):
        assert f"ok    {name}" in table, table
    assert "all-reduce" in table and "latency" in table and "median of 1" in table
    assert other[0] == 1 and "ok  " not in other[1]


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named_in_time():
    (code, table), (other, _) = doctor([0, 1], 4, seconds=4)
    assert (code, other) == (1, 1)
    assert "FAIL  ranks" in table and "2, 3 of 4 did not come: node 1; present: " in table
    assert table.rstrip().endswith("Not ready to train: ranks.")
    ((code, errors),) = doctor([1], 2, seconds=2)
    assert code == 1 and "Traceback" not in errors
    assert f"rank 1 on {socket.gethostname()} (127.0.0.1) cannot reach the master's port within 2 s" in errors


@pytest.mark.slow
def test_a_rank_that_hangs_costs_no_table():
    """As under NCCL: not even a time limit of the collective ends it."""
    code = """if True:
        import os, threading
        from automix_dist import cli, preflight
        if os.environ["RANK"] == "1":
            preflight.measure = lambda process: threading.Event().wait()
        cli.main()"""
    (code, table), (other, _) = doctor([0, 1], 2, seconds=6, module=("-c", code))
    assert (code, other) == (1, 1)
    assert "FAIL  collectives" in table and "hangs: not measured within 18 s" in table


@pytest.mark.slow
def test_a_gpu_that_cannot_be_used_costs_no_table(tmp_path):
    (tmp_path / "nvidia0").touch()
    code = f"""if True:
        import os
        from automix_dist import cli, distributed
        if os.environ["RANK"] == "0":
            del os.environ["CUDA_VISIBLE_DEVICES"]
            distributed.NVIDIA_DEVICES = {str(tmp_path / "nvidia*")!r}
        cli.main()"""
    (exit_code, table), (other, errors) = doctor([0, 1], 2, seconds=4, module=("-c", code))
    assert (exit_code, other) == (1, 1) and "Traceback" not in table + errors
    assert "FAIL  collectives" in table and "this host has an NVIDIA GPU that cannot be used" in table


def test_without_a_launcher_the_way_is_told():
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-m", "automix_dist", "doctor", "--all-ranks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "needs a launcher" in done.stderr and "torchrun" in done.stderr


def test_hosts_are_merged_and_versions_must_agree():
    same, warned = Check("open files", "ok", "limit 20000"), Check("/dev/shm", "warn", "0.1 GiB free", "--shm-size")
    hosts = {
        "a": [Check("torch", "ok", "2.15.0"), same, Check("/dev/shm", "ok", "9 GiB free")],
        "b": [Check("torch", "ok", "2.14.0"), same, warned],
        "c": [Check("torch", "ok", "2.15.0"), same, warned],
    }
    assert merge(hosts) == [
        Check("torch", "fail", "2.15.0 on a, c", "make it the same on all hosts"),
        Check("torch", "fail", "2.14.0 on b", "make it the same on all hosts"),
        Check("open files", "ok", "limit 20000 (all 3 hosts)"),
        Check("/dev/shm", "ok", "9 GiB free on a"),
        Check("/dev/shm", "warn", "0.1 GiB free on b, c", "--shm-size"),
    ]
    assert merge({"a": hosts["a"]}) == hosts["a"]
    many = {f"n{i}": [Check("host name", "ok" if i else "warn", f"n{i} is 10.0.0.{i}")] for i in range(9)}
    found = "n1 is 10.0.0.1; n2 is 10.0.0.2; n3 is 10.0.0.3; n4 is 10.0.0.4; ... (8 kinds)"
    assert merge(many) == [Check("host name", "ok", found), Check("host name", "warn", "n0 is 10.0.0.0 on n0")]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(size):
    played = rounds(range(size))
    pairs = list(itertools.chain(*played))
    assert sorted(pairs) == list(itertools.combinations(range(size), 2))
    for pairs in played:
        ranks = list(itertools.chain(*pairs))
        assert len(ranks) == len(set(ranks))


def network(world_size: int = 4) -> tuple[dict, dict]:
    """What four ranks on two hosts measure when all is well."""
    reports = {rank: {"host": f"n{rank // 2}", "link": 1.25e9} for rank in range(world_size)}
    base = {"clock": 1e-4, "flops": 1e12, "latency": 1e-4, "all_reduce": 1e9, "all_gather": 1e9}
    measured = {rank: base | {"pairs": {}} for rank in range(world_size)}
    for low, high in itertools.combinations(range(world_size), 2):
        measured[low]["pairs"][f"{low}-{high}"] = 5e9 if low // 2 == high // 2 else 1e9
    return measured, reports


def test_what_is_slow_or_late_is_named():
    checks = judge_network(*network())
    assert [check.status for check in checks] == ["ok"] * 6 and not any(check.mend for check in checks)
    assert checks[-1].found == "1.00 GB/s between hosts, of 1.25 GB/s that the interface has"

    measured, reports = network()
    measured[1]["pairs"]["1-2"] = 0.2e9
    measured[3] |= {"flops": 0.4e12, "clock": -7.0}
    by_name = {check.name: check for check in judge_network(measured, reports)}
    assert "7000.0 ms from rank 0's (rank 3 on n1)" in by_name["clocks"].found
    assert by_name["clocks"].status == by_name["matrix product"].status == by_name["pairs of hosts"].status == "warn"
    assert "slow: rank 3 on n1: 0.40 TFLOP/s" in by_name["matrix product"].found
    assert "slow: ranks 1 on n0 and 2 on n1: 0.20 GB/s" in by_name["pairs of hosts"].found

    for pairs in (result["pairs"] for result in measured.values()):
        pairs.update({pair: rate / 10 for pair, rate in pairs.items()})
    assert {check.name: check for check in judge_network(measured, reports)}["link"].status == "warn"


def test_collectives_that_fail_say_where():
    measured, reports = network()
    measured[2] = {"error": "connect timed out"}
    del measured[3]
    (check,) = judge_network(measured, reports)
    assert check.status == "fail"
    assert check.found == "rank 2 on n1: connect timed out; rank 3 on n1: no answer"
