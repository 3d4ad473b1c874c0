"""What an output projection adds to the residual stream, and the RMS norm, as one step.

    x_in = x + z W^T,   h = scale x_in rstd,   rstd = 1 / sqrt(mean(x_in^2) + eps)

`residual_norm` of F.linear. 'triton' computes x_in and h's factor scale rstd in one GEMM: z W^T is
neither written nor read, two tensors of x's size, and there is no launch for the norm. h stays a
product of two factors (`Factored`). The gradient is that of the two steps: `residual_norm`'s kernel
and torch's matmuls. On a GPU without TMA, for fp32, and for what is not aligned the forward pass is
torch's matmul and the row kernel of `residual_norm` too.

With `ops=`: where this operator is the reference, a model takes torch's matmul and `residual_norm`
as `residual_norm=` names it; where it is not, the gradient takes `residual_norm` so. `auto` is the
reference but on a GPU where the other was found to be faster (`python -m bench tune --epilogues`).
Shapes: x, x_in, h (..., D), z (..., K), w (D, K).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.factored import Factored, with_h_multiplied
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import in_triton
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.product import Product
from pgolf.ops.residual_norm import WIDTH_LIMITS, residual_norm
from pgolf.ops.residual_norm import reference as norm_reference
from pgolf.ops.tensors import check_alike, nbytes

_INPUTS = Inputs(
    "linear_residual", ("z", "w", "x", "x_in_scale"), alike=("z", "w", "x"), wide=("x_in_scale",),
    optional=("x_in_scale",), matmul=True,
)  # fmt: skip


@outside_autocast
def reference(
    z: Tensor, w: Tensor, x: Tensor, *, scale: float = 1.0, eps: float = 1e-6,
    factored: bool = False,
) -> tuple[Tensor, Tensor | Factored]:  # fmt: skip
    """`linear_residual` in plain torch."""
    return norm_reference(x, branch=F.linear(z, w), scale=scale, eps=eps, factored=factored)


def _check(z: Tensor, w: Tensor, x: Tensor, out: Tensor | None, scale: float, eps: float) -> None:
    for name, t in (("z", z), ("x", x)):
        if t.dim() == 0 or not t.size(-1):
            wanted = "(..., K), K >= 1" if name == "z" else "(..., D), D >= 1"
            raise ValueError(
                f"linear_residual: {name} is {tuple(t.shape)}: it has to be {wanted}"
            )
    for name, shape, wanted in (
        ("z", z.shape, (*x.shape[:-1], z.size(-1))),
        ("w", w.shape, (x.size(-1), z.size(-1))),
        ("out", x.shape if out is None else out.shape, x.shape),
    ):
        if tuple(shape) != tuple(wanted):
            raise ValueError(
                f"linear_residual: {name} is {tuple(shape)}: with x {tuple(x.shape)} and z "
                f"{tuple(z.shape)} it has to be {tuple(wanted)}"
            )
    check_alike("linear_residual", z=z, w=w, x=x, out=out)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"linear_residual: eps={eps}: it has to be 0 or more, and finite")
    if not 0 < abs(scale) < float("inf"):
        raise ValueError(f"linear_residual: scale={scale}: it has to be finite and not 0")


def obstacle(impl: str, width: int, inner: int) -> str:
    """Why `impl` cannot run rows of these D and K; '' if it can. The gradient limits D."""
    return beyond({"triton": WIDTH_LIMITS["cuda"]}, impl, width, "elements a row")


def linear_residual(
    z: Tensor, w: Tensor, x: Tensor, *, x_in_scale: Tensor | None = None, out: Tensor | None = None,
    scale: float = 1.0, eps: float = 1e-6, factored: bool = False, sums: Tensor | None = None,
    impl: str = "auto", norm_impl: str | None = None,
) -> tuple[Tensor, Tensor | Factored]:  # fmt: skip
    """Add z W^T to the residual stream, and norm the sum.

    Args:
        z: (..., K) inputs of the projection.
        w: (D, K).
        x: (..., D) residual stream, all three of one dtype and device; under autocast they are cast
            to its dtype.
        out: (..., D) ticket that takes the gradient of z W^T (`xsa_linear`, as_product=True), where
            z and w have theirs from there: they count as constants then. For kernels only.
        scale, eps: of the norm; scale is not 0.
        x_in_scale, factored, sums: as of `residual_norm`. The first and the last are for kernels
            only.
        impl: 'auto', 'reference' (torch's matmul, then `residual_norm`) or 'triton' (fp32, bf16;
            D <= 4096; see above for what runs where its GEMM is not possible).
        norm_impl: of `residual_norm`, in the gradient or in the two steps of the reference; None:
            'reference' if `impl` is, else 'auto'.

    Returns:
        (x_in, h), as `residual_norm`.

    Raises:
        TypeError, ValueError, RuntimeError: as `residual_norm`.
    """
    z, w, x, x_in_scale = _INPUTS(z, w, x, x_in_scale)
    _check(z, w, x, out, scale, eps)
    chosen = resolve("linear_residual", impl, x, width=x.size(-1), inner=z.size(-1))
    norm_impl = norm_impl or ("reference" if impl == "reference" else "auto")
    norm = {"x_in_scale": x_in_scale, "scale": scale, "eps": eps, "sums": sums, "impl": norm_impl}
    if chosen == "reference":
        if out is not None:
            raise ValueError("linear_residual: impl=reference takes no ticket: leave `out` out")
        return residual_norm(x, branch=F.linear(z, w), factored=factored, **norm)
    product = Product(z, w, out)
    x_in, h = residual_norm(x, branch=product, factored=True, linear=chosen, **norm)
    return x_in, h if factored else h.product()


# --- the operator ---------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Widths within a tile and beyond, ragged ones too; the recipes' at 98,304 tokens."""

    def make(tokens: int, inner: int, width: int, **options: Any):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(tokens)
            shapes = (1, tokens, inner), (width, inner), (1, tokens, width)
            z, w, x = (torch.randn(shape, generator=g) for shape in shapes)
            w *= inner**-0.5
            return tuple(t.to(device, dtype) for t in (z, w, x)), options

        return build

    small = {
        "7 x 40 to 272": make(7, 40, 272, scale=0.5, factored=True),
        "130 x 16 to 32": make(130, 16, 32, factored=True),
        "3 x 33 to 17": make(3, 33, 17, scale=-1.5, factored=True),
        "normed": make(5, 24, 48, scale=0.5),
        "0 tokens": make(0, 16, 32, factored=True),
    }
    big = {f"{t} tokens": make(t, 512, 512, scale=0.5, factored=True) for t in (8192, 98304)}
    return [Sample(label, build) for label, build in small.items()] + [
        Sample(label, build, bench=True) for label, build in big.items()
    ]


def cost(
    z: Tensor, w: Tensor, x: Tensor, *, x_in_scale: Tensor | None = None, scale: float = 1.0,
    eps: float = 1e-6, factored: bool = False,
) -> tuple[Work, Work]:  # fmt: skip
    """A GEMM forward and two backward; kept are x_in, which is a result, z and the factor."""
    gemm = 2 * z.numel() * w.size(0)
    factor = x.numel() // x.size(-1) * 4
    row = nbytes(x)
    return (
        Work(gemm, nbytes(z, w, x), row * (1 + (not factored)) + factor),
        Work(
            2 * gemm, 3 * row + factor + 2 * row + nbytes(w, z, x_in_scale),
            row + nbytes(z, w, x_in_scale),
        ),
    )  # fmt: skip


OPERATOR = register(
    Operator(
        name="linear_residual",
        call=with_h_multiplied(linear_residual),
        reference=with_h_multiplied(reference, linear_residual),
        differentiable=("z", "w", "x"),
        implementations={"triton": in_triton("linear_residual", forward="linear_residual")},
        preferred={
            "cpu": [("reference", "torch's matmul, then `residual_norm`")],
            "cuda": [("reference", "torch's matmul, then `residual_norm`: no GPU has timed it")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
        timed=True,
    )
)
