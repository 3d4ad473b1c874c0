"""PTX text to kernels: parameters, shared arrays, instructions whose labels are resolved."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .faults import Unsupported

# Bytes of the types of parameters, registers and arrays.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "usbf" for bits in (8, 16, 32, 64)}
SIZES |= {"f16x2": 4, "bf16": 2, "bf16x2": 4, "tf32": 4, "pred": 1}


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # of a predicate: !%p1


@dataclass(frozen=True)
class Immediate:
    bits: int
    size: int = 0  # bytes of a floating-point literal; 0: a whole number of any size


@dataclass(frozen=True)
class Special:
    """A register that says where a thread is: %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared array or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple


SINK = Register("_")  # a result that nobody wants

SPECIAL = re.compile(r"%(n?(tid|ctaid)\.[xyz]|laneid|lanemask_(lt|le|gt|ge|eq))$")


@dataclass
class Instruction:
    """One instruction; `target` is where a branch goes."""

    opcode: str
    operands: tuple
    guard: Register | None
    text: str
    parts: tuple[str, ...] = ()
    types: tuple[str, ...] = ()  # those of its parts that are types
    target: int = -1
    run: object = None  # the function that executes it, from instructions.py


@dataclass(frozen=True)
class Array:
    """A parameter or a shared array: bytes, and what its address is a multiple of."""

    size: int
    align: int
    type: str


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Array]
    shared: dict[str, Array]  # a size of 0: as much as the launch gives
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    instructions: list[Instruction] = field(default_factory=list)
    executed: set[int] = field(default_factory=set)  # which of them, in any run


