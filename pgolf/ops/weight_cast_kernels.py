"""How `weight_cast` runs in kernels, and `fake_quant`, which is the case without a scale.

Lists hold an item a matrix: w (R, C) of one dtype with a contiguous last dimension; scale (R,) of
the dtype that w computes in, or None; clip_factor (R,) and bits (0-d), both fp32, or None where
there is no grid. `on` is 0-d fp32, or None if no matrix has a grid.

torch.library differentiates lists of tensors, not of tensors and None: what it sees holds what is
there, and lists of bool say which matrices it belongs to.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.ops.derivatives import once, register_gradient, ticket
from pgolf.ops.launch import DTYPE_CODES, Run, launcher
from pgolf.ops.opaque import Opaque, opaque
from pgolf.ops.tensors import addresses, compute_dtype, contiguous, unit_stride


def _spread(items: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    """One a matrix: the next item where there is one, else None."""
    left = iter(items)
    return [next(left) if is_there else None for is_there in there]


def _packed(items: Sequence[Tensor | None]) -> list[Tensor]:
    return [item for item in items if item is not None]


def _stepped(scaled: Sequence[bool], gridded: Sequence[bool], clip_mask: bool) -> list[bool]:
    """The matrices whose gradients need the grid."""
    return [g and (s or clip_mask) for s, g in zip(scaled, gridded, strict=True)]


class _Opaque(NamedTuple):
    """pgolf::OPERATOR and its gradient."""

    forward: Opaque
    backward: Opaque


def _opaque(operator: str) -> _Opaque:
    @opaque(f"pgolf::{operator}", mutates_args=())
    def forward(
        ws: Sequence[Tensor], scales: Sequence[Tensor], scaled: Sequence[bool],
        clip_factors: Sequence[Tensor], bits: Sequence[Tensor], gridded: Sequence[bool],
        on: Tensor | None, floor: float, multiple: int, full_range: bool, clip_mask: bool,
        dtype: torch.dtype, impl: str,
    ) -> list[Tensor]:  # fmt: skip
        """The results, then the steps that the gradients need."""
        outs, steps = launcher(operator, impl, "forward")(
            [unit_stride(w) for w in ws],
            _spread(contiguous(*scales), scaled),
            _spread(contiguous(*clip_factors), gridded),
            _spread(bits, gridded),
            on, floor, multiple, full_range, dtype, _stepped(scaled, gridded, clip_mask),
        )  # fmt: skip
        return [*outs, *_packed(steps)]

    @forward.register_fake
    def _(
        ws, scales, scaled, clip_factors, bits, gridded, on, floor, multiple, full_range,
        clip_mask, dtype, impl,
    ):  # fmt: skip
        computed, stepped = compute_dtype(ws[0].dtype), _stepped(scaled, gridded, clip_mask)
        with_steps = [w for w, needed in zip(ws, stepped, strict=True) if needed]
        steps = [w.new_empty(w.shape[:1], dtype=computed) for w in with_steps]
        return [*(w.new_empty(w.shape, dtype=dtype) for w in ws), *steps]

    @opaque(f"pgolf::{operator}_backward", mutates_args=())
    def backward(
        douts: Sequence[Tensor], ws: Sequence[Tensor], scales: Sequence[Tensor],
        scaled: Sequence[bool], steps: Sequence[Tensor], bits: Sequence[Tensor],
        stepped: Sequence[bool], on: Tensor | None, multiple: int, full_range: bool,
        clip_mask: bool, impl: str,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients of ws, then those of scales."""
        dws, dscales = launcher(operator, impl, "backward")(
            [unit_stride(dout) for dout in douts],
            [unit_stride(w) for w in ws],
            _spread(contiguous(*scales), scaled),
            _spread(steps, stepped),
            _spread(bits, stepped),
            on, multiple, full_range, clip_mask,
        )  # fmt: skip
        return [*dws, *_packed(dscales)]

    @backward.register_fake
    def _(
        douts, ws, scales, scaled, steps, bits, stepped, on, multiple, full_range, clip_mask, impl
    ):  # fmt: skip
        return [t.new_empty(t.shape) for t in (*ws, *scales)]

    register_gradient(operator, forward, _gradient, functools.partial(_remember, operator))
    return _Opaque(forward, backward)


# (An operator that changes arguments may not return a list of tensors.)
@opaque("pgolf::weight_cast_into", mutates_args=("outs", "steps"))
def _into(
    outs: Sequence[Tensor], steps: Sequence[Tensor], stepped: Sequence[bool],
    ws: Sequence[Tensor], scales: Sequence[Tensor], scaled: Sequence[bool],
    clip_factors: Sequence[Tensor], bits: Sequence[Tensor], gridded: Sequence[bool],
    on: Tensor | None, floor: float, multiple: int, full_range: bool, impl: str,
) -> None:  # fmt: skip
    launcher("weight_cast", impl, "into")(
        outs, _spread(steps, stepped),
        [unit_stride(w) for w in ws],
        _spread(contiguous(*scales), scaled),
        _spread(contiguous(*clip_factors), gridded),
        _spread(bits, gridded),
        on, floor, multiple, full_range,
    )  # fmt: skip

