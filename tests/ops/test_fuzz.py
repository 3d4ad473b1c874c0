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

from pgolf.ops import fake_quant, leaky_relu2, leaky_relu2_mlp, newton_schulz, xsa
from pgolf.ops.newton_schulz import CLASSIC, POLAR_EXPRESS

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
    """[result, gradients] or the message of the ValueError."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    try:
        out = call(*leaves, impl)
    except ValueError as e:
        return str(e)
    if upstream is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.expand(out.shape))]


def agree(
    call, leaves: list[Tensor], slack: float, upstream: Tensor | None, least: float = 1e-30
) -> None:
    """The C++ form answers as the reference does, to within `slack` roundings of the result.

    `least` is the size of what cancels in a result that is smaller than that.
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
        assert difference <= slack * torch.finfo(a.dtype).eps * max(scale, least)


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
@given(st.data(), dtypes, lengths, st.integers(0, 70), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_leaky_relu2(data, dtype, rows, columns, slope) -> None:
    x = data.draw(tensors((rows, 2, columns), dtype))

    def call(x, impl):
        return leaky_relu2(x, slope, impl=impl)

    agree(call, [x], 16, scalar_like(dtype))


@fuzz
@given(st.data(), dtypes, lengths, lengths, lengths, st.sampled_from([0.0, 0.5]), st.booleans())
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
            return newton_schulz(g, coefficients, torch.float32, row_norm, 1.02, impl)

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
