"""Integer grids per row: the one definition that export, decoding and late QAT share.

A row of weights is stored as signed codes of k bits and one fp16 step s:

    qmax  = 2^(k-1) - 1
    s     = fp16(max(clip, floor) / qmax)          clip: the largest magnitude that is kept
    code  = clamp(round_half_even(w / s), -qmax, qmax)
    value = code * s

Fake quantisation replaces w by `value` in the forward pass and passes the gradient straight
through (Bengio et al. 2013, arXiv 1308.3432), except, if asked, for weights whose code was clipped.
Codes divide by the step that is stored, so training sees what is decoded: to the bit in eager mode,
compiled for a CPU, and in our kernels, which round divisions correctly. Code that torch.compile
makes of the reference for a GPU may divide approximately and move a weight on a tie by one code.
Shapes: w (R, C), clip and scale (R,).
"""

from typing import Any

import torch
from torch import Tensor

from pgolf import extension
from pgolf.ops.registry import (
    DTYPE_CODES,
    Implementation,
    Operator,
    Sample,
    Work,
    check_alike,
    launcher,
    lazily,
    nbytes,
    no_extension,
    no_triton,
    register,
    resolve,
    unit_stride,
)

SMALLEST_STEP = 2.0**-24  # least positive fp16: an all-zero row must not divide by zero
LARGEST_STEP = 65504.0


def _round_fp16(x: Tensor) -> Tensor:
    """x (fp32, SMALLEST_STEP to LARGEST_STEP) to the nearest fp16 number, ties to even.

    Not .half().float(): torch.compile drops such a pair of casts, and training would then divide by
    steps that are not the stored ones.
    """
    bits = x.view(torch.int32)
    normal = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)
    subnormal = (x + 0.75) - 0.75  # fp32 between 0.5 and 1 is spaced as fp16 below 2^-14
    return torch.where(x < 2.0**-14, subnormal, normal)


def _qmax(bits: int | Tensor, like: Tensor) -> Tensor:
    """Largest code, as a tensor: CUDA divides by a Python number through its rounded reciprocal."""
    levels = torch.as_tensor(2 ** (bits - 1), dtype=like.dtype, device=like.device)
    return levels.round() - 1  # a GPU's power function need not be exact


def row_scale(clip: Tensor, bits: int | Tensor, floor: float = 0.0) -> Tensor:
    """Step of each row, rounded to fp16 but held in clip's dtype.

    Args:
        clip: (R,) magnitudes that the largest code stands for.
        bits: bits a code, 4 to 8; a 0-d tensor keeps a compiled graph free of recompiles.
        floor: least clip; the seed scripts use 1.0.
    """
    step = clip.clamp_min(floor) / _qmax(bits, clip)
    return _round_fp16(step.clamp(SMALLEST_STEP, LARGEST_STEP).float()).to(clip.dtype)


def _nearest(w: Tensor, scale: Tensor, multiple: int) -> Tensor:
    """Codes before clipping."""
    codes = torch.round(w / scale[:, None])
    return codes if multiple == 1 else torch.round(codes / multiple) * multiple


def _clip(codes: Tensor, bits: int | Tensor, full_range: bool) -> Tensor:
    qmax = _qmax(bits, codes)
    return codes.clamp(-qmax - 1 if full_range else -qmax, qmax)


def row_codes(
    w: Tensor, scale: Tensor, bits: int | Tensor, multiple: int = 1, full_range: bool = False
) -> Tensor:
    """Codes of w (R, C) for steps scale (R,), as whole numbers in w's dtype.

    Args:
        multiple: codes are rounded to a multiple of it (PR 543 stores int8 multiples of 4).
        full_range: use -qmax - 1 too (PR 531).
    """
    return _clip(_nearest(w, scale, multiple), bits, full_range)


