"""The compiled half of the package, pgolf._C, if it is there; nothing else imports it.

A missing extension is no error: every operator has a reference. One that is there and does not load
is announced, because otherwise a slow run would be the only sign.

PGOLF_CUDA_MODULE names another build of the module, whose CUDA half is taken instead: the tests run
the kernels without a GPU through one whose CUDA is emulated, and count the launches of one that is
linked to the shared CUDA runtime.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import warnings
from pathlib import Path
from types import ModuleType

_NAME = "pgolf._C"
CUDA_VARIABLE = "PGOLF_CUDA_MODULE"
LEAST_CAPABILITY = (8, 0)  # that the CUDA sources support, as setup.py has it
_REMEDY = "rebuild with `pip install -v .` (PGOLF_BUILD=cpu or cuda makes a failure an error)"


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    """(the module, '') or (None, the reason)."""
    try:
        return importlib.import_module(_NAME), ""
    except ImportError as e:
        folder = Path(__file__).parent
        files = sorted(p.name for p in folder.glob("_C.*.so"))
        if not files:
            return None, f"{_NAME} was not built in {folder}: {_REMEDY}"
        if isinstance(e, ModuleNotFoundError) and e.name == _NAME:
            why = f"{_NAME} is built for another Python ({', '.join(files)}): {_REMEDY}"
        else:
            why = f"{_NAME} is there and does not load: {e}; {_REMEDY}"
        warnings.warn(f"{why}; pgolf goes on with the slower reference forms", stacklevel=3)
        return None, why


def load() -> ModuleType | None:
    """The module pgolf._C, or None; decided once in a process."""
    return _attempt()[0]


def why_missing() -> str:
    """Why `load()` is None, with the remedy; empty if it is not."""
    return _attempt()[1]


@functools.cache
def _other(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or not Path(path).is_file():
        raise ImportError(f"{CUDA_VARIABLE}={path}: there is no such extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda() -> ModuleType | None:
    """The module whose CUDA kernels are taken, or None: pgolf._C if it was built with CUDA.

    Raises:
        ImportError: the one that PGOLF_CUDA_MODULE names is not there or does not load.
    """
    module = _other(path) if (path := os.environ.get(CUDA_VARIABLE)) else load()
    return module if module is not None and _has_cuda(module) else None


@functools.cache
def _has_cuda(module: ModuleType) -> bool:
    """Every launch of a CUDA kernel asks."""
    return bool(module.build_info()["cuda"])


def emulates_cuda() -> bool:
    """Whether the CUDA kernels run on CPU tensors."""
    module = cuda() if os.environ.get(CUDA_VARIABLE) else None
    return module is not None and module.build_info()["cudart"] == "emulated"


def machine_code(capability: tuple[int, int]) -> str:
    """The architecture of a compute capability: 'sm_80' for (8, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def serves(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU of that compute capability.

    Machine code ('sm_80') runs on its own generation from its version on, PTX ('compute_90') on
    every GPU from its version on, variant f only on its own generation, variant a only on its own
    version (CUDA C++ Programming Guide, compute capabilities).
    """
    kind, major, minor, variant = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch).groups()
    built = int(major), int(minor)
    if variant == "a":
        return capability == built
    same = capability[0] == built[0] or (kind == "compute" and not variant)
    return same and capability >= built


def driver_cuda() -> int:
    """The CUDA version that the driver supports, 1000 * major + 10 * minor; 0 if unknown."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def no_code_for(capability: tuple[int, int], driver_cuda: int) -> str:
    """Why the CUDA kernels of `cuda()` cannot run on a GPU; '' if they can.

    Args:
        capability: of the GPU.
        driver_cuda: see the function of that name.
    """
    info, gpu = cuda().build_info(), machine_code(capability)
    if capability < LEAST_CAPABILITY:
        return f"needs {machine_code(LEAST_CAPABILITY)}, this GPU is {gpu}"
    if not any(serves(arch, capability) for arch in info["archs"]):
        return (
            f"this build has CUDA code for {' '.join(info['archs'])}, and this GPU is {gpu}: "
            f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} PGOLF_BUILD=cuda "
            "pip install -v ."
        )
    release = re.search(r"release (\d+)", info["nvcc"])
    if release and driver_cuda and int(release[1]) > driver_cuda // 1000:
        return (
            f"this build is of CUDA {release[1]}, and the driver supports CUDA "
            f"{driver_cuda // 1000}: update the driver, or build with an nvcc of its version"
        )
    return ""
