"""A GEMM that adds to the residual stream, mixes and norms, in the interpreter, against float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench import candidates
from pgolf.triton_kernels import gemm
from pgolf.triton_kernels.launch import Launch, configs, intercepted
from pgolf.triton_kernels.linear_residual import linear_residual

from ..ops.guards import GuardZones
from .interpreter import addresses, last_program, touched, vast
from .operands import Operands, few_multiprocessors  # noqa: F401

BF16, FP32 = torch.bfloat16, torch.float32
KERNEL = "linear_residual_tma"
SCALE, EPS = 0.5, 1e-3
# Tokens, K, D: less than a tile of each, edges of tiles, several tiles with a ragged last one.
SHAPES = [(1, 8, 8), (65, 136, 24), (128, 64, 256), (130, 72, 264), (300, 16, 520)]
# What is given besides z, w and x: as joined layers have it, without and with a skip; a skip's own
# layer, which wants the total; all of it; and no factors.
FORMS = {
    "residual": (),
    "joined": ("x0", "of_x", "of_x0"),
    "skip": ("skip", "x0", "of_x", "of_skip", "of_x0"),
    "total": ("x0", "of_total", "of_x0"),
    "all": ("skip", "x0", "of_x", "of_skip", "of_total", "of_x0"),
    "states": ("skip", "x0"),
}


@dataclass
class Inputs(Operands):
    """of_total comes with the wish for the total."""

    z: Tensor
    w: Tensor
    x: Tensor
    skip: Tensor | None = None
    x0: Tensor | None = None
    of_x: Tensor | None = None
    of_skip: Tensor | None = None
    of_total: Tensor | None = None
    of_x0: Tensor | None = None

    def both(self, tma: bool | None = True) -> tuple[Tensor, ...] | None:
        """(out, factor), behind the total where it is wanted."""
        z, w, x, *_ = vars(self).values()
        more = {name: t for name, t in vars(self).items() if name not in ("z", "w", "x")}
        more |= {"keep_total": self.of_total is not None}
        made = linear_residual(z, w, x, SCALE, EPS, **more, tma=tma)
        return made and made[made[0] is None :]

    def there(self) -> list[Tensor]:
        return [t for t in vars(self).values() if t is not None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Factors at least in float32, in which they are given."""
        made = super().to(dtype)
        for name in ("of_x", "of_skip", "of_total", "of_x0"):
            factors = getattr(self, name)
            if factors is not None and dtype == BF16:
                setattr(made, name, factors)
        return made

    def exactly(self) -> tuple[Tensor, ...]:
        """By the formula, in the dtype of these: what `both` gives."""

        def times(x: Tensor, factors: Tensor | None) -> Tensor:
            return x if factors is None else (factors * x).to(x.dtype)

        total = times(self.x, self.of_x) + self.z @ self.w.T
        if self.skip is not None:
            total = total + times(self.skip, self.of_skip)
        out = times(total, self.of_total)
        if self.x0 is not None:
            out = out + times(self.x0, self.of_x0)
        factor = SCALE / (out.square().mean(1) + EPS).sqrt()
        return (out, factor) if self.of_total is None else (total, out, factor)


