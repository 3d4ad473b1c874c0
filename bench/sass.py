"""What the kernels of a cubin cost, and how often an instruction stands in them."""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
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
