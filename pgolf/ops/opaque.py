"""Operators that torch, its autograd and torch.compile see as one piece.

`torch.library.custom_op` passes through eight Python functions a call: aliases are looked for, the
kernel is looked up, Dynamo is switched off. A step calls some 150 operators, and the GPU may wait
for the host. Here a call that needs no gradient and changes
nothing in place passes through one besides the operator's own; `python -m pytest tests/ops` checks
by opcheck what custom_op would check in every call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl

from pgolf.ops.changes import counting

_LIBRARY = torch.library.Library("pgolf", "FRAGMENT")
_PLAIN = frozenset((torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA))

# By name, all that there are.
OPAQUE: dict[str, "Opaque"] = {}


def opaque(name: str, mutates_args: Sequence[str]) -> Callable[[Callable], "Opaque"]:
    """A decorator of the function that runs, as `torch.library.custom_op` is one.

    Args:
        name: 'pgolf::...'.
        mutates_args: names of the arguments that it changes in place.
    """
    return lambda function: Opaque(name, function, mutates_args)


class Opaque:
    """An operator of torch.library, for all devices; results never alias an argument.

    Attributes:
        function: what runs.
        overload: what torch calls.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]):
        self.function, self.__doc__ = function, function.__doc__
        self.name, (_, self.short) = name, name.split("::")
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(self.short + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.pgolf, self.short).default
        self.mutates = bool(mutates_args)
        self.register(self._run, "CompositeExplicitAutograd")
        if self.mutates:
            self.register(counting(self.overload), "ADInplaceOrView", with_keyset=True)
        self._derivative = Info(None, None)  # it refuses one
        self.register(self._recording(), "Autograd", with_keyset=True)
        OPAQUE[name] = self

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.overload(*args, **named)

    def _run(self, *args: Any, **named: Any) -> Any:
        return self.function(*args, **named)

    def register(self, kernel: Callable, key: str, **named: bool) -> None:
        """Let torch call `kernel` for a key of its dispatcher."""
        # Called by torch, not by Python: Dynamo would take it for a frame that it may compile.
        skip = torch._C._dynamo.eval_frame._FrameAction.SKIP
        strategy = torch._C._dynamo.eval_frame._FrameExecStrategy(skip, skip)
        torch._C._dynamo.eval_frame.set_code_exec_strategy(kernel.__code__, strategy)
        _LIBRARY.impl(self.short, kernel, key, **named)

    def register_fake(self, function: Callable) -> Callable:
        """Take a function of the same arguments that gives results without their numbers."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(
        self, backward: Callable, setup_context: Callable | None = None
    ) -> None:
        """Take a gradient, as `torch.library.register_autograd` does.

        Raises:
            RuntimeError: the operator changes arguments, which autograd cannot follow.
        """
        if self.mutates:
            raise RuntimeError(f"{self.name} changes arguments in place: it has no gradient")
        self._derivative._backward_fn = backward
        self._derivative._setup_context_fn = setup_context

    def _recording(self) -> Callable:
        """The kernel of autograd's key."""
        recorded = make_autograd_impl(self.overload, self._derivative)

        def kernel(keyset: Any, *args: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return recorded(keyset, *args)
            with torch._C._AutoDispatchBelowAutograd():
                # What torch would call next, where nothing (a mode, a fake tensor) is between.
                left = keyset & torch._C._after_ADInplaceOrView_keyset
                if left.highestPriorityTypeId() in _PLAIN and not self.mutates:
                    return self.function(*args)
                return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        return kernel
