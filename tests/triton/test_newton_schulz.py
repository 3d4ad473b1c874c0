"""The Newton-Schulz kernels in the interpreter, through their launcher, against float64."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels import newton_schulz as ns
from pgolf.triton_kernels.launch import Config, Launch, configs, intercepted, pick
from pgolf.triton_kernels.newton_schulz import newton_schulz, newton_schulz_all

from ..ops.guards import GuardZones
from .interpreter import addresses, touched, vast

BF16, FP32 = torch.bfloat16, torch.float32
CLASSIC = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [  # the first steps of arXiv 2505.16932's
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
]
PRODUCTS = configs()["newton_schulz_product"]


def formula(
    g: Tensor, coefficients: list, dtype: torch.dtype, row_norm: bool = False, safety: float = 1.0
) -> Tensor:
    """The definition with torch's operations, everything after the normalisation in `dtype`."""
    g = g.to(torch.promote_types(g.dtype, FP32))
    if row_norm:
        g = g / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min(1e-7)
    x = (g / (safety * torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)).to(dtype)
    tall = g.size(1) > g.size(2)
    if tall:
        x = x.mT.contiguous()
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def random_matrices(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(
    g: Tensor, coefficients: list, dtype: torch.dtype, row_norm: bool = False, safety: float = 1.0
) -> Tensor:
    """In guard zones, against float64 with torch in the same dtype as the measure."""
    with GuardZones() as zones:
        ours = newton_schulz(zones.input(g), coefficients, dtype, row_norm, safety)
    assert ours.shape == g.shape and ours.dtype == dtype and ours.is_contiguous()
    truth = formula(g.double(), coefficients, torch.float64, row_norm, safety)
    theirs = formula(g, coefficients, dtype, row_norm, safety)
    # The matrices' largest errors have luck in them; their root mean squares have less.
    floor = torch.finfo(FP32).eps * truth.abs().max()
    for name, norm in (("largest", torch.inf), ("mean", 2)):
        error, allowed = (
            torch.linalg.vector_norm(x.double() - truth, norm) for x in (ours, theirs)
        )
        assert error <= 2 * allowed + floor * g.numel() ** 0.5, (
            f"{name}: {error:.3g}, {allowed:.3g}"
        )
    return ours


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", [(1, 33, 70), (2, 70, 33), (3, 64, 64), (1, 1, 9), (2, 9, 1)])
@pytest.mark.parametrize(
    ("coefficients", "row_norm", "safety"), [(CLASSIC, False, 1.0), (POLAR_EXPRESS, True, 1.02)]
)
def test_against_float64(
    shape: tuple, coefficients: list, row_norm: bool, safety: float, dtype: torch.dtype
) -> None:
    check(random_matrices(*shape), coefficients, dtype, row_norm, safety)


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [((2, 3, 5), (FP32, BF16)), ((2, 70, 600), (FP32, BF16)), ((1, 2060, 3), (FP32,))],
)
def test_normalisation(shape: tuple, dtypes: tuple, row_norm: bool) -> None:
    """Without iterations, over several blocks of rows, columns and partial sums."""
    for dtype in dtypes:
        check(1e3 * random_matrices(*shape, dtype=dtype), [], FP32, row_norm, safety=1.02)


def test_singular_values_go_to_one() -> None:
    g = random_matrices(2, 40, 96)
    values = torch.linalg.svdvals(check(g, CLASSIC, BF16).float())
    assert values.min() > 0.6 and values.max() < 1.3


def everywhere(config: Config) -> Callable[..., Config]:
    """A `pick` that takes this configuration wherever it is not wrong."""

    def chosen(kernel: str, **facts) -> Config:
        if kernel != "newton_schulz_product":
            return pick(kernel, **facts)
        right = facts["symmetric"] or not config.blocks["SYMMETRIC"]
        return config if right else pick(kernel, **facts)

    return chosen


