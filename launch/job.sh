# What the launching scripts share: arguments, looking after a running launcher, and saying why it ended.
# shellcheck shell=bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of a shell that is itself a rank: rank.sh would believe them
venv=$(realpath -ms -- "${AUTOMIX_VENV:-$root/.venv}")
automix=$venv/bin/automix
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"

STOPPED=75 # exit code of a run that has saved and can be resumed
GRACE=${AUTOMIX_GRACE:-20} # seconds that the other ranks have to end by themselves, and to say why, when one has failed

say() { printf 'automix: %s\n' "$*" >&2 2>/dev/null || true; } # a console that is gone must not stop what is to be saved
die() { printf 'automix: error: %s\n' "$*" >&2; exit 2; }
usage() { sed -n '2,/^\([^#]\|$\)/{/^#SBATCH/d;/^#/s/^# \{0,1\}//p}' "$0"; }
needs() { [ -n "${3:-}" ] || die "$2 needs $1"; } # WHAT OPTION [VALUE ...]

check_options() { # ARGUMENT ...: what is left once a script has taken its own options is for `automix train` or `doctor`
    local each name
    for each in "$@"; do
        name=${each%%=*}
        case ${name//_/-} in
        --resume | --overwrite | --print-config | --check | --debug | --seconds) continue ;;
        --nproc-per-node | --num-gpus | --num-processes) name=--ranks-per-node ;; # torchrun, deepspeed, accelerate
        --nnodes | --num-nodes | --num-machines) name=--nodes ;;
        -*) ;;
        *) continue ;;
        esac
        name=$(usage | awk -F '  +' -v name="$name" 'index($2 " ", name " ") == 1 { print "; expected before CONFIG: " $2 }')
        die "unknown option $each$name; see --help"
    done
}

quoted() { printf '%q ' "$@"; echo; }

dry_run=""
plan() { # REASON COMMAND [ARGUMENT ...]: with --dry-run, show it
    [ -n "$dry_run" ] || return 0
    printf '# %s\n' "$1"
    shift
    quoted "$@"
}

is_secret() { # NAME: of a variable that a command line, which all users see, must not show
    [[ $1 =~ (^|_)(KEY|TOKEN|SECRET|PASSWORD)S?$ && $1 != *_DISABLE_* ]]
}

plan_settings() { # what rank.sh will set on every node, by the same code
    [ -n "$dry_run" ] || return 0
    printf '# on every node, before the command (launch/env.sh); values found there may differ\n'
    MASTER_ADDR=${1:-} "$root/launch/rank.sh" --explain
}

pack() { # COMMAND [ARGUMENT ...]: this folder, the variables to carry and the command, as one word for rank.sh --packed
    local name
    {
        printf '%s\0' "$PWD"
        for name in $(compgen -e); do
            [[ " ${AUTOMIX_CARRY:-} " == *" $name "* || $name =~ $CARRIED ]] || continue
            is_secret "$name" && [[ " ${AUTOMIX_CARRY:-} " != *" $name "* ]] || printf '%s\0' "$name=${!name}"
        done
        printf '%s\0' "${job_settings[@]}" -- "$@"
    } | base64 -w0
}

name_secrets() { # those that `pack` leaves out
    local name
    for name in $(compgen -e); do
        if [[ $name =~ $CARRIED && " ${AUTOMIX_CARRY:-} " != *" $name "* ]] && is_secret "$name"; then
            say "note: $name stays here, as every user of a node could read it there; log in on the nodes, or name it in AUTOMIX_CARRY"
        fi
    done
}

new_job() { # a name for this job, a folder for its scratch files
    [ -x "$automix" ] || die "$automix is not there: run launch/install.sh, or set AUTOMIX_VENV to the folder of another environment that has bin/automix"
    AUTOMIX_JOB=$(date +%s)-$$-$RANDOM
    export AUTOMIX_JOB
    job_settings=()
    scratch=$(mktemp -d)
    # bash 5.2 runs this also in a fork that a signal meets before it has become its command, where `[` fails whatever it compares.
    trap 'case $BASHPID in $$) rm -rf "$scratch" ;; esac' EXIT
    export AUTOMIX_STOP=$scratch/stop # once it is there, no rank of this node begins
}

