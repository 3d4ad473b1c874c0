"""A GEMM that norms, rotates and scales heads, in the interpreter, against float64."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench import candidates
from pgolf.ops.linear_qk_rope import reference
from pgolf.ops.qk_rope import rope_table
from pgolf.triton_kernels import gemm
from pgolf.triton_kernels.launch import Launch, configs, intercepted
from pgolf.triton_kernels.linear_qk_rope import linear_qk_rope, obstacle

from ..ops.guards import GuardZones
from .interpreter import addresses, last_program, touched, vast
from .operands import few_multiprocessors  # noqa: F401

BF16, FP32 = torch.bfloat16, torch.float32
KERNEL = "linear_qk_rope_tma"
EPS = 1e-2
BESIDE = ("none", "factor", "values", "table")


class Heads(NamedTuple):
    """Heads of q, of k and v, their size, and how many pairs of one turn."""

    q: int
    kv: int
    size: int
    pairs: int


# As the recipes have them; v ends within a tile; a head is half of a tile; many in a half.
HEADS = [Heads(8, 4, 64, 8), Heads(2, 2, 64, 16), Heads(4, 4, 32, 16), Heads(16, 8, 16, 8)]
# N, T, D: less than a tile of each, edges of tiles, several tiles with a ragged last one.
SHAPES = [(1, 1, 8), (1, 128, 64), (5, 13, 136), (3, 100, 72)]


@dataclass
class Inputs:
    x: Tensor
    w: Tensor
    cos: Tensor
    sin: Tensor
    gain: Tensor
    heads: Heads
    factor: Tensor | None = None
    value: Tensor | None = None
    ids: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def in_zones(self, zones: GuardZones) -> "Inputs":
        return replace(self, **{name: zones.input(t) for name, t in self.tensors().items()})

    def run(self) -> tuple[Tensor, ...]:
        """q, k, v and rstd by the kernel."""
        return linear_qk_rope(
            self.x, self.w, self.cos, self.sin, self.gain, self.factor, self.value, self.ids,
            self.heads.q, self.heads.kv, EPS,
        )  # fmt: skip

    def plainly(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """q, k and v in plain torch, in float64 or as the inputs are."""
        own = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in
               self.tensors().items()}  # fmt: skip
        return reference(
            own["x"], own["w"], own["cos"], own["sin"], own["gain"], self.heads.q, self.heads.kv,
            EPS, True, own.get("value"), own.get("factor"), value_ids=self.ids,
        )  # fmt: skip

    def rstd(self) -> Tensor:
        """By its formula in float64."""
        turning = self.heads.q + self.heads.kv
        packed = (self.x.double() @ self.w.double().T).unflatten(2, (-1, self.heads.size))
        squares = packed[:, :, :turning].square().mean(-1)
        f = torch.ones(1, 1, 1) if self.factor is None else self.factor[..., None]
        return f.double() / (squares * f.double().square() + EPS).sqrt()


def inputs(
    heads: Heads = HEADS[1], shape: tuple[int, int, int] = (5, 13, 72), beside: str = "factor"
) -> Inputs:
    """Rows of x lie apart in memory; `beside` names what else there is."""
    n, t, d = shape
    g = torch.Generator().manual_seed(t + d)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g).to(BF16)

    width = heads.kv * heads.size
    x = Inputs(
        normal(n, t, d + 8)[:, :, :d], normal((heads.q + 2 * heads.kv) * heads.size, d),
        *rope_table(t, 2 * heads.pairs, 100.0), torch.linspace(-0.5, 1.5, heads.q), heads,
    )  # fmt: skip
    if beside != "none":
        x.factor = torch.linspace(2.0, -0.3, n * t).view(n, t)
    if beside == "values":
        x.value = normal(n, t, width)
    if beside == "table":
        x.value, x.ids = normal(7, width), torch.randint(7, (n, t), generator=g)
    return x


def check(x: Inputs) -> tuple[Tensor, ...]:
    """The kernel in guard zones, against float64 with torch in the same dtype as the measure."""
    with GuardZones() as zones:
        *results, rstd = x.in_zones(zones).run()
    for ours, truth, usual in zip(results, x.plainly(torch.float64), x.plainly(), strict=True):
        assert ours.dtype == BF16 and ours.shape == truth.shape and ours.is_contiguous()
        floor = torch.finfo(FP32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (usual - truth).abs().max() + floor
    assert rstd.dtype == FP32 and rstd.is_contiguous()
    torch.testing.assert_close(rstd.double(), x.rstd(), rtol=1e-5, atol=0)
    return *results, rstd


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], beside: str) -> None:
    check(inputs(shape=shape, beside=beside))


@pytest.mark.parametrize("heads", HEADS)
def test_heads_of_any_size(heads: Heads) -> None:
    check(inputs(heads, (2, 65, 24), "table"))


def test_what_does_not_turn_goes_through_exactly() -> None:
    """Beyond the rotated pairs, and in all of the first token, whose angles are 0."""
    x = inputs(HEADS[0], (1, 3, 16))
    q, k, _, _ = x.run()
    x.cos, x.sin = torch.ones_like(x.cos), torch.zeros_like(x.sin)
    for ours, plain in zip((q, k), x.run(), strict=False):
        assert torch.equal(ours[..., 16:], plain[..., 16:])
        assert torch.equal(ours[:, :1], plain[:, :1])
        assert not torch.equal(ours[:, 1:, :, :8], plain[:, 1:, :, :8])
        assert not torch.equal(ours[:, 1:, :, 8:16], plain[:, 1:, :, 8:16])


@pytest.mark.parametrize("gain", [0.0, -0.0, 1e-38, -1e-38, 2.0**-101, -(2.0**-101)])
def test_a_gain_of_nearly_nothing_leaves_the_normed_heads_in_q(gain: float) -> None:
    """With its sign, of which a zero has none, and 2^-100 for its magnitude."""
    x = inputs()
    x.gain[1] = gain
    q = check(x)[0]
    x.gain[1] = -(2.0**-100) if gain < 0 else 2.0**-100
    assert torch.equal(q, x.run()[0])
    x.gain[1] = -1.0 if gain < 0 else 1.0
    assert torch.equal(q[:, :, 1].float() * 2.0**100, x.run()[0][:, :, 1].float())


def test_the_least_gain_that_is_taken_as_it_is() -> None:
    x = inputs()
    x.gain[:] = torch.tensor([2.0**-100, -(1.5 * 2.0**-100)])
    q = x.run()[0].float() * 2.0**100
    x.gain[:] = torch.tensor([1.0, -1.5])
    torch.testing.assert_close(q, x.run()[0].float(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-18, 1e15])
def test_sizes_of_rows(size: float) -> None:
    """Of nothing rstd is that of eps; of small and large ones the row's."""
    x = inputs()
    x.x = (x.x.float() * size).to(BF16)
    *results, rstd = check(x)
    if not size:
        assert not any(t.any() for t in results)
        assert torch.equal(rstd, rstd[..., :1].expand_as(rstd))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "factor", "value"])
