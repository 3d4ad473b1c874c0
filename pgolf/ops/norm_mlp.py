"""The MLP with the RMS norm before it, as one step of the gradient.

    h = scale x rstd,   rstd = 1 / sqrt(mean(x^2) + eps),   out = MLP(h)     (`leaky_relu2_mlp`)

With f = scale rstd, dpre the gradient of x W_up^T, dpost that of post, and G what the state x gets
from all else that takes it, which comes here too since x goes through and is a result,

    dx = G + dpre W_up - x (f / scale)^2 <dpre W_up, x> / D
    <dpre W_up, x> = <dpre, x W_up^T> = 2 <dpost, post>

The last, of each row, as post is homogeneous of degree 2 in x W_up^T, for any slope. So it is known
before dpre W_up is: 'triton' takes parts of it from the epilogue of the GEMM for dpre, and dx from
that of the GEMM behind it. dpre W_up is neither written nor read, two tensors of x's size, and the
norm before this operator has nothing left to do. On a GPU without TMA, for fp32, and for what is
not aligned the second is torch's matmul and the row kernel of `residual_norm`. The forward pass is
`leaky_relu2_mlp=triton`.

With `ops=`: it takes effect where `leaky_relu2_mlp` is 'triton', and not under autocast. Where it
is the reference, a model takes `residual_norm` and `leaky_relu2_mlp` by themselves. `auto` is the
reference but on a GPU where the other was found to be faster (`python -m bench tune --epilogues`).
Shapes: x, out (..., D), w_up (F, D), w_down (D, F), factor (...,); T rows in all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import register_gradient, rerouted, ticket
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import in_triton, launcher
from pgolf.ops.leaky_relu2_mlp import check_mlp, leaky_relu2_mlp, words_of
from pgolf.ops.leaky_relu2_mlp import reference as mlp_reference
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.part_sums import Sums, check_deferred
from pgolf.ops.product import Product
from pgolf.ops.residual_norm import WIDTH_LIMITS, residual_norm
from pgolf.ops.residual_norm import reference as norm_reference
from pgolf.ops.tensors import compute_dtype, contiguous, nbytes, unit_stride

PART = 128  # rows of a part of the sums for x_in_scale: those of a block of the GEMM

_INPUTS = Inputs(
    "norm_mlp", ("x", "w_up", "w_down", "factor", "x_in_scale"), alike=("x", "w_up", "w_down"),
    wide=("factor", "x_in_scale"), optional=("factor", "x_in_scale"), matmul=True,
)  # fmt: skip


@outside_autocast
def reference(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5, *, scale: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`norm_mlp` in plain torch."""
    x, h = norm_reference(x, scale=scale, eps=eps)
    return x, mlp_reference(h, w_up, w_down, slope)


