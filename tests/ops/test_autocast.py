"""One rule under autocast for all implementations, and inputs at the edge of their dtypes."""

import itertools

import pytest
import torch
from torch import Tensor

from pgolf.ops import leaky_relu2_mlp, newton_schulz, residual_norm, softcap_cross_entropy, xsa
from pgolf.ops.inputs import autocasting
from pgolf.ops.operator import OPERATORS, Operator
from pgolf.ops.testing import as_tuple, kernel

from .cases import (
    each,
    every_implementation,
    first_call,
    first_call_of_kernels,
    floating_in,
    implementations,
    takes,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MATMULS = {
    "attention": ("q", "k", "v"),
    "leaky_relu2_mlp": ("h", "w_up", "w_down"),
    "linear_mix": ("z", "w", "x"),
    "linear_residual": ("z", "w", "x"),
    "linear_qk_rope": ("x", "w", "value"),
    "norm_mlp": ("x", "w_up", "w_down"),
    "softcap_cross_entropy": ("x", "w"),
    "xsa_linear": ("y", "v", "w"),
}


def autocast(enabled: bool = True, dtype: torch.dtype = BF16) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=enabled)


@every_implementation(with_reference=True)
def test_forward_under_autocast(operator: Operator, impl: str) -> None:
    """To the bit what the operator gives for arguments that were cast before."""
    call, run = first_call(operator), kernel(operator, impl)
    names = MATMULS.get(operator.name, ())
    cast = call.with_arguments({name: call.arguments[name].to(BF16) for name in names})
    with autocast():
        got = as_tuple(call.on(run, *call.leaves()))
    for mine, wanted in zip(got, as_tuple(cast.on(run, *cast.leaves())), strict=True):
        assert mine.dtype is wanted.dtype and torch.equal(mine, wanted)


@every_implementation(differentiable=True)
@pytest.mark.parametrize("inside", [False, True])
def test_backward_under_autocast(operator: Operator, impl: str, inside: bool) -> None:
    """Autocast around the backward pass changes no bit of a gradient, whose dtype is its leaf's."""
    call = first_call_of_kernels(operator)
    leaves = call.leaves()
    with autocast(inside):
        out = call.on(kernel(operator, impl), *leaves)
    with autocast():
        under = call.gradients(out, leaves, retain_graph=True)
    for mine, theirs, leaf in zip(under, call.gradients(out, leaves), leaves, strict=True):
        assert mine.dtype is leaf.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("impl", ["reference", "auto", *implementations(OPERATORS["xsa"])])
def test_mixed_dtypes(impl: str) -> None:
    """What an F.linear before them gives, beside fp32: cast or promoted; outside an error."""
    g = torch.Generator().manual_seed(0)
    h, up, down = (torch.randn(s, generator=g) for s in ((5, 6), (8, 6), (6, 8)))
    y = torch.randn(1, 3, 4, 8, generator=g)
    wide = torch.randn(5, 40, generator=g)
    targets = torch.arange(5)
    with pytest.raises(ValueError, match="cast one of them"):
        leaky_relu2_mlp(h.bfloat16(), up, down, impl=impl)
    with autocast():
        assert leaky_relu2_mlp(h.bfloat16(), up, down, impl=impl).dtype is BF16
        rstd = torch.ones(5, dtype=BF16)
        assert leaky_relu2_mlp(h, up, down, rstd=rstd, impl=impl).dtype is BF16
        assert leaky_relu2_mlp(h.double(), up.double(), down.double()).dtype is torch.float64
        promoted = xsa(y, y.bfloat16(), impl)
        if impl != "triton":
            loss = softcap_cross_entropy(wide.bfloat16(), torch.ones(9, 40), targets, impl=impl)
            assert loss.dtype is F32
            x, normed = residual_norm(h, branch=h.bfloat16(), impl=impl)
            assert x.dtype is normed.dtype is F32
        ns = newton_schulz(up, dtype=F32, impl="reference" if impl == "cuda" else impl)
        assert ns.dtype is F32, "the dtype that is named stays"
    assert promoted.dtype is F32
    assert torch.equal(promoted, xsa(y, y.bfloat16().float(), impl))


