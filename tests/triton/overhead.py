"""Work of Triton's interpreter that changes no result, left out: it took most of its time."""

import dataclasses
import functools
import inspect
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as stock


def _each_module_once(patch: Any, launch: Any) -> tuple[Any, Any]:
    """`_patch_lang` and `GridExecutor.__call__` that replace a module's language once a launch.

    A kernel's calls of other functions search all of triton.language again, to no effect.
    """
    done: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None  # to a call, which asks for nothing
        done.add(module)
        return patch(function)

    def launch_anew(*args: Any, **named: Any) -> Any:
        try:
            return launch(*args, **named)
        finally:
            done.clear()  # the language is restored

    return patch_once, launch_anew


@functools.cache
def _builtins(package: Any) -> list[str]:
    """Names of what a launch replaces, before the first one."""
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, *rest: Any) -> None:
    """The stock one, which asks all members of a package each time."""
    for name in _builtins(package):
        if tl.core.is_builtin(member := getattr(package, name)):
            stock._patch_attr(package, name, member, *rest)


def _known_types(original: Any) -> Any:
    """`block_type.__init__` that makes each type of numbers once: it spells out a name."""
    known: dict[tuple, dict[str, Any]] = {}

    def init(self: tl.block_type, element: tl.dtype, shape: Any) -> None:
        if type(element) is not tl.dtype:  # of pointers there is no end
            return original(self, element, shape)
        key = (element.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape))
        if key not in known:
            original(self, element, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init


def _known_shapes(original: Any) -> Any:
    """`tensor.__init__` that makes each shape once: it is a tuple of constants with their types."""
    known: dict[tuple, dict[str, Any]] = {}

    def init(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in known:
            original(self, handle, type)
            known[key] = vars(self) | {"handle": None}
        vars(self).update(known[key], handle=handle, type=type, dtype=type.scalar)

    return init


def trim() -> None:
    """Trim this process's interpreter before its first launch; a second call does nothing."""
    builder = stock.interpreter_builder
    if not builder.options.sanitize_overflow:
        return
    # Each sum and product of integers is computed twice, for an assertion that debug=False drops.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    stock._patch_lang, stock.GridExecutor.__call__ = _each_module_once(
        stock._patch_lang, stock.GridExecutor.__call__
    )
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        _builtins(package)
    stock._patch_builtin = _patch_builtin
    tl.block_type.__init__ = _known_types(tl.block_type.__init__)
    tl.tensor.__init__ = _known_shapes(tl.tensor.__init__)
    # A table of all types is made for each question.
    dtype_of = functools.cache(stock._get_np_dtype)
    stock._get_np_dtype = lambda dtype: dtype_of(
        tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar
    )
