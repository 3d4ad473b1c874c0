"""Operators on whatever shapes, strides and dtypes hypothesis thinks of.

What fits gives the reference's numbers; what does not fit is a ValueError of the operator: never
another exception, never a wrong number. PGOLF_FUZZ_EXAMPLES sets how many examples an operator
gets; `make prove` runs 500, with the C++ kernels under AddressSanitizer.
"""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf.ops import (
    embed_smear,
    fake_quant,
    leaky_relu2_mlp,
    newton_schulz,
    qk_rope,
    residual_norm,
    softcap_cross_entropy,
    weight_cast,
    xsa,
)
from pgolf.ops.newton_schulz import CLASSIC, POLAR_EXPRESS
from pgolf.ops.operator import OPERATORS
from pgolf.ops.qk_rope import rope_table
from pgolf.ops.testing import as_tuple

EXAMPLES = int(os.environ.get("PGOLF_FUZZ_EXAMPLES", 40))
fuzz = settings(
    max_examples=EXAMPLES, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
lengths = st.integers(0, 9)


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape as a view: permuted, sliced, with gaps, expanded or plain."""
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else range(len(shape))
    gaps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    offset = draw(st.integers(0, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    expanded = draw(st.sampled_from([None, None, None, *range(len(shape))]))
    base_shape = [1 if i == expanded else n * k for i, (n, k) in enumerate(zip(shape, gaps))]  # noqa: B905
    memory = torch.randn(
        *[base_shape[i] for i in order], generator=g, dtype=torch.float64
    )
    memory = torch.cat([torch.zeros(offset, dtype=torch.float64), memory.flatten()])
    view = memory.to(dtype)[offset:].view([base_shape[i] for i in order])
    inverse = sorted(range(len(shape)), key=list(order).__getitem__)
    view = view.permute(inverse)
    for dim, gap in enumerate(gaps):
        if dim != expanded:
            view = view[(slice(None),) * dim + (slice(None, None, gap),)]
    return view.expand(shape)


def outcome(call, leaves: list[Tensor], impl: str, upstream: Tensor | None):
    """[results, gradients] or the message of the ValueError."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    try:
        out = as_tuple(call(*leaves, impl))
    except ValueError as e:
        return str(e)
    if upstream is None:
        return [*out]
    upstreams = [upstream.expand(t.shape) for t in out]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, upstreams)]


def agree(
    call,
    leaves: list[Tensor],
    slack: float,
    upstream: Tensor | None,
    least: float = 1e-30,
    rounded_to: torch.dtype | None = None,
) -> None:
    """The C++ form answers as the reference does, to within `slack` roundings of the result.

    `least` is the size of what cancels in a result that is smaller than that; `rounded_to` is the
    dtype in which the reference computes results of a finer one, too.
    """
    mine, theirs = (outcome(call, leaves, impl, upstream) for impl in ("cpu", "reference"))
    if isinstance(theirs, str):
        assert mine == theirs
        return
    assert not isinstance(mine, str), mine
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = b.double().abs().max().item() if b.numel() else 0.0
        assert torch.isfinite(a).all()
        difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        assert difference <= slack * torch.finfo(rounded_to or a.dtype).eps * max(scale, least)


def scalar_like(dtype: torch.dtype) -> Tensor:
    """An output gradient of stride 0 in every dimension."""
    return torch.full((), 0.75, dtype=dtype)


@fuzz
@given(st.data(), dtypes, lengths, lengths, st.integers(0, 6), st.integers(0, 3), lengths)
def test_xsa(data, dtype, batch, time, heads, groups, size) -> None:
    odd = data.draw(st.sampled_from([0, 0, 0, 1]))
    y = data.draw(tensors((batch, time, heads, size), dtype))
    v = data.draw(tensors((batch, time + odd, groups, size), dtype))
    shortest = v.double().norm(dim=-1).min().item() if v.numel() else 1.0
    agree(xsa, [y, v], 100, scalar_like(dtype), least=10 / max(shortest, 1e-3))


