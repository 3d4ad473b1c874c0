"""The XSA kernels in the interpreter, through their launchers, against float64."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.triton_kernels.launch import configs, intercepted
from pgolf.triton_kernels.xsa import xsa, xsa_backward

from ..ops.guards import GuardZones
from .interpreter import addresses, last_program, touched, vast

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
GROUPINGS = [(8, 4), (4, 4), (4, 1), (6, 2)]


def formula(y: Tensor, v: Tensor) -> Tensor:
    """The definition, in the dtype of its inputs."""
    n = F.normalize(v, dim=-1, eps=1e-12).repeat_interleave(y.size(2) // v.size(2), dim=2)
    return y - (y * n).sum(-1, keepdim=True) * n


def differentiated(dz: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, dy, dv) of the definition."""
    y, v = y.detach().requires_grad_(), v.detach().requires_grad_()
    z = formula(y, v)
    return z.detach(), *torch.autograd.grad(z, (y, v), dz)


def as_attention_gives(n: int, t: int, heads: int, groups: int, d: int, dtype: torch.dtype, seed=0):
    """(dz, y, v): dz and y with heads outermost in memory, v a slice of packed q, k and v."""
    g = torch.Generator().manual_seed(seed)
    dz = torch.randn(n, heads, t, d, generator=g).to(dtype).transpose(1, 2)
    y = torch.randn(n, heads, t, d, generator=g).to(dtype).transpose(1, 2)
    qkv = torch.randn(n, t, heads + 2 * groups, d, generator=g).to(dtype)
    return dz, y, qkv[:, :, heads + groups :]


