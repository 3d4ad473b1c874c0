"""Bytes of what runs outside Inductor's kernels: ATen calls, and launches inside our operators."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import opaque
from bench.counting.client import Device
from bench.counting.compiled import Addresses, launchers_counted
from pgolf.triton_kernels.launch import Launch, intercepted

# Their product is the device's to count; the kernel before it copies their first argument.
SUMS = ("addmm", "baddbmm")
# These write their first argument without reading it.
WRITERS = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")


def _on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.device.type == "cuda"]


def _tensors(tree: Any) -> list[Tensor]:
    """Tensors on the device, also those behind Triton's tensor descriptors."""
    return _on_device(opaque.tensors_in(tree))


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
        if launched and not packet.startswith(opaque.NAMESPACE):
            name = packet.removeprefix("aten::")
            count = self._bytes(function, name, args, kwargs, result)
            self.device.note(kind="aten_call", name=name, bytes=count, kernels=launched)
        return result

    def _bytes(self, function: Any, name: str, args: tuple, kwargs: dict, result: Any) -> int:
        if name in SUMS:
            return opaque.unique_bytes(_tensors(args[0])) + opaque.unique_bytes(_tensors(result))
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
        return opaque.unique_bytes(read) + opaque.unique_bytes(written)


@contextlib.contextmanager
def operators_counted(device: Device) -> Iterator[None]:
    """Inside, operators of pgolf note when they are entered and left, and each launch's bytes."""

    def started(launch: Launch) -> None:
        launch()
        tensors = _tensors(list(launch.arguments.values()))
        device.note(
            kind="launch", name=launch.kernel.fn.__name__, bytes=opaque.unique_bytes(tensors)
        )

    inside: list[Addresses] = []

    def call(operator: opaque.Operator, function: Callable, args: tuple, named: dict) -> Any:
        device.note(kind="enter", name=operator.name)
        inside.append(Addresses(_on_device(operator.changed(args, named))))
        with Counted(device), inside[-1].followed():
            result = function(*args, **named)
        inside.pop()
        device.note(kind="leave", name=operator.name)
        return result

    with (
        opaque.intercepted(call),
        intercepted(started),
        launchers_counted(device, lambda: inside[-1] if inside else None),
    ):
        yield
