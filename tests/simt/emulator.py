"""Builds modules whose CUDA kernels run on the CPU: csrc/cuda/*.cu compiled by the C++ compiler.

    emulated_module()    pgolf's bindings with emulated kernels, for PGOLF_CUDA_MODULE to name
    built_objects()      what it was linked from
    Build(...)           the same of other sources, with other flags, in another folder

The emulator itself is the C++ beside this file; machine.h says which mistakes it finds. A module is
built once for each content of its sources, in build/; objects that did not change stay.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
SUFFIXES = (".cu", ".cuh", ".cpp", ".h", ".def")
KEPT = 8  # modules of older sources
# A grid of few blocks, as kernels that step through their work have to do so then.
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -DPGOLF_MAX_BLOCKS=3"
).split()
# Of kernels: what makes a GPU stop is an error of the emulator, see checks.cpp.
CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")


class Missing(Exception):
    """Nothing can be built here: there is no compiler, no ninja or no Python.h."""


def compiler() -> tuple[str, ...]:
    """The C++ compiler as a command.

    Raises:
        Missing: there is none, or it could not build a module for this Python.
    """
    found = [name for name in ("g++", "c++") if shutil.which(name)]
    command = tuple(shlex.split(os.environ.get("CXX", ""))) or tuple(found[:1])
    if not command or not shutil.which(command[0]):
        raise Missing("no C++ compiler on PATH (apt-get install g++, or set CXX)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise Missing("no Python.h (apt-get install python3-dev)")
    return command


@dataclass(frozen=True)
class Build:
    """A shared library of kernels and what calls them, linked with the emulator.

    Attributes:
        kernels: .cu files.
        others: .cpp files.
        folder: for its objects, its ninja file and the library; no other build may use it.
        flags: for the compiler and the linker, beside the usual ones.
        checks: for kernels.
    """

    kernels: Sequence[Path]
    others: Sequence[Path]
    folder: Path
    flags: Sequence[str] = ()
    checks: Sequence[str] = CHECKS

    @property
    def library(self) -> Path:
        return self.folder / "_C.so"

    @property
    def objects(self) -> dict[Path, Path]:
        """Source -> object, in the order of the link, which machine.cpp relies on."""
        begin, end = HERE / "shared_begin.cpp", HERE / "shared_end.cpp"
        rest = [p for p in emulator_sources(self.checks) if p not in (begin, end)]
        sources = [begin, *self.kernels, end, *rest, *self.others]
        return {p: self.folder / f"{i}-{p.name}.o" for i, p in enumerate(sources)}

    def compile_command(self, source: Path, first: Sequence[Path] = ()) -> list[str]:
        """What compiles a source; headers are looked for in the folders `first` before others."""
        command = [*compiler(), *FLAGS, *self.flags]
        command += [f"-I{path}" for path in (*first, HERE / "include", self.folder, CSRC)]
        command += ["-isystem", sysconfig.get_path("include")]
        if source.suffix == ".cu":  # warnings are nvcc's task, to which unrolling is known
            return [*command, "-O1", "-w", "-x", "c++", *self.checks]
        if source.parent == HERE:
            return [*command, "-O2", "-Wall", "-Wextra"]
        return [*command, "-O0"]  # bindings: little to run and much to compile

    def link_command(self, objects: Sequence[Path], library: Path) -> list[str]:
        """What links objects, in the order of `objects` above."""
        linked = [*compiler(), *self.flags, "-shared", *map(str, objects)]
        return [*linked, "-lpthread", "-ldl", "-o", str(library)]

    def ninja_text(self) -> str:
        """A rule for each way to compile, a line for each object, and the link."""
        rules, lines = {}, [f"builddir = {self.folder}"]
        for source, target in self.objects.items():
            command = f"{shlex.join(self.compile_command(source))} -MMD -MF $out.d -c $in -o $out"
            if command not in rules:
                rules[command] = f"compile{len(rules)}"
                lines += [f"rule {rules[command]}", f"  command = {command}"]
                lines += ["  description = $out", "  depfile = $out.d", "  deps = gcc"]
            lines.append(f"build {target}: {rules[command]} {source}")
        objects = list(self.objects.values())
        link = shlex.join(self.link_command(objects, self.library))
        lines += ["rule link", f"  command = {link}", "  description = $out"]
        lines.append(f"build {self.library}: link {' '.join(map(str, objects))}")
        return "\n".join(lines) + "\n"

    def run(self, jobs: int | None = None) -> Path:
        """Compile what changed; the library.

        Raises:
            RuntimeError: with what the compiler said.
        """
        file = self.folder / "build.ninja"
        _write_if_changed(file, self.ninja_text())
        command = [_ninja(), "-f", str(file), *(["-j", str(jobs)] if jobs else [])]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
        return self.library


def emulator_sources(checks: Sequence[str] = CHECKS) -> list[Path]:
    """The emulator's own files; without its handlers where the sanitizers bring theirs."""
    names = {"checks.cpp"} if not checks else set()
    return [p for p in sorted(HERE.glob("*.cpp")) if p.name not in {*names, "no_cpu.cpp"}]


