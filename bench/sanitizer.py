"""compute-sanitizer, where it is."""

import os
import shutil


def _program() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def complaint() -> str:
    """Why nothing can run under it; '' if something can."""
    missing = "no compute-sanitizer on PATH or in $CUDA_HOME/bin: it comes with the CUDA toolkit"
    return "" if _program() else missing


def sanitizer(tool: str) -> tuple[str, ...]:
    """What stands before a command to run it under a tool of compute-sanitizer."""
    program = _program() or "compute-sanitizer"
    return (program, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all")
