"""The fake-quantisation kernels in the interpreter, bit for bit against the grid's definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf.ops.int_grid import row_codes, row_step
from pgolf.triton_kernels.fake_quant import fake_quant, fake_quant_backward
from pgolf.triton_kernels.launch import configs, intercepted

from ..ops.guards import GuardZones
from .interpreter import addresses, last_program, touched, vast

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
FORWARD, BACKWARD = "fake_quant_forward_kernel", "fake_quant_backward_kernel"
GRIDS = [(1, False), (4, False), (1, True), (4, True), (3, False)]  # multiple, full_range


def defined(w: Tensor, clip_factor: Tensor, bits: int, floor: float, multiple: int, full: bool):
    """(value, scale, whether each gradient passes) in float32, from the export's functions."""
    w = w.float()
    amax = w.abs().amax(dim=1)
    scale = row_step(amax.where(amax.isfinite(), torch.nan) * clip_factor, bits, floor)
    value = row_codes(w, scale, bits, multiple, full) * scale[:, None]
    codes = torch.round(w / scale[:, None])
    if multiple != 1:
        codes = torch.round(codes / multiple) * multiple
    qmax = 2 ** (bits - 1) - 1
    return value, scale, (codes >= -qmax - full) & (codes <= qmax)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equal with the sign of zero; any NaN equals any other."""
    signs = got.isnan() | (got.signbit() == wanted.signbit())
    equal = torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True)
    return got.dtype == wanted.dtype and equal and bool(signs.all())


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(w, clip_factor): rows of very different sizes, and clips that cut something off."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 3, (rows, 1), generator=g)
    clip_factor = torch.rand(rows, generator=g) * 0.6 + 0.4
    return (torch.randn(rows, columns, generator=g) * sizes).to(dtype), clip_factor


def check(
    w: Tensor,
    clip_factor: Tensor,
    bits: int = 6,
    on: float = 1.0,
    floor: float = 0.0,
    multiple: int = 1,
    full: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both kernels in guard zones against the definition; (value, scale, dw)."""
    dout = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.dtype)
    with GuardZones() as zones:
        w, clip_factor, dout = map(zones.input, (w, clip_factor, dout))
        k, switch = zones.input(torch.tensor(float(bits))), zones.input(torch.tensor(on))
        value, scale = fake_quant(w, clip_factor, k, switch, floor, multiple, full)
        steps = zones.input(scale)
        dw = fake_quant_backward(dout, w, steps, k, switch, multiple, full)
    grid, wanted_scale, passes = defined(w, clip_factor, bits, floor, multiple, full)
    assert same_bits(scale, wanted_scale)
    assert same_bits(value, grid.to(w.dtype) if on else w)
    assert same_bits(dw, torch.where(passes, dout, 0.0) if on else dout)
    assert value.is_contiguous() and dw.is_contiguous()
    return value, scale, dw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize(("multiple", "full"), GRIDS)
def test_bit_for_bit(multiple: int, full: bool, bits: int, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (3, 7), (9, 130)):
        check(*weights(rows, columns, dtype, seed=bits), bits, 1.0, 0.0, multiple, full)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floor", [1e-3, 1.0])
