"""Fake quantisation of weights on a grid of k bits a row, bit for bit the one that is exported.

    qmax  = 2^(k-1) - 1
    s     = fp16(clamp(max(amax|w| clip_factor, floor) / qmax, 2^-24, 65504))
    code  = round_half_even(w / s), to a multiple if asked for, clamped to -qmax..qmax
    value = code s

The grid's definition is pgolf.ops.fake_quant's. To agree with it to the bit, divisions are rounded
correctly (`/` is not on a GPU) and no sum follows a product, which a GPU would fuse. NaN in a row
reaches the whole row, as in torch. bits and on are 0-d tensors, read on the device, so that a
change needs neither a new kernel nor a synchronisation; k other than 4 to 8 gives NaN everywhere.
Shapes: w, value, dout, dw (R, C), clip_factor and scale (R,).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.launch import launch, on_device_of, pick

SMALLEST_STEP = tl.constexpr(2.0**-24)
LARGEST_STEP = tl.constexpr(65504.0)
NAN = tl.constexpr(float("nan"))
WHOLE = tl.constexpr(2.0**23)  # float32 is whole from here on
SIGN = tl.constexpr(-(2**31))


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
    """x to the nearest whole number, ties to even; keeps the sign of zero, infinity and NaN."""
    magnitude = tl.abs(x)
    rounded = (magnitude + WHOLE) - WHOLE
    sign = x.to(tl.int32, bitcast=True) & SIGN
    signed = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(magnitude < WHOLE, signed, x)


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
    codes = unclamped_codes(w.to(tl.float32), scale, MULTIPLE)
    lowest = -qmax - 1.0 if FULL_RANGE else -qmax
    codes = tl.clamp(codes, lowest, qmax, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(replace, (codes * scale).to(w.dtype), w)


@triton.jit
def fake_quant_forward_kernel(
    w, clip_factor, bits, on, value, scale, rows, columns, stride, floor,
    MULTIPLE: tl.constexpr, FULL_RANGE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    w_at = w + row.to(tl.int64)[:, None] * stride + column
    value_at = value + row.to(tl.int64)[:, None] * columns + column
    real = row < rows
    inside = real[:, None] & (column < columns)

    block = tl.load(w_at, mask=inside, other=0.0)
    largest = magnitude_bits(block)
    if not ONE_BLOCK:
        for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
            more = real[:, None] & (start + column < columns)
            block = tl.load(w_at + start, mask=more, other=0.0)
            largest = tl.maximum(largest, magnitude_bits(block))
    amax = tl.max(largest, axis=1).to(tl.float32, bitcast=True)

    qmax, known = largest_code(bits)
    qmax = tl.where(known, qmax, NAN)
    replace = (tl.load(on) != 0.0) | (known == 0)
    steps = row_scale(amax, tl.load(clip_factor + row, mask=real, other=0.0), qmax, floor)
    tl.store(scale + row, steps, mask=real)
    steps = steps[:, None]
    if ONE_BLOCK:
        values = quantise(block, steps, qmax, replace, MULTIPLE, FULL_RANGE)
        tl.store(value_at, values, mask=inside)
    else:
        for start in range(0, columns, BLOCK_COLUMNS):
            more = real[:, None] & (start + column < columns)
            block = tl.load(w_at + start, mask=more, other=0.0)
            values = quantise(block, steps, qmax, replace, MULTIPLE, FULL_RANGE)
            tl.store(value_at + start, values, mask=more)


@triton.jit
def fake_quant_backward_kernel(
    dout, w, scale, bits, on, dw, rows, columns, dout_stride, w_stride,
    MULTIPLE: tl.constexpr, FULL_RANGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    real = row < rows
    inside = real[:, None] & (column < columns)
    long_row = row.to(tl.int64)[:, None]

    ws = tl.load(w + long_row * w_stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dout + long_row * dout_stride + column, mask=inside, other=0.0)
    codes = unclamped_codes(ws, tl.load(scale + row, mask=real, other=1.0)[:, None], MULTIPLE)
    qmax, known = largest_code(bits)
    lowest = -qmax - 1.0 if FULL_RANGE else -qmax
    passes = ((codes >= lowest) & (codes <= qmax)) | (tl.load(on) == 0.0)
    gradient = tl.where(passes, gradient, 0.0)
    gradient = tl.where(known, gradient, NAN)
    tl.store(dw + long_row * columns + column, gradient.to(dw.dtype.element_ty), mask=inside)


def fake_quant(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
) -> tuple[Tensor, Tensor]:
    """(value, scale): w (R, C) on its grid, or w where on is 0, contiguous; the steps (R,) in fp32.

    w is fp32 or bf16 with a contiguous last dimension, clip_factor (R,) fp32 and contiguous, bits
    and on are 0-d fp32 tensors on w's device, on 0 or 1.
    """
    rows, columns = w.shape
    value = torch.empty((rows, columns), dtype=w.dtype, device=w.device)
    scale = torch.empty((rows,), dtype=torch.float32, device=w.device)
    config = pick("fake_quant_forward_kernel", columns=columns)
    with on_device_of(w):
        launch(
            fake_quant_forward_kernel,
            (triton.cdiv(rows, config.blocks["BLOCK_ROWS"]),),
            config,
            w=w,
            clip_factor=clip_factor,
            bits=bits,
            on=on,
            value=value,
            scale=scale,
            rows=rows,
            columns=columns,
            stride=w.stride(0),
            floor=floor,
            MULTIPLE=multiple,
            FULL_RANGE=full_range,
            ONE_BLOCK=columns <= config.blocks["BLOCK_COLUMNS"],
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
    blocks = config.blocks["BLOCK_ROWS"], config.blocks["BLOCK_COLUMNS"]
    with on_device_of(w):
        launch(
            fake_quant_backward_kernel,
            (triton.cdiv(rows, blocks[0]), triton.cdiv(columns, blocks[1])),
            config,
            dout=dout,
            w=w,
            scale=scale,
            bits=bits,
            on=on,
            dw=dw,
            rows=rows,
            columns=columns,
            dout_stride=dout.stride(0),
            w_stride=w.stride(0),
            MULTIPLE=multiple,
            FULL_RANGE=full_range,
        )
    return dw
