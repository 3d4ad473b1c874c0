"""What Muon does before Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    g <- g min(1, max_norm / (norm + 1e-6));   m <- mu m + g;   u = g + mu m (Nesterov) or m
    X = u / (safety |u|_F + 1e-7), the rows of u of norm 1 before that with row_norm

Matrices of any shapes in two launches: momentum and direction with each row's sum of squares, then
the scale of each matrix from the sums in their order. X is what `newton_schulz(normalized=True)`
starts from; it is rounded to its dtype twice, before and after it is scaled. Where the norm is
infinite or NaN the momenta stay as they are, for the reason that `param_update` has, and X says
nothing.
Shapes: gradients and momenta (R, C), X (B, R, C) for each run of neighbours of one shape.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.inputs import check_tensors
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, launcher
from pgolf.ops.multi_tensor import (
    KERNEL_DTYPES,
    PR1473_MATRICES,
    Tensors,
    check_lists,
    check_numbers,
    check_same_shapes,
    clip_factor,
    codes,
    named,
    scalars_row,
    store,
    widened,
)
from pgolf.ops.newton_schulz import normalize
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import addresses, contiguous, nbytes


def batches(matrices: Tensors) -> list[tuple[int, int, int]]:
    """(B, R, C) of each run of matrices of one shape."""
    runs: list[tuple[int, int, int]] = []
    for m in matrices:  # (Dynamo of torch 2.9 groups no shapes by itertools.)
        shape = tuple(m.shape)
        count = runs.pop()[0] if runs and runs[-1][1:] == shape else 0
        runs.append((count + 1, *shape))
    return runs


def reference(
    grads: Tensors,
    momenta: Tensors,
    norm: Tensor,
    scalars: Tensor,
    nesterov: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
) -> list[Tensor]:
    """`muon_momentum` in plain torch."""
    row = named(scalars)
    clip, momentum = clip_factor(row["max_norm"], norm), row["momentum"]
    finite = norm.isfinite()
    directions = []
    for grad, buffer in zip(grads, momenta, strict=True):
        g = widened(grad) * clip
        m = momentum * widened(buffer) + g
        store(buffer, m, finite)
        directions.append(g + momentum * m if nesterov else m)
    rest = iter(directions)
    stacks = [torch.stack([next(rest) for _ in range(b)]) for b, _, _ in batches(grads)]
    return [normalize(u, dtype, row_norm, safety) for u in stacks]


def obstacle(impl: str, dtype: torch.dtype) -> str:
    """Why `impl` cannot give directions in that dtype; '' if it can."""
    return "" if dtype in KERNEL_DTYPES else f"it gives fp32 and bf16, not {dtype}"


@torch.no_grad()
def muon_momentum(
    grads: Tensors,
    momenta: Tensors,
    norm: Tensor,
    scalars: Tensor,
    nesterov: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
    impl: str = "auto",
) -> list[Tensor]:
    """Update the momenta in place and give normalised directions, batched by shape.

    Args:
        grads: (R, C) fp32 or bf16, of any shapes; those that are not contiguous are copied.
        momenta: one for each gradient, contiguous; updated, unless the norm is infinite or NaN.
        norm: 0-d, of all gradients, from `grad_norm`.
        scalars: (10,) row of numbers of the step (`multi_tensor.COLUMNS`): momentum, max_norm.
        dtype: of the result, fp32 or bf16.
        row_norm, safety: as for `newton_schulz`.
        impl: 'auto', 'reference', 'cpu' (C++) or 'cuda'.

    Returns:
        (B, R, C) for each run of neighbours of one shape. Every element is written, whatever the
        norm; if that is not finite, with any numbers, NaN too, which `newton_schulz` takes as it
        takes others and `param_update` does not look at.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    for name, tensors in (("grads", grads), ("momenta", momenta)):
        check_tensors("muon_momentum", name, tensors)
    grads, momenta = contiguous(*grads), list(momenta)
    check_lists("muon_momentum", grads=grads, momenta=momenta)
    check_same_shapes("muon_momentum", ("grads", "momenta"), grads, momenta)
    check_numbers("muon_momentum", grads[0], False, scalars, norm)
    for i, g in enumerate(grads):
        if g.dim() != 2 or not g.numel():
            raise ValueError(
                f"muon_momentum: grads[{i}] is {tuple(g.shape)}: it has to be (R, C) with elements"
            )
    if not 0 < safety < math.inf:  # NaN too
        raise ValueError(f"muon_momentum: safety={safety}: it has to be above 0 and finite")
    if dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"muon_momentum: dtype={dtype}: it has to be float32, bfloat16 or float64")
    impl = resolve("muon_momentum", impl, grads[0], dtype=dtype)
    if impl == "reference":
        return reference(grads, momenta, norm, scalars, nesterov, dtype, row_norm, safety)
    xs = [grads[0].new_empty(shape, dtype=dtype) for shape in batches(grads)]
    _direct(grads, momenta, xs, norm, scalars, nesterov, row_norm, safety, impl)
    return xs


