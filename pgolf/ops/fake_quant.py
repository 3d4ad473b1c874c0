"""Fake quantisation: weights as their integer grid will decode them, in the forward pass.

The grid is that of `int_grid`, which export uses: to the bit in eager mode, compiled for a CPU, and
in our kernels, which round divisions correctly. (Code that torch.compile makes of the reference for
a GPU may divide approximately and move a weight on a tie by one code.) The gradient passes straight
through (Bengio et al. 2013, arXiv 1308.3432), except, if asked, for weights whose code was clipped.

A model casts its weights right after; the operator takes the cast in, and several matrices in one
launch: alone it would only add launches to what torch.compile fuses anyway.
Shapes: w (R, C), clip_factor (R,), steps (R,); bits and on 0-d.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.ops import row_cast
from pgolf.ops.derivatives import once, register_gradient
from pgolf.ops.inputs import Inputs, check_tensors, outside_autocast
from pgolf.ops.int_grid import BITS, grid
from pgolf.ops.registry import (
    Operator,
    Run,
    Sample,
    Work,
    check_alike,
    compute_dtype,
    in_cpp,
    in_cuda,
    in_triton,
    launcher,
    nbytes,
    register,
    resolve,
    run_cpp,
    run_cuda,
    unit_stride,
)

_INPUTS = Inputs("fake_quant", ("w", "clip_factor"), alike=("w",))


@outside_autocast
def reference(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`fake_quant` in plain torch."""
    wide = w.detach().to(compute_dtype(w.dtype))
    value, _, inside = grid(wide, clip_factor.to(wide.dtype), bits, floor, multiple, full_range)
    value = torch.where(on > 0, value, wide)
    through = torch.where(inside | ~(on > 0), w, w.detach()) if clip_mask else w
    # The bracket is 0 where w is finite: the value comes out to the bit, w keeps the gradient.
    return (value + (through - through.detach())).to(dtype or w.dtype)


def check_matrix(name: str, w: Tensor) -> None:
    if w.dim() != 2:
        raise ValueError(f"{name}: w is {tuple(w.shape)}: it has to be (rows, columns)")
    check_alike(name, w=w)


def check_grid(name: str, w: Tensor, clip_factor: Tensor, bits: Tensor, on: Tensor) -> None:
    """Raise ValueError unless these are a grid's, for the rows of w."""
    if not w.size(1):
        raise ValueError(f"{name}: w is {tuple(w.shape)}: rows of no elements have no step")
    if clip_factor.shape != w.shape[:1] or clip_factor.dtype != torch.float32:
        raise ValueError(
            f"{name}: clip_factor is {clip_factor.dtype} {tuple(clip_factor.shape)}: for these "
            f"rows it has to be float32 ({w.size(0)},)"
        )
    for what, t in (("bits", bits), ("on", on)):
        if t.dim() or t.dtype != torch.float32:
            raise ValueError(
                f"{name}: {what} is {t.dtype} {tuple(t.shape)}: it has to be a number or a "
                "float32 tensor of no dimensions"
            )
    for what, t in (("clip_factor", clip_factor), ("bits", bits), ("on", on)):
        if t.device != w.device:
            raise ValueError(f"{name}: {what} is on {t.device}, w on {w.device}")


def check_options(name: str, floor: float, multiple: int, dtype: torch.dtype | None) -> None:
    if multiple < 1:
        raise ValueError(f"{name}: multiple={multiple}: it has to be 1 or more")
    if not 0 <= floor < math.inf:  # NaN too
        raise ValueError(f"{name}: floor={floor}: it has to be 0 or more and finite")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{name}: dtype={dtype}: it has to be a float dtype")


def check_bits(bits: float, name: str = "fake_quant") -> None:
    """Raise ValueError unless `bits` is a whole number from 4 to 8."""
    if bits not in BITS:
        raise ValueError(f"{name}: bits={bits:g}: it has to be a whole number, 4 to 8")


def check_bits_where_they_can_be_read(name: str, bits: Sequence[Tensor], impl: str) -> None:
    """Of tensors on a CPU, unless they are traced; the kernels of a GPU answer with NaN."""
    if impl in ("reference", "cpu") and not torch.compiler.is_compiling():
        for k in bits:
            if k.device.type == "cpu":
                check_bits(k.item(), name)