def grid(
    w: Tensor, clip_factor: Tensor, bits: Tensor, floor: float, multiple: int, full_range: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, steps, whether the clip left the code as it was) of w (R, C), which is fp32 or fp64.

    The one way from weights to what is decoded, for export and for late QAT.
    """
    scale = row_scale(w.abs().amax(dim=1) * clip_factor, bits, floor)
    codes = _nearest(w, scale, multiple)
    clipped = _clip(codes, bits, full_range)
    return clipped * scale[:, None], scale, codes == clipped


def reference(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
) -> Tensor:
    """`fake_quant` in plain torch."""
    wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    value, _, inside = grid(wide, clip_factor.to(wide.dtype), bits, floor, multiple, full_range)
    value = torch.where(on > 0, value.to(w.dtype), w.detach())
    through = torch.where(inside | (on <= 0), w, w.detach()) if clip_mask else w
    # The bracket is 0 where w is finite: the value comes out to the bit, w keeps the gradient.
    return value + (through - through.detach())


def _check(w: Tensor, clip_factor: Tensor, bits: Tensor, on: Tensor, multiple: int) -> None:
    if w.dim() != 2:
        raise ValueError(f"fake_quant: w is {tuple(w.shape)}: it has to be (rows, columns)")
    if not w.size(1):
        raise ValueError(f"fake_quant: w is {tuple(w.shape)}: rows of no elements have no step")
    check_alike("fake_quant", w=w)
    if clip_factor.shape != w.shape[:1] or clip_factor.dtype != torch.float32:
        raise ValueError(
            f"fake_quant: clip_factor is {clip_factor.dtype} {tuple(clip_factor.shape)}: for these "
            f"rows it has to be float32 ({w.size(0)},)"
        )
    for name, t in (("bits", bits), ("on", on)):
        if t.dim() or t.dtype != torch.float32:
            raise ValueError(
                f"fake_quant: {name} is {t.dtype} {tuple(t.shape)}: it has to be a number or a "
                "float32 tensor of no dimensions"
            )
    for name, t in (("clip_factor", clip_factor), ("bits", bits), ("on", on)):
        if t.device != w.device:
            raise ValueError(f"fake_quant: {name} is on {t.device}, w on {w.device}")
    if multiple < 1:
        raise ValueError(f"fake_quant: multiple={multiple}: it has to be 1 or more")


def check_bits(bits: float) -> None:
    """Raise ValueError unless `bits` is a whole number from 4 to 8."""
    if bits not in range(4, 9):
        raise ValueError(f"fake_quant: bits={bits:g}: it has to be a whole number, 4 to 8")


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
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
    impl: str = "auto",
) -> Tensor:
    """w (R, C) as it will be decoded, with a straight-through gradient.

    Args:
        w: fp32, bf16 or fp64 (not 'triton'); the grid is computed in fp32 (fp64 for fp64).
        clip_factor: (R,) fp32 clip of each row as a share of its largest magnitude.
        bits: bits a code, 4 to 8; a 0-d fp32 tensor on w's device can change without recompiling.
            Kernels on a GPU cannot raise: they answer a tensor out of range with NaN.
        on: above 0 applies the grid, 0 returns w; a 0-d fp32 tensor likewise.
        floor, multiple, full_range: of the grid, as in `row_scale` and `row_codes`.
        clip_mask: no gradient for weights whose code was clipped.
        impl: 'auto', 'reference', 'cpu' (C++) or 'triton' (fp32, bf16).

    Returns:
        (R, C) in w's dtype. A weight that is not finite stays visible, as NaN.

    Raises:
        ValueError: shapes, dtypes, devices or bits do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    if not isinstance(bits, Tensor):
        check_bits(bits)
    bits, on = _scalar(bits, w), _scalar(on, w)
    _check(w, clip_factor, bits, on, multiple)
    impl = resolve("fake_quant", impl, w)
    if impl == "reference":
        if bits.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bits(bits.item())
        return reference(w, clip_factor, bits, on, floor, multiple, full_range, clip_mask)
    return _forward(w, clip_factor, bits, on, floor, multiple, full_range, clip_mask, impl)[0]


