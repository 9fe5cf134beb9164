#!/usr/bin/env bash
# Tests and benchmark for a machine with an NVIDIA GPU and PyTorch, but without Rust.
#
#   scripts/cuda.sh pack    builds them here, where no GPU is needed: all of it is in target/cuda/pack afterwards
#   PACK/cuda.sh run        runs them there, in six minutes at most; without a GPU too, and says what it leaves out then
#
# Environment of `pack`: TORCH, TCH  version of PyTorch there, and of the tch that is generated for it
# Environment of `run`:  PYTHON      the Python that has PyTorch (default python3)
#                        LIBTORCH    a libtorch to use instead of PyTorch's
#                        OUT         where logs and cuda.json go (default PACK/out)
set -euo pipefail

TORCH=${TORCH:-2.11.0}
TCH=${TCH:-0.24.0}
SECONDS_IN_ALL=350

say() { printf 'cuda: %s\n' "$*"; }
die() { printf 'cuda: error: %s\n' "$*" >&2; exit 1; }

# Versions are those of a copy: the lock file stays as it is.
pack() {
    cd "$(dirname "$0")/.."
    local source=$PWD/target/cuda/source pack=$PWD/target/cuda/pack
    local cargo=${CARGO:-cargo}
    rm -rf "$source" "$pack"
    mkdir -p "$source" "$pack"
    # With the times of the files, so that what has not changed is not built again.
    git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$source"
    unset LIBTORCH LIBTORCH_USE_PYTORCH
    TCH_BLR_TORCH=$TORCH "$source/scripts/setup.sh"
    cd "$source"
    # The older first: each version of tch asks for its own of torch-sys.
    "$cargo" update --quiet --package tch --precise "$TCH"
    "$cargo" update --quiet --package torch-sys --precise "$TCH"
    say "building for PyTorch $TORCH with tch $TCH"
    CARGO_TARGET_DIR=$PWD/../build CARGO_INCREMENTAL=0 "$cargo" test --release --no-run --features cuda --message-format json \
        --lib --test cuda --test golden --test conformance --bench cuda >../built.json
    # One line an artifact; of interest are the programs, by the names of their targets.
    python3 - ../built.json <<'END' >../programs
import json, sys
for line in open(sys.argv[1]):
    line = json.loads(line)
    if line.get("executable"):
        kind, name = line["target"]["kind"][0], line["target"]["name"]
        print({"lib": "unit", "bench": "bench"}.get(kind, name), line["executable"])
END
    while read -r name program; do
        strip -o "$pack/$name" "$program"
    done <../programs
    cp scripts/cuda.sh benches/cuda_peers.py "$pack"
    echo "$TORCH" >"$pack/torch"
    say "$(du -sh "$pack" | cut -f 1) in $pack; carry it there, and run $(basename "$pack")/cuda.sh run"
}

# part NAME SECONDS ARGUMENTS: runs a program of the pack, at most so long, and never longer than all may take.
part() {
    local name=$1 left=$((SECONDS_IN_ALL - SECONDS)) begin=$SECONDS code=0
    local limit=$(($2 < left ? $2 : left))
    shift 2
    if [ "$limit" -lt 5 ]; then
        say "skipped: $name: no time left"
        return
    fi
    say "$name"
    timeout "$limit" env LD_PRELOAD="$preload" "$here/$name" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    # What failed, how many passed, what was left out (if that is not too much); all of it is in the log.
    if [ "$name" = bench ]; then
        cat "$OUT/$name.log"
    else
        grep -E '^(test result:|test .*FAILED|thread .*panicked)' "$OUT/$name.log" || true
        local skipped
        skipped=$(grep -c '^skipped:' "$OUT/$name.log" || true)
        if [ "$skipped" -gt 40 ]; then
            say "$skipped times something is skipped, by name in the log"
        else
            grep '^skipped:' "$OUT/$name.log" || true
        fi
    fi
    [ "$code" -eq 0 ] || failed+=("$name ($code)")
    say "$name took $((SECONDS - begin)) s, exit code $code"
}

run() {
    here=$(cd "$(dirname "$0")" && pwd)
    OUT=${OUT:-$here/out}
    mkdir -p "$OUT"
    local libraries found wanted
    wanted=$(<"$here/torch")
    PYTHON=${PYTHON:-python3}
    if [ -n "${LIBTORCH-}" ]; then
        libraries=$LIBTORCH/lib
    else
        found=$("$PYTHON" -c 'import os, torch; print(torch.__version__, os.path.dirname(torch.__file__))') ||
            die "$PYTHON cannot import torch; set PYTHON to one that can, or LIBTORCH to a libtorch $wanted"
        [ "${found%%[+ ]*}" = "$wanted" ] || die "$PYTHON has PyTorch ${found%% *} and these programs need $wanted: pack again with TORCH and TCH set"
        libraries=${found#* }/lib
    fi
    # The driver may be on the path that is there.
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export OUT PYTHON RUST_BACKTRACE=1 TCH_BLR_CUDA_PEERS=$here/cuda_peers.py
    # Kernels are compiled once for all of the programs, and anew in each run.
    TCH_BLR_CACHE=$(mktemp -d)
    export TCH_BLR_CACHE
    trap 'rm -rf "$TCH_BLR_CACHE"' EXIT
    preload=
    failed=()
    if command -v nvidia-smi >/dev/null && nvidia-smi -L; then
        # The programs were linked where CUDA's libraries are not; the back-end registers itself as it is loaded.
        preload=$libraries/libtorch_cuda.so
    else
        say "skipped: all that needs a GPU (nvidia-smi finds none)"
    fi
    export OMP_NUM_THREADS=1
    part unit 60 kernel::cuda --nocapture --test-threads 1
    part cuda 120
    part golden 60
    unset OMP_NUM_THREADS
    part bench 150
    export OMP_NUM_THREADS=1
    part conformance 350
    say "$SECONDS s in all; logs and cuda.json in $OUT"
    [ "${#failed[@]}" -eq 0 ] || die "failed: ${failed[*]}"
}

case ${1-} in
    pack) pack ;;
    run) run ;;
    *) die "say 'pack' or 'run'; the head of this file says what they do" ;;
esac
