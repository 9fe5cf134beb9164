#!/usr/bin/env bash
# Makes a libtorch available to cargo: an existing LIBTORCH or LIBTORCH_USE_PYTORCH is checked and left alone; otherwise
# the matching PyTorch wheel is unpacked once into a per-user cache and `.libtorch` points at it.
#
# Environment: TCH_BLR_CACHE  where to keep it (default ${XDG_CACHE_HOME:-$HOME/.cache}/tch-blr)
#              TCH_BLR_TORCH  another version of it, for another version of tch (2.11.0 for tch 0.24)
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=${TCH_BLR_TORCH:-2.13.0} # the libtorch that tch 0.26 is generated for
# All that the CPU needs: the wheel, and two libraries that it is linked to. By the hashes of PyPI's wheels for x86-64
# and for ARM, so that nobody between here and there can give us others. Those of CUDA's dependencies are not listed.
# Of torch: 2.13.0, 2.11.0.
PINNED="
torch==$TORCH
    --hash=sha256:60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7
    --hash=sha256:092790c696a760c729fd5722835f50b9d81fd7c8f141571f3f3cf4081a8f664c
    --hash=sha256:7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
    --hash=sha256:d91aac77f24082809d2c5a93f52a5f085032740a1ebc9252a7b052ef5a4fddc6
nvidia-cuda-runtime==13.0.96
    --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
    --hash=sha256:ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55
nvidia-cuda-cupti==13.0.85
    --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
    --hash=sha256:796bd679890ee55fb14a94629b698b6db54bcfd833d391d5e94017dd9d7d3151
"
NEEDED_MIB=2048 # the wheel and what it unpacks to, side by side for a moment

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# right_version FOUND WHERE: torch-sys refuses every other version, but only after minutes of building.
right_version() {
    if [ "${1%%+*}" != "$TORCH" ] && [ -z "${LIBTORCH_BYPASS_VERSION_CHECK+set}" ]; then
        die "$2 is torch $1 and tch needs $TORCH; point it at a torch $TORCH, or unset it to have one fetched"
    fi
}

for tool in cargo c++; do
    command -v "$tool" >/dev/null || die "$tool is not on the PATH; install Rust (rustup) and a C++ compiler (g++ or clang) first"
done

# torch-sys looks at LIBTORCH_USE_PYTORCH first, whatever its value, and runs these imports with this interpreter.
if [ -n "${LIBTORCH_USE_PYTORCH+set}" ]; then
    python=python3
    if [ -n "${VIRTUAL_ENV+set}" ]; then python=python; fi
    found=$("$python" -c 'import torch, torch.utils.cpp_extension; print(torch.__version__)' 2>&1) ||
        die "LIBTORCH_USE_PYTORCH is set and $python cannot import torch.utils.cpp_extension (${found##*$'\n'}); run '$python -m pip install torch==$TORCH setuptools', or unset it to have libtorch fetched"
    right_version "${found##*$'\n'}" "LIBTORCH_USE_PYTORCH: the PyTorch of $python"
    say "using the PyTorch $TORCH of $python (LIBTORCH_USE_PYTORCH)"
    exit 0
fi

if [ -n "${LIBTORCH+set}" ]; then
    case $LIBTORCH in
        /*) ;;
        *) die "LIBTORCH='$LIBTORCH' is not an absolute path; point it at an unpacked libtorch $TORCH, or unset it to have one fetched" ;;
    esac
    for file in lib/libtorch_cpu.so include/torch/csrc/api/include/torch/torch.h; do
        [ -e "$LIBTORCH/$file" ] || die "LIBTORCH=$LIBTORCH has no $file; point it at an unpacked libtorch $TORCH, or unset it to have one fetched"
    done
    found=$TORCH
    if [ -r "$LIBTORCH/build-version" ]; then # a libtorch archive
        found=$(<"$LIBTORCH/build-version")
    elif [ -r "$LIBTORCH/version.py" ]; then # the folder torch of a wheel
        found=$(sed -n "s/^__version__ = '\(.*\)'.*/\1/p" "$LIBTORCH/version.py")
    fi
    right_version "$found" "LIBTORCH=$LIBTORCH"
    say "using LIBTORCH=$LIBTORCH"
    exit 0
fi

flavour=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    flavour=cuda
    NEEDED_MIB=9216
fi

