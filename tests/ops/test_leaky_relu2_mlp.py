"""The squared (leaky) ReLU and its MLP against float64."""

import pytest
import torch

from pgolf.ops import leaky_relu2_mlp
from pgolf.ops.leaky_relu2_mlp import activation


@pytest.mark.parametrize("slope", [0.0, 0.5, 0.1, 1.0])
def test_activation(slope: float) -> None:
    x = torch.tensor([-3.0, -0.5, -0.0, 0.0, 0.25, 2.0], dtype=torch.float64)
    expected = torch.tensor(
        [(v if v > 0 else slope * v) ** 2 for v in x.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(activation(x, slope), expected, rtol=1e-15, atol=0)
    assert (activation(x, slope) >= 0).all()


def test_published_constants() -> None:
    x = torch.tensor([-2.0, 2.0])
    assert activation(x, 0.0).tolist() == [0.0, 4.0]
    assert activation(x, 0.5).tolist() == [1.0, 4.0]  # 0.25 x^2 below zero


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_mlp_is_down_of_activation_of_up(slope: float) -> None:
    g = torch.Generator().manual_seed(0)
    h, up, down = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((2, 3, 5), (7, 5), (5, 7))
    )
    z = torch.einsum("ntd,fd->ntf", h, up)
    z = torch.where(z > 0, z, slope * z) ** 2
    expected = torch.einsum("ntf,df->ntd", z, down)
    torch.testing.assert_close(leaky_relu2_mlp(h, up, down, slope), expected)
    torch.testing.assert_close(  # strided inputs
        leaky_relu2_mlp(h, up.T.contiguous().T, torch.cat((down, down), 1)[:, :7], slope), expected
    )
    leaves = [t.requires_grad_() for t in (h, up, down)]
    assert torch.autograd.gradcheck(lambda *a: leaky_relu2_mlp(*a, slope), leaves)
