"""Guard zones around what launchers allocate: a kernel that writes beyond its outputs is seen."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

GUARD = 256  # bytes on either side
PATTERN = 0xFF  # NaN as a number of any float type: what is read from a zone shows, too


@contextlib.contextmanager
def guarded() -> Iterator[list[Tensor]]:
    """Inside, `new_empty` gives tensors amid zones full of a pattern, which is checked at the end.

    Yields the list of what was allocated: whole buffers as bytes.
    """
    buffers: list[Tensor] = []
    new_empty = Tensor.new_empty

    def amid_zones(self: Tensor, *size, dtype: torch.dtype | None = None, **named) -> Tensor:
        if self.device.type != "cpu" or type(self) is not Tensor:
            return new_empty(self, *size, dtype=dtype or self.dtype, **named)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or self.dtype
        nbytes = shape.numel() * dtype.itemsize
        buffer = torch.full((nbytes + 2 * GUARD,), PATTERN, dtype=torch.uint8)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + nbytes].view(dtype).view(shape)

    with mock.patch.object(Tensor, "new_empty", amid_zones):
        yield buffers
    assert buffers, "nothing was allocated"
    for buffer in buffers:
        assert (buffer[:GUARD] == PATTERN).all() and (buffer[-GUARD:] == PATTERN).all()
