"""What of a run's settings did nothing: looked at once, when training is over.

Initial weights are drawn again, by the same seed: nothing is kept while a run trains, and one that
was resumed, or that several ranks have trained, is judged like any other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.model.matrices import cast_all
from pgolf.settings import resolve_layers
from pgolf.training.idle import idle_parameters
from pgolf.training.trainer import Trainer


class Audit:
    """Looks at a trainer before `take_export` and after it.

    Args:
        trainer: that has trained, late QAT still as it was in the last step; its weights gathered.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.config = trainer, trainer.config
        self.last = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
        self._late_qat = self._qat()

    def warnings(self, exported: str) -> list[str]:
        """What did nothing, a line each with the remedy; empty if all did what it is there for.

        Args:
            exported: the name of the weights that the model has now.
        """
        initial = GPT(self.config.model)
        init_weights(initial, self.config.run.seed)
        weights = {n: p.detach().cpu() for n, p in self.trainer.model.named_parameters()}
        return [
            *idle_parameters(
                self.config, dict(initial.named_parameters()), weights, self.trainer.clock.step
            ),
            *self._late_qat,
            *self._averages(exported, weights),
            *self._momentum(),
            *self._xsa(),
        ]

    def _length(self) -> str:
        return f"in {self.trainer.clock.step} steps"

    @torch.no_grad()
    def _qat(self) -> list[str]:
        """Late QAT: whether it came, has matrices, and changes them."""
        qat, q, by_share = self.trainer.qat, self.config.quant, self.trainer.schedule.by_share
        key = "qat_start" if by_share else "qat_start_lr"
        what = f"late QAT ({key}={getattr(q, key):g})"
        if q.qat_start >= 1.0:
            return []
        if not qat.plans:
            return [f"{what} has no matrix: lower small_numel or bits, or set qat_start=1"]
        if not qat.on:
            change = "lower" if by_share else "raise"
            return [f"{what} never came on {self._length()}: {change} it, or train for longer"]
        same = [m for m in qat.plans if torch.equal(cast_all([m], m.weight.dtype)[0], m.weight)]
        if not same:
            return []
        return [f"{what} changes nothing in {len(same)} of {len(qat.plans)} matrices: fewer bits"]

    def _averages(self, exported: str, weights: Mapping[str, Tensor]) -> list[str]:
        """Averaging: whether it began, and gives other weights than the last step did."""
        a, by_share = self.config.average, self.trainer.schedule.by_share
        kind, snapshots = a.averaging, self.trainer.averager.snapshots
        if "swa" in kind and not exported.startswith("SWA"):
            keys = ("swa_start", "swa_every") if by_share else ("swa_start_lr", "swa_every_iters")
            why = f"SWA took {snapshots} snapshots"
        elif kind == "ema" and exported != "EMA":
            keys, why = ("ema_start",), "the EMA never began"
        elif kind != "none" and all(torch.equal(self.last[n], w) for n, w in weights.items()):
            return [f"averaging={kind}: the {exported} is just the last weights: begin earlier"]
        else:
            return []
        values = ", ".join(f"{key}={getattr(a, key):g}" for key in keys)
        instead = f"{why} {self._length()} ({values}), {exported} exported"
        return [f"averaging={kind}: {instead}: begin earlier, or train for longer"]

    def _momentum(self) -> list[str]:
        """The momentum of schedule=iterations, which a short run does not reach."""
        o, schedule = self.config.optim, self.trainer.schedule
        reached = schedule.momentum(self.trainer.clock)
        if schedule.by_share or abs(reached - o.momentum) < 1e-6:
            return []
        iters = self.config.schedule.momentum_warmup_iters
        return [
            f"momentum={o.momentum:g} only came to {reached:.3g} {self._length()} "
            f"(momentum_warmup_iters={iters}): lower that, or train for longer"
        ]

    def _xsa(self) -> list[str]:
        m, blocks = self.config.model, self.trainer.model.blocks
        wanted = resolve_layers("xsa_layers", m.xsa_layers, m.layers)
        missing = [str(i) for i in wanted if not blocks[i].attn.exclusive]
        lost = ", ".join(missing)
        return [f"xsa_layers={m.xsa_layers}: no XSA in layers {lost}"] if missing else []
