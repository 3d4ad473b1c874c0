"""The second step of sums over tokens: what kernels summed over parts of them, added up.

    sums[m][c] = sum over r of parts[m][r, c]

A kernel whose gradient of a vector is a sum over all tokens writes a row for each of fixed parts of
them, so that the result does not depend on the size of a GPU. These rows are added up here, those
of any number of vectors in one launch: `deferred` keeps the second steps of all layers until the
last of them has come.

Shapes: parts[m] (R, C), sums[m] (C,); R and C may differ from matrix to matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_gradient, register_no_gradient
from pgolf.ops.inputs import check_tensors
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import addresses, contiguous, nbytes


class Sums(NamedTuple):
    """Gradients of parameters that a kernel sums over parts of the tokens.

    Attributes:
        parts: how many there are.
        parameters: what they are the gradients of, in the order of the numbers of a part.
    """

    parts: int
    parameters: Sequence[Tensor]


def reference(parts: Sequence[Tensor]) -> list[Tensor]:
    """`part_sums` in plain torch."""
    return [t.sum(0) for t in parts]


def _check(parts: Sequence[Tensor]) -> None:
    check_tensors("part_sums", "parts", parts)
    if not parts:
        raise ValueError("part_sums: parts is empty: give at least one matrix")
    for i, t in enumerate(parts):
        if t.dim() != 2 or not t.is_floating_point():
            raise ValueError(
                f"part_sums: parts[{i}] is {t.dtype} {tuple(t.shape)}: it has to be of a float "
                "dtype and (R, C)"
            )
        if t.dtype != parts[0].dtype or t.device != parts[0].device:
            raise ValueError(
                f"part_sums: parts[{i}] is {t.dtype} on {t.device}, parts[0] is {parts[0].dtype} "
                f"on {parts[0].device}: they have to be alike"
            )


def part_sums(parts: Sequence[Tensor], impl: str = "auto") -> list[Tensor]:
    """The sums over the rows of each matrix.

    Args:
        parts: (R, C) of one dtype on one device; sizes may differ. Those that are not contiguous
            are copied.
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64, all summed in double) or 'cuda'
            (fp32, bf16).

    Returns:
        (C,) for each.

    Raises:
        ValueError: there are no matrices, or shapes, dtypes or devices do not fit.
        RuntimeError: `impl` is not there on this machine.
    """
    _check(parts)
    impl = resolve("part_sums", impl, parts[0])
    if impl == "reference":
        return reference(parts)
    return list(_sums(list(parts), impl).split([t.size(1) for t in parts]))


@opaque("pgolf::part_sums", mutates_args=())
def _sums(parts: list[Tensor], impl: str) -> Tensor:
    """The sums of all, behind one another."""
    return launcher("part_sums", impl, "forward")(contiguous(*parts))


@_sums.register_fake
def _(parts, impl):
    return _empty_sums(parts)


register_no_gradient("part_sums", _sums)


def _empty_sums(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(sum(t.size(1) for t in parts))


# --- later ----------------------------------------------------------------------------------------


def deferred(sums: Sequence[Sums], impl: str) -> list[Tensor]:
    """For each of these sums what its operator takes as `sums`, to leave the second step to here.

    They come as tensors (parts, numbers) without numbers. The gradient of such a tensor is what the
    operator's kernel has summed; when those of all have come, one launch adds them up.

    Args:
        sums: each with parameters.
        impl: 'auto', 'cpu' or 'cuda'.

    Raises:
        ValueError: the implementation is the reference, whose sums are made at once.
        RuntimeError: `impl` is not there on this machine.
    """
    parameters = [p for s in sums for p in s.parameters]
    impl = resolve("part_sums", impl, parameters[0])
    if impl == "reference":
        raise ValueError("part_sums: impl=reference defers no sums: leave `sums` out")
    each, parts = [len(s.parameters) for s in sums], [s.parts for s in sums]
    return _deferred(parameters, each, parts, impl)


def _shape(sums: Sums) -> tuple[int, int]:
    """(parts, numbers of a part)"""
    return sums.parts, sum(p.numel() for p in sums.parameters)


def check_deferred(operator: str, sums: Tensor, own: Sums, impl: str) -> None:
    """Raise ValueError unless `sums` of a call fits its own ones, and a kernel makes them."""
    if impl == "reference":
        raise ValueError(f"{operator}: impl=reference leaves no sums: give no `sums`")
    wanted = _shape(own)
    if tuple(sums.shape) != wanted:
        raise ValueError(
            f"{operator}: sums is {tuple(sums.shape)}: for these tensors it has to be {wanted}"
        )


@opaque("pgolf::deferred_sums", mutates_args=())
def _deferred(
    parameters: list[Tensor], each: list[int], parts: list[int], impl: str
) -> list[Tensor]:
    return _tickets(parameters, each, parts)


@_deferred.register_fake
def _(parameters, each, parts, impl):
    return _tickets(parameters, each, parts)


def _grouped(items: Sequence[Any], each: Sequence[int]) -> list[Sequence[Any]]:
    """Runs of so many neighbours."""
    ends = [sum(each[: i + 1]) for i in range(len(each))]
    return [items[end - count : end] for end, count in zip(ends, each, strict=True)]


def _tickets(
    parameters: Sequence[Tensor], each: Sequence[int], parts: Sequence[int]
) -> list[Tensor]:
    groups = [Sums(*one) for one in zip(parts, _grouped(parameters, each), strict=True)]
    return [s.parameters[0].new_empty(1).expand(_shape(s)) for s in groups]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    parameters, ctx.each, _, ctx.impl = inputs
    ctx.shapes = [p.shape for p in parameters]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, parts: Sequence[Tensor | None]) -> tuple:
    given = [t for t in parts if t is not None]
    if not given:
        return [None] * len(ctx.shapes), None, None, None
    shapes = _grouped(ctx.shapes, ctx.each)
    there = [s for s, t in zip(shapes, parts, strict=True) if t is not None]
    sizes = [shape.numel() for group in there for shape in group]
    sums = iter(_sums(given, ctx.impl).split(sizes))
    gradients = [
        None if t is None else next(sums).view(shape)
        for group, t in zip(shapes, parts, strict=True)
        for shape in group
    ]
    return gradients, None, None, None


register_gradient("part_sums", _deferred, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def sum_parts(run: Run, parts: Sequence[Tensor]) -> Tensor:
    """The sums of contiguous matrices behind one another, by `run_cpp` or `run_cuda`."""
    sums = _empty_sums(parts)
    run(
        "part_sums", sums, addresses(*parts), [t.size(0) for t in parts],
        [t.size(1) for t in parts], sums.data_ptr(), sums.numel(), DTYPE_CODES[sums.dtype],
    )  # fmt: skip
    return sums


def _launchers(run: Run) -> dict[str, Callable]:
    return {"forward": lambda parts: sum_parts(run, parts)}


def samples() -> list[Sample]:
    """Ragged lists; the bench size is what a step of PR 1473 has, 48 sequences of 2048 a rank."""

    def make(shapes: list[tuple[int, int]]):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(len(shapes))
            parts = [torch.randn(s, generator=g) for s in shapes]
            return ([t.to(device, dtype) for t in parts],), {}

        return build

    norms = [(512, 1024)] * 6 + [(512, 1536)] * 5  # mix, and weights of skips
    return [
        Sample("3 matrices", make([(5, 7), (70, 8), (1, 33)])),
        Sample("without rows or columns", make([(300, 3), (0, 9), (4, 0)])),
        Sample("70 matrices", make([(3, 5)] * 69 + [(40, 19)])),
        Sample("98304 tokens", make(norms + [(1024, 8)] * 11), bench=True),
    ]


def cost(parts: Sequence[Tensor]) -> tuple[Work, Work]:
    """Every number is read once."""
    columns = sum(t.size(1) for t in parts)
    return Work(0, nbytes(*parts), columns * parts[0].element_size()), Work(0, 0, 0)


OPERATOR = register(
    Operator(
        name="part_sums",
        call=part_sums,
        reference=reference,
        differentiable=(),
        implementations=in_extension(("part_sums",), _launchers),
        preferred={
            "cpu": [("cpu", "C++, sums in double (python -m bench ops --op part_sums)")],
            "cuda": [("cuda", "one launch for all layers (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
    )
)
