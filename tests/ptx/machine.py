"""Runs kernels: one block after the other, in it one warp at a time to its next barrier.

The 32 lanes of a warp are numpy arrays. Where they part, those at the lowest instruction go on
until they meet others. Which warp goes on is drawn by a seeded generator, so that an order that a
kernel relies on without a barrier is found in some run, if the race check does not find it at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import instructions
from .faults import Divergence, Fault, NoEnd, Pending, Unsupported
from .formats import BITS, SIGNED, VALUES, round_bf16, widen_bf16
from .memory import GlobalMemory, ParameterMemory, SharedMemory
from .parser import SINK, SIZES, Immediate, Kernel, Register, Special, Symbol

LANES = 32
LIMIT = 1_000_000  # instructions a warp may run


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: list[bytes],
    memory: GlobalMemory,
    dynamic_shared: int = 0,
    seed: int = 0,
    limit: int = LIMIT,
) -> None:
    """Run a kernel on all blocks of a grid.

    Args:
        grid, block: up to three sizes each; a block is a multiple of 32 threads.
        arguments: bytes of each parameter.
        dynamic_shared: bytes of shared memory that the launch gives.
        seed: of the order of the warps.
        limit: instructions that a warp may run.

    Raises:
        Fault: what the kernel does has no defined result. Names the block, warp and instruction.
        Unsupported: the kernel has an instruction that is not known; raised before it runs.
    """
    for instruction in kernel.instructions:
        instructions.prepare(instruction)
    grid, block = (tuple(sizes) + (1,) * (3 - len(sizes)) for sizes in (grid, block))
    threads = int(np.prod(block))
    if threads % LANES:
        raise Unsupported(f"a block of {threads} threads, no multiple of {LANES}")
    parameters = ParameterMemory(kernel.parameters, arguments)
    memory.forget_writers()
    shared_code = Program(kernel, grid, block, parameters, memory, limit)
    rng = np.random.default_rng(seed)
    count = int(np.prod(grid))
    for index in range(count):
        place = (index % grid[0], index // grid[0] % grid[1], index // (grid[0] * grid[1]))
        Block(shared_code, index, place, SharedMemory(kernel.shared, dynamic_shared)).run(rng)


@dataclass
class Program:
    """What all blocks of a launch have in common."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    parameters: ParameterMemory
    memory: GlobalMemory
    limit: int
    accumulators: list[str] = field(default_factory=list)  # every register that wgmma adds to

    def __post_init__(self):
        found = dict.fromkeys(
            item.name
            for instruction in self.kernel.instructions
            if instruction.opcode.startswith("wgmma.mma_async")
            for item in instruction.operands[0].items
        )
        self.accumulators = list(found)


