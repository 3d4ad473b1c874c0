"""How `residual_norm` runs in kernels: the opaque operator, its gradient, the compiled half.

Tensors are as `residual_norm` takes them, None where there is none. What kernels make that is not
wanted, or would be another tensor again, is empty: results of an operator can neither be None nor
share memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.derivatives import register_gradient, ticket
from pgolf.ops.inputs import without_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.part_sums import sum_parts
from pgolf.ops.tensors import addresses, compute_dtype, contiguous, parts_of, unit_stride

# Gradients of parameters are summed over parts of the rows, of so many at least;
# csrc/residual_norm.h
MIN_PART, MAX_PARTS = 64, 528


def _or_empty(like: Tensor, there: bool) -> Tensor:
    """Room for a result of this shape, or for none."""
    return like.new_empty(like.shape if there else (0,))


def _wide(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for numbers of the type that kernels compute in."""
    return like.new_empty(shape, dtype=compute_dtype(like.dtype))


def _results(
    x: Tensor, branch: Tensor | None, skip: Tensor | None, mix: Tensor | None, factored: bool,
    stores_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for total, x_in, h, or its ticket, and rstd; x_in is empty where it would be x."""
    changes = any(t is not None for t in (branch, skip, mix))
    h = ticket(x) if factored else x.new_empty(x.shape)
    return _or_empty(x, stores_total), _or_empty(x, changes), h, _wide(x, x.shape[:-1])


def _gradients(
    x_in: Tensor, total: Tensor | None, branch_scale: Tensor | None, skip_weight: Tensor | None,
    x0: Tensor | None, mix: Tensor | None, total_scale: Tensor | None, x_in_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for dx, dbranch, dskip, dx0 and the sums over parts of the rows (parts, numbers).

    dbranch and dskip are empty where they would be dx. The numbers of a part are those of the
    gradients of branch_scale, skip_weight, mix (where total is there, of mix[1] where x0 is),
    total_scale and x_in_scale, where these are.
    """
    scaled, weighted, mixed = (t is not None for t in (branch_scale, skip_weight, mix))
    width = x_in.size(-1)
    rows = (1 + (x0 is not None)) * (mixed and total is not None)
    products = (total_scale is not None) + (x_in_scale is not None)
    numbers = (scaled + weighted + rows + products) * width
    return (
        x_in.new_empty(x_in.shape), _or_empty(x_in, scaled), _or_empty(x_in, weighted),
        _or_empty(x_in, mixed), _wide(x_in, (part_count(x_in.numel() // width), numbers)),
    )  # fmt: skip


def part_count(rows: int) -> int:
    """Of sums over so many rows."""
    return parts_of(rows, MIN_PART, MAX_PARTS)


@opaque("pgolf::residual_norm", mutates_args=())
def forward(
    x: Tensor, branch: Tensor | None, branch_scale: Tensor | None, skip: Tensor | None,
    skip_weight: Tensor | None, x0: Tensor | None, mix: Tensor | None, total_scale: Tensor | None,
    x_in_scale: Tensor | None, sums: Tensor | None, z: Tensor | None, w: Tensor | None, linear: str,
    scale: float, eps: float, factored: bool, x0_is_product: bool, stores_total: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """total, if it `stores_total`, x_in, h and rstd (...,).

    Factored: the ticket of x_in as a factor of h, and the other factor in the place of rstd. `sums`
    is what takes the gradients of parameters in parts, where they do not get them themselves.
    Where z is there, z w^T is the branch, of which there is a ticket.
    """
    x, branch_scale, skip, skip_weight, x0 = contiguous(x, branch_scale, skip, skip_weight, x0)
    mixes = (None, None) if mix is None else contiguous(*mix)
    settings = scale, eps, factored, stores_total
    if z is not None:
        added = {"skip": skip, "of_skip": skip_weight, "x0": x0}
        added |= dict(zip(("of_total", "of_x0"), mixes, strict=True))
        made = by_gemm(z, w, x, added, scale, eps, stores_total, linear) if factored else None
        if made is not None:
            return made
        with without_autocast(z):
            branch = z @ w.t()
    if impl == "reference":
        return _in_plain_torch(x, branch, skip, skip_weight, x0, mix, scale, eps, stores_total)
    inputs = x, *contiguous(branch), branch_scale, skip, skip_weight, x0
    return launcher("residual_norm", impl, "forward")(*inputs, *mixes, *settings)


def by_gemm(
    z: Tensor, w: Tensor, x: Tensor, added: dict[str, Tensor | None], scale: float, eps: float,
    stores_total: bool, linear: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """What `forward` returns of a factored h, in one GEMM; None: it is not possible.

    Args:
        added: arguments of the launcher: skip and x0 as x, and factors (D,).
    """
    states = {n: _rows(t) for n, t in added.items() if n in ("skip", "x0") and t is not None}
    run, operands = launcher("linear_mix", linear, "forward"), (_rows(z), *contiguous(w), _rows(x))
    with without_autocast(z):
        made = run(*operands, scale, eps, **added | states, keep_total=stores_total)
    if made is None:
        return None
    total, x_in, factor = made
    total = _or_empty(x, False) if total is None else total.view(x.shape)
    return total, x_in.view(x.shape), ticket(x), factor.view(x.shape[:-1])


def _rows(t: Tensor) -> Tensor:
    """t (..., C) as a matrix whose rows are contiguous."""
    return unit_stride(t.reshape(t.shape[:-1].numel(), t.size(-1)))


def _in_plain_torch(
    x: Tensor, branch: Tensor, skip: Tensor | None, skip_weight: Tensor | None, x0: Tensor | None,
    mix: Tensor | None, scale: float, eps: float, stores_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `forward` returns of a factored h, without kernels."""
    wide = compute_dtype(x.dtype)
    total = x.to(wide) + branch
    if skip is not None:
        total = total + (skip if skip_weight is None else skip_weight * skip)
    x_in = total if mix is None else mix[0] * total + mix[1] * x0
    factor = scale * (x_in.square().mean(-1) + eps).rsqrt()
    kept = total.to(x.dtype) if stores_total else _or_empty(x, False)
    return kept, x_in.to(x.dtype), ticket(x), factor


@forward.register_fake
def _(
    x, branch, branch_scale, skip, skip_weight, x0, mix, total_scale, x_in_scale, sums, z, w,
    linear, scale, eps, factored, x0_is_product, stores_total, impl,
):  # fmt: skip
    return _results(x, branch, skip, mix, factored, stores_total)


@opaque("pgolf::residual_norm_backward", mutates_args=())
def backward(
    d_total: Tensor | None, d_x_in: Tensor | None, dh: Tensor | None, x_in: Tensor, rstd: Tensor,
    total: Tensor | None, branch: Tensor | None, branch_scale: Tensor | None, skip: Tensor | None,
    skip_weight: Tensor | None, x0: Tensor | None, mix: Tensor | None, total_scale: Tensor | None,
    x_in_scale: Tensor | None, scale: float, eps: float, factored: bool, deferred: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbranch, dskip, dx0 and the gradients of parameters, `deferred` in parts.

    Where there is a mix and no x0, that is a product: dx0 is the gradient of x_in.
    """
    tensors = contiguous(
        d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix,
        total_scale, x_in_scale,
    )  # fmt: skip
    return launcher("residual_norm", impl, "backward")(*tensors, scale, eps, factored, deferred)


@backward.register_fake
def _(
    d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix,
    total_scale, x_in_scale, scale, eps, factored, deferred, impl,
):  # fmt: skip
    parameters = branch_scale, skip_weight, x0, mix, total_scale, x_in_scale
    *gradients, parts = _gradients(x_in, total, *parameters)
    return *gradients, parts if deferred else parts.new_empty(parts.size(1))


_MIX = 6  # which argument of `forward` that is


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, branch, branch_scale, skip, skip_weight, x0, mix, *rest, impl = inputs
    total_scale, x_in_scale, sums, _, _, _, *settings, x0_is_product, stores_total = rest
    total, x_in, _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.deferred = sums is not None
    ctx.settings = *settings, ctx.deferred, impl
    ctx.adds = branch is not None, skip is not None
    # Kept are x_in, from which the backward kernel makes n = x_in rstd again, and rstd. The mix's
    # gradient alone needs total: x where nothing is added, else stored only if the mix learns or a
    # skip wants it anyway. branch and skip are kept only where they have a factor, whose gradient
    # needs them: with a factor of 1 they get the gradient of x, and nobody reads them again.
    changes = any(ctx.adds) or mix is not None
    ctx.x0_is_product = x0_is_product
    if not ctx.needs_input_grad[_MIX] and total_scale is None:
        total = None
    elif not stores_total:
        total = None if any(ctx.adds) else x
    ctx.save_for_backward(
        x_in if changes else x, rstd, total,
        None if branch_scale is None else branch, branch_scale,
        None if skip_weight is None else skip, skip_weight, None if x0_is_product else x0, mix,
        total_scale, x_in_scale,
    )  # fmt: skip


def _gradient(
    ctx: Any, d_total: Tensor | None, d_x_in: Tensor | None, dh: Tensor | None, d_rstd: None
) -> tuple:
    x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix, *scales = ctx.saved_tensors
    if ctx.settings[-1] == "reference":
        return _gradient_in_plain_torch(ctx, d_total, d_x_in, dh)
    factors = branch_scale, skip_weight, mix, *scales
    if dh is None and d_x_in is not None and all(f is None for f in factors) and not ctx.deferred:
        # Nobody has taken h: to all that was added goes what has come, and no kernel starts.
        dx, dbranch, dskip, dx0, parameters = *[d_x_in] * 4, rstd.new_empty(0)
    else:
        dx, dbranch, dskip, dx0, parameters = backward(
            d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0,
            mix, *scales, *ctx.settings,
        )  # fmt: skip
    d_sums, d_mix, of_parameters = None, None, [None] * 4
    if ctx.deferred:
        d_sums = parameters
    else:
        mixes = (1 + (x0 is not None)) * (mix is not None and total is not None)
        counts = [int(p is not None) for p in (branch_scale, skip_weight)]
        counts += [mixes, *(int(p is not None) for p in scales)]
        rows = parameters.view(-1, x_in.size(-1)).split(counts)
        *of_parameters, d_mix = (r if r.size(0) else None for r in (*rows[:2], *rows[3:], rows[2]))
        of_parameters = [None if r is None else r[0] for r in of_parameters]
        if mixes == 1:
            d_mix = torch.cat((d_mix, torch.zeros_like(d_mix)))
    d_branch_scale, d_skip_weight, *d_scales = of_parameters
    # What is added with a factor of 1 has the gradient of x: one tensor for all.
    return (
        dx,
        (dx if branch_scale is None else dbranch) if ctx.adds[0] else None, d_branch_scale,
        (dx if skip_weight is None else dskip) if ctx.adds[1] else None, d_skip_weight,
        None if mix is None else dx0, d_mix, *d_scales, d_sums, *[None] * 3,
        *(None for _ in ctx.settings), None,
    )  # fmt: skip


def _gradient_in_plain_torch(
    ctx: Any, d_total: Tensor | None, d_x_in: Tensor | None, dh: Tensor | None
) -> tuple:
    """`_gradient` of a factored h and a branch without a factor, open to torch.compile."""
    x_in, factor, total, _, _, skip, skip_weight, x0, mix, *_ = ctx.saved_tensors
    scale, dtype, wide = ctx.settings[0], x_in.dtype, factor.dtype
    g = torch.zeros_like(x_in, dtype=wide) if d_x_in is None else d_x_in.to(wide)
    if dh is not None:
        n = x_in.to(wide) * (factor / scale)[..., None]
        g = g + dh - n * (dh * n).mean(-1, keepdim=True)
    d = g if mix is None else mix[0] * g
    d = d if d_total is None else d + d_total
    rows = tuple(range(x_in.dim() - 1))
    d_weight = d_mix = None
    if skip_weight is not None:
        d_weight = (d * skip).sum(rows)
    if mix is not None and total is not None:
        d_mix = torch.stack([(g * total).sum(rows), (g * x0).sum(rows)])
    dx = d.to(dtype)
    dskip = dx if skip_weight is None else (skip_weight * d).to(dtype)
    dx0 = None if mix is None else (mix[1] * g).to(dtype)
    given = dx, dx, None, dskip if ctx.adds[1] else None, d_weight, dx0, d_mix
    return (*given, *[None] * (6 + len(ctx.settings) + 1))


register_gradient("residual_norm", forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def shape(x: Tensor) -> tuple[int, int, int]:
        return DTYPE_CODES[x.dtype], x.numel() // x.size(-1), x.size(-1)

    def forward(
        x, branch, branch_scale, skip, skip_weight, x0, mix0, mix1, scale, eps, factored,
        stores_total,
    ):  # fmt: skip
        mixes = mix0 if mix1 is None else mix1
        results = _results(x, branch, skip, mixes, factored, stores_total)
        inputs = (x, branch, branch_scale, skip, skip_weight, x0, mix0, mix1)
        total, x_in, h, rstd = results
        run(
            "residual_norm", x, *addresses(*inputs, total, x_in, None if factored else h, rstd),
            *shape(x), scale, eps, factored,
        )  # fmt: skip
        return results

    def backward(
        d_total, d_x_in, dh, x_in, rstd, total, branch, branch_scale, skip, skip_weight, x0, mix,
        total_scale, x_in_scale, scale, eps, factored, deferred,
    ):  # fmt: skip
        parameters = branch_scale, skip_weight, x0, mix, total_scale, x_in_scale
        *gradients, parts = _gradients(x_in, total, *parameters)
        mix0, mix1 = (None, None) if mix is None else mix
        if rstd.numel():  # an empty tensor has no address by which it could be known to be there
            run(
                "residual_norm_backward", x_in,
                *addresses(
                    total, branch, branch_scale, skip, skip_weight, x0, mix0,
                    None if x0 is None else mix1, total_scale, x_in_scale, x_in, rstd, d_total,
                    d_x_in, dh, *gradients, parts,
                ),
                parts.size(0), *shape(x_in), scale, eps, factored,
            )  # fmt: skip
        return *gradients, parts if deferred else sum_parts(run, [parts])

    return {"forward": forward, "backward": backward}
