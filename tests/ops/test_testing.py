"""The harness that judges operators: what it lets through, and every kind of fault that it sees."""

import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pgolf.ops import testing
from pgolf.ops.testing import Call, same_bits


def reference(x: Tensor, w: Tensor, factor: float = 1.0, dtype: torch.dtype = torch.float32):
    y = factor * x * x * w
    return y, y.sum(1).to(dtype)


def call(dtype: torch.dtype = torch.float32, **how: bool) -> Call:
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(8, 66, generator=g), torch.randn(33, generator=g)
    args = x.to(dtype)[:, ::2], w.to(dtype), 0.5
    return Call(reference, args, {"dtype": dtype}, differentiable=("x", "w"), **how)


def spoilt(change: Callable[[Tensor, Tensor], object]) -> str:
    """What is said of a kernel whose outputs were changed."""

    def kernel(*args, **named):
        y, total = reference(*args, **named)
        return change(y.clone(), total.clone())

    return call().problem(kernel)


def test_the_error_of_the_dtype_is_right() -> None:
    def through_float32(x, w, factor, dtype):
        outputs = reference(x.float(), w.float(), factor, torch.float32)
        return tuple(t.to(dtype) for t in outputs)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for contiguous in (False, True):
            asked = call(dtype, contiguous=contiguous)
            assert asked.problem(reference) == ""
            assert dtype is torch.float64 or asked.problem(through_float32) == ""
    assert "output 1: largest error" in call(torch.float64).problem(
        lambda *args, dtype: tuple(t.double() for t in through_float32(*args, torch.float32))
    )
    assert call().problem(lambda *args, dtype: reference(*args, torch.bfloat16)).startswith(
        "output 2 is torch.bfloat16 [8], not torch.float32 [8]"
    )


def test_faults_of_outputs() -> None:
    def one(y: Tensor, total: Tensor):
        y[3, 7] += 3e-6 * y.detach().abs().max()
        return y, total

    assert "output 1: largest error" in spoilt(one)
    # so small that no element is out, but all are
    assert "output 1: mean error" in spoilt(lambda y, t: (y + 5e-7 * y.detach().abs().mean(), t))
    for value in (float("nan"), float("inf")):
        one_row = torch.arange(8) == 3
        said = spoilt(lambda y, t, v=value, r=one_row: (y, t.masked_fill(r, v)))
        assert "output 2: largest error" in said
    assert "output 1 is torch.float64 [8, 33], not" in spoilt(lambda y, t: (y.double(), t))
    assert "output 2 is torch.float32 [8, 1], not" in spoilt(lambda y, t: (y, t[:, None]))
    assert spoilt(lambda y, t: y) == "it has 1 outputs, not 2"


def test_faults_of_gradients() -> None:
    assert "gradient of x: largest" in spoilt(lambda y, t: (y * 1.0, t.detach() + 0 * y.sum(1)))
    assert "gradient of x: largest" in spoilt(lambda y, t: (y, t.detach()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        spoilt(lambda y, t: (y.detach(), t.detach()))

    def a_little_off(x, w, factor, dtype):
        return reference(x, w.detach() + 1.00001 * (w - w.detach()), factor, dtype)

    assert "gradient of w: largest error" in call().problem(a_little_off)

    def takes_contiguous_ones(x, w, factor, dtype):
        y, total = reference(x, w, factor, dtype)
        y = y * 1.0
        y.register_hook(lambda g: g if g.is_contiguous() else g * 2)
        return y, total

    assert call(contiguous=True).problem(takes_contiguous_ones) == ""
    assert "gradient of x" in call().problem(takes_contiguous_ones)


def test_an_input_that_is_written() -> None:
    def kernel(x, w, factor, dtype):
        outputs = reference(x, w, factor, dtype)
        w.data[5] *= -1.0
        return outputs

    assert call().problem(kernel) == "it wrote to w, which it may only read"


def test_arguments_that_are_changed_are_copied_and_judged() -> None:
    def step(params, grads, rate):
        for p, g in zip(params, grads, strict=True):
            p -= rate * g

    def written_twice(params, grads, rate):
        step(params, grads, rate)
        params[1] += 1e-5

    before = [torch.ones(3), torch.ones(2, 2)]
    args = before, [torch.rand(3), torch.rand(2, 2)], 0.1
    stepped = Call(step, args, mutates=("params",))
    assert stepped.problem(step) == "" and all((p == 1).all() for p in before)
    assert "output 2: largest error" in stepped.problem(written_twice)
    assert "output 1: largest error" in stepped.problem(lambda *args: None)


def test_nan_and_infinity_have_to_be_where_they_are() -> None:
    def log(x):
        return x.log()

    logs = Call(log, (torch.tensor([-1.0, 0.0, 1.0, 2.0]),))
    assert logs.problem(log) == ""
    assert "output: largest error nan" in logs.problem(lambda x: x.log().nan_to_num(nan=0.0))
    assert "output: largest error inf" in logs.problem(lambda x: x.log().clamp(min=-9.0))
    empty = Call(log, (torch.ones(0, 3),))
    assert empty.problem(log) == ""


def test_an_error_of_torch_that_is_small_by_chance_refuses_nobody() -> None:
    """One number, added up in another order: every seed passes; a relative 1e-6 passes with none.

    Without the other draws one in five of these would be refused.
    """

    def total(x):
        return (x * x.cos()).sum()

    def in_other_order(x):
        return (x * x.cos()).view(64, -1).sum(0).sum()

    refused = 0
    for seed in range(40):
        x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
        asked = Call(total, (x,), differentiable=("x",))
        mine = [testing.error(*p) for p in zip(asked.run(in_other_order), asked._truth[1],
                                               strict=True)]  # fmt: skip
        refused += asked._beyond(mine, asked._errors_of_torch(0)) != ""
        assert asked.problem(in_other_order) == "", seed
        off = 2e-4 * x.norm()  # of terms as large as that
        assert "output" in asked.problem(lambda x, off=off: in_other_order(x) + 1e-2 * off)
    assert refused > 2


def test_bits() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone()) and same_bits(torch.tensor(1), torch.tensor(1))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(2, 1))


def test_the_example() -> None:
    code, names = testing.__doc__.split("\n\n", 1)[1].split("\n\nAn operator of")[0], {}
    names["my_kernel"] = lambda x, w: (x @ w[:, None])[:, 0]
    exec(textwrap.dedent(code), names)
    assert names["call"].problem(lambda x, w: x @ (1.001 * w)) != ""


def test_an_element_that_is_left_out_is_nan_where_memory_is_poisoned() -> None:
    def leaves_out(x: Tensor) -> Tensor:
        torch.full_like(x, 4.0).add_(0)  # whose memory is free again, and right
        out = torch.empty_like(x)
        out[:-1] = 2 * x[:-1]
        return out

    asked = Call(lambda x: 2 * x, (torch.full((64,), 2.0),))
    with testing.poisoned():
        assert asked.problem(leaves_out) == "output: largest error nan, allowed 2.38e-07"
        assert torch.empty(2, dtype=torch.int64).tolist() == [torch.iinfo(torch.int64).max] * 2
    assert not torch.are_deterministic_algorithms_enabled()
