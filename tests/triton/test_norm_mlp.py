"""The GEMM for the gradient of an MLP's norm in the interpreter, through its launcher."""

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
from pgolf.triton_kernels.norm_mlp import dgrad

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


def launched(call) -> list[Launch]:
    launches: list[Launch] = []
    with intercepted(launches.append):
        call()
    return launches


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


