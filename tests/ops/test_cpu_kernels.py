"""pgolf._C's CPU kernels by pointer: against float64 formulas, and at their edges.

Errors follow one rule: err(kernel) <= k * err(torch in the same dtype) + floor, both against
float64, with k = 2 forward and 3 backward. All runs again for every instruction set of this CPU.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.int_grid import row_codes, row_step
from pgolf.ops.testing import same_bits

from . import cpu_kernels as call
from .cpu_kernels import DTYPES, randn

ISAS = ("avx512", "avx2", "plain")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
NAN, INF = float("nan"), float("inf")


def check_error(
    kernel: Tensor, plain: Tensor, truth: Tensor, k: int, terms: Tensor | None = None
) -> None:
    """The error rule; the floor is a few roundings of the largest result, or of the largest terms
    where they may cancel. (In float64 plain torch is the truth, and rounds itself.)"""
    assert kernel.dtype is plain.dtype and kernel.shape == truth.shape
    roundings = {torch.bfloat16: 1, torch.float32: 4, torch.float64: 32}[plain.dtype]
    largest = (truth if terms is None else terms).abs().max()
    floor = roundings * torch.finfo(plain.dtype).eps * largest
    worst = (kernel.double() - truth).abs().max()
    assert worst <= k * (plain.double() - truth).abs().max() + floor


# ---- xsa


def xsa_formula(y: Tensor, v: Tensor) -> Tensor:
    n, t, h, d = y.shape
    y = y.reshape(n, t, v.size(2), -1, d)
    direction = F.normalize(v, dim=-1, eps=1e-12).unsqueeze(3)
    return (y - (y * direction).sum(-1, keepdim=True) * direction).reshape(n, t, h, d)


def xsa_gradients(dz: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    y, v = y.detach().requires_grad_(), v.detach().requires_grad_()
    return torch.autograd.grad(xsa_formula(y, v), (y, v), dz)


def xsa_terms_of_dv(dz: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Of what size the terms are that a query head adds to dv."""
    norm = v.norm(dim=-1, keepdim=True).repeat_interleave(y.size(2) // v.size(2), 2)
    return dz.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True) / norm


def check_xsa(kernels, dz: Tensor, y: Tensor, v: Tensor) -> None:
    exact = dz.double(), y.double(), v.double()
    check_error(call.xsa(kernels, y, v), xsa_formula(y, v), xsa_formula(*exact[1:]), 2, y)
    dy, dv = call.xsa_backward(kernels, dz, y, v)
    plain, truth = xsa_gradients(dz, y, v), xsa_gradients(*exact)
    check_error(dy, plain[0], truth[0], 3, dz)
    check_error(dv, plain[1], truth[1], 3, xsa_terms_of_dv(*exact))


@every_dtype
@pytest.mark.parametrize(("rows", "h", "g"), [(1, 8, 4), (3, 3, 3), (33, 6, 1)])
def test_xsa(kernels, dtype, rows, h, g):
    for d in (1, 8, 32, 64, 72, 128):
        y, dz = randn(1, rows, h, d, dtype=dtype), randn(1, rows, h, d, dtype=dtype, seed=1)
        check_xsa(kernels, dz, y, randn(1, rows, g, d, dtype=dtype, seed=2))


@every_dtype
@pytest.mark.parametrize("d", [24, 64])
def test_xsa_with_any_strides(kernels, dtype, d):
    packed = randn(2, 5, 12, d + 3, dtype=dtype)[..., 1 : d + 1]
    y, v = packed[:, :, :8], packed[:, :, 8:12]
    dz = randn(2, 8, 5, d, dtype=dtype).transpose(1, 2)
    check_xsa(kernels, dz, y, v)
    check_xsa(kernels, dz[:, :1].expand(2, 5, 8, d), y, v[:, :, :1].expand(2, 5, 4, d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-13, 0.99e-12, 1.01e-12, 1e-9])
