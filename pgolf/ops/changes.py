"""Tensors that an opaque operator changes count it, as those of torch's own operators do."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from pgolf.ops.tensors import tensors_in


def counting(overload: torch._ops.OpOverload) -> Callable:
    """A kernel that counts a change of what the operator changes in place, and goes on to it."""
    schema = overload._schema.arguments
    places = [i for i, a in enumerate(schema) if a.alias_info and a.alias_info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        increment_version([t for i in places for t in tensors_in(args[i])])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel
