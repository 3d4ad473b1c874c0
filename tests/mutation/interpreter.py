"""What the interpreter would hide from the checks."""

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def poison_masked_lanes() -> None:
    """What a load without `other` leaves where its mask is off is NaN from now on, or all ones.

    On a GPU it is undefined; the interpreter says 0, so that a forgotten `other=0.0` looks right.
    """
    plain = InterpreterBuilder.create_masked_load

    def load(self: InterpreterBuilder, pointers: Any, mask: Any, other: Any, *rest: Any, **named):
        result = plain(self, pointers, mask, other, *rest, **named)
        if other is None:
            data = np.array(result.data)
            off = ~np.broadcast_to(mask.data, data.shape)
            data[off] = np.full(data.itemsize, 0xFF, np.uint8).view(data.dtype)
            result = TensorHandle(data, result.dtype)
        return result

    InterpreterBuilder.create_masked_load = load