# --- the opaque operator --------------------------------------------------------------------------


@torch.library.custom_op("pgolf::fake_quant", mutates_args=())
def _forward(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
    clip_mask: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    forward = launcher("fake_quant", impl, "forward")
    factors = clip_factor.contiguous()
    return forward(unit_stride(w), factors, bits, on, floor, multiple, full_range)


@_forward.register_fake
def _(w, clip_factor, bits, on, floor, multiple, full_range, clip_mask, impl):
    dtype = torch.promote_types(w.dtype, torch.float32)
    return w.new_empty(w.shape), w.new_empty(w.shape[:1], dtype=dtype)


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


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    w, _, bits, on, _, ctx.multiple, ctx.full_range, ctx.clip_mask, ctx.impl = inputs
    if ctx.clip_mask:
        ctx.save_for_backward(w, output[1], bits, on)


def _gradient(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple:
    dw = dout
    if ctx.clip_mask:
        w, scale, bits, on = ctx.saved_tensors
        dw = _backward(dout, w, scale, bits, on, ctx.multiple, ctx.full_range, ctx.impl)
    return dw, *(None,) * 8


_forward.register_autograd(_gradient, setup_context=_setup_context)


# --- implementations ------------------------------------------------------------------------------


def _cpu_forward(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float,
    multiple: int,
    full_range: bool,
) -> tuple[Tensor, Tensor]:
    check_bits(bits.item())
    value = torch.empty(w.shape, dtype=w.dtype)
    scale = torch.empty(w.shape[:1], dtype=torch.promote_types(w.dtype, torch.float32))
    extension.load().fake_quant(
        w.data_ptr(), clip_factor.data_ptr(), value.data_ptr(), scale.data_ptr(),
        DTYPE_CODES[w.dtype], *w.shape, w.stride(0), int(bits), bool(on > 0),
        floor, multiple, full_range, torch.get_num_threads(),
    )  # fmt: skip
    return value, scale


def _cpu_backward(
    dout: Tensor,
    w: Tensor,
    scale: Tensor,
    bits: Tensor,
    on: Tensor,
    multiple: int,
    full_range: bool,
) -> Tensor:
    dw = torch.empty(w.shape, dtype=w.dtype)
    extension.load().fake_quant_backward(
        dout.data_ptr(), w.data_ptr(), scale.data_ptr(), dw.data_ptr(), DTYPE_CODES[w.dtype],
        *w.shape, dout.stride(0), w.stride(0), int(bits), bool(on > 0), multiple, full_range,
        torch.get_num_threads(),
    )  # fmt: skip
    return dw


def samples() -> list[Sample]:
    """Every width, both switches, the seeds' floor, PR 531's and PR 543's grids."""

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
) -> tuple[Work, Work]:
    """Forward reads w once and writes values and steps; backward works only with a clip mask."""
    scale = w.size(0) * torch.promote_types(w.dtype, torch.float32).itemsize
    masked = Work(0, nbytes(w, w, bits, on) + scale, nbytes(w))
    return (
        Work(0, nbytes(w, clip_factor, bits, on), nbytes(w) + scale),
        masked if clip_mask else Work(0, 0, 0),
    )


OPERATOR = register(
    Operator(
        name="fake_quant",
        call=fake_quant,
        reference=reference,
        differentiable=("w",),
        implementations={
            "cpu": Implementation(
                "cpu",
                (torch.float32, torch.bfloat16, torch.float64),
                {"forward": _cpu_forward, "backward": _cpu_backward},
                lambda: no_extension("fake_quant", "fake_quant_backward"),
            ),
            "triton": Implementation(
                "cuda",
                (torch.float32, torch.bfloat16),
                {
                    "forward": lazily("fake_quant", "fake_quant"),
                    "backward": lazily("fake_quant", "fake_quant_backward"),
                },
                no_triton,
            ),
        },
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("triton", "fewer bytes than compiled (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
    )
)
