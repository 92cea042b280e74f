#!/usr/bin/env bash
# Installs what is missing and runs the whole test suite; with arguments only what they tell pytest to.
#   bash launch/test.sh [-k NAME] [-m "not slow"] ...
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --dev
pytest=(.venv/bin/python -m pytest)
(($#)) && exec "${pytest[@]}" "$@"
failed=0
run() { "${pytest[@]}" "$@" || failed=$?; }
# The main part has more processes than cores, so one thread each: several would wait for each other. Clusters and faults
# have time limits, but leave cores idle: two files at a time. Heartbeats and the quickstart get the machine for themselves.
clusters=(tests/cluster tests/faults)
alone=(tests/test_heartbeat.py tests/test_quickstart.py)
workers=$(($(nproc) + 1))
OMP_NUM_THREADS=1 run -n $((workers < 8 ? workers : 8)) --dist worksteal \
    "${clusters[@]/#/--ignore=}" "${alone[@]/#/--ignore=}"
run -n 2 --dist loadfile "${clusters[@]}"
run "${alone[@]}"
exit $failed