def test_what_is_not_finite_stays_in_its_token(name: str, bad: float) -> None:
    x = inputs(beside="values")
    getattr(x, name)[(2, 7, 9)[: getattr(x, name).dim()]] = bad
    for ours, wanted in zip(x.run(), x.plainly(FP32), strict=False):
        assert torch.equal(ours.isfinite(), wanted.isfinite())


def test_a_gain_that_is_no_number_stays_in_its_head() -> None:
    x = inputs()
    x.gain[1] = torch.nan
    q, k, v, _ = x.run()
    assert q[:, :, 1].isnan().all() and all(t.isfinite().all() for t in (q[:, :, 0], k, v))


@pytest.mark.parametrize("bad", [-1, 7])
def test_an_id_that_the_table_does_not_have_gives_no_numbers(bad: int) -> None:
    """In v of its token, although there are numbers before and behind the table."""
    x = inputs(beside="table")
    rows = torch.cat((x.value[:1], x.value, x.value[:1]))
    x.value, wanted = rows[1:-1], x.run()
    x.ids[2, 7] = bad
    found = x.run()
    assert found[2][2, 7].isnan().all()
    found[2][2, 7] = wanted[2][2, 7]
    assert all(map(torch.equal, found, wanted))


def test_calls_are_alike_to_the_bit() -> None:
    """Whatever number of programs shares the rows out."""
    x, found = inputs(shape=(3, 100, 72)), []
    for count in (1, 2, 7):
        gemm.H100_SMS = count
        found.append(x.run())
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("beside", BESIDE)
def test_touched_bytes_are_inputs_and_outputs(beside: str) -> None:
    x = inputs(HEADS[0], (3, 100, 72), beside)
    with touched() as record:
        results = x.run()
    assert np.array_equal(record.read, addresses(*x.tensors().values()))
    assert np.array_equal(record.written, addresses(*results))
    assert sum(map(len, record.writes)) == len(record.written)  # no tile is computed twice


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_programs_have_the_tiles_of_their_rows_and_no_more(blocks: int, monkeypatch) -> None:
    """A tile beyond the edges would write nothing, and take as long as another."""
    block_m, block_n, block_k = gemm.block_shape(configs()[KERNEL][0])
    half = block_n // 64  # heads of a tile, of 32 elements a pair of them
    x = inputs(Heads(half, half, 32, 8), (1, blocks * block_m - 1, 2 * block_k))
    products, dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *of: products.append(1) or dot(*of)
    )
    x.run()
    assert len(products) == blocks * 2 * 2


