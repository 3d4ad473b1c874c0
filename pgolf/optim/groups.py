"""Which parameter goes to which optimiser."""

import torch

from pgolf.config import OptimConfig
from pgolf.model.gpt import DTYPES, GPT
from pgolf.optim.muon import Muon

SIDE_PROJECTIONS = ("bigram.proj.weight", "ve_shared.proj.weight")
TABLES = ("tok_emb.weight", "lm_head.weight", "bigram.embed.weight", "ve_shared.embed.weight")


def kind_of(name: str, side_proj_optimizer: str = "muon") -> str:
    """'matrix' (Muon), 'embed' or 'scalar' (AdamW)."""
    if name in TABLES:
        return "embed"
    if name in SIDE_PROJECTIONS:
        return "matrix" if side_proj_optimizer == "muon" else "scalar"
    return "matrix" if name.startswith("blocks.") and name.endswith(".weight") else "scalar"


class Optimizers:
    """Muon and AdamW of one model, stepped together."""

    def __init__(self, model: GPT, config: OptimConfig):
        self.config = config
        groups: dict[str, list] = {"matrix": [], "embed": [], "scalar": []}
        for name, p in model.named_parameters():
            groups[kind_of(name, config.side_proj_optimizer)].append(p)
        self.params = [p for group in groups.values() for p in group]
        self.muon = Muon(
            groups["matrix"],
            lr=config.matrix_lr,
            momentum=config.momentum,
            weight_decay=config.matrix_wd,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            ns_dtype=DTYPES[config.ns_dtype],
            ns_coefficients=config.ns_coefficients,
            ns_row_norm=config.ns_row_norm,
            ns_impl=model.ops["newton_schulz"],
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

    def step(self, lr_scale: float, momentum: float) -> torch.Tensor:
        """Clip the global gradient norm, update, drop the gradients; returns the norm (0-d)."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.config.grad_clip or float("inf"))
        for optimizer, base in zip((self.muon, self.adamw), self.base_lr, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        self.muon.step()
        self.adamw.step()
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
