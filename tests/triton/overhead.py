"""Work of Triton's interpreter that changes no result, left out: it took half of its time."""

import dataclasses
import functools
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


def trim() -> None:
    """Trim this process's interpreter; calling it again does nothing."""
    builder = stock.interpreter_builder
    if not builder.options.sanitize_overflow:
        return
    # Each sum and product of integers is computed twice, for an assertion that debug=False drops.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    stock._patch_lang, stock.GridExecutor.__call__ = _each_module_once(
        stock._patch_lang, stock.GridExecutor.__call__
    )
    # A table of all types is made for each question.
    dtype_of = functools.cache(stock._get_np_dtype)
    stock._get_np_dtype = lambda dtype: dtype_of(
        tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar
    )
