"""Fake quantisation of weights on a grid of k bits a row, bit for bit the one that is exported.

    qmax  = 2^(k-1) - 1
    s     = fp16(clamp(max(amax|w| clip_factor, floor) / qmax, 2^-24, 65504))
    code  = round_half_even(w / s), to a multiple if asked for, clamped to -qmax..qmax
    value = code s

The grid's definition is pgolf.ops.int_grid's. To agree with it to the bit, divisions are rounded
correctly (`/` is not on a GPU) and no sum follows a product, which a GPU would fuse. A NaN or an
infinity makes its whole row NaN. bits and on are 0-d tensors, read on the device, so that a change
needs neither a new kernel nor a synchronisation; k other than 4 to 8 gives NaN everywhere.
Shapes: w, value, dout, dw (R, C), clip_factor and scale (R,).
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.launch import cdiv, launch, on_device_of, pick

SMALLEST_STEP = tl.constexpr(2.0**-24)
LARGEST_STEP = tl.constexpr(65504.0)
WHOLE = tl.constexpr(2.0**23)  # float32 is whole from here on
SIGN = tl.constexpr(-(2**31))

MATRICES = 8  # a launch, at most: the kernel has a branch for each


@triton.jit
def largest_code(bits):
    """qmax for the 0-d tensor bits, and whether these are bits that the grid has."""
    k = tl.load(bits)
    known = (k >= 4.0) & (k <= 8.0)
    shift = tl.where(known, k, 4.0).to(tl.int32) - 1
    known = known & (k == (shift + 1).to(tl.float32))
    return ((1 << shift) - 1).to(tl.float32), known


@triton.jit
def round_half_even(x):
    """x to the nearest whole number, ties to even; keeps the sign of zero, infinity and NaN.

    Beyond 2^23 it may be off by one: the clamp to at most 128 codes hides that.
    """
    rounded = (tl.abs(x) + WHOLE) - WHOLE
    sign = x.to(tl.int32, bitcast=True) & SIGN
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def unclamped_codes(w, scale, MULTIPLE: tl.constexpr):
    codes = round_half_even(tl.div_rn(w, scale))
    if MULTIPLE != 1:
        codes = round_half_even(tl.div_rn(codes, MULTIPLE * 1.0)) * MULTIPLE
    return codes


@triton.jit
def row_scale(amax, clip_factor, qmax, floor):
    """The step of each row as fp16 rounds it, in fp32; NaN stays NaN."""
    clip = tl.maximum(amax * clip_factor, floor, propagate_nan=tl.PropagateNan.ALL)
    step = tl.div_rn(clip, qmax)
    step = tl.clamp(step, SMALLEST_STEP, LARGEST_STEP, propagate_nan=tl.PropagateNan.ALL)
    return step.to(tl.float16).to(tl.float32)


@triton.jit
def magnitude_bits(w):
    """|w| as integers of the same order, in which NaN is the largest: a maximum keeps it."""
    return tl.abs(w.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def quantise(w, scale, qmax, replace, MULTIPLE: tl.constexpr, FULL_RANGE: tl.constexpr):
    """The values that the weights decode to, or the weights where nothing is replaced."""
    wide = w.to(tl.float32)
    codes = unclamped_codes(wide, scale, MULTIPLE)
    lowest = -qmax - 1.0 if FULL_RANGE else -qmax
    codes = tl.clamp(codes, lowest, qmax, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(replace, codes * scale, wide)


@triton.jit
def fake_quant_row(
    w, clip_factor, bits, on, value, scale, row, columns, stride, floor,
    MULTIPLE: tl.constexpr, FULL_RANGE: tl.constexpr, BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a matrix; one that fits into a block is read once. scale may be None."""
    column = tl.arange(0, BLOCK)
    w_at = w + row.to(tl.int64) * stride + column
    value_at = value + row.to(tl.int64) * columns + column

    block = tl.load(w_at, mask=column < columns, other=0.0)
    largest = magnitude_bits(block)
    if not ONE_BLOCK:
        for start in range(BLOCK, columns, BLOCK):
            more = tl.load(w_at + start, mask=start + column < columns, other=0.0)
            largest = tl.maximum(largest, magnitude_bits(more))
    amax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    amax += amax - amax  # NaN where a weight is infinite

    qmax, known = largest_code(bits)
    qmax = tl.where(known, qmax, float("nan"))
    replace = (tl.load(on) > 0.0) | (known == 0)
    step = row_scale(amax, tl.load(clip_factor + row), qmax, floor)
    if scale is not None:
        tl.store(scale + row, step)
    if ONE_BLOCK:
        values = quantise(block, step, qmax, replace, MULTIPLE, FULL_RANGE)
        tl.store(value_at, values.to(value.dtype.element_ty), mask=column < columns)
    else:
        for start in range(0, columns, BLOCK):
            inside = start + column < columns
            again = tl.load(w_at + start, mask=inside, other=0.0)
            values = quantise(again, step, qmax, replace, MULTIPLE, FULL_RANGE)
            tl.store(value_at + start, values.to(value.dtype.element_ty), mask=inside)


