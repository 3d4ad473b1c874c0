"""The optimiser step through the operators: clip, Muon, AdamW and average in few launches.

    U     <- muon_momentum(Muon's gradients, momenta);   X <- newton_schulz(U), a batch a shape
    param_update(AdamW's parameters and gradients, Muon's parameters and X, averages)

What changes from step to step is in one small tensor on the device, sent with a batch of tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pgolf.config import OptimConfig
from pgolf.ops.multi_tensor import COLUMNS, adamw_row, scalars_row
from pgolf.ops.muon_momentum import muon_momentum
from pgolf.ops.newton_schulz import newton_schulz_all
from pgolf.ops.param_update import param_update
from pgolf.optim.muon import Muon

OPERATORS = ("grad_norm", "muon_momentum", "param_update")


class FusedStep:
    """Steps the parameters of a Muon and an AdamW optimiser, whose state it works on.

    Args:
        ops: operator -> implementation.
    """

    def __init__(
        self,
        muon: Muon,
        adamw: torch.optim.AdamW,
        config: OptimConfig,
        ops: Mapping[str, str],
    ):
        self.muon, self.adamw = muon, adamw
        self.ops = dict.fromkeys(OPERATORS, "reference") | dict(ops)
        self.max_norm = config.grad_clip or float("inf")
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in muon.param_groups[0]["params"]:
            by_shape.setdefault(p.shape, []).append(p)
        self.matrices = [p for alike in by_shape.values() for p in alike]
        self.others = [p for group in adamw.param_groups for p in group["params"]]
        self.params = [*self.others, *self.matrices]
        self.groups = [i for i, g in enumerate(adamw.param_groups) for _ in g["params"]]
        self.groups += [len(adamw.param_groups)] * len(self.matrices)
        self.read_state()

    def read_state(self) -> None:
        """Take up the optimisers' state, which is made where there is none."""
        for p in self.matrices:
            state = self.muon.state[p]
            state.setdefault("momentum_buffer", torch.zeros_like(p))
        for p in self.others:
            state = self.adamw.state[p]
            state.setdefault("step", torch.zeros(()))
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(p))
        self.momenta = [self.muon.state[p]["momentum_buffer"] for p in self.matrices]
        self.exp_avgs = [self.adamw.state[p]["exp_avg"] for p in self.others]
        self.exp_avg_sqs = [self.adamw.state[p]["exp_avg_sq"] for p in self.others]
        self.count = int(self.adamw.state[self.others[0]]["step"]) if self.others else 0

    def write_state(self) -> None:
        """Put the number of steps where torch's AdamW looks for it."""
        for p in self.others:
            self.adamw.state[p]["step"] = torch.tensor(float(self.count), device=p.device)

    def numbers(self, average_rate: float) -> list[float]:
        """Of the next step: rows of scalars, from the optimisers' groups, end to end."""
        common = {"average_rate": average_rate, "max_norm": self.max_norm}
        rows = [
            adamw_row(
                self.count + 1, g["lr"], g["betas"], g["eps"], weight_decay=g["weight_decay"],
                **common,
            )
            for g in self.adamw.param_groups
        ]  # fmt: skip
        muon = {n: self.muon.param_groups[0][n] for n in ("lr", "momentum", "weight_decay")}
        return [x for row in (*rows, scalars_row(**muon, **common)) for x in row]

    def step(
        self,
        grads: Mapping[nn.Parameter, Tensor],
        norm: Tensor,
        numbers: Sequence[float] | Tensor,
        averages: Sequence[Tensor] = (),
    ) -> None:
        """One update from the gradients, whose norm is `norm` (0-d).

        `numbers` are those of this step, on the device or still to be sent there. `averages` are
        fp32, one for each of `params`; they move by the numbers' average_rate towards them.
        If the norm is not finite nothing moves, but the host's count of steps, from which AdamW's
        bias corrections follow: the host does not know yet, and ends the run when it does.
        """
        if not isinstance(numbers, Tensor):
            # From page-locked memory the host need not wait until the GPU comes to this copy.
            numbers = torch.tensor(numbers, pin_memory=norm.is_cuda)
        scalars = numbers.to(norm.device, non_blocking=True).view(-1, len(COLUMNS))
        self.count += 1
        self.update(grads, norm, scalars, averages)

    @torch.no_grad()
    def update(
        self,
        grads: Mapping[nn.Parameter, Tensor],
        norm: Tensor,
        scalars: Tensor,
        averages: Sequence[Tensor] = (),
    ) -> None:
        """The part of `step` that is on the device; scalars has a row a group."""
        directions = self._directions(grads, norm, scalars[-1]) if self.matrices else []
        param_update(
            self.params, [*(grads[p] for p in self.others), *directions], self.exp_avgs,
            self.exp_avg_sqs, norm, scalars, self.groups, averages, self.ops["param_update"],
        )  # fmt: skip

    def _directions(
        self, grads: Mapping[nn.Parameter, Tensor], norm: Tensor, scalars: Tensor
    ) -> list[Tensor]:
        """Orthogonalised, one a matrix."""
        options = self.muon.ns_options
        stacks, squares = muon_momentum(
            [grads[p] for p in self.matrices], self.momenta, norm, scalars,
            self.muon.nesterov, options["dtype"], options["row_norm"], self.ops["muon_momentum"],
        )  # fmt: skip
        orthogonal = newton_schulz_all(stacks, **options | {"row_norm": False}, squares=squares)
        return [x for stack in orthogonal for x in stack]
