"""torch's own optimiser step, for comparison with param_update.

This is what training scripts do with torch alone: clip the gradients, then torch.optim.AdamW, fused
or foreach, Muon's update, and the moving average by foreach operations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgolf.ops.multi_tensor import COLUMNS
from pgolf.ops.param_update import muon_scale

Step = Callable[[], None]


def peer(fused: bool) -> Callable[..., Callable[..., None]]:
    """The function of a peer of `param_update`: its optimiser is made at the first call."""

    def function(*_: object, **__: object) -> Callable[..., None]:
        made: dict[int, Step] = {}

        def step(params: Sequence[Tensor], *args: object, **kwargs: object) -> None:
            key = params[0].data_ptr()
            if key not in made:
                made[key] = _step(fused, params, *args, **kwargs)
            made[key]()

        return step

    return function


def _adamw(
    fused: bool,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rows: list[dict[str, float]],
    groups: Sequence[int],
) -> torch.optim.AdamW:
    """An optimiser with these moments, whose next step is the one that `rows` describe."""
    mine = groups[: len(exp_avgs)]
    members = sorted(set(mine))
    made = []
    for group in members:
        row = rows[group]
        made.append({
            "params": [p for p, g in zip(params, mine, strict=False) if g == group],
            "lr": row["lr"], "weight_decay": row["weight_decay"], "eps": row["eps"],
            "betas": (1 - row["rate1"], 1 - row["rate2"]),
        })  # fmt: skip
    optimizer = torch.optim.AdamW(made, fused=fused or None, foreach=None if fused else True)
    row = rows[members[0]]
    # bias1 = 1 - beta1^step
    step = round(float(torch.tensor(1 - row["bias1"]).log() / torch.tensor(1 - row["rate1"]).log()))
    for p, m, v in zip(params, exp_avgs, exp_avg_sqs, strict=False):
        optimizer.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": m, "exp_avg_sq": v}
        if fused:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].to(p.device)
    return optimizer


def _step(
    fused: bool,
    params: Sequence[Tensor],
    sources: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norm: Tensor,
    scalars: Tensor,
    groups: Sequence[int],
    averages: Sequence[Tensor] = (),
) -> Step:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in scalars.tolist()]
    count = len(exp_avgs)
    optimizer = _adamw(fused, params, exp_avgs, exp_avg_sqs, rows, groups)
    for p, g in zip(params, sources[:count], strict=False):
        p.grad = g.clone()  # clipped in place
    scales = [muon_scale(p) for p in params[count:]]
    kinds = [
        ([p for p, s in zip(params[count:], scales, strict=True) if s == scale],
         [x for x, s in zip(sources[count:], scales, strict=True) if s == scale], scale)
        for scale in sorted(set(scales))
    ]  # fmt: skip
    muon = rows[groups[-1]]

    def step() -> None:
        torch.nn.utils.clip_grads_with_norm_(params[:count], rows[0]["max_norm"], norm)
        optimizer.step()
        for those, directions, scale in kinds:
            torch._foreach_mul_(those, 1 - muon["lr"] * muon["weight_decay"])
            torch._foreach_add_(those, directions, alpha=-muon["lr"] * scale)
        if averages:
            wide = [p.float() for p in params]
            torch._foreach_lerp_(list(averages), wide, rows[0]["average_rate"])

    return torch.no_grad()(step)
