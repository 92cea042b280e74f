#!/usr/bin/env bash
# Installs what launch/offline_bundle.sh has gathered into a virtual environment: no network, no root, no compiler.
#   bash launch/offline_install.sh BUNDLE.tar.xz [VENV]     (VENV is made if it is not there; default: .venv)
# The environment sees the packages of the Python that makes it, PYTHON or else python3: that is where torch may be.
# The script is in the bundle too: tar -xOJf BUNDLE.tar.xz automix-bundle/install.sh
set -euo pipefail

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'offline_install: error: %s\n' "$*" >&2; exit 1; }

case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "$0"; exit ;; esac
[ $# = 1 ] || [ $# = 2 ] || die "expected BUNDLE.tar.xz [VENV]; --help explains"
bundle=$1 venv=${2:-.venv}
python=${PYTHON:-python3}
[ -r "$bundle" ] || die "$bundle: no such file"
[ "$(uname -m)" = x86_64 ] || die "this machine is $(uname -m), and the bundle is for x86_64"
[ ! -x "$venv/bin/python" ] || python=$venv/bin/python
command -v "$python" > /dev/null || die "$python not found: set PYTHON to this machine's Python"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" - "$bundle" "$work" <<'PY' || die "$bundle cannot be unpacked: copy it again"
import sys
import tarfile

with tarfile.open(sys.argv[1]) as archive:
    archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not in the oldest 3.11
    archive.extractall(sys.argv[2])
PY
inside=$work/automix-bundle
(cd "$inside" && sha256sum --check --quiet SHA256SUMS) || die "$bundle is damaged: copy it again"
wanted=$(cat "$inside/python") found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$wanted" = "$found" ] || die "the bundle is for Python $wanted, and $python is $found: set PYTHON, or make the bundle \
with --python $found"

[ -x "$venv/bin/python" ] || "$python" -m venv --system-site-packages --without-pip "$venv"
own=("$inside"/wheels/pip-*.whl)
wheels=()
for wheel in "$inside"/wheels/*.whl; do
    [ "$wheel" = "${own[0]}" ] || wheels+=("$wheel")
done
say "Installing ${#wheels[@]} packages into $venv"
pip() { "$venv/bin/python" "${own[0]}/pip" --disable-pip-version-check --quiet "$@"; }
pip install --no-index --no-deps --force-reinstall "${wheels[@]}"
native=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/automix_native
rm -rf "$native"
cp -R "$inside/native" "$native"

say "Checking"
pip check >&2 || say "The packages named above are missing or do not fit; what needs them will not work."
"$venv/bin/python" - <<'PY' || die "the installation does not work here; the last line above says why"
import torch, timm, accelerate, deepspeed  # noqa: E401
import automix_dist.trainer, automix_dist.augment  # noqa: E401 - FFCV, and the compiled decoders with their libraries
print(f"torch {torch.__version__}, deepspeed {deepspeed.__version__}: ready", flush=True)
PY
say "Done: $venv/bin/automix doctor"
