"""Runs launches of Triton kernels on CPU tensors through the PTX that Triton emits for sm_90.

Needs Triton not to interpret: TRITON_INTERPRET must not have been set when it was imported.
"""

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.aot_compile import compile_launch
from pgolf.triton_kernels.launch import Launch, intercepted

from .faults import Unsupported
from .machine import launch as run_kernel
from .memory import GlobalMemory
from .parser import Kernel, Module

PACKED = {"u64": "<Q", "u32": "<I", "s32": "<i", "f32": "<f", "f64": "<d", "s64": "<q"}
PACKED |= {"b64": "<Q", "b32": "<I"}


@dataclass
class Settings:
    """How kernels are run."""

    seed: int = 0
    limit: int = 1_000_000  # instructions a warp
    change: Callable[[Kernel], Kernel] = lambda kernel: kernel  # what is run in a kernel's place


SETTINGS = Settings()  # those of `through_ptx`


@contextlib.contextmanager
def through_ptx() -> Iterator[list[Kernel]]:
    """Inside, launches compute by their PTX; a list of the kernels, as Triton emitted them.

    Raises, at the launch:
        Fault: see machine.launch.
        Unsupported: PTX that the interpreter does not know.
    """
    kernels: list[Kernel] = []

    def handle(launch: Launch) -> None:
        compiled = compile_launch(launch)
        kernel = _kernel(compiled.asm["ptx"])
        kernels.append(kernel)
        memory = GlobalMemory()
        arguments = list(_arguments(launch, compiled.src.signature))
        for argument, _ in arguments:
            if isinstance(argument, Tensor):
                memory.add(argument)
        run_kernel(
            SETTINGS.change(kernel), launch.grid, (32 * compiled.metadata.num_warps,),
            _packed(kernel, arguments), memory, compiled.metadata.shared, SETTINGS.seed,
            SETTINGS.limit,
        )  # fmt: skip

    with intercepted(handle):
        yield kernels


@functools.lru_cache(maxsize=64)
def _kernel(ptx: str) -> Kernel:
    return Module(ptx).kernel()


def _arguments(launch: Launch, signature: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """(value, Triton's type) of those arguments that the compiled kernel has left, in order."""
    for name in launch.kernel.arg_names:
        yield from _flat(launch.arguments[name], signature[name])


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(kind, tuple):
        for v, k in zip(value, kind, strict=True):
            yield from _flat(v, k)
    elif kind != "constexpr":
        yield value, kind


def _packed(kernel: Kernel, arguments: list[tuple[Any, str]]) -> list[bytes]:
    """Bytes of every parameter; those that Triton appends are pointers to scratch memory."""
    kinds = [array.type for array in kernel.parameters.values()]
    scratch = len(kinds) - len(arguments)
    if not 0 <= scratch <= 2:
        raise Unsupported(f"{kernel.name}: {len(kinds)} parameters for {len(arguments)} arguments")
    values = [v.data_ptr() if isinstance(v, Tensor) else v for v, _ in arguments] + [0] * scratch
    return [_bytes(kind, value) for kind, value in zip(kinds, values, strict=True)]


def _bytes(kind: str, value: float) -> bytes:
    form = PACKED[kind]
    if kind[0] in "ub":
        value %= 256 ** struct.calcsize(form)
    return struct.pack(form, value)
