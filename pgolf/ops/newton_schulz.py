"""Newton-Schulz orthogonalisation for Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    X = G / (safety |G|_F + 1e-7);   for each (a, b, c):  A = X X^T,  X <- a X + (b A + c A^2) X

Singular values end near 1: 0.7 to 1.2 with the classic coefficients, closer with those of
Polar Express (Amsel et al. 2025, arXiv 2505.16932), which differ from step to step; results of the
two are not comparable to the bit. With row_norm every row is first divided by its norm (MuonEq-R).
Tall matrices are worked on transposed, so that A is the smaller Gram matrix.
Where the sums of squares of G's rows are known, as from `muon_momentum`, X is not written either:
the first products are those of G, times the factor of each matrix.
Shapes: G (B, R, C), a batch of one shape, squares (B, R).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf import extension
from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_no_gradient
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import DTYPE_CODES, in_cpp, in_triton, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import check_alike, compute_dtype, nbytes, unit_stride

Coefficients = Sequence[tuple[float, float, float]]

CLASSIC = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
EPS = 1e-7  # of the norms
_INPUTS = Inputs("newton_schulz", ("g",), alike=("g",))


def preset(name: str, steps: int) -> tuple[Coefficients, float]:
    """Coefficients of `steps` steps and their safety, for 'classic' or 'polar_express'.

    The last triple repeats. Polar Express needs singular values below 1 by a little.
    """
    triples, safety = {"classic": (CLASSIC, 1.0), "polar_express": (POLAR_EXPRESS, 1.02)}[name]
    return tuple(triples[min(i, len(triples) - 1)] for i in range(steps)), safety


@outside_autocast
def reference(
    g: Tensor,
    coefficients: Coefficients = CLASSIC,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Tensor | None = None,
) -> Tensor:
    """`newton_schulz` in plain torch."""
    if squares is None:
        x = dividend(g, row_norm)
        x = x / (safety * torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    else:
        x = g / _divisor(squares, safety)
    return _iterate(x.to(dtype), coefficients)


def _divisor(squares: Tensor, safety: float) -> Tensor:
    """(B, 1, 1) of each matrix, from (B, R)."""
    return (safety * squares.sum(-1).sqrt() + EPS)[:, None, None]


def dividend(g: Tensor, row_norm: bool) -> Tensor:
    """What X is times its norm, in the dtype that this is computed in."""
    x = g.to(compute_dtype(g.dtype))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS) if row_norm else x


def _iterate(x: Tensor, coefficients: Coefficients) -> Tensor:
    """The iteration on normalised matrices; torch adds the scaled terms inside its matmuls."""
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for a, b, c in coefficients:
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).contiguous()


def _in_place(
    gs: Sequence[Tensor],
    coefficients: Coefficients,
    dtype: torch.dtype,
    row_norm: bool,
    safety: float,
    squares: Sequence[Tensor],
) -> list[Tensor]:
    """The references of all batches in few launches, which no gradient goes back through.

    Results of tall matrices are transposed views.
    """
    now, then = _Iterate.of(gs, dtype), _Iterate.of(gs, dtype)
    if squares:
        whole, divisors = gs, [_divisor(t, safety) for t in squares]
    else:
        whole = [dividend(g, row_norm) for g in gs]
        norms = torch.stack(torch._foreach_norm([matrix for x in whole for matrix in x]))
        divisors = (safety * norms + EPS).view(-1, 1, 1).split([x.size(0) for x in whole])
    for x, g, divisor in zip(now.results, whole, divisors, strict=True):
        torch.div(g, divisor, out=x)
    with without_autocast(gs[0]):
        for a, b, c in coefficients:
            for x, gram in zip(now.xs, now.grams, strict=True):
                torch.bmm(x, x.mT, out=gram)
            # A product is added to a scaled matrix in place: one copy makes all such places.
            then.flat.copy_(now.flat)
            for added, gram in zip(then.of_size, now.of_size, strict=True):
                added.baddbmm_(gram, gram, beta=b, alpha=c)
            for added, gram, x in zip(then.xs, then.grams, now.xs, strict=True):
                added.baddbmm_(gram, x, beta=a)
            now, then = then, now
    return now.results


class _Iterate(NamedTuple):
    """X of some batches, and room for X X^T, in one buffer.

    Batches of one shape are one, the tall among them transposed. Gram matrices of one size lie side
    by side, so that they are multiplied together.
    """

    flat: Tensor
    of_size: list[Tensor]  # room for Gram matrices, (B, n, n)
    grams: list[Tensor]  # that of each of xs
    xs: list[Tensor]  # (B, n, m), n <= m, the smallest n first
    results: list[Tensor]  # views of xs in the shapes of the batches

    @classmethod
    def of(cls, gs: Sequence[Tensor], dtype: torch.dtype) -> "_Iterate":
        """Empty tensors for these."""
        wide = [tuple(sorted(g.shape[1:])) for g in gs]
        counts = dict.fromkeys(sorted(set(wide)), 0)
        for g, shape in zip(gs, wide, strict=True):
            counts[shape] += g.size(0)
        sizes = dict.fromkeys((n for n, _ in counts), 0)
        for (n, _), count in counts.items():
            sizes[n] += count
        places = [(count, n, n) for n, count in sizes.items()]
        places += [(count, *shape) for shape, count in counts.items()]
        lengths = list(map(math.prod, places))
        flat = gs[0].new_empty(sum(lengths), dtype=dtype)
        views = [t.view(p) for t, p in zip(flat.split(lengths), places, strict=True)]
        of_size, xs = views[: len(sizes)], views[len(sizes) :]
        grams = [
            gram
            for n, stack in zip(sizes, of_size, strict=True)
            for gram in stack.split([count for shape, count in counts.items() if shape[0] == n])
        ]
        left = dict(zip(counts, xs, strict=True))
        results = []
        for g, shape in zip(gs, wide, strict=True):
            x, left[shape] = left[shape].split([g.size(0), left[shape].size(0) - g.size(0)])
            results.append(x.mT if g.size(1) > g.size(2) else x)
        return cls(flat, of_size, grams, xs, results)


def obstacle(impl: str, dtype: torch.dtype) -> str:
    """Why `impl` cannot iterate in that dtype; '' if it can."""
    known = OPERATOR.implementations[impl].dtypes
    return "" if dtype in known else f"it cannot iterate in {dtype}"


def newton_schulz(
    g: Tensor,
    coefficients: Coefficients = CLASSIC,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Orthogonalise each matrix of g.

    Args:
        g: (B, R, C) or (R, C).
        coefficients: a triple (a, b, c) for each step.
        dtype: of the iteration and the result; sums are in fp32.
        row_norm: divide each row by its norm first.
        safety: factor of the Frobenius norm, for coefficients that need singular values below 1.
        squares: (B, R) or (R,) fp32 (fp64 of fp64): the sum of squares of each row of g, as
            `muon_momentum` gives it with the rows that row_norm divided already. g is not normed
            by itself then.
        impl: 'auto', 'reference', 'cpu' (C++ before torch's matmuls) or 'triton' (fp32, bf16).

    Raises:
        ValueError: shape, dtype, coefficients or device do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    known = None if squares is None else [squares]
    return newton_schulz_all([g], coefficients, dtype, row_norm, safety, known, impl)[0]


def newton_schulz_all(
    gs: Sequence[Tensor],
    coefficients: Coefficients = CLASSIC,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """`newton_schulz` of several batches of one dtype and device, in the launches of one.

    Args:
        gs: one a batch, as in `newton_schulz`.
        squares: of each batch, or of none; what else there is, is for all.
    """
    if not gs:
        raise ValueError("newton_schulz: the list of batches is empty: it needs one at least")
    gs = [_INPUTS(g)[0] for g in gs]
    for g in gs:
        if g.dim() not in (2, 3):
            raise ValueError(
                f"newton_schulz: g is {tuple(g.shape)}: it has to be (R, C), or (B, R, C) for a "
                "batch"
            )
        if not (g.size(-1) and g.size(-2)):
            raise ValueError(f"newton_schulz: g is {tuple(g.shape)}: its matrices have no elements")
    if any(len(triple) != 3 for triple in coefficients):
        raise ValueError(f"newton_schulz: coefficients {coefficients}: every step has three")
    if not 0 < safety < math.inf:  # NaN too
        raise ValueError(f"newton_schulz: safety={safety}: it has to be above 0 and finite")
    names = ["g"] if len(gs) == 1 else [f"batch {i}" for i in range(len(gs))]
    check_alike("newton_schulz", **dict(zip(names, gs, strict=True)))
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"newton_schulz: dtype={dtype}: it has to be float32, bfloat16 or float64")
    sums = _checked_squares(gs, squares, row_norm)
    impl = resolve("newton_schulz", impl, gs[0], dtype=dtype)
    batches = [g if g.dim() == 3 else g[None] for g in gs]
    if impl == "reference":
        options = (coefficients, dtype, row_norm, safety)
        if torch.is_grad_enabled() or not all(map(len, batches)):
            known = sums or [None] * len(gs)
            outs = [reference(g, *options, s) for g, s in zip(batches, known, strict=True)]
        else:
            outs = _in_place(batches, *options, sums)
    else:
        flat = [float(value) for triple in coefficients for value in triple]
        outs = _orthogonalise(batches, flat, dtype, row_norm, safety, sums, impl)
    return [out.view(g.shape) for out, g in zip(outs, gs, strict=True)]


def _checked_squares(
    gs: Sequence[Tensor], squares: Sequence[Tensor] | None, row_norm: bool
) -> list[Tensor]:
    """(B, R) of each batch; none where they are not known."""
    if squares is None:
        return []
    if row_norm:
        raise ValueError("newton_schulz: row_norm=True with squares: divide the rows before")
    wide = compute_dtype(gs[0].dtype)
    given = [(t.dtype, t.device, tuple(t.shape)) for t in squares]
    wanted = [(wide, g.device, tuple(g.shape[:-1])) for g in gs]
    if given != wanted:
        raise ValueError(f"newton_schulz: squares is {given}: for these g it has to be {wanted}")
    return [t.reshape(-1, t.size(-1)).contiguous() for t in squares]


@opaque("pgolf::newton_schulz", mutates_args=())
def _orthogonalise(
    gs: Sequence[Tensor],
    flat: Sequence[float],
    dtype: torch.dtype,
    row_norm: bool,
    safety: float,
    squares: Sequence[Tensor],
    impl: str,
) -> list[Tensor]:
    triples = [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]
    forward = launcher("newton_schulz", impl, "forward")
    with without_autocast(gs[0]):
        return forward(gs, triples, dtype, row_norm, safety, squares)


@_orthogonalise.register_fake
def _(gs, flat, dtype, row_norm, safety, squares, impl):
    return [g.new_empty(g.shape, dtype=dtype) for g in gs]


register_no_gradient("newton_schulz", _orthogonalise)


def _cpu_forward(gs: Sequence[Tensor], *options: Any) -> list[Tensor]:
    *options, squares = options
    return [
        _cpu_batch(g, *options, s)
        for g, s in zip(gs, squares or [None] * len(gs), strict=True)
    ]


def _cpu_batch(
    g: Tensor,
    coefficients: Coefficients,
    dtype: torch.dtype,
    row_norm: bool,
    safety: float,
    squares: Tensor | None,
) -> Tensor:
    x = torch.empty(g.shape, dtype=dtype)
    if squares is not None:
        return _iterate(torch.div(g, _divisor(squares, safety), out=x), coefficients)
    g = unit_stride(g)
    extension.load().newton_schulz_normalize(
        g.data_ptr(), x.data_ptr(), DTYPE_CODES[g.dtype], DTYPE_CODES[dtype], *g.shape,
        g.stride(), row_norm, safety, torch.get_num_threads(),
    )  # fmt: skip
    return _iterate(x, coefficients)


def samples() -> list[Sample]:
    """Square, wide and tall batches; the bench sizes are the banks of PR 1473."""

    def make(shape: tuple[int, int, int], scale: float = 1.0, **options: Any):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(sum(shape))
            matrix = scale * torch.randn(shape, generator=g, dtype=torch.float64)
            return (matrix.to(device, dtype),), {"dtype": dtype, **options}

        return build

    def with_squares(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        (g,), options = make((2, 24, 8), 8.0, safety=1.02)(device, dtype)
        squares = g.to(compute_dtype(dtype)).square().sum(-1)
        return (g,), {**options, "squares": squares}

    polar = {"coefficients": POLAR_EXPRESS, "row_norm": True, "safety": 1.02}
    small = {"2x8x24": (2, 8, 24), "1x33x17": (1, 33, 17), "3x16x16": (3, 16, 16)}
    banks = {"qo": (22, 512, 512), "kv": (22, 256, 512), "up": (11, 1536, 512)}
    return (
        [Sample(label, make(shape)) for label, shape in small.items()]
        + [Sample("2x33x70 polar express", make((2, 33, 70), **polar))]
        + [Sample("2x24x8 with sums of squares", with_squares)]
        + [Sample(f"{label} bank", make(shape), bench=True) for label, shape in banks.items()]
    )


def cost(
    g: Tensor,
    coefficients: Coefficients = CLASSIC,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Tensor | None = None,
) -> tuple[Work, Work]:
    """Every step is three GEMMs that read their operands and write their result; no backward."""
    batch, small, large = g.size(0), *sorted(g.shape[1:])
    item, steps = dtype.itemsize, len(coefficients)
    x, gram = batch * small * large * item, batch * small * small * item
    flops = 2 * batch * small * small * (2 * large + small) * steps
    prepare = 2 * g.numel() * g.element_size()  # for the norm, and to divide by it
    prepare, prepared = (prepare, x) if squares is None else (2 * nbytes(squares), 0)
    return (
        Work(flops, prepare + steps * (2 * x + 2 * gram), prepared + steps * (x + 2 * gram)),
        Work(0, 0, 0),
    )


OPERATOR = register(
    Operator(
        name="newton_schulz",
        call=newton_schulz,
        reference=reference,
        differentiable=(),
        implementations={
            "cpu": in_cpp("newton_schulz_normalize", forward=_cpu_forward),
            "triton": in_triton("newton_schulz", forward="newton_schulz_all"),
        },
        preferred={
            "cpu": [("cpu", "C++ norm before the matmuls, level with torch (python -m bench ops)")],
            "cuda": [("triton", "three launches a step (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
