"""Kernels of pgolf._C and pgolf.triton_kernels as implementations: how they are called, and why
they may be missing.
"""

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf import extension
from pgolf.ops.operator import OPERATORS, Implementation

# How the compiled half of the package names dtypes.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def no_extension(*functions: str) -> str:
    """Why the C++ kernels cannot run here; '' if they can."""
    module = extension.load()
    if module is None:
        return extension.why_missing()
    absent = [name for name in functions if not hasattr(module, name)]
    return f"this build of pgolf._C has no {absent[0]}: pip install -v ." if absent else ""


def no_cuda(*functions: str) -> str:
    """Why the CUDA kernels cannot run here; '' if they can."""
    module = extension.cuda()
    if module is None:
        return extension.why_missing() or (
            "this build of pgolf._C has no CUDA kernels: PGOLF_BUILD=cuda pip install -v ."
        )
    absent = [name for name in functions if not hasattr(module, f"{name}_cuda")]
    if absent:
        return f"this build of pgolf._C has no {absent[0]}_cuda: pip install -v ."
    if extension.emulates_cuda():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    return extension.no_code_for(torch.cuda.get_device_capability(), extension.driver_cuda())


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_triton() -> str:
    """Why the Triton kernels cannot run here; '' if they can."""
    try:
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError:
        return "there is no triton of 3.5 or newer; it comes with torch's CUDA builds"
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"needs sm_80, this GPU is sm_{major}{minor}"


def launcher(name: str, impl: str, function: str) -> Callable:
    """The launcher `function` of an implementation."""
    return OPERATORS[name].implementations[impl].functions[function]


# How the launchers of an operator call the compiled half: run(function, like, *args), where `like`
# is a tensor on the device where the kernel is to run.
Run = Callable[..., None]


def run_cpp(function: str, like: Tensor, *args: Any) -> None:
    """Call a C++ kernel of pgolf._C on torch's number of threads."""
    getattr(extension.load(), function)(*args, torch.get_num_threads())


def run_cuda(function: str, like: Tensor, *args: Any) -> None:
    """Launch a CUDA kernel of pgolf._C on the device of `like`, in its current stream."""
    launch = getattr(extension.cuda(), f"{function}_cuda")
    if not like.is_cuda:  # emulated
        return launch(*args, 0)
    index = like.get_device()
    # (torch.cuda.current_stream makes an object of a stream, which takes longer than a launch.)
    stream = torch._C._cuda_getCurrentRawStream(index)
    if index == torch.cuda.current_device():
        return launch(*args, stream)
    with torch.cuda.device(index):
        launch(*args, stream)


def in_cpp(
    *needed: str, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES), **functions: Callable
) -> Implementation:
    """C++ kernels behind `functions`, which call what is `needed` of pgolf._C."""
    return Implementation("cpu", dtypes, functions, lambda: no_extension(*needed))


def in_cuda(*needed: str, **functions: Callable) -> Implementation:
    """CUDA kernels behind `functions`, which launch what is `needed` of pgolf._C."""
    dtypes = (torch.float32, torch.bfloat16)
    return Implementation(
        "cuda", dtypes, functions, lambda: no_cuda(*needed), extension.emulates_cuda
    )


def in_extension(
    functions: Sequence[str],
    launchers: Callable[[Run], Mapping[str, Callable]],
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES),
) -> dict[str, Implementation]:
    """'cpu' and 'cuda' by one glue: launchers(run) call these functions of pgolf._C with `run`.

    Args:
        dtypes: that the C++ kernels take.
    """
    return {
        "cpu": in_cpp(*functions, dtypes=dtypes, **launchers(run_cpp)),
        "cuda": in_cuda(*functions, **launchers(run_cuda)),
    }


def in_triton(module: str, **functions: str) -> Implementation:
    """Launchers of a module of pgolf.triton_kernels, which is imported when one is first called."""

    def lazily(function: str) -> Callable:
        @functools.cache
        def load() -> Callable:
            return getattr(importlib.import_module(f"pgolf.triton_kernels.{module}"), function)

        return lambda *args, **kwargs: load()(*args, **kwargs)

    dtypes = (torch.float32, torch.bfloat16)
    launchers = {name: lazily(function) for name, function in functions.items()}
    return Implementation("cuda", dtypes, launchers, no_triton, interpreting)