def random_inputs(
    t: int, k: int, n: int, form: str = "residual", dtype: torch.dtype = BF16
) -> Inputs:
    """Rows of all but w lie apart in memory, by another distance each."""
    g = torch.Generator().manual_seed(t + k + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def state(distance: int) -> Tensor:
        return normal(t, -(-n // 16) * 16 + 16 * distance)[:, :n]

    states = {"skip": state(2), "x0": state(3)}
    factors = {name: torch.randn(n, generator=g) for name in ("x", "skip", "total", "x0")}
    more = states | {f"of_{name}": factor for name, factor in factors.items()}
    z, w = normal(t, k + 8)[:, :k], normal(n, k)
    return Inputs(z, w, state(1), **{name: more[name] for name in FORMS[form]})


def check(x: Inputs) -> tuple[Tensor, ...]:
    """The kernel in guard zones, against float64 with torch in the same dtype as the measure."""
    with GuardZones() as zones:
        made = x.in_zones(zones).both()
    (*truths, of_rows), usual = x.to(torch.float64).exactly(), x.to(BF16).exactly()
    for result, truth, measure in zip(made[:-1], truths, usual, strict=False):
        assert result.dtype == BF16 and result.shape == truth.shape and result.is_contiguous()
        floor = torch.finfo(FP32).eps * truth.abs().max()
        assert (result - truth).abs().max() <= 2 * (measure - truth).abs().max() + floor
    # That of the sum before it is rounded: a float32's, whatever the dtype.
    factor = made[-1]
    assert len(made) == len(usual) and factor.dtype == FP32 and factor.shape == of_rows.shape
    torch.testing.assert_close(factor.double(), of_rows, rtol=2e-6, atol=0)
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
def test_against_float64(t: int, k: int, n: int, form: str) -> None:
    check(random_inputs(t, k, n, form))


@pytest.mark.parametrize("form", FORMS)
def test_exact_on_small_integers(form: str) -> None:
    """Nothing is rounded: every sum is known."""
    g = torch.Generator().manual_seed(0)
    x = random_inputs(130, 24, 272, form)
    for t in x.there():
        t.copy_(torch.randint(-2, 3, t.shape, generator=g))
    made, wanted = x.both()[:-1], x.to(torch.float64).exactly()
    assert all(torch.equal(t, exact.to(BF16)) for t, exact in zip(made, wanted, strict=False))


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
def test_sizes_of_rows(size: float) -> None:
    """Of nothing the factor is that of eps; of small and large ones the row's."""
    x = random_inputs(5, 16, 264)
    x.z, x.x = x.z * size, x.x.mul_(size)
    out, factor = check(x)
    if not size:
        assert not out.any() and (factor == factor[0]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["z", "x", "skip", "x0"])
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    x = random_inputs(130, 16, 264, "all")
    getattr(x, name)[129, 7] = bad
    made, wanted = x.both(), x.to(FP32).exactly()
    for t, truth in zip(made[:-1], wanted, strict=False):
        assert torch.equal(t.isfinite(), truth.isfinite())
    assert torch.equal(made[-1].isnan(), wanted[-1].isnan())
    assert made[-1][:129].isfinite().all()


@pytest.mark.parametrize("form", ["residual", "all"])
def test_calls_are_alike_to_the_bit(form: str) -> None:
    """Whatever number of programs shares the rows out."""
    x = random_inputs(300, 72, 520, form)
    found = []
    for count in (1, 2, 7):
        gemm.H100_SMS = count
        found.append(x.both())
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "k", "n"), [SHAPES[0], *SHAPES[3:]])
def test_touched_bytes_are_inputs_and_outputs(t: int, k: int, n: int, form: str) -> None:
    x = random_inputs(t, k, n, form)
    with touched() as record:
        results = x.both()
    assert np.array_equal(record.read, addresses(*x.there()))
    assert np.array_equal(record.written, addresses(*results))
    assert sum(map(len, record.writes)) == len(record.written)  # no tile is computed twice


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_programs_have_the_tiles_of_their_rows_and_no_more(blocks: int, monkeypatch) -> None:
    """A tile beyond the edges would write nothing, and take as long as another."""
    block_m, block_n, block_k = gemm.block_shape(configs()[KERNEL][0])
    x = random_inputs(blocks * block_m - 1, 2 * block_k, 2 * block_n + 8)
    products, dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *of: products.append(1) or dot(*of)
    )
    x.both()
    assert len(products) == blocks * 3 * 2


def test_offsets_beyond_int32() -> None:
    """2^30 elements between the rows of every operand, by pointer and by TMA."""
    memory = vast(2**36).view(BF16)
    x = random_inputs(4, 16, 8, "states")
    far = Inputs(*vars(x).values())
    for i, name in enumerate(("z", "w", "x", "skip", "x0")):
        near = getattr(x, name)
        setattr(far, name, memory.as_strided(near.shape, (2**30, 1), 2**31 + 256 * i))
        getattr(far, name).copy_(near)
    assert all(map(torch.equal, far.both(), check(x)))


def test_results_beyond_int32(monkeypatch) -> None:
    """The last tile of a result of more than 2^31 elements; one row of z and x is for all."""
    t = 2**23 + 1
    x = random_inputs(1, 8, 256)
    wanted = x.both()
    memory, right = vast(2**34).view(BF16), torch.empty

    def empty(shape: tuple[int, ...], **named) -> Tensor:
        return memory.as_strided(shape, (256, 1), 2**31) if len(shape) == 2 else right(t, **named)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(gemm, "tma_obstacle", lambda *_: "")  # rows that overlap
    monkeypatch.setattr(gemm, "H100_SMS", 2**31)  # a program for each block of rows
    with intercepted(last_program):
        _, out, factor = linear_residual(
            x.z.expand(t, -1), x.w, x.x.expand(t, -1), SCALE, EPS, tma=True
        )
    assert torch.equal(out[-1:], wanted[0]) and torch.equal(factor[-1:], wanted[1])


