#!/usr/bin/env bash
# One rank on its node, started by any launcher: puts the settings of env.sh in place, gives the rank its cores, runs
# the command, and tells how it ended.
#   rank.sh COMMAND [ARGUMENT ...]
#   rank.sh --packed TEXT         folder, variables and command in one word that no shell can misread (job.sh: pack)
#   rank.sh --run-packed TEXT     the same for a command that is no rank
#   rank.sh --signal NAME JOB     send a signal to the job's ranks on this node; fails if there are none yet
#   rank.sh --explain             print the settings a rank would use here, and why
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

signal_ranks() { # NAME JOB: to its ranks, not to what they have started
    local file pid parent code=1
    for file in $(grep -lzsFx "AUTOMIX_RANK_OF=$2" /proc/[0-9]*/environ); do
        pid=${file#/proc/} pid=${pid%/environ}
        parent=$(awk '{ sub(/.*\) /, ""); print $2 }' "/proc/$pid/stat" 2>/dev/null) || continue
        grep -qzsFx "AUTOMIX_RANK_OF=$2" "/proc/$parent/environ" || ! kill "-$1" "$pid" 2>/dev/null || code=0
    done
    return $code
}

unpack() { # TEXT: enters the folder, sets the variables; the rest is the command
    local words
    mapfile -d '' -t words < <(base64 -d <<<"$1")
    cd -- "${words[0]}" 2>/dev/null || fail "${words[0]}: no such folder here; every node needs the checkout at the same path" 2
    words=("${words[@]:1}")
    while [ "${words[0]}" != -- ]; do
        export "${words[0]}"
        words=("${words[@]:1}")
    done
    command=("${words[@]:1}")
}

report() { # CODE: the line that job.sh looks for, since launchers on the way lose exit codes
    local host
    read -r host </proc/sys/kernel/hostname # no process, which the signal that ends the rank could end too
    printf '\nautomix: rank %s on %s ended with exit code %s\n' "$RANK" "$host" "$1" >&2
}

fail() { # MESSAGE CODE
    printf 'automix: error: %s: %s\n' "$(hostname)" "$1" >&2
    report "$2"
    exit "$2"
}

# The names that launchers have for the same four numbers.
export RANK=${RANK:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}}}
# The step's tasks, not the job's: a batch script and a shell of salloc are one process.
export WORLD_SIZE=${WORLD_SIZE:-${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-${SLURM_STEP_NUM_TASKS:-1}}}}
export LOCAL_RANK=${LOCAL_RANK:-${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${SLURM_LOCALID:-0}}}}
export LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE:-${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-${LOCAL_SIZE:-1}}}}

case ${1:-} in
--signal) signal_ranks "$2" "$3" || exit 1; exit ;;
--explain) AUTOMIX_EXPLAIN=1 fabric_settings && exit ;;
--run-packed) unpack "$2" && exec "${command[@]}" ;;
--packed) unpack "$2" ;;
*) command=("$@") ;;
esac
if [ -e "${AUTOMIX_STOP:-}" ]; then # the job is to stop: a rank that comes late, or again, has nothing to do
    report 75
    exit
fi
command -v -- "${command[0]}" >/dev/null || fail "${command[0]} is missing: run launch/install.sh on this node, in the same folder, or mend AUTOMIX_VENV" 2
fabric_settings
warn_of_few_cores
bind_cores

# The rank's own session: a launcher that signals a whole process group would reach it twice.
export AUTOMIX_RANK_OF=${AUTOMIX_JOB:-none}
exec 3<&0
run_with_parent KILL "${command[@]}" </dev/null 3<&- &
rank=$!
trap 'kill -TERM $rank 2>/dev/null || true' TERM INT
trap 'kill -USR1 $rank 2>/dev/null || true' USR1
if [ -n "${AUTOMIX_LIFELINE:-}" ] && [ -p /dev/fd/3 ]; then
    { while read -r _; do :; done; kill -TERM $rank; } <&3 >/dev/null 2>&1 & # the launching script is gone, however it ended
    lifeline=$!
fi
exec 3<&-
code=0
while :; do
    code=0
    wait $rank || code=$?
    kill -0 $rank 2>/dev/null || break # else a signal has interrupted the waiting
done
[ -z "${lifeline:-}" ] || kill "$lifeline" 2>/dev/null || true
case $code in
0) # The last word, after those of earlier starts.
    [ -z "${AUTOMIX_ELASTIC:-}" ] || [ "$LOCAL_RANK" != 0 ] || report 0
    ;;
75) # Saved and stopped. Launchers would kill or restart the other ranks, which are ending in the same moment.
    [ "$LOCAL_RANK" != 0 ] || report 75
    # The stop may be for a node that wants to join. Every node's torchrun looks for it once a second, and must not take
    # the end of its ranks for the end of the job before it has seen it.
    [ -z "${AUTOMIX_ELASTIC:-}" ] || sleep 3
    code=0
    ;;
*) report $code ;;
esac
exit $code
