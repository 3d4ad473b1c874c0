"""The table of instructions: which function executes which opcode, with which modifiers."""

import re
from collections.abc import Callable

from .faults import Unsupported
from .parser import Instruction

# opcode -> (function, modifiers that it knows apart from types)
_TABLE: dict[str, tuple[Callable, frozenset[str]]] = {}
CACHE_HINTS = ("L1::", "L2::")  # prefixes of modifiers that change no result
SHAPE = re.compile(r"m\d+n\d+k\d+")  # of a product: the function looks at it


def instruction(opcodes: str, modifiers: str = "") -> Callable:
    """Register `function(warp, instruction, lanes)` for opcodes, separated by blanks.

    An opcode is the first parts of the dotted name; the longest that fits is taken. Parts behind it
    are types or have to be among `modifiers`.
    """

    def register(function: Callable) -> Callable:
        for opcode in opcodes.split():
            _TABLE[opcode] = (function, frozenset(modifiers.split()))
        return function

    return register


def prepare(instruction: Instruction) -> None:
    """Look up what executes an instruction.

    Raises:
        Unsupported: there is nothing for its opcode, or a modifier is unknown.
    """
    parts = instruction.parts
    if instruction.run is not None or parts[0] in ("bra", "ret", "exit"):
        return
    for length in range(len(parts), 0, -1):
        if entry := _TABLE.get(".".join(parts[:length])):
            function, known = entry
            for part in parts[length:]:
                if not (part in known or part in instruction.types or _is_harmless(part)):
                    raise Unsupported(f"the modifier .{part} of `{instruction.text}`")
            instruction.run = function
            return
    raise Unsupported(f"the instruction `{instruction.text}`")


def _is_harmless(part: str) -> bool:
    return part.startswith(CACHE_HINTS) or SHAPE.fullmatch(part) is not None