def launched(x: Inputs, tma: bool | None = None) -> list[Launch]:
    launches: list[Launch] = []
    with intercepted(launches.append):
        assert (x.both(tma) is None) == (not launches)
    return launches


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"z": torch.ones(3, 16)}, "torch.float32 .* is not bfloat16"),
        ({"z": torch.ones(16, 3, dtype=BF16).T}, "aligned to 16 bytes"),
        ({"w": torch.ones(24, 20, dtype=BF16)[:, :16]}, "aligned to 16 bytes"),
        ({"x": torch.ones(1, 24, dtype=BF16).expand(3, 24)}, "has rows that overlap"),
        ({"x": torch.ones(3, 24, dtype=BF16)[:, :20]}, "20 columns are no multiple of 8"),
        ({"x": torch.ones(3, 24, dtype=BF16)}, "rows of x are 24 elements apart, no multiple of"),
        ({"x0": torch.ones(3, 24, dtype=BF16)}, "rows of x0 are 24 elements apart, no multiple of"),
    ],
)
def test_the_gemm_wherever_it_is_possible(change: dict, complaint: str) -> None:
    x = Inputs(**vars(random_inputs(3, 16, 24, "states")) | change)
    assert len(launched(x)) == (not complaint)
    assert launched(x, tma=False) == []
    if complaint:
        message = f"linear_residual: tma=True is not possible: .*{complaint}"
        with pytest.raises(ValueError, match=message):
            x.both(tma=True)


def test_a_device_without_tma(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "device_obstacle", lambda device: "it has none")
    assert launched(random_inputs(3, 16, 24)) == []


def test_without_tokens() -> None:
    assert random_inputs(0, 16, 24).both(None) is None


def test_a_launch_on_meta_tensors(monkeypatch) -> None:
    """What is compiled ahead of time: a program has all columns of its rows."""
    monkeypatch.undo()
    meta = Inputs(*(torch.empty(s, dtype=BF16, device="meta") for s in
                    ((2048, 512), (512, 512), (2048, 512))))  # fmt: skip
    (launch,) = launched(meta)
    assert launch.grid == (2048 // 128,)
    blocks = [launch.arguments[name].block_shape for name in ("z", "w", "out")]
    assert blocks == [[128, 64], [256, 64], [128, 128]]


@pytest.mark.parametrize("candidate", candidates.CANDIDATES[KERNEL])
def test_candidates_for_tuning(candidate: candidates.Candidate) -> None:
    """Against float64 as well; their programs share multiprocessors."""
    with candidates.taken(KERNEL, candidate):
        for shape in SHAPES:
            for form in FORMS:
                check(random_inputs(*shape, form))
        assert launched(random_inputs(300, 16, 24))[0].grid == (2 * 2,)


@pytest.mark.parametrize("form", ["residual", "joined", "skip"])
def test_what_the_epilogue_reads_is_requested_early(form: str, monkeypatch) -> None:
    """Of all states the first part before the last products, others before one more is written."""
    states = 1 + ("x0" in FORMS[form]) + ("skip" in FORMS[form])
    config = configs()[KERNEL][states - 1]
    block_m, block_n, block_k = gemm.block_shape(config)
    x = random_inputs(block_m, 2 * block_k, block_n, form)  # one tile
    taken, events = addresses(*(t for t in (x.x, x.skip, x.x0) if t is not None)), []
    load, dot = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_dot
    store = InterpreterBuilder.create_masked_store

    def noted_load(self, pointers, mask, *rest, **named):
        if wanted := int(np.isin(pointers.data[mask.data], taken).sum()):
            events.append(wanted)
        return load(self, pointers, mask, *rest, **named)

    def noted_dot(*operands):
        events.append("products")
        return dot(*operands)

    def noted_store(*operands):
        events.append("written")
        return store(*operands)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", noted_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    x.both()
    parts = config.blocks["PARTS"]
    requests = [block_m * block_n // parts] * states  # elements
    later = [*requests, "written"] * (parts - 1)
    assert events == ["products", *requests, "products", *later, "written", "written"]


def test_every_configuration_is_reached() -> None:
    """So that none is shipped uninterpreted."""
    reached = [launched(random_inputs(3, 16, 24, form))[0].config for form in FORMS]
    assert all(config in reached for config in configs()[KERNEL])
