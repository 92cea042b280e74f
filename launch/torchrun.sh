#!/usr/bin/env bash
# Trains with torchrun, elastically. Start the same line on every node, in any order, at any time.
#   launch/torchrun.sh [OPTIONS] CONFIG [section.key=value ...]
#
#   --nodes MIN:MAX           begin with MIN nodes or more, at most MAX (default: 1, this machine alone)
#   --rendezvous HOST[:PORT]  the node where they meet; it has to stay up (PORT: derived from the command, so all agree)
#   --ranks-per-node N        default: one per GPU, or 1
#   --restarts N              give up after so many failures (default: 10)
#   --dry-run                 print every command and variable, with its reason, and start nothing
#   --help
#
# A node that is lost is left out: training resumes from the newest checkpoint with the nodes there are. A node that
# comes, again or late, is taken in: all save, and go on with it. SIGTERM or Ctrl-C on any node lets all save and stop.
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

nodes=${PET_NNODES:-1} rendezvous="" per_node="" restarts=10 # PET_*: Kubeflow Trainer tells its pods like this
[[ ! ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] || per_node=$PET_NPROC_PER_NODE
while [ $# -gt 0 ]; do
    case $1 in
    --nodes) needs MIN:MAX "$@" && nodes=$2 && shift 2 ;;
    --rendezvous) needs 'HOST[:PORT]' "$@" && rendezvous=$2 && shift 2 ;;
    --ranks-per-node) needs 'a number' "$@" && per_node=$2 && shift 2 ;;
    --restarts) needs 'a number' "$@" && restarts=$2 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || die "no config: expected launch/torchrun.sh [OPTIONS] CONFIG [section.key=value ...]; see --help"
check_options "$@"
least=${nodes%%:*} most=${nodes##*:}
[[ "$least:$most" =~ ^[1-9][0-9]*:[1-9][0-9]*$ && $least -le $most ]] || die "--nodes $nodes: expected N, or MIN:MAX with MIN <= MAX"
[[ ${per_node:-1} =~ ^[1-9][0-9]*$ ]] || die "--ranks-per-node $per_node: expected a number, 1 or more"
[[ " $* " != *" --overwrite "* ]] || [ "$restarts:$least:${PET_MASTER_ADDR:-}" = "0:$most:" ] \
    || die "--overwrite would discard the run again whenever its ranks are restarted: remove its folder first, set output=..., or give --restarts 0 and a fixed number of nodes"
[ "$most" = 1 ] || [ -n "$rendezvous${PET_MASTER_ADDR:-}" ] || die "--nodes $nodes needs --rendezvous HOST, the same on all nodes"

signal_job() { "$root/launch/rank.sh" --signal "$1" "$AUTOMIX_JOB"; } # NAME: the ranks of this node; they tell the others

check_config() { # can it be trained, and shared at every number of nodes that may come together? No restart would mend it
    local config batch parts count check=() fit=() unfit=()
    [ -n "$dry_run" ] || check=(--check)
    config=$("${train[@]}" "${check[@]}" --print-config) || exit $?
    batch=$(sed -n 's/^batch_size: //p' <<<"$config")
    for ((count = least; count <= most; count++)); do
        parts=$((count * per_node * $(sed -n 's/^ *accumulation_steps: //p' <<<"$config")))
        if ((batch % parts == 0 && batch / parts >= 2)); then fit+=("$count"); else unfit+=("$count"); fi
    done
    [ ${#fit[@]} -gt 0 ] || die "batch_size = $batch cannot be shared evenly by $nodes nodes of $per_node rank(s): change batch_size or --ranks-per-node"
    [ ${#unfit[@]} = 0 ] || say "warning: batch_size = $batch cannot be shared evenly by ${unfit[*]} node(s) of $per_node rank(s): with so many the job would end; ${fit[*]} would do"
}

new_job
per_node=${per_node:-$(ranks_per_node)}
new_run_arguments "$@"
check_config
# Ranks that are started again must not find the addresses of dead ones in a store that torchrun keeps, nor does it give
# a node that comes later the address of such a store.
settings=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}") # s to save
if [ -n "${PET_MASTER_ADDR:-}" ]; then
    meeting=(--rdzv-conf=timeout=1800) # s for all pods to be scheduled; torchrun reads the other PET_* itself
    restarts=0 # it keeps its store whatever is set: the JobSet starts all pods again
elif [ "$most" = 1 ]; then
    meeting=(--standalone)
else
    find_head --rendezvous "$rendezvous" "$@"
    # Without --local-addr every node would be known by its full name, which often resolves to loopback.
    meeting=(--nnodes="$least:$most" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$token" --local-addr="$own"
        --rdzv-conf="is_host=$is_head,join_timeout=1800,last_call_timeout=${AUTOMIX_LAST_CALL:-30}")
    settings+=(AUTOMIX_ELASTIC=1)
fi
command=("${settings[@]}" "$venv/bin/python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$per_node" --max-restarts="$restarts"
    --no-python "$root/launch/rank.sh" "${train[@]}")
if [ -n "$dry_run" ]; then
    plan_settings "${rendezvous%%:*}"
    plan "one torchrun per node; it starts the ranks, and starts them again when one fails or the nodes change" "${command[@]}"
    exit
fi
supervise 2 "${command[@]}" # a wrong config fails at every restart; all else is torchrun's to restart
