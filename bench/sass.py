"""What the kernels of a cubin cost, how often an instruction stands in them, and their blocks."""

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),", re.M)
_ENTRY = re.compile(r"^\s*(?:\.visible |\.weak )?\.entry (\w+)\(", re.M)
# Its address in the output of `nvdisasm -c`, a predicate perhaps, the opcode with its modifiers.
_INSTRUCTION = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:@!?(?:%|U?P)\w+\s+)?([A-Za-z]\w*(?:\.\w+)*)", re.M
)
_THREADS = re.compile(r"^\.maxntid (\d+)", re.M)
_ENCODING = re.compile(r" */\* 0x[0-9a-f]+ \*/$|^\n", re.M)
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_LINE = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*([^;]*);"
)
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_GLOBAL = ("LDG", "STG")
# What has no destination: every register that it names is read.
_STORES = ("STG", "STS", "STL", "ST", "RED", "BAR", "BRA", "EXIT", "CALL", "RET", "WARPSYNC")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # of others: 4
RESERVED = 1024  # bytes that cuobjdump adds to the shared memory of a block of sm_90 that has some


@dataclass(frozen=True)
class Function:
    """A compiled kernel: registers a thread, static shared memory in bytes, its SASS and PTX.

    `threads` are the most that a block may have, as the kernel declares it; 1024 where it does not.
    """

    registers: int
    shared: int
    code: str
    threads: int = 1024


def functions(cubin: Path, ptx: str, arch: str) -> dict[str, Function]:
    """The kernels of a file by their mangled names.

    Raises:
        RuntimeError: a tool failed, or the file and its PTX name different kernels.
    """
    sass = _parts(_SECTION, _ENCODING.sub("", tool("nvdisasm", "-c", str(cubin))))
    entries = _parts(_ENTRY, ptx)
    reserved = RESERVED * arch.startswith("sm_90")
    found = {
        name: Function(
            int(registers), max(0, int(shared) - reserved), f"{sass[name]}\n{entries[name]}",
            _threads(entries[name]),
        )
        for name, registers, shared in _USAGE.findall(tool("cuobjdump", "-res-usage", str(cubin)))
    }
    if not found or found.keys() != entries.keys():
        raise RuntimeError(f"{cubin.name}: cuobjdump and the PTX name different kernels")
    return found


def _threads(entry: str) -> int:
    """Of a block, by `.maxntid`."""
    declared = _THREADS.search(entry)
    return int(declared[1]) if declared else 1024


