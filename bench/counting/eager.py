"""Bytes of what runs outside Inductor's kernels: ATen calls, and launches inside our operators."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.counting.client import Device
from bench.counting.compiled import Addresses, launchers_counted
from pgolf.triton_kernels.launch import Launch, intercepted

NAMESPACE = "pgolf::"
# Their product is the device's to count; the kernel before it copies their first argument.
SUMS = ("addmm", "baddbmm")
# These write their first argument without reading it.
WRITERS = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")


def unique_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct elements of these tensors; the same address is the same tensor."""
    largest: dict[int, int] = {}
    for t in tensors:
        count = t.element_size()
        for size, stride in zip(t.shape, t.stride(), strict=True):
            count *= size if stride else min(size, 1)
        largest[t.data_ptr()] = max(count, largest.get(t.data_ptr(), 0))
    return sum(largest.values())


def _tensors(tree: Any) -> list[Tensor]:
    """Tensors on the device, also those behind Triton's tensor descriptors."""
    leaves = [getattr(leaf, "base", leaf) for leaf in tree_leaves(tree)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]


class Counted(TorchDispatchMode):
    """Notes the bytes of every ATen call that launches a kernel of torch's.

    A call reads its tensor arguments and writes its results; an argument that it changes is both.
    """

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = self.device.kernels()
        result = function(*args, **kwargs)
        launched = self.device.kernels() - before
        packet = function._schema.name
        if launched and not packet.startswith(NAMESPACE):
            name = packet.removeprefix("aten::")
            count = self._bytes(function, name, args, kwargs, result)
            self.device.note(kind="aten_call", name=name, bytes=count, kernels=launched)
        return result

    def _bytes(self, function: Any, name: str, args: tuple, kwargs: dict, result: Any) -> int:
        if name in SUMS:
            return unique_bytes(_tensors(args[0])) + unique_bytes(_tensors(result))
        read, written = [], []
        for i, parameter in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(parameter.name)
            changed = parameter.alias_info is not None and parameter.alias_info.is_write
            if changed:
                written += _tensors(value)
            if not changed or not (parameter.is_out or name in WRITERS):
                read += _tensors(value)
        if not written:
            written = _tensors(result)
        return unique_bytes(read) + unique_bytes(written)


def _changed(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call changes in place."""
    values = dict(zip((p.name for p in function._schema.arguments), args, strict=False)) | kwargs
    return [
        t
        for p in function._schema.arguments
        if p.alias_info is not None and p.alias_info.is_write
        for t in _tensors(values.get(p.name))
    ]


@contextlib.contextmanager
def operators_counted(device: Device) -> Iterator[None]:
    """Inside, operators of pgolf note when they are entered and left, and each launch's bytes."""
    from torch._library.custom_ops import OPDEFS

    def started(launch: Launch) -> None:
        launch()
        tensors = _tensors(list(launch.arguments.values()))
        device.note(
            kind="launch", name=launch.kernel.fn.__name__, bytes=unique_bytes(tensors)
        )

    inside: list[Addresses] = []

    def wrapped(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            device.note(kind="enter", name=name)
            inside.append(Addresses(_changed(ours[name]._opoverload, args, kwargs)))
            with Counted(device), inside[-1].followed():
                result = function(*args, **kwargs)
            inside.pop()
            device.note(kind="leave", name=name)
            return result

        return call

    ours = {name: op for name, op in OPDEFS.items() if name.startswith(NAMESPACE)}
    before = {name: dict(op._backend_fns) for name, op in ours.items()}
    for name, op in ours.items():
        op._backend_fns.update({k: wrapped(name, f) for k, f in op._backend_fns.items()})
    try:
        with (
            intercepted(started),
            launchers_counted(device, lambda: inside[-1] if inside else None),
        ):
            yield
    finally:
        for name, op in ours.items():
            op._backend_fns.update(before[name])
