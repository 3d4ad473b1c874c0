"""Weights as a GEMM takes them, in one pass: on the grid of export, scaled by rows, cast.

    out = scale Q(w)          Q: `fake_quant`'s grid, or the identity; scale: one factor a row, or 1

A branch x + a (y W^T), whose vector a scales the output's columns, is x + y (a W)^T: folded into
the rows of W, the factor costs no pass over the tokens. The grid comes first, as export knows
nothing of a. The gradient passes straight through the grid:

    dw = scale dout,   dscale = rowsum(dout Q(w))

fake_quant is the case without a scale, and runs in the same kernels.
Shapes: w, out (R, C), scale, clip_factor, steps (R,); bits and on 0-d.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.derivatives import once, register_gradient
from pgolf.ops.fake_quant import (
    check_bits,
    check_bits_where_they_can_be_read,
    check_grid,
    check_matrix,
    check_options,
    scalar_like,
)
from pgolf.ops.fake_quant import reference as on_grid
from pgolf.ops.inputs import Inputs, check_tensors, outside_autocast
from pgolf.ops.registry import (
    Operator,
    Sample,
    Work,
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
    unit_stride,
)
from pgolf.ops.row_cast import NEEDED, launchers

_INPUTS = Inputs(
    "weight_cast", ("w", "scale", "clip_factor"), alike=("w",), optional=("scale", "clip_factor")
)


@outside_autocast
def reference(
    w: Tensor,
    scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    bits: Tensor | None = None,
    on: Tensor | None = None,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight_cast` in plain torch."""
    if clip_factor is None:
        q = w.to(compute_dtype(w.dtype))
    else:
        grid = (clip_factor, bits, on, floor, multiple, full_range, clip_mask)
        q = on_grid(w, *grid, dtype=compute_dtype(w.dtype))
    return (q if scale is None else q * scale[:, None]).to(dtype or w.dtype)


def _check(
    w: Tensor,
    scale: Tensor | None,
    clip_factor: Tensor | None,
    bits: Tensor | None,
    on: Tensor | None,
) -> None:
    check_matrix("weight_cast", w)
    if scale is not None:
        if scale.shape != w.shape[:1] or scale.dtype != compute_dtype(w.dtype):
            raise ValueError(
                f"weight_cast: scale is {scale.dtype} {tuple(scale.shape)}: for these rows it has "
                f"to be {compute_dtype(w.dtype)} ({w.size(0)},)"
            )
        if scale.device != w.device:
            raise ValueError(f"weight_cast: scale is on {scale.device}, w on {w.device}")
    if (clip_factor is None) != (bits is None) or (bits is not None and on is None):
        raise ValueError(
            "weight_cast: a grid takes clip_factor, bits and on: give all of them or neither "
            "clip_factor nor bits"
        )
    if clip_factor is not None:
        check_grid("weight_cast", w, clip_factor, bits, on)


