"""What operators ask of their tensors before a kernel sees them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def tensors_in(argument: Any) -> tuple[Tensor, ...]:
    """The tensors of an argument that is one, or a list of them; none for anything else."""
    if isinstance(argument, Tensor):
        return (argument,)
    items = argument if isinstance(argument, (list, tuple)) else ()
    return tuple(t for t in items if isinstance(t, Tensor))


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


def check_grouped(operator: str, q: tuple[str, Tensor], *values: tuple[str, Tensor]) -> None:
    """Raise ValueError unless q (N, T, H, d) and each of the values (N, T, G, d), all by name, fit.

    H is a multiple of G: query heads share a value head.
    """
    name, queries = q
    for tensor_name, t, heads in ((name, queries, "H"), *((n, t, "G") for n, t in values)):
        if t.dim() != 4:
            raise ValueError(
                f"{operator}: {tensor_name} is {tuple(t.shape)}: it has to be (N, T, {heads}, d)"
            )
    if not queries.size(3):
        raise ValueError(f"{operator}: {name} is {tuple(queries.shape)}: heads of no elements")
    for other, t in values:
        if queries.shape[:2] != t.shape[:2] or queries.size(3) != t.size(3):
            raise ValueError(
                f"{operator}: {name} is {tuple(queries.shape)} and {other} {tuple(t.shape)}: N, T "
                "and d have to be the same"
            )
        heads, groups = queries.size(2), t.size(2)
        if not groups or not heads or heads % groups:
            raise ValueError(
                f"{operator}: {heads} query heads cannot be shared out over {groups} value heads: "
                "H has to be a multiple of G, and neither may be 0"
            )
    check_alike(operator, **dict((q, *values)))


def check_places(
    operator: str, into: Sequence[Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise ValueError unless results of `inputs` in `dtype` can be written into these tensors."""
    for i, (t, x) in enumerate(zip(into, inputs, strict=True)):
        alike = (t.shape, t.dtype, t.device) == (x.shape, dtype, x.device)
        if not alike or not t.is_contiguous():
            raise ValueError(
                f"{operator}: into[{i}] is {t.dtype} {tuple(t.shape)} on {t.device}: it has to be "
                f"{dtype} {tuple(x.shape)} on {x.device}, contiguous"
            )
    if torch.compiler.is_compiling():
        return
    spans = sorted((t.data_ptr(), t.data_ptr() + nbytes(t)) for t in into)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise ValueError(f"{operator}: two tensors of into share memory: results would be lost")
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    shared = [i for i, t in enumerate(into) if t.untyped_storage().data_ptr() in taken]
    if shared and nbytes(*into):
        raise ValueError(
            f"{operator}: into[{shared[0]}] shares memory with an input, which its gradient needs"
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


def parts_of(count: int, least: int, most: int) -> int:
    """Into how many parts kernels take so many items, to sum each up by itself; csrc/parts.h.

    Args:
        least: items of a part, unless there would be more than `most` parts so.
    """
    return -(-count // max(least, -(-count // most)))


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements of these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
