"""Per-head RMS norm, partial rotary embedding and query gain, on one packed projection.

RoPE (Su et al., arXiv 2104.09864) in the half-split form on the first r dims of a head: pairs
(j, j + r/2), angle t * base^(-2j/r), R (x1, x2) = (x1 cos + x2 sin, -x1 sin + x2 cos); the other
dims pass through. The base is the same at every length. For a query head x with gain g

    y = g R n,   n = x rstd,   rstd = 1 / sqrt(mean(x^2) + eps)        (without norm: n = x)

a key head has no gain, and a value head only gets `value` added. With w = R^T dy and s = w . n

    d_gain = sum of s over all tokens,   dx = g rstd (w - n s / d)     (without norm: dx = g w)

Shapes: qkv (N, T, (H + 2 G) d) is q, k and v side by side, cos and sin (T, r/2), gain (H,).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import register_gradient
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, launcher
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.residual_norm import rms_norm
from pgolf.ops.tensors import (
    addresses,
    check_alike,
    compute_dtype,
    contiguous,
    nbytes,
    parts_of,
    unit_stride,
)

SIZE_LIMITS = {"cpu": 256, "cuda": 256}  # of a head
# Kernels sum d_gain over parts of the tokens, of so many at least; csrc/qk_rope.h
MIN_PART, MAX_PARTS = 64, 1024
_INPUTS = Inputs(
    "qk_rope", ("qkv", "cos", "sin", "gain", "value"), alike=("qkv", "value"),
    wide=("cos", "sin", "gain"), optional=("value",),
)  # fmt: skip


def rope_table(length: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, dims/2) in fp32; angles are computed in fp64."""
    j = torch.arange(0, dims, 2, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * base ** (-j / dims)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.size(-1) dims of x (N, T, heads, d)."""
    half = cos.size(-1)
    if half == 0:
        return x
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    x1, x2, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


@outside_autocast
def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    heads: int,
    kv_heads: int,
    eps: float = 1e-6,
    norm: bool = True,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_rope` in plain torch; k and v may be views of qkv."""
    total = heads + 2 * kv_heads
    packed = qkv.unflatten(-1, (total, qkv.size(-1) // total))
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=-2)
    if norm:
        q, k = rms_norm(q, eps, "reference"), rms_norm(k, eps, "reference")
    q = rotate(q, cos, sin) * gain.to(q.dtype)[:, None]
    return q, rotate(k, cos, sin), v if value is None else v + value.reshape(v.shape)


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, heads: int, kv_heads: int, eps: float,
    value: Tensor | None,
) -> None:  # fmt: skip
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"qk_rope: heads={heads}, kv_heads={kv_heads}: both have to be 1 or more")
    total = heads + 2 * kv_heads
    if qkv.dim() != 3 or not qkv.size(2) or qkv.size(2) % total:
        raise ValueError(
            f"qk_rope: qkv is {tuple(qkv.shape)}: it has to be (N, T, {total} d), the heads of "
            f"q ({heads}), k and v ({kv_heads} each) side by side"
        )
    batch, time, width = qkv.shape
    size = width // total
    half = cos.size(-1) if cos.dim() == 2 else -1
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (time, half) or 2 * half > size:
            raise ValueError(
                f"qk_rope: {name} is {tuple(table.shape)}: for this qkv it has to be ({time}, r/2) "
                f"with an r of at most {size}, as sin and cos alike"
            )
    if gain.shape != (heads,):
        raise ValueError(f"qk_rope: gain is {tuple(gain.shape)}: it has to be ({heads},)")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"qk_rope: eps={eps}: it has to be 0 or more, and finite")
    check_alike("qk_rope", qkv=qkv, value=value)
    wide = compute_dtype(qkv.dtype)
    for name, t in (("cos", cos), ("sin", sin), ("gain", gain)):
        if t.dtype != wide or t.device != qkv.device:
            raise ValueError(
                f"qk_rope: {name} is {t.dtype} on {t.device}: it has to be {wide} on {qkv.device}"
            )
    if value is not None and value.shape != (batch, time, kv_heads * size):
        raise ValueError(
            f"qk_rope: value is {tuple(value.shape)}: it has to be "
            f"{(batch, time, kv_heads * size)}, as v"
        )


