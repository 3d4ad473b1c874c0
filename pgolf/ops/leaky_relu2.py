"""Squared (leaky) ReLU alone, for matmuls that stay elsewhere; `leaky_relu2_mlp` is built on it.

    pre = rstd * x;   post = max(pre, slope pre)^2          slope 0: relu^2 (arXiv 2109.08668)

rstd, one factor a row, is optional. Kept for the gradient are post and one sign bit an element
instead of pre: post' = 2 sqrt(post) where the bit is set, -2 slope sqrt(post) where not. In bf16
that is closer to the truth than a rounded pre; in fp16 small values would vanish, so it is not
offered. The gradient of rstd is rowdot(x, dx) / rstd, so rstd must not be 0.
Shapes: x (..., F), rstd (...,); T rows in all; bits (T, ceil(F/32)) int32, element f is bit f % 32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.derivatives import register_gradient
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.registry import (
    DTYPE_CODES,
    Operator,
    Run,
    Sample,
    Work,
    addresses,
    check_alike,
    compute_dtype,
    in_cpp,
    in_cuda,
    launcher,
    nbytes,
    register,
    resolve,
    run_cpp,
    run_cuda,
)

_INPUTS = Inputs("leaky_relu2", ("x", "rstd"), ("x",), wide=("rstd",), optional=("rstd",))
NEEDED = ("leaky_relu2", "leaky_relu2_backward")  # functions of pgolf._C


@outside_autocast
def reference(x: Tensor, slope: float = 0.5, rstd: Tensor | None = None) -> Tensor:
    """`leaky_relu2` in plain torch."""
    if rstd is not None:
        x = x * rstd[..., None].to(x.dtype)
    return (F.leaky_relu(x, slope) if slope else F.relu(x)).square()


def check_rows(name: str, x: Tensor, slope: float, rstd: Tensor | None) -> None:
    if not x.dim():
        raise ValueError(f"{name}: the input has no dimensions: it has to be (..., columns)")
    if not 0.0 <= slope <= 1.0:  # NaN too
        raise ValueError(f"{name}: slope={slope}: it has to be 0 (relu^2) to 1")
    if rstd is not None:
        if rstd.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: rstd is {tuple(rstd.shape)}: for these rows it has to be "
                f"{tuple(x.shape[:-1])}"
            )
        wanted = compute_dtype(x.dtype)
        if rstd.dtype != wanted:
            raise ValueError(f"{name}: rstd is {rstd.dtype}: it has to be {wanted}")
        if rstd.device != x.device:
            raise ValueError(f"{name}: rstd is on {rstd.device}, the rows on {x.device}")


def leaky_relu2(
    x: Tensor, slope: float = 0.5, rstd: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """max(r x, slope r x)^2 with r = rstd or 1, for matmuls that stay elsewhere.

    Args:
        x: (..., F); impl 'cpu' takes fp32, bf16 and fp64, impl 'cuda' fp32 and bf16.
        slope: 0 to 1; 0 is relu^2.
        rstd: (...,) factor of each row in fp32 (fp64 for an fp64 x), not 0.

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    x, rstd = _INPUTS(x, rstd)
    check_rows("leaky_relu2", x, slope, rstd)
    check_alike("leaky_relu2", x=x)
    impl = resolve("leaky_relu2", impl, x)
    if impl == "reference":
        return reference(x, slope, rstd)
    rows = None if rstd is None else rstd.reshape(-1)
    return _forward(as_rows(x), rows, slope, impl)[0].view(x.shape)


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as (T, C); `view` cannot infer T where C has no elements."""
    return x.reshape(x.shape[:-1].numel(), x.size(-1))


# --- the opaque operator --------------------------------------------------------------------------


def words(post: Tensor) -> Tensor:
    """Room for the sign bits of post (T, F)."""
    return post.new_empty((post.size(0), -(-post.size(1) // 32)), dtype=torch.int32)


@torch.library.custom_op("pgolf::leaky_relu2", mutates_args=())
def _forward(
    x: Tensor, rstd: Tensor | None, slope: float, impl: str
) -> tuple[Tensor, Tensor]:
    return launcher("leaky_relu2", impl, "forward")(x.contiguous(), slope, packed(rstd))


@_forward.register_fake
def _(x: Tensor, rstd: Tensor | None, slope: float, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), words(x)


@torch.library.custom_op("pgolf::leaky_relu2_backward", mutates_args=())
def _backward(
    dpost: Tensor, post: Tensor, bits: Tensor, rstd: Tensor | None, slope: float, impl: str
) -> Tensor:
    backward = launcher("leaky_relu2", impl, "backward")
    return backward(dpost.contiguous(), post, bits, slope, packed(rstd))


@_backward.register_fake
def _(dpost, post, bits, rstd, slope, impl):
    return post.new_empty(post.shape)


def packed(rstd: Tensor | None) -> Tensor | None:
    return None if rstd is None else rstd.contiguous()


def rstd_gradient(x: Tensor, dx: Tensor, rstd: Tensor) -> Tensor:
    """rowdot(x, dx) / rstd: x enters the activation only as rstd times x or its product."""
    return (x.to(rstd.dtype) * dx.to(rstd.dtype)).sum(-1) / rstd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, rstd, ctx.slope, ctx.impl = inputs
    ctx.save_for_backward(None if rstd is None else x, rstd, *output)


def _gradient(ctx: Any, dpost: Tensor, _: Tensor | None) -> tuple:
    x, rstd, post, bits = ctx.saved_tensors
    dx = _backward(dpost, post, bits, rstd, ctx.slope, ctx.impl)
    drstd = rstd_gradient(x, dx, rstd) if ctx.needs_input_grad[1] else None
    return dx, drstd, None, None


register_gradient("leaky_relu2", _forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def forward(pre: Tensor, slope: float, rstd: Tensor | None, in_place: bool = False):
        post = pre if in_place else torch.empty_like(pre)
        bits = words(pre)
        run(
            "leaky_relu2", pre, pre.data_ptr(), post.data_ptr(), bits.data_ptr(), *addresses(rstd),
            DTYPE_CODES[pre.dtype], *pre.shape, slope,
        )  # fmt: skip
        return post, bits

    def backward(
        dpost: Tensor,
        post: Tensor,
        bits: Tensor,
        slope: float,
        rstd: Tensor | None,
        in_place: bool = False,
    ) -> Tensor:
        if dpost.shape != post.shape or dpost.dtype != post.dtype:
            raise ValueError(
                f"leaky_relu2: the gradient is {dpost.dtype} {tuple(dpost.shape)}, the result "
                f"{post.dtype} {tuple(post.shape)}: they have to be alike"
            )
        dpre = dpost if in_place else torch.empty_like(dpost)
        run(
            "leaky_relu2_backward", post, dpost.data_ptr(), post.data_ptr(), bits.data_ptr(),
            *addresses(rstd), dpre.data_ptr(), DTYPE_CODES[post.dtype], *post.shape, slope,
        )  # fmt: skip
        return dpre

    return {"forward": forward, "backward": backward}


def samples() -> list[Sample]:
    """Inputs of the activation alone."""

    def make(shape: tuple[int, ...], slope: float, scaled: bool, transposed: bool = False):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(len(shape))
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)
            x = x.mT.contiguous().mT if transposed else x
            rstd = torch.rand(shape[:-1], generator=g, dtype=torch.float64).add(0.5)
            rstd = rstd.to(device, compute_dtype(dtype))
            return (x, slope), {"rstd": rstd} if scaled else {}

        return build

    return [
        Sample("3x5x33", make((3, 5, 33), 0.5, True)),
        Sample("7x64 transposed", make((7, 64), 0.5, False, transposed=True)),
        Sample("4x100 relu2", make((4, 100), 0.0, False)),
        Sample("0x32", make((0, 32), 0.5, False)),
        Sample("4096x1536", make((4096, 1536), 0.5, False), bench=True),
        Sample("98304x1536", make((98304, 1536), 0.5, False), bench=True),
    ]


def bits_bytes(rows: int, columns: int) -> int:
    return rows * -(-columns // 32) * 4


def cost(x: Tensor, slope: float = 0.5, rstd: Tensor | None = None) -> tuple[Work, Work]:
    """Forward reads x and writes post and bits; backward reads those and dpost, writes dx."""
    bits = bits_bytes(x.shape[:-1].numel(), x.size(-1))
    return (
        Work(0, nbytes(x, rstd), nbytes(x) + bits),
        Work(0, nbytes(x, x, rstd) + bits, nbytes(x)),
    )


OPERATOR = register(
    Operator(
        name="leaky_relu2",
        call=leaky_relu2,
        reference=reference,
        differentiable=("x", "rstd"),
        implementations={
            "cpu": in_cpp(*NEEDED, **launchers(run_cpp)),
            "cuda": in_cuda(*NEEDED, **launchers(run_cuda)),
        },
        preferred={
            "cpu": [("cpu", "C++, in fp32 faster than eager and compiled (python -m bench ops)")],
            "cuda": [("reference", "a lone pointwise kernel would only break Inductor's fusion")],
        },
        samples=samples,
        cost=cost,
    )
)
