"""GPTQ: quantise column by column, and let the remaining columns make up for each error.

The error of a matrix W (R, C) that is stored as Q is what its outputs notice: with the inputs x of
calibration and their Hessian H = mean(x xᵀ) (C, C), a row's is e H eᵀ, e = w - q. Quantising the
columns in order of falling diag(H), with the upper triangular U of (H + damping)^-1 = Uᵀ U,

    e_j = (w_j - q_j) / U_jj,        w_k -= e_j U_jk   for the remaining columns k > j,

gives the least error of each step, and sum_j e_j² is the error of the row under the damped H.

Source: Frantar, Ashkboos, Hoefler, Alistarh: GPTQ (2022), arXiv 2210.17323. Rows do not depend on
each other, so several clips of one row are several rows. Shapes: N rows, B matrices of one shape;
the loop works on (B, C, N), a column's numbers side by side.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors are held back and then given to all later ones in one product
RETRIES = (1, 10, 100, 1000)  # times the damping, where a Hessian is not positive definite


@dataclass(frozen=True, eq=False)
class Factor:
    """A Hessian as GPTQ uses it.

    Attributes:
        order: (C,) int64 columns in the order in which they are quantised.
        hessian: (C, C) fp32 in that order, not damped; 0 for dead columns.
        upper: (C, C) fp32 U, in that order.
        dead: (C,) bool, in that order: inputs that are always 0. Their weights become 0.
    """

    order: Tensor
    hessian: Tensor
    upper: Tensor
    dead: Tensor


class Factors(Mapping[str, "Factor | None"]):
    """The factors of Hessians by name, each made when it is first asked for and then kept.

    None stands for a Hessian that no damping makes positive definite: a warning has named it.

    Args:
        hessians: (C, C) by the name of the matrix; those that share inputs share one tensor.
        damping: share of the mean diagonal that is added to the diagonal; the only place.
    """

    def __init__(self, hessians: Mapping[str, Tensor], damping: float):
        self.hessians, self.damping = dict(hessians), damping
        self._names: dict[int, list[str]] = {}
        for name, hessian in self.hessians.items():
            self._names.setdefault(id(hessian), []).append(name)
        self._made: dict[int, Factor | None] = {}

    def __getitem__(self, name: str) -> Factor | None:
        key = id(self.hessians[name])
        if key not in self._made:
            names = ", ".join(self._names[key])
            self._made[key] = factorize(self.hessians[name], self.damping, names)
        return self._made[key]

    def __contains__(self, name: object) -> bool:  # Mapping's own would factor it
        return name in self.hessians

    def __iter__(self):
        return iter(self.hessians)

    def __len__(self) -> int:
        return len(self.hessians)


def factorize(hessian: Tensor, damping: float, name: str) -> Factor | None:
    """Order and factor of a Hessian (C, C), in fp64; with more damping where it needs that.

    Args:
        name: whose it is, for the warnings.

    Returns:
        None, after a warning, if it is not finite or not positive definite with 1000 x damping.
    """
    h = hessian.detach().double()
    diagonal = h.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    dead = diagonal == 0
    h = h.masked_fill(dead[:, None] | dead, 0.0)[order][:, order]
    dead = dead[order]
    mean = diagonal.mean().item()
    if mean != 0 and bool(h.isfinite().all()):
        lift = torch.where(dead, mean, 0.0)
        for times in RETRIES:
            damped = h + torch.diag(lift + times * damping * mean)
            # H = R Rᵀ with R upper triangular is the Cholesky factor of H read backwards, and
            # U = R^-1: one factorisation, where the inverse of H would take three.
            reverse, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                if times > 1:
                    warnings.warn(
                        f"{name}: the Hessian is not positive definite, "
                        f"damping={times * damping:g} is used for {damping:g}",
                        stacklevel=2,
                    )
                eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
                upper = torch.linalg.solve_triangular(reverse.flip(0, 1), eye, upper=True)
                return Factor(order, h.float(), upper.float(), dead)
    why = "is zero" if mean == 0 else "is not positive definite with any damping"
    warnings.warn(f"{name}: the Hessian {why}, only clips are searched", stacklevel=2)
    return None


def sweep(
    w: Tensor, upper: Tensor, quantise: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """Codes (B, C, N) int8 of w (B, C, N), columns in the order of `upper` (B, C, C).

    Args:
        quantise: (numbers (B, N), column) -> their codes and values, each (B, N).
    """
    left = w.clone()
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    error = torch.empty_like(w[:, :BLOCK])
    for start in range(0, w.size(1), BLOCK):
        stop = min(start + BLOCK, w.size(1))
        inside = upper[:, start:stop, start:stop].mT.contiguous()
        for k, j in enumerate(range(start, stop)):
            # What the block's columns so far have changed in this one.
            change = torch.bmm(inside[:, k, None, :k], error[:, :k])[:, 0]
            x = left[:, j] - change
            code, value = quantise(x, j)
            codes[:, j] = code
            error[:, k] = (x - value) / inside[:, k, k, None]
        if stop < w.size(1):
            left[:, stop:].baddbmm_(
                upper[:, start:stop, stop:].mT, error[:, : stop - start], alpha=-1
            )
    return codes


def row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ of each row, (B, N), of errors (B, C, N) and Hessians (B, C, C); 0 or more."""
    return ((hessian @ error) * error).sum(dim=1).clamp_min_(0)


def stacked(factors: Sequence[Factor], device: torch.device) -> Factor:
    """Factors of one size with a leading batch dimension."""
    return Factor(
        *(
            torch.stack([getattr(f, name).to(device) for f in factors])
            for name in ("order", "hessian", "upper", "dead")
        )
    )


def in_order(w: Tensor, factor: Factor) -> Tensor:
    """w (B, R, C) as the sweep wants it: (B, C, R), dead columns 0; `factor` is stacked."""
    order = factor.order[:, None].expand_as(w)
    return w.gather(2, order).mT.masked_fill(factor.dead[:, :, None], 0.0)


def out_of_order(codes: Tensor, factor: Factor) -> Tensor:
    """The inverse of `in_order`: (B, C, R) to (B, R, C)."""
    codes = codes.mT
    return torch.empty_like(codes, memory_format=torch.contiguous_format).scatter_(
        2, factor.order[:, None].expand_as(codes), codes
    )