def scalar_like(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


def fake_quant(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor | int,
    on: Tensor | bool,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """w (R, C) as it will be decoded, with a straight-through gradient.

    Args:
        w: fp32, bf16 or fp64 (that only on a CPU); the grid is computed in fp32 (fp64 for fp64).
        clip_factor: (R,) fp32 clip of each row as a share of its largest magnitude.
        bits: bits a code, 4 to 8; a 0-d fp32 tensor on w's device can change without recompiling.
            Kernels on a GPU cannot raise: they answer a tensor out of range with NaN.
        on: above 0 applies the grid, 0 returns w; a 0-d fp32 tensor likewise.
        floor, multiple, full_range: of the grid, as in `int_grid`.
        clip_mask: no gradient for weights whose code was clipped.
        dtype: of the result; w's if None.
        impl: 'auto', 'reference', 'cpu' (C++), 'triton' or 'cuda' (fp32, bf16).

    Returns:
        (R, C) contiguous. While on, a row with a weight that is not finite is NaN.

    Raises:
        ValueError: shapes, dtypes, devices or bits do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    w, clip_factor = _INPUTS(w, clip_factor)
    if not isinstance(bits, Tensor):
        check_bits(bits)
    bits, on = scalar_like(bits, w), scalar_like(on, w)
    options = (floor, multiple, full_range, clip_mask, dtype, impl)
    return fake_quant_all([w], [clip_factor], [bits], on, *options)[0]


def fake_quant_all(
    ws: Sequence[Tensor],
    clip_factors: Sequence[Tensor],
    bits: Sequence[Tensor],
    on: Tensor,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """`fake_quant` of several matrices of one dtype and device, in one launch where that helps.

    Args:
        ws, clip_factors, bits: one a matrix, as in `fake_quant`; bits as tensors.
        on, floor, multiple, full_range, clip_mask, dtype, impl: for all.
    """
    if not ws:
        raise ValueError("fake_quant: the list of matrices is empty: it needs one at least")
    check_options("fake_quant", floor, multiple, dtype)
    check_tensors("fake_quant", "ws", ws)
    for w, *grid_of_w in zip(ws, clip_factors, bits, strict=True):
        check_matrix("fake_quant", w)
        check_grid("fake_quant", w, *grid_of_w, on)
    check_alike("fake_quant", **{f"matrix {i}": w for i, w in enumerate(ws)})
    impl, dtype = resolve("fake_quant", impl, ws[0]), dtype or ws[0].dtype
    options = (floor, multiple, full_range, clip_mask, dtype)
    check_bits_where_they_can_be_read("fake_quant", bits, impl)
    if impl == "reference":
        each = zip(ws, clip_factors, bits, strict=True)
        return [reference(*arguments, on, *options) for arguments in each]
    if torch.compiler.is_compiling():
        return _forward(ws, clip_factors, bits, on, *options, impl)[: len(ws)]
    return list(_Eager.apply(on, options, impl, *ws, *clip_factors, *bits))


# --- the opaque operator --------------------------------------------------------------------------


@torch.library.custom_op("pgolf::fake_quant", mutates_args=())
def _forward(
    ws: Sequence[Tensor],
    clip_factors: Sequence[Tensor],
    bits: Sequence[Tensor],
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
    clip_mask: bool,
    dtype: torch.dtype,
    impl: str,
) -> list[Tensor]:
    """The values, then, if the gradient needs them, the steps."""
    forward = launcher("fake_quant", impl, "forward")
    values, scales = forward(
        [unit_stride(w) for w in ws],
        [factor.contiguous() for factor in clip_factors],
        bits, on, floor, multiple, full_range, dtype, clip_mask,
    )  # fmt: skip
    return [*values, *scales]


@_forward.register_fake
def _(ws, clip_factors, bits, on, floor, multiple, full_range, clip_mask, dtype, impl):
    wide = compute_dtype(ws[0].dtype)
    scales = [w.new_empty(w.shape[:1], dtype=wide) for w in ws] if clip_mask else []
    return [*(w.new_empty(w.shape, dtype=dtype) for w in ws), *scales]


@torch.library.custom_op("pgolf::fake_quant_backward", mutates_args=())
def _backward(
    dout: Tensor,
    w: Tensor,
    scale: Tensor,
    bits: Tensor,
    on: Tensor,
    multiple: int,
    full_range: bool,
    impl: str,
) -> Tensor:
    backward = launcher("fake_quant", impl, "backward")
    return backward(unit_stride(dout), unit_stride(w), scale, bits, on, multiple, full_range)


@_backward.register_fake
def _(dout, w, scale, bits, on, multiple, full_range, impl):
    return w.new_empty(w.shape)


def _remember(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ws, _, bits, on, _, ctx.multiple, ctx.full_range, ctx.clip_mask, _, ctx.impl = inputs
    ctx.count, ctx.dtype = len(ws), ws[0].dtype
    if ctx.clip_mask:
        ctx.save_for_backward(on, *ws, *output[ctx.count :], *bits)


def _weight_gradients(ctx: Any, douts: Sequence[Tensor | None]) -> list[Tensor | None]:
    n = ctx.count
    dws = [None if dout is None else dout.to(ctx.dtype) for dout in douts[:n]]
    if ctx.clip_mask:
        on, *rest = ctx.saved_tensors
        saved = zip(dws, rest[:n], rest[n : 2 * n], rest[2 * n :], strict=True)
        options = (on, ctx.multiple, ctx.full_range, ctx.impl)
        dws = [dw if dw is None else _backward(dw, *tensors, *options) for dw, *tensors in saved]
    return dws


def _gradient(ctx: Any, douts: list[Tensor]) -> tuple:
    nothing = [None] * ctx.count
    return _weight_gradients(ctx, douts), nothing, nothing, *(None,) * 7


register_gradient("fake_quant", _forward, _gradient, _remember)


class _Eager(torch.autograd.Function):
    """The same gradient without torch.library's autograd layer, which takes lists apart slowly: a
    good part of the time that quantising the weights of a small model takes.
    """

    @staticmethod
    def forward(ctx: Any, on: Tensor, options: tuple, impl: str, *tensors: Tensor) -> tuple:
        n = len(tensors) // 3
        inputs = (tensors[:n], tensors[n : 2 * n], tensors[2 * n :], on, *options, impl)
        ctx.set_materialize_grads(False)
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return tuple(output[:n])

    @staticmethod
    @functools.partial(once, "fake_quant")
    def backward(ctx: Any, *douts: Tensor | None) -> tuple:
        return None, None, None, *_weight_gradients(ctx, douts), *(None,) * (2 * ctx.count)


# --- implementations ------------------------------------------------------------------------------


def _launchers(run: Run) -> dict[str, Callable]:
    """Those of `weight_cast` without scales, by `run_cpp` or `run_cuda`."""
    cast = row_cast.launchers(run)

    def forward(ws, clip_factors, bits, on, floor, multiple, full_range, dtype, with_steps):
        nothing, wanted = [None] * len(ws), [with_steps] * len(ws)
        values, steps = cast["forward"](
            ws, nothing, clip_factors, bits, on, floor, multiple, full_range, dtype, wanted
        )
        return values, steps if with_steps else []

    def backward(dout, w, step, bits, on, multiple, full_range):
        arguments = [dout], [w], [None], [step], [bits], on, multiple, full_range, True
        return cast["backward"](*arguments)[0][0]

    return {"forward": forward, "backward": backward}


def samples() -> list[Sample]:
    """Every width, both switches, the published floor, PR 531's and PR 543's grids."""

    def make(rows: int, columns: int, bits: int, on: bool = True, sliced: bool = False, **grid):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(rows + bits)
            w = torch.randn(rows, columns + 8 * sliced, generator=g, dtype=torch.float64) * 0.05
            factor = torch.rand(rows, generator=g).mul(0.5).add(0.5)
            scalars = [torch.tensor(float(x), device=device) for x in (bits, on)]
            w = w.to(device, dtype)[:, :columns]
            return (w, factor.to(device), *scalars), grid

        return build

    return [
        Sample("7x33 int6", make(7, 33, 6)),
        Sample("5x64 int4 mask", make(5, 64, 4, clip_mask=True)),
        Sample("3x100 int5 full range", make(3, 100, 5, full_range=True, clip_mask=True)),
        Sample("9x17 int8/4 sliced", make(9, 17, 8, sliced=True, multiple=4, clip_mask=True)),
        Sample("4x40 int7 floor", make(4, 40, 7, floor=1.0)),
        Sample("6x48 to bf16", make(6, 48, 5, dtype=torch.bfloat16)),
        Sample("4x40 off", make(4, 40, 6, on=False, clip_mask=True)),
        Sample("0x16", make(0, 16, 6)),
        Sample("512x512 int6", make(512, 512, 6), bench=True),
        Sample("1536x512 int6", make(1536, 512, 6), bench=True),
        Sample("512x1536 int6", make(512, 1536, 6), bench=True),
    ]


def cost(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Work, Work]:
    """Forward reads w once and writes the values; with a clip mask, steps too, and a backward."""
    values = w.numel() * (dtype or w.dtype).itemsize
    steps = w.size(0) * compute_dtype(w.dtype).itemsize
    masked = Work(0, nbytes(w, w, bits, on) + steps, nbytes(w))
    return (
        Work(0, nbytes(w, clip_factor, bits, on), values + steps * clip_mask),
        masked if clip_mask else Work(0, 0, 0),
    )


OPERATOR = register(
    Operator(
        name="fake_quant",
        call=fake_quant,
        reference=reference,
        differentiable=("w",),
        implementations={
            "cpu": in_cpp(*row_cast.NEEDED, **_launchers(run_cpp)),
            "cuda": in_cuda(*row_cast.NEEDED, **_launchers(run_cuda)),
            "triton": in_triton(
                "fake_quant", forward="fake_quant_all", backward="fake_quant_backward"
            ),
        },
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cpu compiled": [("reference", "torch.compile fuses it with the cast to bf16")],
            "cuda": [("triton", "fewer launches than compiled (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
    )
)
