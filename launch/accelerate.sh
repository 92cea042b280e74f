#!/usr/bin/env bash
# Trains with `accelerate launch`. Start the same line on every node.
#   launch/accelerate.sh [OPTIONS] CONFIG [section.key=value ...]
#
#   --nodes N                how many nodes (default: 1)
#   --head HOST[:PORT]       the first of them (PORT: derived from the command, so all agree)
#   --node-rank R            this one's number, 1 or more; with two nodes it is known
#   --ranks-per-node N       default: one per GPU, or 1
#   --dry-run                print every command and variable, with its reason, and start nothing
#   --help
#
# Accelerate only starts the processes: `accelerate config` files are not read, the training is configured by CONFIG.
# For nodes that may come and go use launch/torchrun.sh.
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

nodes=1 head_option="" node_rank="" per_node=""
while [ $# -gt 0 ]; do
    case $1 in
    --nodes) needs 'a number' "$@" && nodes=$2 && shift 2 ;;
    --head) needs 'HOST[:PORT]' "$@" && head_option=$2 && shift 2 ;;
    --node-rank) needs 'a number' "$@" && node_rank=$2 && shift 2 ;;
    --ranks-per-node) needs 'a number' "$@" && per_node=$2 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || die "no config: expected launch/accelerate.sh [OPTIONS] CONFIG [section.key=value ...]; see --help"
check_options "$@"
[[ $nodes:${per_node:-1}:${node_rank:-0} =~ ^[1-9][0-9]*:[1-9][0-9]*:[0-9]+$ ]] || die "--nodes $nodes, --ranks-per-node ${per_node:-1} or --node-rank ${node_rank:-0} is not a number"
[ "$nodes" = 1 ] || [ -n "$head_option" ] || die "--nodes $nodes needs --head HOST, the same on all nodes"

signal_job() { "$root/launch/rank.sh" --signal "$1" "$AUTOMIX_JOB"; } # NAME: the ranks of this node; they tell the others

new_job
per_node=${per_node:-$(ranks_per_node)}
echo 'distributed_type: "NO"' >"$scratch/accelerate.yaml" # else what `accelerate config` has written counts
command=("$venv/bin/python" -m accelerate.commands.launch --config_file="$scratch/accelerate.yaml" --num_machines="$nodes" --num_processes=$((nodes * per_node)) --mixed_precision=no --dynamo_backend=no)
if [ "$nodes" = 1 ]; then
    command+=(--main_process_port="$(free_port)")
else
    find_head --head "$head_option" "$@"
    [ "$is_head" = false ] || node_rank=0
    [ -n "$node_rank" ] || [ "$nodes" -gt 2 ] || node_rank=1
    [ -n "$node_rank" ] || die "--nodes $nodes needs --node-rank R on all nodes but the head: 1, 2, ..."
    command+=(--machine_rank="$node_rank" --main_process_ip="$head" --main_process_port="$port" --same_network --rdzv_backend=static)
fi
if [ $((nodes * per_node)) = 1 ]; then # its launcher of one process hands no signal on
    job_settings+=(AUTOMIX_LIFELINE=1)
    command=(env AUTOMIX_LIFELINE=1 "${command[@]}")
else
    command=(env "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" "${command[@]}" --multi_gpu) # what it calls several processes, on CPUs too
fi
new_run_arguments "$@"
command+=(--no_python "$root/launch/rank.sh" "${train[@]}")
if [ -n "$dry_run" ]; then
    plan_settings "${head:-}"
    plan "one launcher per node; it starts the ranks" "${command[@]}"
    exit
fi
supervise '[0-9]+' "${command[@]}"
