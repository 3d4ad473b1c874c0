"""`python -m bench gpu`: everything that only a GPU can show, in one call of under ten minutes."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pgolf.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PYTHON = (sys.executable, "-m")

DESCRIPTION = """\
What a machine with a GPU is asked once: the tests marked gpu; every CUDA and Triton kernel on small
samples under compute-sanitizer's memcheck and racecheck; times of `bench ops` and of `bench step`,
which are written to bench/results/<device>.jsonl. Each step has a limit, and all together take less
than ten minutes. Without a GPU it says so and does nothing.
"""
EPILOG = """\
Exit code: 0 all passed, or there is no GPU; 1 a step failed or took too long.
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m bench gpu", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)  # fmt: skip
    if not torch.cuda.is_available():
        print("torch sees no GPU here: nothing to run")
        return 0
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return run(RESULTS / f"{name}.jsonl")


def run(results: Path) -> int:
    """All steps, whatever happens to those before; times go to `results`.

    Returns:
        0, or 1 if a step failed.
    """
    parts = [results.with_suffix(f".{part}") for part in ("ops", "step")]
    ops, step = map(str, parts)
    failed = [
        name
        for name, seconds, command in (
            ("tests", 150, (*PYTHON, "pytest", "-q", "-m", "gpu")),
            ("memcheck", 100, sanitizer("memcheck")),
            ("racecheck", 120, sanitizer("racecheck")),
            ("ops", 120, (*PYTHON, "bench", "ops", "--seconds", "2", "--json", ops)),
            ("step", 100, (*PYTHON, "bench", "step", "demo", "--rounds", "10", "--json", step)),
        )
        if not passes(name, seconds, command)
    ]
    written = [part for part in parts if part.exists()]
    if written:
        atomic_write(results, "".join(part.read_text(encoding="utf-8") for part in written))
        print(f"times are in {results}")
    for part in written:
        part.unlink()
    print(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def sanitizer(tool: str) -> tuple[str, ...]:
    """The command that runs every kernel under a tool of compute-sanitizer; () without one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if program is None:
        return ()
    command = (program, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all")
    return (*command, *PYTHON, "bench.gpu_kernels")


def passes(name: str, seconds: float, command: Sequence[str]) -> bool:
    """Run a step, whose output is shown; whether it ended in time and without an error."""
    print(f"== {name}", flush=True)
    if not command:
        print("no compute-sanitizer on PATH or in $CUDA_HOME/bin: it comes with the CUDA toolkit")
        return False
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: not done after {seconds} s")
        return False
    print(f"{name}: code {code} after {time.monotonic() - start:.0f} s", flush=True)
    return code == 0
