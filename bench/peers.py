"""Public kernels that compute the same functions, where they are installed.

A peer is called through its own public interface and has to pass the same check as our kernels.
Only torch's own run without a GPU.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import torch_optim
from pgolf.ops.newton_schulz import CLASSIC
from pgolf.ops.operator import Operator, Sample


@dataclass(frozen=True)
class Peer:
    """A public implementation of one of the operators.

    Attributes:
        operator: its name in the registry.
        package, module: what pip installs, what Python imports.
        function: takes a sample's arguments, and returns the function to call with them.
        unfit: why a sample's arguments are not the peer's; '' if they are.
        variant: if no sample of ours is the peer's: a word for the label, and a function from a
            sample's arguments to those that the peer needs.
    """

    name: str
    operator: str
    package: str
    module: str
    function: Callable[..., Callable[..., Tensor]]
    unfit: Callable[..., str]
    variant: tuple[str, Callable[[tuple, dict[str, Any]], tuple[tuple, dict]]] | None = None

    def missing(self) -> str:
        """Why it cannot run here; '' if it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        runs = self.module == "torch" or torch.cuda.is_available()
        return "" if runs else "torch sees no GPU here"


def _relu2_mlp(*_: Tensor | float) -> Callable[..., Tensor]:
    from liger_kernel.ops import LigerReLUSquaredFunction

    def mlp(h: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> Tensor:
        return F.linear(LigerReLUSquaredFunction.apply(F.linear(h, w_up)), w_down)

    return mlp


def _relu2_unfit(
    h: Tensor, w_up: Tensor, w_down: Tensor, slope: float, rstd: Tensor | None = None
) -> str:
    return "" if slope == 0.0 and rstd is None else "only relu^2, slope 0 and no rstd"


def _with_slope_0(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return (*args[:3], 0.0), kwargs


def _newton_schulz(variant: str) -> Callable[..., Callable[..., Tensor]]:
    def function(g: Tensor, coefficients=CLASSIC, **options: Any) -> Callable[..., Tensor]:
        import gram_newton_schulz

        iterate = getattr(gram_newton_schulz, variant)(ns_coefficients=list(coefficients))
        return lambda g, *args, **kwargs: iterate(g)

    return function


def _newton_schulz_unfit(
    g: Tensor,
    coefficients: object = CLASSIC,
    dtype: torch.dtype = torch.bfloat16,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Tensor | None = None,
) -> str:
    if squares is not None:
        return "it norms the matrices itself"
    if row_norm or safety != 1.0:
        return "no row norm and no safety factor"
    return "" if dtype == torch.bfloat16 else "it iterates in fp16, which is no match for fp32"


PEERS = [
    # its activation between torch's matmuls
    Peer("liger", "leaky_relu2_mlp", "liger-kernel", "liger_kernel", _relu2_mlp, _relu2_unfit,
         ("relu2", _with_slope_0)),
    # quack's symmetric matmuls, in the plain iteration and in that of Gram matrices
    Peer("quack", "newton_schulz", "gram-newton-schulz", "gram_newton_schulz",
         _newton_schulz("StandardNewtonSchulz"), _newton_schulz_unfit),
    Peer("gram", "newton_schulz", "gram-newton-schulz", "gram_newton_schulz",
         _newton_schulz("GramNewtonSchulz"), _newton_schulz_unfit),
    # torch's own AdamW with what it takes beside it
    Peer("fused", "param_update", "torch", "torch", torch_optim.peer(True), lambda *_, **__: ""),
    Peer("foreach", "param_update", "torch", "torch", torch_optim.peer(False), lambda *_, **__: ""),
]  # fmt: skip


def samples(operator: Operator) -> list[Sample]:
    """Further benchmark sizes, which a peer that can run here needs to be compared at all."""
    needed = [p for p in PEERS if p.operator == operator.name and p.variant and not p.missing()]
    return [
        _derived(sample, *peer.variant)
        for peer in needed
        for sample in operator.samples()
        if sample.bench
    ]


def _derived(sample: Sample, suffix: str, variant: Callable[..., tuple[tuple, dict]]) -> Sample:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        return variant(*sample.build(device, dtype))

    return Sample(f"{sample.label} {suffix}", build, bench=True)
