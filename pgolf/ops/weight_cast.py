"""Weights as a GEMM takes them, in one pass: on the grid of export, scaled by rows, cast.

    out = scale Q(w)          Q: a grid, or the identity; scale: one factor a row, or 1

`fake_quant` is the case without a scale: weights as their integer grid will decode them, in the
forward pass. The grid is that of `int_grid`, which export uses: to the bit in eager mode, compiled
for a CPU, and in our kernels, which round divisions correctly. (Code that torch.compile makes of
the reference for a GPU may divide approximately and move a weight on a tie by one code.)

A branch x + a (y W^T), whose vector a scales the output's columns, is x + y (a W)^T: folded into
the rows of W, the factor costs no pass over the tokens. The grid comes first, as export knows
nothing of a. The gradient passes straight through the grid (Bengio et al. 2013, arXiv 1308.3432),
except, if asked, for weights whose code was clipped:

    dw = scale dout,   dscale = rowsum(dout Q(w))

Weights are cast anyway; the operators take the cast in, and several matrices in one launch. What
training publishes goes through them, outside of the compiled graph.
Shapes: w, out (R, C), scale, clip_factor, steps (R,); bits and on 0-d.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.inputs import Inputs, check_tensors, outside_autocast
from pgolf.ops.int_grid import BITS, grid
from pgolf.ops.launch import in_extension, in_triton
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import check_alike, check_places, compute_dtype, nbytes
from pgolf.ops.weight_cast_kernels import cast_all, launchers

_INPUTS = Inputs(
    "weight_cast", ("w", "scale", "clip_factor"), alike=("w",), optional=("scale", "clip_factor")
)
_GRID_INPUTS = Inputs("fake_quant", ("w", "clip_factor"), alike=("w",))


@outside_autocast
def grid_reference(
    w: Tensor, clip_factor: Tensor, bits: Tensor, on: Tensor,
    floor: float = 0.0, multiple: int = 1, full_range: bool = False, clip_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`fake_quant` in plain torch."""
    wide = w.detach().to(compute_dtype(w.dtype))
    value, _, inside = grid(wide, clip_factor.to(wide.dtype), bits, floor, multiple, full_range)
    value = torch.where(on > 0, value, wide)
    through = torch.where(inside | ~(on > 0), w, w.detach()) if clip_mask else w
    # The bracket is 0 where w is finite: the value comes out to the bit, w keeps the gradient.
    return (value + (through - through.detach())).to(dtype or w.dtype)


