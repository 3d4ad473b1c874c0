"""How every kernel of this package is started, and with which tile sizes.

Launchers call `launch` and nothing else, so that whoever compiles ahead of time, counts launches or
fills guard zones sees the very arguments of a real launch through `intercepted`.
"""

import contextlib
import functools
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """One row of configs.json: tile sizes (constexpr arguments), warps, stages, and why these."""

    reason: str
    blocks: Mapping[str, int | bool]
    num_warps: int
    num_stages: int
    when: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, facts: Mapping[str, Any]) -> bool:
        """Whether every condition holds: a value, or [low, high] with null for no limit."""
        for name, wanted in self.when.items():
            value = facts[name]
            if isinstance(wanted, list):
                low, high = wanted
                if (low is not None and value < low) or (high is not None and value > high):
                    return False
            elif value != wanted:
                return False
        return True


@functools.cache
def configs() -> dict[str, list[Config]]:
    """Kernel name -> its configurations, in the order in which they are tried."""
    # The script of a submission is no folder: its loader has the file.
    here = TABLE.is_file()
    table = json.loads(TABLE.read_bytes() if here else pkgutil.get_data(__package__, TABLE.name))
    return {kernel: [Config(**row) for row in rows] for kernel, rows in table.items()}


def pick(kernel: str, **facts: Any) -> Config:
    """The first configuration of `kernel` whose conditions fit these facts about the arguments.

    Raises:
        ValueError: none fits; names the kernel and the facts.
    """
    for config in configs()[kernel]:
        if config.fits(facts):
            return config
    raise ValueError(f"{kernel}: no configuration in {TABLE.name} fits {facts}")


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is started with."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by name, tile sizes included
    config: Config

    def __call__(self) -> None:
        self.kernel[self.grid](
            **self.arguments,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
        )


_handler: Callable[[Launch], None] = Launch.__call__


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Start `kernel` on the current stream of the current device; nothing for an empty grid."""
    if 0 not in grid:
        _handler(Launch(kernel, grid, {**arguments, **config.blocks}, config))


@contextlib.contextmanager
def intercepted(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, launches are given to `handler` instead of being started."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, whose current stream Triton launches on."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device_of(tensor)
    return _HERE


_HERE = contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv is a kernel's, and takes 30 times as long on the host.)"""
    return -(-a // b)
