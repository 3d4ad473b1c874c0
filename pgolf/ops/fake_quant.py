"""Integer grids per row: the one definition that export, decoding and late QAT share.

A row of weights is stored as signed codes of k bits and one fp16 step s:

    qmax  = 2^(k-1) - 1
    s     = fp16(max(clip, floor) / qmax)          clip: the largest magnitude that is kept
    code  = clamp(round_half_even(w / s), -qmax, qmax)
    value = code * s

Fake quantisation replaces w by `value` in the forward pass and passes the gradient straight
through (Bengio et al. 2013, arXiv 1308.3432). Codes divide by the step that is stored, so training
sees what is decoded: to the bit in eager mode and compiled for a CPU. Code compiled for a GPU may
divide approximately and move a value that lies on a tie to the other code.
Shapes: w (R, C), clip and scale (R,).
"""

import torch
from torch import Tensor

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


def row_codes(
    w: Tensor, scale: Tensor, bits: int | Tensor, multiple: int = 1, full_range: bool = False
) -> Tensor:
    """Codes of w (R, C) for steps scale (R,), as whole numbers in w's dtype.

    Args:
        multiple: codes are rounded to a multiple of it (PR 543 stores int8 multiples of 4).
        full_range: use -qmax - 1 too (PR 531).
    """
    qmax = _qmax(bits, w)
    codes = torch.round(w / scale[:, None])
    if multiple != 1:
        codes = torch.round(codes / multiple) * multiple
    return codes.clamp(-qmax - 1 if full_range else -qmax, qmax)


def fake_quant(
    w: Tensor,
    clip_factor: Tensor,
    bits: Tensor,
    on: Tensor,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
) -> Tensor:
    """w (R, C) as it will be decoded, with a straight-through gradient.

    Args:
        clip_factor: (R,) clip of each row as a share of its largest magnitude.
        bits: 0-d tensor, bits a code.
        on: 0-d tensor, 1 applies the grid and 0 returns w; switching does not recompile.
    """
    clip = w.detach().abs().amax(dim=1) * clip_factor
    scale = row_scale(clip, bits, floor)
    value = row_codes(w.detach(), scale, bits, multiple, full_range) * scale[:, None]
    return w + (value - w.detach()) * on