def test_fp16_autocast_takes_the_reference() -> None:
    h, up, down = torch.ones(5, 6), torch.ones(8, 6), torch.ones(6, 8)
    with autocast(dtype=F16):
        assert leaky_relu2_mlp(h, up, down).dtype is F16
        with pytest.raises(ValueError, match="cpu takes .* not torch.float16"):
            leaky_relu2_mlp(h, up, down, impl="cpu")


def test_compiled_code_follows_the_same_rule() -> None:
    h, up, down = torch.randn(5, 6), torch.randn(8, 6), torch.randn(6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(leaky_relu2_mlp, fullgraph=True, backend="aot_eager")
    assert compiled(h, up, down).dtype is F32
    with autocast():
        assert compiled(h, up, down).dtype is BF16
        assert compiled(h, up, down, impl="cpu").dtype is BF16


def test_devices_that_have_no_autocast() -> None:
    assert not autocasting(torch.device("meta"))
    meta = torch.ones(2, 8, 4, device="meta")
    assert newton_schulz(meta, impl="reference").shape == meta.shape


# --- zero and extreme inputs ----------------------------------------------------------------------

FILLS = {"zero": 0.0, "tiny": None, "large": 1e3}  # (in fp16 30: its square fits)


def in_any_dtype() -> list:
    """Every dtype that an implementation takes; the reference takes fp16 too."""
    return [
        pytest.param(*p.values, dtype, id=f"{p.id}-{str(dtype).removeprefix('torch.')}")
        for p in each(with_reference=True)
        for dtype in (F32, BF16, F16, torch.float64)
        if takes(*p.values, dtype)
        and not (dtype is F16 and not p.values[0].differentiable)
        and not (p.values[0].mutates and p.values[1] != "reference" and dtype is torch.float64)
    ]


@pytest.mark.parametrize(("operator", "impl", "dtype"), in_any_dtype())
@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
def test_finite_where_the_truth_is(
    operator: Operator, impl: str, dtype: torch.dtype, cast: bool
) -> None:
    """Of every differentiable argument in turn that is 0, the least of its dtype, or large."""
    call = first_call(operator, dtype)
    # rstd may not be 0, and is a product with what is large
    names = [n for n in call.wanted if n != "rstd"]
    names = names or [next(n for n, a in call.arguments.items() if floating_in(a))]
    for name, fill in itertools.product(names, FILLS):
        hit = call.with_arguments({name: filled(call.arguments[name], fill)})
        double = hit.in_double()
        truth = double.run(double.reference)
        with autocast(cast):
            out = hit.on(kernel(operator, impl), *(leaves := hit.leaves()))
        got = [t.detach() for t in as_tuple(out)]
        got += hit.gradients(out, leaves) if leaves else ()
        for mine, exact in zip(got, truth, strict=True):
            least = BF16 if cast and dtype is F32 else mine.dtype
            fits = exact.double().abs() < 0.1 * min(torch.finfo(t).max for t in (
                [least, dtype] if mine.is_floating_point() else [dtype]
            ))  # fmt: skip
            assert mine[fits].isfinite().all(), (name, fill)


def filled(argument, fill: str):
    def change(t: Tensor) -> Tensor:
        if fill == "tiny":
            return t.sign() * torch.finfo(t.dtype).tiny
        return t * min(FILLS[fill], 30.0 if t.dtype is F16 else FILLS[fill])

    return change(argument) if isinstance(argument, Tensor) else [change(t) for t in argument]


def test_a_zero_value_in_fp16() -> None:
    y = torch.ones(1, 2, 2, 8, dtype=F16, requires_grad=True)
    z = xsa(y, torch.zeros_like(y))
    assert torch.equal(z, y)
    z.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
