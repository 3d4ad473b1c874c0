"""The gradient of an MLP and of its norm: both GEMMs, what one tells the other, where they run."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench import candidates
from pgolf.triton_kernels import gemm
from pgolf.triton_kernels.launch import Launch, configs, intercepted
from pgolf.triton_kernels.leaky_relu2_mlp import dot_parts, down_dgrad, up
from pgolf.triton_kernels.norm_mlp import gradient

from ..ops.guards import GuardZones
from .interpreter import last_program, vast
from .operands import Operands, few_multiprocessors  # noqa: F401
from .test_norm_mlp import COEFFICIENT, KERNEL, launched

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass
class Layer(Operands):
    """Of both kernels."""

    dout: Tensor
    g: Tensor
    x: Tensor
    factor: Tensor
    w_up: Tensor
    w_down: Tensor

    def hidden(self, slope: float, tma: bool | None = None) -> tuple[Tensor, Tensor]:
        return up(self.x, self.w_up, slope, self.factor, tma=tma)

    def all(self, slope: float = 0.5, tma: bool | None = True) -> tuple[Tensor, ...] | None:
        post, bits = self.hidden(slope)
        return gradient(*vars(self).values(), post, bits, slope, COEFFICIENT, tma=tma)


def random_layer(t: int, d: int, f: int, dtype: torch.dtype = BF16) -> Layer:
    g = torch.Generator().manual_seed(t + d + f)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    factor = torch.rand(t, generator=g) + 0.5
    states = [normal(t, d + 16)[:, :d] for _ in range(3)]
    return Layer(*states, factor, normal(f, d) * d**-0.5, normal(d, f) * f**-0.5)


@pytest.mark.parametrize("slope", [0.5, 0.0])
@pytest.mark.parametrize(
    ("t", "d", "f"), [(1, 16, 8), (100, 48, 40), (130, 16, 264), (257, 48, 520)]
)
def test_dots_are_products_of_rows(t: int, d: int, f: int, slope: float) -> None:
    """Of the gradient of post with post, each of a tile of columns; and dpre is the same."""
    x = random_layer(t, d, f)
    post, bits = x.hidden(slope)
    wanted = down_dgrad(x.dout, x.w_down, post, bits, slope, x.factor, tma=True)
    with GuardZones() as zones:
        x = x.in_zones(zones)
        dots = torch.empty((dot_parts(f), t), dtype=FP32)
        dpre = down_dgrad(x.dout, x.w_down, post, bits, slope, x.factor, tma=True, dots=dots)
    width = configs()["leaky_relu2_dgrad_tma"][0].blocks["BLOCK_N"]
    products = (x.dout.double() @ x.w_down.double()) * post.double()
    truth = torch.stack([part.sum(1) for part in products.split(width, dim=1)])
    size = torch.stack([part.abs().sum(1) for part in products.split(width, dim=1)])
    assert ((dots - truth).abs() <= 2e-6 * size + 1e-6).all()
    assert (dpre.float() - wanted.float()).abs().max() <= 2**-8 * wanted.abs().max()


def test_dots_beyond_int32(monkeypatch) -> None:
    """More than 2^31 of them, for the last rows; one row of dout is for all."""
    t, f = 2**30 + 1, 520
    x = random_layer(1, 16, f)
    post, bits = x.hidden(0.5)
    dots = torch.empty((dot_parts(f), 1), dtype=FP32)
    wanted = down_dgrad(x.dout, x.w_down, post, bits, 0.5, x.factor, tma=True, dots=dots)
    memory, tera = vast(2**42), 2**40

    def far(like: Tensor, rows: int, columns: int, start: float) -> Tensor:
        place = int(start * tera) // like.itemsize
        return memory.view(like.dtype).as_strided((rows, columns), (columns, 1), place)

    all_post, all_bits = far(post, t, f, 0), far(bits, t, bits.size(1), 3)
    all_dpre, factor = far(wanted, t, f, 1.5), far(x.factor, 1, t, 3.5)[0]
    all_dots = far(dots, dots.size(0), t, 3.75)
    all_post[-1:], all_bits[-1:], factor[-1:] = post, bits, x.factor
    monkeypatch.setattr(torch, "empty", lambda *_, **__: all_dpre)
    monkeypatch.setattr(gemm, "H100_SMS", 2**31)  # a program for each tile
    monkeypatch.setattr(gemm, "tma_obstacle", lambda *_: "")  # rows that overlap
    with intercepted(last_program):
        dpre = down_dgrad(
            x.dout.expand(t, -1), x.w_down, all_post, all_bits, 0.5, factor, tma=True, dots=all_dots
        )
    width = configs()["leaky_relu2_dgrad_tma"][0].blocks["BLOCK_N"]
    first = (f - 1) // width * width  # column of the last tile
    assert torch.equal(dpre[-1:, first:], wanted[:, first:])
    assert torch.equal(all_dots[-1, -1], dots[-1, 0])


def test_dots_twice_make_the_product_with_x() -> None:
    """What the norm takes out: <dpre w_up, x> of each row is 2 <dpost, post>, for any slope."""
    for slope in (0.0, 0.5, 1.0):
        x = random_layer(70, 48, 264).to(torch.float64)
        pre = x.factor[:, None] * (x.x @ x.w_up.T)
        post = torch.where(pre > 0, pre, slope * pre).square()
        dpost = x.dout @ x.w_down
        slopes = torch.where(pre > 0, 2.0 * pre, 2 * slope**2 * pre)
        dpre = x.factor[:, None] * dpost * slopes
        found = ((dpre @ x.w_up) * x.x).sum(1)
        torch.testing.assert_close(found, 2 * (dpost * post).sum(1))


@pytest.mark.parametrize("slope", [0.5, 0.0])
def test_the_gradient_of_the_norm_and_both_products(slope: float) -> None:
    """Against autograd in float64 of the whole, with torch in bf16 as the measure."""
    x, scale = random_layer(257, 48, 264), 0.5
    x.factor = scale * x.x.double().square().mean(1).rsqrt().float()

    def by_autograd(dtype: torch.dtype) -> Tensor:
        dout, g, state, _, w_up, w_down = (v.to(dtype) for v in vars(x).values())
        leaf = state.clone().requires_grad_()
        h = scale * torch.nn.functional.rms_norm(leaf, (48,), eps=0.0)
        pre = h @ w_up.T
        out = torch.where(pre > 0, pre, slope * pre).square() @ w_down.T
        return torch.autograd.grad([leaf, out], leaf, [g, dout])[0]

    post, bits = x.hidden(slope)
    coefficient = 2 / (48 * scale**2)
    _, dx, parts = gradient(*vars(x).values(), post, bits, slope, coefficient, tma=True)
    truth, usual = by_autograd(torch.float64), by_autograd(BF16)
    assert parts is None
    assert (dx - truth).abs().max() <= 3 * (usual - truth).abs().max()
    assert (dx - truth).square().mean() <= 2 * (usual - truth).square().mean()


def whole(x: Layer, **how) -> list[Launch]:
    """Launches of the gradient."""
    (t, f), slope = (x.x.size(0), x.w_up.size(0)), 0.5
    post, bits = torch.ones(t, f, dtype=x.x.dtype), torch.ones(t, -(-f // 32), dtype=torch.int32)
    call = (*vars(x).values(), post, bits, slope, COEFFICIENT)
    return launched(lambda: gradient(*call, **how))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"dout": torch.ones(3, 32)}, "torch.float32 .* is not bfloat16"),
        ({"w_up": torch.ones(24, 36, dtype=BF16)[:, :32]}, "aligned to 16 bytes"),
        ({"g": torch.ones(1, 32, dtype=BF16).expand(3, 32)}, "has rows that overlap"),
        ({"x": torch.ones(3, 48, dtype=BF16)[:, :24]}, "24 columns are no multiple of 16"),
        ({"g": torch.ones(3, 40, dtype=BF16)[:, :32]}, "40 elements apart, no multiple of 16"),
        ({"x": torch.ones(3, 40, dtype=BF16)[:, :32]}, "40 elements apart, no multiple of 16"),
    ],
)
def test_the_gemm_wherever_it_is_possible(change: dict, complaint: str) -> None:
    x = Layer(**vars(random_layer(3, 32, 24)) | change)
    names = [one.kernel.__name__ for one in whole(x)]
    assert names == ([] if complaint else ["leaky_relu2_dgrad_tma", KERNEL])
    assert whole(x, tma=False) == []
    if complaint:
        message = f"norm_mlp: tma=True is not possible: .*{complaint}"
        with pytest.raises(ValueError, match=message):
            whole(x, tma=True)


def test_a_device_without_tma(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "device_obstacle", lambda device: "it has none")
    assert whole(random_layer(3, 32, 24)) == []


def test_without_tokens() -> None:
    assert whole(random_layer(0, 32, 24)) == []


@pytest.mark.parametrize("candidate", candidates.CANDIDATES["leaky_relu2_dgrad_tma"])
def test_candidates_for_tuning_of_the_gemm_before(candidate: candidates.Candidate) -> None:
    """There are more dots then."""
    wanted = random_layer(130, 48, 264).all()
    with candidates.taken("leaky_relu2_dgrad_tma", candidate):
        assert dot_parts(264) == 3
        for ours, usual in zip(random_layer(130, 48, 264).all()[:2], wanted, strict=False):
            torch.testing.assert_close(ours.float(), usual.float(), rtol=0.01, atol=0.01)
