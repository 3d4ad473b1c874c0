"""pgolf's CUDA kernels for the counting device: the module of setup.py on a shared CUDA runtime.

A runtime that is linked statically, as in what is installed, would look for a driver of its own.
"""

import fcntl
import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

from bench.counting.build import CACHE, Unavailable

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = CACHE / "counting-extension"
CHOICES = {"PGOLF_BUILD": "cuda", "PGOLF_CUDART": "shared", "TORCH_CUDA_ARCH_LIST": "9.0"}


def _setup() -> ModuleType:
    """setup.py with a folder of its own and the plainest CPU kernels, which nothing calls."""
    spec = importlib.util.spec_from_file_location("counting_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OBJECTS = OBJECTS.relative_to(ROOT)
    module.ISAS = {"plain": ""}
    return module


def missing() -> str:
    """Why the extension can't be built for the counting device, or ''."""
    try:
        _setup().make_plan({**os.environ, **CHOICES})
    except SystemExit as e:
        return f"pgolf's CUDA kernels can't be compiled: {e}"
    return ""


def build() -> Path:
    """The module, after what changed since the last time was compiled.

    Raises:
        Unavailable: there is no nvcc, or a compiler fails, with its message.
    """
    if complaint := missing():
        raise Unavailable(complaint)
    setup = _setup()
    OBJECTS.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    with (OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.chdir(ROOT)  # setup.py's paths begin there
        try:
            return ROOT / setup.run_ninja(setup.make_plan({**os.environ, **CHOICES}))
        except subprocess.CalledProcessError as e:
            raise Unavailable(f"pgolf's CUDA kernels do not compile, see above: {e}") from None
        finally:
            os.chdir(before)
