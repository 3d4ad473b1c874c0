"""Muon: momentum whose update is orthogonalised.

Jordan et al. 2024, kellerjordan.github.io/posts/muon:

    buf <- mu buf + G;   U = G + mu buf (Nesterov) or buf;   X = newton_schulz(U)
    W <- W (1 - lr wd) - lr sqrt(max(1, rows / cols)) X

Matrices of one shape are a batch, and the batches go through the iteration together. All else is
done on flat buffers that hold them one after the other, in launches whose number is not theirs.
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
        grad_scale: one number on the device, as torch's fused optimisers have it: gradients are
            divided by it; None is 1.
        found_inf: likewise: where it is not 0 a step changes neither parameters nor momenta; None
            is 0. The host does not read it.

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
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        # By the first of the parameters that step together: momenta end to end, and their views.
        self.momenta: dict[nn.Parameter, tuple[Tensor, list[Tensor]]] = {}
        coefficients, safety = preset(ns_coefficients, ns_steps)
        self.ns_options = {
            "coefficients": coefficients,
            "dtype": ns_dtype,
            "row_norm": ns_row_norm,
            "safety": safety,
            "impl": ns_impl,
        }

    def __getstate__(self) -> dict:
        """For copies and pickles: torch keeps only what all optimisers have.

        A copy makes flat momenta of its own: pickled tensors do not share memory.
        """
        own = ("nesterov", "ns_dtype", "ns_options", "grad_scale", "found_inf")
        return super().__getstate__() | {n: getattr(self, n) for n in own} | {"momenta": {}}

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
            alike: dict[tuple, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.dtype, p.device].append(p)
            for params in alike.values():
                self._step_together(params, group)
        return loss

    def _step_together(self, params: Sequence[nn.Parameter], group: dict) -> None:
        """Step parameters of one dtype and device."""
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in params:
            shapes[p.shape].append(p)
        params = [p for batch in shapes.values() for p in batch]

        def batches(flat: Tensor) -> list[Tensor]:
            parts = flat.split([len(batch) * shape.numel() for shape, batch in shapes.items()])
            return [t.view(-1, *shape) for t, shape in zip(parts, shapes, strict=True)]

        lr, momentum = group["lr"], group["momentum"]
        grads = torch.cat([p.grad.reshape(-1) for p in params])
        if self.grad_scale is not None:
            grads /= self.grad_scale
        old = self._momenta(params)
        new = torch.add(grads, old, alpha=momentum)
        directions = torch.add(grads, new, alpha=momentum) if self.nesterov else new
        orthogonal = newton_schulz_all(batches(directions), **self.ns_options)
        changes = torch.cat([p.reshape(-1) for p in params]).mul_(-lr * group["weight_decay"])
        for shape, batch, x in zip(shapes, batches(changes), orthogonal, strict=True):
            batch.add_(x, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)
        if self.found_inf is None:
            old.copy_(new)
        else:  # on the device: nobody waits for it
            bad = self.found_inf.reshape(()).bool()
            torch.where(bad, old, new, out=old)
            changes.masked_fill_(bad, -0.0)  # to which it is added, -0.0 too stays as it is
        torch._foreach_add_(params, _views(changes, params))

    def _momenta(self, params: Sequence[nn.Parameter]) -> Tensor:
        """Those of the parameters in one buffer, which the states are views of from now on."""
        states = [self.state[p] for p in params]
        flat, views = self.momenta.get(params[0], (None, []))
        kept = [state.get("momentum_buffer") for state in states]
        if len(views) != len(kept) or any(a is not b for a, b in zip(views, kept, strict=True)):
            # There was no step with these yet, or a state was loaded.
            pairs = zip(params, kept, strict=True)
            begun = [torch.zeros_like(p) if m is None else m for p, m in pairs]
            flat = torch.cat([m.flatten() for m in begun])
            views = _views(flat, params)
            self.momenta[params[0]] = flat, views
            for state, view in zip(states, views, strict=True):
                state["momentum_buffer"] = view
        return flat


def _views(flat: Tensor, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Parts of a flat buffer, in the shapes of the parameters."""
    parts = flat.split([p.numel() for p in params])
    return [t.view_as(p) for t, p in zip(parts, params, strict=True)]
