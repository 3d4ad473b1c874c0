"""One optimiser step of all parameters in one pass: AdamW and Muon, and their averages.

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, as torch.optim.AdamW), g the clipped gradient:

    m <- m + (1 - beta1)(g - m);   v <- v + (1 - beta2)(g^2 - v)
    p <- p (1 - lr wd) - lr / bias1 m / (sqrt(v / bias2) + eps)

Muon, X the direction that `newton_schulz` made of an (R, C) parameter:

    p <- p (1 - lr wd) - lr sqrt(max(1, R / C)) X

Then the average follows, a <- a + rate (p - a). Every tensor is read once and written once.
Learning rates and all else that changes from step to step are rows of `scalars`, on the device; at
rate 0 averages are neither read nor written.

Where the norm of the gradients is infinite or NaN nothing changes, whatever max_norm is. The device
sees to that: the host, which does not wait for it, hears of such a step two steps later, and what
is in memory then are still the last good weights, moments and averages.
Shapes: parameters of any shapes, Muon's (R, C); scalars (groups, 10).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.inputs import check_tensors
from pgolf.ops.launch import Run, in_extension, launcher
from pgolf.ops.multi_tensor import (
    KERNEL_DTYPES,
    PR1473_MATRICES,
    Tensors,
    adamw_row,
    check_lists,
    check_numbers,
    check_same_shapes,
    clip_factor,
    codes,
    named,
    scalars_row,
    sizes,
    store,
    widened,
)
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import addresses, contiguous, nbytes


def muon_scale(param: Tensor) -> float:
    """sqrt(max(1, R / C))."""
    return max(1.0, param.size(0) / param.size(1)) ** 0.5


def reference(
    params: Tensors,
    sources: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    norm: Tensor,
    scalars: Tensor,
    groups: Sequence[int],
    averages: Tensors = (),
) -> None:
    """`param_update` in plain torch."""
    rows, finite = [named(row) for row in scalars.unbind(0)], norm.isfinite()
    for i, (param, source) in enumerate(zip(params, sources, strict=True)):
        s, p, x = rows[groups[i]], widened(param), widened(source)
        decayed = p * (1 - s["lr"] * s["weight_decay"])
        if i < len(exp_avgs):
            g = x * clip_factor(s["max_norm"], norm)
            m, v = widened(exp_avgs[i]), widened(exp_avg_sqs[i])
            m = m + s["rate1"] * (g - m)
            v = (1 - s["rate2"]) * v + s["rate2"] * g * g
            store(exp_avgs[i], m, finite)
            store(exp_avg_sqs[i], v, finite)
            divisor = v.sqrt() / s["bias2"].sqrt() + s["eps"]
            store(param, decayed - s["lr"] / s["bias1"] * m / divisor, finite)
        else:
            store(param, decayed - s["lr"] * muon_scale(param) * x, finite)
        if averages:
            rate, p, average = s["average_rate"], widened(param), averages[i]
            moved = torch.where(rate == 1, p, average + rate * (p - average))
            store(average, moved, finite & (rate != 0))


def _check(
    params: Tensors,
    sources: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    scalars: Tensor,
    groups: Sequence[int],
    averages: Tensors,
) -> None:
    name = "param_update"
    check_lists(
        name, params=params, sources=sources, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs,
        averages=averages,
    )  # fmt: skip
    check_same_shapes(name, ("params", "sources"), params, sources)
    check_same_shapes(name, ("params", "exp_avgs"), params[: len(exp_avgs)], exp_avgs)
    check_same_shapes(name, ("exp_avgs", "exp_avg_sqs"), exp_avgs, exp_avg_sqs)
    if averages:
        check_same_shapes(name, ("params", "averages"), params, averages)
    if len(groups) != len(params) or not all(0 <= g < scalars.size(0) for g in groups):
        raise ValueError(
            f"{name}: groups is {list(groups)}: one of the {scalars.size(0)} rows of scalars for "
            f"each of {len(params)} params"
        )
    wide = params[0].dtype == torch.float64
    for i, t in enumerate(averages):
        if t.dtype != (torch.float64 if wide else torch.float32):
            raise ValueError(f"{name}: averages[{i}] is {t.dtype}: it has to be float32")
    for i, (m, v) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if m.dtype != v.dtype:
            raise ValueError(f"{name}: exp_avgs[{i}] is {m.dtype}, exp_avg_sqs[{i}] {v.dtype}")
    for i, p in enumerate(params[len(exp_avgs) :], len(exp_avgs)):
        if p.dim() != 2 or not p.numel():
            raise ValueError(
                f"{name}: params[{i}] is {tuple(p.shape)}: without moments it is Muon's, (R, C)"
            )


@torch.no_grad()
def param_update(
    params: Tensors,
    sources: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    norm: Tensor,
    scalars: Tensor,
    groups: Sequence[int],
    averages: Tensors = (),
    impl: str = "auto",
) -> None:
    """Update parameters, moments and averages in place.

    Args:
        params: fp32 or bf16; those of AdamW first, as many as there are moments, then Muon's.
        sources: gradients of the first, directions X of the others; of either dtype.
        exp_avgs, exp_avg_sqs: AdamW's moments, fp32 or bf16.
        norm: 0-d, of all gradients, from `grad_norm`; infinite or NaN: nothing is written.
        scalars: (groups, 10) numbers of the step, see `multi_tensor.COLUMNS`.
        groups: row of `scalars` of each parameter.
        averages: fp32, one for each parameter, or none.
        impl: 'auto', 'reference', 'cpu' (C++) or 'cuda'.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine.
    """
    for name, tensors in (("params", params), ("sources", sources), ("exp_avgs", exp_avgs)):
        check_tensors("param_update", name, tensors)
    sources = contiguous(*sources)
    lists = [list(t) for t in (params, exp_avgs, exp_avg_sqs, averages)]
    params, exp_avgs, exp_avg_sqs, averages = lists
    _check(params, sources, exp_avgs, exp_avg_sqs, scalars, groups, averages)
    check_numbers("param_update", params[0], True, scalars, norm)
    impl = resolve("param_update", impl, params[0])
    if impl == "reference":
        reference(params, sources, exp_avgs, exp_avg_sqs, norm, scalars, groups, averages)
    else:
        _update(
            params, sources, exp_avgs, exp_avg_sqs, norm, scalars, list(groups), averages, impl
        )  # fmt: skip


@opaque(
    "pgolf::param_update",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "averages"),
)
def _update(
    params: list[Tensor],
    sources: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    norm: Tensor,
    scalars: Tensor,
    groups: list[int],
    averages: list[Tensor],
    impl: str,
) -> None:
    launcher("param_update", impl, "forward")(
        params, sources, exp_avgs, exp_avg_sqs, norm, scalars, groups, averages
    )


@_update.register_fake
def _(*args) -> None:
    return None


def _launchers(run: Run) -> dict[str, Callable]:
    def forward(
        params: Tensors,
        sources: Tensors,
        exp_avgs: Tensors,
        exp_avg_sqs: Tensors,
        norm: Tensor,
        scalars: Tensor,
        groups: Sequence[int],
        averages: Tensors,
    ) -> None:
        muon = [0] * (len(params) - len(exp_avgs))
        scales = [0.0] * len(exp_avgs) + [muon_scale(p) for p in params[len(exp_avgs) :]]
        run(
            "param_update", params[0], addresses(*params), addresses(*sources),
            addresses(*exp_avgs) + muon, addresses(*exp_avg_sqs) + muon,
            addresses(*averages) or [0] * len(params), sizes(params), codes(params),
            codes(sources), codes(exp_avgs) + muon, scales, groups, scalars.data_ptr(),
            scalars.size(0), norm.data_ptr(),
        )  # fmt: skip

    return {"forward": forward}


Shapes = Sequence[tuple[int, ...]]


def _sample(
    adamw: Shapes, muon: Shapes, rate: float, state: torch.dtype | None = None, norm: float = 5.0
):
    """Arguments for parameters of these shapes; gradients are clipped to a norm of 3."""

    def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        g = torch.Generator().manual_seed(len(adamw) + len(muon))
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def random(shapes: Shapes, to: torch.dtype, scale: float = 1.0) -> list[Tensor]:
            made = [torch.randn(s, generator=g, dtype=torch.float64) * scale for s in shapes]
            return [t.to(device, to) for t in made]

        params, sources = random([*adamw, *muon], dtype), random([*adamw, *muon], dtype, 0.1)
        moments = random(adamw, state or dtype, 0.1)
        squares = [t.abs() for t in random(adamw, state or dtype, 0.01)]
        averages = random([*adamw, *muon], wide) if rate else []
        common = {"weight_decay": 0.1, "average_rate": rate, "max_norm": 3.0}
        rows = [
            adamw_row(3, 0.02, (0.9, 0.95), 1e-8, **common),
            adamw_row(3, 0.01, (0.9, 0.95), 1e-8, **common),
            scalars_row(lr=0.05, **common),
        ]
        groups = [i % 2 for i in range(len(adamw))] + [2] * len(muon)
        scalars = torch.tensor(rows, dtype=wide, device=device)
        length = torch.tensor(norm, dtype=wide, device=device)
        args = (params, sources, moments, squares, length, scalars, groups)
        return args, {"averages": averages}

    return build


def samples() -> list[Sample]:
    """Mixed lists, tails of all lengths; the bench sizes are PR 1473's parameters."""
    small = [(5, 7), (), (4097,), (64,)]
    tables = [(1024, 512), (3072, 112), (1024, 128), (512, 112), (256, 128), (5, 512), (512,)]
    others = [*tables, *[(512,), (512,), (2, 512), (8,)] * 11, *[()] * 4]
    return [
        Sample("both kinds", _sample(small, [(6, 2), (3, 33)], 0.25)),
        Sample("no averages", _sample([(9,), (0,)], [(2, 8)], 0.0)),
        Sample("fp32 state, new averages", _sample([(31, 3)], [], 1.0, torch.float32)),
        Sample("pr1473 AdamW", _sample(others, [], 0.003, norm=1.0), bench=True),
        Sample("pr1473 all", _sample(others, PR1473_MATRICES, 0.003, norm=1.0), bench=True),
    ]


def cost(
    params: Tensors,
    sources: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    norm: Tensor,
    scalars: Tensor,
    groups: Sequence[int],
    averages: Tensors = (),
) -> tuple[Work, Work]:
    """Sources are read, the rest read and written."""
    both = nbytes(*params, *exp_avgs, *exp_avg_sqs, *averages)
    return Work(0, both + nbytes(*sources), both), Work(0, 0, 0)


OPERATOR = register(
    Operator(
        name="param_update",
        call=param_update,
        reference=reference,
        differentiable=(),
        implementations=in_extension(("param_update",), _launchers, KERNEL_DTYPES),
        preferred={
            "cpu": [("cpu", "one pass in C++ (python -m bench ops --op param_update)")],
            "cuda": [("cuda", "one launch for all parameters (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
        mutates=("params", "exp_avgs", "exp_avg_sqs", "averages"),
    )
)
