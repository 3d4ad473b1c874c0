"""Per-head RMS norm, partial rotary embedding and query gain, on one packed projection.

RoPE (Su et al., arXiv 2104.09864) in the half-split form on the first r dims of a head: pairs
(j, j + r/2), angle t * base^(-2j/r), R (x1, x2) = (x1 cos + x2 sin, -x1 sin + x2 cos); the other
dims pass through. The base is the same at every length. For a query head x with gain g

    y = g R n,   n = x rstd,   rstd = 1 / sqrt(mean(x^2) + eps)        (without norm: n = x)

a key head has no gain, and a value head only gets `value` added. With w = R^T dy and s = w . n

    d_gain = sum of s over all tokens,   dx = g rstd (w - n s / d)     (without norm: dx = g w)

With a factor f of each token, qkv stands for f qkv, which is never written: the norm before the
projection is such a factor. For queries and keys it goes into rstd, since

    norm(f x) = x f / sqrt(f^2 mean(x^2) + eps)

What values get added may be rows of a table, by the ids of the tokens: the gradient of such a row
is the sum of dv over its tokens. Kernels look the rows up, and no tensor of them is written.

Shapes: qkv (N, T, (H + 2 G) d) is q, k and v side by side, cos and sin (T, r/2), gain (H,), factor
(N, T), value (N, T, G d), or with ids (N, T) a table (V, G d).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.derivatives import rerouted
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import in_extension
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.part_sums import Sums, check_deferred
from pgolf.ops.qk_rope_kernels import forward, launchers, part_count
from pgolf.ops.residual_norm import rms_norm
from pgolf.ops.tensors import check_alike, compute_dtype, nbytes
from pgolf.ops.token_sums import check_order

SIZE_LIMITS = {"cpu": 256, "cuda": 256}  # of a head
_INPUTS = Inputs(
    "qk_rope", ("qkv", "cos", "sin", "gain", "value", "factor", "value_ids"),
    alike=("qkv", "value"), wide=("cos", "sin", "gain", "factor"),
    optional=("value", "factor", "value_ids"),
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
    factor: Tensor | None = None,
    split_v: bool = False,
    value_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`qk_rope` in plain torch; k and v may be views of qkv."""
    if value_ids is not None:  # (the gradient of a row is a sum over tokens, so it is fp32)
        value = F.embedding(value_ids, value.to(compute_dtype(value.dtype))).to(value.dtype)
    total = heads + 2 * kv_heads
    if factor is not None:
        qkv = qkv * factor[..., None].to(qkv.dtype)
    packed = qkv.unflatten(-1, (total, qkv.size(-1) // total))
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=-2)
    if norm:
        q, k = rms_norm(q, eps, "reference"), rms_norm(k, eps, "reference")
    q = rotate(q, cos, sin) * gain.to(q.dtype)[:, None]
    v = v if value is None else v + value.reshape(v.shape)
    return (q, rotate(k, cos, sin), v, *([v] if split_v else []))


def check_heads(operator: str, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless there are heads of both kinds."""
    if heads < 1 or kv_heads < 1:
        raise ValueError(
            f"{operator}: heads={heads}, kv_heads={kv_heads}: both have to be 1 or more"
        )


def _check(qkv: Tensor, heads: int, kv_heads: int) -> None:
    check_heads("qk_rope", heads, kv_heads)
    total = heads + 2 * kv_heads
    if qkv.dim() != 3 or not qkv.size(2) or qkv.size(2) % total:
        raise ValueError(
            f"qk_rope: qkv is {tuple(qkv.shape)}: it has to be (N, T, {total} d), the heads of "
            f"q ({heads}), k and v ({kv_heads} each) side by side"
        )


def check_beside(
    operator: str, what: str, source: Tensor, size: int, heads: int, kv_heads: int, cos: Tensor,
    sin: Tensor, gain: Tensor, eps: float, value: Tensor | None, factor: Tensor | None,
    ids: Tensor | None, order: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Raise ValueError unless all that `qk_rope` takes beside qkv fits heads of that size.

    Args:
        what, source: name and tensor (N, T, ...) that qkv is, or is made of.
    """
    batch, time, _ = source.shape
    half = cos.size(-1) if cos.dim() == 2 else -1
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (time, half) or 2 * half > size:
            raise ValueError(
                f"{operator}: {name} is {tuple(table.shape)}: for this {what} it has to be "
                f"({time}, r/2) with an r of at most {size}, as sin and cos alike"
            )
    if gain.shape != (heads,):
        raise ValueError(f"{operator}: gain is {tuple(gain.shape)}: it has to be ({heads},)")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{operator}: eps={eps}: it has to be 0 or more, and finite")
    check_alike(operator, **{what: source, "value": value})
    wide = compute_dtype(source.dtype)
    for name, t in (("cos", cos), ("sin", sin), ("gain", gain), ("factor", factor)):
        if t is not None and (t.dtype != wide or t.device != source.device):
            raise ValueError(
                f"{operator}: {name} is {t.dtype} on {t.device}: it has to be {wide} on "
                f"{source.device}"
            )
    _check_value(operator, what, value, ids, (batch, time, kv_heads * size), source.device)
    if factor is not None and factor.shape != (batch, time):
        raise ValueError(
            f"{operator}: factor is {tuple(factor.shape)}: it has to be {(batch, time)}, one a "
            "token"
        )
    if order is not None:
        if ids is None:
            raise ValueError(f"{operator}: value_order is given without value_ids: give both")
        check_order(operator, "value_order", order, ids, value.size(0))


def _check_value(
    operator: str, what: str, value: Tensor | None, ids: Tensor | None, of_v: tuple[int, ...],
    device: torch.device,
) -> None:  # fmt: skip
    """Raise ValueError unless values of v's shape, or rows of a table by ids, can be added to v."""
    if ids is not None and (ids.shape != of_v[:2] or ids.dtype != torch.int64):
        raise ValueError(
            f"{operator}: value_ids is {ids.dtype} {tuple(ids.shape)}: it has to be int64 "
            f"{of_v[:2]}"
        )
    if ids is not None and ids.device != device:
        raise ValueError(
            f"{operator}: value_ids is on {ids.device} and {what} on {device}: move one"
        )
    fits = value is not None and value.dim() == 2 and value.size(1) == of_v[2]
    if ids is not None and not (fits and value.size(0)):
        shape = None if value is None else tuple(value.shape)
        raise ValueError(
            f"{operator}: value is {shape}: with value_ids it has to be a table (V, {of_v[2]}), "
            "V >= 1"
        )
    if ids is None and value is not None and value.shape != of_v:
        raise ValueError(f"{operator}: value is {tuple(value.shape)}: it has to be {of_v}, as v")


def sums_of(tokens: int, gain: Tensor) -> Sums:
    """What `part_sums.deferred` takes for a call with this gain, N T tokens."""
    return Sums(part_count(tokens), [gain])


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
    *,
    factor: Tensor | None = None,
    split_v: bool = False,
    sums: Tensor | None = None,
    value_ids: Tensor | None = None,
    value_order: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Split a packed projection into q, k and v; norm and rotate q and k, scale q by its gain.

    Args:
        qkv: (N, T, (H + 2 G) d): H heads of q, G of k, G of v.
        cos, sin: (T, r/2) of `rope_table`, r <= d, in fp32 (fp64 for an fp64 qkv).
        gain: (H,) in fp32 (fp64 for an fp64 qkv).
        heads, kv_heads: H and G.
        eps: added to the mean square of a head before the root.
        norm: whether heads of q and k are normed.
        value: (N, T, G d) of qkv's dtype, added to v; with `value_ids` a table (V, G d).
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64; d <= 256) or 'cuda' (fp32, bf16;
            d <= 256).
        factor: (N, T) in fp32 (fp64 for an fp64 qkv), not 0: what each token's qkv is still to be
            multiplied by; None is 1.
        split_v: whether v comes twice. Kernels add up the gradients of both where they make that of
            qkv, and autograd has nothing to add (but for the gradient of `value`).
        sums: what `part_sums.deferred` gives for `sums_of` these arguments: gain then gets its
            gradient from there. None: from here.
        value_ids: (N, T) int64, the row of `value` for each token. One that the table does not have
            is an error on a CPU; on a GPU, where nobody looks, its values are NaN. The gradient of
            the table is deterministic.
        value_order: what `token_sums.shared_orders` gives for these, if others need it too.

    Returns:
        q (N, T, H, d), k and v (N, T, G, d), contiguous, with split_v v once more; of the
        reference, views may be among them.

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    qkv, cos, sin, gain, value, factor, value_ids = _INPUTS(
        qkv, cos, sin, gain, value, factor, value_ids
    )
    _check(qkv, heads, kv_heads)
    size = qkv.size(2) // (heads + 2 * kv_heads)
    check_beside(
        "qk_rope", "qkv", qkv, size, heads, kv_heads, cos, sin, gain, eps, value, factor,
        value_ids, value_order,
    )  # fmt: skip
    impl = resolve("qk_rope", impl, qkv, size=size)
    if sums is not None:
        check_deferred("qk_rope", sums, sums_of(qkv.shape[:2].numel(), gain), impl)
    if impl == "reference":
        return reference(
            qkv, cos, sin, gain, heads, kv_heads, eps, norm, value, factor, split_v, value_ids
        )
    q, k, v, again = forward(
        qkv, cos, sin, gain, value, value_ids, *(value_order or (None, None)), factor, sums, heads,
        kv_heads, eps, norm, split_v, impl,
    )  # fmt: skip
    return (q, k, v, *([rerouted(v, again)] if split_v else []))


def samples() -> list[Sample]:
    """Partial, full and no rotation; the bench sizes are one layer of the recipes."""

    def make(
        batch: int, time: int, heads: int, groups: int, size: int, dims: int,
        norm: bool = True, with_value: bool = False, with_factor: bool = False,
        split_v: bool = False, rows: int = 0,
    ):  # fmt: skip
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(time)
            wide = compute_dtype(dtype)
            qkv = torch.randn(batch, time, (heads + 2 * groups) * size, generator=g).double()
            of_value = (rows,) if rows else (batch, time)
            value = torch.randn(*of_value, groups * size, generator=g).double()
            table = [t.to(device, wide) for t in rope_table(time, dims, 10000.0)]
            gain = torch.linspace(-0.5, 1.5, heads).to(device, wide)
            named = {"value": value.to(device, dtype)} if with_value else {}
            if with_factor:
                factor = torch.linspace(2.0, -0.3, batch * time).view(batch, time)
                named["factor"] = factor.to(device, wide)
            if split_v:
                named["split_v"] = True
            if rows:
                named["value_ids"] = torch.randint(rows, (batch, time), generator=g).to(device)
            return (qkv.to(device, dtype), *table, gain, heads, groups, 1e-6, norm), named

        return build

    shapes = {
        "3x5 8/4 64 r16 value": make(3, 5, 8, 4, 64, 16, with_value=True),
        "1x3 8/4 64 r64": make(1, 3, 8, 4, 64, 64),
        "2x9 8/4 64 r16 factor, v twice": make(
            2, 9, 8, 4, 64, 16, with_factor=True, split_v=True
        ),
        "1x70 4/4 32 r32": make(1, 70, 4, 4, 32, 32),
        "2x40 8/4 64 r16 table, factor, v twice": make(
            2, 40, 8, 4, 64, 16, with_value=True, with_factor=True, split_v=True, rows=7
        ),
        "1x9 2/1 33 r6 table": make(1, 9, 2, 1, 33, 6, with_value=True, rows=90),
        "2x2 2/1 24 r6 value, factor, v twice": make(
            2, 2, 2, 1, 24, 6, with_value=True, with_factor=True, split_v=True
        ),
        "1x3 3/3 17 r4 no norm, factor": make(
            1, 3, 3, 3, 17, 4, norm=False, with_factor=True
        ),
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
    norm: bool = True, value: Tensor | None = None, factor: Tensor | None = None,
    split_v: bool = False, value_ids: Tensor | None = None,
) -> tuple[Work, Work]:  # fmt: skip
    """Least work: every tensor once; the norms are recomputed, so that nothing but qkv is kept.

    The gradient reads those of q, k and v, both of a v that is split, and of qkv the queries (for
    d_gain) and, with norm, the keys. The gradient of `value` is that of v and costs nothing, but
    for that of a table, which is written.
    """
    small = nbytes(cos, sin, gain, factor, value_ids)
    part = nbytes(qkv) // (heads + 2 * kv_heads)  # of one head
    again = part * (heads + kv_heads * (norm + split_v))
    table = None if value_ids is None else value
    return (
        Work(0, nbytes(qkv, value) + small, nbytes(qkv)),
        Work(0, nbytes(qkv) + again + small, nbytes(qkv, gain, table)),
    )


OPERATOR = register(
    Operator(
        name="qk_rope",
        call=qk_rope,
        reference=reference,
        differentiable=("qkv", "gain", "value", "factor"),
        implementations=in_extension(
            (
                "qk_rope", "qk_rope_backward", "qk_rope_backward_of_results", "token_order",
                "token_sums",
            ),
            launchers,
        ),
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("cuda", "every number once, backward two launches, three with a table")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
