"""XSA against the formula, head by head in float64."""

import pytest
import torch

from pgolf.ops.xsa import xsa


def by_hand(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """y_h - (y_h . n) n with n = v_g / max(|v_g|, 1e-12), in loops."""
    y, v = y.double(), v.double()
    out = torch.empty_like(y)
    share = y.shape[2] // v.shape[2]
    for index in torch.cartesian_prod(*map(torch.arange, y.shape[:3])).tolist():
        batch, t, h = index
        value = v[batch, t, h // share]
        n = value / max(value.norm().item(), 1e-12)
        out[batch, t, h] = y[batch, t, h] - (y[batch, t, h] @ n) * n
    return out


def inputs(heads: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple:
    g = torch.Generator().manual_seed(heads * 10 + groups)
    y = torch.randn(2, 3, heads, 8, generator=g, dtype=torch.float64)
    v = torch.randn(2, 3, groups, 8, generator=g, dtype=torch.float64)
    return y.to(dtype), v.to(dtype)


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (4, 4), (4, 1), (6, 2)])
def test_each_head_loses_its_part_along_its_own_value(heads: int, groups: int) -> None:
    y, v = inputs(heads, groups)
    out = xsa(y, v)
    torch.testing.assert_close(out, by_hand(y, v), rtol=1e-12, atol=1e-12)
    own = v.repeat_interleave(heads // groups, dim=2)
    assert (out * own).sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(xsa(out, v), out)  # a projection: once is enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    y, v = inputs(8, 4, dtype)
    out = xsa(y, v)
    assert out.dtype is dtype
    error = (out.double() - by_hand(y, v)).abs().max().item()
    assert error < 8 * torch.finfo(dtype).eps * y.abs().max().item()


def test_a_zero_value_removes_nothing() -> None:
    y, v = inputs(4, 2)
    v[0, 1, 0] = 0
    y.requires_grad_()
    v.requires_grad_()
    out = xsa(y, v)
    assert torch.equal(out[0, 1, :2], y[0, 1, :2])
    out.square().sum().backward()
    assert y.grad.isfinite().all() and v.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-10, 1e-13])
def test_a_value_near_the_floor(size: float) -> None:
    y, v = inputs(4, 2)
    v = v / v.norm(dim=-1, keepdim=True) * size
    out = xsa(y, v)
    torch.testing.assert_close(out, by_hand(y, v), rtol=1e-12, atol=1e-12)
    # above the floor a tiny value counts fully, below it only by (|v| / floor)^2
    direction = v / size
    left = (out * direction.repeat_interleave(2, dim=2)).sum(-1)
    before = (y * direction.repeat_interleave(2, dim=2)).sum(-1)
    expected = 0 * before if size > 1e-12 else before * (1 - (size / 1e-12) ** 2)
    torch.testing.assert_close(left, expected, rtol=1e-9, atol=1e-12)


def test_strided_inputs_and_gradients() -> None:
    y, v = inputs(8, 4)
    strided_y = y.transpose(1, 2).contiguous().transpose(1, 2)
    strided_v = torch.cat((v, v), -1)[..., :8]
    assert not strided_y.is_contiguous() and not strided_v.is_contiguous()
    torch.testing.assert_close(xsa(strided_y, strided_v), xsa(y, v))
    leaves = [t.clone().requires_grad_() for t in (y, v)]
    upstream = torch.randn(2, 3, 8, 16, dtype=torch.float64)[..., ::2]
    strided = torch.autograd.grad(xsa(*leaves), leaves, upstream)
    plain = torch.autograd.grad(xsa(*leaves), leaves, upstream.contiguous())
    torch.testing.assert_close(strided, plain)


def test_gradient() -> None:
    y, v = inputs(4, 2)
    assert torch.autograd.gradcheck(xsa, (y.requires_grad_(), v.requires_grad_()))
