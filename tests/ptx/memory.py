"""Global, shared and parameter memory, in which every access is checked.

Global memory is what was allocated and nothing else: tensors at their own addresses. Shared memory
is poison until it is written, has guard zones between its arrays, and remembers who touched each
byte since the last barrier.
"""

import bisect
import ctypes
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from .faults import Misaligned, OutOfBounds, Pending, Race
from .parser import Array

POISON = 0xFF  # NaN in every floating-point format, -1 as an integer
GUARD = 128  # bytes behind every shared array
SHARED_WINDOW = 1 << 56  # where shared memory lies in the generic address space
NOBODY, SEVERAL = -1, -2  # in place of a warp or a block


def check_alignment(addresses: np.ndarray, size: int) -> None:
    wrong = addresses % np.uint64(size) != 0
    if wrong.any():
        raise Misaligned(f"{size} bytes at {addresses[wrong][0]:#x}")


def expect_stored(found: np.ndarray, stored: np.ndarray) -> None:
    """Race: lanes of one instruction have written different things to one place."""
    if (found != stored).any():
        raise Race("lanes of a warp write different values to one place")


class GlobalMemory:
    """Separate allocations; an access has to lie in one of them."""

    def __init__(self):
        self._starts: list[int] = []
        self._data: list[np.ndarray] = []
        self._writers: list[np.ndarray] = []  # the block of the running kernel that wrote a byte

    def add(self, tensor: Tensor) -> None:
        """Everything between a CPU tensor's first and last element, at its own address.

        It may overlap what was added before: then the two are one allocation.
        """
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            start = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * size
            self.add_bytes(start, (last + 1) * size)

    def add_bytes(self, start: int, size: int) -> None:
        """Memory of this process; it has to stay where it is as long as kernels run."""
        end = start + size
        for i in reversed(range(len(self._starts))):
            other = self._starts[i]
            if start < other + len(self._data[i]) and other < end:
                start, end = min(start, other), max(end, other + len(self._data[i]))
                del self._starts[i], self._data[i], self._writers[i]
        at = bisect.bisect(self._starts, start)
        view = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
        self._starts.insert(at, start)
        self._data.insert(at, view)
        self._writers.insert(at, np.full(end - start, NOBODY, np.int32))

    def forget_writers(self) -> None:
        """At the start of a kernel: what the one before wrote may be read by everyone."""
        for writers in self._writers:
            writers.fill(NOBODY)

    def load(self, addresses: np.ndarray, size: int, block: int) -> np.ndarray:
        """(lanes, size) bytes at uint64 addresses, whose alignment the caller checks."""
        result = np.empty((len(addresses), size), np.uint8)
        for lanes, i, index in self._places(addresses, size):
            writers = self._writers[i][index]
            if ((writers != NOBODY) & (writers != block)).any():
                raise Race(f"block {block} reads what another block wrote in the same kernel")
            result[lanes] = self._data[i][index]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, block: int) -> None:
        """Write (lanes, size) bytes."""
        for lanes, i, index in self._places(addresses, values.shape[1]):
            writers = self._writers[i][index]
            if ((writers != NOBODY) & (writers != block)).any():
                raise Race(f"block {block} writes what another block wrote in the same kernel")
            self._writers[i][index] = block
            self._data[i][index] = values[lanes]
            expect_stored(self._data[i][index], values[lanes])

    def _places(self, addresses: np.ndarray, size: int):
        """(lanes, allocation, byte indices), for each allocation that is touched."""
        which = np.searchsorted(np.array(self._starts, np.uint64), addresses, side="right") - 1
        for i in np.unique(which):
            lanes = which == i
            if i < 0:
                raise OutOfBounds(f"{size} bytes at {addresses[lanes][0]:#x}: no allocation")
            offsets = (addresses[lanes] - np.uint64(self._starts[i])).astype(np.int64)
            beyond = offsets + size - len(self._data[i])
            if (beyond > 0).any():
                raise OutOfBounds(f"{size} bytes, {beyond.max()} of them beyond an allocation")
            yield lanes, i, offsets[:, None] + np.arange(size)


