"""How `qk_rope` runs in kernels: the opaque operator, its gradient, the compiled half.

Tensors are as `qk_rope` takes them, None where there is none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.derivatives import factor_gradient, register_gradient, ticket
from pgolf.ops.launch import DTYPE_CODES, Run, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.part_sums import sum_parts
from pgolf.ops.tensors import addresses, contiguous, parts_of, unit_stride
from pgolf.ops.token_sums import token_sums

# Kernels sum d_gain over parts of the tokens, of so many at least; csrc/qk_rope.h
MIN_PART, MAX_PARTS = 64, 1024


def _outputs(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for q, k and v."""
    batch, time, width = qkv.shape
    size = width // (heads + 2 * kv_heads)
    return tuple(qkv.new_empty((batch, time, n, size)) for n in (heads, kv_heads, kv_heads))


def _with_ticket(outputs: tuple[Tensor, ...], split_v: bool) -> tuple[Tensor, ...]:
    """q, k, v and what stands for v once more in the gradient, empty where nothing does."""
    v = outputs[2]
    return *outputs, ticket(v) if split_v else v.new_empty(0)


@opaque("pgolf::qk_rope", mutates_args=())
def forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, value: Tensor | None,
    value_ids: Tensor | None, order: Tensor | None, bounds: Tensor | None, factor: Tensor | None,
    sums: Tensor | None, heads: int, kv_heads: int, eps: float, norm: bool, split_v: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v and the ticket of a second v, if it is to `split_v`.

    `sums` is what takes the gradient of gain in parts, where it does not get it itself.
    """
    inputs = contiguous(qkv, cos, sin, gain, value, value_ids, factor)
    outputs = launcher("qk_rope", impl, "forward")(*inputs, heads, kv_heads, eps, norm)
    return _with_ticket(outputs, split_v)


@forward.register_fake
def _(
    qkv, cos, sin, gain, value, value_ids, order, bounds, factor, sums, heads, kv_heads, eps, norm,
    split_v, impl
):  # fmt: skip
    return _with_ticket(_outputs(qkv, heads, kv_heads), split_v)


@opaque("pgolf::qk_rope_backward", mutates_args=())
def _backward(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dv_again: Tensor | None,
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, factor: Tensor | None,
    value_ids: Tensor | None, order: Tensor | None, bounds: Tensor | None, value_rows: int,
    heads: int, kv_heads: int, eps: float, norm: bool, deferred: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dqkv and the gradients of gain, `deferred` in parts, and of a table of values.

    That has as many rows as there are `value_rows`: none, where values came from no table.
    """
    gradients = [None if t is None else unit_stride(t) for t in (dq, dk, dv, dv_again)]
    inputs = contiguous(qkv, cos, sin, gain, factor, value_ids)
    settings = value_rows, heads, kv_heads, eps, norm, deferred
    return launcher("qk_rope", impl, "backward")(*gradients, *inputs, order, bounds, *settings)