class Block:
    """The warps of one block, and what they share."""

    def __init__(self, program: Program, index: int, place: tuple[int, ...], shared: SharedMemory):
        self.program, self.index, self.place, self.shared = program, index, place, shared
        threads = int(np.prod(program.block))
        self.wgmmas: dict[int, list] = {}  # of each group of four warps, to compare them
        self.warps = [Warp(self, i) for i in range(threads // LANES)]

    def run(self, rng: np.random.Generator) -> None:
        while any(not warp.ended for warp in self.warps):
            for i in rng.permutation(len(self.warps)):
                self.warps[i].run_to_barrier()
            waiting = [warp for warp in self.warps if warp.waiting]
            if waiting and any(warp.ended for warp in self.warps):
                gone = Divergence("some warps have ended before this barrier")
                raise self.fault(waiting[0], gone)
            for warp in waiting:
                warp.waiting = False
            self.shared.barrier()

    def fault(self, warp: "Warp", fault: Exception) -> Exception:
        """The same, with the place where it happened in its text."""
        where = f"{self.program.kernel.name}, block {self.place}, warp {warp.index}"
        text = self.program.kernel.instructions[warp.at].text
        return type(fault)(f"{where}: `{text}`: {fault}")


class Warp:
    """32 lanes: their registers, and the instructions at which they are."""

    def __init__(self, block: Block, index: int):
        self.block, self.index = block, index
        self.program, self.shared = block.program, block.shared
        self.memory, self.parameters = self.program.memory, self.program.parameters
        self.registers = _poisoned(self.program.kernel.registers)
        self.special = _special(block, index)
        self.groups = {0: np.ones(LANES, bool)}  # instruction -> lanes that are there
        self.waiting = self.ended = False
        self.at = 0  # the instruction at work, for messages
        self.steps = 0
        self.lanes = self.groups[0]  # of the instruction at work, before its predicate
        self.copies: list = []  # cp.async of no group yet
        self.copy_groups: list[list] = []
        self.products: list = []  # wgmma of no group yet
        self.product_groups: list[list] = []
        self.pending: set[str] = set()  # registers that a wgmma is working on
        self.fenced: dict[str, np.ndarray] | None = None  # accumulators at the last wgmma.fence

    def run_to_barrier(self) -> None:
        """Until the next barrier of the block, or to the end."""
        while not (self.waiting or self.ended):
            try:
                self._run_group()
            except (Fault, Unsupported) as e:
                raise self.block.fault(self, e) from None

    def _run_group(self) -> None:
        """The lanes that are furthest behind, until others are behind or with them."""
        code = self.program.kernel.instructions
        at = min(self.groups)
        lanes = self.groups.pop(at)
        others = min(self.groups, default=len(code))
        while at < others and at < len(code):
            self.at, self.lanes = at, lanes
            self.steps += 1
            if self.steps > self.program.limit:
                raise NoEnd(f"{self.program.limit} instructions")
            instruction = code[at]
            at += 1
            active = lanes
            if instruction.guard:
                active = lanes & self.predicate(instruction.guard)
                if not active.any():
                    continue
            self.program.kernel.executed.add(self.at)
            first = instruction.parts[0]
            if first == "bra":
                self._arrive(instruction.target, active)
                lanes = lanes & ~active
                others = min(others, instruction.target)
                if not lanes.any():
                    return
            elif first in ("ret", "exit"):
                lanes = lanes & ~active
                if not lanes.any():
                    self.ended = not self.groups
                    if self.ended and (self.copies or self.products or self.product_groups):
                        raise Pending("ends with asynchronous work that was not waited for")
                    return
            else:
                instruction.run(self, instruction, active)
                if self.waiting:
                    break
        if at == len(code):
            self.ended = not self.groups
        else:
            self._arrive(at, lanes)

    def _arrive(self, at: int, lanes: np.ndarray) -> None:
        self.groups[at] = self.groups[at] | lanes if at in self.groups else lanes

    def expect_all_lanes(self, lanes: np.ndarray) -> None:
        """Divergence: the instruction is for a whole warp, and some of its lanes are not here."""
        if not lanes.all():
            raise Divergence(f"only lanes {np.flatnonzero(lanes).tolist()} of the warp are here")

    def predicate(self, register: Register) -> np.ndarray:
        value = self.registers[register.name]
        return value == 0 if register.negated else value != 0

    def read(self, operand, kind: str) -> np.ndarray:
        """The operand in all lanes, as numpy computes with that type; bf16 as float32.

        A register that is too long is cut off; predicates are bool.
        """
        if kind == "pred":
            if isinstance(operand, Immediate):
                return np.full(LANES, operand.bits != 0)
            return self.predicate(operand)
        size = SIZES[kind]
        bits = self._bits(operand, size)
        if kind == "bf16":
            return widen_bf16(bits)
        return bits.view(np.float32 if kind == "tf32" else VALUES[kind])

    def _bits(self, operand, size: int) -> np.ndarray:
        wanted = BITS[size]
        if isinstance(operand, Register):
            if operand.name in self.pending:
                raise Pending(f"{operand.name} before the wgmma that writes it was waited for")
            bits = self.registers[operand.name]
            return bits if bits.itemsize == size else bits.astype(wanted)
        if isinstance(operand, Immediate):
            if operand.size not in (0, size):
                raise Unsupported(f"a literal of {operand.size} bytes among operands of {size}")
            return np.full(LANES, operand.bits & (2 ** (8 * size) - 1), wanted)
        if isinstance(operand, Special):
            return self.special[operand.name].astype(wanted)
        if isinstance(operand, Symbol):
            return np.full(LANES, self.address_of(operand), wanted)
        raise Unsupported(f"the operand {operand}")

    def address_of(self, symbol: Symbol) -> int:
        for space in (self.shared, self.parameters):
            if symbol.name in space.addresses:
                return space.addresses[symbol.name]
        raise Unsupported(f"the symbol {symbol.name}")

    def address(self, operand) -> np.ndarray:
        """uint64 addresses of [base + offset] in all lanes."""
        return self.read(operand.base, "u64") + np.uint64(operand.offset & (2**64 - 1))

    def write(
        self, register: Register, value: np.ndarray, lanes: np.ndarray, kind: str = ""
    ) -> None:
        """Set a register in some lanes; signed integers are extended by their sign.

        `kind` is needed for bf16, whose value is float32.
        """
        if register is SINK:
            return
        if register.name in self.pending:
            raise Pending(f"{register.name} is what a wgmma that was not waited for writes")
        target = self.registers[register.name]
        if kind == "bf16":
            value = round_bf16(value)
        elif value.dtype != bool:
            size = value.itemsize
            if size < target.itemsize and value.dtype.kind == "i":
                value = value.astype(SIGNED[target.itemsize])
            value = value.view(BITS[value.itemsize])
        np.copyto(target, value, where=lanes, casting="unsafe")


def _poisoned(registers: dict[str, str]) -> dict[str, np.ndarray]:
    """Registers of the right sizes, all bits set."""
    result = {}
    for size, dtype in BITS.items():
        names = [name for name, kind in registers.items() if SIZES[kind] == size]
        rows = np.full((len(names), LANES), -1 % 2 ** (8 * size), dtype)
        result.update(zip(names, rows, strict=True))
    return result


def _special(block: Block, warp: int) -> dict[str, np.ndarray]:
    thread = np.arange(warp * LANES, (warp + 1) * LANES, dtype=np.uint32)
    x, y, _ = block.program.block
    lane = thread % np.uint32(LANES)
    below = (np.uint64(1) << lane.astype(np.uint64)) - np.uint64(1)
    every = np.uint64(2**32 - 1)
    values = {
        "%tid.x": thread % x, "%tid.y": thread // x % y, "%tid.z": thread // (x * y),
        "%laneid": lane, "%lanemask_lt": below, "%lanemask_le": 2 * below + 1,
        "%lanemask_eq": below + 1, "%lanemask_ge": every - below,
        "%lanemask_gt": every - 2 * below - 1,
    }  # fmt: skip
    sizes = {"ctaid": block.place, "ntid": block.program.block, "nctaid": block.program.grid}
    for name, triple in sizes.items():
        values |= {f"%{name}.{c}": np.full(LANES, n) for c, n in zip("xyz", triple, strict=True)}
    return values
