#!/usr/bin/env bash
# From a fresh checkout to a trained classifier: installs what is missing, writes a real dataset (the handwritten digits
# that come with scikit-learn), trains AutoMix on it, evaluates, exports, and draws what happened.
# Interrupted (Ctrl-C, SIGTERM), it saves; started again, it continues. Arguments are settings: section.key=value;
# AUTOMIX_RUN names another folder for the run.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
automix=.venv/bin/automix
run=${AUTOMIX_RUN:-runs/digits_automix_resnet10}

for split in train val; do
    [ -f "data/digits_$split.beton.json" ] || "$automix" prepare digits "data/digits_$split.beton" --split "$split" --write-mode raw
done

# In the background, so that a SIGTERM to this script alone reaches the training too; bash would sit on it otherwise.
"$automix" train configs/digits/automix_resnet10.yaml --resume output="$run" "$@" &
training=$!
trap 'kill -TERM $training' TERM
trap : INT # Ctrl-C has reached the training already; wait for it to save
status=0
wait $training || status=$?
while kill -0 $training 2>/dev/null; do
    status=0
    wait $training || status=$?
done
[ $status = 0 ] || exit $status

"$automix" eval "$run"
"$automix" export "$run" "$run/model.safetensors"
"$automix" report "$run"
