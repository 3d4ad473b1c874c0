"""Bytes of the launches of pgolf's extension, whose launchers are given addresses, not tensors.

A tensor belongs to a launcher if its address was asked for just before and is among the launcher's
arguments. However many kernels the launcher starts, each tensor counts once, and twice if the
operator changes it in place: it is read and written.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.counting.client import Device
from pgolf import extension

# Positions of a launcher's arguments among which it only writes what its operator changes.
WRITTEN = {"weight_cast": (0,), "muon_momentum": (2, 10)}


class Addresses:
    """The tensors of one operator whose addresses were asked for: their bytes, not themselves."""

    def __init__(self, changed: Iterable[Tensor]):
        self.changed = {t.untyped_storage().data_ptr() for t in changed}
        self.bytes: dict[int, int] = {}
        self.twice: set[int] = set()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, Tensor.data_ptr tells this."""

        def data_ptr(t: Tensor) -> int:
            address = ask(t)
            self.bytes[address] = max(t.numel() * t.element_size(), self.bytes.get(address, 0))
            if t.untyped_storage().data_ptr() in self.changed:
                self.twice.add(address)
            return address

        ask, before = Tensor.data_ptr, Tensor.__dict__.get("data_ptr")
        Tensor.data_ptr = data_ptr
        try:
            yield
        finally:
            if before is None:
                del Tensor.data_ptr
            else:
                Tensor.data_ptr = before

    def take(self, function: str, arguments: tuple) -> int:
        """Bytes of the tensors among a launcher's arguments; the next launcher begins anew."""
        used = self.bytes.keys() & set(tree_leaves(arguments))
        twice = self.twice - set(tree_leaves([arguments[i] for i in WRITTEN.get(function, ())]))
        count = sum(self.bytes[a] * (1 + (a in twice)) for a in used)
        self.bytes.clear()
        self.twice.clear()
        return count


class Launchers:
    """The extension module, whose CUDA launchers note their bytes and how many kernels ran.

    Args:
        addresses: those of the operator that runs now, None outside of all.
    """

    def __init__(
        self, module: ModuleType, device: Device, addresses: Callable[[], Addresses | None]
    ):
        self._module, self._device, self._addresses = module, device, addresses

    def __getattr__(self, name: str) -> Any:
        launcher = getattr(self._module, name)
        return self._noted(name, launcher) if name.endswith("_cuda") else launcher

    def _noted(self, name: str, launch: Callable) -> Callable:
        def call(*arguments: Any) -> None:
            addresses = self._addresses()
            if addresses is None:
                raise RuntimeError(f"{name} is launched outside of pgolf's operators")
            before = self._device.kernels()
            launch(*arguments)
            function = name.removesuffix("_cuda")
            self._device.note(
                kind="compiled", name=function, bytes=addresses.take(function, arguments[:-1]),
                kernels=self._device.kernels() - before,
            )  # fmt: skip

        return call


@contextlib.contextmanager
def launchers_counted(
    device: Device, addresses: Callable[[], Addresses | None]
) -> Iterator[None]:
    """Inside, launches of the extension's CUDA kernels are noted."""
    load = extension.cuda

    def cuda() -> Launchers | None:
        module = load()
        return module and Launchers(module, device, addresses)

    extension.cuda = cuda
    try:
        yield
    finally:
        extension.cuda = load
