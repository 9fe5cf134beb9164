#!/usr/bin/env bash
# Writes the CUDA source of every row's passes, and compiles it for several GPUs by NVRTC, which needs no GPU. NVRTC is
# fetched once per user, from PyPI, into the per-user cache.
#
# Environment: TCH_BLR_CACHE  where to keep it (default ${XDG_CACHE_HOME:-$HOME/.cache}/tch-blr)
#              CARGO          the cargo to use
set -euo pipefail
cd "$(dirname "$0")/.."

NVRTC=13.0.88

say() { printf 'check-cuda-source: %s\n' "$*"; }
die() { printf 'check-cuda-source: error: %s\n' "$*" >&2; exit 1; }

cache=${TCH_BLR_CACHE:-${XDG_CACHE_HOME:-${HOME-}/.cache}/tch-blr}
case $cache in
    /.cache/tch-blr) die "HOME is not set; set it, or set TCH_BLR_CACHE to a folder that you may write to" ;;
    /*) ;;
    *) die "the cache folder '$cache' is not an absolute path; set TCH_BLR_CACHE to one" ;;
esac
home=$cache/nvrtc-$NVRTC

found() { find "$home" -name 'libnvrtc.so.13' 2>/dev/null | head -n 1; }

fetch() {
    local work
    command -v python3 >/dev/null || die "python3 is not on the PATH"
    work=$(mktemp -d "$cache/nvrtc.XXXXXX")
    say "fetching NVRTC $NVRTC into $home; once per user"
    if ! python3 -m venv "$work/venv" >/dev/null 2>&1; then
        # Debian has Python without it.
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "python3 cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)"
        { apt-get update -q && apt-get install -q -y python3-venv; } >&2 || die "apt-get could not install python3-venv"
        rm -rf "$work/venv"
        python3 -m venv "$work/venv" >&2 || die "python3 cannot make a virtual environment"
    fi
    TMPDIR=$work PIP_REQUIRE_VIRTUALENV=0 "$work/venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --no-cache-dir --no-deps --only-binary=:all: --target "$work/files" "nvidia-cuda-nvrtc==$NVRTC" </dev/null ||
        die "pip could not fetch NVRTC; check the network (or your pip index settings), then run the same command again"
    # Whole or not at all, beside others that do the same.
    mv -T "$work/files" "$home" 2>/dev/null || [ -n "$(found)" ] || die "cannot write to $home"
    rm -rf "$work"
}

mkdir -p "$cache" || die "cannot write to $cache; set TCH_BLR_CACHE to a folder that you may write to"
[ -n "$(found)" ] || fetch
library=$(found)
[ -n "$library" ] || die "there is no libnvrtc.so.13 in $home; remove the folder and run the same command again"

folder=$PWD/target/cuda-sources
rm -rf "$folder"
mkdir -p "$folder"
TCH_BLR_CUDA_SOURCES=$folder ${CARGO:-cargo} test --quiet --workspace --test cuda_source
read -ra options <"$folder/options"
LD_LIBRARY_PATH=$(dirname "$library") python3 scripts/check_cuda_source.py "$folder" "${options[@]}"
