"""Muon: momentum whose update is orthogonalised.

Jordan et al. 2024, kellerjordan.github.io/posts/muon:

    buf <- mu buf + G;   U = G + mu buf (Nesterov) or buf;   X = newton_schulz(U)
    W <- W (1 - lr wd) - lr sqrt(max(1, rows / cols)) X

Matrices of one shape are a batch, and the batches go through the iteration together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pgolf.ops.newton_schulz import newton_schulz_all, preset


class Muon(torch.optim.Optimizer):
    """Optimiser of 2-D weights; parameters without a gradient are left alone.

    Defaults are those of torch.optim.Muon, whose momentum is an average instead of a sum.

    Args:
        params: matrices, by themselves, with their names, or in groups, as torch's optimisers take.
        lr, momentum, weight_decay: may change between steps, in `param_groups`.
        nesterov: whether the update is the gradient plus the momentum, not the momentum alone.
        ns_steps, ns_coefficients, ns_row_norm: the iteration, see `newton_schulz` and its `preset`.
        ns_dtype: of the iteration.
        ns_impl: implementation of `newton_schulz`.

    Attributes:
        found_inf: one number on the device, fp32, as torch's fused optimisers have it: where it is
            1 a step changes neither parameters nor momenta; None is 0. The host does not read it.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict] | Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        ns_coefficients: str = "classic",
        ns_row_norm: bool = False,
        ns_impl: str = "reference",
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(list(params), defaults)
        self.nesterov, self.ns_dtype = nesterov, ns_dtype
        self.found_inf: Tensor | None = None
        coefficients, safety = preset(ns_coefficients, ns_steps)
        self.ns_options = {
            "coefficients": coefficients,
            "dtype": ns_dtype,
            "row_norm": ns_row_norm,
            "safety": safety,
            "impl": ns_impl,
        }

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with settings of their own.

        Raises:
            ValueError: one of them is no matrix.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, p in enumerate(group["params"]):
            if p.dim() != 2 or not p.numel():
                name = group["param_names"][i] if "param_names" in group else f"parameter {i}"
                raise ValueError(
                    f"Muon: {name} is {tuple(p.shape)}: it has to be (R, C) with elements; give "
                    "others to AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Apply one update from the gradients.

        Args:
            closure: computes the gradients again and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            stacks = [
                torch.stack([self._direction(p, group) for p in alike]) for alike in shapes.values()
            ]
            found = newton_schulz_all(stacks, **self.ns_options) if stacks else []
            for (shape, params), updates in zip(shapes.items(), found, strict=True):
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                moved = torch._foreach_mul(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    moved, list(updates.to(params[0].dtype)), alpha=-group["lr"] * scale
                )
                self._store(params, moved)
        return loss

    def _direction(self, p: nn.Parameter, group: dict) -> Tensor:
        """Momentum of one matrix, after adding its gradient."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        moved = buffer.mul(group["momentum"]).add_(p.grad)
        self._store([buffer], [moved])
        return p.grad.add(moved, alpha=group["momentum"]) if self.nesterov else moved

    def _store(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """targets <- values, unless `found_inf` says that a gradient was not finite."""
        if self.found_inf is not None:
            skip = self.found_inf != 0
            values = [torch.where(skip, t, v) for t, v in zip(targets, values, strict=True)]
        torch._foreach_copy_(targets, values)
