"""Guard zones: tensors with watched memory around them, what launchers allocate included.

It is seen where a kernel writes or reads outside of them, or leaves an element unwritten.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ZONE = 4096  # bytes before and after; keeps the 16-byte alignment that TMA descriptors ask for
NAN_BYTE = 0xFF  # a number of these bytes is NaN in every float type: what leaks in shows up
UNWRITTEN_BYTE = 0x7F  # 3.4e38 in bfloat16 and float32: what a kernel forgot to write shows up


@dataclass
class _Zone:
    tensor: Tensor
    memory: Tensor  # (bytes,) around the tensor and between its rows
    first: int  # byte of the first element
    span: int  # bytes to the last one, gaps included
    byte: int
    fresh: bool

    def complaint(self, scratch: bool) -> str | None:
        what = f"{tuple(self.tensor.shape)} {self.tensor.dtype} with strides {self.tensor.stride()}"
        spoilt = self.memory != self.byte
        written = spoilt[self.first : self.first + self.span].view(-1, self.tensor.element_size())
        written = written.as_strided(
            (*self.tensor.shape, written.size(1)),
            [*(written.size(1) * step for step in self.tensor.stride()), 1],
        )
        unwritten = 0
        if self.fresh and not scratch and self.tensor.numel():
            unwritten = self.tensor.numel() - int(written.any(-1).sum())
        written.fill_(False)
        if spoilt.any():
            first = int(spoilt.nonzero()[0]) - self.first
            return f"{int(spoilt.sum())} bytes written outside of {what}, the first {first}"
        return f"{unwritten} elements of the output {what} were not written" if unwritten else None


@dataclass
class GuardZones:
    """Tensors inside watched memory.

        with GuardZones() as zones:
            y = zones.input(data)
            z = launcher(y)  # its torch.empty and new_empty give guarded, poisoned memory

    On leaving, AssertionError if a byte outside of a tensor's elements has changed, an element of
    an output is unwritten, an input has changed, or nothing was allocated. Where some of it is
    `scratch`, which a kernel need not fill, elements may stay unwritten.
    """

    scratch: bool = False
    zones: list[_Zone] = field(default_factory=list)
    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None = None,
        byte: int = UNWRITTEN_BYTE,
        fresh: bool = True,
        offset: int = 0,
    ) -> Tensor:
        """An unwritten tensor with these strides (elements), in memory filled with `byte`.

        It starts on a cache line, or `offset` elements later.
        """
        if strides is None:
            strides = torch.empty(tuple(shape), device="meta").stride()
        size = dtype.itemsize
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        span = 0 if 0 in shape else (last + 1) * size
        memory = torch.full((2 * ZONE + math.ceil(span / 16) * 16,), byte, dtype=torch.uint8)
        first = ZONE + offset * size
        elements = memory[first : first + math.ceil(span / 16) * 16].view(dtype)
        tensor = elements.as_strided(tuple(shape), tuple(strides))
        self.zones.append(_Zone(tensor, memory, first, span, byte, fresh))
        return tensor

    def input(self, data: Tensor) -> Tensor:
        """A copy of `data`, same strides, with NaN (integers: -1) around it and in its gaps."""
        tensor = self.tensor(data.shape, data.dtype, data.stride(), NAN_BYTE, fresh=False)
        once = tuple(slice(0, 1 if stride == 0 else None) for stride in data.stride())
        tensor[once].copy_(data[once])  # an expanded tensor is not written as a whole
        self.inputs.append((tensor, data.clone()))
        return tensor

    def check(self) -> None:
        for zone in self.zones:
            complaint = zone.complaint(self.scratch)
            assert complaint is None, complaint
        for tensor, before in self.inputs:
            torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
        assert any(zone.fresh for zone in self.zones), "no output was allocated"

    def __enter__(self) -> "GuardZones":
        empty, new_empty = torch.empty, Tensor.new_empty

        def guarded(*size: Any, dtype: torch.dtype | None = None, **named: Any) -> Tensor:
            size = size or (named.pop("size"),)
            if named.get("device") not in (None, "cpu", torch.device("cpu")):
                return empty(*size, dtype=dtype, **named)
            shape = size[0] if isinstance(size[0], Sequence) else size
            return self.tensor(tuple(shape), dtype or torch.get_default_dtype())

        def like(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **named: Any):
            # (With a device it is Triton's interpreter, which puts a kernel's memory in its place.)
            if tensor.device.type != "cpu" or type(tensor) is not Tensor or named:
                return new_empty(tensor, *size, dtype=dtype or tensor.dtype, **named)
            return guarded(*size, dtype=dtype or tensor.dtype)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(torch, "empty", guarded))
        self._patches.enter_context(mock.patch.object(Tensor, "new_empty", like))
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._patches.close()
        if kind is None:
            self.check()
