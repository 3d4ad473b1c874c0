"""Capped logits and cross-entropy against float64."""

import pytest
import torch

from pgolf.ops.softcap_cross_entropy import softcap_cross_entropy, softcap_logits

N, D, V = 6, 8, 11


def inputs(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g) * scale
    return x, torch.randn(V, D, generator=g), torch.randint(V, (N,), generator=g)


def by_hand(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    z = x.double() @ w.double().T
    if cap:
        z = cap * torch.tanh(z / cap)
    weights = z.exp() / z.exp().sum(-1, keepdim=True)
    return -torch.stack([weights[i, t].log() for i, t in enumerate(targets.tolist())])


@pytest.mark.parametrize("cap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_loss_and_gradients(cap: float, scale: float) -> None:
    x, w, targets = inputs(scale)
    exact = [t.double().requires_grad_() for t in (x, w)]
    expected = by_hand(*exact, targets, cap)
    losses = softcap_cross_entropy(x, w, targets, cap, reduction="none")
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    leaves = [t.requires_grad_() for t in (x, w)]
    mean = softcap_cross_entropy(*leaves, targets, cap)
    assert mean.item() == pytest.approx(expected.mean().item(), rel=2e-6)
    for got, want in zip(
        torch.autograd.grad(mean, leaves), torch.autograd.grad(expected.mean(), exact), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_logits_stay_below_the_cap(cap: float) -> None:
    x, w, _ = inputs(1000.0)
    logits = softcap_logits(x, w, cap)
    assert logits.abs().max() <= cap and logits.dtype is torch.float32
    assert softcap_logits(x, w, 0.0).abs().max() > 1000


def test_cap_and_softmax_of_bf16_inputs_are_fp32() -> None:
    x, w, targets = inputs(4.0)
    x, w = x.bfloat16(), w.bfloat16()
    loss = softcap_cross_entropy(x, w, targets, 30.0, reduction="none")
    assert loss.dtype is torch.float32
    z = (x @ w.T).double()  # the matmul's own bf16 rounding
    capped = 30 * torch.tanh(z / 30)
    expected = torch.logsumexp(capped, -1) - capped.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_huge_logits_give_finite_losses() -> None:
    x, w, targets = inputs(1e4)
    assert softcap_cross_entropy(x, w, targets, 30.0, reduction="none").isfinite().all()
    assert softcap_cross_entropy(x, w, targets, 0.0, reduction="none").isfinite().all()


def test_uniform_logits_give_log_v() -> None:
    _, w, targets = inputs()
    losses = softcap_cross_entropy(torch.zeros(N, D), w, targets, 30.0, reduction="none")
    torch.testing.assert_close(losses, torch.full((N,), float(V)).log())


def test_strided_inputs() -> None:
    x, w, targets = inputs()
    wide = torch.cat((x, x), 1)[:, :D]
    torch.testing.assert_close(
        softcap_cross_entropy(wide, w.T.contiguous().T, targets, 30.0),
        softcap_cross_entropy(x, w, targets, 30.0),
    )


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_float64_stays_float64(cap: float) -> None:
    x, w, targets = inputs()
    leaves = [t.double().requires_grad_() for t in (x, w)]
    losses = softcap_cross_entropy(*leaves, targets, cap, reduction="none")
    torch.testing.assert_close(losses, by_hand(*leaves, targets, cap), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: softcap_cross_entropy(x, w, targets, cap), leaves)