@triton.jit
def fake_quant_forward_kernel(
    ws, clip_factors, bits, on, values, scales, first_rows, columns, strides, floor,
    MULTIPLE: tl.constexpr, FULL_RANGE: tl.constexpr, BLOCKS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, of whichever matrix it lies in: first_rows are where each one begins."""
    row = tl.program_id(0)
    for i in tl.static_range(len(ws)):
        if (row >= first_rows[i]) & (row < first_rows[i + 1]):
            fake_quant_row(
                ws[i], clip_factors[i], bits[i], on, values[i], scales[i], row - first_rows[i],
                columns[i], strides[i], floor, MULTIPLE, FULL_RANGE, BLOCKS[i], ONE_BLOCK,
            )  # fmt: skip


@triton.jit
def fake_quant_backward_kernel(
    dout, w, scale, bits, on, dw, columns, dout_stride, w_stride,
    MULTIPLE: tl.constexpr, FULL_RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    ws = tl.load(w + row.to(tl.int64) * w_stride + column, mask=inside, other=0.0)
    gradient = tl.load(dout + row.to(tl.int64) * dout_stride + column, mask=inside, other=0.0)
    codes = unclamped_codes(ws.to(tl.float32), tl.load(scale + row), MULTIPLE)
    qmax, known = largest_code(bits)
    lowest = -qmax - 1.0 if FULL_RANGE else -qmax
    passes = ((codes >= lowest) & (codes <= qmax)) | ((tl.load(on) > 0.0) == 0)
    gradient = tl.where(passes, gradient, 0.0)
    gradient = tl.where(known, gradient, float("nan"))
    dw_at = dw + row.to(tl.int64) * columns + column
    tl.store(dw_at, gradient.to(dw.dtype.element_ty), mask=inside)


def fake_quant_all(
    ws: Sequence[Tensor],
    clip_factors: Sequence[Tensor],
    bits: Sequence[Tensor],
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
    dtype: torch.dtype,
    with_scales: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """(values, scales): every w (R, C) on its grid, or w where on is 0, cast to `dtype`; the steps
    (R,) in fp32, or no list of them if nobody asks. Up to MATRICES of them in one launch.

    Every w is fp32 or bf16, all alike, with a contiguous last dimension; clip factors (R,) are fp32
    and contiguous; bits and on are 0-d fp32 tensors on the same device, on 0 or 1.
    """
    values = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in ws]
    scales = [torch.empty(w.shape[:1], dtype=torch.float32, device=w.device) for w in ws]
    scales = scales if with_scales else [None] * len(ws)
    for start in range(0, len(ws), MATRICES):
        part = slice(start, start + MATRICES)
        columns = [w.size(1) for w in ws[part]]
        config = pick("fake_quant_forward_kernel", columns=max(columns))
        largest = config.blocks["BLOCK"]
        ends = tuple(itertools.accumulate((w.size(0) for w in ws[part]), initial=0))
        with on_device_of(ws[0]):
            launch(
                fake_quant_forward_kernel,
                (ends[-1],),
                config,
                ws=tuple(ws[part]),
                clip_factors=tuple(clip_factors[part]),
                bits=tuple(bits[part]),
                on=on,
                values=tuple(values[part]),
                scales=tuple(scales[part]),
                first_rows=ends,
                columns=tuple(columns),
                strides=tuple(w.stride(0) for w in ws[part]),
                floor=floor,
                MULTIPLE=multiple,
                FULL_RANGE=full_range,
                BLOCKS=tuple(min(triton.next_power_of_2(c), largest) for c in columns),
                ONE_BLOCK=max(columns) <= largest,
            )
    return values, scales if with_scales else []


def fake_quant(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
) -> tuple[Tensor, Tensor]:
    """(value, scale) of one matrix, in w's dtype; arguments as in `fake_quant_all`."""
    (value,), (scale,) = fake_quant_all(
        [w], [clip_factor], [bits], on, floor, multiple, full_range, w.dtype, True
    )
    return value, scale


def fake_quant_backward(
    dout: Tensor,
    w: Tensor,
    scale: Tensor,
    bits: Tensor,
    on: Tensor,
    multiple: int,
    full_range: bool,
) -> Tensor:
    """dw (R, C), contiguous: dout where the code was not clamped or on is 0, else 0.

    Arguments as in `fake_quant`; dout has w's dtype and a contiguous last dimension, scale is what
    `fake_quant` returned.
    """
    rows, columns = w.shape
    dw = torch.empty((rows, columns), dtype=w.dtype, device=w.device)
    config = pick("fake_quant_backward_kernel", columns=columns)
    with on_device_of(w):
        launch(
            fake_quant_backward_kernel,
            (rows, cdiv(columns, config.blocks["BLOCK"])),
            config,
            dout=dout,
            w=w,
            scale=scale,
            bits=bits,
            on=on,
            dw=dw,
            columns=columns,
            dout_stride=dout.stride(0),
            w_stride=w.stride(0),
            MULTIPLE=multiple,
            FULL_RANGE=full_range,
        )
    return dw


def forward(
    ws: Sequence[Tensor],
    scales: Sequence[None],
    clip_factors: Sequence[Tensor],
    bits: Sequence[Tensor],
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
    dtype: torch.dtype,
    with_steps: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """`fake_quant_all` as pgolf.ops.weight_cast calls it; with_steps are all alike."""
    rest = (floor, multiple, full_range, dtype, any(with_steps))
    return fake_quant_all(ws, clip_factors, bits, on, *rest)


def backward(
    douts: Sequence[Tensor],
    ws: Sequence[Tensor],
    scales: Sequence[None],
    steps: Sequence[Tensor],
    bits: Sequence[Tensor],
    on: Tensor,
    multiple: int,
    full_range: bool,
    clip_mask: bool,
) -> tuple[list[Tensor], list[None]]:
    """`fake_quant_backward` of each matrix, as pgolf.ops.weight_cast calls it."""
    each = zip(douts, ws, steps, bits, strict=True)
    dws = [
        fake_quant_backward(dout.to(w.dtype), w, step, k, on, multiple, full_range)
        for dout, w, step, k in each
    ]
    return dws, []
