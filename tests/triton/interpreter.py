"""What tests of Triton kernels need around Triton's interpreter (TRITON_INTERPRET=1).

    repair      bfloat16 as a GPU computes it, where the stock interpreter is silently wrong, and
                what older ones refuse: indices with numpy 2.4, aligned strides of descriptors
    touched     the addresses that loads and stores really reach
    vast, last_program     offsets beyond 2^31, without the memory and the time that they take

Nothing here knows a kernel. The interpreter runs one program after the other in numpy: it shows
errors of indexing, masks and arithmetic, but no races and no approximations that a GPU makes.
"""

import contextlib
import dataclasses
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from pgolf.triton_kernels.launch import Launch

# --- bfloat16 -------------------------------------------------------------------------------------
#
# The interpreter holds bfloat16 as its bits, in uint16, and hands those to numpy as if they were
# numbers: sums, products, comparisons, reductions and tl.dot work on bit patterns, and a cast from
# float32 cuts off. The repair decodes to float32 before numpy computes and rounds to nearest even
# after it. Copies (select, transpose, reshape, split) move bits and are right as they are.


def decode(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32 numbers."""
    return (np.atleast_1d(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def encode(numbers: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 numbers as bfloat16 bits (uint16), to the nearest with ties to even."""
    numbers = np.asarray(numbers, dtype=np.float32)
    bits = np.atleast_1d(numbers).view(np.uint32)
    half = 0 if toward_zero else 0x7FFF + ((bits >> 16) & 1)
    rounded = np.where(np.isnan(numbers), bits | 0x400000, bits + half)
    return (rounded >> 16).astype(np.uint16).reshape(numbers.shape)


def _is_bfloat16(value: Any) -> bool:
    return value.dtype.scalar == tl.bfloat16


def _numbers(handle: TensorHandle) -> np.ndarray:
    return decode(handle.data) if _is_bfloat16(handle) else handle.data


def _cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """Any cast between number types; float16 is numpy's, which rounds to nearest even."""
    target = target.scalar
    data = source.data
    if _is_bfloat16(source):
        if target == tl.bfloat16:
            return source
        data = decode(data)
    if target == tl.bfloat16:
        return TensorHandle(encode(data.astype(np.float32)), tl.bfloat16)
    return TensorHandle(data.astype(stock._get_np_dtype(target)), target)


def _fp_to_fp(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any):
    """A cast with a chosen rounding (fp_downcast_rounding) or from and to fp8."""
    target = target.scalar
    if target == tl.bfloat16 and source.dtype.scalar == tl.float32:
        toward_zero = rounding == stock._ir.ROUNDING_MODE.RTZ
        return TensorHandle(encode(source.data, toward_zero), tl.bfloat16)
    raise NotImplementedError(f"the repaired interpreter has no cast {source.dtype} -> {target}")


def _elementwise(original: Any) -> Any:
    """unary_op, binary_op or ternary_op with bfloat16 operands decoded and results rounded.

    The stock interpreter labels a comparison's result with the type of its operands, and makes
    numbers of it where it is spread over a block: here it is int1, for every type.
    """

    def operate(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        *operands, function = arguments
        if function is np.where or not any(map(_is_bfloat16, operands)):  # np.where only copies
            result = original(self, *arguments)
            return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result
        result = function(*map(_numbers, operands))
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return TensorHandle(encode(result), tl.bfloat16)

    return operate


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle):
    """x y + z through a wider type, as a GPU rounds it (the stock one rounds the product too)."""
    wide = np.longdouble if z.dtype.scalar == tl.float64 else np.float64
    result = _numbers(x).astype(wide) * _numbers(y).astype(wide) + _numbers(z).astype(wide)
    if _is_bfloat16(z):
        return TensorHandle(encode(result.astype(np.float32)), tl.bfloat16)
    return TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)


def _dot(original: Any) -> Any:
    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest):
        if not (_is_bfloat16(a) or _is_bfloat16(b)):
            return original(self, a, b, c, *rest)
        product = np.matmul(_numbers(a), _numbers(b)) + _numbers(c)
        if _is_bfloat16(c):
            return TensorHandle(encode(product), tl.bfloat16)
        return TensorHandle(product.astype(c.data.dtype), c.dtype.scalar)

    return dot