def pgolf_build(folder: Path, flags: Sequence[str] = (), checks: Sequence[str] = CHECKS) -> Build:
    """pgolf's CUDA kernels behind pgolf's bindings; writes the headers that setup.py writes."""
    values = {
        "COMPILER": compiler_version(),
        "NVCC": "",
        "CUDART": "emulated",
        "ARCHS": "",
    }
    reason = '#define PGOLF_REASON "the tests run CUDA kernels without a GPU"\n'
    _write_if_changed(folder / "build_reason.h", reason)
    lines = [f"#define PGOLF_{name} {json.dumps(value)}" for name, value in values.items()]
    _write_if_changed(folder / "build_info.h", "\n".join([*lines, "#define PGOLF_CUDA 1", ""]))
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    bindings = [CSRC / "bindings.cpp", *sorted((CSRC / "bindings").glob("*.cpp"))]
    return Build(kernels, [*bindings, HERE / "no_cpu.cpp"], folder, flags, checks)


def emulated_module(build: bool = True) -> Path:
    """The module for the sources as they are, built if it is not there.

    Several processes may call this at once: one builds, the others wait.

    Args:
        build: or else refuse where it is not there.

    Raises:
        Missing: there is nothing to build it with, or it is not to be built.
        RuntimeError: with what the compiler said.
    """
    folder = ROOT / "build"
    target = folder / f"emulated-{_content()}" / "_C.so"
    if not target.exists():
        if not build:
            raise Missing("it is not built yet: python -m tests.simt.emulator")
        with _alone() as objects:
            if target.exists():  # another process was faster
                return target
            library = pgolf_build(objects).run()
            target.parent.mkdir(exist_ok=True)
            half = target.with_suffix(f".{os.getpid()}")
            shutil.copy2(library, half)
            half.replace(target)
            _forget_old(folder)
    return target


@contextlib.contextmanager
def _alone() -> Iterator[Path]:
    """The folder of pgolf's objects, which nobody else compiles meanwhile."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "emulator.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder / "emulator-objects"


def built_objects() -> Build:
    """The objects of the sources as they are.

    Raises:
        Missing, RuntimeError: as above.
    """
    with _alone() as folder:
        build = pgolf_build(folder)
        build.run()
        return build


def _content() -> str:
    """A hash of everything that the module depends on."""
    state = hashlib.sha256()
    words = [compiler_version(), sysconfig.get_config_var("SOABI"), *FLAGS, *CHECKS]
    state.update("\n".join([*map(str, words), *compiler()]).encode())
    for root in (CSRC, HERE):
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES or path.name == Path(__file__).name:
                state.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def compiler_version() -> str:
    text = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    return (text.splitlines() or ["?"])[0]


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        ninja = None
    found = shutil.which("ninja", path=ninja.BIN_DIR if ninja else None) or shutil.which("ninja")
    if not found:
        raise Missing(f"no ninja for {sys.executable}: pip install ninja")
    return found


def _forget_old(folder: Path) -> None:
    built = [path.parent for path in folder.glob("emulated-*/_C.so")]
    for old in sorted(built, key=lambda p: p.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print(emulated_module())