@pytest.mark.parametrize("row", range(len(PRODUCTS)))
def test_every_configuration(row: int, monkeypatch) -> None:
    """On two or more tiles a side, the last of them partial; wide and tall."""
    config = PRODUCTS[row]
    monkeypatch.setattr(ns, "pick", everywhere(config))
    dtype = BF16 if config.when["dtype"] == "bf16" else FP32
    torch.set_float32_matmul_precision(
        "high" if config.when.get("precision") == "tf32" else "highest"
    )
    try:
        check(random_matrices(2, 130, 140), CLASSIC[:1], dtype)
        check(random_matrices(1, 140, 130), CLASSIC[:1], dtype)
    finally:
        torch.set_float32_matmul_precision("highest")


EXACT = [(row, True) for row in range(len(PRODUCTS))]
MIRRORED = [(row, False) for row, config in enumerate(PRODUCTS) if config.blocks["SYMMETRIC"]]


@pytest.mark.parametrize(("row", "integers"), EXACT + MIRRORED)
def test_symmetric_products(row: int, integers: bool, monkeypatch) -> None:
    """A = X X^T and b A + c A A equal their transposes to the bit.

    One triangle and its mirror image are equal by construction. Whole products are equal if the
    order of the sum over k does not depend on an element's place, which numpy's matmul grants only
    where sums are exact: with integers.
    """
    config = PRODUCTS[row]
    monkeypatch.setattr(ns, "pick", everywhere(config))
    dtype = BF16 if config.when["dtype"] == "bf16" else FP32
    x = random_matrices(2, 140, 24)
    x = (x.round().clamp(-2, 2) if integers else x).to(dtype)
    with GuardZones() as zones:
        gram, poly = (zones.tensor((2, 140, 140), dtype) for _ in range(2))
        ns._products([(x, x.mT, None, gram, None)], 1.0, 0.0, symmetric=True)
        ns._products([(gram, gram, gram, poly, None)], 2.0, -1.0, symmetric=True)
    exact = x.double() @ x.double().mT, 2 * gram.double() @ gram.double() - gram.double()
    for result, truth in zip((gram, poly), exact, strict=True):
        assert torch.equal(result, result.mT)
        error = (result - truth).abs().max() / truth.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps
        if integers:
            assert torch.equal(result, truth.to(dtype))


def test_one_triangle_of_a_product_that_is_not_symmetric(monkeypatch) -> None:
    """What is above the diagonal is a copy of what is below, inside of a tile as well."""
    config = next(c for c in PRODUCTS if c.blocks["SYMMETRIC"] and c.when["dtype"] == "fp32")
    monkeypatch.setattr(ns, "pick", everywhere(config))
    p, q = random_matrices(1, 100, 20), random_matrices(1, 20, 100)
    out = torch.empty(1, 100, 100)
    ns._products([(p, q, None, out, None)], 1.0, 0.0, symmetric=True)
    lower = (p @ q).tril()
    torch.testing.assert_close(out, lower + lower.tril(-1).mT)


@pytest.mark.parametrize("row_norm", [False, True])
def test_strided_matrices(row_norm: bool) -> None:
    """A transposed view, every other row and matrix, columns apart: the result is the copy's."""
    memory = random_matrices(4, 40, 72)
    for view in (memory.mT, memory[::2, ::2], memory[:, :, ::2], memory.transpose(0, 1)[:3]):
        wanted = newton_schulz(view.contiguous(), CLASSIC[:1], BF16, row_norm)
        assert torch.equal(check(view, CLASSIC[:1], BF16, row_norm), wanted)


@pytest.mark.parametrize("row_norm", [False, True])
def test_zeros_and_nan_stay_in_their_matrix(row_norm: bool) -> None:
    g = random_matrices(4, 20, 30)
    g[1] = 0
    g[2, 3, 4] = torch.nan
    wanted = newton_schulz(g[[0, 3]], CLASSIC, BF16, row_norm)
    got = newton_schulz(g, CLASSIC, BF16, row_norm)
    assert not got[1].any() and got[2].isnan().all()
    assert torch.equal(got[[0, 3]], wanted)


