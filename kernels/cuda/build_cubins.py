#!/usr/bin/env python3
"""Compiles and assembles each CUDA module for each architecture with NVRTC. Needs no GPU.

    python3 -m venv VENV && VENV/bin/pip install -r kernels/cuda/requirements.txt
    VENV/bin/python kernels/cuda/build_cubins.py --out FOLDER [--arch sm_90a ..] [MODULE ..]

A module is `common.cuh` followed by `kernels/src/cuda/NAME.cu`; its cubin is `FOLDER/NAME.ARCH.cubin`. Prints each
kernel's registers, spilled bytes and static shared memory. Fails on an error, or if a kernel spills more bytes than
allowed. Does not rebuild a cubin whose source, headers, options and compiler are unchanged.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import sysconfig

ARCHITECTURES = ["sm_80", "sm_90", "sm_90a"]
# Limit for the bytes of spill stores and loads of a kernel. The attention gradient of the deepest heads has 96; more
# means that a tile is too large.
SPILL_BYTES_MAX = 128
OPTIONS = ["--std=c++17", "--ptxas-options=-v"]
SOURCES = pathlib.Path(__file__).resolve().parent.parent / "src" / "cuda"
PACKAGES = ["nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-crt"]


class CompileError(Exception):
    """NVRTC's error and log for a source that does not compile."""


class Nvrtc:
    """The NVRTC library of the wheel `nvidia-cuda-nvrtc`."""

    def __init__(self):
        root = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
        self.include = root / "include"
        # The main library loads this one by name only.
        ctypes.CDLL(str(next((root / "lib").glob("libnvrtc-builtins.so.13*"))), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(root / "lib" / "libnvrtc.so.13"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, function, *args):
        code = getattr(self.library, function)(*args)
        if code != 0:
            raise CompileError(f"{function}: {self.library.nvrtcGetErrorString(code).decode()}")

    def bytes_of(self, program, name):
        """Returns the bytes from nvrtcGet{name}, sized by nvrtcGet{name}Size."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{name}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{name}", program, data)
        return data.raw

    def compile(self, name, text, architecture):
        """Returns the cubin and ptxas's report."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        options = [*OPTIONS, f"--gpu-architecture={architecture}", f"--include-path={self.include}"]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        try:
            self.call("nvrtcCompileProgram", program, len(options), array)
        except CompileError as error:
            log = self.bytes_of(program, "ProgramLog").rstrip(b"\0").decode()
            raise CompileError(f"{error}\n{log}") from None
        log = self.bytes_of(program, "ProgramLog").rstrip(b"\0").decode()
        return self.bytes_of(program, "CUBIN"), log


def resources(log):
    """Parses each kernel's registers, spilled bytes (stores and loads), stack and static shared memory from ptxas's report."""
    kernels, name = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            kernels[name] = {"registers": 0, "spilled": 0, "stack": 0, "shared": 0}
        elif name and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            kernels[name]["stack"] = int(match[1])
            kernels[name]["spilled"] = int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            kernels[name]["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[name]["shared"] = int(shared[1])
    return kernels


def text_of(module):
    """Returns the complete source of a module, as in kernels/src/cuda/source.rs."""
    return (SOURCES / "common.cuh").read_text() + (SOURCES / f"{module}.cu").read_text()


def build(module, architecture, out):
    """Builds one cubin unless it is up to date; returns its kernels' resources."""
    text = text_of(module)
    versions = [importlib.metadata.version(package) for package in PACKAGES]
    key = hashlib.sha256(json.dumps([text, OPTIONS, versions, architecture]).encode()).hexdigest()
    cubin, report = (out / f"{module}.{architecture}.{extension}" for extension in ("cubin", "json"))
    if cubin.exists() and report.exists():
        cached = json.loads(report.read_text())
        if cached["key"] == key:
            return cached["kernels"]
    report.unlink(missing_ok=True)
    data, log = Nvrtc().compile(f"{module}.cu", text, architecture)
    kernels = resources(log)
    expected = set(re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(', text))
    if set(kernels) != expected:
        raise CompileError(f"ptxas reports the kernels {sorted(kernels)}, but the source has {sorted(expected)}\n{log}")
    cubin.write_bytes(data)
    report.write_text(json.dumps({"key": key, "kernels": kernels}))
    return kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--arch", action="append", help=f"architecture to build for, repeatable; default: {ARCHITECTURES}")
    parser.add_argument("modules", nargs="*", default=sorted(path.stem for path in SOURCES.glob("*.cu")))
    args = parser.parse_args()
    args.arch = args.arch or ARCHITECTURES
    args.out.mkdir(parents=True, exist_ok=True)
    failures, results = [], {}
    # One process per core: NVRTC compiles on one thread.
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {
            pool.submit(build, module, architecture, args.out): (module, architecture)
            for architecture in args.arch
            for module in args.modules
        }
        for job, (module, architecture) in jobs.items():
            try:
                for kernel, usage in job.result().items():
                    results.setdefault((module, kernel), {})[architecture] = usage
            except CompileError as error:
                failures.append(f"{module}.cu for {architecture}: {error}")
    print(f"{'kernel':44}" + "".join(f"{architecture:>22}" for architecture in args.arch))
    print(f"{'':44}" + f"{'regs spill shared':>22}" * len(args.arch))
    for (module, kernel), usages in sorted(results.items()):
        columns = [usages.get(a, {"registers": 0, "spilled": 0, "shared": 0}) for a in args.arch]
        cells = [f"{usage['registers']} {usage['spilled']:5} {usage['shared']:6}" for usage in columns]
        print(f"{module + '.' + kernel:44}" + "".join(f"{cell:>22}" for cell in cells))
        for architecture, usage in usages.items():
            if usage["spilled"] > SPILL_BYTES_MAX:
                spilled = f"it spills {usage['spilled']} bytes; the maximum is {SPILL_BYTES_MAX}"
                failures.append(f"{kernel} of {module}.cu for {architecture}: {spilled}; use a smaller tile")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(f"{len(results)} kernels, {len(jobs)} cubins in {args.out}, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
