"""Parameters that training did not reach.

One that never had a gradient is what weight decay made of it: a multiple of its initial value.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.config import Config
from pgolf.optim.groups import kind_of

# How far off a multiple rounding alone may bring a parameter: in bf16 each decay by up to 2^-9.
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
# Parameters of a setting, by the first part of their names -> the setting, and how it is off.
SETTINGS = {
    "bigram": ("bigram_buckets", "0"),
    "ve_shared": ("ve_layers", "none"),
    "ve_layer_scales": ("ve_layers", "none"),
    "smear": ("smear", "off"),
    "skip_weights": ("unet_skips", "false"),
    "backout": ("backout", "false"),
    "resid_mix": ("resid_mix", "off"),
}


def idle_parameters(
    config: Config, initial: Mapping[str, Tensor], weights: Mapping[str, Tensor], steps: int
) -> list[str]:
    """A line for each setting whose parameters never took a gradient, and one for the others."""
    idle: dict[tuple[str, str], list[str]] = {}
    for name, weight in weights.items():
        kind = kind_of(name, config.optim.side_proj_optimizer)
        lr, wd = (getattr(config.optim, f"{kind}_{key}") for key in ("lr", "wd"))
        if untrained(initial[name], weight, max(1 - lr * wd, 0.0) ** steps):
            part = "resid_mix" if name.endswith("resid_mix") else name.partition(".")[0]
            idle.setdefault(SETTINGS.get(part, ("", "")), []).append(name)
    lines = []
    for (key, off), names in idle.items():
        listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        count = f"{len(names)} of {len(weights)} parameters" if len(names) > 1 else "a parameter"
        line = f"{count} never took a gradient ({listed}): train for longer"
        if key:
            line = f"{key}={getattr(config.model, key)}: {line}, or save the bytes by {key}={off}"
        lines.append(line)
    return lines


@torch.no_grad()
def untrained(initial: Tensor, weight: Tensor, least: float) -> bool:
    """Whether decay alone made `weight`: `initial` times `least` to 1; False if that is not known.

    (A step of AdamW moves alike what has gradients of one sign: by more than decay can.)
    """
    old, new = initial.double().flatten(), weight.double().flatten()
    if torch.equal(old, new):
        return True
    if old.numel() == 1 or not old.any():  # a multiple of anything; moved from where decay cannot
        return False
    factor, near = (old @ new / (old @ old)).item(), ROUNDING[weight.dtype]
    apart = (new - old * factor).norm() / old.norm()
    return apart <= near * factor and least * (1 - near) <= factor <= 1 + near