def test_xsa_near_the_floor_of_the_norm(kernels, dtype, size):
    """Below 1e-12 the norm is a constant, above it has a gradient; at it, by torch's version."""
    y, dz = randn(1, 7, 2, 8, dtype=dtype), randn(1, 7, 2, 8, dtype=dtype, seed=1)
    v = torch.zeros(1, 7, 1, 8, dtype=dtype)
    v[..., 3] = size
    for result, plain in zip(
        (call.xsa(kernels, y, v), *call.xsa_backward(kernels, dz, y, v)),
        (xsa_formula(y, v), *xsa_gradients(dz, y, v)),
        strict=True,
    ):
        assert torch.isfinite(result).all()
        torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_xsa_rounds_ties_to_even(kernels):
    """With v = (1, 1, 0 ...) z's first element is (y[0] - y[1]) / 2: halfway between two bf16."""
    y = torch.zeros(1, 64, 1, 16, dtype=torch.bfloat16)
    y[0, :, 0, 0], y[0, :, 0, 1] = 2.0, -(2 * torch.arange(64) + 1) * 2.0**-7
    v = torch.tensor([1.0, 1.0] + [0.0] * 14, dtype=torch.bfloat16).expand(1, 64, 1, 16)
    expected = xsa_formula(y.double(), v.double())
    assert (expected.float().view(torch.int32)[0, :, 0, 0] & 0xFFFF == 0x8000).all(), "ties"
    # (float64's own norm is a little off: to fp32, where the ties are exact, and then to bf16.)
    assert same_bits(call.xsa(kernels, y, v), expected.float().bfloat16())


@every_dtype
def test_xsa_nan_stays_where_it_was(kernels, dtype):
    y, v, dz = (randn(1, 3, h, 40, dtype=dtype, seed=h) for h in (4, 2, 4))
    y[0, 1, 0, 39] = NAN
    v[0, 2, 1, 0] = INF
    touched = torch.zeros(1, 3, 4, dtype=torch.bool)
    touched[0, 1, 0] = touched[0, 2, 2:] = True
    z = call.xsa(kernels, y, v)
    assert torch.equal(z.isnan().any(-1), touched)
    dy, dv = call.xsa_backward(kernels, dz, y, v)
    assert dv[0, 1, 0].isnan().all() and dv[0, 2, 1].isnan().any()
    assert torch.isfinite(dv[0, 0]).all() and torch.isfinite(dv[0, 1, 1]).all()
    assert torch.isfinite(dy[0, 1]).all(), "y is not in dy"


# ---- leaky_relu2


def leaky_formula(pre: Tensor, slope: float, rstd: Tensor | None) -> Tensor:
    pre = pre if rstd is None else pre * rstd[:, None].to(pre.dtype)
    return (F.leaky_relu(pre, slope) if slope else F.relu(pre)).square()


def leaky_gradient(dpost: Tensor, pre: Tensor, slope: float, rstd: Tensor | None) -> Tensor:
    pre = pre.detach().requires_grad_()
    return torch.autograd.grad(leaky_formula(pre, slope, rstd), pre, dpost)[0]


def unpacked(bits: Tensor, cols: int) -> Tensor:
    every = (bits[..., None] >> torch.arange(32)) & 1
    every = every.flatten(1)
    assert not every[:, cols:].any(), "unused bits are 0"
    return every[:, :cols].bool()


@every_dtype
@pytest.mark.parametrize(
    ("rows", "slope", "scaled"),
    [(1, 0.0, False), (3, 0.5, True), (33, 1.0, False), (33, 0.3, True)],
)
def test_leaky_relu2(kernels, dtype, rows, slope, scaled):
    for cols in (1, 31, 32, 33, 100):
        check_leaky_relu2(kernels, dtype, cols, rows, slope, scaled)


def check_leaky_relu2(kernels, dtype, cols, rows, slope, scaled):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    pre, dpost = randn(rows, cols, dtype=dtype), randn(rows, cols, dtype=dtype, seed=1)
    pre[0, 0], pre[-1, -1] = 0.0, -0.0
    rstd = randn(rows, dtype=wide).abs() + 0.1 if scaled else None
    exact = rstd.double() if scaled else None
    post, bits = call.leaky_relu2(kernels, pre, slope, rstd)
    assert torch.equal(unpacked(bits, cols), pre > 0)
    truth = leaky_formula(pre.double(), slope, exact)
    check_error(post, leaky_formula(pre, slope, rstd), truth, 2)

    dpre = call.leaky_relu2_backward(kernels, dpost, post, bits, slope, rstd)
    truth = leaky_gradient(dpost.double(), pre.double(), slope, exact)
    check_error(dpre, leaky_gradient(dpost, pre, slope, rstd), truth, 3)

    again = call.leaky_relu2(kernels, pre, slope, rstd, in_place=True)
    assert same_bits(again[0], post) and same_bits(again[1], bits)
    again = call.leaky_relu2_backward(kernels, dpost, post, bits, slope, rstd, in_place=True)
    assert same_bits(again, dpre)


