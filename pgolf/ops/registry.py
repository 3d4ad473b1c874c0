"""The operators by name, and which implementation of each one runs: decided once, with a reason.

`reference` is plain torch in the open, which torch.compile may fuse with its neighbours; every
other implementation runs behind an opaque operator of torch.library.
"""

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf import extension
from pgolf.errors import ConfigError

VARIABLE = "PGOLF_OPS"
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


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        device: type of the device whose tensors it takes.
        dtypes: of its matrices.
        functions: its launchers by name.
        missing: why it cannot run on this machine; '' if it can.
        emulated: whether kernels for a GPU run on CPU tensors in this process.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    functions: Mapping[str, Callable]
    missing: Callable[[], str]
    emulated: Callable[[], bool] = lambda: False

    def runs_on(self, device: str) -> bool:
        return device == self.device or (self.device == "cuda" and self.emulated())


class Work(NamedTuple):
    """Least work of a pass: floating-point operations of matmuls, and bytes read and written."""

    flops: int
    read: int
    written: int


@dataclass(frozen=True)
class Sample:
    """Arguments of an operator: `build(device, dtype)` gives (positional, by keyword).

    `bench` marks the sizes that benchmarks take; the others are small and ragged, for tests.
    """

    label: str
    build: Callable[[torch.device, torch.dtype], tuple[tuple, dict[str, Any]]]
    bench: bool = False


# What an operator returns.
Result = Tensor | Sequence[Tensor] | None


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    """The results of an operator, where there is one, or none, too."""
    return (result,) if isinstance(result, Tensor) else tuple(result or ())


def tensors_in(argument: Any) -> tuple[Tensor, ...]:
    """The tensors of an argument that is one, or a list of them; none for anything else."""
    if isinstance(argument, Tensor):
        return (argument,)
    items = argument if isinstance(argument, list | tuple) else ()
    return tuple(t for t in items if isinstance(t, Tensor))


