"""Head norm, partial RoPE and gain against the formula."""

import math

import pytest
import torch

from pgolf.ops.qk_rope import qk_rope, rope_table, rotate

LENGTH, HEADS, GROUPS, SIZE = 5, 4, 2, 8


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, LENGTH, HEADS, SIZE, generator=g, dtype=torch.float64)
    k = torch.randn(2, LENGTH, GROUPS, SIZE, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def exact_table(dims: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """rope_table in float64, entry by entry."""
    angle = [[t * base ** (-2 * j / dims) for j in range(dims // 2)] for t in range(LENGTH)]
    angle = torch.tensor(angle, dtype=torch.float64).reshape(LENGTH, dims // 2)
    return angle.cos(), angle.sin()


def rotated_by_hand(x: torch.Tensor, dims: int, base: float) -> torch.Tensor:
    """Pairs (j, j + r/2) as complex numbers turned by -t base^(-2j/r)."""
    out = x.clone()
    half = dims // 2
    for t in range(x.shape[1]):
        for j in range(half):
            pair = torch.complex(x[:, t, :, j], x[:, t, :, j + half])
            angle = t * base ** (-2 * j / dims)
            pair = pair * complex(math.cos(angle), -math.sin(angle))
            out[:, t, :, j], out[:, t, :, j + half] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("dims", [0, 2, 4, 8])
def test_rotation(dims: int) -> None:
    x, _ = inputs()
    out = rotate(x, *exact_table(dims, 100.0))
    torch.testing.assert_close(out, rotated_by_hand(x, dims, 100.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[..., dims:], x[..., dims:])
    assert torch.equal(out[:, 0], x[:, 0])


@pytest.mark.parametrize(("dims", "base"), [(16, 22081.8), (64, 10000.0), (2, 7.0)])
def test_table(dims: int, base: float) -> None:
    cos, sin = rope_table(2048, dims, base)
    assert cos.shape == sin.shape == (2048, dims // 2) and cos.dtype is torch.float32
    for t in (0, 1, 17, 2047):  # the last position too: fp32 angles would be off by 1e-4 there
        for j in range(dims // 2):
            angle = t * base ** (-2 * j / dims)
            assert cos[t, j].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[t, j].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_the_base_is_the_same_at_every_length() -> None:
    cos, sin = rope_table(2048, 16, 22081.8)
    short_cos, short_sin = rope_table(300, 16, 22081.8)
    assert torch.equal(cos[:300], short_cos) and torch.equal(sin[:300], short_sin)


def test_the_published_effective_bases() -> None:
    """10000 rescaled by (2048 / 1024)^(r / (r - 2)), as the scripts do beyond length 1024."""
    assert 10000 * 2 ** (16 / 14) == pytest.approx(22082, abs=1)
    assert 10000 * 2 ** (64 / 62) == pytest.approx(20452, abs=1)


@pytest.mark.parametrize("dims", [4, 8])
def test_scores_depend_on_distance_only(dims: int) -> None:
    cos, sin = (t.double() for t in rope_table(64, dims, 50.0))
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, SIZE, generator=g, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x.view(1, 1, 1, SIZE), cos[t : t + 1], sin[t : t + 1]).flatten()
            for x, t in ((q, at_q), (k, at_k))
        ]
        return (turned[0] @ turned[1]).item()

    for distance in (0, 1, 7):
        scores = [score(start + distance, start) for start in (0, 5, 40)]
        assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)
    assert score(3, 0) != pytest.approx(score(0, 3), abs=1e-3)


@pytest.mark.parametrize("norm", [True, False])
def test_norm_rotation_and_gain(norm: bool) -> None:
    q, k = inputs()
    gain = torch.tensor([1.5, -0.5, 2.0, 1.0], dtype=torch.float64)
    eps = 0.01
    got_q, got_k = qk_rope(q, k, *exact_table(4, 100.0), gain, eps, norm)
    if norm:
        q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    expected_q = rotated_by_hand(q, 4, 100.0) * gain.view(1, 1, HEADS, 1)
    torch.testing.assert_close(got_q, expected_q)
    torch.testing.assert_close(got_k, rotated_by_hand(k, 4, 100.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_whatever_that_of_tables_and_gain(dtype: torch.dtype) -> None:
    q, k = inputs(dtype)
    table, gain = rope_table(LENGTH, 4, 100.0), torch.full((HEADS,), 1.5)
    got_q, got_k = qk_rope(q, k, *table, gain, 1e-6)
    assert got_q.dtype is dtype and got_k.dtype is dtype
    exact_q, exact_k = qk_rope(q.double(), k.double(), *exact_table(4, 100.0), gain.double(), 1e-6)
    eps = torch.finfo(dtype).eps
    assert (got_q.double() - exact_q).abs().max() < 8 * eps * exact_q.abs().max()
    assert (got_k.double() - exact_k).abs().max() < 8 * eps * exact_k.abs().max()


def test_strided_inputs() -> None:
    q, k = inputs()
    gain = torch.linspace(0.5, 2, HEADS, dtype=torch.float64)
    packed = torch.cat((q.flatten(2), k.flatten(2)), -1)  # as one QKV matmul leaves them
    views = (
        packed[..., : HEADS * SIZE].view(2, LENGTH, HEADS, SIZE),
        packed[..., HEADS * SIZE :].view(2, LENGTH, GROUPS, SIZE),
    )
    table = exact_table(4, 100.0)
    torch.testing.assert_close(
        qk_rope(*views, *table, gain, 1e-6), qk_rope(q, k, *table, gain, 1e-6)
    )


def test_gradient() -> None:
    q, k = inputs()
    gain = torch.linspace(0.5, 2, HEADS, dtype=torch.float64)
    table = exact_table(4, 100.0)
    leaves = [t.requires_grad_() for t in (q, k, gain)]
    assert torch.autograd.gradcheck(lambda q, k, g: qk_rope(q, k, *table, g, 1e-6), leaves)
