"""Which parameter goes to which optimiser."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf import roles
from pgolf.config import OptimConfig
from pgolf.device import pick_dtype
from pgolf.model.gpt import GPT
from pgolf.optim import fused
from pgolf.optim.muon import Muon


def kind_of(name: str, side_proj_optimizer: str = "muon") -> str:
    """'matrix' (Muon), 'embed' or 'scalar' (AdamW)."""
    if roles.is_side_projection(name) and side_proj_optimizer != "muon":
        return "scalar"
    return {"matrix": "matrix", "table": "embed", "vector": "scalar"}[roles.kind(name)]


def fuses(ops: Mapping[str, str]) -> bool:
    """Whether an optimiser step with these choices of kernels goes through the operators."""
    return any(ops.get(name, "reference") != "reference" for name in fused.OPERATORS)


class Optimizers:
    """Muon and AdamW of one model, stepped together.

    The step goes through the operators where the choices name a kernel for one of them, and
    otherwise through torch.optim; both keep the same state.

    Args:
        ops: operator -> implementation; the reference where none is named.
        averages: by parameter name, fp32: moving averages that a step through the operators moves.
    """

    def __init__(
        self,
        model: GPT,
        config: OptimConfig,
        ops: Mapping[str, str] | None = None,
        averages: Mapping[str, Tensor] | None = None,
    ):
        self.config, ops = config, ops or {}
        named = dict(model.named_parameters())
        groups: dict[str, list] = {"matrix": [], "embed": [], "scalar": []}
        for name, p in named.items():
            groups[kind_of(name, config.side_proj_optimizer)].append(p)
        self.params = [p for group in groups.values() for p in group]
        self.muon = Muon(
            groups["matrix"],
            lr=config.matrix_lr,
            momentum=config.momentum,
            weight_decay=config.matrix_wd,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            ns_dtype=pick_dtype(config.ns_dtype, self.params[0].device)[0],
            ns_coefficients=config.ns_coefficients,
            ns_row_norm=config.ns_row_norm,
            ns_impl=ops.get("newton_schulz", "reference"),
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": groups["embed"], "lr": config.embed_lr, "weight_decay": config.embed_wd},
                {
                    "params": groups["scalar"],
                    "lr": config.scalar_lr,
                    "weight_decay": config.scalar_wd,
                },
            ],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self.base_lr = [[g["lr"] for g in o.param_groups] for o in (self.muon, self.adamw)]
        self.fused, self.averages = None, []
        if fuses(ops):
            self.fused = fused.FusedStep(self.muon, self.adamw, config, ops)
            by_param = {named[n]: t for n, t in (averages or {}).items()}
            self.averages = [by_param[p] for p in self.fused.params] if by_param else []
        elif averages:
            raise ValueError("averages need a kernel for param_update")

    def step(self, lr_scale: float, momentum: float, average_rate: float = 0.0) -> Tensor:
        """Clip the global gradient norm, update, drop the gradients; returns the norm (0-d).

        Averages move by `average_rate` towards the new parameters; 0 leaves them alone. If the norm
        is not finite, parameters, momenta, moments and averages stay as they were.
        """
        for optimizer, base in zip((self.muon, self.adamw), self.base_lr, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        if self.fused:
            norm = self.fused.step(self.averages, average_rate)
        else:
            limit = self.config.grad_clip or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.params, limit)
            # On the device: the host, which does not wait, hears of it two steps later.
            self.muon.found_inf = self.adamw.found_inf = norm.isfinite().logical_not().float()
            self.muon.step()
            self.adamw.step()
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict:
        if self.fused:
            self.fused.write_state()
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        if self.fused:
            self.fused.read_state()