class SharedMemory:
    """One block's shared arrays."""

    def __init__(self, arrays: Mapping[str, Array], dynamic: int):
        """`dynamic` bytes for the array of no size, which comes last."""
        self.addresses: dict[str, int] = {}
        inside, end = [], 0
        for name, array in sorted(arrays.items(), key=lambda item: item[1].size == 0):
            # Dynamic memory is aligned to what the swizzle patterns of wgmma need.
            align = array.align if array.size else 1024
            start = -(-end // align) * align
            self.addresses[name] = start
            inside.append((start, start + (array.size or dynamic)))
            end = inside[-1][1] + GUARD
        self.bytes = np.full(end, POISON, np.uint8)
        self._usable = np.zeros(end, bool)
        for start, stop in inside:
            self._usable[start:stop] = True
        self._epoch = 0
        self._writer, self._reader = np.full((2, end), NOBODY, np.int16)
        self._written, self._read = np.full((2, end), -1, np.int32)  # in which epoch
        self._in_flight = np.zeros(end, np.int16)  # reads by wgmma that are not waited for
        self._unfenced = np.zeros(end, bool)  # written, but not for wgmma to see

    def barrier(self) -> None:
        """All warps have met: what was touched before is no race any more."""
        self._epoch += 1

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(lanes, size) indices of bytes.

        Raises:
            OutOfBounds: not all of them are in one array.
        """
        index = addresses.astype(np.int64)[:, None] + np.arange(size)
        outside = (index < 0) | (index >= len(self.bytes))
        if outside.any() or not self._usable[index].all():
            raise OutOfBounds(f"{size} bytes of shared memory at {addresses[0]}, or another lane's")
        return index

    def load(self, addresses: np.ndarray, size: int, warp: int) -> np.ndarray:
        """(lanes, size) bytes, whose alignment the caller checks."""
        index = self.places(addresses, size)
        self.note_read(index, warp)
        return self.bytes[index]

    def store(self, addresses: np.ndarray, values: np.ndarray, warp: int) -> None:
        """Write (lanes, size) bytes."""
        index = self.places(addresses, values.shape[1])
        self.note_write(index, warp, values)
        self.bytes[index] = values
        expect_stored(self.bytes[index], values)

    def note_read(self, index: np.ndarray, warp: int) -> None:
        """Race: another warp wrote there since the last barrier."""
        if ((self._written[index] == self._epoch) & (self._writer[index] != warp)).any():
            raise Race(f"warp {warp} reads what another warp wrote, with no barrier between")
        others = (self._read[index] == self._epoch) & (self._reader[index] != warp)
        self._reader[index] = np.where(others, SEVERAL, warp)
        self._read[index] = self._epoch

    def note_write(self, index: np.ndarray, warp: int, values: np.ndarray | None = None) -> None:
        """Race: another warp read or wrote there since the last barrier.

        Triton has several warps write the same numbers to one place: that is none, if `values` are
        what lies there.

        Pending: a wgmma that is not waited for reads there.
        """
        if self._in_flight[index].any():
            raise Pending("writes over an operand of a wgmma that was not waited for")
        written = (self._written[index] == self._epoch) & (self._writer[index] != warp)
        if values is not None:
            written &= self.bytes[index] != values
        read = (self._read[index] == self._epoch) & (self._reader[index] != warp)
        if written.any() or read.any():
            what = "wrote" if written.any() else "read"
            raise Race(f"warp {warp} writes what another warp {what}, with no barrier between")
        self._writer[index] = warp
        self._written[index] = self._epoch
        self._unfenced[index] = True

    def fence(self, warp: int) -> None:
        """fence.proxy.async by a warp: for its own writes, and for those before the barrier."""
        self._unfenced &= ~((self._writer == warp) | (self._written < self._epoch))

    def begin_read(self, index: np.ndarray, warp: int) -> None:
        """A wgmma starts to read: nobody may write there until `end_read`."""
        if self._unfenced[index].any():
            raise Pending("wgmma reads what was written without a fence.proxy.async since")
        self.note_read(index, warp)
        self._in_flight[index] += 1

    def end_read(self, index: np.ndarray) -> None:
        self._in_flight[index] -= 1


class ParameterMemory:
    """The arguments of a kernel one behind the other, read only."""

    def __init__(self, parameters: Mapping[str, Array], arguments: list[bytes]):
        self.addresses: dict[str, int] = {}
        if len(parameters) != len(arguments):
            raise ValueError(f"{len(arguments)} arguments for {len(parameters)} parameters")
        data = bytearray()
        for (name, array), argument in zip(parameters.items(), arguments, strict=True):
            if len(argument) != array.size:
                raise ValueError(f"{name} has {array.size} bytes, its argument {len(argument)}")
            data += bytes(-len(data) % array.align)
            self.addresses[name] = len(data)
            data += argument
        self.bytes = np.frombuffer(bytes(data), np.uint8)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(lanes, size) bytes."""
        index = addresses.astype(np.int64)[:, None] + np.arange(size)
        if (index < 0).any() or (index >= len(self.bytes)).any():
            raise OutOfBounds(f"{size} bytes of the parameters at {addresses[0]}")
        return self.bytes[index]