# Runs a launcher in a session of its own, which the terminal's Ctrl-C does not reach, and returns the job's exit code.
# `signal_job NAME`, defined by the script, sends a signal to the job's ranks, and fails if there are none. The first
# SIGTERM or Ctrl-C lets them save and stop, the second ends them; after the first no rank begins again. Exit codes are
# read from rank.sh's last lines, as most launchers lose them.
supervise() { # FATAL COMMAND [ARGUMENT ...]; FATAL: which exit codes of a rank end the whole job, a pattern
    local fatal=$1 launcher watcher stops=0 deadline="" code=0 ended stopping=""
    shift
    trap 'stops=$((stops + 1))' TERM INT HUP
    trap "" PIPE
    mkfifo "$scratch/stdin" "$scratch/stderr" "$scratch/copy"
    : >"$scratch/ended"
    # Of a terminal that is closed these two must not hear: the ranks have still to say how they ended.
    (trap "" HUP; exec grep --line-buffered -aoE 'automix: rank [0-9]+ on [^ ]+ ended with exit code [0-9]+|tasks? [0-9,-]+: Exited with exit code [0-9]+|ssh exited with exit code 255' \
        <"$scratch/copy" >>"$scratch/ended") &
    watcher=$!
    { trap "" HUP; tee -p "$scratch/copy" <"$scratch/stderr" >&2 2>/dev/null; : <>"$scratch/copy"; } & # even a tee that fails lets grep end
    run_with_parent TERM "$@" <"$scratch/stdin" 2>"$scratch/stderr" &
    launcher=$!
    exec 7>"$scratch/stdin" # closed by the kernel if this script is killed: the ranks' lifeline
    while kill -0 $launcher 2>/dev/null; do
        ended=$(grep -oE '[0-9]+$' "$scratch/ended" | grep -vx $STOPPED | grep -xE "$fatal" | head -n 1) || true
        [ -z "$ended" ] || [ -n "$deadline" ] || deadline=$((SECONDS + GRACE))
        if [ $stops = 1 ] && [ -z "$stopping" ]; then
            say "stopping: all ranks save first (again: end at once)"
            : >"$AUTOMIX_STOP"
            # From now on no failure is mended by another start, and those that have been do not count.
            [ -n "$deadline" ] || : >"$scratch/ended"
            stopping=asked fatal='[1-9][0-9]*'
        elif [ $stops -gt 1 ] && [ -z "$deadline" ]; then
            deadline=$SECONDS
        fi
        if [ $stops = 1 ] && [ "$stopping" != told ] && signal_job TERM; then # else there are no ranks yet
            stopping=told
        fi
        if [ -n "$deadline" ] && [ $SECONDS -ge "$deadline" ]; then
            [ -z "$ended" ] || say "ending the other ranks, $GRACE s after one has failed"
            signal_job KILL || true
            kill -KILL -- -$launcher 2>/dev/null || true
            break
        fi
        sleep 0.5 7>&- &
        wait $! || true
    done
    { wait $launcher || code=$?; } 2>/dev/null # bash would comment on what has been killed
    exec 7>&- # to ranks with a lifeline a request to stop
    if [ "$code" -gt 128 ] && [ $stops = 0 ] && [ -z "$deadline" ] && ! grep -q "exit code $code\$" "$scratch/ended"; then
        say "the launcher was ended by a signal (exit code $code): its ranks save first (Ctrl-C: end at once)"
        [[ " ${job_settings[*]-} " == *" AUTOMIX_LIFELINE=1 "* ]] || signal_job TERM || true
    fi
    wait $watcher || true
    trap - PIPE
    ended=$(grep -oE '[0-9]+$' "$scratch/ended") || true
    if grep -vx $STOPPED <<<"$ended" | grep -qxE "$fatal"; then
        code=$(grep -vx $STOPPED <<<"$ended" | grep -xE "$fatal" | head -n 1)
    elif [ "$(tail -n 1 <<<"$ended")" = $STOPPED ]; then
        code=$STOPPED
    fi
    [ "$code" = 0 ] || [ "$code" = $STOPPED ] || signal_job KILL || true # no rank stays behind
    if [ -n "$stopping" ] && [ "$code" = 143 ]; then # the request came before a rank could note it
        say "stopped before training has begun"
        code=$STOPPED
    fi
    trap - TERM INT HUP
    return "$code"
}

