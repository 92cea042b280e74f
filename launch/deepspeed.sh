#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher. Start it on any machine that reaches them by ssh.
#   launch/deepspeed.sh [OPTIONS] CONFIG [section.key=value ...]
#
#   --hostfile FILE   lines "HOST slots=N", N ranks each (default: ./hostfile, then /job/hostfile)
#   --over WAY        pdsh (default), openmpi or mpich
#   --doctor          do not train: look at all nodes with `automix doctor --all-ranks CONFIG`
#   --dry-run         print every command and variable, with its reason, and start nothing
#   --help
#
# Every node needs this checkout at the same path, with its .venv. The run resumes from its newest checkpoint, if any.
# MASTER_ADDR and MASTER_PORT are found unless you set them. User and port of ssh belong into ~/.ssh/config.
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

hostfile="" over=pdsh doctor=""
while [ $# -gt 0 ]; do
    case $1 in
    --hostfile) needs 'a file' "$@" && hostfile=$2 && shift 2 ;;
    --over) needs 'pdsh, openmpi or mpich' "$@" && over=$2 && shift 2 ;;
    --doctor) doctor=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || [ -n "$doctor" ] || die "no config: expected launch/deepspeed.sh [OPTIONS] CONFIG [section.key=value ...]; see --help"
check_options "$@"

signal_job() { # NAME: SIGKILL to all hosts; a request to stop to one, whose ranks tell the others
    local host script
    script=$(printf '%q --signal %q %q' "$root/launch/rank.sh" "$1" "$AUTOMIX_JOB")
    if [ "$1" = KILL ]; then
        on_every_host "$script" "$scratch/signal"
        return
    fi
    for host in "${hosts[@]}"; do
        ! timeout 30 ssh "${ssh_options[@]}" "$host" bash -s <<<"$script" || return 0
    done
    return 1
}

look_at_hosts() { # one visit to each host, before anything starts there; names all hosts that cannot take part
    local host second=${hosts[1]:-} problems=0 script reference=""
    script=$(printf 'cd %q || exit 90\nroot=%q venv=%q first=%q second=%q wanted=%q\n' "$PWD" "$root" "$venv" "${hosts[0]}" "$second" "${MASTER_PORT:-}"; cat <<'PROBE'
. "$root/launch/env.sh" 2>/dev/null || exit 91
versions=$("$venv/bin/python" -c 'import sys
from importlib.metadata import version
names = ("automix-dist", "torch", "deepspeed", "ffcv", "numpy")
print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in names), sep=" ")') || exit 92
echo "versions $versions"
echo "resolved $(address_of "$first")"
echo "source $(cd "$root" && find automix_dist kernels -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)"
echo "address $(own_address "$second")"
echo "port $(free_port "$wanted")"
echo "clock $(date +%s)"
PROBE
)
    plan "look at every host: reachable, same folder, same versions, clock, addresses (timeout 60 s)" ssh "${ssh_options[@]}" HOST bash -s
    on_every_host "$script" "$scratch/hosts"
    for host in "${hosts[@]}"; do
        explain_host "$host" || problems=$((problems + 1))
    done
    [ $problems = 0 ] || die "$problems of ${#hosts[@]} hosts cannot take part; nothing was started"
}

found() { sed -n "s/^$2 //p" "$scratch/hosts/$1"; }

