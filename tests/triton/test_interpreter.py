"""The repaired interpreter against torch, and that nothing here passes without the repair."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.guards import GuardZones
from .interpreter import addresses, decode, encode, repair, touched

SIZE = 64
BF16 = torch.bfloat16


@triton.jit
def cast_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def add_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def constant_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i) * 1.7 - 0.3)


@triton.jit
def compare_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, tl.where((a < b) & (a != b), a, -b).to(tl.float32))


@triton.jit
def scalar_compare_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x + i)
    tl.store(out + i, ((a < 0.0) | (tl.load(x) != 0.0)).to(tl.int32))


@triton.jit
def maximum_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, tl.maximum(a, b) + tl.minimum(tl.abs(a), tl.abs(b)))


@triton.jit
def max_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    grid = tl.load(x + i[:, None] * n + i[None, :])
    tl.store(out + i, tl.max(grid, axis=1).to(tl.bfloat16))
    tl.store(out + n + i, tl.min(tl.trans(grid), axis=1).to(tl.bfloat16))


@triton.jit
def sum_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.sum(tl.load(x + i[:, None] * n + i[None, :]), axis=1))


@triton.jit
def dot_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.trans(tl.load(y + at))))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def awkward() -> torch.Tensor:
    """float32 that rounds up, to even, to infinity and to subnormals, and what is not finite."""
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    bits = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00018000, 0x7F800001]
    ties = torch.tensor(bits, dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.4e38])
    return torch.cat([ties.view(torch.float32), special, x])[:SIZE]


def agrees_cast() -> bool:
    x, out = awkward(), torch.zeros(SIZE, dtype=BF16)
    cast_kernel[(1,)](x, out, SIZE)
    back = torch.zeros(SIZE)
    cast_kernel[(1,)](out, back, SIZE)
    return _same(out, x.to(BF16)) and _same(back, x.to(BF16).float())


def agrees_add() -> bool:
    x, y, out = numbers(SIZE), numbers(SIZE, seed=1), torch.zeros(SIZE, dtype=BF16)
    add_kernel[(1,)](x, y, out, SIZE)
    return _same(out, x + y)


def agrees_compare() -> bool:
    x, y, out = numbers(SIZE), numbers(SIZE, seed=1), torch.zeros(SIZE)
    compare_kernel[(1,)](x, y, out, SIZE)
    return _same(out, torch.where(x < y, x, -y).float())


def agrees_maximum() -> bool:
    x, y, out = numbers(SIZE), numbers(SIZE, seed=1), torch.zeros(SIZE, dtype=BF16)
    maximum_kernel[(1,)](x, y, out, SIZE)
    return _same(out, torch.maximum(x, y) + torch.minimum(x.abs(), y.abs()))


def agrees_sum() -> bool:
    x, out = numbers(SIZE, SIZE), torch.zeros(SIZE, dtype=BF16)
    x = (x * 16).round() / 16  # sums are exact in float32, so their order does not matter
    sum_kernel[(1,)](x, out, SIZE)
    return _same(out, x.sum(1))


def agrees_dot() -> bool:
    x, y, out = numbers(SIZE, SIZE), numbers(SIZE, SIZE, seed=1), torch.zeros(SIZE, SIZE)
    dot_kernel[(1,)](x, y, out, SIZE)
    return torch.allclose(out, x.float() @ y.float().T, rtol=1e-5, atol=1e-5)


CHECKS = (
    agrees_cast,
    agrees_add,
    agrees_compare,
    agrees_maximum,
    agrees_sum,
    agrees_dot,
)


def _same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero included; any NaN equals any other."""
    signs = got.isnan() | (got.signbit() == wanted.signbit())
    return torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True) and bool(signs.all())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_bfloat16_agrees_with_torch(check) -> None:
    assert check()


def test_the_checks_need_the_repair() -> None:
    """Every check fails in a stock interpreter, so none passes when the repair is not active."""
    program = (
        "from tests.triton import test_interpreter as t\n"
        "print(*(check.__name__ for check in t.CHECKS if check()), 'all')"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["all"]


def test_the_repair_can_be_asked_for_twice() -> None:
    repair()
    assert agrees_add()


def test_maximum_and_minimum_of_rows_and_columns() -> None:
    """Stock, too: tl.max and tl.min compare in float32, and what they find needs no rounding."""
    x, out = numbers(SIZE, SIZE), torch.zeros(2, SIZE, dtype=BF16)
    max_kernel[(1,)](x, out, SIZE)
    assert _same(out, torch.stack([x.amax(1), x.amin(0)]))


def test_a_constant_takes_the_type_of_what_it_meets() -> None:
    x, out = numbers(SIZE), torch.zeros(SIZE, dtype=BF16)
    constant_kernel[(1,)](x, out, SIZE)
    assert _same(out, x * torch.tensor(1.7, dtype=BF16) - torch.tensor(0.3, dtype=BF16))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_comparison_of_scalars_meets_one_of_blocks(dtype: torch.dtype) -> None:
    x, out = numbers(SIZE).to(dtype), torch.zeros(SIZE, dtype=torch.int32)
    for first in (0.0, 1.0):
        x[0] = first
        scalar_compare_kernel[(1,)](x, out, SIZE)
        assert torch.equal(out.bool(), (x < 0) | (first != 0))


def test_every_bfloat16_survives_decoding_and_encoding() -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    quiet = np.where(np.isnan(decode(bits)), bits | 0x40, bits)
    assert np.array_equal(encode(decode(bits)), quiet)


@triton.jit
def descriptor_kernel(source, target, tiles, rows: tl.constexpr, cols: tl.constexpr):
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = source.load([tile * rows, 0])
        tl.static_assert(block.dtype == source.dtype)
        target.store([tile * rows, 8], block)


@triton.jit
def descriptor_sum_kernel(source, out, rows: tl.constexpr, cols: tl.constexpr):
    block = source.load([tl.program_id(0) * rows, 0]).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(block))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_descriptors_pad_loads_with_zeros_and_clip_stores(dtype: torch.dtype) -> None:
    data = torch.randn(37, 32, generator=torch.Generator().manual_seed(2)).to(dtype)[:, :24]
    with GuardZones() as zones:
        x = zones.input(data)
        out = torch.empty((37, 16), dtype=dtype)
        out[:, :8] = 1.0
        total = torch.empty((3,), dtype=torch.float32)
        source = TensorDescriptor.from_tensor(x, [16, 32])
        with touched() as t:
            target = TensorDescriptor.from_tensor(out, [16, 32])
            descriptor_kernel[(2,)](source, target, 3, 16, 32)
        assert np.array_equal(t.read, addresses(x))
        assert np.array_equal(t.written, addresses(out[:, 8:]))
        descriptor_sum_kernel[(3,)](source, total, 16, 32)
        assert torch.equal(out[:, 8:], data[:, :8])
        wanted = torch.stack([block.float().sum() for block in data.split(16)])
        torch.testing.assert_close(total, wanted)