def weight_cast(
    w: Tensor,
    scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    bits: Tensor | int | None = None,
    on: Tensor | bool | None = None,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """w (R, C) on its grid, if it has one, times scale, in another dtype.

    Args:
        w: fp32, bf16 or fp64 (that only on a CPU); computed in fp32 (fp64 for fp64).
        scale: (R,) factor of each row, in the dtype that w is computed in; 1 if None.
        clip_factor, bits, on, floor, multiple, full_range, clip_mask: of the grid, as in
            `fake_quant`; no grid without clip_factor and bits.
        dtype: of the result; w's if None.
        impl: 'auto', 'reference', 'cpu' (C++) or 'cuda' (fp32, bf16).

    Returns:
        (R, C) contiguous. While the grid is on, a row with a weight that is not finite is NaN.

    Raises:
        ValueError: shapes, dtypes, devices or bits do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    w, scale, clip_factor = _INPUTS(w, scale, clip_factor)
    if bits is not None and not isinstance(bits, Tensor):
        check_bits(bits, "weight_cast")
    bits, on = (None if x is None else scalar_like(x, w) for x in (bits, on))
    options = (floor, multiple, full_range, clip_mask, dtype, impl)
    return weight_cast_all([w], [scale], [clip_factor], [bits], on, *options)[0]


def weight_cast_all(
    ws: Sequence[Tensor],
    scales: Sequence[Tensor | None] | None = None,
    clip_factors: Sequence[Tensor | None] | None = None,
    bits: Sequence[Tensor | None] | None = None,
    on: Tensor | None = None,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """`weight_cast` of several matrices of one dtype and device, in one launch.

    Args:
        ws, scales, clip_factors, bits: one a matrix, as in `weight_cast`, or None where the matrix
            has none, or for all of them; bits as tensors.
        on, floor, multiple, full_range, clip_mask, dtype, impl: for all.
    """
    if not ws:
        raise ValueError("weight_cast: the list of matrices is empty: it needs one at least")
    check_options("weight_cast", floor, multiple, dtype)
    check_tensors("weight_cast", "ws", ws)
    nothing = [None] * len(ws)
    scales, clip_factors, bits = (x or nothing for x in (scales, clip_factors, bits))
    each = list(zip(ws, scales, clip_factors, bits, strict=True))
    for arguments in each:
        _check(*arguments, on)
    check_alike("weight_cast", **{f"matrix {i}": w for i, w in enumerate(ws)})
    impl, dtype = resolve("weight_cast", impl, ws[0]), dtype or ws[0].dtype
    options = (floor, multiple, full_range, clip_mask, dtype)
    held = [k for k in bits if k is not None]
    check_bits_where_they_can_be_read("weight_cast", held, impl)
    if impl == "reference":
        return [reference(*arguments, on, *options) for arguments in each]
    scaled, gridded = ([x is not None for x in xs] for xs in (scales, bits))
    factors = [scale for scale in scales if scale is not None]
    clips = [clip for clip in clip_factors if clip is not None]
    if torch.compiler.is_compiling():
        lists = (ws, factors, scaled, clips, held, gridded)
        return _forward(*lists, on, *options, impl)[: len(ws)]
    return list(_Eager.apply(scaled, gridded, on, options, impl, *ws, *factors, *clips, *held))


# --- the opaque operator --------------------------------------------------------------------------
#
# torch.library differentiates lists of tensors, not of tensors and None: lists hold what is there,
# and lists of bool say which matrices it belongs to.


def _spread(items: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    """One a matrix: the next item where there is one, else None."""
    left = iter(items)
    return [next(left) if is_there else None for is_there in there]


def _stepped(scaled: Sequence[bool], gridded: Sequence[bool], clip_mask: bool) -> list[bool]:
    """The matrices whose gradients need the grid."""
    return [g and (s or clip_mask) for s, g in zip(scaled, gridded, strict=True)]


@torch.library.custom_op("pgolf::weight_cast", mutates_args=())
def _forward(
    ws: Sequence[Tensor], scales: Sequence[Tensor], scaled: Sequence[bool],
    clip_factors: Sequence[Tensor], bits: Sequence[Tensor], gridded: Sequence[bool],
    on: Tensor | None, floor: float, multiple: int, full_range: bool, clip_mask: bool,
    dtype: torch.dtype, impl: str,
) -> list[Tensor]:  # fmt: skip
    """The results, then the steps that the gradients need."""
    outs, steps = launcher("weight_cast", impl, "forward")(
        [unit_stride(w) for w in ws],
        _spread([scale.contiguous() for scale in scales], scaled),
        _spread([factor.contiguous() for factor in clip_factors], gridded),
        _spread(bits, gridded),
        on, floor, multiple, full_range, dtype, _stepped(scaled, gridded, clip_mask),
    )  # fmt: skip
    return [*outs, *(step for step in steps if step is not None)]


@_forward.register_fake
def _(
    ws, scales, scaled, clip_factors, bits, gridded, on, floor, multiple, full_range, clip_mask,
    dtype, impl,
):  # fmt: skip
    computed, stepped = compute_dtype(ws[0].dtype), _stepped(scaled, gridded, clip_mask)
    steps = [
        w.new_empty(w.shape[:1], dtype=computed)
        for w, needed in zip(ws, stepped, strict=True)
        if needed
    ]
    return [*(w.new_empty(w.shape, dtype=dtype) for w in ws), *steps]


@torch.library.custom_op("pgolf::weight_cast_backward", mutates_args=())
def _backward(
    douts: Sequence[Tensor], ws: Sequence[Tensor], scales: Sequence[Tensor],
    scaled: Sequence[bool], steps: Sequence[Tensor], bits: Sequence[Tensor],
    stepped: Sequence[bool], on: Tensor | None, multiple: int, full_range: bool, clip_mask: bool,
    impl: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of ws, then those of scales."""
    dws, dscales = launcher("weight_cast", impl, "backward")(
        [unit_stride(dout) for dout in douts],
        [unit_stride(w) for w in ws],
        _spread([scale.contiguous() for scale in scales], scaled),
        _spread(steps, stepped),
        _spread(bits, stepped),
        on, multiple, full_range, clip_mask,
    )  # fmt: skip
    return [*dws, *(dscale for dscale in dscales if dscale is not None)]


@_backward.register_fake
def _(
    douts, ws, scales, scaled, steps, bits, stepped, on, multiple, full_range, clip_mask, impl
):  # fmt: skip
    return [t.new_empty(t.shape) for t in (*ws, *scales)]


def _remember(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ws, scales, ctx.scaled, _, bits, ctx.gridded, on, _, *options, dtype, ctx.impl = inputs
    ctx.multiple, ctx.full_range, ctx.clip_mask = options
    ctx.count, ctx.dtype = len(ws), ws[0].dtype
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

    def where(there: Sequence[bool]) -> list[bool]:
        return [there[i] for i in flows]

    found = _backward(
        of(douts), of(ws), of(scales), where(ctx.scaled), of(steps), of(bits), where(ctx.stepped),
        on, ctx.multiple, ctx.full_range, ctx.clip_mask, ctx.impl,
    )  # fmt: skip
    dws = dict(zip(flows, found, strict=False))
    dscales = dict(zip([i for i in flows if ctx.scaled[i]], found[len(flows) :], strict=True))
    return [dws.get(i) for i in range(n)], [dscales.get(i) for i in range(n) if ctx.scaled[i]]


def _gradient(ctx: Any, douts: list[Tensor]) -> tuple:
    dws, dscales = _gradients(ctx, douts)
    nothing = [None] * sum(ctx.gridded)
    return dws, dscales, None, nothing, nothing, *(None,) * 8


register_gradient("weight_cast", _forward, _gradient, _remember)


class _Eager(torch.autograd.Function):
    """The same gradient without torch.library's autograd layer, which takes lists apart slowly."""

    @staticmethod
    def forward(
        ctx: Any,
        scaled: list[bool],
        gridded: list[bool],
        on: Tensor | None,
        options: tuple,
        impl: str,
        *tensors: Tensor,
    ) -> tuple:
        n, s, g = len(scaled), sum(scaled), sum(gridded)
        ws, scales, grids = tensors[:n], tensors[n : n + s], tensors[n + s :]
        inputs = (ws, scales, scaled, grids[:g], grids[g:], gridded, on, *options, impl)
        ctx.set_materialize_grads(False)
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return tuple(output[:n])

    @staticmethod
    @functools.partial(once, "weight_cast")
    def backward(ctx: Any, *douts: Tensor | None) -> tuple:
        dws, dscales = _gradients(ctx, douts)
        return *(None,) * 5, *dws, *dscales, *(None,) * (2 * sum(ctx.gridded))


# --- implementations ------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """With a scale, a grid, both and neither; grids as in `fake_quant`."""

    def make(rows: int, columns: int, scaled: bool, bits: int = 0, on: bool = True, **rest):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(rows + bits)
            w = torch.randn(rows, columns, generator=g, dtype=torch.float64) * 0.05
            scale = torch.randn(rows, generator=g, dtype=torch.float64)
            factor = torch.rand(rows, generator=g).mul(0.5).add(0.5).to(device)
            named = {"scale": scale.to(device, compute_dtype(dtype))} if scaled else {}
            if bits:
                k, switch = (torch.tensor(float(x), device=device) for x in (bits, on))
                named |= {"clip_factor": factor, "bits": k, "on": switch}
            return (w.to(device, dtype),), named | rest

        return build

    bf16 = torch.bfloat16
    return [
        Sample("7x33 scale", make(7, 33, True)),
        Sample("6x48 to bf16", make(6, 48, False, dtype=bf16)),
        Sample("5x64 int6 scale to bf16", make(5, 64, True, 6, dtype=bf16)),
        Sample("3x100 int5 scale mask", make(3, 100, True, 5, full_range=True, clip_mask=True)),
        Sample("4x1700 int8/4 mask", make(4, 1700, False, 8, multiple=4, clip_mask=True)),
        Sample("4x40 off scale", make(4, 40, True, 6, on=False, clip_mask=True)),
        Sample("0x16 scale", make(0, 16, True)),
        Sample("1536x512 to bf16", make(1536, 512, False, dtype=bf16), bench=True),
        Sample("512x1536 scale to bf16", make(512, 1536, True, dtype=bf16), bench=True),
        Sample("512x1536 int6 scale to bf16", make(512, 1536, True, 6, dtype=bf16), bench=True),
    ]


def cost(
    w: Tensor,
    scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    bits: Tensor | None = None,
    on: Tensor | None = None,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Work, Work]:
    """Both passes read and write everything once; without scale and mask the gradient is a cast."""
    dtype = dtype or w.dtype
    out = w.numel() * dtype.itemsize
    stepped = clip_factor is not None and (clip_mask or scale is not None)
    steps = w.size(0) * compute_dtype(w.dtype).itemsize * stepped
    forward = Work(0, nbytes(w, scale, clip_factor, bits, on), out + steps)
    if stepped:
        return forward, Work(0, out + nbytes(w, scale, bits, on) + steps, nbytes(w, scale))
    if scale is not None:
        return forward, Work(0, out + nbytes(w, scale), nbytes(w, scale))
    return forward, Work(0, 0, 0) if dtype is w.dtype else Work(0, out, nbytes(w))


OPERATOR = register(
    Operator(
        name="weight_cast",
        call=weight_cast,
        reference=reference,
        differentiable=("w", "scale"),
        implementations={
            "cpu": in_cpp(*NEEDED, **launchers(run_cpp)),
            "cuda": in_cuda(*NEEDED, **launchers(run_cuda)),
        },
        preferred={
            "cpu": [("cpu", "C++, one pass where eager makes several (python -m bench ops)")],
            "cpu compiled": [("reference", "torch.compile fuses it, as it does fake_quant")],
            "cuda": [("cuda", "one launch for all matrices, each read and written once")],
        },
        samples=samples,
        cost=cost,
    )
)