explain_host() { # HOST: complain about what its visit has brought to light
    local answer="$scratch/hosts/$1" code=0 clock
    [ ! -f "$answer.code" ] || code=$(cat "$answer.code")
    case $code in
    0) ;;
    90) say "$1: $PWD does not exist there: start from a folder that all nodes have" && return 1 ;;
    91) say "$1: $root/launch/env.sh is not there: every node needs this checkout at the same path" && return 1 ;;
    92) say "$1: $venv does not work there: run launch/install.sh on it ($(tail -n 1 "$answer.err"))" && return 1 ;;
    124) say "$1: no answer within 60 s: is it up, and is its file system?" && return 1 ;;
    *) say "$1: ssh fails: $(tail -n 1 "$answer.err")$(mend_ssh "$answer.err" "$1")" && return 1 ;;
    esac
    clock=$(($(found "$1" clock) - $(date -r "$answer" +%s))) # its last word came then
    [ "${clock#-}" -le 30 ] || say "warning: $1: its clock is off by $clock s: logs and caches will mislead; run an NTP service"
    reference=${reference:-$(found "$1" versions)}
    [ "$(found "$1" versions)" = "$reference" ] \
        || { say "$1: has $(found "$1" versions); ${hosts[0]} has $reference: install the same with launch/install.sh" && return 1; }
    [ "$(found "$1" source)" = "$(found "${hosts[0]}" source)" ] \
        || { say "$1: its files in $root differ from those of ${hosts[0]}: bring both to the same commit" && return 1; }
    if [ "$1" != "${hosts[0]}" ] && is_loopback "$(found "$1" resolved)"; then
        say "$1: resolves ${hosts[0]} to $(found "$1" resolved), which is itself: mend its /etc/hosts" && return 1
    fi
}

mend_ssh() { # FILE HOST: what to do about ssh's last message
    case $(tail -n 1 "$1") in
    *"Permission denied"*) echo "; ssh-copy-id $2 makes it accept your key" ;;
    *"Host key verification failed"*) echo "; ssh $2 once by hand, and compare the key it shows" ;;
    *"Could not resolve"*) echo "; mend the name in $hostfile, or /etc/hosts" ;;
    *refused* | *"timed out"* | *"No route"*) echo "; is it up, with an sshd, and no firewall between?" ;;
    esac
}

find_master() { # where the ranks meet: host 1, by the address the others can reach, on a port that is free
    local address=${MASTER_ADDR:-}
    if [ -z "$address" ] && [ ${#hosts[@]} -gt 1 ]; then
        address=$(found "${hosts[1]}" resolved)
        is_loopback "$(found "${hosts[0]}" resolved)" && say "note: ${hosts[0]} resolves itself to $(found "${hosts[0]}" resolved) (loopback); using $address, which ${hosts[1]} sees"
    fi
    address=${address:-$(found "${hosts[0]}" address)}
    export MASTER_ADDR=${address:-127.0.0.1}
    MASTER_PORT_FOUND=$(found "${hosts[0]}" port)
    [ -n "$MASTER_PORT_FOUND" ] || die "MASTER_PORT = ${MASTER_PORT:-?}: taken on ${hosts[0]}; unset it, and a free one is found"
    export MASTER_PORT=$MASTER_PORT_FOUND
    job_settings+=("MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" AUTOMIX_LIFELINE=1)
    say "${#hosts[@]} hosts meet at $MASTER_ADDR:$MASTER_PORT (${hosts[0]})"
}

choose_way() { # fills way, DeepSpeed's options for --over, and script, what it starts for each rank
    local subnet program package
    script=("$root/launch/rank.sh")
    case $over in
    pdsh)
        program=pdsh
        # DeepSpeed joins these words into a line for the remote shell; only the path can need quotes.
        script=("$(printf %q "${script[0]}")")
        export PDSH_SSH_ARGS_APPEND="${ssh_options[*]}"
        ;;
    openmpi)
        program=mpirun.openmpi package=openmpi-bin
        subnet=$({ getent ahostsv4 "$MASTER_ADDR" || true; } | awk 'NR == 1 { print $1 }')/24 # fits every node's name for its interface
        way=(--launcher_args "--bind-to none") # some arguments there must be: DeepSpeed insists on eth0 otherwise
        [ "$subnet" = /24 ] || way=(--launcher_args "--mca btl_tcp_if_include $subnet --mca oob_tcp_if_include $subnet --bind-to none")
        [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # containers are root
        export OMPI_MCA_plm_rsh_args="${ssh_options[*]}"
        ;;
    mpich)
        program=mpirun.mpich
        [ "$(printf '%s\n' "${slots[@]}" | sort -u | wc -l)" = 1 ] || die "$hostfile: MPICH needs the same slots on every host; use --over pdsh or openmpi"
        script=("$root/launch/exec.py" "${script[0]}") # DeepSpeed's helper for MPICH starts Python files only
        export HYDRA_LAUNCHER_EXTRA_ARGS="${ssh_options[*]}"
        ;;
    *) die "--over $over: expected pdsh, openmpi or mpich" ;;
    esac
    [ "$over" = mpich ] || way+=(--no_python)
    if ! command -v "$program" >/dev/null; then
        command -v "${program%.*}" >/dev/null || die "$program is missing here: apt-get install ${package:-$over}"
    elif [ "$over" != pdsh ]; then # both MPIs call themselves mpirun
        printf '#!/bin/sh\nexec %s "$@"\n' "$program" >"$scratch/mpirun"
        chmod +x "$scratch/mpirun"
        PATH=$scratch:$PATH
    fi
}

