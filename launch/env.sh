# Every fabric setting, one reason each; sourced on the node of each rank by rank.sh, whatever started it.
# A value that the user has set wins: launchers carry the user's variables (CARRIED, and the names in AUTOMIX_CARRY)
# from where they are started to every node. `launch/rank.sh --explain` prints what a rank would use here, and why.
# shellcheck shell=bash disable=SC2034

# Variables that travel: settings of libraries, not those that describe a machine (HOME, PATH, CUDA_VISIBLE_DEVICES).
CARRIED='^(AUTOMIX|NCCL|GLOO|TORCH|PYTORCH|TRITON|OMP|GOMP|MKL|NUMBA|DS|HF|WANDB|MLFLOW|TENSORBOARD|FI|UCX|LD_LIBRARY|PYTHON)_?[A-Z0-9_]*$'

run_with_parent() { # SIGNAL COMMAND [ARGUMENT ...]: becomes COMMAND, in a session of its own; the kernel sends it SIGNAL once its parent is gone
    if setpriv --pdeathsig "$1" true 2>/dev/null; then
        exec setpriv --pdeathsig "$1" setsid "${@:2}"
    fi # util-linux before 2.33, as of RHEL 8
    exec python3 -c 'import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, int(signal.Signals["SIG" + sys.argv[1]])) != 0:  # PR_SET_PDEATHSIG
    sys.exit("prctl fails")
os.setsid()
os.execvp(sys.argv[2], sys.argv[2:])' "$@"
}

setting() { # NAME VALUE REASON
    [ -n "${!1+set}" ] || export "$1=$2"
    [ -z "${AUTOMIX_EXPLAIN:-}" ] || printf '  %s\n      # %s\n' "$1=${!1}" "$3"
}

fabric_settings() { # needs MASTER_ADDR, LOCAL_RANK, LOCAL_WORLD_SIZE
    local interface
    interface=$(interface_towards "${MASTER_ADDR:-127.0.0.1}")
    if [ -n "$interface" ] && [ "$interface" != lo ]; then
        setting GLOO_SOCKET_IFNAME "$interface" "gloo takes the interface of the host's name, which often is loopback"
        setting NCCL_SOCKET_IFNAME "=$interface" "NCCL meets its peers here; by itself it may take a container's bridge"
    fi
    setting NCCL_DEBUG WARN "NCCL keeps its own errors to itself otherwise"
    setting TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC 300 "a rank that is stuck inside the driver is given up after 5 minutes, not 8"
    [ -n "${PYTORCH_CUDA_ALLOC_CONF+set}" ] || # the older name, if a user has set it, says it all
        setting PYTORCH_ALLOC_CONF expandable_segments:True "image sizes that change must not fragment GPU memory"
    setting TRITON_CACHE_DIR "${TMPDIR:-/tmp}/automix-triton-$(id -u)" "on the node's own disk: a home folder on a network stalls hundreds of ranks"
    setting PYTHONUNBUFFERED 1 "a rank that is killed has said all it had to say"
    setting AUTOMIX_BIND auto "each rank of a node gets cores of its own, NUMA node by NUMA node; none = all share all"
    ulimit -n "$(ulimit -Hn)" # sockets and shards of many ranks; the usual soft limit is 1024
}

warn_of_few_cores() { # on a node with GPUs, which wait for their loaders then; said once a node
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # those that this process may use
    local quota period
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ] && [ $((quota / period)) -lt "$cores" ]; then
        cores=$((quota / period)) # of a container
    fi
    [ "$LOCAL_RANK" = 0 ] && [ "$cores" -lt $((4 * LOCAL_WORLD_SIZE)) ] || return 0
    [ -n "${SLURM_GPUS_ON_NODE:-}" ] || grep -q ^GPU <<<"$(nvidia-smi -L 2>/dev/null)" || return 0
    printf 'automix: warning: %s: %s core(s) for %s rank(s), fewer than 4 each: GPUs will wait for data; in a Slurm job ask for %s\n' \
        "$(hostname)" "$cores" "$LOCAL_WORLD_SIZE" "more with --exclusive or --cpus-per-gpu" >&2
}

bind_cores() { # to this rank's share of the cores that its node may use
    [ "$AUTOMIX_BIND" = auto ] && [ "$LOCAL_WORLD_SIZE" -gt 1 ] || return 0
    local allowed cores first last
    allowed=$(taskset -pc $$ | sed 's/.*: *//') && cores=$(ordered_cores "$allowed") || return 0
    mapfile -t cores <<<"$cores"
    [ "${#cores[@]}" -ge "$LOCAL_WORLD_SIZE" ] || return 0
    first=$((LOCAL_RANK * ${#cores[@]} / LOCAL_WORLD_SIZE))
    last=$(((LOCAL_RANK + 1) * ${#cores[@]} / LOCAL_WORLD_SIZE))
    cores=("${cores[@]:first:last-first}")
    taskset -pc "$(IFS=,; echo "${cores[*]}")" $$ >/dev/null || return 0
    export AUTOMIX_CORE_SHARERS=1
}

ordered_cores() { # LIST, such as 0-3,8: its CPUs, one a line, by NUMA node and core, so that hyperthreads stay together
    lscpu -p=NODE,CORE,CPU | awk -F, -v list="$1" '
        BEGIN { n = split(list, parts, ","); for (i = 1; i <= n; i++) { split(parts[i] "-" parts[i], r, "-"); for (c = r[1]; c <= r[2]; c++) allowed[c] } }
        /^#/ { next } ($3 in allowed) { print $1 + 0, $2 + 0, $3 }' | sort -n -k1,1 -k2,2 -k3,3 | cut -d" " -f3
}

source_towards() { # ADDRESS: this host's address on the way there; nothing if there is no way
    ip -o route get "$1" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p'
}

interface_towards() { # ADDRESS or host name
    local address source
    address=$(address_of "$1")
    source=$(source_towards "$address")
    case $source in
    127.* | ::1) echo lo ;;
    ?*) ip -o addr show to "$source" | awk '{ sub("@.*", "", $2); print $2; exit }' ;;
    esac
}

address_of() { # HOST: the first address it resolves to here; nothing if none
    getent ahosts "$1" | awk '{ print $1; exit }'
}

is_loopback() { case $1 in 127.* | ::1) ;; *) return 1 ;; esac }

own_address() { # [PEER]: this host's address as other hosts see it
    local address=""
    [ -z "${1:-}" ] || address=$(source_towards "$(address_of "$1")")
    [ -n "$address" ] || address=$(source_towards 192.0.2.1) # where a default route would go
    [ -n "$address" ] || address=$(ip -o -4 addr show up scope global | awk '$2 !~ /^(docker|br-|virbr|veth|cni|flannel)/ { sub("/.*", "", $4); print $4; exit }')
    [ -n "$address" ] && ! is_loopback "$address" && echo "$address"
}

free_port() { # [WANTED]: a port nobody listens on, below the range the kernel gives out by itself; fails if WANTED is taken
    local port tries
    for ((tries = 0; tries < 100; tries++)); do
        port=${1:-$((20000 + (RANDOM * 32768 + RANDOM) % 10000))}
        port_taken "$port" || { echo "$port"; return; }
        [ -z "${1:-}" ] || return 1
    done
    return 1
}

port_taken() { # PORT: whether anybody listens on it, on any address (state 0A in the kernel's tables)
    grep -qsiE "^ *[0-9]+: [0-9A-F]+:$(printf '%04X' "$1") [0-9A-F:]+ 0A " /proc/net/tcp /proc/net/tcp6
}
