"""Several hosts on one machine: each has its own network, host name, processes, /run, /root/.ssh and disk (/mnt), an
sshd, and a cable to one switch; a small disk they share. Nothing is left behind, since all of it lives in namespaces of
processes of this one.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "ip", "tc", "ssh", "ssh-keygen", "sshd", "pdsh")
SWITCH = """
set -e
mount -t tmpfs -o size=32m tmpfs "$1"
ip link add bridge type bridge
ip link set bridge up
echo ready
exec sleep infinity
"""
START = """
set -e
hostname "$1"
mkdir -p -m 700 /root/.ssh
mount --bind "$2/ssh" /root/.ssh
[ ! -f /root/.bashrc ] || mount --bind /dev/null /root/.bashrc
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
/usr/sbin/sshd -E "$2/sshd_$1.log" -f "$2/sshd_config"
echo ready
while :; do sleep 1000 & wait; done
"""


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "making hosts out of namespaces needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"no namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None


def write_programs(folder: Path, **scripts: str) -> None:
    """Executable bash scripts in a folder, by name; `_` stands for `-`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)


class Hosts:
    """Hosts n1, n2, ... with the addresses 10.77.0.1, 10.77.0.2, ...; each reaches all others by name and by ssh."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.names = [f"n{i}" for i in range(1, count + 1)]
        self._holders: dict[str, subprocess.Popen] = {}
        self._pids: dict[str, int] = {}
        self._write_files()
        self._hold("switch", ["unshare", "--net", "--mount"], SWITCH, str(self.folder / "disk"))
        self.disk = self.folder / "disk"
        """Where the hosts share 32 MiB; to this process it is at `disk_here`."""
        self.disk_here = Path(f"/proc/{self._pids['switch']}/root{self.disk}")
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> None:
        """Switch a host on and plug its cable in."""
        enter = ["nsenter", "-t", str(self._pids["switch"]), "--mount"]  # the shared disk is there
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._hold(name, [*enter, "unshare", *namespaces], START, name, str(self.folder))
        pid = self._pids[name]
        self._at_switch(f"ip link add {name} type veth peer name e0 netns {pid}; ip link set {name} master bridge up")
        self._plug(name)

    @contextlib.contextmanager
    def bad_cable(self, name: str, milliseconds: float, lost: float) -> Iterator[None]:
        """For this time a host's cable delays each packet and loses a share of them."""
        command = ["setpriv", "--pdeathsig", "KILL", "nsenter", "-t", str(self._pids["switch"]), "--net"]
        command += [sys.executable, Path(__file__).with_name("cable.py"), "near", "far", str(milliseconds), str(lost)]
        cable = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert cable.stdout.readline() == "ready\n"
        self._in_host(name, "ip addr flush dev e0; ip link set e0 down; ip link set e0 name good")
        self._at_switch(f"ip link set near master bridge up; ip link set far netns {self._pids[name]} name e0")
        self._plug(name)
        try:
            yield
        finally:
            cable.kill()
            cable.communicate()
            self._in_host(name, "ip link set good name e0")
            self._plug(name)

    def kill(self, name: str) -> None:
        """Switch a host off as a power failure would: every process on it dies at once."""
        holder = self._holders.pop(name)
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{self._pids[name]}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        for name in list(self._holders):
            self.kill(name)

    def popen(self, name: str, *command: str | Path, **options) -> subprocess.Popen:
        """Start a command on a host, with a clean environment as a fresh login has; hosts share the cores."""
        enter = ["nsenter", "-t", str(self._pids[name]), "-a", f"--wd={options.pop('cwd', '/')}"]
        enter += ["setpriv", "--pdeathsig", "KILL"]
        environment = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "HOME": "/root", "AUTOMIX_CORE_SHARERS": "2"}
        return subprocess.Popen(
            [*enter, *map(str, command)],
            env=environment | options.pop("env", {}),
            stdin=subprocess.DEVNULL,
            text=True,
            **options,
        )

    def run(self, name: str, *command: str | Path, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        """Run a command on a host; its output and errors together."""
        process = self.popen(name, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{command} has not ended after {timeout} s:\n{output}") from None
        return subprocess.CompletedProcess(command, process.returncode, output)

    def processes(self, name: str, text: str) -> list[str]:
        """Command lines on a host that contain a text."""
        listed = self.run(name, "ps", "-eo", "pid=,args=").stdout.splitlines()
        return [line for line in listed if text in line]

    def _write_files(self) -> None:
        (self.folder / "disk").mkdir(parents=True, exist_ok=True)
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o700)
        for key in (ssh / "id_ed25519", self.folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        public = " ".join((self.folder / "host_key.pub").read_text().split()[:2])
        (ssh / "known_hosts").write_text(f"n*,10.77.0.* {public}\n")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nPidFile none\nStrictModes no\nPermitRootLogin yes\nMaxStartups 100\n"
        )
        addresses = "".join(f"10.77.0.{name[1:]} {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        (self.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in self.names))

    def _plug(self, name: str) -> None:
        number = name[1:]  # the same hardware address for every e0 of a host: the others remember it
        self._in_host(name, f"ip link set e0 address 02:00:00:00:00:0{number}; "
                            f"ip addr add 10.77.0.{number}/24 dev e0; ip link set e0 up")  # fmt: skip

    def _in_host(self, name: str, script: str) -> None:
        done = self.run(name, "sh", "-ec", script)
        assert done.returncode == 0, done.stdout

    def _at_switch(self, script: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._pids["switch"]), "--net", "sh", "-ec", script], check=True)

    def _hold(self, name: str, unshare: list[str], script: str, *arguments: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *unshare, "bash", "-c", script, "bash", *arguments]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "ready\n", f"host {name} did not start"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        self._holders[name] = holder
        self._pids[name] = int(children[0]) if "--fork" in unshare else holder.pid