def _parts(heading: re.Pattern[str], text: str) -> dict[str, str]:
    """What follows each heading up to the next one, by the heading's name."""
    pieces = heading.split(text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def count(code: str, opcodes: Iterable[str]) -> dict[str, int]:
    """How often each stands in SASS, whose opcodes are capitals, and PTX.

    LDG counts every LDG; LDG.128 those that move 16 bytes, whatever modifiers stand between.
    """
    found = [opcode.split(".") for opcode in _INSTRUCTION.findall(code)]
    counts = {}
    for name in opcodes:
        base, *modifiers = name.split(".")
        counts[name] = sum(f[0] == base and set(modifiers) <= set(f[1:]) for f in found)
    return counts


def versions() -> str:
    """The versions that decide what Triton makes, such as 'triton 3.8.0, ptxas 12.9.86'."""
    import triton

    text = tool("ptxas", "--version")
    return f"triton {triton.__version__}, ptxas {re.search(r'V([0-9.]+)', text).group(1)}"


def tool(name: str, *arguments: str) -> str:
    """Output of ptxas, cuobjdump or nvdisasm: the one that Triton itself uses."""
    from triton import knobs

    command = [getattr(knobs.nvidia, name).path, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


# --- lines and blocks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One line: predicate ('' for none), opcode with its modifiers, what follows it.

    `off`: it is taken for switched off by its predicate.
    """

    guard: str
    opcode: str
    operands: str
    off: bool = False

    @cached_property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That a lane moves to or from global memory."""
        return 0 if self.off else self.width

    @property
    def width(self) -> int:
        if self.base not in _GLOBAL:
            return 0
        return next((_WIDTHS[m] for m in self.opcode.split(".")[1:] if m in _WIDTHS), 4)

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def leaves(self) -> bool:
        """Whether a block ends here."""
        return self.opcode != "BRA.DIV" and self.base in ("BRA", "EXIT", "RET", "JMP", "BRX")

    @property
    def conditional(self) -> bool:
        """Whether what follows may be reached, too."""
        return bool(self.guard) or (self.base == "BRA" and not self.operands.startswith("`"))

    @cached_property
    def registers(self) -> tuple[list[int], list[int]]:
        """(written, read) numbers of registers; of what is read, the first of each operand."""
        named = [int(n) for n in _REGISTER.findall(self.operands)]
        first = self.operands.partition(",")[0]
        if self.base in _STORES or not _REGISTER.fullmatch(first.strip()):
            return [], named
        return [named[0] + i for i in range(max(1, self.width // 4))], named[1:]


def _opposite(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"


@dataclass
class Block:
    """Instructions that are executed together, and the blocks that may come next."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)
    target: int | None = None  # of the branch at its end

    @property
    def slow(self) -> int:
        """How many subroutines it calls."""
        return sum(i.base == "CALL" or i.opcode == "WARPSYNC.COLLECTIVE" for i in self.instructions)

    def off_before(self, to: int | None) -> set[int]:
        """Places of instructions that the predicate of the branch at the end switches off.

        Args:
            to: the block that comes next.
        """
        guard = self.instructions[-1].guard
        if not guard or self.target is None or len(self.after) < 2:
            return set()
        name = guard.removeprefix("!")
        off = _opposite(guard) if to == self.target else guard
        places: set[int] = set()
        for n, i in enumerate(self.instructions[:-1]):
            if i.guard == off:
                places.add(n)
            elif i.operands.startswith(f"{name},") or f" {name}," in i.operands[:12]:
                places.clear()  # it is another predicate from here on
        return places


def basic_blocks(sass: str) -> list[Block]:
    """The blocks of a function and of its subroutines, which nothing but CALL leads to."""
    blocks, at, current = [], {}, []

    def close() -> None:
        nonlocal current
        if current:
            blocks.append(Block(_switched(current)))
            current = []

    for line in sass.splitlines():
        if label := _LABEL.match(line):
            close()
            at[label[1]] = len(blocks)
        elif found := _LINE.match(line):
            current.append(Instruction(found[1] or "", found[2], found[3].strip()))
            if current[-1].leaves or current[-1].base in ("BSYNC", "CALL"):
                close()
    close()
    joins: dict[str, str | None] = {}
    for i, block in enumerate(blocks):
        last = block.instructions[-1]
        for inside in block.instructions:
            if inside.base == "BSSY":
                joins[inside.operands.partition(",")[0]] = inside.target
        falls_through = not last.leaves or last.conditional
        if last.base == "BSYNC" and (join := joins.get(last.operands.strip())):
            block.after = [at[join]]
            falls_through = False
        if last.leaves and last.base in ("JMP", "BRX"):
            raise ValueError(f"{last.opcode} jumps through a register")
        if falls_through and i + 1 < len(blocks):
            block.after.append(i + 1)
        if last.base == "BRA" and last.leaves:
            block.target = at[last.target]
            if block.target not in block.after:
                block.after.append(block.target)
    return blocks


def _switched(block: Sequence[Instruction]) -> list[Instruction]:
    """With `off` where a predicate lets more bytes be moved as it is not."""
    moved: dict[str, int] = {}
    for i in block:
        moved[i.guard] = moved.get(i.guard, 0) + i.width
    off = {
        guard
        for guard, size in moved.items()
        if guard and size < moved.get(_opposite(guard), 0)
    }
    return [replace(i, off=True) if i.guard in off else i for i in block]
