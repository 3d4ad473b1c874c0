"""Tensor cores: ldmatrix and stmatrix, mma.sync, and wgmma with its descriptors."""

import re
from dataclasses import dataclass

import numpy as np

from .faults import Divergence, Pending, Unsupported
from .formats import truncate_tf32, widen_bf16
from .memory import check_alignment
from .parser import Vector
from .table import instruction

LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4  # how a lane's elements lie in the fragments of all of these
ELEMENT = {"bf16": 2, "f16": 2, "tf32": 4}  # bytes


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def load_matrix(warp, ins, lanes) -> None:
    """Register i of all lanes = matrix i of 8 rows of 16 bytes; lane 8i + r addresses its row r."""
    targets = ins.operands[0].items
    index = _matrix_rows(warp, ins, lanes, ins.operands[1], len(targets))
    warp.shared.note_read(index, warp.index)
    elements = np.ascontiguousarray(warp.shared.bytes[index]).view(np.uint16).reshape(-1, 8, 8)
    for register, matrix in zip(targets, elements, strict=True):
        matrix = matrix.T if "trans" in ins.parts else matrix
        pairs = np.ascontiguousarray(matrix).reshape(64).view(np.uint32)
        warp.write(register, pairs[ROW * 4 + PAIR], lanes)


@instruction("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def store_matrix(warp, ins, lanes) -> None:
    """The reverse of ldmatrix."""
    sources = ins.operands[1].items
    index = _matrix_rows(warp, ins, lanes, ins.operands[0], len(sources))
    warp.shared.note_write(index, warp.index)
    matrices = np.stack([warp.read(source, "b32") for source in sources])
    elements = matrices.view(np.uint16).reshape(-1, 8, 8)
    if "trans" in ins.parts:
        elements = elements.transpose(0, 2, 1)
    warp.shared.bytes[index] = np.ascontiguousarray(elements).view(np.uint8).reshape(-1, 16)


def _matrix_rows(warp, ins, lanes, address, count: int) -> np.ndarray:
    """(8 count, 16) indices of bytes."""
    warp.expect_all_lanes(lanes)
    if ins.types != ("b16",):
        raise Unsupported(f"`{ins.text}`")
    addresses = warp.address(address)[: 8 * count]
    check_alignment(addresses, 16)
    return warp.shared.places(addresses, 16)


def _elements(kind: str, words: np.ndarray) -> np.ndarray:
    """float32 (..., per word) of 32-bit registers."""
    if kind == "tf32":
        return truncate_tf32(words.view(np.float32))[..., None]
    halves = np.ascontiguousarray(words[..., None]).view(np.uint16)
    return _values(kind, halves)


def _values(kind: str, bits: np.ndarray) -> np.ndarray:
    if kind == "tf32":
        return truncate_tf32(bits.view(np.float32))
    return widen_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _fragment(warp, operand, kind: str, by_rows: bool) -> np.ndarray:
    """A (16 x 32 bytes) or B (32 bytes x 8, as 8 x 32 bytes) of mma, from a warp's registers.

    by_rows: register 1 of A lies 8 rows below register 0, in B 16 bytes on in k.
    """
    words = [warp.read(item, "b32") for item in operand.items]
    per_word = 4 // ELEMENT[kind]
    result = np.zeros((16 if by_rows else 8, 8 * per_word), np.float32)
    for i, word in enumerate(words):
        row = ROW + 8 * (i % 2) if by_rows else ROW
        half = i // 2 if by_rows else i
        values = _elements(kind, word)
        for j in range(per_word):
            result[row, (half * 4 + PAIR) * per_word + j] = values[:, j]
    return result


SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


@instruction("mma.sync", "aligned row col")
def mma(warp, ins, lanes) -> None:
    """D (16 x 8) = A B + C in fp32, the sum in an order of its own."""
    warp.expect_all_lanes(lanes)
    result, kind, other, accumulator = ins.types
    rows, columns, depth = map(int, SHAPE.search(ins.opcode).groups())
    if (result, accumulator) != ("f32", "f32") or kind != other or kind not in ELEMENT:
        raise Unsupported(f"`{ins.text}`")
    a = _fragment(warp, ins.operands[1], kind, by_rows=True)
    b = _fragment(warp, ins.operands[2], kind, by_rows=False)
    if a.shape != (rows, depth) or b.shape != (columns, depth):
        raise Unsupported(f"`{ins.text}`: operands of {a.shape} and {b.shape}")
    with np.errstate(all="ignore"):
        product = a @ b.T
        for i, (to, of) in enumerate(
            zip(ins.operands[0].items, ins.operands[3].items, strict=True)
        ):
            part = product[ROW + 8 * (i // 2), PAIR * 2 + i % 2]
            warp.write(to, warp.read(of, "f32") + part, lanes)


SWIZZLES = {1: 128, 2: 64, 3: 32}  # the code in a descriptor -> bytes of a row


@dataclass(frozen=True)
class Descriptor:
    """Where a matrix operand of wgmma lies in shared memory."""

    start: int
    leading: int  # bytes between blocks of one swizzled row, along the contiguous dimension
    stride: int  # bytes between groups of 8 rows
    row: int  # bytes of a swizzled row

    @classmethod
    def decoded(cls, bits: int) -> "Descriptor":
        code = bits >> 62 & 3
        if code == 0 or bits >> 49 & 7:
            raise Unsupported(f"the descriptor {bits:#x}: no swizzling, or a base offset")
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, SWIZZLES[code])

    def addresses(self, rows: int, depth: int, element: int, transposed: bool) -> np.ndarray:
        """(rows, depth) byte addresses; rows are of M or N, contiguous if `transposed`, else k is.

        Bits 4 to 6 of an address are exchanged with bits 7 to 9 by xor, as far as the row's length
        says.
        """
        row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
        if transposed:
            per_row = self.row // element
            address = row // per_row * self.leading + k // 8 * self.stride
            address += k % 8 * self.row + row % per_row * element
        else:
            address = row // 8 * self.stride + row % 8 * self.row + k * element
        address += self.start
        return address ^ (address >> 7 & self.row // 16 - 1) << 4


@dataclass
class Product:
    """A wgmma under way: D += A B, of which this warp has 16 rows."""

    targets: tuple
    a: np.ndarray  # (16, depth) indices of the first byte, or values from registers
    b: np.ndarray  # (columns, depth)
    kind: str
    adds: np.ndarray  # by lane, whether what D holds is added
    reads: list[np.ndarray]  # bytes of shared memory


@instruction("wgmma.fence", "sync aligned")
def wgmma_fence(warp, ins, lanes) -> None:
    warp.expect_all_lanes(lanes)
    warp.fenced = {
        name: warp.registers[name].copy()
        for name in warp.program.accumulators
        if name not in warp.pending
    }


@instruction("wgmma.mma_async", "sync aligned")
def wgmma(warp, ins, lanes) -> None:
    """Begin D (64 x N) = A B + D for four warps; it is computed when it is waited for."""
    warp.expect_all_lanes(lanes)
    match = SHAPE.search(ins.opcode)
    result, kind, other = ins.types
    if result != "f32" or kind != other or kind not in ELEMENT:
        raise Unsupported(f"`{ins.text}`")
    columns, depth = int(match.group(2)), int(match.group(3))
    target, a, b, adds, scale_a, scale_b, *transposed = ins.operands
    if (scale_a.bits, scale_b.bits) != (1, 1):
        raise Unsupported(f"`{ins.text}`: negated operands")
    flags = [operand.bits != 0 for operand in transposed]
    if isinstance(a, Vector):
        flags = [False, *flags]  # an operand in registers has no flag
    flags += [False] * (2 - len(flags))
    _expect_the_same(warp, ins, [operand for operand in (a, b) if not isinstance(operand, Vector)])
    _check_fence(warp, target.items)
    reads, element = [], ELEMENT[kind]
    if isinstance(a, Vector):
        left = _fragment(warp, a, kind, by_rows=True)
    else:
        whole = _place(warp, a, 64, depth, element, flags[0])
        left = whole[warp.index % 4 * 16 :][:16]
        reads.append(left[..., None] + np.arange(element))
    right = _place(warp, b, columns, depth, element, flags[1])
    reads.append(right[..., None] + np.arange(element))
    for index in reads:
        warp.shared.places(index[..., 0].reshape(-1).astype(np.uint64), element)
        warp.shared.begin_read(index, warp.index)
    adding = warp.read(adds, "pred").copy()
    warp.products.append(Product(target.items, left, right, kind, adding, reads))
    warp.pending.update(item.name for item in target.items)


def _place(warp, operand, rows: int, depth: int, element: int, transposed: bool) -> np.ndarray:
    descriptors = np.unique(warp.read(operand, "b64"))
    if len(descriptors) != 1:
        raise Divergence("lanes have different descriptors")
    descriptor = Descriptor.decoded(int(descriptors[0]))
    return descriptor.addresses(rows, depth, element, transposed)


def _expect_the_same(warp, ins, descriptors) -> None:
    """Divergence: the four warps of a group do not run the same sequence of wgmmas."""
    log = warp.block.wgmmas.setdefault(warp.index // 4, [[], [], [], []])
    own = log[warp.index % 4]
    own.append((ins.text, *(int(warp.read(operand, "b64")[0]) for operand in descriptors)))
    for other in log:
        if len(other) >= len(own) and other[len(own) - 1] != own[-1]:
            raise Divergence("another warp of the group runs another wgmma, or on other operands")


def _check_fence(warp, targets) -> None:
    """Pending: accumulators were written since the last wgmma.fence, other than by wgmma."""
    if warp.fenced is None:
        raise Pending("no wgmma.fence before it")
    for item in targets:
        name = item.name
        if name not in warp.pending and (warp.fenced[name] != warp.registers[name]).any():
            raise Pending(f"{name} was written since the last wgmma.fence")


@instruction("wgmma.commit_group", "sync aligned")
def wgmma_commit(warp, ins, lanes) -> None:
    warp.expect_all_lanes(lanes)
    warp.product_groups.append(warp.products)
    warp.products = []


@instruction("wgmma.wait_group", "sync aligned")
def wgmma_wait(warp, ins, lanes) -> None:
    """All groups but the youngest few are computed now, from what shared memory holds now."""
    warp.expect_all_lanes(lanes)
    while len(warp.product_groups) > ins.operands[0].bits:
        for product in warp.product_groups.pop(0):
            _compute(warp, product, lanes)
    still = [*warp.products, *(p for group in warp.product_groups for p in group)]
    warp.pending = {item.name for product in still for item in product.targets}


def _compute(warp, product: Product, lanes) -> None:
    element = ELEMENT[product.kind]
    a, b = (
        side
        if side.dtype == np.float32
        else _loaded(warp.shared.bytes, side, product.kind, element)
        for side in (product.a, product.b)
    )
    for index in product.reads:
        warp.shared.end_read(index)
    names = [item.name for item in product.targets]
    with np.errstate(all="ignore"):
        sums = a @ b.T
        for i, name in enumerate(names):
            part = sums[ROW + 8 * (i // 2 % 2), i // 4 * 8 + PAIR * 2 + i % 2]
            held = warp.registers[name].view(np.float32)
            value = np.where(product.adds, held, np.float32(0)) + part
            np.copyto(warp.registers[name], value.view(np.uint32), where=lanes)
    if warp.fenced is not None:
        warp.fenced.update({name: warp.registers[name].copy() for name in names})


def _loaded(memory: np.ndarray, places: np.ndarray, kind: str, element: int) -> np.ndarray:
    data = np.ascontiguousarray(memory[places[..., None] + np.arange(element)])
    return _values(kind, data.view(f"u{element}")[..., 0])
