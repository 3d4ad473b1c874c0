"""Exclusive self attention: remove from each head's output its component along the value.

    z_h = y_h - (y_h . n) n,   n = v_g / max(|v_g|_2, 1e-12)              (arXiv 2603.09078)

g is the key/value head of query head h: with H query and G value heads, g = h // (H / G).
With m = max(|v|, 1e-12), s = 1/m^2, a = y . v and b = dz . v the gradients are

    dy = dz - s b v,   dv = sum over the heads of g of  -s (a dz + b y) + 2 (s a) (s b) v

where the last term is absent where |v| is at the floor or below, as m is a constant there.
Shapes: y, z (N, T, H, d), v (N, T, G, d). Strides are free; the results are contiguous.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import register_gradient
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, in_triton, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.tensors import check_grouped, nbytes, unit_stride

NORM_FLOOR = 1e-12
_INPUTS = Inputs("xsa", ("y", "v"), alike=("y", "v"))
# What the kernels take at most: elements of a head, and query heads to one value head.
SIZE_LIMITS, SHARE_LIMITS = {"triton": 256, "cuda": 256}, {"cpu": 256}


@outside_autocast
def reference(y: Tensor, v: Tensor) -> Tensor:
    """`xsa` in plain torch."""
    batch, time, heads, size = y.shape
    groups = v.size(2)
    y = y.reshape(batch, time, groups, heads // groups, size)
    wide = v.float() if v.dtype == torch.float16 else v  # in fp16 the floor would be 0
    n = F.normalize(wide, dim=-1, eps=NORM_FLOOR).to(v.dtype).unsqueeze(3)
    return (y - (y * n).sum(-1, keepdim=True) * n).reshape(batch, time, heads, size)


def obstacle(impl: str, size: int, share: int) -> str:
    """Why `impl` cannot run heads of that size, so many to a value head; '' if it can."""
    return beyond(SIZE_LIMITS, impl, size, "elements a head") or beyond(
        SHARE_LIMITS, impl, share, "query heads to a value head"
    )


def xsa(y: Tensor, v: Tensor, impl: str = "auto") -> Tensor:
    """y without its component along v.

    Args:
        y: (N, T, H, d) outputs of attention.
        v: (N, T, G, d) values, H a multiple of G, of y's dtype and device.
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64), 'triton' or
            'cuda' (fp32, bf16; d <= 256).

    Returns:
        (N, T, H, d), contiguous.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine, or knows no transform of torch.func.
    """
    y, v = _INPUTS(y, v)
    check_grouped("xsa", ("y", y), ("v", v))
    impl = resolve("xsa", impl, y, size=y.size(3), share=y.size(2) // v.size(2))
    if impl == "reference":
        return reference(y, v)
    return _forward(y, v, impl)


# --- the opaque operator --------------------------------------------------------------------------


@opaque("pgolf::xsa", mutates_args=())
def _forward(y: Tensor, v: Tensor, impl: str) -> Tensor:
    return launcher("xsa", impl, "forward")(unit_stride(y), unit_stride(v))


@_forward.register_fake
def _(y: Tensor, v: Tensor, impl: str) -> Tensor:
    return y.new_empty(y.shape)


@opaque("pgolf::xsa_backward", mutates_args=())
def _backward(dz: Tensor, y: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return launcher("xsa", impl, "backward")(*map(unit_stride, (dz, y, v)))


@_backward.register_fake
def _(dz: Tensor, y: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, v, ctx.impl = inputs
    ctx.save_for_backward(y, v)


def _gradient(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dz, *ctx.saved_tensors, ctx.impl), None


register_gradient("xsa", _forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def forward(y: Tensor, v: Tensor) -> Tensor:
        z = y.new_empty(y.shape)
        run(
            "xsa", y, y.data_ptr(), v.data_ptr(), z.data_ptr(), DTYPE_CODES[y.dtype],
            *y.shape[:3], v.size(2), y.size(3), y.stride()[:3], v.stride()[:3],
        )  # fmt: skip
        return z

    def backward(dz: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dy, dv = y.new_empty(y.shape), v.new_empty(v.shape)
        run(
            "xsa_backward", y, dz.data_ptr(), y.data_ptr(), v.data_ptr(), dy.data_ptr(),
            dv.data_ptr(), DTYPE_CODES[y.dtype], *y.shape[:3], v.size(2), y.size(3),
            dz.stride()[:3], y.stride()[:3], v.stride()[:3],
        )  # fmt: skip
        return dy, dv

    return {"forward": forward, "backward": backward}


def samples() -> list[Sample]:
    """Groupings, head sizes and layouts; the bench sizes are one layer at 8,192 tokens and more."""

    def make(batch: int, time: int, heads: int, groups: int, size: int, layout: str):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(time)
            y = torch.randn(batch, heads, time, size, generator=g, dtype=torch.float64)
            qkv = torch.randn(batch, time, heads + 2 * groups, size, generator=g).double()
            y, qkv = y.to(device, dtype), qkv.to(device, dtype)
            v = qkv[:, :, heads + groups :]
            # SDPA returns (N, H, T, d) memory; v may be a part of one packed projection.
            y = y.transpose(1, 2)
            return (y, v) if layout == "attention" else (y.contiguous(), v.contiguous()), {}

        return build

    shapes = {
        "2x7 8/4 64": (2, 7, 8, 4, 64, "attention"),
        "1x33 4/4 32": (1, 33, 4, 4, 32, "contiguous"),
        "1x5 4/1 128": (1, 5, 4, 1, 128, "attention"),
        "1x3 6/2 80": (1, 3, 6, 2, 80, "contiguous"),
        "0 tokens": (1, 0, 4, 2, 32, "contiguous"),
    }
    big = {f"{t} tokens": (1, t, 8, 4, 64, "contiguous") for t in (1024, 8192, 98304)}
    return [Sample(label, make(*s)) for label, s in shapes.items()] + [
        Sample(label, make(*s), bench=True) for label, s in big.items()
    ]


def cost(y: Tensor, v: Tensor) -> tuple[Work, Work]:
    """Forward reads y and v and writes z; backward reads dz, y and v and writes dy and dv."""
    return (
        Work(0, nbytes(y, v), nbytes(y)),
        Work(0, nbytes(y, y, v), nbytes(y, v)),
    )


OPERATOR = register(
    Operator(
        name="xsa",
        call=xsa,
        reference=reference,
        differentiable=("y", "v"),
        implementations={
            **in_extension(("xsa", "xsa_backward"), _launchers),
            "triton": in_triton("xsa", forward="xsa", backward="xsa_backward"),
        },
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("triton", "fewer bytes than compiled (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
