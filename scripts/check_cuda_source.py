#!/usr/bin/env python3
"""Compiles every CUDA source of the crate by NVRTC for several GPUs, on a machine that needs none.

Usage: check_cuda_source.py FOLDER OPTION..

FOLDER holds the sources, `NAME-HASH.cu` each; tests/cuda_source.rs writes them, and the options with which the crate
compiles. Fails at an error, a warning, a spill of registers, or more than 64 registers in a kernel: a block has 512
threads, and two blocks then share a multiprocessor. Prints the registers of the largest.

Environment: LD_LIBRARY_PATH or NVRTC  where libnvrtc.so.13 is (scripts/check_cuda_source.sh fetches one)
"""

import ctypes
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GPUS = ["sm_75", "sm_80", "sm_90", "sm_100"]
REGISTERS = 64


def compiled(nvrtc, source, name, options):
    """Result code and log."""
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None):
        return 1, "no program"
    given = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    code = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


def checked(nvrtc, path, gpu, options):
    """Registers, and what is wrong with the kernel."""
    options = [f"--gpu-architecture={gpu}", "--ptxas-options=-v", *options]
    code, log = compiled(nvrtc, path.read_bytes(), path.name, options)
    said = [line for line in log.splitlines() if line and not line.startswith("ptxas")]
    used = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if code or said or re.search("warning", log, re.I):
        return 0, log
    if len(used) != 1 or len(spills) != 1:
        return 0, f"the compiler did not say what the kernel needs:\n{log}"
    if set(spills[0]) != {"0"}:
        return int(used[0]), f"stack and spills of {spills[0]} bytes"
    if int(used[0]) > REGISTERS:
        return int(used[0]), f"{used[0]} registers"
    return int(used[0]), None


def main():
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    begin = time.monotonic()
    # The same source under the names of several rows is one.
    sources = {path.stem.rsplit("-", 1)[1]: path for path in sorted(folder.glob("*.cu"), reverse=True)}
    if not sources:
        sys.exit(f"no sources in {folder}")
    nvrtc = ctypes.CDLL(os.environ.get("NVRTC", "libnvrtc.so.13"))
    jobs = [(path, gpu) for path in sorted(sources.values()) for gpu in GPUS]
    wrong, most = 0, {}
    # ctypes lets go of the interpreter during a call.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: checked(nvrtc, *job, options), jobs)
        for (path, gpu), (registers, problem) in zip(jobs, results):
            row = path.stem.rsplit("-", 1)[0]
            most[row, gpu] = max(most.get((row, gpu), 0), registers)
            if problem:
                wrong += 1
                print(f"{path} for {gpu}: {problem}")
    print("registers, at most:")
    print(f"{'':32}", *(f"{gpu:>7}" for gpu in GPUS))
    for row in sorted({row for row, _ in most}, key=lambda row: -most[row, "sm_90"]):
        print(f"{row:32}", *(f"{most[row, gpu]:7}" for gpu in GPUS))
    print(f"{len(sources)} sources for {len(GPUS)} GPUs in {time.monotonic() - begin:.0f} s: at most "
          f"{max(most.values())} registers, {wrong} not as they should be")
    sys.exit(bool(wrong))


main()