# (An operator that changes arguments may not return a list of tensors, so xs is one of them.)
@opaque("pgolf::muon_momentum", mutates_args=("momenta", "xs"))
def _direct(
    grads: list[Tensor],
    momenta: list[Tensor],
    xs: list[Tensor],
    norm: Tensor,
    scalars: Tensor,
    nesterov: bool,
    row_norm: bool,
    safety: float,
    impl: str,
) -> None:
    launcher("muon_momentum", impl, "forward")(
        grads, momenta, xs, norm, scalars, nesterov, row_norm, safety
    )


@_direct.register_fake
def _(*args) -> None:
    return None


def _launchers(run: Run) -> dict[str, Callable]:
    def forward(
        grads: Tensors,
        momenta: Tensors,
        xs: Tensors,
        norm: Tensor,
        scalars: Tensor,
        nesterov: bool,
        row_norm: bool,
        safety: float,
    ) -> None:
        rows, cols = [g.size(0) for g in grads], [g.size(1) for g in grads]
        squares = grads[0].new_empty(sum(rows), dtype=torch.float64)
        matrices = [matrix for x in xs for matrix in x.unbind(0)]
        run(
            "muon_momentum", grads[0], addresses(*grads), addresses(*momenta), addresses(*matrices),
            rows, cols, codes(grads), codes(momenta), DTYPE_CODES[xs[0].dtype], scalars.data_ptr(),
            norm.data_ptr(), squares.data_ptr(), squares.numel(), nesterov, row_norm, safety,
        )  # fmt: skip

    return {"forward": forward}


def samples() -> list[Sample]:
    """Shapes that do and do not fit 16 bytes; the bench size is PR 1473's matrices."""

    def make(shapes: list[tuple[int, int]], x: torch.dtype | None = None, **options):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(len(shapes))
            random = [torch.randn(2, *s, generator=g, dtype=torch.float64) for s in shapes]
            grads, momenta = ([r[i].to(device, dtype) for r in random] for i in range(2))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            row = torch.tensor(scalars_row(momentum=0.9, max_norm=3.0), dtype=wide, device=device)
            norm = torch.tensor(5.0, dtype=wide, device=device)
            return (grads, momenta, norm, row), {"dtype": x or dtype, **options}

        return build

    return [
        Sample("3 shapes", make([(8, 64), (8, 64), (40, 12), (3, 5)])),
        Sample("row norm", make([(35, 8), (7, 300)], row_norm=True, safety=1.02)),
        Sample("heavy ball to bf16", make([(4, 6), (4, 6)], torch.bfloat16, nesterov=False)),
        Sample("66 matrices", make(PR1473_MATRICES), bench=True),
    ]


def cost(
    grads: Tensors,
    momenta: Tensors,
    norm: Tensor,
    scalars: Tensor,
    nesterov: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
) -> tuple[Work, Work]:
    """Gradients are read, momenta read and written, directions written."""
    x = sum(g.numel() for g in grads) * dtype.itemsize
    return Work(0, nbytes(*grads, *momenta), nbytes(*momenta) + x), Work(0, 0, 0)


OPERATOR = register(
    Operator(
        name="muon_momentum",
        call=muon_momentum,
        reference=reference,
        differentiable=(),
        implementations=in_extension(("muon_momentum",), _launchers, KERNEL_DTYPES),
        preferred={
            "cpu": [("cpu", "two passes in C++ (python -m bench ops --op muon_momentum)")],
            "cuda": [("cuda", "two launches for all matrices (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
        mutates=("momenta",),
        obstacle=obstacle,
    )
)
