"""The CUDA kernels as the mutator sees them, and how a changed one takes the module's place.

They are taken by the file. Its mutants are those of its device code and of the functions of other
files that it calls, however deep.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..simt.emulator import CSRC, Build, emulated_module
from .cpp import functions, mutants, tokens
from .mutator import Mutant

VARIABLE = "PGOLF_CUDA_MODULE"
# Every operator has these, whose own tests they are: other changes to them say nothing of a kernel.
SHARED = ("element.h", "host_device.h", "kernels.h")


def cuda_kernels() -> list[str]:
    """The files of csrc/cuda that are compiled."""
    return sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))


def cuda_sources(kernel: str) -> tuple[str, ...]:
    """What a proof of a file of csrc/cuda depends on: it, its bindings and its operator."""
    stem = kernel.removesuffix(".cu")
    operator = {"leaky_relu2": "leaky_relu2_mlp"}.get(stem, stem)
    glue = f"pgolf/ops/{operator}_kernels.py"  # where the operator's own file has no room for it
    return (
        f"csrc/cuda/{kernel}", f"csrc/bindings/{stem}.cpp", f"pgolf/ops/{operator}.py",
        *([glue] if (CSRC.parent / glue).exists() else []),
    )  # fmt: skip


@functools.cache
def cuda_mutants(kernel: str) -> list[Mutant]:
    """Every mutant of a file of csrc/cuda and of the device code that it calls."""
    own = Path("cuda") / kernel
    files = _included(own, {})
    bodies: dict[str, list[tuple[Path, set[str]]]] = {}  # function -> where, the names in its body
    reached, todo = set(), []
    for path, source in files.items():
        words = tokens(source)
        for function in functions(words):
            body = {w.text for w in words[function.begin : function.end] if w.kind == "word"}
            bodies.setdefault(function.name, []).append((path, body))
            if function.is_kernel:
                todo.append(function.name)
    while todo:
        name = todo.pop()
        # Which of several functions of a name is called is only clear in the kernel's own file.
        for path, body in bodies[name]:
            clear = len(bodies[name]) == 1 or path == own
            if clear and (path, name) not in reached:
                reached.add((path, name))
                todo += body & bodies.keys()
    return [
        mutant
        for path, source in files.items()
        for mutant in mutants(str(path), source, {n for p, n in reached if p == path})
    ]


def use_emulator() -> None:
    """Let this process and its children run CUDA kernels in the emulator, in a random order."""
    os.environ[VARIABLE] = str(emulated_module())
    os.environ["PGOLF_EMULATOR_SEED"] = "2"


def put_module_in_place(mutant: Mutant, kernel: str, build: Build, folder: str) -> None:
    """Build the module with this mutant, in `folder`, and let this process take it.

    Raises:
        SyntaxError: the compiler refuses it.
    """
    changed = Path(tempfile.mkdtemp(dir=folder))
    target = _compiled(mutant.module, mutant.source, kernel, build, changed)
    # Code that this kernel never calls is compiled away: what is the same program is no mutant.
    name = f"{kernel}-{mutant.module}".replace("/", "-")
    known = Path(folder) / name
    if not known.exists():
        unchanged = (CSRC / mutant.module).read_text(encoding="utf-8")
        # (In a folder whose name is as long, since the object holds the names of its sources.)
        beside = Path(tempfile.mkdtemp(dir=folder))
        half = beside / "half"
        half.write_bytes(
            _without_path(_compiled(mutant.module, unchanged, kernel, build, beside), beside)
        )
        half.replace(known)
    if known.read_bytes() == _without_path(target, changed):
        raise SyntaxError("the same program")
    objects = {**build.objects, CSRC / "cuda" / kernel: target}
    library = changed / "_C.so"
    _run(build.link_command(list(objects.values()), library))
    os.environ[VARIABLE] = str(library)


def _compiled(module: str, source: str, kernel: str, build: Build, folder: Path) -> Path:
    """The object of a kernel's file, for which one source of csrc is this one."""
    file = folder / module
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    compiled = file if file.name == kernel else CSRC / "cuda" / kernel
    target = folder / "kernel.o"
    _run([*build.compile_command(compiled, [folder]), "-c", str(compiled), "-o", str(target)])
    return target


def _without_path(target: Path, folder: Path) -> bytes:
    name = str(folder).encode()
    return target.read_bytes().replace(name, b"." * len(name))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise SyntaxError((errors or ["the compiler failed"])[0])


def _included(path: Path, found: dict[Path, str]) -> Mapping[Path, str]:
    """This file of csrc and all that it includes from there."""
    if path not in found and path.name not in SHARED:
        found[path] = (CSRC / path).read_text(encoding="utf-8")
        for name in re.findall(r'#include "([^"]+)"', found[path]):
            beside = path.parent / name
            _included(beside if (CSRC / beside).exists() else Path(name), found)
    return found
