"""Integer grids per row: the one definition that export, decoding and late QAT share.

A row of weights is stored as signed codes of k bits and one fp16 step s:

    qmax  = 2^(k-1) - 1
    s     = fp16(max(clip, floor) / qmax)          clip: the largest magnitude that is kept
    code  = clamp(round_half_even(w / s), -qmax, qmax)
    value = code * s

Shapes: w (R, C), clip and step (R,).
"""

import torch
from torch import Tensor

BITS = range(4, 9)  # of a code
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
    # A GPU's NaN, 0x7FFFFFFF, would overflow to -0.
    return torch.where(x.isnan(), x, torch.where(x < 2.0**-14, subnormal, normal))


def _qmax(bits: int | Tensor, like: Tensor) -> Tensor:
    """Largest code, as a tensor: CUDA divides by a Python number through its rounded reciprocal."""
    levels = torch.as_tensor(2 ** (bits - 1), dtype=like.dtype, device=like.device)
    return levels.round() - 1  # a GPU's power function need not be exact


def row_step(clip: Tensor, bits: int | Tensor, floor: float = 0.0) -> Tensor:
    """Step of each row, rounded to fp16 but held in clip's dtype.

    Args:
        clip: (R,) magnitudes that the largest code stands for.
        bits: bits a code, 4 to 8; a 0-d tensor keeps a compiled graph free of recompiles.
        floor: least clip; the published scripts use 1.0.
    """
    step = clip.clamp_min(floor) / _qmax(bits, clip)
    return _round_fp16(step.clamp(SMALLEST_STEP, LARGEST_STEP).float()).to(clip.dtype)


def _nearest(w: Tensor, step: Tensor, multiple: int) -> Tensor:
    """Codes before clipping."""
    codes = torch.round(w / step[:, None])
    return codes if multiple == 1 else torch.round(codes / multiple) * multiple


def _clip(codes: Tensor, bits: int | Tensor, full_range: bool) -> Tensor:
    qmax = _qmax(bits, codes)
    return codes.clamp(-qmax - 1 if full_range else -qmax, qmax)


def row_codes(
    w: Tensor, step: Tensor, bits: int | Tensor, multiple: int = 1, full_range: bool = False
) -> Tensor:
    """Codes of w (R, C) for steps (R,), as whole numbers in w's dtype.

    Args:
        multiple: codes are rounded to a multiple of it (PR 543 stores int8 multiples of 4).
        full_range: use -qmax - 1 too (PR 531).
    """
    return _clip(_nearest(w, step, multiple), bits, full_range)


def grid(
    w: Tensor, clip_factor: Tensor, bits: Tensor, floor: float, multiple: int, full_range: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, steps, whether the clip left the code as it was) of w (R, C), which is fp32 or fp64.

    A row with a weight that is not finite is NaN, so that a training which diverges is seen.
    """
    amax = w.abs().amax(dim=1)
    amax = amax + (amax - amax)
    step = row_step(amax * clip_factor, bits, floor)
    codes = _nearest(w, step, multiple)
    clipped = _clip(codes, bits, full_range)
    return clipped * step[:, None], step, codes == clipped