@triton.jit
def copy_kernel(x, out, n, shift, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(out + i + shift, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def count_kernel(out, n, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.atomic_add(out + i % 4, 1.0, mask=i < n)


def test_guard_zones_pass_what_stays_inside() -> None:
    with GuardZones() as zones:
        x = zones.input(numbers(3, 16)[:, ::2])
        assert x.stride() == (16, 2)
        out = torch.empty(6, dtype=BF16)
        copy_kernel[(1,)](zones.input(numbers(6)), out, 6, 0, SIZE)
    assert torch.equal(out, numbers(6))


@pytest.mark.parametrize("shift", [1, -1, 500])
def test_guard_zones_see_a_stray_write(shift: int) -> None:
    with pytest.raises(AssertionError, match="bytes written outside of .6,. torch.bfloat16"):
        with GuardZones() as zones:
            copy_kernel[(1,)](zones.input(numbers(6)), torch.empty(6, dtype=BF16), 6, shift, SIZE)


def test_guard_zones_see_a_write_between_rows() -> None:
    with pytest.raises(AssertionError, match="2 bytes written outside"):
        with GuardZones() as zones:
            out = zones.tensor((2, 3), BF16, (4, 1))
            copy_kernel[(1,)](zones.input(numbers(7)), out, 7, 0, SIZE)


def test_guard_zones_see_what_was_not_written() -> None:
    with pytest.raises(AssertionError, match="2 elements of the output .* were not written"):
        with GuardZones() as zones:
            copy_kernel[(1,)](zones.input(numbers(6)), torch.empty((2, 3), dtype=BF16), 4, 0, SIZE)


def test_guard_zones_see_a_changed_input() -> None:
    with pytest.raises(AssertionError, match="not equal"):
        with GuardZones() as zones:
            x = zones.input(numbers(6))
            copy_kernel[(1,)](zones.input(-numbers(6)), x, 6, 0, SIZE)
            copy_kernel[(1,)](x, torch.empty(6, dtype=BF16), 6, 0, SIZE)


def test_guard_zones_want_an_output_to_watch() -> None:
    with pytest.raises(AssertionError, match="no output was allocated"):
        with GuardZones() as zones:
            zones.input(numbers(6))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
def test_a_read_outside_of_an_input_is_nan(dtype: torch.dtype) -> None:
    with GuardZones() as zones:
        x = zones.input(torch.ones(4, 6, dtype=dtype)[:, :3])
        out = torch.empty(24, dtype=dtype)
        copy_kernel[(1,)](x, out, 24, 0, SIZE)
    assert torch.equal(out.isnan().view(4, 6).sum(0), torch.tensor([0, 0, 0, 4, 4, 4]))


def test_touched_counts_unmasked_bytes_once() -> None:
    x, out = torch.ones(SIZE), torch.zeros(SIZE)
    with touched() as t:
        copy_kernel[(3,)](x, out, 5, 7, SIZE)
    assert (t.read_bytes, t.written_bytes) == (20, 20)
    assert np.array_equal(t.read, addresses(x[:5]))
    assert np.array_equal(t.written, addresses(out[7:12]))
    with touched() as t:
        count_kernel[(2,)](out, 3, SIZE)
    assert (t.read_bytes, t.written_bytes) == (12, 12)
    copy_kernel[(1,)](x, out, 5, 7, SIZE)
    assert t.written_bytes == 12  # only what ran inside


def test_addresses_of_strided_tensors() -> None:
    x = torch.zeros(2, 3, 4)
    own = x.data_ptr() + np.arange(96)
    assert np.array_equal(addresses(x), own)
    assert np.array_equal(addresses(x.transpose(0, 2)), own)
    assert np.array_equal(addresses(x[:, 1], x[:, 1]), own.reshape(2, 3, 16)[:, 1].ravel())
    assert np.array_equal(addresses(x[:1, :1].expand(2, 3, 4)), own[:16])
    assert addresses(x[:0]).size == addresses().size == 0
