"""The projection to queries, keys and values with `qk_rope` behind it, as one step.

    p = f x W^T,   q and k = gain R norm(p) by heads,   v = p + value

`qk_rope` of F.linear, f being a factor of each token. 'triton' makes q, k and v in one GEMM: x W^T
is neither written nor read, two tensors of its size, and there is no launch for the heads. The
gradient finds norm(p) in q and k, which attention keeps as well, and rstd, which is written for
each head: with n = norm(p) = R^T q / gain, w = R^T dq and s = w . n

    d_gain = sum of s over all tokens,   d(x W^T) = gain rstd (w - n s / d)

by the row kernels of `qk_rope`. A gain that is nearly 0 would leave nothing of n in q: its
magnitude is at least 2^-100 there. On a GPU without TMA, for fp32, without norm and for heads that
make no tiles it is torch's matmul and `qk_rope`.

With `ops=`: where this operator is the reference, a model takes torch's matmul and `qk_rope` as
`qk_rope=` names it; where it is not, the gradient takes `qk_rope` so. `auto` is the reference but
on a GPU where the other was found to be faster (`python -m bench tune --epilogues`).
Shapes: x (N, T, D), w ((H + 2 G) d, D), q (N, T, H, d), k and v (N, T, G, d), all others as of
`qk_rope`.
"""

from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import factor_gradient, register_gradient, rerouted, ticket
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import in_triton, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.part_sums import check_deferred
from pgolf.ops.qk_rope import SIZE_LIMITS, check_beside, check_heads, qk_rope, rotate, sums_of
from pgolf.ops.qk_rope import reference as rope_reference
from pgolf.ops.qk_rope import samples as rope_samples
from pgolf.ops.qk_rope_kernels import backward_of_results, with_value
from pgolf.ops.tensors import check_alike, nbytes

LEAST_GAIN = 2.0**-100  # triton_kernels/linear_qk_rope.py, csrc/qk_rope.h
_INPUTS = Inputs(
    "linear_qk_rope", ("x", "w", "cos", "sin", "gain", "value", "factor", "value_ids"),
    alike=("x", "w", "value"), wide=("cos", "sin", "gain", "factor"),
    optional=("value", "factor", "value_ids"), matmul=True,
)  # fmt: skip


