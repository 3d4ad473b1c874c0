"""part_sums: sums that operators leave to one launch at the end, and what is refused."""

import pytest
import torch
from torch import Tensor

from pgolf import extension
from pgolf.ops import part_sums, qk_rope, residual_norm
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import Sums, deferred
from pgolf.ops.qk_rope import sums_of as sums_of_gain
from pgolf.ops.residual_norm import sums_of as sums_of_norm

from .cases import implementations

on_each = pytest.mark.parametrize("impl", implementations(OPERATORS["part_sums"]))
TOKENS, WIDTH = 150, 24  # three parts


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g).to(dtype).requires_grad_()


def two_layers(impl: str, later: bool, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of what is `wanted` of a norm with all parameters, one with a mix, and a gain."""
    named = {
        "scale": leaf(WIDTH), "weight": leaf(WIDTH), "mix": leaf(2, WIDTH),
        "other": leaf(2, WIDTH), "gain": leaf(2),
    }  # fmt: skip
    for name, t in named.items():
        t.requires_grad_(name in wanted)
    x, branch, skip, x0 = (leaf(1, TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(4))
    scale, weight, mix, other, gain = named.values()
    sums = [None] * 3
    if later:
        own = [
            sums_of_norm(TOKENS, scale, weight, mix), sums_of_norm(TOKENS, None, None, other),
            sums_of_gain(TOKENS, gain),
        ]  # fmt: skip
        found = iter(deferred([s for s in own if s.parameters], impl))
        sums = [next(found) if s.parameters else None for s in own]
    _, h = residual_norm(
        x, branch=branch, branch_scale=scale, skip=skip, skip_weight=weight, x0=x0, mix=mix,
        sums=sums[0], impl=impl,
    )  # fmt: skip
    _, h = residual_norm(h, x0=x0, mix=other, sums=sums[1], impl=impl)
    angles = leaf(TOKENS, 2).detach()
    q, k, v = qk_rope(h, angles.cos(), angles.sin(), gain, 2, 2, impl=impl, sums=sums[2])
    torch.cat((q, k, v), -1).square().sum().backward()
    return {name: named[name].grad for name in wanted} | {"x": x.grad, "x0": x0.grad}


ALL = ("scale", "weight", "mix", "other", "gain")


@on_each
@pytest.mark.parametrize("wanted", [ALL, ("mix", "gain"), ("weight",), ("other",)], ids=str)
def test_gradients_are_those_without_deferral(impl: str, wanted: tuple[str, ...]) -> None:
    later, at_once = (two_layers(impl, how, wanted) for how in (True, False))
    assert later.keys() == at_once.keys()
    for name, gradient in at_once.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(later[name], gradient), name


@on_each
def test_sums_of_what_is_not_used_are_left_out(impl: str) -> None:
    mix, gain = leaf(2, WIDTH), leaf(2)
    own = [sums_of_norm(TOKENS, None, None, mix), sums_of_gain(TOKENS, gain)]
    sums, _ = deferred(own, impl)
    x = leaf(TOKENS, WIDTH)
    residual_norm(x, x0=x, mix=mix, sums=sums, impl=impl)[1].sum().backward()
    assert mix.grad is not None and gain.grad is None


@on_each
def test_all_in_one_launch(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = extension.load() if impl == "cpu" else extension.cuda()
    name = "part_sums" if impl == "cpu" else "part_sums_cuda"
    run, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or run(*args))
    two_layers(impl, True, ALL)
    assert [len(parts) for parts, *_ in calls] == [3]
    two_layers(impl, False, ALL)
    assert [len(parts) for parts, *_ in calls] == [3, 1, 1, 1]


@on_each
def test_more_matrices_than_a_launch_takes(impl: str) -> None:
    parts = [torch.full((i % 5, 9 - i % 3), float(i)) for i in range(200)]
    for i, sums in enumerate(part_sums(parts, impl)):
        assert sums.tolist() == [float(i) * (i % 5)] * (9 - i % 3), i


@on_each
def test_second_derivatives_are_refused(impl: str) -> None:
    mix = leaf(2, WIDTH)
    (sums,) = deferred([sums_of_norm(TOKENS, None, None, mix)], impl)
    x = leaf(TOKENS, WIDTH)
    h = residual_norm(x, x0=x, mix=mix, sums=sums, impl=impl)[1]
    (first,) = torch.autograd.grad(h.square().sum(), mix, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


@on_each
def test_sums_that_do_not_fit_are_refused(impl: str) -> None:
    mix, x = leaf(2, WIDTH), leaf(TOKENS, WIDTH)
    wrong = deferred([Sums(2, [mix])], impl)[0]
    with pytest.raises(ValueError, match=r"residual_norm: sums is \(2, 48\): .* \(3, 48\)"):
        residual_norm(x, x0=x, mix=mix, sums=wrong, impl=impl)
    with pytest.raises(ValueError, match="residual_norm: impl=reference leaves no sums"):
        residual_norm(x, x0=x, mix=mix, sums=wrong, impl="reference")
    with pytest.raises(ValueError, match=r"qk_rope: sums is \(2, 48\): .* \(1, 2\)"):
        angles = leaf(5, 2).detach()
        qk_rope(leaf(1, 5, WIDTH), angles, angles, leaf(2), 2, 2, impl=impl, sums=wrong)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "parts is empty"),
        ([torch.ones(3)], r"parts\[0\] is torch.float32 \(3,\)"),
        ([torch.ones(3, 2).int()], "it has to be of a float dtype"),
        ([torch.ones(3, 2), torch.ones(3, 2).double()], r"parts\[1\] is torch.float64"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(parts: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part_sums(parts)


@on_each
def test_arguments_that_reach_beyond_memory_are_refused(impl: str) -> None:
    run = extension.load().part_sums if impl == "cpu" else extension.cuda().part_sums_cuda
    memory = torch.zeros(64)
    at = memory.data_ptr()

    def call(parts, rows, cols, sums=at, capacity=2, dtype=0) -> None:
        run(parts, rows, cols, sums, capacity, dtype, 0 if impl == "cuda" else 1)

    call([at], [3], [2])
    for arguments, words in (
        (([at], [], [2]), "length of rows is 0"), (([at], [3], [2, 2]), "length of cols is 2"),
        (([0], [3], [2]), "parts is a null pointer"), (([at], [-3], [2]), "rows is -3"),
        (([at], [3], [3]), "capacity is 2"), (([at, at], [3, 3], [1, 2]), "capacity is 2"),
        (([at], [2**62], [2]), "rows is"), (([at], [3], [2], 0), "sums is a null pointer"),
        (([at], [3], [2], at, 2, 7), "dtype is 7"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call(*arguments)
