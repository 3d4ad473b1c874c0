"""MLP with squared (leaky) ReLU.

    pre = rstd * (h W_up^T);   post = max(pre, slope pre)^2;   out = post W_down^T

slope 0 is relu^2 (arXiv 2109.08668). rstd, one factor a row, is optional: with h not yet normed and
rstd = s / sqrt(mean(h^2) + eps) it stands for the norm before the MLP, which is then never written.

Kept for the gradient are post and one sign bit an element instead of two hidden tensors:
post' = 2 sqrt(post) where the bit is set, -2 slope sqrt(post) where not. In bf16 that is closer to
the truth than a rounded pre; in fp16 small values would vanish, so it is not offered. Both GEMMs
that touch the hidden tensor carry their pointwise half in the epilogue; the gradients of weights
and of h are plain matmuls, and that of rstd is rowdot(h, dh) / rstd, so rstd must not be 0.
Shapes: h (..., D), w_up (F, D), w_down (D, F), rstd (...,); T rows in all; bits (T, ceil(F/32))
int32, element f is bit f % 32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import factor_gradient, register_gradient, ticket
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, in_triton, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.product import Product
from pgolf.ops.tensors import addresses, check_alike, compute_dtype, contiguous, nbytes, unit_stride

_INPUTS = Inputs(
    "leaky_relu2_mlp", ("h", "w_up", "w_down", "rstd"), alike=("h", "w_up", "w_down"),
    wide=("rstd",), optional=("rstd",), matmul=True,
)  # fmt: skip


def activation(x: Tensor, slope: float = 0.5, rstd: Tensor | None = None) -> Tensor:
    """max(r x, slope r x)^2 of x (..., F) with r = rstd (...,) or 1, in plain torch."""
    if rstd is not None:
        x = x * rstd[..., None].to(x.dtype)
    return (F.leaky_relu(x, slope) if slope else F.relu(x)).square()


@outside_autocast
def reference(
    h: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5, rstd: Tensor | None = None
) -> Tensor:
    """`leaky_relu2_mlp` in plain torch."""
    return F.linear(activation(F.linear(h, w_up), slope, rstd), w_down)


def _check_rows(
    operator: str, x: Tensor, slope: float, rstd: Tensor | None, of_rows: str = "rstd"
) -> None:
    if not x.dim():
        raise ValueError(f"{operator}: the input has no dimensions: it has to be (..., D)")
    if not 0.0 <= slope <= 1.0:  # NaN too
        raise ValueError(f"{operator}: slope={slope}: it has to be 0 (relu^2) to 1")
    if rstd is not None:
        if rstd.shape != x.shape[:-1]:
            raise ValueError(
                f"{operator}: {of_rows} is {tuple(rstd.shape)}: for these rows it has to be "
                f"{tuple(x.shape[:-1])}"
            )
        wanted = compute_dtype(x.dtype)
        if rstd.dtype != wanted:
            raise ValueError(f"{operator}: {of_rows} is {rstd.dtype}: it has to be {wanted}")
        if rstd.device != x.device:
            raise ValueError(f"{operator}: {of_rows} is on {rstd.device}, the rows on {x.device}")


def check_mlp(
    operator: str, name: str, x: Tensor, w_up: Tensor, w_down: Tensor, slope: float,
    rstd: Tensor | None, of_rows: str = "rstd",
) -> None:  # fmt: skip
    """Raise ValueError unless an MLP's tensors fit; `name` is that of x, `of_rows` that of rstd."""
    _check_rows(operator, x, slope, rstd, of_rows)
    if w_up.dim() != 2:
        raise ValueError(f"{operator}: w_up is {tuple(w_up.shape)}: it has to be (F, D)")
    for of, w, wanted in (
        ("w_up", w_up, (w_up.size(0), x.size(-1))),
        ("w_down", w_down, (x.size(-1), w_up.size(0))),
    ):
        if tuple(w.shape) != wanted:
            raise ValueError(
                f"{operator}: {of} is {tuple(w.shape)}: with {name} {tuple(x.shape)} and "
                f"{w_up.size(0)} hidden units it has to be {wanted}"
            )
    if not w_up.numel():
        raise ValueError(f"{operator}: w_up is {tuple(w_up.shape)}: it has no elements")
    check_alike(operator, **{name: x}, w_up=w_up, w_down=w_down)


