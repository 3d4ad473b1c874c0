"""Averages of the weights: EMA and SWA, in fp32 whatever the parameters' dtype.

SWA: Izmailov et al. 2018, arXiv 1803.05407.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from pgolf.model.gpt import GPT
from pgolf.optim.schedule import Clock, Schedule


class Averager:
    """Follows a model's weights as the schedule says and gives the weights to export.

    Args:
        fused: whether the optimiser step moves the EMA, by `ema_rate`, in the tensors `averages`.
        held: names of the parameters to follow, which need not be all; None: all.
    """

    def __init__(
        self,
        model: GPT,
        schedule: Schedule,
        fused: bool = False,
        held: Collection[str] | None = None,
    ):
        self.kind = schedule.config.average.averaging
        self.schedule = schedule
        self.params = {n: p for n, p in model.named_parameters() if held is None or n in held}
        # With schedule=iterations the EMA starts from the initial weights, as published.
        start_now = "ema" in self.kind and not schedule.by_share
        self.fused = fused and "ema" in self.kind
        self.averages: dict[str, Tensor] = self._copy() if self.fused else {}
        self.ema: dict[str, Tensor] = (self.averages or self._copy()) if start_now else {}
        self.swa: dict[str, Tensor] = {}
        self.snapshots = 0

    def _copy(self) -> dict[str, Tensor]:
        return {n: p.detach().to(torch.float32, copy=True) for n, p in self.params.items()}

    def ema_rate(self, before: Clock, after: Clock) -> float:
        """How far the next step moves `averages` towards its weights: 0 not at all, 1 all the way.

        `after` is the clock after that step; its time is an estimate.
        """
        # One pass moves weights and average, so the rate is needed before the step has happened,
        # and by a time budget before anyone knows how long it took: hence the estimate. It may miss
        # the step that crosses ema_start; the first one with a decay then copies the weights, as
        # that step would have. From there on `averages` is the average, which checkpoints keep.
        decay = self.schedule.ema_decay(before, after) if self.fused else None
        if decay is None:
            return 0.0
        started, self.ema = bool(self.ema), self.averages
        return 1.0 - decay if started else 1.0

    @torch.no_grad()
    def update(self, before: Clock, after: Clock) -> None:
        """Take in the weights after a step."""
        if "ema" in self.kind and not self.fused:
            decay = self.schedule.ema_decay(before, after)
            if decay == 0.0 or (decay is not None and not self.ema):
                self.ema = self._copy()
            elif decay is not None:
                self._lerp(self.ema, 1.0 - decay)
        if "swa" in self.kind and self.schedule.swa_snapshot(before, after):
            self.snapshots += 1
            if self.snapshots == 1:
                self.swa = self._copy()
            else:
                self._lerp(self.swa, 1.0 / self.snapshots)

    def _lerp(self, average: dict[str, Tensor], weight: float) -> None:
        torch._foreach_lerp_(
            list(average.values()), [p.detach().float() for p in self.params.values()], weight
        )

    def export(self) -> tuple[dict[str, Tensor], str]:
        """The weights to export, in the parameters' dtypes, and what they are in description."""
        if self.kind in ("swa", "ema_then_swa") and self.snapshots >= (
            2 if self.kind == "ema_then_swa" else 1
        ):
            chosen, description = self.swa, f"SWA of {self.snapshots} snapshots"
        elif self.ema:
            chosen, description = self.ema, "EMA"
        else:
            chosen, description = self._copy(), "last weights"
        return {n: chosen[n].to(p.dtype, copy=True) for n, p in self.params.items()}, description

    def state_dict(self) -> dict:
        return {"ema": self.ema, "swa": self.swa, "snapshots": self.snapshots}

    def load_state_dict(self, state: dict) -> None:
        self.ema, self.swa = (
            {n: t for n, t in state[kind].items() if n in self.params} for kind in ("ema", "swa")
        )
        self.snapshots = state["snapshots"]
        if self.fused and self.ema:
            for name, average in self.averages.items():
                average.copy_(self.ema[name])
            self.ema = self.averages
