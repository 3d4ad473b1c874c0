"""Hessians and weights for the tests of GPTQ, and the textbook's algorithm in float64."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def hessian(columns: int, seed: int = 0, rank: int | None = None, spread: float = 1.0) -> Tensor:
    """mean(x xᵀ) of correlated inputs of very different sizes, (C, C) fp32."""
    g = torch.Generator().manual_seed(seed)
    count = 4 * columns if rank is None else rank
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    sizes = (spread * torch.randn(columns, generator=g)).exp()
    x = torch.randn(count, columns, generator=g) @ mix * sizes
    return x.T @ x / count


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(rows, columns, generator=g) * (torch.rand(rows, 1, generator=g) + 0.2)


def damped(h: Tensor, damping: float) -> np.ndarray:
    """In float64, with the dead columns' diagonal at the mean."""
    h = h.double().numpy().copy()
    mean = np.diag(h).mean()
    h[np.diag(h) == 0, np.diag(h) == 0] = mean
    return h + damping * mean * np.eye(len(h))


def obq(
    w: Tensor, h: Tensor, damping: float, code_of: Callable[[float, int, int], float],
    value_of: Callable[[float, int, int], float],
) -> np.ndarray:  # fmt: skip
    """Codes (R, C) of optimal brain quantisation with GPTQ's order, as its paper derives it.

    The inverse Hessian of the columns that are left is kept, and a column is taken out of it by
    Gaussian elimination: no Cholesky factor anywhere.

    Args:
        code_of, value_of: of a number or code, for its row and column.
    """
    h = h.double()
    left = w.double().numpy().copy()
    left[:, (h.diagonal() == 0).numpy()] = 0
    inverse = np.linalg.inv(damped(h, damping))
    codes = np.zeros_like(left)
    remaining = list(range(len(h)))
    for j in np.argsort(-h.diagonal().numpy(), kind="stable"):
        for r in range(len(left)):
            codes[r, j] = code_of(left[r, j], r, j)
            error = left[r, j] - value_of(codes[r, j], r, j)
            for k in remaining:
                left[r, k] -= error / inverse[j, j] * inverse[j, k]
        remaining.remove(j)
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def row_error(w: Tensor, value: np.ndarray | Tensor, h: Tensor) -> np.ndarray:
    """e H eᵀ of each row in float64."""
    e = w.double().numpy() - np.asarray(value, dtype=np.float64)
    return np.einsum("rc,cd,rd->r", e, h.double().numpy(), e)