def check(dz: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both kernels in guard zones, against float64 with torch in the same dtype as the measure."""
    with GuardZones() as zones:
        dz, y, v = map(zones.input, (dz, y, v))
        z = xsa(y, v)
        dy, dv = xsa_backward(dz, y, v)
    got = z, dy, dv
    exact = differentiated(dz.double(), y.double(), v.double())
    usual = differentiated(dz, y, v)
    names, factors = ("z", "dy", "dv"), (2, 3, 3)
    for name, k, ours, theirs, truth in zip(names, factors, got, usual, exact, strict=True):
        assert ours.is_contiguous() and ours.dtype == y.dtype and ours.shape == truth.shape
        floor = torch.finfo(y.dtype).eps * truth.abs().max()
        error, allowed = (ours - truth).abs().max(), k * (theirs - truth).abs().max() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), GROUPINGS)
@pytest.mark.parametrize(("n", "t", "d"), [(2, 1, 32), (2, 7, 128), (1, 33, 64), (3, 1, 80)])
def test_against_float64(
    n: int, t: int, d: int, heads: int, groups: int, dtype: torch.dtype
) -> None:
    check(*as_attention_gives(n, t, heads, groups, d, dtype, seed=t))


@pytest.mark.parametrize("d", [2, 3, 20, 256])
def test_other_head_dims(d: int) -> None:
    check(*as_attention_gives(1, 5, 4, 2, d, FP32))


def test_in_one_dimension_nothing_is_left() -> None:
    dz, y, v = as_attention_gives(1, 5, 4, 2, 1, FP32)
    v = v.sign() * (1 + v.abs())
    for zero in (xsa(y, v), *xsa_backward(dz, y, v)):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["xsa_forward_kernel", "xsa_backward_kernel"])
def test_every_configuration(kernel: str) -> None:
    for row, config in enumerate(configs()[kernel]):
        sizes = itertools.product([32, 64, 128, 256], DTYPES)
        d, dtype = next(s for s in sizes if config.fits({"block_bytes": s[0] * s[1].itemsize}))
        used = []

        def run(launch, used=used) -> None:
            used.append(launch)
            launch()

        t = config.blocks["BLOCK_PAIRS"] + 1  # two groups: two full blocks and a ragged one
        with intercepted(run):
            check(*as_attention_gives(1, t, 2, 2, d, dtype, seed=row))
        mine = [launch for launch in used if launch.kernel.__name__ == kernel]
        assert [(launch.config, launch.grid) for launch in mine] == [(config, (3,))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3), (1, 0, 2, 3)])
def test_strides(order: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any order of the first three dimensions in memory, each tensor its own, with gaps."""
    g = torch.Generator().manual_seed(3)

    def laid_out(*shape: int, order: tuple[int, ...], gap: int) -> Tensor:
        inner = [shape[dim] for dim in order]
        memory = torch.randn(*inner[:-1], inner[-1] + gap, generator=g).to(dtype)
        return memory[..., : inner[-1]].permute([order.index(dim) for dim in range(4)])

    y = laid_out(2, 5, 4, 32, order=order, gap=8)
    v = laid_out(2, 5, 2, 32, order=(0, 2, 1, 3), gap=3)
    dz = laid_out(2, 5, 4, 32, order=(2, 0, 1, 3), gap=1)
    check(dz, y, v)
    check(dz[:1].expand_as(y), y, v[:, :1].expand_as(v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.5e-12, 0.999e-12, 1.001e-12, 2e-12, 1e-6, 1e6])
def test_norms_of_v(norm: float, dtype: torch.dtype) -> None:
    dz, y, v = as_attention_gives(1, 5, 4, 2, 32, FP32)
    v = F.normalize(v, dim=-1) * norm
    check(dz.to(dtype), y.to(dtype), v.to(dtype))


@pytest.mark.parametrize("up", [False, True])
def test_the_two_float32_norms_around_the_floor(up: bool) -> None:
    """The nearest number to 1e-12 is below it, the next one above."""
    dz, y, v = as_attention_gives(1, 5, 4, 2, 32, FP32)
    v = torch.zeros_like(v)
    nearest = torch.tensor(1e-12)
    v[..., 3] = torch.nextafter(nearest, torch.tensor(1.0)) if up else nearest
    assert (v.double().norm(dim=-1) >= 1e-12).all() == up
    check(dz, y, v)


def test_a_zero_value_removes_nothing() -> None:
    dz, y, v = as_attention_gives(1, 5, 4, 2, 32, BF16)
    v[0, 2, 1] = 0
    z, dy, dv = check(dz, y, v)
    assert torch.equal(z[0, 2, 2:], y[0, 2, 2:]) and torch.equal(dy[0, 2, 2:], dz[0, 2, 2:])
    assert dv[0, 2, 1].eq(0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_group(which: int, bad: float, dtype: torch.dtype) -> None:
    inputs = [x.contiguous() for x in as_attention_gives(1, 5, 4, 2, 32, dtype)]
    inputs[which][0, 2, 1, 7] = bad
    got = (xsa(*inputs[1:]), *xsa_backward(*inputs))
    wanted = differentiated(*inputs)
    assert not all(x.isfinite().all() for x in wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_touched_bytes_are_inputs_and_outputs(dtype: torch.dtype) -> None:
    dz, y, v = as_attention_gives(2, 7, 6, 2, 80, dtype)
    with touched() as t:
        z = xsa(y, v)
    assert np.array_equal(t.read, addresses(y, v)) and np.array_equal(t.written, addresses(z))
    with touched() as t:
        dy, dv = xsa_backward(dz, y, v)
    assert np.array_equal(t.read, addresses(dz, y, v))
    assert np.array_equal(t.written, addresses(dy, dv))


def test_two_calls_agree_to_the_bit() -> None:
    dz, y, v = as_attention_gives(2, 7, 8, 4, 64, BF16)
    for first, second in zip(check(dz, y, v), check(dz, y, v), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("n", "t"), [(0, 3), (2, 0)])
def test_no_tokens(n: int, t: int) -> None:
    dz, y, v = as_attention_gives(n, t, 4, 2, 32, FP32)
    assert xsa(y, v).shape == y.shape
    assert [g.shape for g in xsa_backward(dz, y, v)] == [y.shape, v.shape]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim: int) -> None:
    """Three steps of 2^30 elements along one dimension."""
    memory = vast(2**34).view(BF16)
    inputs = as_attention_gives(4, 4, 4, 4, 32, BF16)
    far = []
    for start, x in enumerate(inputs):
        strides = [128, 512, 32, 1]
        strides[dim] = 2**30
        far.append(memory.as_strided(x.shape, strides, 2**31 + 4096 * start))
        far[-1].copy_(x)
    got = (xsa(*far[1:]), *xsa_backward(*far))
    wanted = (xsa(*inputs[1:]), *xsa_backward(*inputs))
    assert all(map(torch.equal, got, wanted))


def test_results_beyond_int32(monkeypatch) -> None:
    """The end of results of 2^31 + 4096 elements, whose inputs repeat a little memory."""
    inputs = as_attention_gives(1, 32, 1, 1, 128, BF16)
    wanted = (xsa(*inputs[1:]), *xsa_backward(*inputs))
    repeated = [x.expand(2**19 + 1, -1, -1, -1) for x in inputs]
    starts = itertools.count(2**31, 4096)  # further apart than what one program writes
    memory = vast(2**33 + 2**20).view(BF16)

    def empty(shape: tuple[int, ...], **_) -> Tensor:
        strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1]
        return memory.as_strided(shape, strides, next(starts))

    monkeypatch.setattr(torch, "empty", empty)
    with intercepted(last_program):
        got = (xsa(*repeated[1:]), *xsa_backward(*repeated))
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours[-1, -8:], theirs[0, -8:])
