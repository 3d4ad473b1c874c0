"""grad_norm, muon_momentum, param_update: addresses that fit no vector, and what is refused."""

import pytest
import torch

from pgolf.ops import grad_norm, muon_momentum, param_update
from pgolf.ops.multi_tensor import COLUMNS, adamw_row, scalars_row
from pgolf.ops.operator import OPERATORS
from pgolf.ops.tensors import tensors_in
from pgolf.ops.testing import Call, kernel, poisoned, same_bits

from .cases import implementations, small

KERNELS = implementations(OPERATORS["param_update"])
NORM = torch.tensor(1.0)


def shifted(count: int, seed: int) -> torch.Tensor:
    """Numbers whose address is a multiple of 4 bytes and not of 16."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count + 1, generator=g)[1:]


@pytest.mark.parametrize("impl", KERNELS)
def test_addresses_that_are_not_aligned(impl: str) -> None:
    rows = torch.tensor([adamw_row(1, 0.1, (0.9, 0.95), 1e-8, average_rate=0.5)])
    results = []
    for which in (impl, "reference"):
        p, g, m, v, a = (shifted(37, i) for i in range(5))
        v.abs_()
        param_update([p], [g], [m], [v], NORM, rows, [0], [a], impl=which)
        buffer, matrix = shifted(32, 6).view(4, 8), shifted(32, 7).view(4, 8)
        row = torch.tensor(scalars_row(momentum=0.9))
        (x,), (squares,) = muon_momentum(
            [matrix], [buffer], NORM, row, dtype=torch.float32, impl=which
        )
        results.append([p, m, v, a, buffer, x, squares, grad_norm([g, matrix], impl=which)[0]])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_elements_that_are_not_finite_are_counted(impl: str) -> None:
    grads = [torch.zeros(5000), torch.zeros(3, 3), torch.ones(7, dtype=torch.bfloat16)]
    grads[0][[1, 4999]], grads[1][2, 2] = float("inf"), float("nan")
    norm, bad = grad_norm(grads, impl)
    assert bad.item() == 3 and norm.isnan()
    norm, bad = grad_norm(grads[2:], impl)
    assert bad.item() == 0 and norm.item() == pytest.approx(7**0.5)
    # Squares that are too large are of finite numbers all the same.
    _, bad = grad_norm([torch.full((5000,), 3e38)], impl)
    assert bad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("name", ["param_update", "muon_momentum"])
def test_a_norm_that_is_not_finite_changes_nothing(name: str, impl: str, dtype) -> None:
    """Not a bit, clipping or not; one that is finite changes every tensor."""
    operator = OPERATORS[name]
    call = Call.of(operator, small(operator)[0], dtype)
    before = [t for n in call.changed for t in tensors_in(call.arguments[n])]
    for t in before:
        t.view(-1)[:1] = -0.0
    for limit in (2.0, float("inf")):
        scalars = call.arguments["scalars"].clone()
        scalars[..., COLUMNS.index("max_norm")] = limit
        for norm in (float("inf"), float("nan"), 3.0):
            given = call.with_arguments({"scalars": scalars, "norm": torch.tensor(norm)})
            with poisoned():
                results = given.run(kernel(operator, impl))
            directions, after = results[: -len(before)], results[-len(before) :]
            kept = [same_bits(*pair) for pair in zip(before, after, strict=True)]
            assert not any(kept) if norm == 3.0 else all(kept), (limit, norm, kept)
            if norm == float("inf") and limit == 2.0:  # the clipped gradients are 0
                assert all(x.isfinite().all() for x in directions), "written, each of them"


def update(**changes: object) -> None:
    t = torch.ones(4)
    arguments = dict(
        params=[t], sources=[t], exp_avgs=[t], exp_avg_sqs=[t], norm=NORM,
        scalars=torch.zeros(1, len(COLUMNS)), groups=[0],
    )  # fmt: skip
    param_update(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": []}, "params is empty"),
        ({"sources": [torch.ones(5)]}, "have to be alike"),
        ({"groups": [1]}, "groups is"),
        ({"scalars": torch.zeros(1, 3)}, "scalars is"),
        ({"norm": torch.ones(1)}, "norm is"),
        ({"exp_avgs": [], "exp_avg_sqs": []}, "it is Muon's"),
        ({"exp_avg_sqs": [torch.ones(4).bfloat16()]}, "exp_avg_sqs"),
        ({"averages": [torch.ones(4).bfloat16()]}, "averages"),
        ({"params": [torch.ones(8)[::2]]}, "contiguous"),
        ({"sources": [torch.ones(4).double()]}, "float32 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        update(**changes)