def test_offsets_beyond_int32() -> None:
    """2^30 elements between the rows of x; a table of more than 2^31."""
    memory = vast(2**36).view(BF16)
    x = inputs(shape=(1, 3, 16), beside="table")
    wanted, near = x.run(), x.x
    x.x = memory.as_strided(near.shape, (2**32, 2**30, 1), 2**31)
    x.x.copy_(near)
    rows = 2**24 + 7
    table = memory.as_strided((rows, 128), (128, 1), 2**33)
    table[-7:].copy_(x.value)
    x.value, x.ids = table, x.ids + rows - 7
    assert all(map(torch.equal, x.run(), wanted))


def test_results_beyond_int32(monkeypatch) -> None:
    """The last rstd of more than 2^31; one row of x is for all tokens."""
    x = inputs(shape=(1, 1, 8), beside="none")
    wanted = x.run()[3]
    memory, right = vast(2**38), torch.empty

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return memory.view(dtype).as_strided(shape, right(shape, device="meta").stride())

    x.x = x.x.expand(2**29 + 1, 1, 8)
    monkeypatch.setattr("pgolf.triton_kernels.linear_qk_rope.tma_obstacle", lambda *_: "")
    monkeypatch.setattr("pgolf.triton_kernels.linear_qk_rope.torch.empty", empty)
    monkeypatch.setattr(gemm, "H100_SMS", 2**31)  # a program for each block of rows
    with intercepted(last_program):
        rstd = x.run()[3]
    assert torch.equal(rstd[-1:], wanted)


def launched(x: Inputs) -> list[Launch]:
    launches: list[Launch] = []
    with intercepted(launches.append):
        x.run()
    return launches


def test_operands_that_tma_cannot_read_are_copied() -> None:
    x = inputs(shape=(1, 3, 16))
    wanted = x.run()
    x.x = torch.cat((x.x[..., :1], x.x), dim=2)[..., 1:]
    x.w = x.w.T.contiguous().T
    assert all(map(torch.equal, x.run(), wanted))


RIGHT = {
    "device": torch.device("cpu"), "dtype": BF16, "columns": 72, "heads": 2, "kv_heads": 2,
    "size": 64, "pairs": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"dtype": FP32}, "torch.float32 is not bfloat16"),
        ({"columns": 20}, "rows of 20 elements are not aligned"),
        ({"pairs": 0}, "heads of 64 elements with 0 rotated pairs are not of 16, 32 or 64"),
        ({"pairs": 4}, "with 4 rotated pairs"),
        ({"pairs": 12}, "with 12 rotated pairs"),
        ({"size": 96}, "heads of 96 elements"),
        ({"size": 256}, "heads of 256 elements"),
        ({"size": 16, "pairs": 16}, "with 16 rotated pairs"),
        ({"pairs": 32}, "with 32 rotated pairs"),
        ({"size": 128}, "heads of 128 elements"),
        ({"heads": 3}, "3 and 2 heads of 64 elements are no multiples of 128"),
        ({"kv_heads": 1}, "2 and 1 heads of 64 elements are no multiples of 128"),
    ],
)
def test_where_the_gemm_is_not_possible(change: dict, complaint: str) -> None:
    found = obstacle(**RIGHT | change)
    assert complaint in found and bool(found) == bool(complaint)


def test_a_device_without_tma(monkeypatch) -> None:
    monkeypatch.setattr(
        "pgolf.triton_kernels.linear_qk_rope.device_obstacle", lambda device: "it has none"
    )
    assert obstacle(**RIGHT) == "it has none"


def test_without_tokens() -> None:
    x = inputs(shape=(2, 0, 16))
    assert launched(x) == [] and [t.numel() for t in x.run()] == [0] * 4


def test_a_launch_on_meta_tensors(monkeypatch) -> None:
    """What is compiled ahead of time: a program has all columns of its rows."""
    monkeypatch.undo()
    x = inputs(HEADS[0], (1, 256, 64), "table")
    x = replace(x, **{n: t.to("meta") for n, t in x.tensors().items()})
    (launch,) = launched(x)
    assert launch.grid == (256 // 128,)
    blocks = [launch.arguments[name].block_shape for name in ("x", "w", "q", "k", "v")]
    assert blocks == [[128, 64], [256, 64], *[[128, 128]] * 3]


@pytest.mark.parametrize("candidate", candidates.CANDIDATES[KERNEL])
def test_candidates_for_tuning(candidate: candidates.Candidate) -> None:
    """Against float64 as well."""
    with candidates.taken(KERNEL, candidate):
        for shape in SHAPES[1:]:
            check(inputs(shape=shape, beside="table"))


def test_every_configuration_is_reached() -> None:
    """So that none is shipped uninterpreted."""
    (launch,) = launched(inputs(shape=(1, 3, 16)))
    assert [launch.config] == configs()[KERNEL]
