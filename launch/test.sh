#!/usr/bin/env bash
# Installs what is missing and runs the whole test suite; further arguments go to pytest.
#   bash launch/test.sh [-k NAME] [-m "not slow"] ...
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --dev
exec .venv/bin/python -m pytest "$@"
