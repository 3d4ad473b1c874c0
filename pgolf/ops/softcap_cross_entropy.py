"""Output matrix, soft cap and cross-entropy.

    z = x W^T;   logits = c tanh(z / c)  (c = 0: logits = z);   loss = -log softmax(logits)[target]

The cap is Gemma 2's (arXiv 2408.00118). Cap and softmax are in fp32. Losses are in nats. With
p = softmax(logits) the gradient of a loss is

    dz = (p - onehot(target)) (1 - (logits / c)^2),   dx = dz W,   dW = dz^T x

The kernels write dz over z, row by row while the losses are taken, so that the largest tensor of
the model is there once; the three products stay with torch.
Shapes: x (N, D), w (V, D), targets (N,), z and dz (N, V).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import register_gradient, rerouted
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import check_alike, compute_dtype, nbytes

COLUMN_LIMITS = {"cuda": 8192}  # a row lies in a block's registers
IGNORED = -100  # targets that have no loss, as in F.cross_entropy; csrc/softcap_cross_entropy.h
REDUCTIONS = ("mean", "sum", "none")
_INPUTS = Inputs(
    "softcap_cross_entropy", ("x", "w", "targets"), alike=("x", "w"), matmul=True
)


def softcap_logits(x: Tensor, w: Tensor, cap: float) -> Tensor:
    """Capped logits (N, V) in fp32."""
    z = F.linear(x, w)
    z = z.to(compute_dtype(z.dtype))
    return cap * torch.tanh(z / cap) if cap else z


@outside_autocast
def reference(
    x: Tensor, w: Tensor, targets: Tensor, cap: float = 30.0, reduction: str = "mean"
) -> Tensor:
    """`softcap_cross_entropy` in plain torch."""
    return F.cross_entropy(softcap_logits(x, w, cap), targets, reduction=reduction)


def _check(x: Tensor, w: Tensor, targets: Tensor, cap: float, reduction: str) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.size(1) != w.size(1) or not w.size(0):
        raise ValueError(
            f"softcap_cross_entropy: x is {tuple(x.shape)} and w {tuple(w.shape)}: they have to be "
            "(N, D) and (V, D), V at least 1"
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"softcap_cross_entropy: targets is {targets.dtype} {tuple(targets.shape)}: it has to "
            f"be int64 ({x.size(0)},)"
        )
    if targets.device != x.device:
        raise ValueError(
            f"softcap_cross_entropy: targets is on {targets.device} and x on {x.device}: move one"
        )
    if not 0 <= cap < float("inf"):  # NaN too
        raise ValueError(f"softcap_cross_entropy: cap={cap}: it has to be 0 (none) or more")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"softcap_cross_entropy: reduction={reduction!r}: it has to be one of {REDUCTIONS}"
        )
    check_alike("softcap_cross_entropy", x=x, w=w)


def obstacle(impl: str, columns: int) -> str:
    """Why `impl` cannot run so many columns; '' if it can."""
    return beyond(COLUMN_LIMITS, impl, columns, "columns")


def softcap_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    cap: float = 30.0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """The loss of every target, their sum or their mean, in fp32; as F.cross_entropy has them.

    Args:
        x: (N, D) features.
        w: (V, D) output matrix, of x's dtype and device; under autocast both are cast to its dtype,
            as by F.linear.
        targets: (N,) int64, in [0, V), or -100: ignored. Losses and gradients of ignored rows are
            0, and the mean is over the others: NaN, with gradients of 0, where there are none. Any
            other target is an error on a CPU; on a GPU, where nobody looks, its loss and gradients
            are NaN.
        cap: of the logits; 0 is none.
        reduction: 'none' (N,), 'sum' or 'mean' ().
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64) or 'cuda' (fp32, bf16; V <= 8192).

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    x, w, targets = _INPUTS(x, w, targets)
    _check(x, w, targets, cap, reduction)
    impl = resolve("softcap_cross_entropy", impl, x, columns=w.size(0))
    if impl == "reference":
        return reference(x, w, targets, cap, reduction)
    gradient = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    losses, _, whole = _forward(x, w, targets, cap, reduction, gradient, impl)
    if reduction == "none":
        return losses
    return _reduced(losses.detach(), whole if gradient else None, targets, reduction == "mean")


def _reduced(losses: Tensor, whole: Tensor | None, targets: Tensor, mean: bool) -> Tensor:
    """Their sum or mean, in the open: torch.compile makes one pass of what is a launch each.

    Its gradient comes to the operator through `whole` (), which stands for the sum, or the mean
    over all rows.
    """
    if mean:
        kept = targets != IGNORED
        count = kept.sum(dtype=losses.dtype)
        losses = losses.where(kept, 0)  # it is that: a compiler sees that both sums read `kept`
    # On a CPU a sum in fp32 is off by more than each loss. (A GPU adds in trees.)
    total = losses.sum(dtype=losses.dtype if losses.is_cuda else torch.float64)
    if mean:
        total = total / count
        if whole is not None:  # (Where nothing is ignored the factor is 1 to the bit.)
            whole = whole * (losses.numel() / count.clamp(min=1))
    total = total.to(losses.dtype)
    return total if whole is None else rerouted(total, whole)


# --- the opaque operator --------------------------------------------------------------------------


