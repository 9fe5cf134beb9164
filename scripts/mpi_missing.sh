#!/usr/bin/env bash
# What `make test-mpi` needs and this machine lacks, in one line; nothing if it is all there.
set -euo pipefail
missing=()
command -v mpicc >/dev/null || missing+=(libopenmpi-dev)
command -v mpirun >/dev/null || missing+=(openmpi-bin)
# clang-sys, which reads MPI's headers, looks there.
found=$(ls -d /usr/lib/llvm*/lib/libclang*.so* /usr/lib*/libclang*.so* /usr/lib/*/libclang*.so* \
    /usr/local/lib/libclang*.so* "${LIBCLANG_PATH:-/nowhere}"/libclang*.so* 2>/dev/null || true)
[ -n "$found" ] || command -v llvm-config >/dev/null || missing+=(libclang-dev)
if [ ${#missing[@]} -gt 0 ]; then
    echo "mpi: not found; on Debian: apt-get install ${missing[*]}" >&2
    exit 1
fi