def obstacle(impl: str, size: int) -> str:
    """Why `impl` cannot run heads of that size; '' if it can."""
    return beyond(SIZE_LIMITS, impl, size, "elements a head")


def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    heads: int,
    kv_heads: int,
    eps: float = 1e-6,
    norm: bool = True,
    value: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into q, k and v; norm and rotate q and k, scale q by its gain.

    Args:
        qkv: (N, T, (H + 2 G) d): H heads of q, G of k, G of v.
        cos, sin: (T, r/2) of `rope_table`, r <= d, in fp32 (fp64 for an fp64 qkv).
        gain: (H,) in fp32 (fp64 for an fp64 qkv).
        heads, kv_heads: H and G.
        eps: added to the mean square of a head before the root.
        norm: whether heads of q and k are normed.
        value: (N, T, G d) of qkv's dtype, added to v.
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64; d <= 256) or 'cuda' (fp32, bf16;
            d <= 256).

    Returns:
        q (N, T, H, d), k and v (N, T, G, d), contiguous; of the reference, views may be among them.

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    qkv, cos, sin, gain, value = _INPUTS(qkv, cos, sin, gain, value)
    _check(qkv, cos, sin, gain, heads, kv_heads, eps, value)
    impl = resolve("qk_rope", impl, qkv, size=qkv.size(2) // (heads + 2 * kv_heads))
    if impl == "reference":
        return reference(qkv, cos, sin, gain, heads, kv_heads, eps, norm, value)
    return _forward(qkv, cos, sin, gain, value, heads, kv_heads, eps, norm, impl)


# --- the opaque operator --------------------------------------------------------------------------


def _outputs(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for q, k and v."""
    batch, time, width = qkv.shape
    size = width // (heads + 2 * kv_heads)
    return tuple(qkv.new_empty((batch, time, n, size)) for n in (heads, kv_heads, kv_heads))


@torch.library.custom_op("pgolf::qk_rope", mutates_args=())
def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, value: Tensor | None,
    heads: int, kv_heads: int, eps: float, norm: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = contiguous(qkv, cos, sin, gain, value)
    return launcher("qk_rope", impl, "forward")(*inputs, heads, kv_heads, eps, norm)


@_forward.register_fake
def _(qkv, cos, sin, gain, value, heads, kv_heads, eps, norm, impl):
    return _outputs(qkv, heads, kv_heads)


@torch.library.custom_op("pgolf::qk_rope_backward", mutates_args=())
def _backward(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor,
    heads: int, kv_heads: int, eps: float, norm: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = [None if t is None else unit_stride(t) for t in (dq, dk, dv)]
    inputs = contiguous(qkv, cos, sin, gain)
    return launcher("qk_rope", impl, "backward")(*gradients, *inputs, heads, kv_heads, eps, norm)


@_backward.register_fake
def _(dq, dk, dv, qkv, cos, sin, gain, heads, kv_heads, eps, norm, impl):
    return qkv.new_empty(qkv.shape), gain.new_empty(gain.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cos, sin, gain, value, *ctx.settings = inputs
    ctx.value_shape = None if value is None else value.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cos, sin, gain)


def _gradient(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple:
    dqkv, d_gain = _backward(dq, dk, dv, *ctx.saved_tensors, *ctx.settings)
    dvalue = None
    if ctx.value_shape is not None and dv is not None:
        dvalue = dv.reshape(ctx.value_shape).contiguous()  # the same numbers: no copy as a rule
    return dqkv, None, None, d_gain, dvalue, *(None for _ in ctx.settings)


register_gradient("qk_rope", _forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _shape(qkv: Tensor, cos: Tensor, heads: int, kv_heads: int) -> tuple[int, ...]:
    """What the kernels call dtype, n, t, h, g, d and half."""
    batch, time, width = qkv.shape
    size = width // (heads + 2 * kv_heads)
    return DTYPE_CODES[qkv.dtype], batch, time, heads, kv_heads, size, cos.size(1)


def _launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def forward(qkv, cos, sin, gain, value, heads, kv_heads, eps, norm):
        outputs = _outputs(qkv, heads, kv_heads)
        run(
            "qk_rope", qkv, *(t.data_ptr() for t in (qkv, cos, sin, gain)),
            *addresses(value, *outputs),
            *_shape(qkv, cos, heads, kv_heads), eps, norm,
        )  # fmt: skip
        return outputs

    def backward(dq, dk, dv, qkv, cos, sin, gain, heads, kv_heads, eps, norm):
        dqkv, d_gain = qkv.new_empty(qkv.shape), gain.new_empty(gain.shape)
        parts = parts_of(qkv.shape[:2].numel(), MIN_PART, MAX_PARTS)
        partials = gain.new_empty((parts, heads))
        gradients = (dq, dk, dv)
        run(
            "qk_rope_backward", qkv, *(t.data_ptr() for t in (qkv, cos, sin, gain)),
            *addresses(*gradients),
            dqkv.data_ptr(), partials.data_ptr(), parts, d_gain.data_ptr(),
            *_shape(qkv, cos, heads, kv_heads), eps, norm,
            *((0, 0, 0) if t is None else t.stride()[:3] for t in gradients),
        )  # fmt: skip
        return dqkv, d_gain

    return {"forward": forward, "backward": backward}


def samples() -> list[Sample]:
    """Partial, full and no rotation; the bench sizes are one layer of the recipes."""

    def make(
        batch: int, time: int, heads: int, groups: int, size: int, dims: int,
        norm: bool = True, with_value: bool = False,
    ):  # fmt: skip
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(time)
            wide = compute_dtype(dtype)
            qkv = torch.randn(batch, time, (heads + 2 * groups) * size, generator=g).double()
            value = torch.randn(batch, time, groups * size, generator=g).double()
            table = [t.to(device, wide) for t in rope_table(time, dims, 10000.0)]
            gain = torch.linspace(-0.5, 1.5, heads).to(device, wide)
            named = {"value": value.to(device, dtype)} if with_value else {}
            return (qkv.to(device, dtype), *table, gain, heads, groups, 1e-6, norm), named

        return build

    shapes = {
        "3x5 8/4 64 r16 value": make(3, 5, 8, 4, 64, 16, with_value=True),
        "1x3 8/4 64 r64": make(1, 3, 8, 4, 64, 64),
        "1x70 4/4 32 r32": make(1, 70, 4, 4, 32, 32),
        "1x5 4/1 128 r0": make(1, 5, 4, 1, 128, 0),
        "1x3 6/2 80 r10 no norm": make(1, 3, 6, 2, 80, 10, norm=False, with_value=True),
        "0 tokens": make(1, 0, 4, 2, 32, 16),
    }
    big = {f"{t} tokens": make(t // 2048, 2048, 8, 4, 64, 16) for t in (8192, 98304)}
    return [Sample(label, build) for label, build in shapes.items()] + [
        Sample(label, build, bench=True) for label, build in big.items()
    ]


def cost(
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, heads: int, kv_heads: int, eps: float,
    norm: bool = True, value: Tensor | None = None,
) -> tuple[Work, Work]:  # fmt: skip
    """Least work: every tensor once; the norms are recomputed, so that nothing but qkv is kept.

    The gradient reads those of q, k and v and of qkv the queries (for d_gain) and, with norm, the
    keys. The gradient of `value` is that of v and costs nothing.
    """
    small = nbytes(cos, sin, gain)
    part = nbytes(qkv) // (heads + 2 * kv_heads)  # of one head
    again = part * (heads + kv_heads * norm)
    return (
        Work(0, nbytes(qkv, value) + small, nbytes(qkv)),
        Work(0, nbytes(qkv) + again + small, nbytes(qkv, gain)),
    )


OPERATOR = register(
    Operator(
        name="qk_rope",
        call=qk_rope,
        reference=reference,
        differentiable=("qkv", "gain", "value"),
        implementations=in_extension(("qk_rope", "qk_rope_backward"), _launchers),
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("cuda", "every number once, forward one launch, backward two")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
