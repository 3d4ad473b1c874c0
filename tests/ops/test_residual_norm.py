"""RMS norm and the x0 mix against float64."""

import pytest
import torch

from pgolf.ops.residual_norm import residual_norm, rms_norm


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
def test_norm_and_its_eps(eps: float) -> None:
    x = sample(2, 3, 16)
    torch.testing.assert_close(rms_norm(x, eps), normed(x, eps), rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [0.005, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_fp32_and_eps_is_absolute(dtype: torch.dtype, scale: float) -> None:
    """The embedding starts at std 0.005: with bf16's own eps it would be damped."""
    x = (sample(64, 512) * scale).to(dtype)
    out = rms_norm(x, 1e-6)
    assert out.dtype is dtype
    error = (out.double() - normed(x, 1e-6)).abs().max().item()
    # bf16: nothing but the rounding of results below 4
    assert error <= (1.01 * 2 if dtype is torch.bfloat16 else 8) * torch.finfo(dtype).eps


def test_a_zero_row_is_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, 1e-6)
    out.sum().backward()
    assert not out.any() and x.grad.isfinite().all()


def test_mix_and_scale() -> None:
    x, x0 = sample(2, 3, 8), sample(2, 3, 8).flip(0)
    mix = torch.stack((torch.linspace(0, 2, 8), torch.linspace(1, -1, 8))).double()
    mixed, h = residual_norm(x, x0, mix, 0.25, 1e-3)
    torch.testing.assert_close(mixed, mix[0] * x + mix[1] * x0)
    torch.testing.assert_close(h, 0.25 * normed(mixed, 1e-3))
    kept, h = residual_norm(x, x0, None, 1.0, 1e-3)
    assert kept is x
    torch.testing.assert_close(h, normed(x, 1e-3))


def test_mix_is_cast_to_the_stream() -> None:
    x = sample(2, 8).bfloat16()
    mixed, h = residual_norm(x, x, torch.ones(2, 8), 0.5, 1e-6)
    assert mixed.dtype is torch.bfloat16 and h.dtype is torch.bfloat16


def test_strided_inputs_and_gradients() -> None:
    x, x0 = sample(2, 3, 8), sample(2, 3, 8).flip(0)
    mix = torch.rand(2, 8, dtype=torch.float64)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(
        residual_norm(view, x0, mix, 0.5, 1e-6), residual_norm(x, x0, mix, 0.5, 1e-6)
    )
    leaves = [t.requires_grad_() for t in (x, x0, mix)]
    assert torch.autograd.gradcheck(lambda *a: residual_norm(*a, 0.5, 1e-3), leaves)
