"""What a layer adds to the residual stream, the mix with the first embedding, and the RMS norm.

    total = x + branch_scale branch + skip_weight skip           x_in = mix0 total + mix1 x0
    h = scale x_in rstd,   rstd = 1 / sqrt(mean(x_in^2) + eps)                   (arXiv 1910.07467)

With n = x_in rstd and G = d_x_in + scale rstd (dh - n mean(dh n)), the gradient of x_in,

    d = d_total + mix0 G,   dx = d,   dbranch = branch_scale d,   dskip = skip_weight d
    dx0 = mix1 G,   d_branch_scale = sum d branch,   d_skip_weight = sum d skip,
    d_mix = (sum G total, sum G x0), the sums over all tokens

Shapes: x, branch, skip and x0 (..., D), the scales (D,), mix (2, D). Statistics are fp32 whatever
the dtype of x (fp64 for fp64). The reference rounds parameters to x's dtype and every step's
result; the kernels compute in fp32 and round each result once, h from the x_in that is not rounded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import register_gradient
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, launcher
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import addresses, compute_dtype, contiguous, nbytes, parts_of

WIDTH_LIMITS = {"cpu": 4096, "cuda": 4096}  # D
# Kernels sum gradients of parameters over parts of the rows, of so many at least;
# csrc/residual_norm.h
MIN_PART, MAX_PARTS = 64, 528

_INPUTS = Inputs(
    "residual_norm", ("x", "branch", "branch_scale", "skip", "skip_weight", "x0", "mix"),
    alike=("x", "branch", "skip", "x0"), wide=("branch_scale", "skip_weight", "mix"),
    optional=("branch", "branch_scale", "skip", "skip_weight", "x0", "mix"),
)  # fmt: skip


@outside_autocast
def reference(
    x: Tensor,
    *,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
    keep_total: bool = False,
) -> tuple[Tensor, ...]:
    """`residual_norm` in plain torch."""
    total = x
    for added, factor in ((branch, branch_scale), (skip, skip_weight)):
        if added is not None:
            total = total + (added if factor is None else factor.to(x.dtype) * added)
    x_in = total
    if mix is not None:
        mix = mix.to(x.dtype)
        x_in = mix[0] * total + mix[1] * x0
    h = F.rms_norm(x_in, (x.size(-1),), eps=eps)
    h = h if scale == 1.0 else h * scale
    return (total, x_in, h) if keep_total else (x_in, h)


def _check(x: Tensor, others: dict[str, Tensor | None], scale: float, eps: float) -> None:
    if not x.is_floating_point() or x.dim() == 0 or not x.size(-1):
        raise ValueError(
            f"residual_norm: x is {x.dtype} {tuple(x.shape)}: it has to be of a float dtype and "
            "(..., D), D >= 1"
        )
    width, wide = x.size(-1), compute_dtype(x.dtype)
    for name, of, shape, dtype in (
        ("branch", "", x.shape, x.dtype),
        ("branch_scale", "branch", (width,), wide),
        ("skip", "", x.shape, x.dtype),
        ("skip_weight", "skip", (width,), wide),
        ("x0", "", x.shape, x.dtype),
        ("mix", "x0", (2, width), wide),
    ):
        t = others[name]
        if t is None:
            continue
        if of and others[of] is None:
            raise ValueError(f"residual_norm: there is {name} and no {of}: give both")
        if t.shape != torch.Size(shape) or t.dtype != dtype or t.device != x.device:
            raise ValueError(
                f"residual_norm: {name} is {t.dtype} {tuple(t.shape)} on {t.device}: for this x it "
                f"has to be {dtype} {tuple(shape)} on {x.device}"
            )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"residual_norm: eps={eps}: it has to be 0 or more, and finite")
    if not abs(scale) < float("inf"):
        raise ValueError(f"residual_norm: scale={scale}: it has to be finite")


def obstacle(impl: str, width: int) -> str:
    """Why `impl` cannot run rows of that width; '' if it can."""
    return beyond(WIDTH_LIMITS, impl, width, "elements a row")


def residual_norm(
    x: Tensor,
    *,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
    keep_total: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Add a branch and a skip to the residual stream, mix x0 in, and norm the result.

    Args:
        x: (..., D) residual stream.
        branch: (..., D) output of attention or MLP; None adds nothing.
        branch_scale: (D,) factors of branch; None is 1.
        skip: (..., D) state of an earlier layer; None adds nothing.
        skip_weight: (D,) factors of skip; None is 1.
        x0: (..., D) first embedding; without `mix` it has no part.
        mix: (2, D) factors of the sum and of x0; None leaves the sum as it is. All parameters are
            fp32 (fp64 for an fp64 x), the other tensors of x's dtype.
        scale: constant factor of h, 1/sqrt(layer + 1) as published.
        eps: added to the mean square of a row before the root.
        keep_total: whether the sum before the mix, which a U-Net skip wants, is a result too.
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64; D <= 4096) or 'cuda' (fp32, bf16;
            D <= 4096).

    Returns:
        (x_in, h), or (total, x_in, h) with keep_total, each (..., D), contiguous. Without a mix
        total is x_in itself; with nothing added either, both are x.

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    x, *rest = _INPUTS(x, branch, branch_scale, skip, skip_weight, x0, mix)
    others = dict(zip(_INPUTS.optional, rest, strict=True))
    _check(x, others, scale, eps)
    impl = resolve("residual_norm", impl, x, width=x.size(-1))
    if impl == "reference":
        return reference(x, **others, scale=scale, eps=eps, keep_total=keep_total)
    adds, mix = branch is not None or skip is not None, others["mix"]
    mixes = mix is not None
    if not mixes:
        others["x0"] = None
    learns = mixes and mix.requires_grad and torch.is_grad_enabled()
    stores_total = adds and mixes and (keep_total or learns)
    total, x_in, h, _ = _forward(x, *others.values(), scale, eps, stores_total, impl)
    if not adds:
        total = x
        x_in = x_in if mixes else x
    elif not mixes:
        total = x_in
    return (total, x_in, h) if keep_total else (x_in, h)


def rms_norm(x: Tensor, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """x (..., D) with unit mean square over the last dimension; no weight.

    Args:
        impl: as `residual_norm`, of which this is the norm alone.
    """
    return residual_norm(x, eps=eps, impl=impl)[1]


# --- the opaque operator --------------------------------------------------------------------------


def _or_empty(like: Tensor, there: bool) -> Tensor:
    """Room for a result of this shape, or for none."""
    return like.new_empty(like.shape if there else (0,))


def _wide(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for numbers of the type that kernels compute in."""
    return like.new_empty(shape, dtype=compute_dtype(like.dtype))


