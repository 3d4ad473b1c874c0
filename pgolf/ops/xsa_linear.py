"""Exclusive self attention with the output projection behind it, as one step of the gradient.

    z = xsa(y, v),   out = z W^T
    dz = dout W,   dW = dout^T z,   dy and dv from dz, y and v as the operator `xsa` has them

The forward pass is `xsa` and torch's matmul. 'triton' computes dz, dy and dv in one GEMM whose
epilogue is the gradient of `xsa` (arXiv 2603.09078): dz is neither written nor read, two tensors of
y's size. On a GPU without TMA, for fp32 and for heads that make no tiles (their elements and the
heads to a value are powers of two, together at most 128) it is torch's matmul and the row kernel of
`xsa=triton`.

With `ops=`: where this operator is the reference, a model takes `xsa` as `xsa=` names it and
torch's matmul; where it is not, the forward pass takes `xsa` as `xsa=` names it, and the backward
pass is this operator's. `auto` is the reference but on a GPU where the other was found to be faster
(`python -m bench tune --epilogues`).
Shapes: y, z (N, T, H, d), v (N, T, G, d), w (D, H d), out (N, T, D).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_gradient
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import in_triton, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.product import Product, ticket_of
from pgolf.ops.tensors import check_alike, check_grouped, contiguous, nbytes, unit_stride
from pgolf.ops.xsa import obstacle as xsa_obstacle
from pgolf.ops.xsa import reference as xsa_reference
from pgolf.ops.xsa import xsa

_INPUTS = Inputs("xsa_linear", ("y", "v", "w"), alike=("y", "v", "w"), matmul=True)


@outside_autocast
def reference(y: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """`xsa_linear` in plain torch."""
    return F.linear(xsa_reference(y, v).flatten(2), w)


@outside_autocast
def _in_two_steps(y: Tensor, v: Tensor, w: Tensor, xsa_impl: str) -> Tensor:
    return F.linear(xsa(y, v, xsa_impl).flatten(2), w)


def obstacle(impl: str, size: int, share: int, heads: int, width: int) -> str:
    """Why `impl` cannot run these heads, to rows of that width; '' if it can."""
    return xsa_obstacle(impl, size, share)


def xsa_linear(
    y: Tensor, v: Tensor, w: Tensor, impl: str = "auto", xsa_impl: str | None = None,
    as_product: bool = False,
) -> Tensor | Product:  # fmt: skip
    """The output projection of what `xsa` leaves of y.

    Args:
        y: (N, T, H, d) outputs of attention.
        v: (N, T, G, d) values, H a multiple of G.
        w: (D, H d), all three of one dtype and device; under autocast they are cast to its dtype.
        impl: 'auto', 'reference' (`xsa`, then torch's matmul) or 'triton' (fp32, bf16; d <= 256;
            see above for what runs where its epilogue is not possible).
        xsa_impl: of `xsa`, in the forward pass or in the two steps of the reference; None: `impl`.
        as_product: whether the product is left to who takes it, such as `linear_residual`.

    Returns:
        (N, T, D), contiguous; or it as a `Product`.

    Raises:
        TypeError, ValueError, RuntimeError: as `xsa`.
    """
    y, v, w = _INPUTS(y, v, w)
    check_grouped("xsa_linear", ("y", y), ("v", v))
    width = y.size(2) * y.size(3)
    if w.dim() != 2 or w.size(1) != width or not w.size(0):
        raise ValueError(
            f"xsa_linear: w is {tuple(w.shape)}: with y {tuple(y.shape)} it has to be (D, {width}) "
            "with D not 0"
        )
    check_alike("xsa_linear", y=y, v=v, w=w)
    sizes = {"size": y.size(3), "share": y.size(2) // v.size(2)}
    chosen = resolve("xsa_linear", impl, y, **sizes, heads=y.size(2), width=w.size(0))
    xsa_impl = xsa_impl or impl
    if chosen == "reference":
        if as_product:
            return Product(xsa(y, v, xsa_impl).flatten(2), w)
        return _in_two_steps(y, v, w, xsa_impl)
    out, z = _forward(y, v, w, as_product, chosen, resolve("xsa", xsa_impl, y, **sizes))
    return Product(z.flatten(2).detach(), w.detach(), out) if as_product else out


# --- the opaque operators -------------------------------------------------------------------------


@opaque("pgolf::xsa_linear", mutates_args=())
def _forward(
    y: Tensor, v: Tensor, w: Tensor, as_product: bool, impl: str, xsa_impl: str
) -> tuple[Tensor, Tensor]:
    """out, or its ticket, and z, which only the gradient of w needs, and who takes a product."""
    rows = xsa_reference if xsa_impl == "reference" else launcher("xsa", xsa_impl, "forward")
    with without_autocast(y):
        (z,) = contiguous(rows(unit_stride(y), unit_stride(v)))
        return ticket_of(y[..., 0], w) if as_product else z.flatten(2) @ w.t(), z


@_forward.register_fake
def _(y, v, w, as_product, impl, xsa_impl):
    out = ticket_of(y[..., 0], w) if as_product else y.new_empty((*y.shape[:2], w.size(0)))
    return out, y.new_empty(y.shape)


@opaque("pgolf::xsa_linear_dgrad", mutates_args=())
def _dgrad(
    dout: Tensor, w: Tensor, y: Tensor, v: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    (w,) = contiguous(w)
    dgrad = launcher("xsa_linear", impl, "dgrad")
    return dgrad(unit_stride(dout), w, unit_stride(y), unit_stride(v))


@_dgrad.register_fake
def _(dout, w, y, v, impl):
    return y.new_empty(y.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, v, w, _, ctx.impl, _ = inputs
    ctx.set_materialize_grads(False)  # of z there is none
    ctx.save_for_backward(y, v, w, output[1])


def _gradient(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple:
    y, v, w, z = ctx.saved_tensors
    need_y, need_v, need_w = ctx.needs_input_grad[:3]
    rows = dout.reshape(-1, dout.size(2))
    dy = dv = None
    if need_y or need_v:
        dy, dv = _dgrad(rows, w, y, v, ctx.impl)
    dw = rows.t() @ z.view(rows.size(0), w.size(1)) if need_w else None
    return dy if need_y else None, dv if need_v else None, dw, None, None, None


register_gradient("xsa_linear", _forward, _gradient, _setup_context)


# --- the operator ---------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Groupings, head sizes and layouts, ragged ones too; the recipes' at 98,304 tokens."""

    def make(batch: int, time: int, heads: int, groups: int, size: int, dim: int, packed: bool):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(time)
            y = torch.randn(batch, time, heads, size, generator=g)
            qkv = torch.randn(batch, time, heads + 2 * groups, size, generator=g)
            w = torch.randn(dim, heads * size, generator=g) * (heads * size) ** -0.5
            y, qkv, w = (t.to(device, dtype) for t in (y, qkv, w))
            v = qkv[:, :, heads + groups :]
            return (y, v if packed else v.contiguous(), w), {}

        return build

    shapes = {
        "2x7 8/4 64 to 40": (2, 7, 8, 4, 64, 40, True),
        "1x33 4/1 32 to 16": (1, 33, 4, 1, 32, 16, False),
        "1x5 4/4 64 to 33": (1, 5, 4, 4, 64, 33, False),
        "1x3 6/2 80 to 24": (1, 3, 6, 2, 80, 24, False),
        "0 tokens": (1, 0, 4, 2, 32, 16, False),
    }
    big = {f"{t} tokens": (1, t, 8, 4, 64, 512, False) for t in (8192, 98304)}
    return [Sample(label, make(*s)) for label, s in shapes.items()] + [
        Sample(label, make(*s), bench=True) for label, s in big.items()
    ]


def cost(y: Tensor, v: Tensor, w: Tensor) -> tuple[Work, Work]:
    """A GEMM forward and two backward; z is written and read, its gradient is neither."""
    out = nbytes(w) // w.size(1) * y.shape[:2].numel()
    gemm = 2 * y.numel() * w.size(0)
    return (
        Work(gemm, nbytes(y, v, y, w), nbytes(y) + out),
        Work(2 * gemm, 2 * out + nbytes(w, y, v, y), nbytes(y, v, w)),
    )


OPERATOR = register(
    Operator(
        name="xsa_linear",
        call=xsa_linear,
        reference=reference,
        differentiable=("y", "v", "w"),
        implementations={"triton": in_triton("xsa_linear", dgrad="dgrad")},
        preferred={
            "cpu": [("reference", "`xsa`, then torch's matmul")],
            "cuda": [("reference", "`xsa`, then torch's matmul: no GPU has timed the epilogue")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
        timed=True,
    )
)