def _with_data(tensor: tl.tensor, data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    kind = tl.block_type(dtype, tensor.type.shape) if tensor.type.is_block() else dtype
    return tl.tensor(TensorHandle(data, dtype), kind)


def _sum(original: Any) -> Any:
    """tl.sum; the other reductions and scans of triton.language convert to float32 themselves."""

    def add_up(self: ReduceOps, tensor: tl.tensor) -> tl.tensor:
        if tensor.dtype != tl.bfloat16:
            return original(self, tensor)
        wide = _with_data(tensor, decode(tensor.handle.data), tl.float32)
        total = original(self, wide)
        return _with_data(total, encode(total.handle.data), tl.bfloat16)

    return add_up


def _atomic(original: Any) -> Any:
    def atomic(self: InterpreterBuilder, operation: Any, pointer: TensorHandle, *rest: Any):
        if pointer.get_element_ty() == tl.bfloat16:
            raise NotImplementedError("the repaired interpreter has no bfloat16 atomics")
        return original(self, operation, pointer, *rest)

    return atomic


def _descriptor_load(original: Any) -> Any:
    def load(self: InterpreterBuilder, descriptor: Any, *rest: Any) -> TensorHandle:
        if descriptor.padding != stock._ir.PADDING_OPTION.PAD_ZERO:
            raise NotImplementedError("the repaired interpreter pads loads with zeros only")
        return original(self, descriptor, *rest)

    return load


def _validate(self: stock.TensorDescHandle) -> None:
    """What TMA asks of a descriptor: triton 3.5 takes strides in elements for bytes."""
    size = self.base.dtype.element_ty.primitive_bitwidth // 8
    *strides, last = (stride.data.item() for stride in self.strides)
    assert self.base.data.item() % 16 == 0, "base must be 16-byte aligned"
    assert not any(stride * size % 16 for stride in strides), "stride must be 16-byte aligned"
    assert last == 1, "last dim must be contiguous"


def _lang_tensor(original: Any) -> Any:
    """Scalars as indices: int() takes no array of one dimension since numpy 2.4 (triton < 3.8)."""

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch


def repair() -> None:
    """Make this process's interpreter compute bfloat16 right; calling it again does nothing."""
    builder = InterpreterBuilder
    if builder.cast_impl is _cast:
        return
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _fp_to_fp
    builder.create_fma = _fma
    stock.TensorDescHandle.validate = _validate
    builder.get_bf16 = lambda self, value: TensorHandle(encode([value]), tl.bfloat16)
    for owner, wrapper, names in (
        (stock, _lang_tensor, ("_patch_lang_tensor",)),
        (builder, _elementwise, ("unary_op", "binary_op", "ternary_op")),
        (builder, _dot, ("create_dot",)),
        (builder, _atomic, ("create_atomic_rmw",)),
        (builder, _descriptor_load, ("create_descriptor_load",)),
        (ReduceOps, _sum, ("sum",)),
    ):
        for name in names:
            setattr(owner, name, wrapper(getattr(owner, name)))


# --- touched addresses ----------------------------------------------------------------------------


def addresses(*tensors: torch.Tensor) -> np.ndarray:
    """The addresses of all bytes of these tensors' elements, sorted, each once."""
    parts = [np.empty(0, np.int64)]
    for tensor in tensors:
        offsets = np.zeros(tuple(tensor.shape), np.int64)
        for dim, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            index = np.arange(length, dtype=np.int64) * stride
            offsets += index.reshape(-1, *(1,) * (tensor.dim() - dim - 1))
        size = tensor.element_size()
        parts.append(_bytes(tensor.data_ptr() + offsets * size, size))
    return np.unique(np.concatenate(parts))


def _bytes(starts: np.ndarray, size: int) -> np.ndarray:
    return (starts.reshape(-1, 1).astype(np.int64) + np.arange(size)).ravel()


@dataclass
class Touched:
    """Byte addresses that kernels read and wrote; masked-off lanes touch nothing."""

    reads: list[np.ndarray] = field(default_factory=list)
    writes: list[np.ndarray] = field(default_factory=list)

    @property
    def read(self) -> np.ndarray:
        """Addresses read, sorted, each once."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.reads]))

    @property
    def written(self) -> np.ndarray:
        """Addresses written, sorted, each once."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.writes]))

    @property
    def read_bytes(self) -> int:
        return self.read.size

    @property
    def written_bytes(self) -> int:
        return self.written.size


@contextlib.contextmanager
def touched() -> Iterator[Touched]:
    """Record every load and store inside, through pointers, descriptors and atomics alike."""
    record = Touched()

    def note(into: list[np.ndarray], pointers: TensorHandle, mask: TensorHandle) -> None:
        starts, on = np.broadcast_arrays(pointers.data, mask.data)
        bits = pointers.get_element_ty().primitive_bitwidth
        into.append(np.unique(_bytes(starts[on], max(1, bits // 8))))

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any):
        note(record.reads, pointers, mask)
        return plain_load(self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: TensorHandle, value: Any, mask: TensorHandle, *rest: Any):
        note(record.writes, pointers, mask)
        return plain_store(self, pointers, value, mask, *rest)

    def atomic(self: Any, name: Any, pointers: TensorHandle, value: Any, mask: Any, *rest: Any):
        note(record.reads, pointers, mask)
        note(record.writes, pointers, mask)
        return plain_atomic(self, name, pointers, value, mask, *rest)

    builder = InterpreterBuilder
    plain_load = builder.create_masked_load
    plain_store = builder.create_masked_store
    plain_atomic = builder.create_atomic_rmw
    with (
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
        mock.patch.object(builder, "create_atomic_rmw", atomic),
    ):
        yield record


# --- offsets beyond 2^31 --------------------------------------------------------------------------


def vast(nbytes: int) -> torch.Tensor:
    """Zeroed memory (uint8) of which only the pages that are touched exist.

    Put a tensor into its middle, and an offset that wraps around at 2^31 stays inside, where its
    wrong results are seen.
    """
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python has by name since 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags), dtype=torch.uint8)


def last_program(launch: Launch) -> None:
    """For `intercepted`: run only the program with the highest index in every dimension."""

    def program_id(self: InterpreterBuilder, axis: int) -> TensorHandle:
        return TensorHandle(np.array([launch.grid[axis] - 1], dtype=np.int32), tl.int32)

    with mock.patch.object(InterpreterBuilder, "create_get_program_id", program_id):
        dataclasses.replace(launch, grid=(1,) * len(launch.grid))()
