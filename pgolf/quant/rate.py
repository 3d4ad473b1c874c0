"""What codes cost: bits of each magnitude, by a class that says how large a code may be expected.

An entropy coder that adapts to rows and columns pays for a code by what is usual there. The class
of a code is its expected magnitude, mean of its row x mean of its column / mean of all, on a
logarithmic scale; the bits are those of the class's own statistics.
Shapes: codes (R, C), K classes.
"""

import torch
from torch import Tensor

CLASSES = 40  # four to the octave: from 2^-4 to 2^6
PRIOR = 16.0  # weight, in codes, of a geometric distribution: most classes see few large codes


def code_costs(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and costs after an ideal adaptive coder.

    Returns:
        uint8 classes (R, C), and fp32 bits (K, 128) of a code by class and magnitude, its sign
        included.
    """
    size = codes.abs().to(torch.int64).clamp_max_(127)
    rows, columns = size.float().mean(dim=1), size.float().mean(dim=0)
    expected = rows[:, None] * columns / size.float().mean().clamp_min(1e-9)
    classes = (4 * (expected.clamp_min(1e-9).log2() + 4)).round().clamp(0, CLASSES - 1).long()

    count = torch.bincount((classes * 128 + size).flatten(), minlength=128 * CLASSES)
    mean = 2.0 ** (torch.arange(CLASSES, device=codes.device) / 4 - 4)
    ratio = (mean / (1 + mean))[:, None].double()  # a geometric distribution of that mean
    prior = (1 - ratio) * ratio ** torch.arange(128, device=codes.device)
    count = count.view(CLASSES, 128) + PRIOR * prior
    bits = -(count / count.sum(dim=1, keepdim=True)).log2()
    bits[:, 1:] += 1  # the sign
    return classes.to(torch.uint8), bits.float()


def code_bits(codes: Tensor) -> float:
    """Bits of all codes (R, C) by `code_costs`: an estimate of what a coder will need."""
    classes, bits = code_costs(codes)
    return bits[classes.long(), codes.abs().to(torch.int64).clamp_max_(127)].sum().item()