@every_dtype
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_leaky_relu2_of_special_values(kernels, dtype, slope):
    pre = torch.tensor([[NAN, INF, -INF, 0.0, -0.0, 1e-30, -1e-30, 3.0] * 5], dtype=dtype)
    post, bits = call.leaky_relu2(kernels, pre, slope)
    torch.testing.assert_close(post, leaky_formula(pre, slope, None), equal_nan=True)
    assert torch.equal(unpacked(bits, 40), pre > 0)
    dpre = call.leaky_relu2_backward(kernels, torch.ones_like(pre), post, bits, slope)
    expected = leaky_gradient(torch.ones_like(pre), pre, slope, None)
    # (torch's relu passes no gradient at NaN.)
    expected = torch.where(pre.isnan(), NAN, expected)
    torch.testing.assert_close(dpre, expected, equal_nan=True, atol=1e-15, rtol=1e-2)


# ---- newton_schulz


def normalize_formula(g: Tensor, row_norm: bool, safety: float) -> Tensor:
    if row_norm:
        g = g / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min(1e-7)
    return g / (safety * torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 33), (3, 33, 100)])
@pytest.mark.parametrize(("row_norm", "safety"), [(False, 1.0), (True, 1.02)])
def test_newton_schulz_normalize(kernels, dtype, shape, row_norm, safety):
    b, r, c = shape
    strided = randn(r, b, c + 2, dtype=dtype)[:, :, 1 : c + 1].transpose(0, 1)
    for g in (randn(*shape, dtype=dtype), strided):
        truth = normalize_formula(g.double(), row_norm, safety)
        for to in DTYPES:
            x = call.normalize(kernels, g, to, row_norm, safety)
            check_error(x, truth.to(to), truth, 2)


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e-7, 1e30, 1e38])
def test_newton_schulz_normalize_over_the_range_of_floats(kernels, size, row_norm):
    g = randn(2, 5, 64).clamp(-3, 3) * size
    assert torch.isfinite(g).all()
    x = call.normalize(kernels, g, torch.float32, row_norm)
    truth = normalize_formula(g.double(), row_norm, 1.0)
    torch.testing.assert_close(x.double(), truth, rtol=1e-6, atol=1e-45)
    g[0, 0, 0] = NAN
    x = call.normalize(kernels, g, torch.bfloat16, row_norm)
    assert x[0].isnan().all() and torch.isfinite(x[1]).all()


# ---- fake_quant


def quant_formula(w: Tensor, factor: Tensor, bits: int, floor: float, multiple: int, full: bool):
    """(value, step, whether a code is not clamped), in fp32 or float64."""
    w = w if w.dtype is torch.float64 else w.float()
    amax = w.abs().amax(1)
    step = row_step(amax.where(amax.isfinite(), NAN) * factor, bits, floor)
    codes = row_codes(w, step, bits, multiple, full)
    unclamped = torch.round(w / step[:, None])
    if multiple != 1:
        unclamped = torch.round(unclamped / multiple) * multiple
    return codes * step[:, None], step, codes == unclamped


@every_dtype
@pytest.mark.parametrize(
    ("floor", "multiple", "full", "cut"),
    [(0.0, 1, False, 1.0), (1.0, 1, True, 0.5), (0.0, 4, False, 0.9), (0.01, 3, True, 0.7)],
)
def test_fake_quant_is_the_reference_bit_for_bit(kernels, dtype, floor, multiple, full, cut):
    shapes = ((1, 1), (3, 72), (33, 33))
    for bits, (rows, cols) in itertools.product(range(4, 9), shapes):
        w = (randn(rows, cols + 5, dtype=torch.float64) * 0.05).to(dtype)[:, 2 : cols + 2]
        w[0], w[-1, :2] = 0.0, torch.tensor([-1e-3, 0.02], dtype=dtype)[:cols]
        factor = torch.full((rows,), cut)
        value, step, kept = quant_formula(w, factor, bits, floor, multiple, full)
        grid = (bits, True, floor, multiple, full)
        result, stored = call.fake_quant(kernels, w, factor, *grid)
        assert same_bits(result, value.to(dtype)) and same_bits(stored, step)
        off, stored = call.fake_quant(kernels, w, factor, bits, False, floor, multiple, full)
        assert same_bits(off, w) and same_bits(stored, step)

        dout = randn(rows, 2 * cols, dtype=dtype, seed=1)[:, :cols]
        dw = call.fake_quant_backward(kernels, dout, w, step, bits, True, multiple, full)
        assert same_bits(dw, torch.where(kept, dout, 0))
        dw = call.fake_quant_backward(kernels, dout, w, step, bits, False, multiple, full)
        assert same_bits(dw, dout)


