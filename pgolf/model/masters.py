"""Whether weights that were packed once are still those of the parameters behind them.

Passes read matrices that were cast, scaled and packed before. Who changes a parameter afterwards
(by an update in place, `load_state_dict`, an optimiser of their own) would train or score the old
model, and nothing would say so. Every tensor counts the times that it was changed in place: a
comparison on the host, which neither launches nor waits for anything. (Torch does not count what
goes through `.data`, nor what the replay of a CUDA graph changes.)
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pgolf.errors import StaleWeights


class Masters:
    """The tensors of a model that its packed weights were made of.

    Args:
        names: of parameters and buffers.
        remedy: what makes the packed weights anew, for the message.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], remedy: str):
        self.names, self.remedy = list(names), remedy
        self.places = [_place(model, name) for name in self.names]
        self.note()

    @classmethod
    def published(
        cls, model: nn.Module, matrices: Iterable[str], scales: Iterable[Tensor | None]
    ) -> "Masters":
        """Of what `Exchange.publish` reads: matrices, factors in their rows, late QAT's grids.

        Args:
            matrices: names of their weights.
        """
        names = list(matrices)
        folded = {id(s) for s in scales if s is not None}
        for prefix in [name.removesuffix("weight") for name in names]:
            buffers = model.get_submodule(prefix[:-1])._buffers
            names += [prefix + key for key in buffers]
        names += [name for name, p in model.named_parameters() if id(p) in folded]
        return cls(model, names, "call Exchange.publish after every change")

    def note(self) -> None:
        """The packed weights are those of the tensors as they are now."""
        self.tensors = [owner[key] for owner, key in self.places]
        self.versions = [t._version for t in self.tensors]

    def check(self) -> None:
        """Raise StaleWeights if a tensor was changed, or replaced, since `note`."""
        before = zip(self.names, self.places, self.tensors, self.versions, strict=True)
        for name, (owner, key), t, version in before:
            if owner[key] is not t or t._version != version:
                raise StaleWeights(
                    f"{name} was changed after the weights that passes read had been made of it: "
                    f"{self.remedy}"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has packed weights that nobody makes anew: there is nothing to compare."""
        return None


def _place(model: nn.Module, name: str) -> tuple[dict, str]:
    """Where a module keeps a parameter or a buffer: the dictionary and the key."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key
