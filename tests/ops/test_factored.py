"""A norm that is left to what comes after it: h as a product that is never written."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.factored import Factored
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp
from pgolf.ops.operator import OPERATORS
from pgolf.ops.qk_rope import qk_rope, rope_table
from pgolf.ops.residual_norm import residual_norm
from pgolf.ops.testing import Call
from pgolf.ops.xsa import xsa

from .cases import implementations, numbers

KERNELS = [i for i in implementations(OPERATORS["residual_norm"]) if i != "reference"]
HEADS, GROUPS, SIZE = 4, 2, 8
WIDTH = HEADS * SIZE


def mlp(x: Tensor, branch: Tensor, up: Tensor, down: Tensor, impl: str = "reference") -> Tensor:
    """The second half of a block."""
    x, h = residual_norm(
        x, branch=branch, scale=0.5, eps=1e-3, factored=impl != "reference", impl=impl
    )
    y, factor = h if isinstance(h, Factored) else (h, None)
    return x + leaky_relu2_mlp(y, up, down, 0.3, factor, impl=impl)


def attention(
    x: Tensor, x0: Tensor, mix: Tensor, w: Tensor, gain: Tensor, value: Tensor | None,
    impl: str = "reference",
) -> Tensor:  # fmt: skip
    """The first half, where XSA and attention (here the least of it) take the values."""
    x, h = residual_norm(
        x, x0=x0, mix=mix, scale=-0.5, eps=1e-3, factored=impl != "reference", impl=impl
    )
    y, factor = h if isinstance(h, Factored) else (h, None)
    table = [t.to(gain.dtype) for t in rope_table(x.size(1), 4, 100.0)]
    q, k, v, again = qk_rope(
        F.linear(y, w), *table, gain, HEADS, GROUPS, 1e-3, True, value, impl,
        factor=factor, split_v=True,
    )  # fmt: skip
    seen = q + (k + v).repeat_interleave(HEADS // GROUPS, dim=2)
    return x + xsa(seen, again, impl).flatten(2)


def a_call(half: str, dtype: torch.dtype, valued: bool = False) -> Call:
    wide = torch.promote_types(dtype, torch.float32)
    x, other = numbers(2, 7, WIDTH).to(dtype), numbers(2, 7, WIDTH, seed=1).to(dtype)
    if half == "mlp":
        up, down = numbers(40, WIDTH, seed=2).to(dtype), numbers(WIDTH, 40, seed=3).to(dtype)
        return Call(mlp, (x, other, up, down), differentiable=("x", "branch", "up", "down"))
    rows = (HEADS + 2 * GROUPS) * SIZE
    value = numbers(2, 7, GROUPS * SIZE, seed=4).to(dtype) if valued else None
    mix, w = numbers(2, WIDTH, seed=5).to(wide), numbers(rows, WIDTH, seed=6).to(dtype)
    arguments = (x, other, mix, w, numbers(HEADS, seed=7).to(wide), value)
    names = ("x", "x0", "mix", "w", "gain", "value")
    return Call(attention, arguments, differentiable=names)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("half", ["mlp", "attention", "attention with a value"])
def test_halves_of_a_block(half: str, dtype: torch.dtype, impl: str) -> None:
    """Values, and the gradients of all that goes in."""
    if dtype not in OPERATORS["residual_norm"].implementations[impl].dtypes:
        pytest.skip(f"{impl} does not take {dtype}")
    call = a_call(half.split()[0], dtype, half.endswith("value"))
    assert call.problem(lambda *a, **k: call.reference(*a, **k, impl=impl)) == ""


@pytest.mark.parametrize("half", ["mlp", "attention"])
def test_in_one_graph(half: str) -> None:
    call = a_call(half, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *leaves: call.reference(*leaves, *call.split(call.arguments)[0][len(leaves) :],
                                       impl="cpu"),
        fullgraph=True, dynamic=False,
    )  # fmt: skip
    for mine, eager in zip(
        call.run(compiled), call.run(lambda *a: call.reference(*a, impl="cpu")), strict=True
    ):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


def test_nothing_is_written_that_is_not_asked_for() -> None:
    x = numbers(3, WIDTH).requires_grad_()
    x_in, h = residual_norm(x, branch=x, scale=0.5, eps=1e-3, factored=True, impl="cpu")
    assert h.y.data_ptr() == x_in.data_ptr()
    torch.testing.assert_close(h.factor, 0.5 / (x_in.square().mean(-1) + 1e-3).sqrt())
    assert not h.factor.requires_grad
    plain = residual_norm(x, branch=x, scale=0.5, eps=1e-3, impl="cpu")[1]
    torch.testing.assert_close(h.product(), plain)


def test_without_gradients() -> None:
    x = numbers(2, 5, WIDTH)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            _, h = residual_norm(x, factored=True, eps=1e-3, impl="cpu")
            torch.testing.assert_close(h.product(), residual_norm(x, eps=1e-3, impl="cpu")[1])


def test_second_derivatives_are_refused_in_words() -> None:
    x = numbers(3, WIDTH).requires_grad_()
    _, h = residual_norm(x, factored=True, impl="cpu")
    (dx,) = torch.autograd.grad(h.product().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.sum().backward()


def test_a_scale_of_zero_has_no_factor() -> None:
    with pytest.raises(ValueError, match="scale=0.0: a factor of h must not be 0"):
        residual_norm(numbers(3, WIDTH), scale=0.0, factored=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((2, 4), torch.float64, r"factor is \(2, 4\): it has to be \(2, 5\)"),
     ((2, 5), torch.float32, "factor is torch.float32 on cpu: it has to be torch.float64")],
)  # fmt: skip
def test_factors_that_do_not_fit(shape: tuple, dtype: torch.dtype, message: str) -> None:
    table = [t.double() for t in rope_table(5, 4, 100.0)]
    with pytest.raises(ValueError, match=message):
        qk_rope(
            numbers(2, 5, (HEADS + 2 * GROUPS) * SIZE), *table, torch.ones(HEADS).double(), HEADS,
            GROUPS, factor=torch.ones(shape, dtype=dtype),
        )  # fmt: skip
