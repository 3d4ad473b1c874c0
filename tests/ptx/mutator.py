"""Small wrong changes to PTX kernels: whoever runs the checks on them learns what they miss.

Only instructions are changed that some run has executed, and whose result another of them takes.
Names of mutants are without the numbers of registers: they outlast most changes of a kernel.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .parser import SIZES, Address, Immediate, Instruction, Kernel, Register, Vector


@dataclass(frozen=True)
class Mutant:
    """A kernel with one change."""

    original: Kernel
    kernel: Kernel
    kind: str  # the class of the change
    name: str  # kernel: class: 'the instruction as it was => as it is'


def mutants(kernel: Kernel, label: str, choices: tuple[str, ...] = ()) -> list[Mutant]:
    """Every mutant of what was executed of a kernel, in the order of its text.

    Comparisons that begin with one of `choices` are left alone, and branches on their results.
    """
    left_alone = {
        i.operands[0].name for i in kernel.instructions if i.opcode.startswith(choices or ("?",))
    }
    result: dict[str, Mutant] = {}
    for at in live(kernel):
        instruction = kernel.instructions[at]
        if left_alone & set(_registers((*instruction.operands[:1], instruction.guard))):
            continue
        for kind, changed in _changes(instruction):
            new = list(kernel.instructions)
            new[at] = changed
            name = f"{label}: {kind}: {_plain(instruction)} => {_plain(changed)}"
            while name in result:  # the same change of another instruction
                name += "+"
            result[name] = Mutant(kernel, dataclasses.replace(kernel, instructions=new), kind, name)
    return list(result.values())


NO_RESULT = ("st", "bra", "ret", "exit", "bar", "barrier", "fence", "cp", "wgmma", "stmatrix")


def live(kernel: Kernel) -> list[int]:
    """Instructions that were executed, and whose results reach one that has an effect."""
    needed: set[str] = set()
    found: set[int] = set()
    while True:
        before = len(needed), len(found)
        for at in sorted(kernel.executed, reverse=True):
            instruction = kernel.instructions[at]
            results, sources = instruction.operands[:1], instruction.operands[1:]
            if instruction.parts[0] in NO_RESULT:
                results, sources = (), instruction.operands
            if not results or needed & set(_registers(results)):
                found.add(at)
                needed.update(_registers((*sources, instruction.guard)))
        if before == (len(needed), len(found)):
            return sorted(found)


def _registers(operands: tuple) -> Iterator[str]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.name
        elif isinstance(operand, Vector):
            yield from _registers(operand.items)
        elif isinstance(operand, Address):
            yield from _registers((operand.base,))


def with_opcode(instruction: Instruction, opcode: str) -> Instruction:
    """The same operands with another opcode."""
    parts = tuple(opcode.split("."))
    types = tuple(p for p in parts if p in SIZES)
    return dataclasses.replace(
        instruction, opcode=opcode, parts=parts, types=types, run=None,
        text=instruction.text.replace(instruction.opcode, opcode),
    )  # fmt: skip


def _plain(instruction: Instruction) -> str:
    """Its text without the numbers of registers; long lists of them in short."""
    text = re.sub(r"(%[a-z]+)\d+", r"\1", instruction.text)
    return re.sub(r"(%\w+)(, ?\1){4,}", r"\1, ...", text)


def _dropped(instruction: Instruction) -> Instruction:
    return dataclasses.replace(instruction, run=lambda *_: None, parts=("nop",), text="nothing")


def _operand(instruction: Instruction, index: int, new: object, shown: str) -> Instruction:
    operands = list(instruction.operands)
    operands[index] = new
    text = f"{instruction.text} with {shown}"
    return dataclasses.replace(instruction, operands=tuple(operands), text=text)


def _changes(instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    for kind, change in KINDS.items():
        for changed in change(instruction):
            yield kind, changed


def barriers(ins: Instruction) -> Iterator[Instruction]:
    """A barrier that is missing."""
    if ins.opcode.startswith(("bar.sync", "barrier")):
        yield _dropped(ins)


def waits(ins: Instruction) -> Iterator[Instruction]:
    """A wait for less, or for nothing, and groups that are not closed. (For more is no mistake.)"""
    if "wait_group" in ins.parts:
        yield _dropped(ins)
        count = ins.operands[0].bits
        yield _operand(ins, 0, Immediate(count + 1), f"{count + 1}")
    elif "wait_all" in ins.parts or "commit_group" in ins.parts:
        yield _dropped(ins)


def fences(ins: Instruction) -> Iterator[Instruction]:
    """What makes memory or registers safe for wgmma is missing."""
    if ins.opcode.startswith(("fence.proxy.async", "wgmma.fence")):
        yield _dropped(ins)


def swizzles(ins: Instruction) -> Iterator[Instruction]:
    """Other bits in descriptors, and addresses that are combined otherwise than by xor."""
    if ins.parts[0] in ("add", "or") and ins.types[:1] and SIZES[ins.types[0]] == 8:
        for i, operand in enumerate(ins.operands):
            if isinstance(operand, Immediate) and operand.bits >> 62 in (1, 2, 3):
                if operand.bits >> 48 != 0xFFFF:  # a descriptor, and no small negative number
                    for bit in (62, 63, 32):
                        new = Immediate(operand.bits ^ 1 << bit)
                        yield _operand(ins, i, new, f"bit {bit} the other way")
    if ins.opcode == "xor.b32":
        yield with_opcode(ins, "or.b32")


def transposes(ins: Instruction) -> Iterator[Instruction]:
    """Matrices read or written the other way round."""
    if ins.opcode.startswith("wgmma.mma_async"):
        for i in (-2, -1):
            if len(ins.operands) + i > 5:
                flag = ins.operands[i].bits ^ 1
                yield _operand(ins, i, Immediate(flag), f"flag {-i} from the end {flag}")
    elif ins.parts[0] in ("ldmatrix", "stmatrix"):
        opcode = ins.opcode
        other = opcode.replace(".trans", "") if "trans" in ins.parts else _transposed(opcode)
        yield with_opcode(ins, other)


def _transposed(opcode: str) -> str:
    return re.sub(r"(\.x[124])", r"\1.trans", opcode)


def predicates(ins: Instruction) -> Iterator[Instruction]:
    """Guards and conditions negated; guards dropped, apart from those of branches."""
    if ins.guard:
        opposite = Register(ins.guard.name, not ins.guard.negated)
        yield dataclasses.replace(ins, guard=opposite, text=f"{ins.text} if not")
        if ins.parts[0] != "bra":
            yield dataclasses.replace(ins, guard=None, text=f"{ins.text} always")
    elif ins.parts[0] == "selp":
        condition = ins.operands[3]
        new = Register(condition.name, not condition.negated)
        yield _operand(ins, 3, new, "the condition negated")


def shuffles(ins: Instruction) -> Iterator[Instruction]:
    """Other lanes, other segments, a lane that the mask forgets."""
    if ins.parts[:2] == ("shfl", "sync"):
        for mode in {"bfly": ("down",), "down": ("up", "bfly"), "up": ("down",)}.get(
            ins.parts[2], ("up",)
        ):
            yield with_opcode(ins, ins.opcode.replace(ins.parts[2], mode))
        for i, change in ((2, lambda n: n ^ 3), (3, lambda n: n ^ 0x1F00), (4, lambda n: n ^ 2)):
            if isinstance(ins.operands[i], Immediate):
                new = change(ins.operands[i].bits)
                yield _operand(ins, i, Immediate(new), f"operand {i} {new & 0xFFFFFFFF:#x}")
    elif ins.parts[:2] in (("vote", "sync"), ("redux", "sync")):
        if isinstance(ins.operands[2], Immediate):
            yield _operand(ins, 2, Immediate(ins.operands[2].bits ^ 2), "a lane less in the mask")


def bounds(ins: Instruction) -> Iterator[Instruction]:
    """One more or less in a comparison with a number."""
    if ins.parts[0] == "setp" and ins.types[0][0] in "usb":
        for i in (1, 2):
            operand = ins.operands[i]
            if isinstance(operand, Immediate):
                for step in (1, -1):
                    new = Immediate((operand.bits + step) % 2**64)
                    yield _operand(ins, i, new, f"{_signed(new.bits)}")


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >> 63 else bits


def constants(ins: Instruction) -> Iterator[Instruction]:
    """One more in a number that is added, multiplied or shifted by."""
    if ins.parts[0] in ("add", "sub", "mul", "mad", "shl", "shr") and ins.types[0][0] in "usb":
        for i, operand in enumerate(ins.operands[1:], 1):
            if isinstance(operand, Immediate) and operand.bits >> 62 not in (1, 2):
                new = Immediate((operand.bits + 1) % 2**64)
                yield _operand(ins, i, new, f"{_signed(new.bits)}")


OTHER = {
    "add": "sub", "sub": "add", "mul": "add", "min": "max", "max": "min", "and": "or",
    "or": "and", "shl": "shr", "shr": "shl",
}  # fmt: skip
COMPARISONS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}


def operators(ins: Instruction) -> Iterator[Instruction]:
    """Another operation on the same operands."""
    name, *rest = ins.parts
    if name in OTHER and not set(rest) & {"wide", "lo", "hi", "xorsign"}:
        yield with_opcode(ins, ".".join([OTHER[name], *rest]))
    elif name == "setp" and ins.parts[1] in COMPARISONS:
        yield with_opcode(ins, ".".join([name, COMPARISONS[ins.parts[1]], *ins.parts[2:]]))
    elif name == "div" and "rn" in rest:
        yield with_opcode(ins, ins.opcode.replace("rn", "full"))
    elif name == "fma":
        yield _operand(ins, 3, ins.operands[1], "the first factor added")
    elif name == "neg":
        yield with_opcode(ins, ins.opcode.replace("neg", "abs"))


def vectors(ins: Instruction) -> Iterator[Instruction]:
    """Two elements of a vector exchanged."""
    if ins.parts[0] in ("ld", "st"):
        for i, operand in enumerate(ins.operands):
            if isinstance(operand, Vector) and len(operand.items) > 1:
                first, second, *others = operand.items
                if first != second:
                    new = Vector((second, first, *others))
                    yield _operand(ins, i, new, "its first two exchanged")


KINDS: dict[str, Callable[[Instruction], Iterator[Instruction]]] = {
    "barrier": barriers,
    "wait": waits,
    "fence": fences,
    "swizzle": swizzles,
    "transpose": transposes,
    "predicate": predicates,
    "shuffle": shuffles,
    "bound": bounds,
    "constant": constants,
    "operator": operators,
    "vector": vectors,
}
