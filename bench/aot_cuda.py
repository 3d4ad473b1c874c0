"""Compiles csrc/cuda/*.cu with nvcc, without a GPU, and reads what every kernel costs.

The compiled file has all instances of a kernel that its launcher can start: only a launcher makes
them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from bench import aot_items, sass
from bench.aot_checks import REQUIRED, Row, failures, row
from pgolf.errors import PgolfError
from pgolf.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "aot"
ARCHS = ("sm_80", "sm_90a")  # those that setup.py builds machine code for
FLAGS = ("-std=c++17", "-O3", f"-I{CSRC}", "-cubin", "--keep")

# The name after the attributes; __launch_bounds__ may hold brackets of its own.
_KERNEL = re.compile(r"__global__ void(?:\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s+(\w+)\(")
# Of a demangled name: the kernel and its template's arguments.
_SIGNATURE = re.compile(r"^(?:void )?(\w+)(?:<(.*?)>)?\(", re.M)
_SCOPES = re.compile(r"pgolf::|cuda::|\(anonymous namespace\)::")


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
    elif on_path := shutil.which("nvcc"):
        candidates.insert(0, Path(on_path))
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


def compile_source(source: Path, arch: str) -> list[tuple[str, list[str], sass.Function]]:
    """(kernel, arguments of its template, its code) of each instance in a file, in their order.

    Remembered in build/aot for the same sources, headers and compiler.

    Raises:
        RuntimeError: nvcc failed; with what it said.
    """
    command = [nvcc(), *FLAGS, f"-arch={arch}", "-o", "kernels.cubin", str(source)]
    state = hashlib.sha256(f"{versions()} {command}".encode())
    headers = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".def")]
    for path in [source, *sorted(headers), Path(__file__), Path(sass.__file__)]:
        state.update(path.read_bytes())
    known = CACHE / f"{source.stem}-{arch}-{state.hexdigest()[:16]}.json"
    if not known.exists():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
            ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
            functions = sass.functions(Path(folder) / "kernels.cubin", ptx, arch)
        names = _signatures(list(functions))
        instances = [
            (kernel, arguments, asdict(function))
            for (kernel, arguments), function in zip(names, functions.values(), strict=True)
        ]
        atomic_write(known, json.dumps(sorted(instances, key=lambda instance: instance[:2])))
    return [(k, a, sass.Function(**f)) for k, a, f in json.loads(known.read_text())]


def _signatures(symbols: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(kernel, arguments of its template) of each mangled name."""
    text = "\n".join(symbols)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    for kernel, arguments in _SIGNATURE.findall(_SCOPES.sub("", done.stdout)):
        yield kernel, arguments.split(", ") if arguments else []


def compile_all(
    only: str | None, say: Callable[[str, Row], None], archs: Sequence[str] = ARCHS
) -> tuple[dict[str, Row], list[str]]:
    """(figures by row name, what is wrong) of every kernel, or of all instances of one."""
    jobs = [(source, arch) for source in sources(only) for arch in archs]
    rows, problems = {}, []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = pool.map(lambda job: compile_source(*job), jobs)
        for (source, arch), instances in zip(jobs, compiled, strict=True):
            for kernel, arguments, function in instances:
                if only not in (None, kernel):
                    continue
                values = f"<{', '.join(arguments)}>" if arguments else ""
                name = f"{kernel}{values}: {source.name} {arch}"
                vector = REQUIRED[kernel].vector if kernel in REQUIRED else None
                wide = vector is None or arguments[vector] != "1"
                figures = row(kernel, function)
                problems += failures(name, kernel, wide, figures)
                try:
                    executed = aot_items.figures(kernel, arguments, arch, function)
                except ValueError as e:
                    problems.append(f"{name}: {e}")
                    executed = {}
                rows[name] = figures | executed
                say(name, rows[name])
    return rows, problems


def executed(prefix: str) -> tuple[dict[str, Row], list[str]]:
    """The same of those instances whose executed instructions are counted.

    Args:
        prefix: of the kernels' names.

    Raises:
        PgolfError: no kernel that is counted has such a name.
    """
    kernels = [kernel for kernel in aot_items.ITEMS if kernel.startswith(prefix)]
    if not kernels:
        raise PgolfError(
            f"no kernel whose instructions are counted begins with {prefix!r}; there are "
            f"{', '.join(aot_items.ITEMS)}"
        )
    rows, problems = {}, []
    for kernel in kernels:
        compiled, wrong = compile_all(kernel, lambda *_: None, (aot_items.ARCH,))
        counted = {name: figures for name, figures in compiled.items() if "instructions" in figures}
        if not counted and not wrong:
            values = ", ".join(aot_items.ITEMS[kernel].arguments)
            wrong.append(f"{kernel}<{values}>: no such instance, which bench/aot_items.py declares")
        rows |= counted
        problems += wrong
    return rows, problems
