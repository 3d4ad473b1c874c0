"""Which parameter goes to which optimiser."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pgolf import roles
from pgolf.config import OptimConfig
from pgolf.device import pick_dtype
from pgolf.errors import TrainingError
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


def local_limit(config: OptimConfig, world: int) -> float:
    """What each rank's own gradients are clipped to; 0: nothing, as all ranks' are clipped."""
    return config.grad_clip if config.clip_scope == "local" and world > 1 else 0.0


class Optimizers:
    """Muon and AdamW of one model, stepped together.

    The step goes through the operators where the choices name a kernel for one of them, and
    otherwise through torch.optim; both keep the same state.

    Args:
        ops: operator -> implementation; the reference where none is named.
        averages: by parameter name, fp32: moving averages that a step through the operators moves.
        held: names of the parameters to step, which need not be all; None: all.
        world: ranks, each of which may have clipped its own gradients before.
    """

    def __init__(
        self,
        model: GPT,
        config: OptimConfig,
        ops: Mapping[str, str] | None = None,
        averages: Mapping[str, Tensor] | None = None,
        held: Collection[str] | None = None,
        world: int = 1,
    ):
        if local_limit(config, world):  # what comes here was clipped
            config = replace(config, grad_clip=0.0)
        self.config, ops = config, ops or {}
        kinds = {n: kind_of(n, config.side_proj_optimizer) for n, _ in model.named_parameters()}
        self.of_muon = {name for name, kind in kinds.items() if kind == "matrix"}  # held or not
        named = {n: p for n, p in model.named_parameters() if held is None or n in held}
        self.names = {p: name for name, p in named.items()}
        groups: dict[str, list] = {"matrix": [], "embed": [], "scalar": []}
        for name, p in named.items():
            groups[kinds[name]].append(p)
        self.params = [p for group in groups.values() for p in group]
        self.muon = Muon(
            [{"params": groups["matrix"]}],  # a rank may own none
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

    def numbers(self, lr_scale: float, momentum: float, average_rate: float = 0.0) -> list[float]:
        """What a step with these arguments reads on the device, to be sent there beforehand."""
        for optimizer, base in zip((self.muon, self.adamw), self.base_lr, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        return self.fused.numbers(average_rate) if self.fused else []

    def step(
        self,
        grads: Mapping[nn.Parameter, Tensor],
        norm: Tensor,
        lr_scale: float,
        momentum: float,
        average_rate: float = 0.0,
        sent: Tensor | None = None,
    ) -> None:
        """Clip the global gradient norm and update.

        Args:
            grads: of each parameter, fp32 or bf16; may be scaled in place.
            norm: 0-d, of all gradients, those of parameters that others step among them.
            lr_scale: factor of every learning rate.
            momentum: Muon's.
            average_rate: how far averages move towards the new parameters; 0 leaves them alone.
            sent: what `numbers` gave for the same rates, where it is on the device already.

        If the norm is not finite, parameters, momenta, moments and `averages` stay as they were.

        Raises:
            ValueError: a parameter has no gradient.
        """
        missing = [name for p, name in self.names.items() if p not in grads]
        if missing:
            raise ValueError(
                f"{len(missing)} parameters have no gradient, {missing[0]} among them: run a "
                "backward pass first"
            )
        numbers = self.numbers(lr_scale, momentum, average_rate) if sent is None else sent
        if self.fused:
            self.fused.step(grads, norm, numbers, self.averages)
            return
        for p in self.params:
            p.grad = grads[p].to(p.dtype)
        if limit := self.config.grad_clip:
            # Both divide by it on their way, as clip_grads_with_norm_ would in a pass of its own:
            # (norm + 1e-6) / limit, in one launch.
            epsilon = torch.tensor(1e-6 / limit)
            scale = torch.add(epsilon, norm.float(), alpha=1 / limit).clamp(min=1.0)
            self.muon.grad_scale = self.adamw.grad_scale = scale
        # On the device: the host, which does not wait, hears of it two steps later. (0 times
        # what is not finite is NaN; isfinite takes four launches.)
        self.muon.found_inf = norm * 0.0 != 0.0
        self.adamw.found_inf = self.muon.found_inf.float()
        self.muon.step()
        self.adamw.step()
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(
        self, gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda held: held
    ) -> dict[str, Any]:
        """Momenta and moments by parameter, and AdamW's number of steps.

        Args:
            gather: of tensors by name of `held`, those of all parameters (`Exchange.gather`).
        """
        if self.fused:
            self.fused.write_state()

        def of(optimizer: torch.optim.Optimizer, key: str) -> dict[str, Tensor]:
            return {self.names[p]: s[key] for p, s in optimizer.state.items() if key in s}

        steps = of(self.adamw, "step").values()
        state = {"steps": int(next(iter(steps), 0))}
        for kind in ("exp_avg", "exp_avg_sq"):
            # Copies: what is gathered may be a view of a buffer for all matrices.
            moments = gather(of(self.adamw, kind)).items()
            state[kind] = {n: t.clone() for n, t in moments if n not in self.of_muon}
        momenta = gather(of(self.muon, "momentum_buffer")).items()
        return state | {"momentum": {n: t for n, t in momenta if n in self.of_muon}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, of these parameters and perhaps of others.

        Raises:
            TrainingError: it is from a version that kept it otherwise, or lacks a parameter.
        """
        if "momentum" not in state:
            raise TrainingError(
                "the optimiser's state in this checkpoint is of an older version: train anew, or "
                "go on with that version"
            )
        known = state["momentum"].keys() | state["exp_avg"].keys()
        if state["steps"] and (missing := [n for n in self.names.values() if n not in known]):
            raise TrainingError(
                f"this checkpoint lacks the optimiser's state of {len(missing)} parameters, "
                f"{missing[0]} among them: go on from another one, or train anew"
            )
        for p in self.muon.param_groups[0]["params"]:
            if (momentum := state["momentum"].get(self.names[p])) is not None:
                self.muon.state[p] = {"momentum_buffer": momentum.clone()}
        for p in (p for group in self.adamw.param_groups for p in group["params"]):
            if (name := self.names[p]) in state["exp_avg"]:
                self.adamw.state[p] = {
                    "step": torch.tensor(float(state["steps"]), device=p.device),
                    "exp_avg": state["exp_avg"][name].clone(),
                    "exp_avg_sq": state["exp_avg_sq"][name].clone(),
                }
        if self.fused:
            self.fused.read_state()