def test_fake_quant_on_ties_and_in_every_binade(kernels):
    """Steps from below the least fp16 number to above the largest, weights between two codes."""
    clips = torch.tensor([[2.0**e * m] for e in range(-40, 40) for m in (1.0, 1.3, 1.9990234)])
    w = clips * (torch.arange(-31, 32) / 31)
    w = torch.cat([w, clips * (torch.arange(-31, 31) + 0.5) / 31, clips * 31.0], 1)
    for factor in (torch.ones(len(w)), torch.full((len(w),), 1 / 31)):
        value, step, _ = quant_formula(w, factor, 6, 0.0, 1, False)
        result, stored = call.fake_quant(kernels, w, factor, 6)
        assert same_bits(result, value) and same_bits(stored, step)


def test_fake_quant_steps_round_ties_to_even(kernels):
    """Clips of 7 steps, each step halfway between two fp16 numbers; normal and subnormal ones."""
    odd = 2 * torch.arange(1024) + 1.0
    steps = torch.cat([1 + odd * 2.0**-11, odd * 2.0**-25])
    w = (7 * steps[:, None]).expand(-1, 3).contiguous()
    assert torch.equal(w[:, 0].double(), 7 * steps.double()), "exact"
    _, stored = call.fake_quant(kernels, w, torch.ones(len(w)), 4)
    assert same_bits(stored, steps.half().float().clamp_min(2.0**-24))


@every_dtype
def test_fake_quant_of_special_values(kernels, dtype):
    w = randn(6, 40, dtype=dtype)
    w[1, 39], w[2, 0], w[3, 5], w[4] = NAN, INF, -INF, 0.0
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, NAN])
    value, step, kept = quant_formula(w, factor, 5, 0.0, 1, False)
    result, stored = call.fake_quant(kernels, w, factor, 5)
    torch.testing.assert_close(result, value.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(stored, step, rtol=0, atol=0, equal_nan=True)
    assert result[1:4].isnan().all() and torch.isfinite(result[[0, 4]]).all()
    dw = call.fake_quant_backward(kernels, torch.ones_like(w), w, step, 5)
    assert torch.equal(dw, kept.to(dtype))


# ---- large outputs and instruction sets


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0), (torch.float64, 1)],
)
def test_large_outputs(kernels, dtype, offset):
    """Rows of whole lines are stored around the caches; the halves, which are smaller, are not."""
    tokens, width = 5000 // dtype.itemsize, 2048
    halves = slice(0, tokens // 2), slice(tokens // 2, tokens)
    y, dz = randn(tokens, width, dtype=dtype), randn(tokens, width, dtype=dtype, seed=1)
    post, bits = call.leaky_relu2(kernels, y, 0.5, threads=2, offset=offset)
    dpre = call.leaky_relu2_backward(kernels, dz, post, bits, 0.5, threads=2, offset=offset)
    for half in halves:
        again = call.leaky_relu2(kernels, y[half], 0.5)
        assert same_bits(post[half], again[0]) and same_bits(bits[half], again[1])
        again = call.leaky_relu2_backward(kernels, dz[half], post[half], bits[half], 0.5)
        assert same_bits(dpre[half], again)
    y, dz = y.view(1, tokens, 16, 128), dz.view(1, tokens, 16, 128)
    v = randn(1, tokens, 16, 128, dtype=dtype, seed=2)
    z = call.xsa(kernels, y, v, threads=2, offset=offset)
    dy, dv = call.xsa_backward(kernels, dz, y, v, threads=2, offset=offset)
    for half in halves:
        parts = [x[:, half] for x in (dz, y, v)]
        assert same_bits(z[:, half], call.xsa(kernels, *parts[1:]))
        again = call.xsa_backward(kernels, *parts)
        assert same_bits(dy[:, half], again[0]) and same_bits(dv[:, half], again[1])


# "avx2 0123abcd...": this process runs that instruction set, and another's results had that digest.
COMPARED = os.environ.get("PGOLF_TEST_ISA_AND_DIGEST", "")


@pytest.mark.skipif(not COMPARED, reason="nothing to compare with")
def test_results_are_those_of_the_other_instruction_set(kernels):
    assert COMPARED.split() == [kernels.cpu_isa(), call.digest(call.samples(kernels, 2))]


@pytest.mark.skipif(bool(COMPARED), reason="runs in the process of one")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(kernels, isa):
    """This file again in a process with another instruction set, whose bits have to be the same."""
    if isa == kernels.cpu_isa():
        return  # this process
    compared = f"{isa} {call.digest(call.samples(kernels, 1))}"
    env = os.environ | {"PGOLF_CPU_ISA": isa, "PGOLF_TEST_ISA_AND_DIGEST": compared}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if f"PGOLF_CPU_ISA is {isa}, which this CPU does not have" in result.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert result.returncode == 0, result.stdout[-4000:]
