"""The GEMM for the gradient of an MLP's norm, and what feeds it, in the interpreter."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench import candidates
from pgolf.ops.norm_mlp import PART
from pgolf.triton_kernels import gemm
from pgolf.triton_kernels.launch import Launch, configs, intercepted
from pgolf.triton_kernels.leaky_relu2_mlp import dot_parts, down_dgrad, up
from pgolf.triton_kernels.norm_mlp import dgrad, gradient

from ..ops.guards import GuardZones
from .interpreter import addresses, last_program, touched, vast
from .operands import Operands, few_multiprocessors  # noqa: F401

BF16, FP32 = torch.bfloat16, torch.float32
KERNEL = "norm_mlp_dgrad_tma"
COEFFICIENT = 0.25
# Tokens, F, D: less than a tile of each, edges of tiles, several tiles with a ragged last one.
SHAPES = [(1, 8, 16), (65, 136, 48), (128, 64, 256), (130, 72, 272), (300, 264, 528)]


@dataclass
class Inputs(Operands):
    """Of the GEMM alone."""

    dpre: Tensor
    w_up: Tensor
    g: Tensor
    x: Tensor
    factor: Tensor
    dots: Tensor
    x_scale: Tensor | None

    def both(self) -> tuple[Tensor, Tensor | None]:
        *operands, x_scale = vars(self).values()
        return dgrad(*operands, COEFFICIENT, x_scale)

    def exactly(self) -> tuple[Tensor, Tensor]:
        """By the formula, in the dtype that the inputs have: dx, and sums over all rows of g x."""
        weight = COEFFICIENT * self.factor.square() * self.dots.sum(0)
        g = self.g if self.x_scale is None else self.x_scale * self.g
        dx = g + self.dpre @ self.w_up - weight[:, None].to(self.x.dtype) * self.x
        return dx, (self.g.double() * self.x.double()).sum(0)


def random_inputs(t: int, f: int, n: int, scaled: bool = True, dtype: torch.dtype = BF16) -> Inputs:
    """Rows of dpre, g and x lie apart in memory."""
    g = torch.Generator().manual_seed(t + f + n)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    return Inputs(
        normal(t, f + 8)[:, :f], normal(f, n), normal(t, n + 16)[:, :n], normal(t, n + 32)[:, :n],
        normal(t, dtype=FP32), normal(3, t, dtype=FP32), normal(n, dtype=FP32) if scaled else None,
    )  # fmt: skip


def check(x: Inputs) -> tuple[Tensor, Tensor | None]:
    """The kernel in guard zones, against float64 with torch in the same dtype as the measure."""
    with GuardZones() as zones:
        dx, parts = x.in_zones(zones).both()
    truth, of_columns = x.to(torch.float64).exactly()
    usual, _ = x.to(BF16).exactly()
    assert dx.dtype == BF16 and dx.shape == truth.shape and dx.is_contiguous()
    floor = torch.finfo(FP32).eps * truth.abs().max()
    assert (dx - truth).abs().max() <= 3 * (usual - truth).abs().max() + floor
    assert (parts is None) == (x.x_scale is None)
    if parts is not None:
        block_m = configs()[KERNEL][0].blocks["BLOCK_M"]
        assert parts.dtype == FP32 and parts.shape == (-(-len(dx) // block_m), dx.size(1))
        error, size = parts.double().sum(0) - of_columns, (x.g * x.x).abs().sum(0)
        assert (error.abs() <= 1e-6 * size).all()
    return dx, parts


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("t", "f", "n"), SHAPES)
def test_against_float64(t: int, f: int, n: int, scaled: bool) -> None:
    check(random_inputs(t, f, n, scaled))


@pytest.mark.parametrize("scaled", [False, True])
def test_exact_on_small_integers(scaled: bool) -> None:
    """Nothing is rounded: every sum is known, those of each block of rows too."""
    g = torch.Generator().manual_seed(0)

    def some(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).to(dtype)

    x = Inputs(
        some(130, 24), some(24, 272), some(130, 272), some(130, 272), 2 * some(130, dtype=FP32),
        some(5, 130, dtype=FP32), some(272, dtype=FP32) if scaled else None,
    )
    dx, parts = x.both()
    assert torch.equal(dx, x.to(torch.float64).exactly()[0].to(BF16))
    if scaled:
        block_m = configs()[KERNEL][0].blocks["BLOCK_M"]
        sums = [block.sum(0) for block in (x.g.float() * x.x.float()).split(block_m)]
        assert torch.equal(parts, torch.stack(sums))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["dpre", "g", "x", "factor", "dots"])
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    """And in its column, in sums over rows."""
    x = random_inputs(130, 16, 272)
    place = {"factor": (129,), "dots": (1, 129)}.get(name, (129, 7))
    getattr(x, name)[place] = bad
    (dx, parts), wanted = x.both(), x.to(FP32).exactly()[0]
    assert torch.equal(dx.isfinite(), wanted.isfinite())
    finite = torch.ones_like(parts, dtype=torch.bool)
    if name in ("g", "x"):
        finite[-1, 7] = False
    assert torch.equal(parts.isfinite(), finite)


def test_calls_are_alike_to_the_bit() -> None:
    """Whatever number of programs shares the tiles out."""
    x = random_inputs(300, 72, 528)
    found = []
    for count in (1, 2, 7):
        gemm.H100_SMS = count
        found.append(x.both())
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("t", "f", "n"), SHAPES)
def test_touched_bytes_are_inputs_and_outputs(t: int, f: int, n: int, scaled: bool) -> None:
    x = random_inputs(t, f, n, scaled)
    with touched() as record:
        results = [r for r in x.both() if r is not None]
    assert np.array_equal(record.read, addresses(*(v for v in vars(x).values() if v is not None)))
    assert np.array_equal(record.written, addresses(*results))
    assert sum(map(len, record.writes)) == len(record.written)  # no tile is computed twice


def test_offsets_beyond_int32() -> None:
    """2^30 elements between the rows of every matrix, by pointer and by TMA."""
    memory = vast(2**36).view(BF16)
    x = random_inputs(4, 16, 16)
    wanted = check(x)
    for i, name in enumerate(("dpre", "w_up", "g", "x")):
        near = getattr(x, name)
        far = memory.as_strided(near.shape, (2**30, 1), 2**31 + 256 * i)
        far.copy_(near)
        setattr(x, name, far)
    assert all(map(torch.equal, x.both(), wanted))


def test_results_beyond_int32(monkeypatch) -> None:
    """The last tile of more than 2^31 elements, of dots too; one row stands for all of matrices."""
    t, n = 2**30 + 1, 16
    x = random_inputs(1, 8, n)
    wanted = x.both()
    memory, right = vast(2**36), torch.empty
    factor = memory.view(FP32).as_strided((t,), (1,), 0)
    dots = memory.view(FP32).as_strided((3, t), (t, 1), 2**33 + 2**32)
    factor[-1:], dots[:, -1:] = x.factor, x.dots

    def empty(shape: tuple[int, ...], dtype: torch.dtype, **named) -> Tensor:
        if dtype == BF16:
            return memory.view(BF16).as_strided(shape, (n, 1), 2**31)
        return right(shape, dtype=dtype, **named)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(gemm, "H100_SMS", 2**31)  # a program for each tile
    rows = [v.expand(t, -1) for v in (x.dpre, x.g, x.x)]
    with intercepted(last_program):
        found = dgrad(rows[0], x.w_up, *rows[1:], factor, dots, COEFFICIENT, x.x_scale)
    assert all(torch.equal(far[-1:], near) for far, near in zip(found, wanted, strict=True))


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


def launched(call) -> list[Launch]:
    launches: list[Launch] = []
    with intercepted(launches.append):
        call()
    return launches


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


def test_launches_on_meta_tensors(monkeypatch) -> None:
    """What is compiled ahead of time: an H100's grid, one program on each multiprocessor."""
    monkeypatch.undo()
    shapes = (98304, 1536), (1536, 512), (98304, 512), (98304, 512)
    meta = [torch.empty(shape, dtype=BF16, device="meta") for shape in shapes]
    rows = [torch.empty(shape, device="meta") for shape in ((98304,), (6, 98304))]
    (launch,) = launched(lambda: dgrad(*meta, *rows, COEFFICIENT))
    assert launch.grid == (132,) and launch.arguments["DOTS"] == 8
    blocks = [launch.arguments[name].block_shape for name in ("dpre", "w_up", "dx")]
    assert blocks == [[128, 64], [64, 256], [128, 32]]


