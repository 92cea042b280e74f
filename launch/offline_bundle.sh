#!/usr/bin/env bash
# Gathers, on a machine with a package index, what a compute node without network needs; launch/offline_install.sh
# installs it there, without root and without a compiler.
#   bash launch/offline_bundle.sh [--python 3.12] [--have FREEZE.txt] [--without NAME,...] OUT.tar.xz
#     --python   the node's Python, 3.11 or newer (default: this machine's)
#     --have     what the node has already, as `python3 -m pip freeze` prints it there; it is left out
#     --list     print the packages that the bundle would hold, and make none
#     --without  packages to leave out, such as tensorboard (then train with log.tensorboard=false) or scikit-learn,scipy
# FFCV is changed in one point: OpenCV's 60 MB Python package, which only its own writer uses, is imported by that alone.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'offline_bundle: error: %s\n' "$*" >&2; exit 1; }

python=$root/.venv/bin/python
[ -x "$python" ] || die "$root/.venv is not there: run launch/install.sh first"
target=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') have=/dev/null without="" list="" out=""
while [ $# -gt 0 ]; do
    case "$1" in
        --python | --have | --without)
            [ $# -ge 2 ] || die "$1 needs a value"
            case "$1" in --python) target=$2 ;; --have) have=$2 ;; --without) without=$2 ;; esac
            shift 2 ;;
        --list) list=1; shift ;;
        -h | --help) sed -n '2,10s/^# //p' "$0"; exit ;;
        -*) die "unknown option $1; --help lists them" ;;
        *) [ -z "$out" ] || die "one output file is expected, got $out and $1"; out=$1; shift ;;
    esac
