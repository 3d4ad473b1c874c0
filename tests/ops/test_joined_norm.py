"""Norms between layers that hand each other products: against what plain torch makes of them."""

import pytest
import torch
from torch import Tensor

from pgolf.ops.derivatives import rerouted
from pgolf.ops.joined_norm import joined_norm
from pgolf.ops.operator import OPERATORS
from pgolf.ops.residual_norm import residual_norm
from pgolf.ops.testing import Call

from .cases import implementations, numbers

KERNELS = implementations(OPERATORS["residual_norm"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)


NAMES = ("t0", "t1", "t2", "t3", "f0", "f1", "f2", "f3")


def joined(
    t0: Tensor, t1=None, t2=None, t3=None, f0=None, f1=None, f2=None, f3=None,
    impl: str = "reference",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_in and h of up to four terms and their factors."""
    terms = [t for t in (t0, t1, t2, t3) if t is not None]
    factors = [f0, f1, f2, f3][: len(terms)]
    if impl == "reference":
        pairs = zip(terms, factors, strict=True)
        total = sum(t if f is None else f.to(t.dtype) * t for t, f in pairs)
        return residual_norm(total, scale=-0.5, eps=1e-3, impl=impl)
    # Products of torch's whose place the terms take.
    stands = [
        t if f is None else rerouted(t.detach(), (f * t).to(t.dtype))
        for t, f in zip(terms, factors, strict=True)
    ]
    x_in, h = joined_norm(stands, factors, -0.5, 1e-3, impl)
    return x_in, h.product()


def a_call(terms: int, dtype: torch.dtype, shape: tuple[int, ...] = (2, 7, 24)) -> Call:
    wide = torch.promote_types(dtype, torch.float32)
    states = [numbers(*shape, seed=i).to(dtype) for i in range(terms)]
    factors = [numbers(shape[-1], seed=9 + i).to(wide) for i in range(terms)]
    given = dict(zip(NAMES[:terms], states, strict=True))
    given |= dict(zip(NAMES[4:], [None, *factors[1:]] if terms > 1 else factors, strict=False))
    return Call(joined, (), given, differentiable=NAMES)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 7, 24), (130, 33), (3, 512), (2, 1031)])
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_sums_of_products(
    terms: int, shape: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    """Values and all gradients, by the error rule; bf16 has kernels for these terms alone."""
    if dtype not in OPERATORS["residual_norm"].implementations[impl].dtypes:
        pytest.skip(f"{impl} does not take {dtype}")
    call = a_call(terms, dtype, shape)
    assert call.problem(lambda *a, **k: joined(*a, **k, impl=impl)) == ""


@every_kernel
@pytest.mark.parametrize("terms", [1, 3, 4])
def test_any_address(impl: str, terms: int) -> None:
    """Memory that starts off a 16-byte boundary gives the numbers of memory that does not."""
    given = a_call(terms, torch.bfloat16, (27, 264)).arguments
    given = {n: t for n, t in given.items() if t is not None}
    off = {n: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for n, t in given.items()}
    both = []
    for tensors in (given, off):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        out = joined(**leaves, impl=impl)
        ones = [torch.ones_like(t) for t in out]
        grads = torch.autograd.grad(out, list(leaves.values()), ones)
        both.append([*out, *grads])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)


@every_kernel
@pytest.mark.parametrize("missing", ["x_in", "h"])
def test_all_terms_get_one_gradient(impl: str, missing: str) -> None:
    terms = [numbers(3, 16, seed=i).float().requires_grad_() for i in range(3)]
    factors = [None, *(numbers(16, seed=i).float() for i in range(2))]
    x_in, h = joined_norm(terms, factors, impl=impl)
    out = x_in if missing == "h" else h.product()
    first, *others = torch.autograd.grad(out.square().sum(), terms)
    assert first.any() and all(g.data_ptr() == first.data_ptr() for g in others)


@every_kernel
def test_what_is_not_finite_stays_in_its_row(impl: str) -> None:
    terms = [numbers(4, 24, seed=i).float() for i in range(2)]
    factors = [None, numbers(24).float()]
    clean = joined_norm(terms, factors, impl=impl)[0]
    terms[1][2, 23] = float("nan")
    x_in, h = joined_norm(terms, factors, impl=impl)
    assert x_in.isnan().nonzero().tolist() == [[2, 23]]
    assert h.product()[2].isnan().all()
    assert torch.equal(x_in[[0, 1, 3]], clean[[0, 1, 3]])


def test_in_one_graph() -> None:
    if "cpu" not in KERNELS:
        pytest.skip("no C++ kernels")
    torch._dynamo.reset()
    named = {n: t for n, t in a_call(4, torch.float32).arguments.items() if t is not None}
    given = [t.requires_grad_() for t in named.values()]

    def call(*tensors: Tensor) -> Tensor:
        out = joined(**dict(zip(named, tensors, strict=True)), impl="cpu")
        return sum(t.square().sum() for t in out)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(*given), given)
    for one, other in zip(mine, torch.autograd.grad(call(*given), given), strict=True):
        torch.testing.assert_close(one, other)


@every_kernel
def test_second_derivatives_are_refused(impl: str) -> None:
    terms = [numbers(3, 8, seed=i).float().requires_grad_() for i in range(2)]
    x_in, _ = joined_norm(terms, [None, torch.ones(8)], impl=impl)
    (first,) = torch.autograd.grad(x_in.square().sum(), terms[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


X, F = torch.ones(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("terms", "factors", "words"),
    [
        ([X] * 5, [None, F, F, F, F], "5 terms and 5 factors: give 1 to 4"),
        ([X, X], [None], "2 terms and 1 factors"),
        ([X], [None], "term 0 of 1 has no factor"),
        ([X, X], [F, F], "term 0 of 2 has a factor"),
        ([X, X], [None, None], "term 1 of 2 has no factor"),
        ([X, X[:2]], [None, F], r"term 1 is \(2, 8\)"),
        ([X, X], [None, F.double()], "factor 1 is torch.float64"),
        ([X, X], [None, F[:7]], r"factor 1 is torch.float32 \(7,\)"),
        ([X, X.double()], [None, F], "term 1 is torch.float64"),
    ],
)
@every_kernel
def test_refused(impl: str, terms: list, factors: list, words: str) -> None:
    with pytest.raises(ValueError, match=f"joined_norm: {words}"):
        joined_norm(terms, factors, impl=impl)


def test_the_reference_knows_no_products() -> None:
    with pytest.raises(ValueError, match="impl=reference takes no products: use residual_norm"):
        joined_norm([X, X], [None, F], impl="reference")
    with pytest.raises(ValueError, match="impl=reference takes no products: multiply them out"):
        residual_norm(X, branch=X, x_in_scale=F, impl="reference")


@every_kernel
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x_in_scale": F}, "there is x_in_scale, and what it scales is x itself"),
        ({"total_scale": F, "branch": X}, "there is total_scale and no mix"),
        ({"total_scale": F, "x0": X, "mix": torch.ones(2, 8)}, "there is total_scale, and what"),
        (
            {"total_scale": F, "branch": X, "x0": X, "mix": torch.ones(2, 8)},
            "there is total_scale, and what it scales is x itself, or no result",
        ),
        ({"x_in_scale": F[:7], "branch": X}, r"x_in_scale is torch.float32 \(7,\)"),
    ],
)
def test_products_of_nothing_are_refused(impl: str, given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"residual_norm: {words}"):
        residual_norm(X, **given, impl=impl)