@_backward.register_fake
def _(
    dq, dk, dv, dv_again, qkv, cos, sin, gain, factor, value_ids, order, bounds, value_rows, heads,
    kv_heads, eps, norm, deferred, impl
):  # fmt: skip
    dgain = _empty_parts(qkv, gain) if deferred else gain.new_empty(gain.shape)
    width = kv_heads * (qkv.size(2) // (heads + 2 * kv_heads))
    return qkv.new_empty(qkv.shape), dgain, qkv.new_empty((value_rows, width))


@opaque("pgolf::qk_rope_backward_of_results", mutates_args=())
def backward_of_results(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dv_again: Tensor | None,
    q: Tensor, k: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, gain: Tensor,
    factor: Tensor | None, value_ids: Tensor | None, order: Tensor | None, bounds: Tensor | None,
    value_rows: int, deferred: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_backward` where there is no qkv, but q, k and their rstd (N, T, H + G).

    They are of heads that are normed, by a gain of which 2^-100 is the least magnitude.
    """
    gradients = [None if t is None else unit_stride(t) for t in (dq, dk, dv, dv_again)]
    inputs = contiguous(q, k, rstd, cos, sin, gain, factor, value_ids)
    run = launcher("qk_rope", impl, "backward_of_results")
    return run(*gradients, *inputs, order, bounds, value_rows, deferred)


@backward_of_results.register_fake
def _(
    dq, dk, dv, dv_again, q, k, rstd, cos, sin, gain, factor, value_ids, order, bounds, value_rows,
    deferred, impl
):  # fmt: skip
    dqkv = _empty_qkv(q, k)
    dgain = _empty_parts(dqkv, gain) if deferred else gain.new_empty(gain.shape)
    return dqkv, dgain, q.new_empty((value_rows, k.size(2) * k.size(3)))


def _empty_qkv(q: Tensor, k: Tensor) -> Tensor:
    """For a tensor that they would be made of (N, T, (H + 2 G) d)."""
    batch, time, heads, size = q.shape
    return q.new_empty((batch, time, (heads + 2 * k.size(2)) * size))


def part_count(tokens: int) -> int:
    """Of sums over so many tokens."""
    return parts_of(tokens, MIN_PART, MAX_PARTS)


def _empty_parts(qkv: Tensor, gain: Tensor) -> Tensor:
    """For the sums over parts of the tokens (parts, H)."""
    return gain.new_empty((part_count(qkv.shape[:2].numel()), gain.numel()))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cos, sin, gain, value, *by_ids, factor, sums = inputs[:10]
    *settings, ctx.split_v, impl = inputs[10:]
    ctx.deferred = sums is not None
    by_id = by_ids[0] is not None
    ctx.settings = value.size(0) if by_id else 0, *settings, ctx.deferred, impl
    ctx.value_shape = None if value is None or by_id else value.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cos, sin, gain, factor, *by_ids)


def _gradient(
    ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dv_again: Tensor | None
) -> tuple:
    qkv, _, _, _, factor, value_ids, *_ = saved = ctx.saved_tensors
    dv_again = dv_again if ctx.split_v else None
    dv, dv_again, dvalue = with_value(dv, dv_again, ctx.value_shape)
    rows, *settings = ctx.settings
    if not ctx.needs_input_grad[4]:
        saved, rows = (*saved[:5], None, None, None), 0
    dqkv, gains, dtable = _backward(dq, dk, dv, dv_again, *saved, rows, *settings)
    if value_ids is not None:
        dvalue = dtable if rows else None
    d_gain, d_sums = (None, gains) if ctx.deferred else (gains, None)
    d_factor = factor_gradient(qkv, dqkv, factor) if ctx.needs_input_grad[8] else None
    none = (None for _ in range(6))  # for what is no tensor
    return dqkv, None, None, d_gain, dvalue, None, None, None, d_factor, d_sums, *none


def with_value(
    dv: Tensor | None, dv_again: Tensor | None, value_shape: torch.Size | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of v as kernels take them, and that of values of this shape, if there are any.

    The same numbers, which are no copy as a rule, or a sum that the kernel need not make too. (So
    also where nobody wants it: a gradient is the same to the bit whatever others are.)
    """
    if value_shape is None:
        return dv, dv_again, None
    if dv is not None and dv_again is not None:
        dv, dv_again = dv + dv_again, None
    whole = dv_again if dv is None else dv
    return dv, dv_again, None if whole is None else whole.reshape(value_shape).contiguous()


register_gradient("qk_rope", forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _shape(qkv: Tensor, cos: Tensor, heads: int, kv_heads: int) -> tuple[int, ...]:
    """What the kernels call dtype, n, t, h, g, d and half."""
    batch, time, width = qkv.shape
    size = width // (heads + 2 * kv_heads)
    return DTYPE_CODES[qkv.dtype], batch, time, heads, kv_heads, size, cos.size(1)


def launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def forward(qkv, cos, sin, gain, value, value_ids, factor, heads, kv_heads, eps, norm):
        outputs = _outputs(qkv, heads, kv_heads)
        run(
            "qk_rope", qkv, *addresses(qkv, cos, sin, gain, factor, value, value_ids),
            0 if value_ids is None else value.size(0), *addresses(*outputs),
            *_shape(qkv, cos, heads, kv_heads), eps, norm,
        )  # fmt: skip
        return outputs

    def backward(
        dq, dk, dv, dv_again, qkv, cos, sin, gain, factor, value_ids, order, bounds, value_rows,
        heads, kv_heads, eps, norm, deferred,
    ):  # fmt: skip
        dqkv, parts = qkv.new_empty(qkv.shape), _empty_parts(qkv, gain)
        gradients = (dq, dk, dv, dv_again)
        values = qkv.size(2) // (heads + 2 * kv_heads) * kv_heads  # of a token
        read = qkv[..., :-values]  # of v, which is a sum, the gradient needs no number
        run(
            "qk_rope_backward", qkv,
            *addresses(read, cos, sin, gain, factor, *gradients, dqkv, parts),
            parts.size(0), *_shape(qkv, cos, heads, kv_heads), eps, norm, *strides(gradients),
        )  # fmt: skip
        return finished(dqkv, parts, values, factor, value_ids, order, bounds, value_rows, deferred)

    def backward_of_results(
        dq, dk, dv, dv_again, q, k, rstd, cos, sin, gain, factor, value_ids, order, bounds,
        value_rows, deferred,
    ):  # fmt: skip
        dqkv = _empty_qkv(q, k)
        parts = _empty_parts(dqkv, gain)
        gradients = (dq, dk, dv, dv_again)
        run(
            "qk_rope_backward_of_results", q,
            *addresses(q, k, rstd, cos, sin, gain, factor, *gradients, dqkv, parts),
            parts.size(0), *_shape(dqkv, cos, q.size(2), k.size(2)), *strides(gradients),
        )  # fmt: skip
        values = k.size(2) * k.size(3)
        return finished(dqkv, parts, values, factor, value_ids, order, bounds, value_rows, deferred)

    def strides(gradients):
        return ((0, 0, 0) if t is None else t.stride()[:3] for t in gradients)

    def finished(dqkv, parts, values, factor, value_ids, order, bounds, value_rows, deferred):
        dtable = dqkv.new_empty((0, values))
        if value_ids is not None:  # dv of a token is what its part of dqkv is the factor's times of
            known = None if order is None else (order, bounds)
            dtable = token_sums(run, value_ids, value_rows, dqkv[..., -values:], factor, known)
        return dqkv, parts if deferred else sum_parts(run, [parts]), dtable

    return {
        "forward": forward, "backward": backward, "backward_of_results": backward_of_results
    }  # fmt: skip
