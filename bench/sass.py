"""What a compiled kernel costs and which instructions it has, read from its cubin and its PTX."""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Tensor cores, tensor memory access, asynchronous and 16-byte global traffic, local memory,
# barriers, shuffles, atomics, the slow paths of division and square root.
OPCODES = (
    "HGMMA", "HMMA", "FFMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "LDG.128", "STG", "STG.128",
    "LDSM", "STSM", "LDL", "STL", "BAR", "SYNCS", "SHFL", "REDUX", "RED", "REDG", "ATOM", "ATOMG",
    "MUFU", "CALL",
)  # fmt: skip
# div.full.f32 is off by up to 2 units in the last place, div.rn.f32 is rounded correctly.
PTX_OPCODES = (
    "div.full.f32", "div.rn.f32", "div.approx.f32", "rcp.approx.f32", "wgmma.mma_async", "mma.sync",
)  # fmt: skip

# One instruction of `nvdisasm -c`: its address, a predicate perhaps, the opcode with modifiers.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Cost:
    """Registers, bytes of memory, instructions by opcode."""

    registers: int
    shared: int  # a block
    stack: int  # a thread
    local: int  # a thread
    instructions: dict[str, int]  # SASS, only what is there, and "all"
    ptx: dict[str, int]


def versions() -> str:
    """The versions that decide what is compiled, such as 'triton 3.8.0, ptxas 12.9.86'."""
    import triton

    text = tool("ptxas", "--version")
    return f"triton {triton.__version__}, ptxas {re.search(r'V([0-9.]+)', text).group(1)}"


def cost(kernel: Any) -> Cost:
    """Read a triton.compiler.CompiledKernel for an NVIDIA target with the tools of Triton's wheel.

    Raises:
        RuntimeError: a tool failed or said something that is not understood.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = _USAGE.search(tool("cuobjdump", "-res-usage", f.name))
        sass = tool("nvdisasm", "-c", f.name)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage named no resources of {kernel.name}")
    registers, stack, _, local = map(int, usage.groups())
    return Cost(
        registers=registers,
        # cuobjdump's SHARED is the 1024 bytes that an sm_90 block has besides its limit.
        shared=kernel.metadata.shared,
        stack=stack,
        local=local,
        instructions=count_sass(sass),
        ptx=count_ptx(kernel.asm["ptx"]),
    )


def count_sass(text: str) -> dict[str, int]:
    """Occurrences of OPCODES in the output of `nvdisasm -c`, and "all" instructions.

    LDG counts every LDG; LDG.128 those that move 16 bytes, whatever modifiers stand between.
    """
    found = [opcode.split(".") for opcode in _INSTRUCTION.findall(text)]
    if not found:
        raise RuntimeError("nvdisasm showed no instruction")
    return {"all": len(found)} | _count(found, OPCODES)


def count_ptx(text: str) -> dict[str, int]:
    """Occurrences of PTX_OPCODES in PTX."""
    found = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*)", text, re.M)
    return _count([opcode.split(".") for opcode in found], PTX_OPCODES)


def _count(found: Iterable[list[str]], wanted: Iterable[str]) -> dict[str, int]:
    """How many have the base opcode and, anywhere, the modifiers of each one wanted; no zeros."""
    found = list(found)
    counts = {}
    for name in wanted:
        base, *modifiers = name.split(".")
        n = sum(f[0] == base and all(m in f[1:] for m in modifiers) for f in found)
        if n:
            counts[name] = n
    return counts


def tool(name: str, *arguments: str) -> str:
    """Output of ptxas, cuobjdump or nvdisasm: the one that Triton itself uses."""
    from triton import knobs

    command = [getattr(knobs.nvidia, name).path, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout
