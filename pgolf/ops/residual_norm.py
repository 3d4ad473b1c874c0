"""What a layer adds to the residual stream, the mix with the first embedding, and the RMS norm.

    total = x + branch_scale branch + skip_weight skip           x_in = mix0 total + mix1 x0
    h = scale x_in rstd,   rstd = 1 / sqrt(mean(x_in^2) + eps)                   (arXiv 1910.07467)

With n = x_in rstd and G = d_x_in + scale rstd (dh - n mean(dh n)), the gradient of x_in,

    d = d_total + mix0 G,   dx = d,   dbranch = branch_scale d,   dskip = skip_weight d
    dx0 = mix1 G,   d_branch_scale = sum d branch,   d_skip_weight = sum d skip,
    d_mix = (sum G total, sum G x0), the sums over all tokens

h may stay a product of two factors: y, which has x_in's numbers, and f = scale rstd, one number a
row. What takes h then takes y and f, and h is never written. The gradient that y gets, g = f dh, is
all that the norm needs of h's: G = d_x_in + g - n mean(g n).

So may products of states with factors of their columns: what takes one has the state's numbers and
the factor, and gives back the gradient of the product. Of results that stand for p total and q x_in

    dp = sum d_total total,   dq = sum d_x_in x_in,   and p d_total and q d_x_in are meant above

while an x0 that stands for mix1 x0 gets G.

Shapes: x, branch, skip and x0 (..., D), the scales (D,), mix (2, D). Statistics are fp32 whatever
the dtype of x (fp64 for fp64). The reference rounds parameters to x's dtype and every step's
result; the kernels compute in fp32 and round each result once, h from the x_in that is not rounded.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import rerouted
from pgolf.ops.factored import Factored
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import in_extension
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.part_sums import Sums, check_deferred, deferred
from pgolf.ops.product import MULTIPLIED, Product, handed_on
from pgolf.ops.residual_norm_kernels import forward, launchers, part_count
from pgolf.ops.tensors import compute_dtype, nbytes

WIDTH_LIMITS = {"cpu": 4096, "cuda": 4096}  # D

_INPUTS = Inputs(
    "residual_norm",
    (
        "x", "branch", "branch_scale", "skip", "skip_weight", "x0", "mix", "total_scale",
        "x_in_scale",
    ),
    alike=("x", "branch", "skip", "x0"),
    wide=("branch_scale", "skip_weight", "mix", "total_scale", "x_in_scale"),
    optional=(
        "branch", "branch_scale", "skip", "skip_weight", "x0", "mix", "total_scale", "x_in_scale",
    ),
)  # fmt: skip


_PARAMETERS = ("branch_scale", "skip_weight", "mix", "total_scale", "x_in_scale")


@outside_autocast
def reference(
    x: Tensor, *, branch: Tensor | None = None, branch_scale: Tensor | None = None,
    skip: Tensor | None = None, skip_weight: Tensor | None = None, x0: Tensor | None = None,
    mix: Tensor | None = None, scale: float = 1.0, eps: float = 1e-6, keep_total: bool = False,
    factored: bool = False,
) -> tuple[Tensor | Factored, ...]:  # fmt: skip
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
    h = Factored(h, None) if factored else h
    return (total, x_in, h) if keep_total else (x_in, h)


def _check(
    x: Tensor, others: dict[str, Tensor | None], scale: float, eps: float, keep_total: bool,
    factored: bool,
) -> None:  # fmt: skip
    if not x.is_floating_point() or x.dim() == 0 or not x.size(-1):
        raise ValueError(
            f"residual_norm: x is {x.dtype} {tuple(x.shape)}: it has to be of a float dtype and "
            "(..., D), D >= 1"
        )
    width, wide = x.size(-1), compute_dtype(x.dtype)
    adds = others["branch"] is not None or others["skip"] is not None
    for name, of, shape, dtype in (
        ("branch", "", x.shape, x.dtype),
        ("branch_scale", "branch", (width,), wide),
        ("skip", "", x.shape, x.dtype),
        ("skip_weight", "skip", (width,), wide),
        ("x0", "", x.shape, x.dtype),
        ("mix", "x0", (2, width), wide),
        ("total_scale", "mix", (width,), wide),
        ("x_in_scale", "", (width,), wide),
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
    goes_on = {"total_scale": adds and keep_total, "x_in_scale": adds or others["mix"] is not None}
    for name, there in goes_on.items():
        if others[name] is not None and not there:
            raise ValueError(
                f"residual_norm: there is {name}, and what it scales is x itself, or no result: "
                "leave it out"
            )
    if factored and not scale:
        raise ValueError(
            f"residual_norm: scale={scale}: a factor of h must not be 0: use factored=False"
        )


def sums_of(
    rows: int, branch_scale: Tensor | None = None, skip_weight: Tensor | None = None,
    mix: Tensor | None = None, total_scale: Tensor | None = None, x_in_scale: Tensor | None = None,
    x0_is_product: bool = False,
) -> Sums:  # fmt: skip
    """What `part_sums.deferred` takes for a call with these parameters, x of so many rows."""
    parameters = [p for p in (branch_scale, skip_weight) if p is not None]
    if _learns(mix) or total_scale is not None:
        parameters.append(mix[0] if x0_is_product else mix)
    parameters += [p for p in (total_scale, x_in_scale) if p is not None]
    return Sums(part_count(rows), parameters)


def _learns(mix: Tensor | None) -> bool:
    return mix is not None and mix.requires_grad and torch.is_grad_enabled()


def obstacle(impl: str, width: int) -> str:
    """Why `impl` cannot run rows of that width; '' if it can."""
    return beyond(WIDTH_LIMITS, impl, width, "elements a row")


def _resolved(x: Tensor, impl: str) -> str:
    return resolve("residual_norm", impl, x, width=x.size(-1))


def residual_norm(
    x: Tensor, *, branch: Tensor | Product | None = None, branch_scale: Tensor | None = None,
    skip: Tensor | None = None, skip_weight: Tensor | None = None, x0: Tensor | None = None,
    mix: Tensor | None = None, total_scale: Tensor | None = None, x_in_scale: Tensor | None = None,
    x0_is_product: bool = False, scale: float = 1.0, eps: float = 1e-6, keep_total: bool = False,
    factored: bool = False, sums: Tensor | None = None, impl: str = "auto",
    linear: str = "auto",
) -> tuple[Tensor | Factored, ...]:  # fmt: skip
    """Add a branch and a skip to the residual stream, mix x0 in, and norm the result.

    Args:
        x: (..., D) residual stream.
        branch: (..., D) output of attention or MLP; None adds nothing. A `Product` is multiplied
            here; then there is no branch_scale.
        branch_scale: (D,) factors of branch; None is 1.
        skip: (..., D) state of an earlier layer; None adds nothing.
        skip_weight: (D,) factors of skip; None is 1.
        x0: (..., D) first embedding; without `mix` it has no part.
        mix: (2, D) factors of the sum and of x0; None leaves the sum as it is. All parameters are
            fp32 (fp64 for an fp64 x), the other tensors of x's dtype.
        total_scale, x_in_scale: (D,) factors with which total and x_in go on: these results then
            have their own numbers and take the gradients of the products, and nothing else of them
            may be used. The first wants a mix. For kernels only.
        x0_is_product: whether x0, likewise, has its own numbers and gets the gradient of
            mix[1] x0, and mix[1] none. For kernels only.
        scale: constant factor of h, 1/sqrt(layer + 1) as published.
        eps: added to the mean square of a row before the root.
        keep_total: whether the sum before the mix, which a U-Net skip wants, is a result too.
        factored: whether h comes as `Factored`; then scale must not be 0.
        sums: what `part_sums.deferred` gives for `sums_of` these arguments: the parameters then get
            their gradients from there. None: from here.
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64; D <= 4096) or 'cuda' (fp32, bf16;
            D <= 4096).
        linear: of `linear_mix`, where branch is a Product.

    Returns:
        (x_in, h), or (total, x_in, h) with keep_total, each (..., D), contiguous; of a factored h
        this is y, and the reference has a factor of None, so that y is h. Without a mix
        total is x_in itself; with nothing added either, both are x.

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    given = x if isinstance(branch, Product) else branch  # of the same shape and dtype
    x, *rest = _INPUTS(
        x, given, branch_scale, skip, skip_weight, x0, mix, total_scale, x_in_scale
    )
    others = dict(zip(_INPUTS.optional, rest, strict=True))
    _check(x, others, scale, eps, keep_total, factored)
    impl, product = _resolved(x, impl), MULTIPLIED
    if isinstance(branch, Product):
        if branch_scale is not None:
            raise ValueError("residual_norm: branch_scale of a Product: multiply w's rows by it")
        fused = factored or impl != "reference"
        others["branch"], product = handed_on("residual_norm", branch, x, linear, fused)
    if sums is not None:
        own = sums_of(x.shape[:-1].numel(), *(others[n] for n in _PARAMETERS), x0_is_product)
        check_deferred("residual_norm", sums, own, impl)
    products = [others.pop(name) for name in ("total_scale", "x_in_scale")]
    if impl == "reference":
        if x0_is_product or any(p is not None for p in products):
            raise ValueError("residual_norm: impl=reference takes no products: multiply them out")
        if product[0] is None:
            return reference(
                x, **others, scale=scale, eps=eps, keep_total=keep_total, factored=factored
            )
    adds, mix = others["branch"] is not None or skip is not None, others["mix"]
    mixes = mix is not None
    others["x0"] = others["x0"] if mixes else None
    stores_total = adds and mixes and (keep_total or _learns(mix))
    settings = scale, eps, factored, x0_is_product, stores_total, impl
    total, x_in, h, rstd = forward(x, *others.values(), *products, sums, *product, *settings)
    if not adds:
        total = x
        x_in = x_in if mixes else x
    elif not mixes:
        total = x_in
    if factored:
        h = Factored(rerouted(x_in, h), rstd.detach())
    return (total, x_in, h) if keep_total else (x_in, h)