class Module:
    """The kernels of a PTX text; each is read when it is asked for.

    Raises:
        Unsupported: what is not an instruction and not known. Instructions are looked up when a
            kernel is run.
    """

    def __init__(self, ptx: str):
        ptx = _without_comments(ptx)
        self._entries: dict[str, tuple[str, str]] = {}  # name -> (parameters, body)
        outside, start = "", 0
        for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(", ptx):
            close = ptx.index(")", match.end())
            begin = ptx.index("{", close)
            end = _matching_brace(ptx, begin)
            self._entries[match.group(1)] = ptx[match.end() : close], ptx[begin + 1 : end - 1]
            outside += ptx[start : match.start()]
            start = end
        self._shared = shared_arrays(outside + ptx[start:])

    def kernel(self, name: str = "") -> Kernel:
        """The kernel of this name, or the only one there is."""
        if not name:
            (name,) = self._entries
        parameters, body = self._entries[name]
        seen = {n: array for n, array in self._shared.items() if n in body}
        return _kernel(name, parameters, body, seen)


def kernel_names(ptx: str) -> list[str]:
    """The kernels of a PTX text, in its order."""
    return re.findall(r"\.entry\s+([\w$]+)\s*\(", ptx)


def _without_comments(ptx: str) -> str:
    ptx = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", ptx, flags=re.S))
    lines = "loc|file|pragma|version|target|address_size"
    ptx = re.sub(rf"^\s*\.({lines})\b[^\n]*", "", ptx, flags=re.M)
    debug = re.search(r"^\s*\.section\b", ptx, flags=re.M)  # of debug information, at the end
    return ptx[: debug.start()] if debug else ptx


def _matching_brace(text: str, begin: int) -> int:
    """The index behind the brace that closes the one at `begin`."""
    depth = 0
    for match in re.compile("[{}]").finditer(text, begin):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    raise Unsupported("PTX whose braces do not match")


ARRAY = re.compile(r"\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?")


def shared_arrays(text: str) -> dict[str, Array]:
    """The declarations of shared memory in a text."""
    result = {}
    for declaration in re.findall(r"\.shared\s[^;]*", text):
        match = ARRAY.search(declaration)
        if not match:
            raise Unsupported(f"the declaration {declaration.strip()!r}")
        align, kind, name, count = match.groups()
        elements = 1 if count is None else int(count or 0)
        result[name] = Array(SIZES[kind] * elements, int(align), kind)
    return result


def _kernel(name: str, parameters: str, body: str, everywhere: dict[str, Array]) -> Kernel:
    named = {}
    for declaration in filter(str.strip, parameters.split(",")):
        kind, arrayed, count = re.search(
            r"\.([usbf]\d+)\b.*?([\w$]+)\s*(?:\[(\d+)\])?\s*$", declaration, re.S
        ).groups()
        # The alignment in `.ptr .align 1` is of what a pointer points to.
        align = re.search(r"\.param\s+\.align\s+(\d+)", declaration)
        size = SIZES[kind]
        named[arrayed] = Array(size * int(count or 1), int(align.group(1)) if align else size, kind)
    kernel = Kernel(name, named, {**everywhere, **shared_arrays(body)})
    _Body(kernel).read(body)
    return kernel


class _Body:
    """Reads the statements of a kernel, with what names stand for in nested scopes."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0

    def read(self, body: str) -> None:
        for statement in statements(body):
            if statement == "{":
                self.scopes.append({})
                self.opened += 1
            elif statement == "}":
                self.scopes.pop()
            elif statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.kernel.instructions)
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif statement.startswith(".shared"):
                pass  # shared_arrays has found it
            elif statement.startswith("."):
                raise Unsupported(f"{self.kernel.name}: the declaration {statement!r}")
            else:
                self.kernel.instructions.append(self._instruction(statement))
        for instruction in self.kernel.instructions:
            if instruction.parts[0] == "bra":
                instruction.target = self.labels[instruction.operands[0].name]

    def _declare(self, statement: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        if kind not in SIZES:
            raise Unsupported(f"{self.kernel.name}: registers of type .{kind}")
        for name in map(str.strip, names.split(",")):
            if match := re.fullmatch(r"(.*)<(\d+)>", name):
                for i in range(int(match.group(2))):
                    self.kernel.registers[f"{match.group(1)}{i}"] = kind
                continue
            unique = name if len(self.scopes) == 1 else f"{name}@{self.opened}"
            self.scopes[-1][name] = unique
            self.kernel.registers[unique] = kind

    def _instruction(self, statement: str) -> Instruction:
        text = " ".join(statement.split())
        match = re.match(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if not match:
            raise Unsupported(f"{self.kernel.name}: the statement {text!r}")
        negated, guard, opcode, rest = match.groups()
        operands = tuple(map(self._operand, _split(rest)))
        condition = Register(self._register(guard), negated == "!") if guard else None
        parts = tuple(opcode.split("."))
        types = tuple(p for p in parts if p in SIZES)
        return Instruction(opcode, operands, condition, text, parts, types)

    def _register(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _operand(self, text: str):
        if text[0] == "{":
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text[0] == "[":
            base, sign, offset = re.fullmatch(
                r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text
            ).groups()
            number = int(offset, 0) if offset else 0
            return Address(self._operand(base), -number if sign == "-" else number)
        if "|" in text:
            return Vector(tuple(self._operand(item.strip()) for item in text.split("|")))
        if text == "_":
            return SINK
        if SPECIAL.match(text):
            return Special(text)
        name = self._register(text.lstrip("!"))
        if name in self.kernel.registers:
            return Register(name, text[0] == "!")
        if text[0] == "%":
            raise Unsupported(f"{self.kernel.name}: the register {text}")
        if re.match(r"-?\d", text):
            return _number(text)
        return Symbol(text)


def _number(text: str) -> Immediate:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match.group(1), 16), 4)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match.group(1), 16), 8)
    return Immediate(int(text.rstrip("U"), 0) & (2**64 - 1))


def _split(text: str) -> list[str]:
    """Operands between commas that are not inside of braces or brackets."""
    return [item.strip() for item in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", text)]


def statements(body: str) -> Iterator[str]:
    """Instructions and declarations without semicolons, `label:`, and the braces of scopes."""
    for match in re.finditer(r"\s*([{}]|[\w$]+:(?!:)|[^;{}:\s](?:\{[^}]*\}|[^;{}])*;)", body):
        yield match.group(1).rstrip(";").strip()
