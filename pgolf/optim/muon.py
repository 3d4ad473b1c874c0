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
from pgolf.ops.tensors import compute_dtype


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
            stacks = [self._directions(alike, group) for alike in shapes.values()]
            found = newton_schulz_all(stacks, **self.ns_options) if stacks else []
            for (shape, params), updates in zip(shapes.items(), found, strict=True):
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                decay = self._or_one(1 - group["lr"] * group["weight_decay"], params[0])
                torch._foreach_mul_(params, decay)
                updates = self._or_zero(updates.to(params[0].dtype), 0.0)
                torch._foreach_add_(params, list(updates), alpha=-group["lr"] * scale)
        return loss

    def _directions(self, params: Sequence[nn.Parameter], group: dict) -> Tensor:
        """(B, R, C) momenta of matrices of one shape, after adding their gradients."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        # To which -0.0 is added stays as it is, -0.0 itself too.
        grads = list(self._or_zero(torch.stack([p.grad for p in params]), -0.0))
        torch._foreach_mul_(buffers, self._or_one(group["momentum"], buffers[0]))
        torch._foreach_add_(buffers, grads)
        if not self.nesterov:
            return torch.stack(buffers)
        return torch.stack(torch._foreach_add(grads, buffers, alpha=group["momentum"]))

    # What `found_inf` makes of a step is decided on the device: nobody waits for it, and a factor
    # or a sum for all of a batch costs fewer launches than a choice for each matrix.

    def _or_one(self, factor: float, like: Tensor) -> Tensor | float:
        """The factor, but 1 where a gradient was not finite."""
        if self.found_inf is None:
            return factor
        held = torch.full((), factor, dtype=compute_dtype(like.dtype), device=like.device)
        return held.masked_fill_(self.found_inf.reshape(()) != 0, 1.0)

    def _or_zero(self, batch: Tensor, zero: float) -> Tensor:
        """The batch, but zeros where a gradient was not finite."""
        if self.found_inf is None:
            return batch
        return batch.masked_fill(self.found_inf.reshape(()) != 0, zero)