def test_a_row_of_zeros_among_others() -> None:
    g = random_matrices(1, 20, 30)
    g[0, 7] = 0
    assert not check(g, CLASSIC, FP32, row_norm=True)[0, 7].any()


def test_calls_are_alike_to_the_bit() -> None:
    g = random_matrices(1, 70, 100)
    first, second = (newton_schulz(g, CLASSIC, BF16, row_norm=True) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_without_elements(shape: tuple) -> None:
    assert newton_schulz(torch.empty(shape), CLASSIC, BF16).shape == shape


def test_touched_bytes() -> None:
    """Those of g, the partial sums, X before and after, the two products, and no others."""
    g = random_matrices(2, 70, 40)[:, :, :33]
    allocated, plain = [], torch.empty

    def empty(*args, **named) -> Tensor:
        allocated.append(plain(*args, **named))
        return allocated[-1]

    with pytest.MonkeyPatch.context() as patch, touched() as record:
        patch.setattr(torch, "empty", empty)
        newton_schulz(g, CLASSIC[:1], BF16)
    x, partials, gram, poly, after = allocated
    assert np.array_equal(record.read, addresses(g, partials, x, gram, poly))
    assert np.array_equal(record.written, addresses(partials, x, gram, poly, after))


def test_offsets_beyond_int32() -> None:
    """Three steps of 2^30 elements between matrices, rows or columns of g."""
    memory = vast(2**34).view(BF16)
    g = random_matrices(4, 4, 4, dtype=BF16)
    for dim in range(3):
        strides = [16, 64, 4]
        strides[dim] = 2**30
        far = memory.as_strided(g.shape, strides, 2**31)
        far.copy_(g)
        for row_norm in (False, True):
            wanted = newton_schulz(g, [], FP32, row_norm)
            assert torch.equal(newton_schulz(far, [], FP32, row_norm), wanted)
        far.zero_()


def launched(call: Callable[[], object]) -> list[Launch]:
    launches: list[Launch] = []
    with intercepted(launches.append):
        call()
    return launches


def test_launches_of_the_four_banks() -> None:
    """Three an iteration for all banks, or a rank's share of them; two more a bank normalise."""
    banks = [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)]
    shares = [(-(-count // 8), *sides) for count, *sides in banks]
    for shapes, row_norm in itertools.product((banks, shares), (False, True)):
        stacks = [torch.empty(shape, device="meta") for shape in shapes]
        found = launched(lambda s=stacks, r=row_norm: newton_schulz_all(s, CLASSIC, BF16, r))
        names = [launch.kernel.__name__ for launch in found]
        assert names.count("newton_schulz_product") == 15
        assert len(names) == 15 + 2 * len(banks)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_batches_of_several_shapes_are_as_each_alone(dtype: torch.dtype) -> None:
    """More than a launch takes, square, wide, tall, one of them empty, over several tiles."""
    shapes = [(1, 33, 70), (2, 70, 33), (0, 8, 8), (3, 20, 20), (1, 1, 9), (2, 140, 5), (1, 64, 64)]
    gs = [random_matrices(*shape) for shape in shapes]
    with GuardZones() as zones:
        together = newton_schulz_all([zones.input(g) for g in gs], CLASSIC[:2], dtype)
    for g, x in zip(gs, together, strict=True):
        assert torch.equal(x, newton_schulz(g, CLASSIC[:2], dtype))


def test_triangles_of_several_shapes_in_one_launch(monkeypatch) -> None:
    """Tiles on the diagonal and off it, by a row of the table that small batches do not get."""
    config = next(c for c in PRODUCTS if c.blocks["SYMMETRIC"] and c.when["dtype"] == "fp32")
    monkeypatch.setattr(ns, "pick", everywhere(config))
    gs = [random_matrices(*shape) for shape in ((1, 70, 70), (2, 33, 140), (1, 140, 96))]
    for g, x in zip(gs, newton_schulz_all(gs, CLASSIC[:2], FP32), strict=True):
        assert torch.equal(x, newton_schulz(g, CLASSIC[:2], FP32))
        check(g, CLASSIC[:2], FP32)


def rows_of_squares(g: Tensor) -> Tensor:
    return g.float().square().sum(-1)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("coefficients", [[], POLAR_EXPRESS[:2], CLASSIC])
def test_from_sums_of_squares(coefficients: list, dtype: torch.dtype) -> None:
    """Wide, tall, more rows than there are lanes, large, tiny; matrices of zeros, of NaN."""
    gs = [1e4 * random_matrices(2, 33, 70), random_matrices(1, 530, 5), random_matrices(4, 20, 30)]
    gs[2] *= torch.tensor([1e-9, 0.0, torch.nan, 1.0])[:, None, None]
    gs = [g.to(dtype) for g in gs]
    kept, sums = [g.clone() for g in gs], [rows_of_squares(g) for g in gs]
    with GuardZones() as zones:
        given = [zones.input(g) for g in gs], [zones.input(s) for s in sums]
        together = newton_schulz_all(
            given[0], coefficients, dtype, safety=1.02, squares=given[1]
        )
    assert all(torch.equal(g, k) for g, k in zip(gs[:2], kept, strict=False))
    assert not together[2][1].any() and together[2][2].isnan().all()
    for g, s, x in zip(gs, sums, together, strict=True):
        assert torch.equal(
            x.nan_to_num(), newton_schulz(g, coefficients, dtype, False, 1.02, s).nan_to_num()
        )
        whole = torch.tensor([not m.isnan().any() for m in g])
        g, x = g[whole], x[whole]
        truth = formula(g.double(), coefficients, torch.float64, safety=1.02)
        theirs = formula(g, coefficients, dtype, safety=1.02)
        error, allowed = ((t.double() - truth).norm() for t in (x, theirs))
        assert error <= 2 * allowed + torch.finfo(FP32).eps * truth.norm()


def test_sums_of_squares_by_one_triangle(monkeypatch) -> None:
    """The factor is in both mirror images."""
    config = next(c for c in PRODUCTS if c.blocks["SYMMETRIC"] and c.when["dtype"] == "fp32")
    monkeypatch.setattr(ns, "pick", everywhere(config))
    g = 7 * random_matrices(1, 70, 90)
    x = newton_schulz(g, CLASSIC[:2], FP32, squares=rows_of_squares(g))
    torch.testing.assert_close(x, newton_schulz(g, CLASSIC[:2], FP32))


def test_launches_from_sums_of_squares() -> None:
    stacks = [torch.empty(shape, device="meta") for shape in ((22, 512, 512), (11, 1536, 512))]
    sums = [torch.empty(g.shape[:-1], device="meta") for g in stacks]
    found = launched(lambda: newton_schulz_all(stacks, CLASSIC, FP32, squares=sums))
    assert [launch.kernel.__name__ for launch in found] == ["newton_schulz_product"] * 15


@pytest.mark.parametrize(
    ("shape", "symmetric"),
    [((2, 1024, 1024), True), ((1, 4096, 1024), True), ((9, 512, 512), False)],
)
def test_one_triangle_in_large_matrices(shape: tuple, symmetric: bool) -> None:
    g = torch.empty(shape, device="meta")
    for dtype in (BF16, FP32):
        found = launched(lambda dtype=dtype: newton_schulz(g, CLASSIC[:1], dtype))[-3:]
        chosen = [launch.arguments["SYMMETRIC"] for launch in found]
        assert chosen == [symmetric, symmetric, False]


@triton.jit
def triangle_kernel(out):
    row, column = ns.triangle_tile(tl.program_id(0))
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


def test_tiles_of_the_triangle() -> None:
    count = 40
    out = torch.empty(count * (count + 1) // 2, 2, dtype=torch.int32)
    triangle_kernel[(len(out),)](out)
    assert out.tolist() == [[row, column] for row in range(count) for column in range(row + 1)]