@opaque("pgolf::softcap_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, w: Tensor, targets: Tensor, cap: float, reduction: str, gradient: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, dz, which of the mean has 1 / N in it, and what stands for the sum or mean."""
    with without_autocast(x):
        z = F.linear(x, w)
    factor = 1 / max(1, x.size(0)) if reduction == "mean" else 1.0
    rows = launcher("softcap_cross_entropy", impl, "rows")
    losses = rows(z, targets.contiguous(), cap, factor, gradient)
    return losses, z if gradient else z.new_empty(0), _whole(losses, reduction)


def _whole(losses: Tensor, reduction: str) -> Tensor:
    """A ticket (see `rerouted`) of all losses together; empty where each has a gradient.

    It is never read. Where that costs no launch it is 0, for tools that compare all results.
    """
    if reduction == "none":
        return losses.new_empty(0)
    return losses.new_empty(()) if losses.is_cuda else losses.new_zeros(())


@_forward.register_fake
def _(x, w, targets, cap, reduction, gradient, impl):
    losses = x.new_empty(x.shape[:1], dtype=compute_dtype(x.dtype))
    dz = x.new_empty((x.size(0), w.size(0)) if gradient else 0)
    return losses, dz, _whole(losses, reduction)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.each = inputs[4] == "none"
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, of_each: Tensor | None, _: None, of_whole: Tensor | None) -> tuple:
    """g is a factor of each row: of x and dx. One of all is that of w and dw, which are smaller.

    dz, which is larger, is never gone through for it.
    """
    x, w, dz = ctx.saved_tensors
    g = of_each if ctx.each else of_whole
    wants_x, wants_w = ctx.needs_input_grad[:2]
    if g is None:
        return (None,) * 7
    factors = g.reshape(-1, 1)

    def scaled(t: Tensor) -> Tensor:
        return (t * factors).to(t.dtype)  # (factors have dimensions: a product in their dtype)

    dx = dw = None
    if wants_x:
        dx = scaled(dz @ w) if ctx.each else dz @ scaled(w)
    if wants_w:
        dw = dz.mT @ scaled(x) if ctx.each else scaled(dz.mT @ x)
    return dx, dw, *(None,) * 5


register_gradient("softcap_cross_entropy", _forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _launchers(run: Run) -> dict[str, Callable]:
    """The rows in the compiled half, by `run_cpp` or `run_cuda`."""

    def rows(z: Tensor, targets: Tensor, cap: float, factor: float, gradient: bool) -> Tensor:
        """The losses of z (N, V), which becomes its gradient times `factor` if that is wanted."""
        losses = z.new_empty(z.shape[:1], dtype=compute_dtype(z.dtype))
        run(
            "softcap_cross_entropy", z, z.data_ptr(), targets.data_ptr(), losses.data_ptr(),
            DTYPE_CODES[z.dtype], *z.shape, cap, factor, gradient,
        )  # fmt: skip
        return losses

    return {"rows": rows}


def samples() -> list[Sample]:
    """With a cap and without, rows of any length; the bench sizes end in the contest's tables.

    The bench sample with 16 features is there for the rows themselves: its products are small.
    """

    def make(
        rows: int, width: int, columns: int, cap: float, scale: float = 1.0, ignored: int = 0,
        **named: str,
    ):  # fmt: skip
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(rows + columns)
            x = torch.randn(rows, width, generator=g, dtype=torch.float64) * scale
            w = torch.randn(columns, width, generator=g, dtype=torch.float64)
            targets = torch.randint(columns, (rows,), generator=g).to(device)
            targets[:ignored] = IGNORED
            return (x.to(device, dtype), w.to(device, dtype), targets, cap), named

        return build

    return [
        Sample("7x16 to 40", make(7, 16, 40, 30.0)),
        Sample("5x8 to 1024, losses", make(5, 8, 1024, 30.0, 4.0, reduction="none")),
        Sample("3x24 to 1037, no cap", make(3, 24, 1037, 0.0, reduction="none")),
        Sample("2x8 to 2056, saturated", make(2, 8, 2056, 5.0, 8.0)),
        Sample("6x8 to 33, 2 ignored", make(6, 8, 33, 30.0, ignored=2)),
        Sample("5x8 to 1030, sum, 1 ignored", make(5, 8, 1030, 30.0, ignored=1, reduction="sum")),
        Sample("1x8 to 2", make(1, 8, 2, 30.0)),
        Sample("0x8 to 12", make(0, 8, 12, 30.0, reduction="none")),
        Sample("8192x16 to 1024", make(8192, 16, 1024, 30.0, 0.5), bench=True),
        Sample("8192x512 to 1024", make(8192, 512, 1024, 30.0, 0.1), bench=True),
        Sample("98304x512 to 1024", make(98304, 512, 1024, 30.0, 0.1), bench=True),
        Sample("8192x512 to 8192", make(8192, 512, 8192, 30.0, 0.1), bench=True),
    ]


def cost(
    x: Tensor, w: Tensor, targets: Tensor, cap: float = 30.0, reduction: str = "mean"
) -> tuple[Work, Work]:
    """Forward: a product, then z is read and dz written; backward: two products with dz."""
    z = x.size(0) * w.size(0) * x.element_size()
    flops = 2 * x.size(0) * w.numel()
    wide = compute_dtype(x.dtype).itemsize
    losses = (x.size(0) if reduction == "none" else 1) * wide
    return (
        Work(flops, nbytes(x, w, targets) + z, 2 * z + losses),
        Work(2 * flops, nbytes(x, w) + 2 * z + losses, nbytes(x, w)),
    )


OPERATOR = register(
    Operator(
        name="softcap_cross_entropy",
        call=softcap_cross_entropy,
        reference=reference,
        differentiable=("x", "w"),
        implementations=in_extension(("softcap_cross_entropy",), _launchers),
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("cuda", "fewer bytes than compiled (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
