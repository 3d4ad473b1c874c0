"""Parameters as one tensor and as its rows: torch's values and gradients."""

import pytest
import torch

from pgolf.ops.stacked import rows_of, stacked


def leaves(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(count)
    return [torch.randn(2, 5, generator=g).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("used", [range(4), [2], [3, 0]], ids=str)
def test_they_are_torch_s(used) -> None:
    """Rows that nobody used have no gradient, which is zero in the table."""
    found = []
    for stack, unbind in ((stacked, rows_of), (torch.stack, torch.unbind)):
        given = leaves(4)
        table = stack(given)
        rows = unbind(table * table)
        out = sum((i + 1) * rows[i].square().sum() for i in used)
        found.append([table, *rows, *torch.autograd.grad(out, given)])
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))


def test_parameters_that_do_not_learn() -> None:
    first, second = leaves(2)
    second.requires_grad_(False)
    rows_of(stacked([first, second]))[0].sum().backward()
    assert torch.equal(first.grad, torch.ones(2, 5)) and second.grad is None
    first.grad = None
    with torch.no_grad():
        assert not rows_of(stacked([first, second]))[0].requires_grad


def test_in_one_graph() -> None:
    torch._dynamo.reset()
    given = leaves(3)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        rows = rows_of(stacked(tensors) * 2)
        return (rows[0] * rows[2]).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(*given), given) for f in (compiled, call))
    assert all(map(torch.equal, mine, theirs))


def test_second_derivatives_are_refused() -> None:
    given = leaves(2)
    (first, *_) = torch.autograd.grad(stacked(given).square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()
