"""In place of a CUDA graph, on a CPU: the calls of a capture with the tensors and numbers they had.

As on a GPU a capture runs nothing, what it made holds nothing before the first replay, and a host
that waits for that is an error. A replay makes every call again, into the tensors of the first one.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten::_local_scalar_dense",)


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, {}
        self.resets = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        # Kernels of a CPU may look at settings, which are tensors too.
        touched = {t.untyped_storage().data_ptr() for t in given} & {*self.made, *self.before}
        if function._schema.name in WAITS and touched:
            raise RuntimeError("operation not permitted when stream is capturing")
        if function._schema.is_mutable:
            for t in given:
                if t.untyped_storage().data_ptr() not in self.made:
                    self.before.setdefault(t.untyped_storage().data_ptr(), (t, t.detach().clone()))
        result = function(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in given}
        for t in _tensors(result):
            if t.untyped_storage().data_ptr() not in known:
                self.made[t.untyped_storage().data_ptr()] = t
        self.calls.append((function, args, kwargs, _tensors(result)))
        return result

    @torch.no_grad()
    def rewind(self) -> None:
        """Undo what the calls did."""
        for t in self.made.values():
            if t.is_floating_point():
                t.data.fill_(float("nan"))
        for t, value in self.before.values():
            t.data.copy_(value)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.calls:
                for t, new in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                    if t.data_ptr() != new.data_ptr():
                        t.data.copy_(new)

    def reset(self) -> None:
        self.resets.append(self)
        self.calls = None


class Capture:
    """In place of `pgolf.training.graphs.Capture`; remembers what it made and the order of ends."""

    made: list[Tape] = []
    resets: list[Tape] = []
    closed: list["Capture"] = []

    def close(self) -> None:
        self.closed.append(self)

    def __call__(self, work):
        tape = Tape()
        try:
            with tape:
                result = work()
        finally:
            tape.rewind()
        tape.resets = self.resets
        self.made.append(tape)
        return tape, result
