"""What is left out of the interpreter changes no result and stays out of the next launch."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as stock

from .overhead import trim

TYPES = [tl.int1, tl.int8, tl.int32, tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float64]


@triton.jit
def shifted(x, by):
    return tl.sum(x, axis=0) + by


@triton.jit
def calls_kernel(x, out, by, n: tl.constexpr):
    i = tl.arange(0, n)
    block = tl.load(x + i)
    for _ in tl.static_range(2):
        block = block * 3 + 1
    tl.store(out + tl.program_id(0), shifted(block, by) + tl.max(block, axis=0))


@triton.jit
def wrapping_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    block = tl.load(x + i)
    tl.store(out + i, block * 3 + block - 7)


def test_functions_that_a_kernel_calls_speak_its_language_again_and_again() -> None:
    x, out = torch.arange(8, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    wanted = (9 * x + 4).sum() + 5 + (9 * x + 4).max()
    for _ in range(2):
        calls_kernel[(3,)](x, out, 5, 8)
        assert out.tolist() == [wanted.item()] * 3


def test_integers_wrap_around_as_on_a_gpu() -> None:
    x, out = torch.full((8,), 2**31 - 1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    wrapping_kernel[(1,)](x, out, 8)
    assert torch.equal(out, x * 3 + x - 7)


@pytest.mark.parametrize("dtype", [*TYPES, tl.pointer_type(tl.int8)], ids=str)
def test_types_have_their_numpy_types(dtype: tl.dtype) -> None:
    size = 64 if dtype.is_ptr() else max(dtype.primitive_bitwidth, 8)
    for kind in (dtype, tl.block_type(dtype, [4])):
        assert stock._get_np_dtype(kind).itemsize * 8 == size


def test_types_and_shapes_are_their_own() -> None:
    """Of equal shapes and other numbers, of other shapes, and of constants in place of numbers."""
    for dtype, shape in itertools.product(TYPES, ([4, 8], [8, 4], [32])):
        one = tl.block_type(dtype, shape)
        assert one.scalar is dtype and [*one.shape] == shape and one.numel == 32
        assert str(dtype) in one.name
        block = tl.tensor(object(), one)
        assert block.dtype is dtype and block.type is one and block.numel.value == 32
        assert [size.value for size in block.shape] == shape
    constants = [tl.constexpr(4), tl.constexpr(8)]
    assert tl.block_type(tl.float32, constants) == tl.block_type(tl.float32, [4, 8])
    assert tl.tensor(object(), tl.int32).shape.values == []
    pointers = tl.block_type(tl.pointer_type(tl.int8), [4])
    assert pointers != tl.block_type(tl.pointer_type(tl.int32), [4])


def test_trimming_twice_is_trimming_once() -> None:
    before = stock._patch_lang, stock._get_np_dtype
    trim()
    assert (stock._patch_lang, stock._get_np_dtype) == before
