"""The norm of all gradients together, and how many of their elements are not finite.

    norm = sqrt(sum of g^2 over all elements of all gradients)

Two launches over any number of tensors: a sum for each chunk of a tensor, then those sums in their
order, so that the bits depend on nothing but the gradients. Non-finite elements go into the norm.
Shapes: gradients of any shapes, norm and the count 0-d.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_no_gradient
from pgolf.ops.inputs import check_tensors
from pgolf.ops.launch import Run, in_extension, launcher
from pgolf.ops.multi_tensor import (
    KERNEL_DTYPES,
    PR1473_MATRICES,
    Tensors,
    check_lists,
    chunks,
    codes,
    sizes,
    widened,
)
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import addresses, contiguous, nbytes


def reference(grads: Tensors) -> tuple[Tensor, Tensor]:
    """`grad_norm` in plain torch."""
    norms = [torch.linalg.vector_norm(widened(g)) for g in grads]
    bad = [g.isfinite().logical_not().sum() for g in grads]
    return torch.linalg.vector_norm(torch.stack([widened(n) for n in norms])), sum(bad)


def grad_norm(grads: Tensors, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The global norm of gradients.

    Args:
        grads: fp32 and bf16 tensors of any shapes on one device; those that are not contiguous are
            copied.
        impl: 'auto', 'reference', 'cpu' (C++) or 'cuda'.

    Returns:
        (norm, 0-d fp32; number of elements that are not finite, 0-d int64).

    Raises:
        ValueError: there are no gradients, or dtypes or devices do not fit.
        RuntimeError: `impl` is not there on this machine.
    """
    check_tensors("grad_norm", "grads", grads)
    grads = contiguous(*grads)
    check_lists("grad_norm", grads=grads)
    impl = resolve("grad_norm", impl, grads[0])
    return reference(grads) if impl == "reference" else _norm(grads, impl)


@opaque("pgolf::grad_norm", mutates_args=())
def _norm(grads: list[Tensor], impl: str) -> tuple[Tensor, Tensor]:
    return launcher("grad_norm", impl, "forward")(grads)


@_norm.register_fake
def _(grads: list[Tensor], impl: str) -> tuple[Tensor, Tensor]:
    return grads[0].new_empty((), dtype=torch.float32), grads[0].new_empty((), dtype=torch.int64)


register_no_gradient("grad_norm", _norm)


def _launchers(run: Run) -> dict[str, Callable]:
    def forward(grads: Tensors) -> tuple[Tensor, Tensor]:
        like = grads[0]
        norm = like.new_empty((), dtype=torch.float32)
        bad = like.new_empty((), dtype=torch.int64)
        partials = like.new_empty(2 * chunks(grads), dtype=torch.float64)
        run(
            "grad_norm", like, addresses(*grads), sizes(grads), codes(grads), partials.data_ptr(),
            partials.numel(), norm.data_ptr(), bad.data_ptr(),
        )  # fmt: skip
        return norm, bad

    return {"forward": forward}


def samples() -> list[Sample]:
    """Ragged lists; the bench size is what a step of PR 1473 has."""

    def make(shapes: list[tuple[int, ...]]):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(len(shapes))
            grads = [torch.randn(s, generator=g) for s in shapes]
            return ([t.to(device, dtype) for t in grads],), {}

        return build

    return [
        Sample("5 tensors", make([(3, 7), (4100,), (), (2, 64), (8192,)])),
        Sample("an empty tensor", make([(5,), (0,), (1025,)])),
        Sample("66 matrices", make(PR1473_MATRICES), bench=True),
    ]


def cost(grads: Tensors) -> tuple[Work, Work]:
    """Every gradient is read once."""
    return Work(0, nbytes(*grads), 12), Work(0, 0, 0)


OPERATOR = register(
    Operator(
        name="grad_norm",
        call=grad_norm,
        reference=reference,
        differentiable=(),
        implementations=in_extension(("grad_norm",), _launchers, KERNEL_DTYPES),
        preferred={
            "cpu": [("cpu", "one pass in C++ (python -m bench ops --op grad_norm)")],
            "cuda": [("cuda", "two launches for all tensors (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
    )
)
