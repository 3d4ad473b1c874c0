"""What a module loses before it goes into a script: words for readers, kernels in C++ and CUDA.

A script has no compiled half, prints no lists of keys, and runs no tests of its operators. So the
table of an operator keeps what choosing and calling need, and the descriptions of settings go.
Annotations go too, except where something reads them: the schema of an opaque operator, the
constants of a Triton kernel, the types of settings. A file beside the module becomes a part of it.
"""

import ast
import json
from pathlib import Path
from typing import Any

# Makers of implementations: those that need pgolf._C, and all.
COMPILED = frozenset({"in_cpp", "in_cuda"})
KERNELS = COMPILED | {"in_triton"}
# Fields of a dataclass that only tests, benchmarks and documents read.
READ_BY_PEOPLE = {
    "Operator": {"call", "reference", "differentiable", "samples", "cost", "mutates"},
    "Config": {"reason"},  # of a kernel's launch, from a table in JSON
}
# Functions whose second argument is a description.
DESCRIBED = {"opt"}
# Decorators that read the annotations of their function.
READS_ANNOTATIONS = {"custom_op", "jit"}


def last_name(node: ast.expr) -> str:
    """'f' of the expressions f, a.b.f and f(...); '' of others."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class _Specialiser(ast.NodeTransformer):
    def __init__(self, module: str, file: Path, makers: frozenset[str]):
        self.module, self.file, self.makers = module, file, makers

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        if not READS_ANNOTATIONS.intersection(map(last_name, node.decorator_list)):
            a = node.args
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
                if argument is not None:
                    argument.annotation = None
            node.returns = None
        return _without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        dropped = READ_BY_PEOPLE.get(node.name, ())
        for field in [s for s in node.body if isinstance(s, ast.AnnAssign)]:
            if field.target.id in dropped:
                node.body.remove(field)
            # A dataclass or a named tuple needs some type; that of a setting is read.
            elif not isinstance(field.value, ast.Call) or last_name(field.value) not in DESCRIBED:
                field.annotation = ast.Name("int", ast.Load())
        methods = [s for s in node.body if not isinstance(s, ast.AnnAssign)]
        node.body = [
            self.generic_visit(s) if s not in methods else self.visit(s) for s in node.body
        ]
        return _without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        self.generic_visit(node)
        return node.value and ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_Call(self, node: ast.Call) -> ast.Call:
        name = last_name(node.func)
        if name == "with_name" and ast.unparse(node.func.value) == "Path(__file__)":
            return _embedded(self.file.with_name(node.args[0].value))
        dropped = READ_BY_PEOPLE.get(name, ())
        node.keywords = [k for k in node.keywords if k.arg not in dropped]
        if name in DESCRIBED:
            node.args[1] = ast.Constant("")
        return self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        kept = [
            (key, value)
            for key, value in zip(node.keys, node.values, strict=True)
            if not (isinstance(value, ast.Call) and last_name(value) in self.makers)
        ]
        node.keys, node.values = [k for k, _ in kept], [v for _, v in kept]
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> ast.For | None:
        self.generic_visit(node)
        return node if node.body else None

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt] | None:
        """Without a check of an operator's caller; a module knows its own name."""
        test, chosen = node.test, None
        if isinstance(test, ast.Compare) and last_name(test.left) == "__name__":
            equal = test.comparators[0].value == self.module
            chosen = node.body if equal is isinstance(test.ops[0], ast.Eq) else node.orelse
        elif self.module.startswith("pgolf.ops.") and _checks_the_caller(node):
            chosen = node.orelse
        if chosen is not None:
            return self.generic_visit(ast.Module(chosen, [])).body or None
        self.generic_visit(node)
        if not node.body and not node.orelse:
            return None
        node.body = node.body or [ast.Pass()]
        return node


def _checks_the_caller(node: ast.If) -> bool:
    """Whether a statement refuses wrong arguments of an operator.

    A script calls operators as the package does, and in no other way, so these checks go: those
    that raise ValueError. What an implementation cannot do is still refused; that message names
    `impl`.
    """
    first = node.body[0]
    if not isinstance(first, ast.Raise) or last_name(first.exc) != "ValueError":
        return False
    names = {n.id for n in ast.walk(first) if isinstance(n, ast.Name)}
    binds = any(isinstance(n, ast.NamedExpr) for n in ast.walk(node.test))
    return "impl" not in names and not binds


class _ReferenceOnly(ast.NodeTransformer):
    """Folds `impl == "reference"`, which always holds where an operator has no implementations."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return ast.Constant("reference") if last_name(node) == "resolve" else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if last_name(node.left) == "impl" and ast.unparse(node.comparators[0]) == "'reference'":
            return ast.Constant(isinstance(node.ops[0], ast.Eq))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        if any(isinstance(v, ast.Constant) and v.value is decides for v in node.values):
            return ast.Constant(decides)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        body = []
        for statement in node.body:
            known = isinstance(statement, ast.If) and isinstance(statement.test, ast.Constant)
            if known:
                body += statement.body if statement.test.value else statement.orelse
            else:
                body.append(statement)
            if body and isinstance(body[-1], ast.Return):
                break
        node.body = body or [ast.Pass()]
        return node


def _has_no_implementation(tree: ast.Module) -> bool:
    """Whether a module defines an operator whose table of implementations is empty."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and last_name(n) == "Operator"]
    tables = [k.value for call in calls for k in call.keywords if k.arg == "implementations"]
    return bool(tables) and all(isinstance(t, ast.Dict) and not t.keys for t in tables)


def _without_docstring(node: ast.FunctionDef | ast.ClassDef) -> ast.FunctionDef | ast.ClassDef:
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    return node


def _embedded(file: Path) -> ast.expr:
    """What stands for the path of a table in JSON."""
    dropped = set().union(*READ_BY_PEOPLE.values())

    def shorter(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in dropped}

    table = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=shorter)
    text = json.dumps(table, separators=(",", ":"))
    path = f"SimpleNamespace(name={file.name!r}, read_text=lambda **_: {text!r})"
    return ast.parse(f"__import__('types').{path}", mode="eval").body


def specialise(module: str, file: Path, makers: frozenset[str]) -> ast.Module:
    """The syntax tree of a module as a script needs it.

    Args:
        module: its name.
        file: its source.
        makers: functions that make the implementations to leave out.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if ast.get_docstring(tree, clean=False) is not None:
        tree.body = tree.body[1:]
    tree = _Specialiser(module, file, makers).visit(tree)
    if _has_no_implementation(tree):
        tree = _ReferenceOnly().visit(tree)
    return ast.fix_missing_locations(tree)
