"""Whether weights that were packed once are still those of the parameters behind them.

Passes read matrices that were cast, scaled and packed before. Who changes a parameter afterwards
(by an update in place, `load_state_dict`, an optimiser of their own) would train or score the old
model, and nothing would say so. Every tensor counts the times that it was changed in place: a
comparison on the host, which neither launches nor waits for anything. (Torch does not count what
goes through `.data`, nor what the replay of a CUDA graph changes.)
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from pgolf.errors import StaleWeights


class Masters:
    """The tensors of a model that its packed weights were made of.

    A copy of the model, pickled or not, has packed weights and masters of its own.

    Args:
        names: of parameters and buffers that were cast or multiplied in.
        kept: of those that the packed weights hold themselves, which may change but in place alone.
        remedy: what makes the packed weights anew, for the message.
        replaced: what to do about another tensor in a place, for the message.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        remedy: str,
        kept: Sequence[str] = (),
        replaced: str = "",
    ):
        self.names, self.remedy, self.replaced = [*names, *kept], remedy, replaced or remedy
        self.counted = len(self.names) - len(kept)
        self.places = [_place(model, name) for name in self.names]
        self._take()

    @classmethod
    def published(
        cls, model: nn.Module, matrices: Iterable[str], scales: Iterable[Tensor | None]
    ) -> "Masters":
        """Of what `Exchange.publish` reads: matrices, factors in their rows, late QAT's grids.

        Args:
            matrices: names of their weights.
            scales: that are folded into rows.
        """
        names = list(matrices)
        folded = {id(s) for s in scales if s is not None}
        for prefix in [name.removesuffix("weight") for name in names]:
            buffers = model.get_submodule(prefix[:-1])._buffers
            names += [prefix + key for key in buffers]
        of_branches = {id(s) for b in model.blocks for s in (b.attn_scale, b.mlp_scale)}
        factors = {name: id(p) for name, p in model.named_parameters() if id(p) in of_branches}
        names += [name for name, factor in factors.items() if factor in folded]
        kept = [name for name, factor in factors.items() if factor not in folded]
        return cls(
            model, names, "call Exchange.publish after every change", kept,
            "make a new Exchange and optimizers, or load without assign=True",
        )  # fmt: skip

    def _take(self) -> None:
        self.tensors = [owner[key] for owner, key in self.places]
        self.note()

    def note(self) -> None:
        """The packed weights are those of the tensors as they are now."""
        self.versions = list(map(_version, self.tensors[: self.counted]))

    def check(self) -> None:
        """Raise StaleWeights if a tensor was changed since `note`, or is another one."""
        for name, (owner, key), t in zip(self.names, self.places, self.tensors, strict=True):
            if owner[key] is not t:
                self._refuse(f"{name} was replaced by another tensor", self.replaced)
        for name, t, version in zip(self.names, self.tensors, self.versions, strict=False):
            if _version(t) != version:
                self._refuse(f"{name} was changed", self.remedy)

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise StaleWeights(
            f"{what} after the weights that passes read had been made of it: {remedy}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self).items() if n not in ("tensors", "versions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._take()  # copied tensors count their changes anew


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # such tensors count nothing


def _place(model: nn.Module, name: str) -> tuple[dict, str]:
    """Where a module keeps a parameter or a buffer: the dictionary and the key."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key
