#!/usr/bin/env python3
"""Checks that NVIDIA's cuDNN accepts Shardflow's attention graphs, on a machine without a GPU.

    python3 -m venv VENV && VENV/bin/pip install -r kernels/cuda/requirements.txt \\
        nvidia-cudnn-cu13==9.28.1.4 nvidia-cublas==13.0.*
    VENV/bin/python kernels/cuda/check_cudnn.py

Given the description of a GPU, cuDNN chooses engines, compiles their kernels and finalizes plans without that GPU. Only
running a plan needs the GPU. A stub, built with the C compiler, replaces the driver. Runs an ignored test of the
kernels crate, which covers several architectures and shapes. The wheels take 1.5 GB.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tempfile

TEST = "cuda::cudnn::tests::nvidias_library_creates_plans_for_our_graphs"
# Calls that return an object through their first argument; all others only return success.
CREATORS = r"cu(Library|Module)(Load|Get)\w*|cuKernelGetFunction|cuLinkCreate\w*"
# Calls that fail because there is no device.
REFUSED = r"cuInit|cuDeviceGet|cuDeviceGetCount|cuGetProcAddress\w*|cuGetExportTable"
NO_DEVICE = 100


def stub(libraries, folder):
    """Builds a libcuda.so.1 with every driver function that cuDNN references."""
    names = set()
    for library in libraries:
        names |= set(re.findall(rb"(?<=\0)cu[A-Z][A-Za-z0-9]+(?:_v\d)?(?=\0)", library.read_bytes()))
    lines = ["int cuDriverGetVersion(int *version) { *version = 13000; return 0; }"]
    for name in sorted(name.decode() for name in names - {b"cuDriverGetVersion"}):
        if re.fullmatch(CREATORS, name):
            lines.append(f"int {name}(void **object) {{ *object = (void *)4096; return 0; }}")
        else:
            lines.append(f"int {name}(void) {{ return {NO_DEVICE if re.fullmatch(REFUSED, name) else 0}; }}")
    text = folder / "stub.c"
    text.write_text("\n".join(lines))
    command = ["cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", text]
    subprocess.run(command, check=True)


def main():
    root = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    cudnn = root / "cudnn" / "lib"
    libraries = [cudnn / f"libcudnn_{part}.so.9" for part in ("graph", "engines_runtime_compiled")]
    if missing := [str(library) for library in libraries if not library.exists()]:
        sys.exit(f"missing: {', '.join(missing)}; install the wheels named at the top of this file")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        stub(libraries, folder)
        path = ":".join(str(part) for part in (cudnn, folder, root / "cu13" / "lib"))
        build = ["cargo", "test", "-p", "shardflow-kernels", "--lib", "--no-run", "--message-format=json"]
        messages = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        program = next(executable for line in messages if (executable := json.loads(line).get("executable")))
        # Only the test sees the stub.
        environment = {**os.environ, "LD_LIBRARY_PATH": path}
        arguments = [program, "--ignored", "--exact", "--nocapture", TEST]
        return subprocess.run(arguments, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
