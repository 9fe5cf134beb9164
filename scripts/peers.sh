#!/usr/bin/env bash
# Installs what benches/peers.py needs, PyTorch and ivon-opt, once into a virtual environment in the per-user cache,
# and points target/bench/venv at it. The user's own Python stays as it is.
#
# Environment: TCH_BLR_CACHE  where to keep it (default ${XDG_CACHE_HOME:-$HOME/.cache}/tch-blr)
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0 # as in setup.sh
IVON=0.1.3
NEEDED_MIB=9216 # on Linux the wheel of PyTorch does not load without several GB of CUDA libraries, on a CPU too

say() { printf 'peers: %s\n' "$*"; }
die() { printf 'peers: error: %s\n' "$*" >&2; exit 1; }

cache=${TCH_BLR_CACHE:-${XDG_CACHE_HOME:-${HOME-}/.cache}/tch-blr}
case $cache in
    /.cache/tch-blr) die "HOME is not set; set it, or set TCH_BLR_CACHE to a folder that you may write to" ;;
    /*) ;;
    *) die "the cache folder '$cache' is not an absolute path; set TCH_BLR_CACHE to one" ;;
esac
home=$cache/peers-torch-$TORCH-ivon-$IVON

# A virtual environment cannot be moved, so a file in it says that it is whole. Its Python may have gone since.
complete() { [ -e "$home/complete" ] && "$home/bin/python" -c '' 2>/dev/null; }

fetch() {
    local python free quiet=(--quiet)
    python=$(command -v python3) || die "python3 is not on the PATH; install Python 3.10 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than 3.10, which PyTorch $TORCH needs; put a newer python3 on the PATH"
    rm -rf "$home" # what a killed set-up left behind, or is of a Python that has gone
    free=$(($(df -Pk "$cache" | awk 'END {print $4}') / 1024))
    [ "$free" -ge "$NEEDED_MIB" ] || die "$cache has $free MiB free and the peers need $NEEDED_MIB; free some space or set TCH_BLR_CACHE to a folder on another disk"
    if [ -t 1 ]; then quiet=(); fi
    say "fetching PyTorch $TORCH and ivon-opt $IVON into $home; once per user"
    "$python" -m venv "$home" >&2 || die "$python cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)"
    TMPDIR=$home PIP_REQUIRE_VIRTUALENV=0 "$home/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --no-input \
        --disable-pip-version-check --no-cache-dir --only-binary=:all: "torch==$TORCH" "ivon-opt==$IVON" numpy </dev/null ||
        die "pip could not install the peers; check the network (or your pip index settings) and the space in $cache, then run the same command again"
    "$home/bin/python" -c 'import torch, ivon, numpy' || die "what was installed in $home cannot be imported; please report this with your platform ($(uname -sm))"
    touch "$home/complete"
}

if ! complete; then
    { mkdir -p "$cache" && true >>"$cache/lock"; } 2>/dev/null || die "cannot write to $cache; set TCH_BLR_CACHE to a folder that you may write to"
    exec 9>>"$cache/lock"
    if command -v flock >/dev/null; then
        flock -n 9 || { say "another set-up is at work; waiting for it"; flock 9; }
    fi
    complete || fetch
fi

mkdir -p target/bench
if [ -e target/bench/venv ] && [ ! -L target/bench/venv ]; then die "$PWD/target/bench/venv is in the way; remove it"; fi
ln -sfn "$home" target/bench/venv
say "PyTorch $TORCH and ivon-opt $IVON in $home"