def _results(
    x: Tensor, branch: Tensor | None, skip: Tensor | None, mix: Tensor | None, stores_total: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for total, x_in, h and rstd; x_in is empty where it would be x."""
    changes = any(t is not None for t in (branch, skip, mix))
    return (
        _or_empty(x, stores_total), _or_empty(x, changes), x.new_empty(x.shape),
        _wide(x, x.shape[:-1]),
    )  # fmt: skip


def _gradients(
    x_in: Tensor, total: Tensor | None, branch_scale: Tensor | None, skip_weight: Tensor | None,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for dx, dbranch, dskip, dx0 and the gradients of parameters.

    dbranch and dskip are empty where they would be dx. Rows of the last: of branch_scale, of
    skip_weight, two of mix, where these are (of mix, where total is).
    """
    scaled, weighted, mixed = (t is not None for t in (branch_scale, skip_weight, mix))
    rows = scaled + weighted + 2 * (mixed and total is not None)
    return (
        x_in.new_empty(x_in.shape), _or_empty(x_in, scaled), _or_empty(x_in, weighted),
        _or_empty(x_in, mixed), _wide(x_in, (rows, x_in.size(-1))),
    )  # fmt: skip


@torch.library.custom_op("pgolf::residual_norm", mutates_args=())
def _forward(
    x: Tensor, branch: Tensor | None, branch_scale: Tensor | None, skip: Tensor | None,
    skip_weight: Tensor | None, x0: Tensor | None, mix: Tensor | None, scale: float, eps: float,
    stores_total: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = contiguous(x, branch, branch_scale, skip, skip_weight, x0, mix)
    return launcher("residual_norm", impl, "forward")(*inputs, scale, eps, stores_total)


@_forward.register_fake
def _(x, branch, branch_scale, skip, skip_weight, x0, mix, scale, eps, stores_total, impl):
    return _results(x, branch, skip, mix, stores_total)


@torch.library.custom_op("pgolf::residual_norm_backward", mutates_args=())
def _backward(
    d_total: Tensor | None, d_x_in: Tensor | None, dh: Tensor | None, x_in: Tensor, rstd: Tensor,
    total: Tensor | None, branch: Tensor | None, branch_scale: Tensor | None, skip: Tensor | None,
    skip_weight: Tensor | None, x0: Tensor | None, mix: Tensor | None, scale: float, eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = contiguous(
        d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix
    )
    return launcher("residual_norm", impl, "backward")(*tensors, scale, eps)


@_backward.register_fake
def _(
    d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix,
    scale, eps, impl,
):  # fmt: skip
    return _gradients(x_in, total, branch_scale, skip_weight, mix)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, branch, branch_scale, skip, skip_weight, x0, mix, scale, eps, stores_total, impl = inputs
    total, x_in, _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.settings = scale, eps, impl
    ctx.adds = branch is not None, skip is not None
    # Kept are x_in, from which the backward kernel makes n = x_in rstd again, and rstd. The mix's
    # gradient alone needs total: x where nothing is added, else stored only if the mix learns or a
    # skip wants it anyway. branch and skip are kept only where they have a factor, whose gradient
    # needs them: with a factor of 1 they get the gradient of x, and nobody reads them again.
    changes = any(ctx.adds) or mix is not None
    if not stores_total:
        total = None if mix is None or any(ctx.adds) else x
    ctx.save_for_backward(
        x_in if changes else x, rstd, total,
        None if branch_scale is None else branch, branch_scale,
        None if skip_weight is None else skip, skip_weight, x0, mix,
    )  # fmt: skip


def _gradient(
    ctx: Any, d_total: Tensor | None, d_x_in: Tensor | None, dh: Tensor | None, d_rstd: None
) -> tuple:
    x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix = ctx.saved_tensors
    dx, dbranch, dskip, dx0, parameters = _backward(
        d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix,
        *ctx.settings,
    )  # fmt: skip
    d_branch_scale = None if branch_scale is None else parameters[0]
    d_skip_weight = None if skip_weight is None else parameters[int(branch_scale is not None)]
    d_mix = None if mix is None or total is None else parameters[-2:]
    # What is added with a factor of 1 has the gradient of x: one tensor for all.
    return (
        dx,
        (dx if branch_scale is None else dbranch) if ctx.adds[0] else None, d_branch_scale,
        (dx if skip_weight is None else dskip) if ctx.adds[1] else None, d_skip_weight,
        None if mix is None else dx0, d_mix, None, None, None, None,
    )  # fmt: skip


register_gradient("residual_norm", _forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def shape(x: Tensor) -> tuple[int, int, int]:
        return DTYPE_CODES[x.dtype], x.numel() // x.size(-1), x.size(-1)

    def forward(x, branch, branch_scale, skip, skip_weight, x0, mix, scale, eps, stores_total):
        results = _results(x, branch, skip, mix, stores_total)
        inputs = (x, branch, branch_scale, skip, skip_weight, x0, mix)
        run("residual_norm", x, *addresses(*inputs, *results), *shape(x), scale, eps)
        return results

    def backward(
        d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix,
        scale, eps,
    ):  # fmt: skip
        gradients = _gradients(x_in, total, branch_scale, skip_weight, mix)
        *_, parameters = gradients
        parts = parts_of(rstd.numel(), MIN_PART, MAX_PARTS)
        if not parts:  # an empty tensor has no address by which it could be known to be there
            parameters.zero_()
            return gradients
        partials = parameters.new_empty((parts, *parameters.shape))
        run(
            "residual_norm_backward", x_in,
            *addresses(
                total, branch, branch_scale, skip, skip_weight, x0, mix, x_in, rstd, d_total,
                d_x_in, dh, *gradients, partials,
            ),
            parts, *shape(x_in), scale, eps,
        )  # fmt: skip
        return gradients

    return {"forward": forward, "backward": backward}


def samples() -> list[Sample]:
    """What the model's layers ask for; D is ragged in some."""

    def make(tokens: int, width: int, *parts: str, **options: Any):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(width)
            wide = compute_dtype(dtype)
            parameters = {"branch_scale": (width,), "skip_weight": (width,), "mix": (2, width)}

            def made(name: str) -> Tensor:
                shape = parameters.get(name, (1, tokens, width))
                values = torch.randn(shape, generator=g).double()
                return values.to(device, wide if name in parameters else dtype)

            return (made("x"),), {name: made(name) for name in parts} | {"eps": 1e-6} | options

        return build

    scaled, skip, mix = ("branch", "branch_scale"), ("skip", "skip_weight"), ("x0", "mix")
    small = {
        "first": make(5, 64, *mix),
        "attention": make(7, 40, "branch", scale=0.5),
        "scaled": make(3, 33, *scaled),
        "mlp": make(70, 24, "branch", *mix, scale=0.5, keep_total=True),
        "skip": make(3, 264, "branch", *skip, *mix),
        "norm": make(2, 264),
        "wide": make(2, 528, "branch", *skip, *mix),
        "all": make(9, 17, *scaled, *skip, *mix, scale=0.25, keep_total=True),
        "0 tokens": make(0, 16, "branch", *mix),
    }
    big = {}
    for tokens in (8192, 98304):
        big[f"attention {tokens} tokens"] = make(tokens, 512, "branch", scale=0.5)
        big[f"mlp {tokens} tokens"] = make(tokens, 512, "branch", *mix, scale=0.5)
    return [Sample(label, build) for label, build in small.items()] + [
        Sample(label, build, bench=True) for label, build in big.items()
    ]


def cost(
    x: Tensor, *, branch: Tensor | None = None, branch_scale: Tensor | None = None,
    skip: Tensor | None = None, skip_weight: Tensor | None = None, x0: Tensor | None = None,
    mix: Tensor | None = None, scale: float = 1.0, eps: float, keep_total: bool = False,
) -> tuple[Work, Work]:  # fmt: skip
    """Least work: every tensor once; kept are rstd and, for the gradient of mix, total.

    That writes and reads total where summing it up again would read x and branch: as many bytes,
    and none where a skip wants it anyway. The gradient reads those of total, x_in and h, and x_in;
    what parameters need for theirs; it writes one tensor for all that is added with a factor of 1.
    """
    row, rstd = nbytes(x), x.numel() // x.size(-1) * (8 if x.dtype == torch.float64 else 4)
    parameters = nbytes(branch_scale, skip_weight, mix)
    adds, mixes = branch is not None or skip is not None, mix is not None
    x0 = x0 if mixes else None
    learned = (branch_scale, branch), (skip_weight, skip), (mix, x0)
    again = sum(nbytes(t) for parameter, t in learned if parameter is not None)
    read = nbytes(x, branch, skip, x0) + parameters
    written = row * ((adds or mixes) + (adds and mixes)) + row + rstd
    upstream = row * (2 + (keep_total and mixes))
    return (
        Work(0, read, written),
        Work(
            0, upstream + row + rstd + row * mixes + again + parameters, row + again + parameters
        ),
    )


OPERATOR = register(
    Operator(
        name="residual_norm",
        call=residual_norm,
        reference=reference,
        differentiable=("x", "branch", "branch_scale", "skip", "skip_weight", "x0", "mix"),
        implementations=in_extension(("residual_norm", "residual_norm_backward"), _launchers),
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("cuda", "a layer's tensors once, forward one launch, backward two at most")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
