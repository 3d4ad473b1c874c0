"""Which implementation of each operator runs: decided once, with a reason."""

import functools
import os
from collections.abc import Collection, Mapping
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.errors import ConfigError
from pgolf.ops.operator import OPERATORS, Operator
from pgolf.ops.timed import timed

VARIABLE = "PGOLF_OPS"


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    impl: str
    reason: str


def parse(text: str) -> dict[str, str]:
    """'xsa=triton,newton_schulz=reference', or one word for all operators, as operator -> word.

    One word for kernels of pgolf, as triton, is those and no other: its operators that do not have
    it are the reference. Of what contradicts itself the last counts.

    Raises:
        ConfigError: an unknown operator or implementation.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    wanted: dict[str, str] = {}
    for word in words:
        matched = False
        name, equals, impl = word.partition("=")
        if equals and name not in OPERATORS:
            raise ConfigError(f"ops={text}: no operator {name!r}, only {', '.join(OPERATORS)}")
        if not equals:
            name, impl = "", name
        for target in [name] if name else OPERATORS:
            operator = OPERATORS[target]
            known = ("auto", "reference", *operator.implementations, *operator.aliases)
            if impl in known:
                matched, wanted[target] = True, operator.aliases.get(impl, impl)
            elif name:
                raise ConfigError(f"ops={text}: {name} has no {impl!r}, only {', '.join(known)}")
            elif operator.own and any(impl in o.own for o in OPERATORS.values()):
                wanted[target] = "reference"
        if not matched:
            raise ConfigError(f"ops={text}: no operator has an implementation {impl!r}")
    return wanted


def with_attention(text: str, impl: str) -> str:
    """`text` as `parse` takes it, with what the setting attention= asks for besides.

    Raises:
        ConfigError: it names another implementation of attention.
    """
    if impl == "auto":
        return text
    wish = f"attention={impl}"
    operator = OPERATORS["attention"]
    meant = {*operator.implementations, *operator.aliases}  # a word for these is one for it alone
    words = [word.strip() for word in text.split(",")]
    named = [w for w in words if w in meant or w.partition("=")[0] == "attention"]
    if parse(",".join(named)) not in ({}, parse(wish)):
        raise ConfigError(f"{wish} and ops={text} name two: give one of them")
    return ",".join(filter(None, (text, wish)))


def beyond(limits: Mapping[str, int], impl: str, size: int, what: str) -> str:
    """Why `impl` cannot run that size, by the limit that it has in a table; '' if it can."""
    limit = limits.get(impl, size)
    return f"it takes at most {limit} {what}, not {size}" if size > limit else ""


# (implementation, why it cannot run the sizes at hand), of those that cannot.
Obstacles = tuple[tuple[str, str], ...]
SizePairs = tuple[tuple[str, int], ...]  # (name, size), as `obstacle` takes them


def obstacles(name: str, **sizes: Any) -> Obstacles:
    """The implementations of an operator that cannot run these sizes."""
    operator = OPERATORS[name]
    each = [(impl, operator.obstacle(impl, **sizes)) for impl in operator.implementations]
    return tuple((impl, why) for impl, why in each if why)


def _timed_sizes(name: str, impl: str, device: str, sizes: Mapping[str, Any]) -> SizePairs:
    """Those that a choice depends on where they are no obstacle.

    As numbers: a size that Dynamo holds as dynamic becomes one there, by `index` and not by `int`,
    and nowhere else.
    """
    if impl != "auto" or device != "cuda" or not OPERATORS[name].timed:
        return ()
    return tuple((size, index(n)) for size, n in sizes.items())


def _order(
    operator: Operator, device: str, dtype: torch.dtype, compiled: bool, sizes: SizePairs
) -> list[tuple[str, str]]:
    """(implementation, reason), in the order in which `auto` tries them."""
    order = operator.preferred.get(device, ())
    if compiled:
        order = operator.preferred.get(f"{device} compiled", order)
    if operator.timed and device == "cuda":
        row = timed(operator.name, dtype, dict(sizes))
        order = [row, *order] if row else order
    return list(order)


def _problem(operator: Operator, impl: str, device: str, dtype: torch.dtype) -> str:
    """Why `impl` cannot run these tensors here; '' if it can."""
    kernel = operator.implementations.get(impl)
    if kernel is None:
        return f"there is no {impl!r}, only {', '.join(operator.implementations)}"
    if not kernel.runs_on(device):
        return f"{impl} runs on {kernel.device} tensors, these are on {device}"
    if dtype not in kernel.dtypes:
        return f"{impl} takes {' and '.join(map(str, kernel.dtypes))}, not {dtype}"
    return kernel.missing()


@functools.cache
def choose(
    name: str,
    impl: str,
    device: str,
    dtype: torch.dtype,
    compiled: bool = False,
    cannot: Obstacles = (),
    sizes: SizePairs = (),
) -> Choice:
    """What `impl` ('auto', 'reference' or an implementation) means for tensors of a device type.

    'auto' is the environment's choice (PGOLF_OPS) if there is one, else what was timed on this GPU
    (`timed`), else the first implementation in the operator's order that can run, else the
    reference. Decided once for each set of arguments.

    Args:
        cannot: of `obstacles`; where 'auto' is the environment's choice, it gives way to them.
        sizes: of operators that are `timed`.

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
    for candidate, why in _order(operator, device, dtype, compiled, sizes):
        if candidate == "reference":
            return Choice(candidate, "; ".join([why, *rejected]))
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
    names: Collection[str] = OPERATORS,
) -> dict[str, Choice]:
    """The choice of every operator for a run, whose model torch.compile compiles or not.

    Args:
        sizes: by operator, what its `obstacle` takes; one that is not named has no obstacle.
        names: of the operators, if not all.

    Raises:
        ConfigError: `text` is malformed, or asks for what cannot run here.
    """
    wanted = parse(text)
    cannot = {n: obstacles(n, **sizes[n]) if n in sizes else () for n in names}
    asked = {n: wanted.get(n, "auto") for n in names}
    own = {n: _timed_sizes(n, asked[n], device, sizes.get(n, {})) for n in names}
    try:
        return {
            n: choose(n, asked[n], device, dtype, compiled, cannot[n], own[n]) for n in names
        }
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"ops={text or os.environ.get(VARIABLE, '')}: {e}") from None


def _resolve(
    name: str, impl: str, device: str, dtype: torch.dtype, compiled: bool, cannot: Obstacles,
    sizes: SizePairs,
) -> str:  # fmt: skip
    return choose(name, impl, device, dtype, compiled, cannot, sizes).impl


# What torch.compiler.assume_constant_result sets. It would import torch._dynamo, which takes as
# long as all the rest of a command's start.
_resolve._dynamo_marked_constant = True


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
    impl = OPERATORS[name].aliases.get(impl, impl)
    if transformed():
        return _under_a_transform(name, impl)
    if impl == "reference":
        return impl
    compiled = torch.compiler.is_compiling()
    cannot = obstacles(name, **sizes)
    own = _timed_sizes(name, impl, tensor.device.type, sizes)
    return _resolve(name, impl, tensor.device.type, tensor.dtype, compiled, cannot, own)
