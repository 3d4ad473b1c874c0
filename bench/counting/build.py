"""Compile the counting device and prepare the environment of a process that sees it."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from pgolf.errors import PgolfError

SOURCES = Path(__file__).with_name("device")
CACHE = Path(__file__).resolve().parents[2] / "build"
NEEDED = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h", "cublas_api.h", "cublasLt.h")
FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall")
# Under these names the linker takes it for the driver's library.
LIBRARY, LINK = "libcuda.so.1", "libcuda.so"


class Unavailable(PgolfError):
    """The counting device can't be had on this machine; says what is missing and what to do."""


def missing() -> str:
    """Why there is no counting device here, or ''."""
    try:
        _compiler()
        _header_folders()
    except Unavailable as e:
        return str(e)
    return ""


def _compiler() -> str:
    name = os.environ.get("CC", "cc")
    path = shutil.which(name) or shutil.which("gcc")
    if not path:
        raise Unavailable(
            f"the counting device needs a C compiler, and neither CC={name} nor gcc is found: "
            "install gcc, or set CC"
        )
    return path


def _header_folders() -> list[Path]:
    """Folders with CUDA's headers, of torch's major version.

    Raises:
        Unavailable: torch has no CUDA, another one, or a header is nowhere.
    """
    version = torch.version.cuda
    if version is None or not version.startswith("13."):
        raise Unavailable(
            f"the counting device stands in for CUDA 13, and this torch {torch.__version__} is "
            f"built for {f'CUDA {version}' if version else 'no CUDA'}: install a CUDA 13 build "
            "of torch (no GPU is needed)"
        )
    packages = Path(sysconfig.get_paths()["purelib"])
    candidates = [packages / "nvidia" / "cu13" / "include"]  # comes with torch: cuBLAS
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        root = Path(triton.submodule_search_locations[0])
        candidates.append(root / "backends" / "nvidia" / "include")
    if os.environ.get("CUDA_HOME"):
        candidates.append(Path(os.environ["CUDA_HOME"]) / "include")
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    folders = [folder for folder in candidates if folder.is_dir()]
    lacking = [name for name in NEEDED if not any((f / name).is_file() for f in folders)]
    if lacking:
        raise Unavailable(
            f"the counting device needs CUDA 13's headers, and {', '.join(lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} in none of "
            f"{', '.join(map(str, candidates))}: install torch's CUDA build from PyPI, which "
            "brings them, or set CUDA_HOME"
        )
    return folders


def build(cache: Path = CACHE) -> Path:
    """The folder with the compiled device, made if this source was not compiled yet.

    Raises:
        Unavailable: see `missing`; or the compiler fails, with its message.
    """
    compiler, folders = _compiler(), _header_folders()
    sources = sorted(SOURCES.glob("*.c"))
    command = [compiler, *FLAGS, *(f"-isystem{folder}" for folder in folders)]
    command.append(f"-idirafter{SOURCES / 'libcu++'}")
    text = [" ".join(command), *(p.read_text() for p in sorted(SOURCES.glob("*.[ch]")))]
    name = hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
    folder = cache / f"counting-{name}"
    if (folder / LINK).exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        command += [*map(str, sources), f"-Wl,-soname,{LIBRARY}", "-o", str(made / LIBRARY)]
        done = subprocess.run([*command, "-ldl", "-lpthread"], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"the counting device does not compile:\n{done.stderr}")
        os.symlink(LIBRARY, made / LINK)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / LINK).exists():
                raise
    return folder


def environment(folder: Path, scratch: Path) -> Mapping[str, str]:
    """The environment of a process that sees the device of `folder`, as if nothing else were set.

    Args:
        scratch: where compilers may keep what they made: for this device, nothing else's.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        # A choice of operators, of an interpreter or of a compiler changes what is counted.
        if not name.startswith(("PGOLF_", "TRITON_", "TORCHINDUCTOR_", "TORCH_", "CUDA_VISIBLE"))
    }
    libraries = [str(folder), *filter(None, [kept.get("LD_LIBRARY_PATH")])]
    return {
        **kept,
        "LD_PRELOAD": str(folder / LIBRARY),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "TRITON_LIBCUDA_PATH": str(folder),
        # In worker processes nothing would be logged, and a cached graph has no counts.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        # Without it Inductor counts no bytes, silently.
        "TORCH_LOGS": "inductor_metrics",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