@pytest.mark.parametrize("candidate", candidates.CANDIDATES[KERNEL])
def test_candidates_for_tuning(candidate: candidates.Candidate) -> None:
    """Against float64 as well; their programs share multiprocessors."""
    with candidates.taken(KERNEL, candidate):
        for shape in SHAPES:
            x = random_inputs(*shape)
            check(x)
        assert launched(x.both)[0].grid == (2 * 2,)


@pytest.mark.parametrize("candidate", candidates.CANDIDATES["leaky_relu2_dgrad_tma"])
def test_candidates_for_tuning_of_the_gemm_before(candidate: candidates.Candidate) -> None:
    """There are more dots then."""
    wanted = random_layer(130, 48, 264).all()
    with candidates.taken("leaky_relu2_dgrad_tma", candidate):
        assert dot_parts(264) == 3
        for ours, usual in zip(random_layer(130, 48, 264).all()[:2], wanted, strict=False):
            torch.testing.assert_close(ours.float(), usual.float(), rtol=0.01, atol=0.01)


def test_what_the_epilogue_reads_is_requested_early(monkeypatch) -> None:
    """Dots, and an eighth of g and x, before the last products, the others before it is stored."""
    block_m, block_n, block_k = gemm.block_shape(configs()[KERNEL][0])
    x = random_inputs(block_m, 2 * block_k, 2 * block_n, scaled=False)  # two tiles
    x.g, x.x = x.g.contiguous(), x.x.contiguous()
    taken, events = addresses(x.g, x.x, x.dots), []
    load, dot = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_dot
    store = InterpreterBuilder.create_descriptor_store

    def noted_load(self, pointers, mask, *rest, **named):
        if wanted := int(np.isin(pointers.data[mask.data], taken).sum()):
            events.append(wanted)
        return load(self, pointers, mask, *rest, **named)

    def noted_dot(*operands):
        events.append("products")
        return dot(*operands)

    def noted_store(*operands):
        events.append("stored")
        return store(*operands)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", noted_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_descriptor_store", noted_store)
    x.both()
    eighth = [block_m * block_n // 8] * 2  # elements
    of_tile = [
        "products", 3 * block_m, *eighth, "products", *[*eighth, "stored"] * 7, "stored"
    ]  # fmt: skip
    assert events == of_tile * 2


def test_every_configuration_is_reached() -> None:
    """So that none is shipped uninterpreted; and all make the sums of so many rows a part."""
    (launch,) = launched(random_inputs(3, 16, 32).both)
    assert [launch.config] == configs()[KERNEL]
    rows = [launch.config, *candidates.of(KERNEL, launch.config)]
    assert {row.blocks["BLOCK_M"] for row in rows} == {PART}


