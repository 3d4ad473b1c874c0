"""The MLP's output projection, the residual stream, the mix with the first embedding, and the norm.

    total = x + z W^T + skip_weight skip,   x_in = mix0 total + mix1 x0
    h = scale x_in rstd,   rstd = 1 / sqrt(mean(x_in^2) + eps)

`residual_norm` of F.linear. 'triton' computes total, x_in and h's factor scale rstd in one GEMM:
z W^T is neither written nor read, two tensors of x's size, and there is no launch for the norm. h
has to be `Factored` then; where it is not, on a GPU without TMA, for fp32, and for what is not
aligned it is torch's matmul and the row kernel of `residual_norm`. The gradient is that of the two
steps.

With `ops=`: it decides how the layers of a model take the branch of the MLP before them, for which
they hand on a `Product`: `residual_norm` and `joined_norm` take one as `branch`, and what
multiplies it as `linear`. Under autocast, and where h is not a product, as behind the last layer,
it is two steps. `auto` is the reference but on a GPU where the other was
found to be faster (`python -m bench tune --epilogues`).
Shapes: x, skip, x0, total, x_in, h (..., D), z (..., K), w (D, K), skip_weight (D,), mix (2, D).
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
from pgolf.ops.tensors import compute_dtype, nbytes

_INPUTS = Inputs(
    "linear_mix", ("z", "w", "x", "x0", "mix", "skip", "skip_weight"),
    alike=("z", "w", "x", "x0", "skip"), wide=("mix", "skip_weight"),
    optional=("x0", "mix", "skip", "skip_weight"), matmul=True,
)  # fmt: skip


@outside_autocast
def reference(
    z: Tensor, w: Tensor, x: Tensor, x0: Tensor | None = None, mix: Tensor | None = None, *,
    skip: Tensor | None = None, skip_weight: Tensor | None = None, scale: float = 1.0,
    eps: float = 1e-6, keep_total: bool = False, factored: bool = False,
) -> tuple[Tensor | Factored, ...]:  # fmt: skip
    """`linear_mix` in plain torch."""
    return norm_reference(
        x, branch=F.linear(z, w), skip=skip, skip_weight=skip_weight, x0=x0, mix=mix, scale=scale,
        eps=eps, keep_total=keep_total, factored=factored,
    )  # fmt: skip


def obstacle(impl: str, width: int, inner: int) -> str:
    """Why `impl` cannot run rows of these D and K; '' if it can. The gradient limits D."""
    return beyond({"triton": WIDTH_LIMITS["cuda"]}, impl, width, "elements a row")


def linear_mix(
    z: Tensor, w: Tensor, x: Tensor, x0: Tensor | None = None, mix: Tensor | None = None, *,
    skip: Tensor | None = None, skip_weight: Tensor | None = None, scale: float = 1.0,
    eps: float = 1e-6, keep_total: bool = False, factored: bool = False, impl: str = "auto",
    norm_impl: str | None = None,
) -> tuple[Tensor | Factored, ...]:  # fmt: skip
    """Add z W^T and a skip to the residual stream, mix x0 in, and norm the result.

    Args:
        z: (..., K) inputs of the projection.
        w: (D, K).
        x: (..., D) residual stream, all of one dtype and device; under autocast they are cast to
            its dtype.
        x0, mix, skip, skip_weight, scale, eps, keep_total, factored: as of `residual_norm`.
        impl: 'auto', 'reference' (torch's matmul, then `residual_norm`) or 'triton' (fp32, bf16;
            D <= 4096; see above for what runs where its GEMM is not possible).
        norm_impl: of `residual_norm`, in the gradient or in the two steps of the reference; None:
            'reference' if `impl` is, else 'auto'.

    Returns:
        (x_in, h), or (total, x_in, h), as `residual_norm`.

    Raises:
        TypeError, ValueError, RuntimeError: as `residual_norm`.
    """
    z, w, x, x0, mix, skip, skip_weight = _INPUTS(z, w, x, x0, mix, skip, skip_weight)
    for name, t in (("z", z), ("x", x)):
        if not t.dim():
            wanted = "(..., K)" if name == "z" else "(..., D)"
            raise ValueError(f"linear_mix: {name} has no dimensions: it has to be {wanted}")
    chosen = resolve("linear_mix", impl, x, width=x.size(-1), inner=z.size(-1))
    norm_impl = norm_impl or ("reference" if impl == "reference" else "auto")
    return residual_norm(
        x, branch=Product(z, w), skip=skip, skip_weight=skip_weight, x0=x0, mix=mix, scale=scale,
        eps=eps, keep_total=keep_total, factored=factored, impl=norm_impl, linear=chosen,
    )  # fmt: skip


# --- the operator ---------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """What the layers of a model ask for, at ragged widths; the recipes' at 98,304 tokens."""

    def make(tokens: int, inner: int, width: int, *parts: str, **options: Any):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(tokens)
            wide = compute_dtype(dtype)
            shapes = {"z": (1, tokens, inner), "w": (width, inner), "mix": (2, width)}
            shapes |= {"skip_weight": (width,)}

            def made(name: str) -> Tensor:
                values = torch.randn(shapes.get(name, (1, tokens, width)), generator=g).double()
                if name == "w":
                    values *= inner**-0.5
                return values.to(device, wide if name in ("mix", "skip_weight") else dtype)

            args = tuple(made(name) for name in ("z", "w", "x"))
            return args, {name: made(name) for name in parts} | options

        return build

    mix, skip = ("x0", "mix"), ("skip", "skip_weight")
    factored = {"factored": True, "scale": 0.5}
    small = {
        "plain": make(7, 40, 272, factored=True),
        "mix": make(130, 16, 32, *mix, **factored),
        "total": make(5, 24, 48, *mix, keep_total=True, **factored),
        "skip": make(66, 33, 17, *mix, *skip, **factored),
        "skip without mix": make(3, 16, 64, *skip, **factored),
        "normed": make(5, 24, 48, *mix, scale=0.5),
        "0 tokens": make(0, 16, 32, *mix, **factored),
    }
    big = {f"{t} tokens": make(t, 1536, 512, *mix, **factored) for t in (8192, 98304)}
    return [Sample(label, build) for label, build in small.items()] + [
        Sample(label, build, bench=True) for label, build in big.items()
    ]