def sums_of(rows: int, x_in_scale: Tensor) -> Sums:
    """What `part_sums.deferred` takes for a call with this factor, x of so many rows."""
    return Sums(-(-rows // PART), [x_in_scale])


def obstacle(impl: str, width: int, hidden: int) -> str:
    """Why `impl` cannot run rows of these D and F; '' if it can. The norm's kernel limits D."""
    return beyond({"triton": WIDTH_LIMITS["cuda"]}, impl, width, "elements a row")


def norm_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5, *, scale: float = 1.0,
    eps: float = 1e-6, factor: Tensor | None = None, x_in_scale: Tensor | None = None,
    sums: Tensor | None = None, as_product: bool = False, impl: str = "auto",
    mlp_impl: str | None = None, norm_impl: str | None = None,
) -> tuple[Tensor, Tensor | Product]:  # fmt: skip
    """Norm the residual stream, and put it through the MLP.

    Args:
        x: (..., D) residual stream; w_up: (F, D); w_down: (D, F), of one dtype and device; under
            autocast they are cast to its dtype.
        slope: of the MLP, 0 to 1; 0 is relu^2.
        scale, eps: of the norm; scale is not 0.
        factor: (...,) scale rstd of the rows of x in fp32 (fp64 for an fp64 x), where the norm
            before has it (`Factored`), a constant; None: from x.
        x_in_scale: (D,) factor with which x goes on, as of `residual_norm`. For kernels only.
        sums: what `part_sums.deferred` gives for `sums_of` x_in_scale. For kernels only.
        as_product: whether the product with w_down is left to who takes it, such as `linear_mix`.
        impl: 'auto', 'reference' (`residual_norm`, then `leaky_relu2_mlp`) or 'triton' (fp32, bf16;
            D <= 4096; see above for what runs where its GEMM is not possible).
        mlp_impl: of `leaky_relu2_mlp` in the two steps of the reference; None: 'reference' if
            `impl` is, else 'auto'.
        norm_impl: of `residual_norm`, in these or where the GEMM is not possible; None: likewise.

    Returns:
        x once more, to be taken in its place, so that its gradient comes here; and (..., D),
        contiguous, or it as a `Product`.

    Raises:
        TypeError, ValueError, RuntimeError: as `residual_norm` and `leaky_relu2_mlp`.
    """
    x, w_up, w_down, factor, x_in_scale = _INPUTS(x, w_up, w_down, factor, x_in_scale)
    check_mlp("norm_mlp", "x", x, w_up, w_down, slope, factor, "factor")
    _check(x, x_in_scale, scale, eps)
    chosen = resolve("norm_mlp", impl, x, width=x.size(-1), hidden=w_up.size(0))
    usual = "reference" if impl == "reference" else "auto"
    mlp_impl, norm_impl = mlp_impl or usual, norm_impl or usual
    if chosen == "reference":
        if x_in_scale is not None or sums is not None:
            raise ValueError("norm_mlp: impl=reference takes no products: multiply them out")
        kernels = resolve("leaky_relu2_mlp", mlp_impl, x) != "reference"
        x, h = residual_norm(x, scale=scale, eps=eps, factored=kernels, impl=norm_impl)
        y, f = h if kernels else (h, None)
        return x, leaky_relu2_mlp(y, w_up, w_down, slope, f, mlp_impl, as_product)
    norm_impl = resolve("residual_norm", norm_impl, x, width=x.size(-1))
    if sums is not None:
        parameters = [] if x_in_scale is None else [x_in_scale]
        own = sums_of(x.shape[:-1].numel(), x_in_scale)._replace(parameters=parameters)
        check_deferred("norm_mlp", sums, own, chosen)
    if factor is None:
        factor = scale * (x.detach().to(compute_dtype(x.dtype)).square().mean(-1) + eps).rsqrt()
    settings = float(slope), float(scale), float(eps), as_product, chosen, norm_impl
    out, through, post, _ = _forward(
        x, w_up, w_down, factor.detach(), x_in_scale, sums, *settings
    )
    x = rerouted(x, through)
    if not as_product:
        return x, out
    return x, Product(post.detach().view(*x.shape[:-1], w_up.size(0)), w_down.detach(), out)


def _check(x: Tensor, x_in_scale: Tensor | None, scale: float, eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"norm_mlp: eps={eps}: it has to be 0 or more, and finite")
    if not 0 < abs(scale) < float("inf"):
        raise ValueError(f"norm_mlp: scale={scale}: it has to be finite and not 0")
    if x_in_scale is None:
        return
    wanted, wide = x.shape[-1:], compute_dtype(x.dtype)
    if x_in_scale.shape != wanted or x_in_scale.dtype != wide or x_in_scale.device != x.device:
        raise ValueError(
            f"norm_mlp: x_in_scale is {x_in_scale.dtype} {tuple(x_in_scale.shape)} on "
            f"{x_in_scale.device}: for this x it has to be {wide} {tuple(wanted)} on {x.device}"
        )


# --- the opaque operators -------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """t (..., C) as a matrix whose rows are contiguous."""
    return unit_stride(t.reshape(t.shape[:-1].numel(), t.size(-1)))


@opaque("pgolf::norm_mlp", mutates_args=())
def _forward(
    x: Tensor, w_up: Tensor, w_down: Tensor, factor: Tensor, x_in_scale: Tensor | None,
    sums: Tensor | None, slope: float, scale: float, eps: float, as_product: bool, impl: str,
    norm_impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, or its ticket, the ticket of x that goes through, post and the sign bits."""
    with without_autocast(x):
        w, f = contiguous(w_up, factor.reshape(-1))
        post, bits = launcher("leaky_relu2_mlp", impl, "up")(_rows(x), w, slope, f)
        out = ticket(x) if as_product else (post @ w_down.t()).view(x.shape)
    return out, ticket(x), post, bits


@_forward.register_fake
def _(x, w_up, w_down, factor, x_in_scale, sums, slope, scale, eps, as_product, impl, norm_impl):
    post = x.new_empty((x.shape[:-1].numel(), w_up.size(0)))
    out = ticket(x) if as_product else x.new_empty(x.shape)
    return out, ticket(x), post, words_of(post)


@opaque("pgolf::norm_mlp_backward", mutates_args=())
def _backward(
    dout: Tensor, g: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, factor: Tensor, post: Tensor,
    bits: Tensor, x_in_scale: Tensor | None, slope: float, scale: float, eps: float,
    deferred: bool, impl: str, norm_impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dpre (T, F), dx, and the gradient of x_in_scale, `deferred` in parts; that of none is empty.

    g is the gradient of x, which goes on as a product with x_in_scale.
    """
    up, down, f, x_scale = contiguous(w_up, w_down, factor.reshape(-1), x_in_scale)
    rows = _rows(dout), _rows(g), _rows(x)
    coefficient = 2.0 / (x.size(-1) * scale * scale)
    gradient = launcher("norm_mlp", impl, "gradient")
    made = gradient(*rows, f, up, down, post, bits, slope, coefficient, x_scale)
    if made is not None:
        dpre, dx, parts = made
        if parts is None:
            parts = factor.new_empty(0)
        elif not deferred:
            parts = parts.sum(0)
        return dpre, dx.view(x.shape), parts
    dpre = launcher("leaky_relu2_mlp", impl, "down_dgrad")(rows[0], down, post, bits, slope, f)
    step = _in_plain_torch if norm_impl == "reference" else _by_row_kernel
    dx, d_scale = step(dpre @ up, *rows[1:], f, x_scale, scale, eps, norm_impl)
    if d_scale is None:
        d_scale = factor.new_empty(0)
    elif deferred:  # the first of the parts has it all
        d_scale = F.pad(d_scale[None], (0, 0, 0, sums_of(x.shape[:-1].numel(), d_scale).parts - 1))
    return dpre, dx.view(x.shape), d_scale


@_backward.register_fake
def _(
    dout, g, x, w_up, w_down, factor, post, bits, x_in_scale, slope, scale, eps, deferred, impl,
    norm_impl,
):  # fmt: skip
    shape = (0,) if x_in_scale is None else x_in_scale.shape
    if x_in_scale is not None and deferred:
        shape = (sums_of(x.shape[:-1].numel(), x_in_scale).parts, *shape)
    return post.new_empty(post.shape), x.new_empty(x.shape), factor.new_empty(shape)


def _by_row_kernel(
    dy: Tensor, g: Tensor, x: Tensor, factor: Tensor, x_scale: Tensor | None, scale: float,
    eps: float, norm_impl: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx and the gradient of x_scale, of rows whose product dy is written."""
    backward, nothing = launcher("residual_norm", norm_impl, "backward"), [None] * 8
    given = contiguous(g, dy, x)
    settings = scale, eps, True, False
    dx, *_, d_scale = backward(None, *given, factor, *nothing, x_scale, *settings)
    return dx, None if x_scale is None else d_scale


def _in_plain_torch(
    dy: Tensor, g: Tensor, x: Tensor, factor: Tensor, x_scale: Tensor | None, scale: float,
    eps: float, norm_impl: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`_by_row_kernel` without kernels."""
    dtype, wide = x.dtype, factor.dtype
    dy, g, x = dy.to(wide), g.to(wide), x.to(wide)
    d_scale = None if x_scale is None else (g * x).sum(0)
    g = g if x_scale is None else x_scale * g
    weight = (factor / scale).square() * (dy * x).mean(-1)
    return (g + dy - weight[:, None] * x).to(dtype), d_scale


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w_up, w_down, factor, x_in_scale, sums, *settings, _, impl, norm_impl = inputs
    ctx.set_materialize_grads(False)  # of post there is none
    ctx.deferred = sums is not None
    ctx.settings = *settings, ctx.deferred, impl, norm_impl
    ctx.save_for_backward(x, w_up, w_down, factor, x_in_scale, *output[2:])


def _gradient(ctx: Any, dout: Tensor | None, g: Tensor | None, *_: None) -> tuple:
    x, w_up, w_down, factor, x_in_scale, post, bits = ctx.saved_tensors
    need_x, need_up, need_down, _, need_scale, need_sums = ctx.needs_input_grad[:6]
    dout, g = (torch.zeros_like(x) if t is None else t for t in (dout, g))
    dx = d_up = d_down = d_scale = None
    if need_x or need_up or need_scale or need_sums:
        dpre, dx, d_scale = _backward(
            dout, g, x, w_up, w_down, factor, post, bits, x_in_scale, *ctx.settings
        )
        d_up = dpre.t() @ x.reshape(dpre.size(0), x.size(-1)) if need_up else None
    if need_down:
        d_down = dout.reshape(post.size(0), x.size(-1)).t() @ post
    d_scale, d_sums = (None, d_scale) if ctx.deferred else (d_scale, None)
    return (
        dx if need_x else None, d_up, d_down, None, d_scale if need_scale else None,
        d_sums if need_sums else None, *[None] * 6,
    )  # fmt: skip


register_gradient("norm_mlp", _forward, _gradient, _setup_context)


# --- the operator ---------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Ragged widths, a negative scale, no slope; the recipes' at 98,304 tokens."""

    def make(tokens: int, width: int, hidden: int, slope: float = 0.5, **options: Any):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(tokens)
            shapes = (1, tokens, width), (hidden, width), (width, hidden)
            x, up, down = (torch.randn(shape, generator=g) for shape in shapes)
            given = x, up * width**-0.5, down * hidden**-0.5
            return (*(t.to(device, dtype) for t in given), slope), options

        return build

    small = {
        "130 x 32-80": make(130, 32, 80, scale=0.5),
        "7 x 272-96 relu2": make(7, 272, 96, 0.0),
        "3 x 17-33": make(3, 17, 33, scale=-1.5),
        "0 tokens": make(0, 16, 32),
    }
    big = {f"{t} tokens": make(t, 512, 1536, scale=0.5) for t in (8192, 98304)}
    return [Sample(label, build) for label, build in small.items()] + [
        Sample(label, build, bench=True) for label, build in big.items()
    ]


def cost(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5, *, scale: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Work, Work]:  # fmt: skip
    """Two GEMMs forward, four backward; each reads its operands and writes its result.

    The gradient reads x, and what it gets from elsewhere, beside the product that makes dx.
    """
    row, (hidden, _), rows = nbytes(x), w_up.shape, x.shape[:-1].numel()
    gemm = 2 * x.numel() * hidden
    post, bits, factor = rows * hidden * x.element_size(), rows * -(-hidden // 32) * 4, rows * 4
    weights = nbytes(w_up, w_down)
    dgrad = row + nbytes(w_down) + post + bits + factor, post
    return (
        Work(2 * gemm, row + weights + factor + post, post + bits + row),
        Work(
            4 * gemm, dgrad[0] + post + nbytes(w_up) + 2 * row + factor + 2 * post + 2 * row,
            dgrad[1] + row + weights,
        ),
    )  # fmt: skip


OPERATOR = register(
    Operator(
        name="norm_mlp",
        call=norm_mlp,
        reference=reference,
        differentiable=("x", "w_up", "w_down"),
        implementations={"triton": in_triton("norm_mlp", gradient="gradient")},
        preferred={
            "cpu": [("reference", "`residual_norm`, then `leaky_relu2_mlp`")],
            "cuda": [
                ("reference", "`residual_norm`, then `leaky_relu2_mlp`: no GPU has timed it")
            ],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
        timed=True,
    )
)
