"""Attention as the counting device sees it: one call that reads q, k, v and writes out, lse.

The stand-in for FlashAttention 3 takes the place of the package `flash_attn_interface`, so pgolf's
own operator around it runs as it is, with the tensors that it saves and the copies that it makes.
That for the attention over cached keys, which may be cuDNN's or another kernel of torch's, takes
the place of torch's function.
"""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.counting.client import Device


def install(device: Device) -> None:
    """Make `import flash_attn_interface` and torch's attention with a mask find the stand-ins."""

    def note(name: str, *tensors: Tensor) -> None:
        moved = sum(t.numel() * t.element_size() for t in tensors)
        device.work(kind="attention", name=name, bytes=moved)

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, num_splits: int = 1
    ) -> tuple[Tensor, Tensor]:
        batch, time, heads, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, time, dtype=torch.float32, device=q.device)
        note("forward", q, k, v, out, lse)
        return out, lse

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, softmax_scale: float, causal: bool,
    ) -> None:  # fmt: skip
        note("backward", dout, q, k, v, out, softmax_lse, dq, dk, dv)

    module = ModuleType("flash_attn_interface")
    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    sys.modules[module.__name__] = module

    @torch.library.custom_op("counting::cached_attention", mutates_args=())
    def cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(q)
        note("cached", q, k, v, mask, out)
        return out

    cached.register_fake(lambda q, k, v, mask: torch.empty_like(q))
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask: cached(q, k, v, attn_mask)
