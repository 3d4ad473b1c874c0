"""Runs the CUDA kernels of pgolf on CPU tensors through the PTX that nvcc emitted for sm_90.

The object files that `python setup.py build_ext --inplace` left in build/ are linked once more, to
a runtime that hands every launch to the interpreter. So the arguments are those of the launchers.
"""

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pgolf import extension

from .machine import launch as run_kernel
from .memory import GlobalMemory
from .parser import Kernel, Module, kernel_names

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def find_cuobjdump() -> str:
    """The toolkit's, or the one in Triton's wheel; '' without either."""
    places = [str(Path(nvcc).resolve().parent)] if (nvcc := shutil.which("nvcc")) else []
    if spec := importlib.util.find_spec("triton"):
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    return shutil.which("cuobjdump", path=path) or ""


def why_not() -> str:
    """Why nvcc's kernels cannot be run here; '' if they can."""
    if not (shutil.which("nvcc") and shutil.which("c++")):
        return "no nvcc and c++ on PATH"
    linked = _linked_objects()
    if not all(path.exists() for path in linked) or not any(map(_is_cuda, linked)):
        return f"no CUDA objects in {OBJECTS}: python setup.py build_ext --inplace"
    return "" if find_cuobjdump() else "no cuobjdump: it comes with triton"


class Emitted:
    """The PTX of all object files; a kernel is read when it is first launched."""

    def __init__(self, objects: list[Path]):
        self._texts: dict[str, str] = {}  # kernel -> the module that it is in
        self._modules: dict[str, Module] = {}
        for path in objects:
            text = subprocess.run(
                [find_cuobjdump(), "-ptx", str(path)], check=True, capture_output=True, text=True
            ).stdout
            self._texts.update(dict.fromkeys(kernel_names(text), text))

    def names(self) -> list[str]:
        """Mangled."""
        return list(self._texts)

    def text(self, name: str) -> str:
        """The PTX of the module of a kernel."""
        return self._texts[name]

    @functools.cache  # noqa: B019  (one object a process)
    def kernel(self, name: str) -> Kernel:
        text = self._texts[name]
        if text not in self._modules:
            self._modules[text] = Module(text)
        return self._modules[text].kernel(name)


class Runner:
    """Takes the launches of the linked module.

    Attributes:
        module: the linked one.
        emitted: its PTX.
        ran: the kernels that were launched, in order, as nvcc emitted them.
        change: what is run in place of a kernel, for mutants.
        limit: of instructions a warp.
    """

    def __init__(self, folder: Path):
        objects = _linked_objects()
        path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        _link(objects, path)
        self.emitted = Emitted(list(filter(_is_cuda, objects)))
        self.ran: list[Kernel] = []
        self.change: Callable[[Kernel], Kernel] = lambda kernel: kernel
        self.limit = 1_000_000
        self._memory = GlobalMemory()
        self._fault: Exception | None = None
        self._hook = _HOOK(self._launched)  # kept, or ctypes would free it
        os.environ[extension.CUDA_VARIABLE] = str(path)
        ctypes.CDLL(str(path)).pgolf_ptx_set_hook(self._hook)
        self.module = extension.cuda()
        self._take_calls(self.module)

    def _take_calls(self, module: ModuleType) -> None:
        """Say that CUDA is emulated, and know what a fault and memory belong to."""
        info = module.build_info() | {"cudart": "emulated"}
        module.build_info = lambda: info
        for name in dir(module):
            if name.endswith("_cuda"):
                setattr(module, name, functools.partial(self._call, getattr(module, name)))
        original = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            """Whose address is taken may be read and written by the next kernel."""
            if tensor.device.type == "cpu":
                self._memory.add(tensor)
            return original(tensor)

        self._data_ptr, torch.Tensor.data_ptr = original, data_ptr

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except RuntimeError:
            if self._fault is None:
                raise
            fault, self._fault = self._fault, None
            raise fault from None
        finally:
            self._memory = GlobalMemory()

    def taken(self, kernel: Kernel) -> Kernel:
        """What is run for a kernel that is launched."""
        self.ran.append(kernel)
        return self.change(kernel)

    def _launched(self, name: bytes, sizes: Any, shared: int, arguments: Any) -> int:
        """1 if it failed; an exception cannot pass through C++."""
        try:
            kernel = self.taken(self.emitted.kernel(name.decode()))
            packed = [
                ctypes.string_at(arguments[i], array.size)
                for i, array in enumerate(kernel.parameters.values())
            ]
            run_kernel(
                kernel, sizes[:3], sizes[3:6], packed, self._memory, shared, limit=self.limit
            )
        except Exception as e:
            self._fault = e
            return 1
        return 0


def _linked_objects() -> list[Path]:
    """Of the module, as its ninja file names them; none if it was not built here."""
    ninja = OBJECTS / "build.ninja"
    text = ninja.read_text(encoding="utf-8") if ninja.exists() else ""
    lines = re.findall(r"^build \S+/_C\.so: link (.*)$", text, re.M)
    return [ROOT / name for line in lines for name in line.split()]


def _is_cuda(path: Path) -> bool:
    return path.name.endswith(".cu.o")


def _link(objects: list[Path], path: Path) -> None:
    runtime = path.with_name("cudart.o")
    source = Path(__file__).with_name("cudart.cpp")
    for command in (
        ["nvcc", "-std=c++17", "-Xcompiler=-fPIC", "-c", source, "-o", runtime],
        # Its own runtime, and not the one that torch has loaded.
        ["c++", "-shared", "-Wl,-Bsymbolic", *objects, runtime, "-lpthread", "-o", path],
    ):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-2000:]}")
