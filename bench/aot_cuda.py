"""Compiles csrc/cuda/*.cu with nvcc, without a GPU, and reads what every kernel costs.

All instances of a kernel that its launcher can start stand in the compiled file: a launcher names
them, or they would not be there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import sass
from pgolf.errors import PgolfError

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "aot"
ARCHS = ("sm_80", "sm_90a")  # those that setup.py builds machine code for
FLAGS = ("-std=c++17", "-O3", f"-I{CSRC}", "-cubin", "-Xptxas=-v", "--keep")

_PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.S,
)
# The name after the attributes; __launch_bounds__ may hold brackets of its own.
_KERNEL = re.compile(r"__global__ void(?:\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s+(\w+)\(")
_SHARED = re.compile(r"(\d+) bytes smem")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),", re.M)
_ENTRY = re.compile(r"^\s*(?:\.visible |\.weak )?\.entry (\w+)\(", re.M)
# Of a demangled name: the kernel and its template's arguments.
_SIGNATURE = re.compile(r"^(?:void )?(\w+)(?:<(.*?)>)?\(")
_SCOPES = ("pgolf::", "cuda::", "(anonymous namespace)::")


def kernels() -> set[str]:
    """The names of all kernels of csrc/cuda."""
    return {name for p in (CSRC / "cuda").glob("*.cu*") for name in _KERNEL.findall(p.read_text())}


def sources(kernel: str | None = None) -> list[Path]:
    """The .cu files; only those that can have this kernel, if one is named."""
    files = sorted((CSRC / "cuda").glob("*.cu"))
    if kernel is None:
        return files
    homes = [p for p in (CSRC / "cuda").glob("*.cu*") if kernel in _KERNEL.findall(p.read_text())]
    return [
        p for p in files
        if p in homes or any(f'"cuda/{home.name}"' in p.read_text() for home in homes)
    ]  # fmt: skip


def nvcc() -> str:
    """The compiler: $CUDA_HOME/bin/nvcc, the one on PATH, or that of PyPI's nvidia-cuda-nvcc.

    Raises:
        PgolfError: there is none, or no C++ compiler, which it needs.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    candidates = [packages / "nvidia" / "cu13" / "bin" / "nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(0, Path(home) / "bin" / "nvcc")
    elif found := shutil.which("nvcc"):
        candidates.insert(0, Path(found))
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            if not shutil.which("g++") or not shutil.which("c++filt"):
                raise PgolfError("nvcc needs g++ and c++filt on PATH: apt-get install g++")
            return str(candidate)
    raise PgolfError(
        "no nvcc in $CUDA_HOME/bin, on PATH or from PyPI: pip install -e '.[nvcc]' (no GPU is "
        "needed)"
    )


def versions() -> str:
    """What decides what nvcc makes, such as 'nvcc 13.0.88'."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', text).group(1)}"


@dataclass(frozen=True)
class Compiled:
    """One .cu file for one architecture: a folder with its cubin, its PTX and ptxas's words."""

    source: Path
    arch: str
    folder: Path

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.source.stem}.{suffix}"

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, figures) of each kernel, in the order of their names."""
        code = _parts(_SECTION, sass.tool("nvdisasm", "-c", str(self.file("cubin"))))
        ptx = _parts(_ENTRY, self.file("ptx").read_text())
        found = {
            symbol: {
                "registers": int(registers),
                "shared": sum(map(int, _SHARED.findall(rest))),
                "stack": int(stack),
                "local": int(stores) + int(loads),
                "instructions": sass.count_sass(code[symbol]),
                "ptx": sass.count_ptx(ptx[symbol]),
            }
            for symbol, stack, stores, loads, registers, rest in _PTXAS.findall(
                self.file("log").read_text()
            )
        }
        if not found or found.keys() != ptx.keys():
            raise RuntimeError(f"{self.source.name}: ptxas and the PTX name different kernels")
        named = zip(_signatures(list(found)), found.values(), strict=True)
        for (kernel, arguments), row in sorted(named, key=lambda pair: pair[0]):
            shown = f"<{', '.join(arguments)}>" if arguments else ""
            yield f"{kernel}{shown}: {self.source.name} {self.arch}", {
                "kernel": kernel, "file": self.source.name, "arch": self.arch,
                "arguments": arguments, **row,
            }  # fmt: skip


def _parts(heading: re.Pattern[str], text: str) -> dict[str, str]:
    """What follows each heading up to the next one, by the heading's name."""
    pieces = heading.split(text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _signatures(symbols: list[str]) -> list[tuple[str, list[str]]]:
    """(kernel, arguments of its template) of each mangled name."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        for scope in _SCOPES:
            line = line.replace(scope, "")
        match = _SIGNATURE.match(line)
        if match is None:
            raise RuntimeError(f"no name of a kernel: {line}")
        found.append((match[1], match[2].split(", ") if match[2] else []))
    return found


def compile_source(source: Path, arch: str) -> Compiled:
    """Compile a file unless it was compiled before, with the same headers and compiler.

    Raises:
        RuntimeError: nvcc failed; with what it said.
    """
    command = [nvcc(), *FLAGS, f"-arch={arch}", "-o", f"{source.stem}.cubin", str(source)]
    state = hashlib.sha256(f"{versions()} {command}".encode())
    headers = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".def")]
    for path in [source, *sorted(headers)]:
        state.update(path.read_bytes())
    made = Compiled(source, arch, CACHE / f"{source.stem}-{arch}-{state.hexdigest()[:16]}")
    if made.folder.exists():
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
        half = Compiled(source, arch, Path(scratch) / "half")
        half.folder.mkdir()
        for suffix in ("cubin", "ptx"):
            (Path(scratch) / f"{source.stem}.{suffix}").rename(half.file(suffix))
        half.file("log").write_text(done.stderr)
        try:
            half.folder.rename(made.folder)
        except OSError:  # another process was faster
            if not made.folder.exists():
                raise
    return made


def compile_all(
    kernel: str | None, say: Callable[[str, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """Figures of every kernel, or of all instances of one, by row name; `say(name, row)` each."""
    jobs = [(source, arch) for source in sources(kernel) for arch in ARCHS]
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for made in pool.map(lambda job: compile_source(*job), jobs):
            for name, row in made.rows():
                if kernel in (None, row["kernel"]):
                    rows[name] = row
                    say(name, row)
    return rows
