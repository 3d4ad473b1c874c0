"""What a result was made with."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import pgolf
from pgolf.device import cpu_flags, driver

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and the commit of the source tree (None where unknown)."""
    source = Path(pgolf.__file__).resolve().parent.parent
    # An installed copy may lie in another project's repository, whose commit says nothing.
    ours = _output("git", "ls-files", "--error-unmatch", "pgolf/__init__.py", cwd=source)
    commit = _output("git", "rev-parse", "HEAD", cwd=source) if ours else None
    if commit and _output("git", "status", "--porcelain", "--untracked-files=no", cwd=source):
        commit += "+changes"
    on_gpu = device.type == "cuda"
    return {
        "pgolf": pgolf.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": driver() or None,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cpu_flags": sorted(cpu_flags() & set(FLAGS)),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
