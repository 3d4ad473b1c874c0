"""What Muon does before Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    g <- g min(1, max_norm / (norm + 1e-6));   m <- mu m + g;   u = g + mu m (Nesterov) or m

with row_norm each row of u divided by its norm after that. Matrices of any shapes in one launch,
which also gives the sum of each row's squares: `newton_schulz(squares=)` divides by the norm of a
matrix in its first products, so that no pass goes over u for it. With row_norm kernels round u to
its dtype twice, before and after it is divided. Where the norm is infinite or NaN the momenta stay
as they are, for the reason that `param_update` has, and u says nothing.
Shapes: gradients and momenta (R, C); for each run of neighbours of one shape, u (B, R, C) and
squares (B, R).
"""

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
from pgolf.ops.newton_schulz import dividend
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import addresses, compute_dtype, contiguous, nbytes


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
) -> tuple[list[Tensor], list[Tensor]]:
    """`muon_momentum` in plain torch."""
    row = named(scalars)
    clip, momentum = clip_factor(row["max_norm"], norm), row["momentum"]
    finite = norm.isfinite()
    directions = []
    for grad, buffer in zip(grads, momenta, strict=True):
        g = widened(grad) * clip
        m = momentum * widened(buffer) + g
        store(buffer, m, finite)
        directions.append(dividend(g + momentum * m if nesterov else m, row_norm))
    rest = iter(directions)
    stacks = [torch.stack([next(rest) for _ in range(b)]) for b, _, _ in batches(grads)]
    squares = [u.square().sum(-1).to(compute_dtype(dtype)) for u in stacks]
    return [u.to(dtype) for u in stacks], squares


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
    impl: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Update the momenta in place and give the directions, batched by shape, for Newton-Schulz.

    Args:
        grads: (R, C) fp32 or bf16, of any shapes; those that are not contiguous are copied.
        momenta: one for each gradient, contiguous; updated, unless the norm is infinite or NaN.
        norm: 0-d, of all gradients, from `grad_norm`.
        scalars: (10,) row of numbers of the step (`multi_tensor.COLUMNS`): momentum, max_norm.
        dtype: of the directions, fp32 or bf16.
        row_norm: divide each row by its norm, as `newton_schulz`.
        impl: 'auto', 'reference', 'cpu' (C++) or 'cuda'.

    Returns:
        (directions, squares): (B, R, C), and (B, R) in fp32 (fp64 of fp64) with the sum of squares
        of each of their rows before they were rounded, for each run of neighbours of one shape.
        Every element is written, whatever the norm; if that is not finite, with any numbers, NaN
        too, which `newton_schulz` takes as it takes others and `param_update` does not look at.

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
    if dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"muon_momentum: dtype={dtype}: it has to be float32, bfloat16 or float64")
    impl = resolve("muon_momentum", impl, grads[0], dtype=dtype)
    if impl == "reference":
        return reference(grads, momenta, norm, scalars, nesterov, dtype, row_norm)
    shapes = batches(grads)
    xs = [grads[0].new_empty(shape, dtype=dtype) for shape in shapes]
    squares = grads[0].new_empty(sum(b * r for b, r, _ in shapes), dtype=torch.float32)
    _direct(grads, momenta, xs, squares, norm, scalars, nesterov, row_norm, impl)
    parts = squares.split([b * r for b, r, _ in shapes])
    return xs, [t.view(b, r) for t, (b, r, _) in zip(parts, shapes, strict=True)]


# (An operator that changes arguments may not return a list of tensors, so xs is one of them.)
@opaque("pgolf::muon_momentum", mutates_args=("momenta", "xs", "squares"))
def _direct(
    grads: list[Tensor],
    momenta: list[Tensor],
    xs: list[Tensor],
    squares: Tensor,
    norm: Tensor,
    scalars: Tensor,
    nesterov: bool,
    row_norm: bool,
    impl: str,
) -> None:
    launcher("muon_momentum", impl, "forward")(
        grads, momenta, xs, squares, norm, scalars, nesterov, row_norm
    )


@_direct.register_fake
def _(*args) -> None:
    return None


def _launchers(run: Run) -> dict[str, Callable]:
    def forward(
        grads: Tensors,
        momenta: Tensors,
        xs: Tensors,
        squares: Tensor,
        norm: Tensor,
        scalars: Tensor,
        nesterov: bool,
        row_norm: bool,
    ) -> None:
        rows, cols = [g.size(0) for g in grads], [g.size(1) for g in grads]
        matrices = [matrix for x in xs for matrix in x.unbind(0)]
        run(
            "muon_momentum", grads[0], addresses(*grads), addresses(*momenta), addresses(*matrices),
            rows, cols, codes(grads), codes(momenta), DTYPE_CODES[xs[0].dtype], scalars.data_ptr(),
            norm.data_ptr(), squares.data_ptr(), squares.numel(), nesterov, row_norm,
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
        Sample("row norm", make([(35, 8), (7, 300)], row_norm=True)),
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
) -> tuple[Work, Work]:
    """Gradients are read, momenta read and written, directions and their rows' squares written."""
    x = sum(g.numel() for g in grads) * dtype.itemsize + 4 * sum(map(len, grads))
    return Work(0, nbytes(*grads, *momenta), nbytes(*momenta) + x), Work(0, 0, 0)


OPERATOR = register(
    Operator(
        name="muon_momentum",
        call=muon_momentum,
        reference=reference,
        differentiable=(),
        implementations=in_extension(("muon_momentum",), _launchers, KERNEL_DTYPES),
        preferred={
            "cpu": [("cpu", "one pass in C++ (python -m bench ops --op muon_momentum)")],
            "cuda": [("cuda", "one launch for all matrices (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
        mutates=("momenta",),
        obstacle=obstacle,
    )
)