def leaky_relu2_mlp(
    h: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    slope: float = 0.5,
    rstd: Tensor | None = None,
    impl: str = "auto",
    as_product: bool = False,
) -> Tensor | Product:
    """The MLP, (..., D) -> (..., D).

    Args:
        h: (..., D); w_up: (F, D); w_down: (D, F), of one dtype and device;
            under autocast they are cast to its dtype, as by F.linear.
        slope: 0 to 1; 0 is relu^2.
        rstd: (...,) factor of each row of h W_up^T, in fp32 (fp64 for an fp64 h), not 0.
        impl: 'auto', 'reference', 'cpu' (C++ around torch's matmuls; fp32, bf16, fp64), 'cuda' (the
            same on a GPU; fp32, bf16) or 'triton' (fp32, bf16; TMA where the GPU has it).
        as_product: whether the product with w_down is left to who takes it, such as `linear_mix`.

    Raises:
        TypeError, ValueError, RuntimeError: as `xsa`.
    """
    h, w_up, w_down, rstd = _INPUTS(h, w_up, w_down, rstd)
    check_mlp("leaky_relu2_mlp", "h", h, w_up, w_down, slope, rstd)
    impl = resolve("leaky_relu2_mlp", impl, h)
    if impl == "reference":
        if as_product:
            return Product(activation(F.linear(h, w_up), slope, rstd), w_down)
        return reference(h, w_up, w_down, slope, rstd)
    rows = None if rstd is None else rstd.reshape(-1)
    h2 = h.reshape(h.shape[:-1].numel(), h.size(-1))
    out, post, _ = _mlp(h2, w_up, w_down, rows, slope, as_product, impl)
    out = out.view(h.shape)
    if not as_product:
        return out
    return Product(post.detach().view(*h.shape[:-1], w_up.size(0)), w_down.detach(), out)


# --- the opaque operators -------------------------------------------------------------------------