def test_floor(floor: float, dtype: torch.dtype) -> None:
    check(*weights(9, 70, dtype), floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_off_changes_nothing(dtype: torch.dtype) -> None:
    value, _, dw = check(*weights(5, 70, dtype), on=0.0, multiple=4)
    assert same_bits(value, weights(5, 70, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", range(len(configs()[FORWARD])))
def test_every_configuration(row: int, dtype: torch.dtype) -> None:
    config = configs()[FORWARD][row]
    low, high = config.when["columns"]
    used = []

    def run(launch) -> None:
        used.append((launch.kernel.__name__, launch.config))
        launch()

    sizes = {low or 1, high - 3, high} if high else {low, 3 * config.blocks["BLOCK"] + 5000}
    with intercepted(run):
        for columns in sorted(sizes):
            check(*weights(2, columns, dtype, seed=columns))
    assert [c for name, c in used if name == FORWARD] == [config] * len(sizes)
    assert {c.reason for name, c in used if name == BACKWARD} == {configs()[BACKWARD][0].reason}


def test_the_backward_has_one_configuration() -> None:
    assert len(configs()[BACKWARD]) == 1


@pytest.mark.parametrize("multiple", [1, 4])
def test_ties_go_to_the_even_code(multiple: int) -> None:
    """Weights half-way between codes: the row's largest is qmax steps of a quarter."""
    halves = torch.arange(-62.0, 63.0)[None] / 2
    value, scale, _ = check(torch.cat([halves, -halves]) / 4, torch.ones(2), multiple=multiple)
    assert scale.tolist() == [0.25, 0.25]
    wanted = halves.round()
    if multiple == 4:
        wanted = ((wanted / 4).round() * 4).clamp(-31, 31)
    assert torch.equal(value[0] * 4, wanted[0])


def test_ties_of_steps_without_an_exact_reciprocal() -> None:
    """w / s is a tie where it is rounded correctly; times 1 / s, it often is not."""
    steps = 1 + torch.arange(1.0, 1024.0, 41)[:, None] / 1024
    codes = torch.arange(-61.0, 63.0) / 2  # the last one, 31, is the largest
    value, scale, _ = check(codes * steps, torch.ones(25))
    assert torch.equal(scale[:, None], steps)
    assert torch.equal(value, codes.round() * steps)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_far_beyond_the_clip(dtype: torch.dtype) -> None:
    """Codes from 2^21 to infinity before they are clamped."""
    w = torch.tensor([[0.125, 0.3, -0.5, 1.0, 3.0, -7e3, 1e20, -3e38]]).to(dtype)
    for full in (False, True):
        check(w, torch.zeros(1), full=full, bits=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_that_fp16_holds_badly(dtype: torch.dtype) -> None:
    """Steps below the smallest, subnormal, on ties, just above the normal limit, too large."""
    ties = torch.arange(1, 64, 5) + 0.5  # in units of the smallest step
    powers = [*range(-30, -12), -1, 0, 15, 16, 19]
    steps = torch.cat([ties * 2.0**-24, 2.0 ** torch.tensor(powers), torch.rand(8) * 1e-4])
    steps = torch.cat([steps, (2049 + 2 * torch.arange(4.0)) * 2.0**-20, torch.tensor([65519.9])])
    check((steps * 7)[:, None].to(dtype), torch.ones(len(steps)), bits=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_keep_their_sign(dtype: torch.dtype) -> None:
    w = torch.tensor([[0.0, -0.0, 0.0], [1.0, -0.0, -1e-3]]).to(dtype)
    value, scale, _ = check(w, torch.ones(2))
    assert value[:, 1:].signbit().tolist() == [[True, False], [True, True]]
    assert scale[0] == 2.0**-24


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    w, clip_factor = weights(6, 700, dtype)
    w[1, 600], w[2, 5], w[3, 699], w[3, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    clip_factor[4] = torch.nan
    value, scale, _ = check(w, clip_factor)
    assert scale.isnan().tolist() == [False, True, True, True, True, False]
    assert value.isnan().all(1).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(  # (beyond 16384 columns a row has several blocks)
    ("bits", "columns"),
    [*((b, 70) for b in (3.0, 9.0, 5.5, 0.0, -6.0, 100.0, torch.nan, torch.inf)), (9.0, 16400)],
)
def test_unknown_bits_give_nan(bits: float, columns: int) -> None:
    w, clip_factor = weights(2, columns, BF16)
    for on in (0.0, 1.0):
        scalars = torch.tensor(bits), torch.tensor(on)
        value, scale = fake_quant(w, clip_factor, *scalars, 0.0, 1, False)
        dw = fake_quant_backward(w, w, clip_factor, *scalars, 1, False)
        assert value.isnan().all() and scale.isnan().all() and dw.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    bank = torch.stack([weights(7, 90, dtype, seed)[0] for seed in range(3)], dim=1)
    w, dout, clip_factor = bank[:, 1, 3:80], bank[:, 2, :77], weights(7, 77, dtype)[1]
    check(w, clip_factor)
    check(w[:1].expand(7, -1), clip_factor)
    scalars = torch.tensor(5.0), torch.tensor(1.0)
    scale = fake_quant(w, clip_factor, *scalars, 0.0, 1, False)[1]
    dw = fake_quant_backward(dout, w, scale, *scalars, 1, False)
    passes = defined(w, clip_factor, 5, 0.0, 1, False)[2]
    assert torch.equal(dw, torch.where(passes, dout, 0.0))


@pytest.mark.parametrize(("columns", "dtype"), [(77, FP32), (77, BF16), (16400, BF16)])
def test_touched_bytes_are_inputs_and_outputs(columns: int, dtype: torch.dtype) -> None:
    (w, clip_factor), scalars = weights(3, columns, dtype), (torch.tensor(6.0), torch.tensor(1.0))
    with touched() as t:
        value, scale = fake_quant(w, clip_factor, *scalars, 0.0, 1, False)
    assert np.array_equal(t.read, addresses(w, clip_factor, *scalars))
    assert np.array_equal(t.written, addresses(value, scale))
    with touched() as t:
        dw = fake_quant_backward(value, w, scale, *scalars, 1, False)
    assert np.array_equal(t.read, addresses(value, w, scale, *scalars))
    assert np.array_equal(t.written, addresses(dw))


def test_two_calls_agree_to_the_bit() -> None:
    for first, second in zip(*(check(*weights(5, 600, BF16)) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_no_rows() -> None:
    w, clip_factor = weights(0, 64, FP32)
    scalars = torch.tensor(6.0), torch.tensor(1.0)
    value, scale = fake_quant(w, clip_factor, *scalars, 0.0, 1, False)
    dw = fake_quant_backward(w, w, scale, *scalars, 1, False)
    assert value.shape == dw.shape == (0, 64) and scale.shape == (0,)


def test_offsets_beyond_int32() -> None:
    """Rows 2^30 elements apart."""
    w, clip_factor = weights(4, 64, BF16)
    memory = vast(2**34).view(BF16)
    far, dout = (memory.as_strided((4, 64), (2**30, 1), 2**31 + at) for at in (0, 4096))
    far.copy_(w)
    dout.copy_(-w)
    scalars = torch.tensor(4.0), torch.tensor(1.0)
    value, scale = fake_quant(w, clip_factor, *scalars, 0.0, 1, False)
    far_value, far_scale = fake_quant(far, clip_factor, *scalars, 0.0, 1, False)
    assert torch.equal(far_value, value) and torch.equal(far_scale, scale)
    dw = fake_quant_backward(dout, far, scale, *scalars, 1, False)
    assert torch.equal(dw, fake_quant_backward(-w, w, scale, *scalars, 1, False))


@pytest.mark.parametrize("columns", [2**12, 2**15])
def test_results_beyond_int32(columns: int, monkeypatch) -> None:
    """The end of results of more than 2^31 elements, from one row that repeats."""
    w, clip_factor = weights(1, columns, BF16)
    scalars = torch.tensor(4.0), torch.tensor(1.0)
    value, scale = fake_quant(w, clip_factor, *scalars, 0.0, 1, False)
    dw = fake_quant_backward(-w, w, scale, *scalars, 1, False)
    rows = 2**31 // columns + 1
    memory, plain = vast(2**33 + 2**20).view(BF16), torch.empty

    def empty(shape: tuple[int, ...], **named) -> Tensor:
        if len(shape) == 1:
            return plain(shape, **named)
        return memory.as_strided(shape, (columns, 1), 2**31)

    many, dout = w.expand(rows, -1), (-w).expand(rows, -1)
    clips, scales = clip_factor.repeat(rows), scale.repeat(rows)
    monkeypatch.setattr(torch, "empty", empty)
    with intercepted(last_program):
        last = fake_quant(many, clips, *scalars, 0.0, 1, False)[0][-1]
        assert torch.equal(last, value[0])
        last.zero_()
        last = fake_quant_backward(dout, many, scales, *scalars, 1, False)[-1]
        assert torch.equal(last[-512:], dw[0, -512:])
