"""What operators are called with: tensors, in the dtypes that torch's autocast makes of them.

Outside of autocast the tensors of a call share a dtype, and a mix is an error. Under autocast

- operators around matmuls cast what goes into them as F.linear does: to autocast's dtype, except
  what is float64;
- pointwise operators compute in the widest dtype among theirs, as torch's own promote, or in the
  `dtype` that they are given; parameters are cast to the dtype that this one computes in;
- operators of optimiser and quantiser keep the dtypes that they are given.

Every implementation gets the same tensors, and none sees autocast itself, forward or backward.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.tensors import compute_dtype


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; of 'meta' torch does not say."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(like: Tensor) -> contextlib.AbstractContextManager:
    """Keep autocast out of an operator's own matmuls: its arguments have the right dtype."""
    if autocasting(like.device):
        return torch.autocast(like.device.type, enabled=False)
    return contextlib.nullcontext()


def outside_autocast(reference: Callable) -> Callable:
    """The reference of an operator, whose first argument is a tensor, out of autocast's reach."""

    @functools.wraps(reference)
    def call(*args: Any, **named: Any) -> Any:
        like = args[0] if args else next(iter(named.values()))
        if not autocasting(like.device):
            return reference(*args, **named)
        with without_autocast(like):
            return reference(*args, **named)

    return call


def check_tensors(operator: str, name: str, tensors: Sequence[Any]) -> None:
    """Raise TypeError unless a list holds tensors alone."""
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{operator}: {_no_tensor(f'{name}[{i}]', t)}")


def _no_tensor(name: str, value: Any) -> str:
    return f"{name} is a {type(value).__name__}: it has to be a torch.Tensor"


@dataclass(frozen=True)
class Inputs:
    """The tensors of an operator's calls.

    Attributes:
        operator: its name, for messages.
        names: of its tensors, in the order of a call.
        alike: those that share a dtype.
        wide: those in the dtype that this one computes in.
        optional: those that may be None.
        matmul: whether autocast casts those alike as F.linear does.
    """

    operator: str
    names: tuple[str, ...]
    alike: tuple[str, ...]
    wide: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    matmul: bool = False

    def __call__(self, *tensors: Any, dtype: torch.dtype | None = None) -> Sequence[Tensor | None]:
        """The tensors as the operator takes them; `dtype` is one that the caller names.

        Raises:
            TypeError: an argument is no tensor.
        """
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor) and not (t is None and self.names[i] in self.optional):
                raise TypeError(f"{self.operator}: {_no_tensor(self.names[i], t)}")
        if not autocasting(tensors[0].device):
            return tensors
        return self._cast(dict(zip(self.names, tensors, strict=True)), dtype)

    def _cast(
        self, given: dict[str, Tensor | None], dtype: torch.dtype | None
    ) -> list[Tensor | None]:
        there = {n: given[n] for n in self.alike if _is_float(given[n])}
        if self.matmul:
            there = {n: t for n, t in there.items() if t.dtype is not torch.float64}
        if dtype is None:
            if not there:
                return list(given.values())
            dtypes = [t.dtype for t in there.values()]
            dtype = functools.reduce(torch.promote_types, dtypes)
            if self.matmul:
                dtype = torch.get_autocast_dtype(next(iter(there.values())).device.type)
        given |= {n: t.to(dtype) for n, t in there.items()}
        wide = compute_dtype(dtype)
        given |= {n: given[n].to(wide) for n in self.wide if _is_float(given[n])}
        return list(given.values())


def _is_float(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()
