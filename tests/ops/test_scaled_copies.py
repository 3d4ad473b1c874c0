"""scaled_copies: copies of one tensor that layers take as products, and what is refused."""

import pytest
import torch
from torch import Tensor

from pgolf import extension
from pgolf.ops import scaled_copies
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import deferred
from pgolf.ops.scaled_copies import sums_of
from pgolf.ops.tensors import nbytes

from .cases import implementations
from .guards import GuardZones

on_each = pytest.mark.parametrize("impl", implementations(OPERATORS["scaled_copies"]))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


def gradients(
    impl: str, x: Tensor, factors: Tensor, upstream: dict[int, Tensor], later: bool = False
) -> list[Tensor]:
    """Of x and factors, where the products with the numbers of `upstream` have a gradient."""
    leaves = x.clone().requires_grad_(), factors.clone().requires_grad_()
    sums = None
    if later:
        (sums,) = deferred([sums_of(x.shape[:-1].numel(), leaves[1])], impl)
    copies = scaled_copies(*leaves, sums, impl)
    chosen = [copies[i] for i in upstream]
    return list(torch.autograd.grad(chosen, leaves, list(upstream.values())))


def expected(x: Tensor, factors: Tensor, upstream: dict[int, Tensor]) -> list[Tensor]:
    x, factors = x.double(), factors.double()
    dx, dfactors = torch.zeros_like(x), torch.zeros_like(factors)
    for i, g in upstream.items():
        dx += factors[i] * g.double()
        dfactors[i] = (g.double() * x).flatten(0, -2).sum(0)
    return [dx, dfactors]


@on_each
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 70, 64), (1, 300, 520), (2, 9, 33), (5, 0, 8), (1, 2, 1032)]
)
def test_gradients(impl: str, shape: tuple[int, ...], later: bool) -> None:
    """More rows than a part, more columns than a block, widths that no vector divides."""
    x, factors = numbers(*shape), numbers(3, shape[-1])
    upstream = {i: numbers(*shape).roll(i + 1, -1) for i in range(3)}
    found = gradients(impl, x, factors, upstream, later)
    for mine, right in zip(found, expected(x, factors, upstream), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5 * len(x[0]))


@on_each
def test_copies_hold_the_numbers_and_cost_no_memory(impl: str) -> None:
    x, factors = numbers(4, 8), numbers(3, 8)
    for copy in scaled_copies(x.requires_grad_(), factors, impl=impl):
        assert copy.data_ptr() == x.data_ptr() and torch.equal(copy, x)


@on_each
def test_copies_that_nobody_used(impl: str) -> None:
    """Those of a launch and those of the next; the others' sums are as if they were alone."""
    x, factors = numbers(70, 24), numbers(30, 24)
    upstream = {i: numbers(70, 24).roll(i, -1) for i in (1, 13, 29)}
    found = gradients(impl, x, factors, upstream)
    for mine, right in zip(found, expected(x, factors, upstream), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-4)
    used = list(upstream)
    assert not found[1][[i for i in range(30) if i not in used]].any()


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_address(impl: str, dtype: torch.dtype) -> None:
    """Memory that starts off a 16-byte boundary gives the numbers of memory that does not."""
    x, factors = numbers(9, 64, dtype=dtype), numbers(2, 64)
    upstream = {i: numbers(9, 64, dtype=dtype).roll(i, 0) for i in range(2)}
    off = {
        i: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape) for i, g in upstream.items()
    }
    step = 4 * torch.finfo(dtype).eps
    both = gradients(impl, x, factors, upstream), gradients(impl, x, factors, off)
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine, other, rtol=step, atol=step)