@fuzz
@given(
    st.data(), dtypes, lengths, lengths, lengths, st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.booleans(),
)  # fmt: skip
def test_leaky_relu2_mlp(data, dtype, rows, dim, hidden, slope, scaled) -> None:
    odd = data.draw(st.sampled_from([0, 0, 0, 1]))
    h = data.draw(tensors((rows, dim), dtype))
    up = data.draw(tensors((hidden, dim), dtype))
    down = data.draw(tensors((dim, hidden + odd), dtype))
    rstd = torch.linspace(0.5, 2, rows, dtype=torch.promote_types(dtype, torch.float32))

    def call(h, up, down, impl):
        return leaky_relu2_mlp(h, up, down, slope, rstd if scaled else None, impl)

    agree(call, [h, up, down], 100, scalar_like(dtype))


@fuzz
@given(st.data(), dtypes, st.integers(0, 3), lengths, lengths, st.booleans(), st.booleans())
def test_newton_schulz(data, dtype, batch, rows, columns, polar, row_norm) -> None:
    g = data.draw(tensors((batch, rows, columns), dtype))
    coefficients = (POLAR_EXPRESS if polar else CLASSIC)[:2]

    def call(g, impl):
        with torch.no_grad():
            return newton_schulz(g, coefficients, torch.float32, row_norm, 1.02, impl=impl)

    agree(call, [g], 2000, None)


@fuzz
@given(st.data(), dtypes, lengths, lengths, st.integers(3, 9), st.booleans(), st.booleans())
def test_fake_quant(data, dtype, rows, columns, bits, on, mask) -> None:
    w = data.draw(tensors((rows, columns), dtype))
    factor = data.draw(tensors((rows,), torch.float32)).abs() + 0.01
    multiple = data.draw(st.sampled_from([1, 1, 4]))
    floor = data.draw(st.sampled_from([0.0, 1.0]))
    full = data.draw(st.booleans())

    def call(w, impl):
        return fake_quant(w, factor, bits, on, floor, multiple, full, mask, impl=impl)

    agree(call, [w], 0, scalar_like(dtype))  # to the bit


@fuzz
@given(st.data(), dtypes, st.integers(0, 3), lengths, st.integers(0, 5), st.integers(0, 3))
def test_qk_rope(data, dtype, batch, time, heads, groups) -> None:
    size, dims = data.draw(st.tuples(st.integers(1, 40), st.integers(0, 21)))
    odd = data.draw(st.sampled_from([0, 0, 0, 1]))
    norm, valued, factored, twice = data.draw(st.tuples(*[st.booleans()] * 4))
    qkv = data.draw(tensors((batch, time, (heads + 2 * groups) * size + odd), dtype))
    value = data.draw(tensors((batch, time, groups * size), dtype))
    wide = torch.promote_types(dtype, torch.float32)
    gain = data.draw(tensors((heads,), wide))
    factor = data.draw(tensors((batch, time), wide)).abs() + 0.1
    table = [t.to(wide) for t in rope_table(time + odd, 2 * dims, 100.0)]

    def call(qkv, gain, value, impl):
        added = value if valued else None
        results = qk_rope(
            qkv, *table, gain, heads, groups, 1e-3, norm, added, impl,
            factor=factor if factored else None, split_v=twice,
        )  # fmt: skip
        return torch.cat([t.flatten() for t in results]) + 0 * value.sum()

    agree(call, [qkv, gain, value], 16, scalar_like(dtype), least=20, rounded_to=dtype)


