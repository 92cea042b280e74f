#!/usr/bin/env bash
# Copies .beton files and their manifests to a folder on every node's own disk, in parallel; what is there is skipped.
#   launch/stage_data.sh [OPTIONS] FILE.beton [FILE.beton ...] FOLDER
#
#   --hostfile FILE   as for launch/deepspeed.sh; default: the nodes of the Slurm job, else this one
#   --dry-run         print every command, with its reason, and copy nothing
#   --help
#
# A node that sees FILE, as on a shared disk, copies it itself; to the others it is sent through ssh. A copy gets its
# name only when its checksum is the manifest's. Then train with data.train=FOLDER/FILE.beton.
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

hostfile="" only_here=""
while [ $# -gt 0 ]; do
    case $1 in
    --hostfile) needs 'a file' "$@" && hostfile=$2 && shift 2 ;;
    --here) only_here=1 && shift ;; # what runs on each node; "-" for FILE is standard input
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    -?*) die "unknown option $1; see --help" ;;
    *) break ;;
    esac
done
[ $# -ge 2 ] || die "expected FILE.beton [FILE.beton ...] FOLDER; see --help"
folder=$(realpath -m -- "${*: -1}")
files=("${@:1:$#-1}")

expected() { sed -n 's/^ *"checksum": *"\([0-9a-f]\{64\}\)".*/\1/p' "$1.json" | head -n 1; } # FILE: by its manifest

copy() { # FILE NAME CHECKSUM: to this node; FILE may be "-"
    local target=$folder/$2
    if [ -f "$target" ] && [ "$(sha256sum <"$target" | cut -c1-64)" = "$3" ]; then
        say "$(hostname): $target is there already"
        return
    fi
    mkdir -p "$folder" || die "$(hostname): $folder cannot be made"
    for part in "$folder/.$2.$(hostname)"-*; do # of a copying that was killed
        [ ! -f "$part" ] || [ -d "/proc/${part##*-}" ] || rm -f "$part"
    done
    part=$folder/.$2.$(hostname)-$$
    trap 'rm -f "$part"' EXIT
    cat -- "$1" >"$part" || die "$(hostname): $target could not be written; $(df -h --output=avail "$folder" | tail -n 1 | tr -d ' ') free there"
    [ "$(sha256sum <"$part" | cut -c1-64)" = "$3" ] || die "$(hostname): the copy of $1 does not have the manifest's checksum: \`automix verify $1\` tells whether the original does"
    chmod 644 "$part"
    mv "$part" "$target"
    say "$(hostname): $target copied"
}

if [ -n "$only_here" ]; then # stage_data.sh --here FILE NAME CHECKSUM FOLDER
    copy "${files[@]}"
    exit
fi

for file in "${files[@]}"; do
    [ -f "$file" ] || die "$file: no such file"
    [ -f "$file.json" ] || die "$file.json: no such file; \`automix prepare\` writes it beside the data"
    [ -n "$(expected "$file")" ] || die "$file.json names no checksum: write the data again with \`automix prepare\`"
done
twice=$(printf '%s\n' "${files[@]##*/}" | sort | uniq -d | head -n 1)
[ -z "$twice" ] || die "two files are called $twice: the copy of one would replace the other; give each a name or FOLDER of its own"

send() ( # HOST FILE NAME CHECKSUM MANIFEST: a small line for the remote shell, the rest packed
    cd / # which every host has
    job_settings=()
    # What lies at the same path there may be an older version, and the very file to be replaced.
    if [ "$2" != "$folder/$3" ] && [ "$(ssh "${ssh_options[@]}" "$1" bash -s <<<"$(printf '[ -r %q ] && sha256sum <%q' "$2" "$5")")" = "$(sha256sum <"$5")" ]; then
        from=$2
    else
        from=- && exec <"$2"
    fi
    script=$(pack "$root/launch/stage_data.sh" --here "$from" "$3" "$4" "$folder")
    ssh "${ssh_options[@]}" "$1" "$(printf '%q --run-packed %s' "$root/launch/rank.sh" "$script")"
)

failed=0 running=()
set -m # each copy is a process group of its own, so that it can be ended whole
trap 'for each in "${running[@]}"; do kill -TERM -- "-$each" 2>/dev/null || true; done; exit 130' INT TERM
for file in "${files[@]}"; do
    file=$(realpath -- "$(dirname -- "$file")")/${file##*/} # the manifest lies beside a link, not beside what it leads to
    for each in "$file" "$file.json"; do
        checksum=$(expected "$file")
        [ "$each" = "$file" ] || checksum=$(sha256sum <"$each" | cut -c1-64)
        if [ -n "$hostfile" ]; then
            [ ${#hosts[@]} -gt 0 ] || read_hostfile
            plan "to each host at once: from its own view of the file, or through ssh" ssh "${ssh_options[@]}" HOST "$root/launch/stage_data.sh" --here "$each" "${each##*/}" "$checksum" "$folder"
            for host in "${hosts[@]}"; do
                [ -n "$dry_run" ] || { send "$host" "$each" "${each##*/}" "$checksum" "$file.json" </dev/null & running+=($!); }
            done
        else
            command=("$root/launch/stage_data.sh" --here "$each" "${each##*/}" "$checksum" "$folder")
            [ -z "${SLURM_JOB_ID:-}" ] || command=(srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" "${command[@]}")
            plan "on every node of the job, or here" "${command[@]}"
            [ -n "$dry_run" ] || { "${command[@]}" </dev/null & running+=($!); }
        fi
    done
done
for each in "${running[@]}"; do wait "$each" || failed=$((failed + 1)); done
[ $failed = 0 ] || die "$failed of ${#running[@]} copies failed; start again when that is mended: what is there is skipped"