new_run_arguments() { # ARGUMENT ...: `automix train`'s, with --resume unless the user decides otherwise
    case " $* " in
    *" --resume "* | *" --overwrite "*) train=("$automix" train "$@") ;;
    *) train=("$automix" train --resume "$@") ;;
    esac
}

# Scripts that are started on every node.

ranks_per_node() { # one per GPU, or 1
    local count
    count=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c ^GPU) || true
    [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || count=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]') || true # "" and -1: none
    [[ ${CUDA_VISIBLE_DEVICES:-} != MIG-*,* ]] || count=1 # a process sees no more than one of them
    echo $((count > 0 ? count : 1))
}

# Fills head and port, where the nodes meet; is_head, whether that is this node; own, its address; token, the same
# number on all nodes for the same command.
find_head() { # OPTION HOST[:PORT] ARGUMENT ...
    local option=$1 host=${2%%:*}
    token=$(printf '%s\0' "${@:3}" | cksum | cut -d' ' -f1)
    port=$((20000 + token % 10000)) is_head=false
    [[ $2 != *:* ]] || port=${2##*:}
    [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ && $port =~ ^[1-9][0-9]*$ ]] || die "$option $2: expected HOST or HOST:PORT"
    head=$(address_of "$host") || true
    [ -n "$head" ] || die "$option $host: this name has no address here; mend /etc/hosts or give an address"
    if [ "$host" = "$(hostname)" ] || { ! is_loopback "$head" && grep -qF " $head/" <<<"$(ip -o addr show)"; }; then
        is_head=true
        own=$head
        if is_loopback "$head"; then
            own=$(own_address) || die "$host resolves to $head, which no other node can reach, and no other address is up: mend /etc/hosts"
            say "note: $host resolves itself to $head (loopback); the others are given $own"
            head=$own
        fi
        ! port_taken "$port" || die "port $port is taken on $host: by the same job? else give all nodes another one with $option $host:PORT"
    else
        ! is_loopback "$head" || die "$option $host resolves to $head here, which is this node itself: mend /etc/hosts"
        own=$(own_address "$head") || die "no way from here to $option $host ($head): check the network"
    fi
    say "meeting at $head:$port; this node is $own"
}

# Hosts that ssh reaches.

hosts=() slots=()
read_hostfile() { # fills hosts and slots; nothing that could be an option or mean something to a shell gets through
    local line number=0
    for line in "$hostfile" ./hostfile /job/hostfile; do
        [ -n "$hostfile" ] || [ ! -f "$line" ] || hostfile=$line
    done
    [ -f "$hostfile" ] || die "${hostfile:-./hostfile}: no such hostfile; expected lines like: node1 slots=8"
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[[:space:]]*([A-Za-z0-9][A-Za-z0-9._-]*)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*(#.*)?$ ]] \
            || die "$hostfile:$number: $(printf %q "$line"): expected HOST slots=N; user and port of ssh belong into ~/.ssh/config"
        [[ " ${hosts[*]-} " != *" ${BASH_REMATCH[1]} "* ]] || die "$hostfile:$number: ${BASH_REMATCH[1]} is there twice"
        hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[2]}")
    done <"$hostfile"
    [ ${#hosts[@]} -gt 0 ] || die "$hostfile: no hosts; expected lines like: node1 slots=8"
}

# shellcheck disable=SC2206 # pdsh splits it like this, too
ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-})

on_every_host() ( # SCRIPT-TEXT OUTPUT-FOLDER: in parallel; the text goes through ssh's stdin, so that no shell splits it
    mkdir -p "$2"
    for host in "${hosts[@]}"; do
        { timeout 60 ssh "${ssh_options[@]}" "$host" bash -s <<<"$1" >"$2/$host" 2>"$2/$host.err" || echo $? >"$2/$host.code"; } &
        [ "$(jobs -rp | wc -l)" -lt 64 ] || wait -n
    done
    wait
)