@outside_autocast
def reference(
    w: Tensor, scale: Tensor | None = None, clip_factor: Tensor | None = None,
    bits: Tensor | None = None, on: Tensor | None = None,
    floor: float = 0.0, multiple: int = 1, full_range: bool = False, clip_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`weight_cast` in plain torch."""
    q = w.to(compute_dtype(w.dtype))
    if clip_factor is not None:
        options = (floor, multiple, full_range, clip_mask, q.dtype)
        q = grid_reference(w, clip_factor, bits, on, *options)
    return (q if scale is None else q * scale[:, None]).to(dtype or w.dtype)


def _check(
    name: str, w: Tensor, scale: Tensor | None, clip_factor: Tensor | None, bits: Tensor | None,
    on: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError unless scale and grid are for the rows of w."""
    if w.dim() != 2:
        raise ValueError(f"{name}: w is {tuple(w.shape)}: it has to be (rows, columns)")
    check_alike(name, w=w)
    if (clip_factor is None) != (bits is None) or (bits is not None and on is None):
        raise ValueError(
            f"{name}: a grid takes clip_factor, bits and on: give all of them or neither "
            "clip_factor nor bits"
        )
    if clip_factor is not None and not w.size(1):
        raise ValueError(f"{name}: w is {tuple(w.shape)}: rows of no elements have no step")
    for what, t, wanted in (
        ("scale", scale, compute_dtype(w.dtype)),
        ("clip_factor", clip_factor, torch.float32),
    ):
        if t is not None and (t.shape != w.shape[:1] or t.dtype != wanted):
            raise ValueError(
                f"{name}: {what} is {t.dtype} {tuple(t.shape)}: for these rows it has to be "
                f"{wanted} ({w.size(0)},)"
            )
    for what, t in (("bits", bits), ("on", on)):
        if bits is not None and (t.dim() or t.dtype != torch.float32):
            raise ValueError(
                f"{name}: {what} is {t.dtype} {tuple(t.shape)}: it has to be a number or a "
                "float32 tensor of no dimensions"
            )
    beside = {"scale": scale, "clip_factor": clip_factor, "bits": bits}
    for what, t in (beside | ({} if bits is None else {"on": on})).items():
        if t is not None and t.device != w.device:
            raise ValueError(f"{name}: {what} is on {t.device}, w on {w.device}")


def _check_options(name: str, floor: float, multiple: int, dtype: torch.dtype | None) -> None:
    if multiple < 1:
        raise ValueError(f"{name}: multiple={multiple}: it has to be 1 or more")
    if not 0 <= floor < math.inf:  # NaN too
        raise ValueError(f"{name}: floor={floor}: it has to be 0 or more and finite")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{name}: dtype={dtype}: it has to be a float dtype")


def _check_bits(name: str, bits: float) -> None:
    if bits not in BITS:
        raise ValueError(f"{name}: bits={bits:g}: it has to be a whole number, 4 to 8")


def _scalar(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


def weight_cast(
    w: Tensor, scale: Tensor | None = None, clip_factor: Tensor | None = None,
    bits: Tensor | int | None = None, on: Tensor | bool | None = None,
    floor: float = 0.0, multiple: int = 1, full_range: bool = False, clip_mask: bool = False,
    dtype: torch.dtype | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """w (R, C) on its grid, if it has one, times scale, in another dtype.

    Args:
        w: fp32, bf16 or fp64 (that only on a CPU); computed in fp32 (fp64 for fp64).
        scale: (R,) factor of each row, in the dtype that w is computed in; 1 if None.
        clip_factor: (R,) fp32 clip of each row as a share of its largest magnitude. No grid without
            clip_factor and bits.
        bits: bits a code, 4 to 8; a 0-d fp32 tensor on w's device can change without recompiling.
            Kernels on a GPU cannot raise: they answer a tensor out of range with NaN.
        on: above 0 applies the grid, 0 leaves w; a 0-d fp32 tensor likewise.
        floor, multiple, full_range: of the grid, as in `int_grid`.
        clip_mask: no gradient for weights whose code was clipped.
        dtype: of the result; w's if None.
        impl: 'auto', 'reference', 'cpu' (C++) or 'cuda' (fp32, bf16).

    Returns:
        (R, C) contiguous. While the grid is on, a row with a weight that is not finite is NaN.

    Raises:
        ValueError: shapes, dtypes, devices or bits do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    w, scale, clip_factor = _INPUTS(w, scale, clip_factor)
    options = (floor, multiple, full_range, clip_mask, dtype)
    return _cast("weight_cast", [w], [scale], [clip_factor], [bits], on, options, impl)[0]


def weight_cast_all(
    ws: Sequence[Tensor], scales: Sequence[Tensor | None] | None = None,
    clip_factors: Sequence[Tensor | None] | None = None,
    bits: Sequence[Tensor | None] | None = None, on: Tensor | None = None,
    floor: float = 0.0, multiple: int = 1, full_range: bool = False, clip_mask: bool = False,
    dtype: torch.dtype | None = None, impl: str = "auto", into: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """`weight_cast` of several matrices of one dtype and device, in one launch.

    Args:
        ws, scales, clip_factors, bits: one a matrix, as in `weight_cast`, or None where the matrix
            has none, or for all of them.
        on, floor, multiple, full_range, clip_mask, dtype, impl: for all.
        into: contiguous (R, C) of the result's dtype, one a matrix, to write the results to. What
            is returned then stands for these in gradients, and may be without numbers.
    """
    nothing = [None] * len(ws)
    lists = (nothing if items is None else items for items in (scales, clip_factors, bits))
    options = (floor, multiple, full_range, clip_mask, dtype)
    return _cast("weight_cast", ws, *lists, on, options, impl, into)


def fake_quant(
    w: Tensor, clip_factor: Tensor, bits: Tensor | int, on: Tensor | bool,
    floor: float = 0.0, multiple: int = 1, full_range: bool = False, clip_mask: bool = False,
    dtype: torch.dtype | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """w (R, C) as it will be decoded, with a straight-through gradient.

    Arguments, result and errors are those of `weight_cast`; impl may be 'triton' too (fp32, bf16).
    """
    w, clip_factor = _GRID_INPUTS(w, clip_factor)
    options = (floor, multiple, full_range, clip_mask, dtype, impl)
    return fake_quant_all([w], [clip_factor], [bits], on, *options)[0]


def fake_quant_all(
    ws: Sequence[Tensor], clip_factors: Sequence[Tensor], bits: Sequence[Tensor], on: Tensor,
    floor: float = 0.0, multiple: int = 1, full_range: bool = False, clip_mask: bool = False,
    dtype: torch.dtype | None = None, impl: str = "auto",
) -> list[Tensor]:  # fmt: skip
    """`fake_quant` of several matrices of one dtype and device, in one launch where that helps.

    Args:
        ws, clip_factors, bits: one a matrix, as in `fake_quant`.
        on, floor, multiple, full_range, clip_mask, dtype, impl: for all.
    """
    check_tensors("fake_quant", "clip_factors", clip_factors)
    options = (floor, multiple, full_range, clip_mask, dtype)
    return _cast("fake_quant", ws, [None] * len(ws), clip_factors, bits, on, options, impl)


def _cast(
    name: str, ws: Sequence[Tensor], scales: Sequence[Tensor | None],
    clip_factors: Sequence[Tensor | None], bits: Sequence[Tensor | float | None],
    on: Tensor | float | None, options: tuple, impl: str, into: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Either operator; options: floor, multiple, full_range, clip_mask, dtype."""
    if not ws:
        raise ValueError(f"{name}: the list of matrices is empty: it needs one at least")
    check_tensors(name, "ws", ws)
    floor, multiple, *masks, dtype = options
    _check_options(name, floor, multiple, dtype)
    for k in bits:
        if k is not None and not isinstance(k, Tensor):
            _check_bits(name, k)
    bits, on = [_scalar(k, ws[0]) for k in bits], _scalar(on, ws[0])
    each = list(zip(ws, scales, clip_factors, bits, strict=True))
    for arguments in each:
        _check(name, *arguments, on)
    check_alike(name, **{f"matrix {i}": w for i, w in enumerate(ws)})
    impl = resolve(name, impl, ws[0])
    options = (floor, multiple, *masks, dtype or ws[0].dtype)
    # The kernels of a GPU cannot raise: they answer with NaN.
    if impl in ("reference", "cpu") and not torch.compiler.is_compiling():
        for k in bits:
            if k is not None and k.device.type == "cpu":
                _check_bits(name, k.item())
    if into is not None:
        check_tensors(name, "into", into)
        check_places(name, into, ws, options[-1])
    kernels = impl != "reference"
    if kernels and options[-1] in (torch.bfloat16, compute_dtype(ws[0].dtype)):
        return cast_all(name, ws, scales, clip_factors, bits, on, options, impl, into)
    lists = (scales, clip_factors, bits)
    outs = (
        cast_all(name, ws, *lists, on, options, impl)
        if kernels
        else [reference(*arguments, on, *options) for arguments in each]
    )
    if into is not None:
        torch._foreach_copy_(list(into), [out.detach() for out in outs])
    return outs


# --- samples and costs ----------------------------------------------------------------------------


def _sample(
    label: str,
    rows: int,
    columns: int,
    scaled: bool = False,
    bits: int = 0,
    on: bool = True,
    sliced: bool = False,
    bench: bool = False,
    **options: float | bool | torch.dtype,
) -> Sample:
    """A matrix, with a scale and a grid if asked for."""

    def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        g = torch.Generator().manual_seed(rows + bits)
        w = torch.randn(rows, columns + 8 * sliced, generator=g, dtype=torch.float64) * 0.05
        scale = torch.randn(rows, generator=g, dtype=torch.float64)
        factor = torch.rand(rows, generator=g).mul(0.5).add(0.5).to(device)
        named = {"scale": scale.to(device, compute_dtype(dtype))} if scaled else {}
        if bits:
            k, switch = (torch.tensor(float(x), device=device) for x in (bits, on))
            named |= {"clip_factor": factor, "bits": k, "on": switch}
        return (w.to(device, dtype)[:, :columns],), named | options

    return Sample(label, build, bench)


def samples() -> list[Sample]:
    """With a scale, a grid, both and neither; grids as in `fake_quant`."""
    bf16 = torch.bfloat16
    return [
        _sample("7x33 scale", 7, 33, True),
        _sample("6x48 to bf16", 6, 48, dtype=bf16),
        _sample("5x64 int6 scale to bf16", 5, 64, True, 6, dtype=bf16),
        _sample("3x100 int5 scale mask", 3, 100, True, 5, full_range=True, clip_mask=True),
        _sample("4x1700 int8/4 mask", 4, 1700, bits=8, multiple=4, clip_mask=True),
        _sample("4x40 off scale", 4, 40, True, 6, on=False, clip_mask=True),
        _sample("0x16 scale", 0, 16, True),
        _sample("1536x512 to bf16", 1536, 512, bench=True, dtype=bf16),
        _sample("512x1536 scale to bf16", 512, 1536, True, bench=True, dtype=bf16),
        _sample("512x1536 int6 scale to bf16", 512, 1536, True, 6, bench=True, dtype=bf16),
    ]


def grid_samples() -> list[Sample]:
    """Every width, both switches, the published floor, PR 531's and PR 543's grids."""
    return [
        _sample("7x33 int6", 7, 33, bits=6),
        _sample("5x64 int4 mask", 5, 64, bits=4, clip_mask=True),
        _sample("3x100 int5 full range", 3, 100, bits=5, full_range=True, clip_mask=True),
        _sample("9x17 int8/4 sliced", 9, 17, bits=8, sliced=True, multiple=4, clip_mask=True),
        _sample("4x40 int7 floor", 4, 40, bits=7, floor=1.0),
        _sample("6x48 to bf16", 6, 48, bits=5, dtype=torch.bfloat16),
        _sample("4x40 off", 4, 40, bits=6, on=False, clip_mask=True),
        _sample("0x16", 0, 16, bits=6),
        _sample("512x512 int6", 512, 512, bits=6, bench=True),
        _sample("1536x512 int6", 1536, 512, bits=6, bench=True),
        _sample("512x1536 int6", 512, 1536, bits=6, bench=True),
    ]


def cost(
    w: Tensor, scale: Tensor | None = None, clip_factor: Tensor | None = None,
    bits: Tensor | None = None, on: Tensor | None = None,
    clip_mask: bool = False,
    dtype: torch.dtype | None = None,
    **of_the_grid: float | bool,
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


# --- implementations ------------------------------------------------------------------------------

_COMPILED = in_extension(("weight_cast", "weight_cast_backward"), launchers)

OPERATOR = register(
    Operator(
        name="weight_cast",
        call=weight_cast,
        reference=reference,
        differentiable=("w", "scale"),
        implementations=_COMPILED,
        preferred={
            "cpu": [("cpu", "C++, one pass where eager makes several (python -m bench ops)")],
            "cuda": [("cuda", "one launch for all matrices, each read and written once")],
        },
        samples=samples,
        cost=cost,
    )
)

FAKE_QUANT = register(
    Operator(
        name="fake_quant",
        call=fake_quant,
        reference=grid_reference,
        differentiable=("w",),
        implementations={
            **_COMPILED,
            "triton": in_triton("fake_quant", forward="forward", backward="backward"),
        },
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("triton", "a launch for many of eager's (python -m bench count)")],
        },
        samples=grid_samples,
        cost=cost,
    )
)