@_into.register_fake
def _(*args) -> None:
    return None


def cast_all(
    operator: str,
    ws: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    clip_factors: Sequence[Tensor | None],
    bits: Sequence[Tensor | None],
    on: Tensor | None,
    options: tuple,
    impl: str,
    into: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The matrices by kernels of `impl`; options: floor, multiple, full_range, clip_mask, dtype.

    `into` is for 'weight_cast': what they are written to, under torch.compile by a copy.
    """
    scaled, gridded = ([x is not None for x in xs] for xs in (scales, bits))
    scales, clips, bits = map(_packed, (scales, clip_factors, bits))
    if torch.compiler.is_compiling():
        lists = (ws, scales, scaled, clips, bits, gridded)
        outs = _OPAQUE[operator].forward(*lists, on, *options, impl)[: len(ws)]
        if into is not None:
            torch._foreach_copy_(list(into), [out.detach() for out in outs])
        return outs
    tensors = (*ws, *scales, *clips, *bits)
    return list(_Eager.apply(operator, scaled, gridded, on, options, impl, into, *tensors))


# --- the gradient ---------------------------------------------------------------------------------


def _remember(operator: str, ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ws, scales, ctx.scaled, _, bits, ctx.gridded, on, _, *options, dtype, ctx.impl = inputs
    ctx.multiple, ctx.full_range, ctx.clip_mask = options
    ctx.operator, ctx.count, ctx.dtype = operator, len(ws), ws[0].dtype
    ctx.stepped = _stepped(ctx.scaled, ctx.gridded, ctx.clip_mask)
    # Else the gradient is a cast.
    ctx.needs_kernel = any(ctx.scaled) or any(ctx.stepped)
    if ctx.needs_kernel:
        each = zip(_spread(bits, ctx.gridded), ctx.stepped, strict=True)
        used = [k for k, needed in each if needed]
        ctx.save_for_backward(on, *ws, *scales, *output[ctx.count :], *used)


def _gradients(
    ctx: Any, douts: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of ws and scales, in one launch; nothing flows to a matrix whose dout is None."""
    # Without a scale and without clip_mask the gradient is dout, cast, and no kernel runs. Else one
    # launch serves all matrices that something flows back to; the others get None, not zeros, so
    # that a frozen branch costs nothing. A scale's gradient needs the weight on its grid again,
    # which is made from w and the saved steps: keeping it would double the memory.
    n = ctx.count
    if not ctx.needs_kernel:
        return [dout if dout is None else dout.to(ctx.dtype) for dout in douts[:n]], []
    on, *rest = ctx.saved_tensors
    ws, rest = rest[:n], rest[n:]
    k, s = sum(ctx.scaled), sum(ctx.stepped)
    scales = _spread(rest[:k], ctx.scaled)
    steps, bits = (_spread(x, ctx.stepped) for x in (rest[k : k + s], rest[k + s :]))
    flows = [i for i in range(n) if douts[i] is not None]
    if not flows:
        return [None] * n, [None] * k

    def of(items: Sequence) -> list:
        return [items[i] for i in flows if items[i] is not None]

    found = _OPAQUE[ctx.operator].backward(
        of(douts), of(ws), of(scales), of(ctx.scaled), of(steps), of(bits), of(ctx.stepped),
        on, ctx.multiple, ctx.full_range, ctx.clip_mask, ctx.impl,
    )  # fmt: skip
    dws = dict(zip(flows, found, strict=False))
    dscales = dict(zip([i for i in flows if ctx.scaled[i]], found[len(flows) :], strict=True))
    return [dws.get(i) for i in range(n)], [dscales.get(i) for i in range(n) if ctx.scaled[i]]


def _gradient(ctx: Any, douts: list[Tensor]) -> tuple:
    dws, dscales = _gradients(ctx, douts)
    nothing = [None] * sum(ctx.gridded)
    return dws, dscales, None, nothing, nothing, *(None,) * 8


def _eager_gradient(ctx: Any, *douts: Tensor | None) -> tuple:
    dws, dscales = _gradients(ctx, douts)
    return *(None,) * 7, *dws, *dscales, *(None,) * (2 * sum(ctx.gridded))


def _written(
    into: Sequence[Tensor], ws: Sequence[Tensor], scales: Sequence[Tensor],
    scaled: Sequence[bool], clips: Sequence[Tensor], bits: Sequence[Tensor],
    gridded: Sequence[bool], on: Tensor | None, floor: float, multiple: int, full_range: bool,
    clip_mask: bool, dtype: torch.dtype, impl: str,
) -> list[Tensor]:  # fmt: skip
    """Tickets of what stands in `into` then, and the steps that the gradients need."""
    stepped, computed = _stepped(scaled, gridded, clip_mask), compute_dtype(ws[0].dtype)
    with_steps = [w for w, needed in zip(ws, stepped, strict=True) if needed]
    steps = [w.new_empty(w.shape[:1], dtype=computed) for w in with_steps]
    _into(
        list(into), steps, stepped, ws, scales, scaled, clips, bits, gridded, on, floor, multiple,
        full_range, impl,
    )  # fmt: skip
    return [*map(ticket, into), *steps]


class _Eager(torch.autograd.Function):
    """The same gradient without torch.library's autograd layer, which takes lists apart slowly: a
    good part of the time that casting the weights of a small model takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        scaled: list[bool],
        gridded: list[bool],
        on: Tensor | None,
        options: tuple,
        impl: str,
        into: Sequence[Tensor] | None,
        *tensors: Tensor,
    ) -> tuple:
        n, s, g = len(scaled), sum(scaled), sum(gridded)
        ws, scales, grids = tensors[:n], tensors[n : n + s], tensors[n + s :]
        inputs = (ws, scales, scaled, grids[:g], grids[g:], gridded, on, *options, impl)
        ctx.set_materialize_grads(False)
        output = _OPAQUE[operator].forward(*inputs) if into is None else _written(into, *inputs)
        _remember(operator, ctx, inputs, output)
        return tuple(output[:n])

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple:
        return once(ctx.operator, _eager_gradient)(ctx, *douts)


_OPAQUE = {name: _opaque(name) for name in ("weight_cast", "fake_quant")}


# --- implementations ------------------------------------------------------------------------------


def launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def forward(
        ws, scales, clip_factors, bits, on, floor, multiple, full_range, dtype, with_steps
    ):  # fmt: skip
        """The matrices in `dtype`; of those that want them, the steps (R,). As `write` has it."""
        source = ws[0].dtype
        target = dtype if dtype is torch.bfloat16 else compute_dtype(source)
        outs = [w.new_empty(w.shape, dtype=target) for w in ws]
        steps = [
            w.new_empty(w.shape[:1], dtype=compute_dtype(source)) if wanted else None
            for w, wanted in zip(ws, with_steps, strict=True)
        ]
        write(outs, steps, ws, scales, clip_factors, bits, on, floor, multiple, full_range)
        return [out.to(dtype) for out in outs], steps

    def write(
        outs: Sequence[Tensor],
        steps: Sequence[Tensor | None],
        ws: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        clip_factors: Sequence[Tensor | None],
        bits: Sequence[Tensor | None],
        on: Tensor | None,
        floor: float,
        multiple: int,
        full_range: bool,
    ) -> None:
        """The matrices to `outs`; those of one dtype, which kernels have."""
        matrices = [
            (*w.shape, w.data_ptr(), w.stride(0), *addresses(*rest))
            for w, *rest in zip(ws, scales, clip_factors, bits, outs, steps, strict=True)
        ]
        run(
            "weight_cast", ws[0], matrices, *addresses(on), DTYPE_CODES[ws[0].dtype],
            DTYPE_CODES[outs[0].dtype], floor, multiple, full_range,
        )  # fmt: skip

    def backward(
        douts: Sequence[Tensor],
        ws: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        steps: Sequence[Tensor | None],
        bits: Sequence[Tensor | None],
        on: Tensor | None,
        multiple: int,
        full_range: bool,
        clip_mask: bool,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """dw of every matrix, and of those with a scale its gradient."""
        source = ws[0].dtype
        target = douts[0].dtype
        if target is not torch.bfloat16 and target is not compute_dtype(source):
            target = compute_dtype(source)
            douts = [dout.to(target) for dout in douts]
        dws = [w.new_empty(w.shape) for w in ws]
        dscales = [None if scale is None else scale.new_empty(scale.shape) for scale in scales]
        matrices = [
            (*w.shape, dout.data_ptr(), dout.stride(0), w.data_ptr(), w.stride(0),
             *addresses(*rest))
            for dout, w, *rest in zip(
                douts, ws, scales, steps, bits, dws, dscales, strict=True
            )
        ]  # fmt: skip
        run(
            "weight_cast_backward", ws[0], matrices, *addresses(on), DTYPE_CODES[source],
            DTYPE_CODES[target], multiple, full_range, clip_mask,
        )  # fmt: skip
        return dws, dscales

    return {"forward": forward, "into": write, "backward": backward}