done
[ -n "$out$list" ] || die "which file? expected OUT.tar.xz"
[[ "$target" =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || die "--python $target: expected 3.11 or newer, as 3.12"
[ -r "$have" ] || die "--have $have: no such file"
have=$(realpath "$have") out=$(realpath -m "${out:-.}")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/automix-bundle
mkdir -p "$bundle/wheels" "$bundle/native" "$work/source"
pip() { "$python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
build() { pip wheel --no-deps --no-build-isolation --wheel-dir "$bundle/wheels" "$@"; }

# The packages: all that automix-dist asks for, and what that asks for, in the versions of this machine's environment.
cd "$root"
"$python" - "$target" "$have" "$without" > "$work/wanted" <<'PY'
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

target, have_file, without = sys.argv[1:]
left_out = {canonicalize_name(name) for name in without.split(",")} | {"opencv-python"}
have = dict(re.findall(r"(?m)^([\w.-]+)(?:==([\w.+!-]+)|\s*@)", Path(have_file).read_text()))
have = {canonicalize_name(name): version for name, version in have.items()}
environment = default_environment() | {"python_version": target, "python_full_version": f"{target}.0"}
wanted, visited = {}, set()


def visit(text, extras):
    """A requirement of a package of which these extras are asked for."""
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    marker = requirement.marker
    if name in left_out or (marker and not any(marker.evaluate(environment | {"extra": extra}) for extra in extras)):
        return
    if name in have and (not have[name] or requirement.specifier.contains(have[name], prereleases=True)):
        return
    version = metadata.version(name)
    if "+" in version:
        sys.exit(
            f"offline_bundle: error: {name} {version} here is a build that the package index has not: give --have a "
            f"list with the node's own {name}, or make the bundle from an environment with the index's build"
        )
    wanted[name] = version
    asked = {"", *requirement.extras}
    if (name, frozenset(asked)) not in visited:
        visited.add((name, frozenset(asked)))
        for each in metadata.requires(name) or []:
            visit(each, asked)


for each in metadata.requires("automix-dist"):
    visit(each, {""})
for name, version in wanted.items():
    print(f"{name}=={version}")
PY
[ -z "$list" ] || { cat "$work/wanted"; exit; }
platforms=()
for version in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
while read -r pin; do
    case "$pin" in ffcv==*) continue ;; esac
    say "$pin"
    pip download --no-deps --only-binary :all: --python-version "$target" --implementation cp "${platforms[@]}" \
        --dest "$bundle/wheels" "$pin" 2>/dev/null || DS_BUILD_OPS=0 build "$pin"
done < "$work/wanted"
pip download --no-deps --only-binary :all: --dest "$bundle/wheels" pip

# What is compiled: once, for Python's stable interface, so that any Python from 3.11 on can load it; and with its
# libraries beside it. RPATH rather than RUNPATH, which would not hold for the libraries of the libraries.
# shellcheck disable=SC2016 # the linker expands it
export LDFLAGS='-Wl,--as-needed -Wl,--disable-new-dtags -Wl,-rpath,$ORIGIN/../automix_native'
stable=(--config-settings=--build-option=--py-limited-api=cp311)
say "automix-dist"
git ls-files --cached --others --exclude-standard -z | tar --create --null --files-from - --ignore-failed-read 2>/dev/null \
    | tar --extract --directory "$work/source"
build "${stable[@]}" "$work/source"
if pin=$(grep '^ffcv==' "$work/wanted"); then
    say "$pin"
    pip download --no-deps --no-build-isolation --no-binary :all: --dest "$work" "$pin"
    tar --extract --gzip --file "$work"/ffcv-*.tar.gz --directory "$work"
    ffcv=$(echo "$work"/ffcv-*/)
    sed -i -e '/^import cv2$/d' -e '/^def \(encode_jpeg\|resizer\)(/a\    import cv2' "${ffcv}ffcv/fields/rgb_image.py"
    sed -i -e "/'opencv-python',/d" -e "s/Extension('ffcv._libffcv',/& py_limited_api=True, \
define_macros=[('Py_LIMITED_API', '0x030b0000')],/" "${ffcv}setup.py"
    if [ "$(grep -c '^    import cv2$' "${ffcv}ffcv/fields/rgb_image.py")" != 2 ] || ! grep -q py_limited_api "${ffcv}setup.py"; then
        die "$pin is not the FFCV that this script knows how to change"
    fi
    build "${stable[@]}" "$ffcv"
fi
for wheel in "$bundle"/wheels/{automix_dist,ffcv}-*.whl; do
    [ ! -e "$wheel" ] || "$python" -m zipfile --extract "$wheel" "$work/compiled"
done
find "$work/compiled" -name '*.so' -exec ldd {} + | awk '$3 ~ "^/" {print $1, $3}' | sort --unique | while read -r name path; do
    case "$name" in
        libc.so.* | libm.so.* | libdl.so.* | librt.so.* | libpthread.so.* | libstdc++.so.* | libgcc_s.so.*) ;; # every node's own
        *) cp --dereference "$path" "$bundle/native/$name" ;;
    esac
done
for wheel in "$bundle"/wheels/*.whl; do
    case "$wheel" in
        *-any.whl | *_x86_64.whl) ;;
        *) die "$(basename "$wheel") cannot be installed on x86_64" ;;
    esac
    case "$wheel" in
        *-any.whl | *-abi3-*.whl | *-cp"${target/./}"-*) ;;
        *-none-manylinux*) ;;
        *) die "$(basename "$wheel") is not for Python $target, and the package index has none that is" ;;
    esac
done

# Wheels are compressed file by file; stored and compressed together they are a third smaller.
"$python" - "$bundle/wheels" <<'PY'
import sys
import zipfile
from pathlib import Path

for wheel in Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as packed:
        files = [(entry, packed.read(entry)) for entry in packed.infolist()]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as stored:
        for entry, content in files:
            entry.compress_type = zipfile.ZIP_STORED
            stored.writestr(entry, content)
PY
echo "$target" > "$bundle/python"
cp "$root/launch/offline_install.sh" "$bundle/install.sh"
(cd "$bundle" && find . -type f -print0 | sort --zero-terminated | xargs -0 sha256sum) > "$work/SHA256SUMS"
mv "$work/SHA256SUMS" "$bundle"
say "Compressing"
tar --create --directory "$work" --owner 0 --group 0 automix-bundle | xz -T0 > "$work/out"
mv "$work/out" "$out"
say "$out: $(du --apparent-size --block-size=1M "$out" | cut -f1) MB; on the node: bash launch/offline_install.sh $(basename "$out") VENV"