cache=${TCH_BLR_CACHE:-${XDG_CACHE_HOME:-${HOME-}/.cache}/tch-blr}
case $cache in
    /.cache/tch-blr) die "HOME is not set; set it, or set TCH_BLR_CACHE to a folder that you may write to" ;;
    /*) ;;
    *) die "the cache folder '$cache' is not an absolute path; set TCH_BLR_CACHE to one" ;;
esac
home=$cache/libtorch-$TORCH-$flavour

# The folder appears under its name only once it is complete.
complete() { [ -e "$home/torch/lib/libtorch_cpu.so" ]; }

fetch() {
    local arch i python pip free quiet=(--quiet) platforms=() wanted=("torch==$TORCH")
    arch=$(uname -m)
    case "$(uname -s)-$arch" in
        Linux-x86_64 | Linux-aarch64) ;;
        *) die "no automatic set-up for $(uname -s) on $arch; install libtorch $TORCH yourself and set LIBTORCH to its folder" ;;
    esac
    python=$(command -v python3) || die "python3 is not on the PATH; install Python 3 with pip, or set LIBTORCH to an unpacked libtorch $TORCH"
    python=$("$python" -c 'import sys; print(sys.executable)' 2>/dev/null) || die "$python does not run; repair it, or set LIBTORCH to an unpacked libtorch $TORCH" # past any wrapper: a signal must reach pip itself
    pip=$("$python" -m pip --version 2>/dev/null) || die "$python has no pip; install it (Debian: apt-get install python3-pip), or set LIBTORCH to an unpacked libtorch $TORCH"
    pip=${pip#pip } pip=${pip%% *}
    [ "$(printf '%s\n' 20.3 "$pip" | sort -V | head -n 1)" = 20.3 ] || die "pip $pip of $python is older than 20.3 and cannot choose the wheels; run '$python -m pip install --upgrade pip' first"
    free=$(($(df -Pk "$cache" | awk 'END {print $4}') / 1024))
    [ "$free" -ge "$NEEDED_MIB" ] || die "$cache has $free MiB free and libtorch needs $NEEDED_MIB; free some space or set TCH_BLR_CACHE to a folder on another disk"

    rm -rf "$cache"/partial-* # what a killed set-up left behind
    partial=$(mktemp -d "$cache/partial-XXXXXX")
    pip_pid=
    trap 'if [ -n "$pip_pid" ]; then kill "$pip_pid" && wait "$pip_pid" || true; fi 2>/dev/null; rm -rf "$partial"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP

    # Only the C++ libraries are wanted, so the wheel of one fixed Python serves whichever Python runs pip.
    for ((i = 28; i >= 5; i--)); do platforms+=("--platform=manylinux_2_${i}_$arch"); done
    for i in manylinux2014 manylinux2010 manylinux1; do platforms+=("--platform=${i}_$arch"); done
    if [ -t 1 ]; then quiet=(); fi
    if [ "$flavour" = cpu ]; then
        # One requirement a line, its hashes behind it.
        printf '%s\n' "${PINNED//$'\n'    / }" >"$partial/pinned.txt"
        wanted=(--no-deps --require-hashes -r "$partial/pinned.txt")
    fi
    say "fetching libtorch $TORCH ($flavour) into $home; once per user"
    # In the background, so that a signal reaches this script at once. It holds the lock: no other set-up starts beside it.
    TMPDIR=$partial PIP_REQUIRE_VIRTUALENV=0 "$python" -m pip install ${quiet[@]+"${quiet[@]}"} --no-input \
        --disable-pip-version-check --no-cache-dir --no-compile --no-user --target "$partial/site" --only-binary=:all: \
        --implementation cp --python-version 3.11 "${platforms[@]}" "${wanted[@]}" \
        2>"$partial/pip.log" </dev/null &
    pip_pid=$!
    wait "$pip_pid" || {
        pip_pid=
        tail -n 3 "$partial/pip.log" >&2
        die "pip could not fetch torch $TORCH; check the network (or your pip index settings: other wheels than PyPI's are refused) and the space in $cache, then run the same command again"
    }
    pip_pid=
    [ -e "$partial/site/torch/lib/libtorch_cpu.so" ] || die "the wheel torch $TORCH holds no libtorch_cpu.so; please report this with your platform ($(uname -sm))"
    rm -rf "$home"
    mv "$partial/site" "$home"
}

if ! complete; then
    { mkdir -p "$cache" && true >>"$cache/lock"; } 2>/dev/null || die "cannot write to $cache; set TCH_BLR_CACHE to a folder that you may write to"
    # One set-up at a time.
    exec 9>>"$cache/lock"
    if command -v flock >/dev/null; then
        flock -n 9 || { say "another set-up is at work; waiting for it"; flock 9; }
    fi
    complete || fetch
fi

if [ "$(readlink .libtorch || true)" != "$home/torch" ]; then
    if [ -e .libtorch ] && [ ! -L .libtorch ]; then die "$PWD/.libtorch is in the way; remove it"; fi
    ln -sfn "$home/torch" .libtorch 2>/dev/null || die "cannot write $PWD/.libtorch; make this folder writable, or set LIBTORCH=$home/torch"
fi
say "libtorch $TORCH ($flavour) at $home/torch"
