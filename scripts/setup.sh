#!/usr/bin/env bash
# Makes a libtorch available to cargo: an existing LIBTORCH or LIBTORCH_USE_PYTORCH is left alone; otherwise the
# matching PyTorch wheel is unpacked once into a per-user cache and `.libtorch` points at it.
#
# Environment: TCH_BLR_CACHE  where to keep it (default ${XDG_CACHE_HOME:-$HOME/.cache}/tch-blr)
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0 # the libtorch that tch 0.26 is generated for
CUDA_LIBS=(nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85) # all that the wheel needs on a CPU
NEEDED_KIB=$((2 * 1024 * 1024)) # the wheel and what it unpacks to, side by side for a moment

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then say "using the PyTorch of your Python (LIBTORCH_USE_PYTORCH)"; exit 0; fi
if [ -n "${LIBTORCH:-}" ]; then
    [ -d "$LIBTORCH/lib" ] || die "LIBTORCH=$LIBTORCH has no folder lib; point it at an unpacked libtorch $TORCH, or unset it to have one fetched"
    say "using LIBTORCH=$LIBTORCH"
    exit 0
fi

for tool in cargo c++; do
    command -v "$tool" >/dev/null || die "$tool is not on the PATH; install Rust (rustup) and a C++ compiler (g++ or clang) first"
done

flavour=cpu
packages=("torch==$TORCH" "${CUDA_LIBS[@]}")
deps=(--no-deps)
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    flavour=cuda packages=("torch==$TORCH") deps=()
    NEEDED_KIB=$((9 * 1024 * 1024))
fi

cache=${TCH_BLR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tch-blr}
home=$cache/libtorch-$TORCH-$flavour
mkdir -p "$cache" 2>/dev/null || die "cannot create $cache; set TCH_BLR_CACHE to a folder that you may write to"

# One set-up at a time; the folder appears under its name only once it is complete.
exec 9>"$cache/lock"
if command -v flock >/dev/null; then flock 9; fi

if [ ! -e "$home/torch/lib/libtorch_cpu.so" ]; then
    case "$(uname -s)-$(uname -m)" in
        Linux-x86_64) platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_25_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64) ;;
        Linux-aarch64) platforms=(manylinux_2_28_aarch64 manylinux_2_27_aarch64 manylinux_2_25_aarch64 manylinux_2_17_aarch64 manylinux2014_aarch64) ;;
        *) die "no automatic set-up for $(uname -s) on $(uname -m); install libtorch $TORCH yourself and set LIBTORCH to its folder" ;;
    esac
    python=$(command -v python3) || die "python3 is not on the PATH; install Python 3 with pip, or set LIBTORCH to an unpacked libtorch $TORCH"
    "$python" -m pip --version >/dev/null 2>&1 || die "$python has no pip; install it (Debian: apt-get install python3-pip), or set LIBTORCH to an unpacked libtorch $TORCH"
    free=$(df -Pk "$cache" | awk 'NR==2 {print $4}')
    [ "$free" -ge "$NEEDED_KIB" ] || die "$cache has $((free / 1024)) MiB free and libtorch needs $((NEEDED_KIB / 1024)); free some space or set TCH_BLR_CACHE to a folder on another disk"

    rm -rf "$cache"/partial-* # what an interrupted set-up left behind
    partial=$(mktemp -d "$cache/partial-XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    trap 'exit 130' INT TERM
    say "fetching libtorch $TORCH ($flavour) into $home; once per user"
    # Only the C++ libraries are wanted, so the wheel of one fixed Python serves whichever Python runs pip.
    TMPDIR=$partial "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \
        --target "$partial/site" --only-binary=:all: --implementation cp --python-version 3.11 \
        "${platforms[@]/#/--platform=}" ${deps[@]+"${deps[@]}"} "${packages[@]}" 2>"$partial/pip.log" || {
        tail -n 3 "$partial/pip.log" >&2
        die "pip could not fetch ${packages[*]}; check the network (or your pip index settings) and run the same command again"
    }
    [ -e "$partial/site/torch/lib/libtorch_cpu.so" ] || die "the wheel torch $TORCH holds no libtorch_cpu.so; please report this with your platform ($(uname -sm))"
    rm -rf "$home"
    mv "$partial/site" "$home"
fi

ln -sfn "$home/torch" .libtorch
say "libtorch $TORCH ($flavour) at $home/torch"