def words_of(post: Tensor) -> Tensor:
    """Room for the sign bits of post (T, F)."""
    return post.new_empty((post.size(0), -(-post.size(1) // 32)), dtype=torch.int32)


@opaque("pgolf::leaky_relu2_mlp", mutates_args=())
def _mlp(
    h: Tensor, w_up: Tensor, w_down: Tensor, rstd: Tensor | None, slope: float, as_product: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, or its ticket, post and the sign bits."""
    up = launcher("leaky_relu2_mlp", impl, "up")
    with without_autocast(h):
        w, rstd = contiguous(w_up, rstd)
        post, bits = up(unit_stride(h), w, slope, rstd)
        return ticket(h) if as_product else post @ w_down.t(), post, bits


@_mlp.register_fake
def _(h, w_up, w_down, rstd, slope, as_product, impl):
    post = h.new_empty((h.size(0), w_up.size(0)))
    return ticket(h) if as_product else h.new_empty(h.shape), post, words_of(post)


@opaque("pgolf::leaky_relu2_down_dgrad", mutates_args=())
def _down_dgrad(
    dout: Tensor,
    w_down: Tensor,
    post: Tensor,
    bits: Tensor,
    rstd: Tensor | None,
    slope: float,
    impl: str,
) -> Tensor:
    dgrad = launcher("leaky_relu2_mlp", impl, "down_dgrad")
    w, rstd = contiguous(w_down, rstd)
    return dgrad(unit_stride(dout), w, post, bits, slope, rstd)


@_down_dgrad.register_fake
def _(dout, w_down, post, bits, rstd, slope, impl):
    return post.new_empty(post.shape)


def _mlp_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    h, w_up, w_down, rstd, ctx.slope, _, ctx.impl = inputs
    ctx.save_for_backward(h, w_up, w_down, rstd, *output[1:])


def _mlp_gradient(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple:
    h, w_up, w_down, rstd, post, bits = ctx.saved_tensors
    need_h, need_up, need_down, need_rstd = ctx.needs_input_grad[:4]
    dpre = _down_dgrad(dout, w_down, post, bits, rstd, ctx.slope, ctx.impl)
    dh = dpre @ w_up if need_h or need_rstd else None
    return (
        dh if need_h else None,
        dpre.t() @ h if need_up else None,
        dout.t() @ post if need_down else None,
        factor_gradient(h, dh, rstd) if need_rstd else None,
        None,
        None,
        None,
    )


register_gradient("leaky_relu2_mlp", _mlp, _mlp_gradient, _mlp_context)


# --- implementations ------------------------------------------------------------------------------


def _around_matmuls(run: Run) -> dict[str, Callable]:
    """torch's matmuls, whose results pointwise kernels of the compiled half overwrite."""

    def up(h: Tensor, w_up: Tensor, slope: float, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
        post = h @ w_up.t()
        bits = words_of(post)
        run(
            "leaky_relu2", post, post.data_ptr(), post.data_ptr(), bits.data_ptr(),
            *addresses(rstd), DTYPE_CODES[post.dtype], *post.shape, slope,
        )  # fmt: skip
        return post, bits

    def down_dgrad(
        dout: Tensor, w_down: Tensor, post: Tensor, bits: Tensor, slope: float, rstd: Tensor | None
    ) -> Tensor:
        dpre = dout @ w_down
        run(
            "leaky_relu2_backward", post, dpre.data_ptr(), post.data_ptr(), bits.data_ptr(),
            *addresses(rstd), dpre.data_ptr(), DTYPE_CODES[post.dtype], *post.shape, slope,
        )  # fmt: skip
        return dpre

    return {"up": up, "down_dgrad": down_dgrad}


def _make(
    rows: tuple[int, ...], dim: int, hidden: int, scaled: bool, sliced: bool = False,
    slope: float = 0.5,
):  # fmt: skip
    """Builder of MLP arguments; weights of a layer at its start, h normed."""

    def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        g = torch.Generator().manual_seed(dim + hidden)
        wide = torch.randn(*rows, dim * (2 if sliced else 1), generator=g, dtype=torch.float64)
        up = torch.randn(hidden, dim, generator=g, dtype=torch.float64) * dim**-0.5
        down = torch.randn(dim, hidden, generator=g, dtype=torch.float64) * hidden**-0.5
        h, up, down = (t.to(device, dtype) for t in (wide, up, down))
        rstd = torch.rand(rows, generator=g, dtype=torch.float64).add(0.5)
        rstd = rstd.to(device, compute_dtype(dtype))
        return (h[..., :dim], up, down, slope), {"rstd": rstd} if scaled else {}

    return build


def samples() -> list[Sample]:
    """MLPs: ragged ones, with and without rstd, and the recipes' at 98,304 tokens."""
    return [
        Sample("2x7 24-40", _make((2, 7), 24, 40, False)),
        Sample("33 64-96 rstd", _make((33,), 64, 96, True)),
        Sample("5 16-33 rstd sliced", _make((5,), 16, 33, True, sliced=True)),
        Sample("4 12-100 relu2", _make((4,), 12, 100, False, slope=0.0)),
        Sample("0 rows", _make((0,), 16, 32, False)),
        Sample("4096 512-1536", _make((4096,), 512, 1536, False), bench=True),
        Sample("98304 512-1536", _make((98304,), 512, 1536, False), bench=True),
    ]


def cost(
    h: Tensor, w_up: Tensor, w_down: Tensor, slope: float = 0.5, rstd: Tensor | None = None
) -> tuple[Work, Work]:
    """Two GEMMs forward, four backward; every one reads its operands and writes its result."""
    rows, (hidden, dim) = h.shape[:-1].numel(), w_up.shape
    gemm = 2 * rows * hidden * dim
    post = rows * hidden * h.element_size()
    kept = post + rows * -(-hidden // 32) * 4
    up = nbytes(h, w_up, rstd), kept
    down = post + nbytes(w_down), nbytes(h)
    dgrad = nbytes(h, w_down, rstd) + kept, post
    rest = 2 * nbytes(h) + 2 * post + post + nbytes(w_up), nbytes(w_up, w_down, h)
    return (
        Work(2 * gemm, up[0] + down[0], up[1] + down[1]),
        Work(4 * gemm, dgrad[0] + rest[0], dgrad[1] + rest[1]),
    )


OPERATOR = register(
    Operator(
        name="leaky_relu2_mlp",
        call=leaky_relu2_mlp,
        reference=reference,
        differentiable=("h", "w_up", "w_down", "rstd"),
        implementations={
            **in_extension(("leaky_relu2", "leaky_relu2_backward"), _around_matmuls),
            "triton": in_triton("leaky_relu2_mlp", up="up", down_dgrad="down_dgrad"),
        },
        preferred={
            "cpu": [("cpu", "C++ between matmuls, faster than eager (python -m bench step)")],
            "cpu compiled": [("reference", "torch.compile is level (python -m bench step)")],
            "cuda": [("triton", "fewer bytes than compiled (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
    )
)