@outside_autocast
def reference(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, heads: int, kv_heads: int,
    eps: float = 1e-6, norm: bool = True, value: Tensor | None = None,
    factor: Tensor | None = None, split_v: bool = False, value_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`linear_qk_rope` in plain torch."""
    return rope_reference(
        F.linear(x, w), cos, sin, gain, heads, kv_heads, eps, norm, value, factor, split_v,
        value_ids,
    )  # fmt: skip


def _check(x: Tensor, w: Tensor, heads: int, kv_heads: int) -> None:
    check_heads("linear_qk_rope", heads, kv_heads)
    if x.dim() != 3 or not x.size(2):
        raise ValueError(
            f"linear_qk_rope: x is {tuple(x.shape)}: it has to be (N, T, D), D >= 1"
        )
    total = heads + 2 * kv_heads
    if w.dim() != 2 or w.size(1) != x.size(2) or not w.size(0) or w.size(0) % total:
        raise ValueError(
            f"linear_qk_rope: w is {tuple(w.shape)}: with x {tuple(x.shape)} it has to be "
            f"({total} d, {x.size(2)}), the rows of q ({heads} heads), k and v ({kv_heads} each)"
        )
    check_alike("linear_qk_rope", x=x, w=w)


def obstacle(
    impl: str, size: int, heads: int, kv_heads: int, pairs: int, width: int
) -> str:
    """Why `impl` cannot run such heads, of which so many pairs turn, of rows of that width.

    '' if it can. The gradient limits their size.
    """
    return beyond({"triton": SIZE_LIMITS["cuda"]}, impl, size, "elements a head")


def linear_qk_rope(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, heads: int, kv_heads: int,
    eps: float = 1e-6, norm: bool = True, value: Tensor | None = None, impl: str = "auto",
    rope_impl: str | None = None, *, factor: Tensor | None = None, split_v: bool = False,
    sums: Tensor | None = None, value_ids: Tensor | None = None,
    value_order: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Project x to q, k and v, norm and rotate q and k, scale q by its gain.

    Args:
        x: (N, T, D).
        w: ((H + 2 G) d, D): the rows of q, k and v; x, w and value of one dtype and device. Under
            autocast they are cast to its dtype.
        impl: 'auto', 'reference' (torch's matmul, then `qk_rope`) or 'triton' (fp32, bf16;
            d <= 256; see above for what runs where its GEMM is not possible).
        rope_impl: of `qk_rope`, in the gradient or in the two steps of the reference; None:
            'reference' if `impl` is, else 'auto'.
        cos, sin: of a rotation, as `rope_table` gives them: the gradient turns q and k back.
        gain, heads, kv_heads, eps, norm, value, factor, split_v, sums, value_ids, value_order: as
            of `qk_rope`.

    Returns:
        As `qk_rope`; where the magnitude of a gain is less than 2^-100, q as of 2^-100.

    Raises:
        TypeError, ValueError, RuntimeError: as `qk_rope`.
    """
    x, w, cos, sin, gain, value, factor, value_ids = _INPUTS(
        x, w, cos, sin, gain, value, factor, value_ids
    )
    _check(x, w, heads, kv_heads)
    size = w.size(0) // (heads + 2 * kv_heads)
    check_beside(
        "linear_qk_rope", "x", x, size, heads, kv_heads, cos, sin, gain, eps, value, factor,
        value_ids, value_order,
    )  # fmt: skip
    sizes = {
        "size": size, "heads": heads, "kv_heads": kv_heads, "pairs": cos.size(1),
        "width": x.size(2),
    }  # fmt: skip
    chosen = resolve("linear_qk_rope", impl, x, **sizes)
    rope_impl = rope_impl or ("reference" if impl == "reference" else "auto")
    in_two_steps = chosen == "reference" or not norm
    # (Dynamo takes sizes that it holds as dynamic for numbers by `index`, not by `int`.)
    numbers = {n: index(s) for n, s in sizes.items()}
    if in_two_steps or _no_gemm(chosen, x.device, x.dtype, **numbers):
        with without_autocast(x):
            return qk_rope(
                F.linear(x, w), cos, sin, gain, heads, kv_heads, eps, norm, value, rope_impl,
                factor=factor, split_v=split_v, sums=sums, value_ids=value_ids,
                value_order=value_order,
            )  # fmt: skip
    rope_impl = resolve("qk_rope", rope_impl, x, size=size)
    if sums is not None:
        own = sums_of(x.shape[:2].numel(), gain)
        check_deferred("linear_qk_rope", sums, own, rope_impl)
    q, k, v, again, _ = _forward(
        x, w, cos, sin, gain, value, value_ids, *(value_order or (None, None)), factor, sums,
        heads, kv_heads, eps, split_v, chosen, rope_impl,
    )  # fmt: skip
    return (q, k, v, *([rerouted(v, again)] if split_v else []))


def _no_gemm(
    impl: str, device: torch.device, dtype: torch.dtype, size: int, heads: int, kv_heads: int,
    pairs: int, width: int,
) -> str:  # fmt: skip
    """Why there is no GEMM of `impl` for these, or ''; a constant under torch.compile."""
    why = launcher("linear_qk_rope", impl, "obstacle")
    return why(device, dtype, width, heads, kv_heads, size, pairs)


_no_gemm._dynamo_marked_constant = True  # as in pgolf/ops/choose.py


# --- the opaque operator --------------------------------------------------------------------------


@opaque("pgolf::linear_qk_rope", mutates_args=())
def _forward(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, value: Tensor | None,
    value_ids: Tensor | None, order: Tensor | None, bounds: Tensor | None, factor: Tensor | None,
    sums: Tensor | None, heads: int, kv_heads: int, eps: float, split_v: bool, impl: str,
    rope_impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v, the ticket of a second v, if it is to `split_v`, and rstd (N, T, H + G)."""
    forward = launcher("linear_qk_rope", impl, "forward")
    q, k, v, rstd = forward(
        x, w, cos, sin, gain, factor, value, value_ids, heads, kv_heads, eps
    )
    return q, k, v, _again(v, split_v), rstd


@_forward.register_fake
def _(
    x, w, cos, sin, gain, value, value_ids, order, bounds, factor, sums, heads, kv_heads, eps,
    split_v, impl, rope_impl
):  # fmt: skip
    batch, time, _ = x.shape
    size = w.size(0) // (heads + 2 * kv_heads)
    q, k, v = (x.new_empty((batch, time, n, size)) for n in (heads, kv_heads, kv_heads))
    return q, k, v, _again(v, split_v), gain.new_empty((batch, time, heads + kv_heads))


def _again(v: Tensor, split_v: bool) -> Tensor:
    """What stands for v once more in the gradient, empty where nothing does."""
    return ticket(v) if split_v else v.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w, cos, sin, gain, value, *by_ids, factor, sums = inputs[:11]
    ctx.split_v, _, ctx.rope_impl = inputs[14:]
    q, k, _, _, rstd = output
    ctx.deferred = sums is not None
    by_id = by_ids[0] is not None
    ctx.value_rows = value.size(0) if by_id else 0
    ctx.value_shape = None if value is None or by_id else value.shape
    ctx.set_materialize_grads(False)
    need_x, need_w, need_factor = (ctx.needs_input_grad[i] for i in (0, 1, 9))
    ctx.save_for_backward(
        x if need_w or need_factor else None, w if need_x or need_factor else None, q, k, rstd,
        cos, sin, gain, factor, *by_ids,
    )  # fmt: skip


def _gradient(
    ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dv_again: Tensor | None,
    _: None,
) -> tuple:  # fmt: skip
    x, w, *saved = ctx.saved_tensors
    factor, value_ids = saved[6:8]
    dv_again = dv_again if ctx.split_v else None
    dv, dv_again, dvalue = with_value(dv, dv_again, ctx.value_shape)
    rows = ctx.value_rows
    if not ctx.needs_input_grad[5]:
        saved, rows = [*saved[:7], None, None, None], 0
    upstream = dq, dk, dv, dv_again
    if ctx.rope_impl == "reference":
        dqkv, gains, dtable = plain_gradient(*upstream, *saved[:8], rows)
    else:
        dqkv, gains, dtable = backward_of_results(
            *upstream, *saved, rows, ctx.deferred, ctx.rope_impl
        )
    if value_ids is not None:
        dvalue = dtable if rows else None
    packed = dqkv.reshape(-1, dqkv.size(2))
    dx = None if w is None else dqkv @ w
    dw = packed.t() @ x.reshape(packed.size(0), x.size(2)) if ctx.needs_input_grad[1] else None
    d_factor = factor_gradient(x, dx, factor) if ctx.needs_input_grad[9] else None
    d_gain, d_sums = (None, gains) if ctx.deferred else (gains, None)
    dx = dx if ctx.needs_input_grad[0] else None
    return dx, dw, None, None, d_gain, dvalue, *[None] * 3, d_factor, d_sums, *[None] * 6


def plain_gradient(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dv_again: Tensor | None, q: Tensor,
    k: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, factor: Tensor | None,
    value_ids: Tensor | None, value_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward_of_results` in plain torch."""
    wide, heads = rstd.dtype, q.size(2)

    def of_heads(dy: Tensor | None, y: Tensor, rstd: Tensor, gain: Tensor) -> tuple:
        least = torch.full_like(gain, LEAST_GAIN)
        divisor = torch.where(gain < 0, gain.minimum(-least), gain.maximum(least))
        dy = torch.zeros_like(y) if dy is None else dy
        w, n = (rotate(t.to(wide), cos, -sin) for t in (dy, y))
        n = n / divisor[:, None]
        s = (w * n).sum(-1, keepdim=True)
        d = (gain * rstd)[..., None] * (w - n * (s / y.size(3)))
        return d.to(y.dtype), s.sum((0, 1)).squeeze(-1)

    d_queries, d_gain = of_heads(dq, q, rstd[..., :heads], gain)
    d_keys, _ = of_heads(dk, k, rstd[..., heads:], gain.new_ones(k.size(2)))
    d_values = sum((t.to(wide) for t in (dv, dv_again) if t is not None), k.new_zeros(k.shape))
    d_table = d_values.new_empty((0, k.size(2) * k.size(3)))
    if value_rows:  # (an index_add would add in any order on a GPU)
        of_tokens = d_values.reshape(*value_ids.shape, -1)
        d_table = torch.ops.aten.embedding_dense_backward(
            of_tokens, value_ids, value_rows, -1, False
        )
    if factor is not None:
        d_values = d_values * factor[..., None, None]
    parts = d_queries, d_keys, d_values.to(k.dtype)
    return torch.cat(parts, dim=2).flatten(2), d_gain, d_table.to(k.dtype)


register_gradient("linear_qk_rope", _forward, _gradient, _setup_context)


# --- the operator ---------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Those of `qk_rope` as results of a projection; the recipes' at 98,304 tokens."""

    def projected(sample: Sample, inner: int) -> Sample:
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            (qkv, *others), named = sample.build(device, dtype)
            g = torch.Generator().manual_seed(inner)
            w = torch.randn(qkv.size(2), inner, generator=g) * inner**-0.5
            x = torch.randn(*qkv.shape[:2], inner, generator=g)
            return (x.to(device, dtype), w.to(device, dtype), *others), named

        return Sample(sample.label, build, bench=sample.bench)

    return [projected(s, 512 if s.bench else 40) for s in rope_samples()]


def cost(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, heads: int, kv_heads: int,
    eps: float, norm: bool = True, value: Tensor | None = None, factor: Tensor | None = None,
    split_v: bool = False, value_ids: Tensor | None = None,
) -> tuple[Work, Work]:  # fmt: skip
    """A GEMM forward and two backward; kept are q and k, which are results, x and rstd.

    The gradient of x W^T is written and read by both; that of a table is written.
    """
    tokens = x.shape[:2].numel()
    head = tokens * w.size(0) // (heads + 2 * kv_heads) * x.element_size()
    packed, kept = head * (heads + 2 * kv_heads), head * (heads + kv_heads)
    rstd = tokens * (heads + kv_heads) * gain.element_size()
    small = nbytes(cos, sin, gain, factor, value_ids)
    gemm = 2 * x.numel() * w.size(0)
    again = head * kv_heads if split_v else 0
    table = None if value_ids is None else value
    return (
        Work(gemm, nbytes(x, w, value) + small, packed + rstd),
        Work(
            2 * gemm, packed + again + kept + rstd + small + 2 * packed + nbytes(x, w),
            packed + nbytes(x, w, gain, table),
        ),
    )  # fmt: skip


OPERATOR = register(
    Operator(
        name="linear_qk_rope",
        call=linear_qk_rope,
        reference=reference,
        differentiable=("x", "w", "gain", "value", "factor"),
        implementations={
            "triton": in_triton("linear_qk_rope", forward="linear_qk_rope", obstacle="obstacle")
        },
        preferred={
            "cpu": [("reference", "torch's matmul, then `qk_rope`")],
            "cuda": [("reference", "torch's matmul, then `qk_rope`: no GPU has timed it")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
        timed=True,
    )
)