def with_tensors(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with each of its tensors changed."""
    if isinstance(argument, list | tuple):
        return [change(t) if isinstance(t, Tensor) else t for t in argument]
    return change(argument) if isinstance(argument, Tensor) else argument


@dataclass(frozen=True)
class Operator:
    """Everything about one operator that tests, benchmarks and choices iterate over.

    Attributes:
        call: the public function; takes `impl`.
        reference: the same function in plain torch.
        differentiable: names of the arguments that have gradients.
        implementations: by name, apart from the reference.
        preferred: device type -> (implementation, reason), the order in which `auto` tries them;
            'cpu compiled' is the order under torch.compile where that is another one.
        samples: arguments for tests and benchmarks.
        cost: least work (forward, backward) for a sample's arguments.
        mutates: names of the arguments that it changes in place.
        obstacle: (implementation, sizes by name) -> why it cannot run these sizes; '' if it can.
    """

    name: str
    call: Callable[..., Result]
    reference: Callable[..., Result]
    differentiable: tuple[str, ...]
    implementations: Mapping[str, Implementation]
    preferred: Mapping[str, Sequence[tuple[str, str]]]
    samples: Callable[[], list[Sample]]
    cost: Callable[..., tuple[Work, Work]]
    mutates: tuple[str, ...] = ()
    obstacle: Callable[..., str] = lambda impl, **sizes: ""


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Add an operator to the table."""
    OPERATORS[operator.name] = operator
    return operator


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    impl: str
    reason: str


def parse(text: str) -> dict[str, str]:
    """'xsa=triton,newton_schulz=reference', or one word for all operators, as operator -> word.

    Raises:
        ConfigError: an unknown operator or implementation.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    wanted: dict[str, str] = {}
    for word in words:
        name, equals, impl = word.partition("=")
        if equals and name not in OPERATORS:
            raise ConfigError(f"ops={text}: no operator {name!r}, only {', '.join(OPERATORS)}")
        if not equals:
            name, impl = "", name
        for target in [name] if name else OPERATORS:
            known = ("auto", "reference", *OPERATORS[target].implementations)
            if impl in known:
                wanted[target] = impl
            elif name:
                raise ConfigError(f"ops={text}: {name} has no {impl!r}, only {', '.join(known)}")
        if not name and impl not in wanted.values():
            raise ConfigError(f"ops={text}: no operator has an implementation {impl!r}")
    return wanted


def beyond(limits: Mapping[str, int], impl: str, size: int, what: str) -> str:
    """Why `impl` cannot run that size, by the limit that it has in a table; '' if it can."""
    limit = limits.get(impl, size)
    return f"it takes at most {limit} {what}, not {size}" if size > limit else ""


# (implementation, why it cannot run the sizes at hand), of those that cannot.
Obstacles = tuple[tuple[str, str], ...]


def obstacles(name: str, **sizes: Any) -> Obstacles:
    """The implementations of an operator that cannot run these sizes."""
    operator = OPERATORS[name]
    each = [(impl, operator.obstacle(impl, **sizes)) for impl in operator.implementations]
    return tuple((impl, why) for impl, why in each if why)


def _problem(operator: Operator, impl: str, device: str, dtype: torch.dtype) -> str:
    """Why `impl` cannot run these tensors here; '' if it can."""
    found = operator.implementations.get(impl)
    if found is None:
        return f"there is no {impl!r}, only {', '.join(operator.implementations)}"
    if not found.runs_on(device):
        return f"{impl} runs on {found.device} tensors, these are on {device}"
    if dtype not in found.dtypes:
        return f"{impl} takes {' and '.join(map(str, found.dtypes))}, not {dtype}"
    return found.missing()


@functools.cache
def choose(
    name: str,
    impl: str,
    device: str,
    dtype: torch.dtype,
    compiled: bool = False,
    cannot: Obstacles = (),
) -> Choice:
    """What `impl` ('auto', 'reference' or an implementation) means for tensors of a device type.

    'auto' is the environment's choice (PGOLF_OPS) if there is one, else the first implementation in
    the operator's order that can run, else the reference. Decided once for each set of arguments.

    Args:
        cannot: of `obstacles`; where 'auto' is the environment's choice, it gives way to them.

    Raises:
        ValueError: an unknown implementation, or one for another device, dtype or size.
        RuntimeError: one that this machine does not have.
    """
    operator, reason, asked = OPERATORS[name], "as asked", impl
    unable = dict(cannot)
    if impl == "auto":
        impl = parse(os.environ.get(VARIABLE, "")).get(name, "auto")
        reason = f"{VARIABLE} asks for it"
    if impl == "reference":
        return Choice(impl, reason)
    if impl != "auto":
        problem = _problem(operator, impl, device, dtype)
        if not problem and impl in unable and asked == "auto":
            return Choice("reference", f"{reason}: {impl}: {unable[impl]}")
        problem = problem or unable.get(impl, "")
        if problem:
            here = operator.implementations.get(impl)
            kind = RuntimeError if here and problem == here.missing() else ValueError
            raise kind(f"{name}: impl={impl}: {problem}; impl='reference' runs everywhere")
        return Choice(impl, reason)
    rejected = []
    order = operator.preferred.get(device, ())
    if compiled:
        order = operator.preferred.get(f"{device} compiled", order)
    for candidate, why in order:
        if candidate == "reference":
            return Choice(candidate, why)
        problem = _problem(operator, candidate, device, dtype) or unable.get(candidate)
        if not problem:
            return Choice(candidate, why)
        rejected.append(f"{candidate}: {problem}")
    return Choice("reference", "; ".join(rejected) or f"nothing faster is known on {device}")


def choose_all(
    text: str,
    device: str,
    dtype: torch.dtype,
    compiled: bool,
    sizes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Choice]:
    """The choice of every operator for a run, whose model torch.compile compiles or not.

    Args:
        sizes: by operator, what its `obstacle` takes; one that is not named has no obstacle.

    Raises:
        ConfigError: `text` is malformed, or asks for what cannot run here.
    """
    wanted = parse(text)
    cannot = {n: obstacles(n, **sizes[n]) if n in sizes else () for n in OPERATORS}
    try:
        return {
            n: choose(n, wanted.get(n, "auto"), device, dtype, compiled, cannot[n])
            for n in OPERATORS
        }
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"ops={text or os.environ.get(VARIABLE, '')}: {e}") from None


@torch.compiler.assume_constant_result
def _resolve(
    name: str, impl: str, device: str, dtype: torch.dtype, compiled: bool, cannot: Obstacles
) -> str:
    return choose(name, impl, device, dtype, compiled, cannot).impl


def transformed() -> bool:
    """Whether torch.func transforms what runs now, or tensors may carry tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _under_a_transform(name: str, impl: str) -> str:
    if OPERATORS[name].mutates:
        raise RuntimeError(
            f"{name}: it changes {', '.join(OPERATORS[name].mutates)} in place, which torch.func "
            "and forward-mode derivatives cannot follow: call it outside of them"
        )
    if impl in ("auto", "reference"):
        return "reference"
    raise RuntimeError(
        f"{name}: impl={impl}: kernels know neither torch.func (grad, jvp, vmap) nor forward-mode "
        "derivatives: use impl='reference'"
    )


def resolve(name: str, impl: str, tensor: Tensor, **sizes: Any) -> str:
    """The implementation that runs for `tensor`; a constant under torch.compile.

    Under torch.func and in forward mode, of which kernels know nothing, 'auto' is the reference.

    Args:
        sizes: what the operator's `obstacle` takes.

    Raises:
        ValueError, RuntimeError: as `choose`; RuntimeError: kernels were asked for there.
    """
    if transformed():
        return _under_a_transform(name, impl)
    if impl == "reference":
        return impl
    compiled = torch.compiler.is_compiling()
    cannot = obstacles(name, **sizes)
    return _resolve(name, impl, tensor.device.type, tensor.dtype, compiled, cannot)


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
    with torch.cuda.device(like.device):
        launch(*args, torch.cuda.current_stream().cuda_stream)


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


def check_alike(operator: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have one floating dtype and lie on one device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    (first, head), *others = given.items()
    if not head.is_floating_point() or head.itemsize == 1:  # torch computes nothing in float8
        raise ValueError(f"{operator}: {first} is {head.dtype}: use a float dtype, 16 bits or more")
    for name, t in others:
        if t.dtype != head.dtype:
            raise ValueError(
                f"{operator}: {name} is {t.dtype} and {first} is {head.dtype}: cast one of them"
            )
        if t.device != head.device:
            raise ValueError(
                f"{operator}: {name} is on {t.device} and {first} on {head.device}: move one"
            )


def unit_stride(t: Tensor) -> Tensor:
    """t, copied if its last dimension is strided; `contiguous` keeps strides of empty tensors."""
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """They, packed, where they are there."""
    return [None if t is None else t.contiguous() for t in tensors]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute in for elements of that dtype: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Where they lie, as the compiled half takes them; 0 for what is not there."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements of these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