def cost(
    z: Tensor, w: Tensor, x: Tensor, x0: Tensor | None = None, mix: Tensor | None = None, *,
    skip: Tensor | None = None, skip_weight: Tensor | None = None, scale: float = 1.0,
    eps: float = 1e-6, keep_total: bool = False, factored: bool = False,
) -> tuple[Work, Work]:  # fmt: skip
    """A GEMM forward and two backward, and what `residual_norm` costs but for the branch."""
    gemm = 2 * z.numel() * w.size(0)
    row, rows = nbytes(x), x.numel() // x.size(-1) * 4
    mixes, added = mix is not None, nbytes(x0, mix, skip, skip_weight)
    kept = row * mixes  # total, for the gradient of the mix
    upstream = row * (2 + (keep_total and mixes))
    learned = nbytes(skip, skip_weight) + nbytes(x0, mix)
    return (
        Work(gemm, nbytes(z, w, x) + added, row * (1 + (not factored)) + kept + rows),
        Work(
            2 * gemm, upstream + row + rows + kept + learned + nbytes(z, w) + row,
            row + learned + nbytes(z, w),
        ),
    )  # fmt: skip


OPERATOR = register(
    Operator(
        name="linear_mix",
        call=with_h_multiplied(linear_mix),
        reference=with_h_multiplied(reference, linear_mix),
        differentiable=("z", "w", "x", "x0", "mix", "skip", "skip_weight"),
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
