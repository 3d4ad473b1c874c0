"""Newton-Schulz orthogonalisation for Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    X = G / (|G|_F + 1e-7);   repeat: A = X X^T,  X <- a X + (b A + c A^2) X

Singular values end near 1 (0.7 to 1.2 with the classic coefficients). Tall matrices are
transposed, so that A is the smaller Gram matrix. Shapes: G (B, R, C), a batch of one shape.
"""

import torch
from torch import Tensor

CLASSIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Orthogonalise each matrix of g (B, R, C); the result has dtype `dtype`."""
    a, b, c = CLASSIC
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    x = x.to(dtype)
    tall = g.size(-2) > g.size(-1)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
