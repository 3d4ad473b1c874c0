"""Integer grids per row: the one definition that export, decoding and late QAT share.

A row of weights is stored as signed codes of k bits and one fp16 step s:

    qmax  = 2^(k-1) - 1
    s     = fp16(max(clip, floor) / qmax)          clip: the largest magnitude that is kept
    code  = clamp(round_half_even(w / s), -qmax, qmax)
    value = code * s

Fake quantisation replaces w by `value` in the forward pass and passes the gradient straight
through (Bengio et al. 2013, arXiv 1308.3432). Codes divide by the step that is stored, so training
sees exactly what is decoded. Shapes: w (R, C), clip and scale (R,).
"""

import torch
from torch import Tensor

SMALLEST_STEP = 2.0**-24  # least positive fp16: an all-zero row must not divide by zero
LARGEST_STEP = 65504.0


def row_scale(clip: Tensor, bits: int | Tensor, floor: float = 0.0) -> Tensor:
    """Step of each row, rounded to fp16 but held in clip's dtype.

    Args:
        clip: (R,) magnitudes that the largest code stands for.
        bits: bits a code, 4 to 8; a 0-d tensor keeps a compiled graph free of recompiles.
        floor: least clip; the seed scripts use 1.0.
    """
    qmax = 2 ** (bits - 1) - 1
    step = clip.clamp_min(floor) / qmax
    return step.clamp(SMALLEST_STEP, LARGEST_STEP).to(torch.float16).to(clip.dtype)


def row_codes(
    w: Tensor, scale: Tensor, bits: int | Tensor, multiple: int = 1, full_range: bool = False
) -> Tensor:
    """Codes of w (R, C) for steps scale (R,), as whole numbers in w's dtype.

    Args:
        multiple: codes are rounded to a multiple of it (PR 543 stores int8 multiples of 4).
        full_range: use -qmax - 1 too (PR 531).
    """
    qmax = 2 ** (bits - 1) - 1
    low = -qmax - 1 if full_range else -qmax
    codes = torch.round(w / scale[:, None])
    if multiple != 1:
        codes = torch.round(codes / multiple) * multiple
    if isinstance(bits, Tensor):
        return torch.minimum(torch.maximum(codes, torch.as_tensor(low)), qmax)
    return codes.clamp(low, qmax)


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