@fuzz
@given(st.data(), dtypes, st.integers(0, 3), st.integers(0, 40), st.integers(1, 5))
def test_embed_smear(data, dtype, batch, time, rows) -> None:
    width, odd = data.draw(st.tuples(st.integers(0, 70), st.sampled_from([0, 0, 0, 1])))
    ids = data.draw(tensors((batch, time), torch.float32)).abs().mul(2).long().clamp(max=rows - 1)
    table = data.draw(tensors((rows, width), dtype))
    bigram = data.draw(tensors((batch, time, width + odd), dtype))
    starts = data.draw(tensors((batch, time), torch.float32)) > 1
    wide = torch.promote_types(dtype, torch.float32)
    gate, scale = data.draw(tensors((width,), wide)), torch.tensor(0.5, dtype=wide)

    def call(table, bigram, scale, gate, impl):
        return embed_smear(ids, table, bigram, scale, gate, starts, 1e-3, dtype, impl)

    agree(call, [table, bigram, scale, gate], 16, scalar_like(dtype), 20, rounded_to=dtype)


@fuzz
@given(st.data(), dtypes, lengths, st.integers(0, 40), *[st.booleans()] * 3)
def test_residual_norm(data, dtype, rows, width, scaled, mixed, factored) -> None:
    odd = data.draw(st.sampled_from([0, 0, 0, 1]))
    x = data.draw(tensors((rows, 2, width), dtype))
    branch = data.draw(tensors((rows, 2, width + odd), dtype))
    wide = torch.promote_types(dtype, torch.float32)
    a = data.draw(tensors((width,), wide)) if scaled else None
    mix = data.draw(tensors((2, width), wide)) if mixed else None

    def call(x, branch, impl):
        x_in, h = residual_norm(
            x, branch=branch, branch_scale=a, x0=x if mixed else None, mix=mix, scale=0.5,
            eps=0.01, factored=factored, impl=impl,
        )  # fmt: skip
        return x_in, h.product() if factored else h

    agree(call, [x, branch], 8, scalar_like(dtype), least=8)


@fuzz
@given(st.data(), dtypes, lengths, st.integers(0, 40), st.integers(0, 14))
def test_scaled_copies(data, dtype, rows, width, copies) -> None:
    odd = data.draw(st.sampled_from([0, 0, 0, 1]))
    x = data.draw(tensors((rows, 2, width), dtype))
    wide = torch.promote_types(dtype, torch.float32)
    factors = data.draw(tensors((copies, width + odd), wide))

    def call(x, factors, impl):
        return OPERATORS["scaled_copies"].call(x, factors, impl=impl)

    agree(call, [x, factors], 8, scalar_like(dtype), least=8, rounded_to=dtype)


@fuzz
@given(st.data(), dtypes, lengths, lengths, st.integers(3, 9), st.booleans(), st.booleans())
def test_weight_cast(data, dtype, rows, columns, bits, gridded, mask) -> None:
    w = data.draw(tensors((rows, columns), dtype))
    scale = data.draw(tensors((rows,), torch.promote_types(dtype, torch.float32)))
    factor = data.draw(tensors((rows,), torch.float32)).abs() + 0.01
    to = data.draw(dtypes)
    grid = dict(clip_factor=factor, bits=bits, on=True) if gridded else {}

    def call(w, scale, impl):
        return weight_cast(w, scale, **grid, clip_mask=mask, dtype=to, impl=impl)

    agree(call, [w, scale], 32, scalar_like(to))


caps = st.sampled_from([0.0, 0.5, 30.0])


@fuzz
@given(st.data(), dtypes, lengths, lengths, st.integers(0, 40), caps, st.booleans())
def test_softcap_cross_entropy(data, dtype, rows, width, columns, cap, mean) -> None:
    odd = data.draw(st.sampled_from([0, 0, 0, 1]))
    x = data.draw(tensors((rows, width), dtype))
    w = data.draw(tensors((columns, width + odd), dtype))
    targets = data.draw(tensors((rows,), torch.float32)).abs().mul(8).long()
    targets = targets.clamp(max=max(columns - 1, 0))
    reduction = "mean" if mean and rows else "none"  # the mean of nothing is NaN

    def call(x, w, impl):
        return softcap_cross_entropy(x, w, targets, cap, reduction, impl)

    upstream = scalar_like(torch.promote_types(dtype, torch.float32))
    agree(call, [x, w], 32, upstream, least=8)
