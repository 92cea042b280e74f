#!/usr/bin/env bash
# Installs what is missing and runs the whole test suite; with arguments only what they tell pytest to.
#   bash launch/test.sh [-k NAME] [-m "not slow"] ...
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --dev
pytest=(.venv/bin/python -m pytest)
(($#)) && exec "${pytest[@]}" "$@"
# Clusters, faults and heartbeats have time limits, the quickstart takes all cores: they get the machine for themselves.
alone=(tests/cluster tests/faults tests/test_heartbeat.py tests/test_quickstart.py)
failed=0
"${pytest[@]}" -n logical --maxprocesses 8 --dist worksteal "${alone[@]/#/--ignore=}" || failed=$?
"${pytest[@]}" "${alone[@]}" || failed=$?
exit "$failed"
