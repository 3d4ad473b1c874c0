"""The CUDA kernels as the mutator sees them, and how a changed one takes the module's place.

They are taken by the file. Its mutants are those of its device code and of the functions of other
files that it calls, however deep.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..simt.emulator import CSRC, Build, built_objects, emulated_module
from .cpp import functions, mutants, tokens
from .mutator import Mutant

VARIABLE = "PGOLF_CUDA_MODULE"
# Every operator has these, whose own tests they are: other changes to them say nothing of a kernel.
SHARED = ("element.h", "host_device.h", "kernels.h")


def cuda_kernels() -> list[str]:
    """The files of csrc/cuda that are compiled."""
    return sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))


def cuda_mutants(kernel: str) -> list[Mutant]:
    """Every mutant of a file of csrc/cuda and of the device code that it calls."""
    files = _included(Path("cuda") / kernel, {})
    defined: dict[str, set[str]] = {}  # function -> the names in its body
    reached, todo = set(), []
    for source in files.values():
        words = tokens(source)
        for function in functions(words):
            body = {w.text for w in words[function.begin : function.end] if w.kind == "word"}
            defined.setdefault(function.name, set()).update(body)
            if function.is_kernel:
                todo.append(function.name)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += defined[name] & defined.keys()
    return [m for path, source in files.items() for m in mutants(str(path), source, reached)]


def use_emulator() -> None:
    """Let this process and its children run CUDA kernels in the emulator, in a random order."""
    os.environ[VARIABLE] = str(emulated_module())
    os.environ["PGOLF_EMULATOR_SEED"] = "2"


def original_objects() -> Build:
    """What mutants are linked with."""
    with built_objects() as build:
        return build


def put_module_in_place(mutant: Mutant, kernel: str, build: Build, folder: str) -> None:
    """Build the module with this mutant, in `folder`, and let this process take it.

    Raises:
        SyntaxError: the compiler refuses it.
    """
    changed = Path(tempfile.mkdtemp(dir=folder))
    file = changed / mutant.module
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(mutant.source, encoding="utf-8")
    original = CSRC / "cuda" / kernel
    source = file if file.name == kernel else original
    objects = {**build.objects, original: changed / "kernel.o"}
    _compile(build, source, changed, objects[original])
    library = changed / "_C.so"
    _run(build.link_command(list(objects.values()), library))
    os.environ[VARIABLE] = str(library)


def _compile(build: Build, source: Path, first: Path, target: Path) -> None:
    _run([*build.compile_command(source, [first]), "-c", str(source), "-o", str(target)])


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