@on_each
@pytest.mark.parametrize("shape", [(130, 33), (65, 16)])
def test_nothing_is_written_beyond_the_outputs(impl: str, shape: tuple[int, int]) -> None:
    x, factors, upstream = numbers(*shape), numbers(2, shape[1]), {1: numbers(*shape)}
    before = gradients(impl, x, factors, upstream)
    leaves = x.requires_grad_(), factors.requires_grad_()
    copies = scaled_copies(*leaves, impl=impl)
    with GuardZones():  # (What stands for copies in the gradient is never written.)
        found = torch.autograd.grad(copies[1], leaves, upstream[1])
    assert all(map(torch.equal, found, before))


@on_each
def test_a_nan_stays_in_its_column(impl: str) -> None:
    x, factors, upstream = numbers(70, 16), numbers(2, 16), {0: numbers(70, 16)}
    upstream[0][69, 3] = float("nan")
    dx, dfactors = gradients(impl, x, factors, upstream)
    assert dx.isnan().nonzero().tolist() == [[69, 3]]
    assert dfactors.isnan().nonzero().tolist() == [[0, 3]]


@on_each
def test_second_derivatives_are_refused(impl: str) -> None:
    x, factors = numbers(4, 8).requires_grad_(), numbers(2, 8).requires_grad_()
    copies = scaled_copies(x, factors, impl=impl)
    (first,) = torch.autograd.grad(copies[0].square().sum(), factors, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["reference", *implementations(OPERATORS["scaled_copies"])])
@pytest.mark.parametrize(
    ("x", "factors", "words"),
    [
        (torch.ones(3, 8), torch.ones(8), r"factors \(8,\): they have to be"),
        (torch.ones(3, 8), torch.ones(2, 7), r"x is \(3, 8\) and factors \(2, 7\)"),
        (torch.ones(3, 8), torch.ones(0, 8), r"factors \(0, 8\)"),
        (torch.tensor(1.0), torch.ones(1, 1), r"x is \(\)"),
        (torch.ones(3, 8), torch.ones(2, 8).double(), "factors is torch.float64 on cpu"),
        (torch.ones(3, 8).long(), torch.ones(2, 8), "x is torch.int64"),
    ],
)
def test_refused(impl: str, x: Tensor, factors: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"scaled_copies: .*{words}"):
        scaled_copies(x, factors, impl=impl)


@on_each
def test_sums_that_do_not_fit_are_refused(impl: str) -> None:
    x, factors = numbers(4, 8), numbers(2, 8).requires_grad_()
    (sums,) = deferred([sums_of(400, factors)], impl)
    with pytest.raises(ValueError, match=r"scaled_copies: sums is \(7, 16\): .* \(1, 16\)"):
        scaled_copies(x, factors, sums, impl)


@on_each
def test_arguments_that_reach_beyond_memory_are_refused(impl: str) -> None:
    run = extension.load() if impl == "cpu" else extension.cuda()
    run = getattr(run, "scaled_copies_backward" + ("" if impl == "cpu" else "_cuda"))
    memory = torch.zeros(64)
    at = memory.data_ptr()

    def call(gradients=(at,), x=at, factors=at, dx=at, parts=at, count=1, dtype=0, rows=2, width=4):
        run(list(gradients), x, factors, dx, parts, count, dtype, rows, width, int(impl == "cpu"))

    call()
    call(gradients=(0, at))
    for wrong, words in (
        ({"x": 0}, "x is a null pointer"), ({"factors": 0}, "factors is a null pointer"),
        ({"dx": 0}, "dx is a null pointer"), ({"parts": 0}, "partials is a null pointer"),
        ({"count": 2}, "partial_rows is 2: it has to be 1"), ({"rows": -1}, "rows is -1"),
        ({"width": 2**62}, "width is"), ({"rows": 2**62, "count": 528}, "rows is"),
        ({"dtype": 3}, "dtype is 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call(**wrong)


def test_cost_is_every_tensor_once() -> None:
    x, factors = numbers(6, 8), numbers(3, 8)
    own = nbytes(x, factors)
    operator = OPERATORS["scaled_copies"]
    assert operator.cost(x, factors) == ((0, 0, 0), (0, 3 * nbytes(x) + own, own))
