#!/usr/bin/env bash
# Makes .venv in the checkout with everything AutoMix-Dist needs. Runs again in a moment when nothing has changed.
#   bash launch/install.sh [--dev]      --dev adds what the tests need
# PYTHON names another Python than python3. Without root, with another torch: docs/installation.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 1; }

extras=""
case "${1:-}" in
    "") ;;
    --dev) extras="[dev,docs]" ;;
    -h | --help) sed -n '2,4s/^# //p' launch/install.sh; exit ;;
    *) die "unknown option $1; expected --dev or nothing" ;;
esac

# System packages: FFCV is compiled against OpenCV and libturbojpeg when it is installed, our decoder against libjpeg.
python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "$python not found: install Python 3.11 or newer, or set PYTHON to it"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || die "$("$python" --version) is too old: expected Python 3.11 or newer; set PYTHON to one"
missing=()
command -v "${CXX:-c++}" >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
pkg-config --exists libjpeg 2>/dev/null || missing+=(libjpeg-dev)
# The distribution has these for each of its Pythons: python3.11-venv, python3.11-dev.
found=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable), "python%d.%d" % sys.version_info[:2])')
own=()
"$python" -c 'import ensurepip' 2>/dev/null || own+=("${found##* }-venv")
"$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || own+=("${found##* }-dev")
[ ${#own[@]} = 0 ] || [[ $found == /usr/bin/* ]] \
    || die "${found% *} has no ensurepip or no Python.h, and no package (${own[*]}) of this system brings them to it: set PYTHON to another one"
missing+=("${own[@]}")
if [ ${#missing[@]} -gt 0 ]; then
    line="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
    otherwise="or without root: in a conda environment, or from a bundle made on another machine (docs/installation.md)"
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (Debian's names); install them with this system's package manager; RHEL's names:
    gcc-c++ pkgconf-pkg-config opencv-devel turbojpeg-devel libjpeg-turbo-devel ${found##* }-devel
$otherwise"
    [ "$(id -u)" = 0 ] || die "missing system packages; run this, then start again:
    sudo sh -c '$line'
$otherwise"
    say "Installing system packages: ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# Python packages, pinned in constraints.txt; the stamp tells whether anything has changed since they were installed.
stamp=".venv/.installed${extras:+-dev}"
[ -n "$extras" ] || [ ! -f "$stamp-dev" ] || stamp="$stamp-dev" # what the tests need includes the rest
wanted=$({ pwd; "$python" --version; cat constraints.txt setup.py pyproject.toml automix_dist/jpeg.c; } | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "Installing Python packages into .venv (about 6 GB; several minutes the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".$extras"
    printf '%s\n' "$wanted" > "$stamp"
fi