# DeepSpeed's runner with three traps closed: it puts the path of Python into a shell's line without quotes, a launcher
# that a signal has ended counts as success, and a runner that is told to end kills by name whatever another job of the
# same user has started on these hosts; its own ranks have a lifeline.
runner='
import shlex, subprocess, sys
from deepspeed.launcher import multinode_runner, runner
get_cmd = multinode_runner.PDSHRunner.get_cmd
def without_pkill(self, *arguments):
    command, _, environment = get_cmd(self, *arguments)
    return command, ["true"], environment
multinode_runner.PDSHRunner.get_cmd = without_pkill
class Popen(subprocess.Popen):
    def wait(self, timeout=None):
        super().wait(timeout)
        self.returncode = 128 - self.returncode if self.returncode < 0 else self.returncode
        return self.returncode
subprocess.Popen = Popen
if "--launcher=pdsh" in sys.argv:
    sys.executable = shlex.quote(sys.executable)
runner.main()'

way=()
new_job
read_hostfile
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [[ " ${AUTOMIX_CARRY:-} " != *" CUDA_VISIBLE_DEVICES "* ]]; then
    say "warning: CUDA_VISIBLE_DEVICES = $CUDA_VISIBLE_DEVICES stays here, the ranks take the first GPUs of each host; to have it on all hosts: AUTOMIX_CARRY=CUDA_VISIBLE_DEVICES"
fi
[ -z "$dry_run" ] || say "dry run: the hosts are looked at, nothing is started"
look_at_hosts
find_master
choose_way
if [ -n "$doctor" ]; then
    train=("$automix" doctor --all-ranks "$@")
else
    new_run_arguments "$@"
fi
for ((i = 0; i < ${#hosts[@]}; i++)); do printf '%s slots=%s\n' "${hosts[i]}" "${slots[i]}"; done >"$scratch/hostfile"
name_secrets
packed=$(pack "${train[@]}")
[ ${#packed} -lt 100000 ] || die "the variables to carry are too many for a command line (${#packed} bytes): unset some of $CARRIED"
# What DeepSpeed would put into a shell's line unquoted travels in the packed word instead.
for name in $(compgen -e | grep -E '^(MLFLOW|PYTHON|MV2|UCX|NCCL)'); do unset "$name"; done
command=("$venv/bin/python" -c "$runner" --hostfile="$scratch/hostfile" --launcher="$over" "${way[@]}"
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --force_multi --no_ssh_check --no_local_rank --log_level=error
    "${script[@]}" --packed "$packed")
if [ -n "$dry_run" ]; then
    plan_settings "$MASTER_ADDR"
    printf '# carried to every node, packed into one word (launch/rank.sh unpacks it)\n'
    base64 -d <<<"$packed" | tr '\0' '\n' | sed '1s/^/cd /; s/^/  /'
    plan "DeepSpeed's launcher over $over; from /, as it would put the folder into a shell's line" "${command[@]}"
    exit
fi
cd /
export DS_ENV_FILE=/dev/null # a .deepspeed_env would be evaluated by a shell; env.sh and the packed word replace it
# DeepSpeed's node launcher cannot be told to be quiet over pdsh.
exec > >(grep --line-buffered -avE '\[(launch|real_accelerator)\.py:[0-9]+:')
filter=$!
code=0
supervise '[0-9]+' "${command[@]}" || code=$?
exec >&-
wait $filter || true
exit $code
