"""The Triton kernels as the mutator sees them, and how a changed one takes its module's place."""

import ast
import functools
import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from .mutator import Mutant, mutants

FOLDER = Path(__file__).resolve().parents[2] / "triton_kernels"
PACKAGE = "pgolf.triton_kernels"
# Their arguments are checked by the compiler, or change no result: a mutant would be refused at
# once, or be none.
INERT_CALLS = ("arange", "static_assert", "assume", "multiple_of", "max_contiguous")
# Arguments that change speed, and in the interpreter no result.
INERT_ARGUMENTS = ("flatten", "num_stages", "warp_specialize", "eviction_policy", "input_precision")


def kernels() -> list[str]:
    """Kernels that are launched: those of configs.json."""
    return list(json.loads((FOLDER / "configs.json").read_text(encoding="utf-8")))


def module_of(kernel: str) -> str:
    """The module of triton_kernels that a kernel stands in."""
    return _jit_functions()[kernel][0]


@functools.cache
def kernel_mutants(kernel: str) -> list[Mutant]:
    """Every mutant of a kernel and of the jit functions that it calls, however deep."""
    definitions = _jit_functions()
    reached, todo = set(), [kernel]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += _called(definitions[name][1]) & definitions.keys()
    result = []
    for module in sorted({definitions[name][0] for name in reached}):
        own = [name for name in reached if definitions[name][0] == module]
        source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        result += mutants(module, source, own, _inert)
    return result


def put_in_place(mutant: Mutant, folder: str) -> None:
    """Import the mutant, from a file in `folder`, as the module that it is a mutant of.

    For a process of its own, in which no kernel is imported yet.
    """
    full_name = f"{PACKAGE}.{mutant.module}"
    modules = {f"{PACKAGE}.{module}" for module, _ in _jit_functions().values()}
    if early := modules & sys.modules.keys():
        raise RuntimeError(f"{early} would go on with the kernels as they were")
    # Triton reads a kernel's source from its file, when it is first run.
    path = Path(tempfile.mkdtemp(dir=folder)) / f"{mutant.module}.py"
    path.write_text(mutant.source, encoding="utf-8")
    package = importlib.import_module(PACKAGE)
    spec = importlib.util.spec_from_file_location(full_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    setattr(package, mutant.module, module)
    spec.loader.exec_module(module)


def _called(definition: ast.FunctionDef) -> set[str]:
    calls = [node.func for node in ast.walk(definition) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def _inert(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Attribute(_, name)) | ast.Expr(ast.Call(ast.Attribute(_, name))):
            return name in INERT_CALLS
        case ast.keyword(name):
            return name in INERT_ARGUMENTS
    return False


@functools.cache
def _jit_functions() -> dict[str, tuple[str, ast.FunctionDef]]:
    """Every @triton.jit function: name -> (module, definition)."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found[node.name] = (path.stem, node)
    return found