def rms_norm(x: Tensor, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """x (..., D) with unit mean square over the last dimension; no weight.

    Args:
        impl: as `residual_norm`, of which this is the norm alone.
    """
    return residual_norm(x, eps=eps, impl=impl)[1]


_LATER = "later"  # the sums of a sample that has them deferred


def samples() -> list[Sample]:
    """What the model's layers ask for; D is ragged in some."""

    def make(tokens: int, width: int, *parts: str, **options: Any):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(width)
            wide = compute_dtype(dtype)
            parameters = dict.fromkeys(_PARAMETERS, (width,)) | {"mix": (2, width)}

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
        "factored": make(3, 264, "branch", *skip, *mix, scale=0.5, keep_total=True, factored=True),
        "factored mlp": make(70, 24, "branch", factored=True),
        "factored norm": make(2, 17, scale=-1.5, factored=True),
        "sums later": make(150, 17, *scaled, *skip, *mix, sums=_LATER),
        "products": make(
            70, 264, "branch", *mix, "total_scale", keep_total=True, x0_is_product=True,
            factored=True,
        ),
        "product": make(5, 40, "branch", "x_in_scale", scale=0.5, factored=True),
        "all products later": make(
            150, 17, *scaled, *skip, *mix, "total_scale", "x_in_scale", keep_total=True,
            x0_is_product=True, sums=_LATER,
        ),
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
    mix: Tensor | None = None, total_scale: Tensor | None = None, x_in_scale: Tensor | None = None,
    x0_is_product: bool = False, scale: float = 1.0, eps: float, keep_total: bool = False,
    factored: bool = False, sums: str | None = None,
) -> tuple[Work, Work]:  # fmt: skip
    """Least work: every tensor once; kept are rstd and, for the gradient of mix, total.

    That writes and reads total where summing it up again would read x and branch: as many bytes,
    and none where a skip wants it anyway. The gradient reads those of total, x_in and h, and x_in;
    what parameters need for theirs; it writes one tensor for all that is added with a factor of 1.
    For an x0 that is a product it writes one, and reads nothing.
    """
    row, rstd = nbytes(x), x.numel() // x.size(-1) * (8 if x.dtype == torch.float64 else 4)
    parameters = nbytes(branch_scale, skip_weight, mix)
    adds, mixes = branch is not None or skip is not None, mix is not None
    x0 = x0 if mixes else None
    learned = (branch_scale, branch), (skip_weight, skip), (mix, x0)
    again = sum(nbytes(t) for parameter, t in learned if parameter is not None)
    read = nbytes(x, branch, skip, x0) + parameters
    written = row * ((adds or mixes) + (adds and mixes) + (not factored)) + rstd
    upstream = row * (2 + (keep_total and mixes))
    products = nbytes(total_scale, x_in_scale)
    left = (nbytes(x0), nbytes(mix) // 2) if x0_is_product else (0, 0)  # to who made x0
    again_read = again - left[0] + parameters - left[1] + products
    return (
        Work(0, read, written),
        Work(
            0, upstream + row + rstd + row * mixes + again_read,
            row + again + parameters - left[1] + products,
        ),
    )  # fmt: skip


def _of_samples(function: Callable) -> Callable:
    """What tests and benchmarks call: products are multiplied out, and sums may come later."""

    @functools.wraps(function)
    def call(x: Tensor, **named: Any) -> tuple[Tensor, ...]:
        later = named.pop("sums", None) == _LATER
        impl = named.get("impl", "auto") if function is residual_norm else "reference"
        kernels = isinstance(x, Tensor) and _resolved(x, impl) != "reference"
        factors = [named.get(name) for name in ("total_scale", "x_in_scale")]
        if not kernels:
            named = {n: v for n, v in named.items() if n not in ("total_scale", "x_in_scale")}
            x0_is_product = named.pop("x0_is_product", False)
        elif x0_is_product := named.get("x0_is_product", False):
            product = (named["mix"][1] * named["x0"]).to(x.dtype)
            named["x0"] = rerouted(named["x0"].detach(), product)
        if later and kernels:
            learned = [named.get(name) for name in _PARAMETERS]
            own = sums_of(x.shape[:-1].numel(), *learned, x0_is_product)
            if own.parameters and resolve("part_sums", named["impl"], x) != "reference":
                (named["sums"],) = deferred([own], named["impl"])
        *others, h = function(x, **named)
        for i, factor in zip((-2, -1), factors, strict=True):
            if factor is not None:
                product = (factor * (others[i].detach() if kernels else others[i])).to(x.dtype)
                others[i] = rerouted(product, others[i]) if kernels else product
        return (*others, h.product() if isinstance(h, Factored) else h)

    call.__signature__ = inspect.signature(residual_norm)
    return call


OPERATOR = register(
    Operator(
        name="residual_norm",
        call=_of_samples(residual_norm),
        reference=_of_samples(reference),
        differentiable=("x", "branch", "skip", "x0", *_PARAMETERS),
        implementations=in_extension(("residual_norm", "residual_norm_backward"), launchers),
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("cuda", "a layer's tensors once, forward one launch, backward two at most")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
