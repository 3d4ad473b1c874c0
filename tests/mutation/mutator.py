"""Small wrong changes to Python functions: whoever runs the tests on them learns what they miss.

Nothing in here knows what the functions do: give any source text and the names of its functions.
"""

import ast
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A module with one change in one function."""

    module: str
    function: str
    change: str  # 'the statement as it was => as it is'; unique in the module
    line: int  # of that statement in the original
    source: str  # the whole module, changed

    @property
    def name(self) -> str:
        """Stays the same while the statement does, wherever it is moved in the file."""
        return f"{self.module}.{self.function}: {self.change}"


# What an operator is replaced by.
BINARY: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Add,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mod, ast.Mult), ast.Mod: (ast.FloorDiv,),
    ast.LShift: (ast.RShift,), ast.RShift: (ast.LShift,), ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,), ast.BitXor: (ast.BitOr,), ast.Pow: (ast.Mult,), ast.MatMult: (),
}  # fmt: skip
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
NOT_COMMUTATIVE = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.LShift, ast.RShift, ast.Pow)
RENAMED = {"minimum": "maximum", "min": "max", "sum": "max", "all": "any", "floor": "ceil"}
RENAMED |= {new: old for old, new in RENAMED.items() if old != "sum"}


def mutants(
    module: str,
    source: str,
    functions: Collection[str],
    skip: Callable[[ast.AST], bool] = lambda node: False,
) -> list[Mutant]:
    """Every mutant of these functions (top-level names) of a module, in the order of its text.

    `skip` names syntax that is left alone with all below it. Annotations, defaults, decorators and
    docstrings are left alone always.

    Raises:
        ValueError: a function is not there.
    """
    tree = ast.parse(source)
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if missing := set(functions) - found:
        raise ValueError(f"the module has no functions {', '.join(sorted(missing))}")
    result: dict[tuple[str, str], Mutant] = {}
    texts = list(map(ast.unparse, tree.body))  # of which a mutant changes one
    for place, function in enumerate(tree.body):
        if not isinstance(function, ast.FunctionDef) or (name := function.name) not in functions:
            continue
        for statement, change in _changes(function, skip):
            before = _first_line(statement)
            with change:
                # A statement that is dropped is no longer what `statement` is.
                text = f"{before} => {_first_line(change.now(statement))}"
                while (name, text) in result:  # the same change of the same words elsewhere
                    text += " (again)"
                whole = "\n".join([*texts[:place], ast.unparse(function), *texts[place + 1 :]])
                result[name, text] = Mutant(module, name, text, statement.lineno, whole)
    return list(result.values())


def shuffled(all_mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """In an order that each mutant's name and the seed decide.

    So the first few change little when a statement does, and a survivor stays listed.
    """

    def rank(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed}:{mutant.name}".encode()).digest()

    return sorted(all_mutants, key=rank)


class _Change:
    """Replaces one child of a syntax node while it is entered as a context."""

    def __init__(self, parent: ast.AST, field: str, index: int | None, new: ast.AST):
        self.parent, self.field, self.index, self.new = parent, field, index, new

    def _swap(self) -> None:
        children = getattr(self.parent, self.field)
        if self.index is None:
            setattr(self.parent, self.field, self.new)
            self.new = children
        else:
            children[self.index], self.new = self.new, children[self.index]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exc: object) -> None:
        self._swap()

    def now(self, statement: ast.stmt) -> ast.stmt:
        """What stands in a statement's place while the change is in force."""
        if self.new is not statement:
            return statement
        child = getattr(self.parent, self.field)
        return child if self.index is None else child[self.index]


def _changes(
    function: ast.FunctionDef, skip: Callable[[ast.AST], bool]
) -> Iterator[tuple[ast.stmt, _Change]]:
    """(statement that it is in, change) for a function's body."""
    assigned = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}

    def visit(parent: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.stmt, _Change]]:
        for field, children in ast.iter_fields(parent):
            if parent is function and field != "body":
                continue
            listed = isinstance(children, list)
            for index, child in enumerate(children if listed else [children]):
                if not isinstance(child, ast.AST) or skip(child) or _is_docstring(child):
                    continue
                inside = child if isinstance(child, ast.stmt) else statement
                for new in _replacements(child, assigned, skip):
                    yield inside, _Change(parent, field, index if listed else None, new)
                yield from visit(child, inside)
                assigned.update(_targets(child))

    yield from visit(function, function)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _targets(node: ast.AST) -> set[str]:
    if not isinstance(node, ast.Assign):
        return set()
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _stored(n)}


def _stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _replacements(
    node: ast.AST, assigned: Collection[str], skip: Callable[[ast.AST], bool]
) -> Iterator[ast.AST]:
    """What a node is replaced by, one wrong change each; none that leaves it as it is."""
    for new in _candidates(node, assigned, skip):
        if ast.dump(new) != ast.dump(node):
            yield new


def _candidates(
    node: ast.AST, assigned: Collection[str], skip: Callable[[ast.AST], bool]
) -> Iterator[ast.AST]:
    match node:
        case ast.AugAssign(target, op, value):
            yield ast.Pass()
            for other in BINARY[type(op)]:
                yield ast.AugAssign(target, other(), value)
        case ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Assign():
            # Dropping a first assignment would only be an unknown name.
            if _targets(node) and _targets(node) <= set(assigned):
                yield ast.Pass()
        case ast.If(test, body, orelse) | ast.IfExp(test, body, orelse):
            if not isinstance(test, ast.Compare):  # which is turned round itself
                yield type(node)(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.BinOp(left, op, right):
            for other in BINARY[type(op)]:
                yield ast.BinOp(left, other(), right)
            yield left
            if isinstance(op, NOT_COMMUTATIVE):
                yield ast.BinOp(right, op, left)
        case ast.Compare(left, [op], comparators):
            for other in COMPARISONS[type(op)]:
                yield ast.Compare(left, [other()], comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.Constant(value):
            yield from map(ast.Constant, _other_values(value))
        case ast.Call():
            yield from _other_calls(node, skip)
        case ast.Tuple(elts, ast.Load()) | ast.List(elts, ast.Load()):
            for swapped in _swaps(elts):
                yield type(node)(swapped, ast.Load())


def _other_values(value: object) -> Iterator[object]:
    match value:
        case bool():
            yield not value
        case int():
            yield value + 1
            if value == 1:
                yield 0
        case float():
            yield 2 * value or 1.0


def _other_calls(call: ast.Call, skip: Callable[[ast.AST], bool]) -> Iterator[ast.Call]:
    """Minimum for maximum or, elsewhere, two neighbouring arguments swapped; no keyword."""
    match call.func:
        case ast.Attribute(value, name, context) if name in RENAMED:
            yield ast.Call(
                ast.Attribute(value, RENAMED[name], context), call.args, call.keywords
            )
        case ast.Name(name, context) if name in RENAMED:
            yield ast.Call(ast.Name(RENAMED[name], context), call.args, call.keywords)
        case _:
            for args in _swaps(call.args):
                yield ast.Call(call.func, args, call.keywords)
    for i, keyword in enumerate(call.keywords):
        if not skip(keyword):
            yield ast.Call(call.func, call.args, call.keywords[:i] + call.keywords[i + 1 :])


def _swaps(items: list[ast.expr]) -> Iterator[list[ast.expr]]:
    for i in range(len(items) - 1):
        yield [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def _first_line(statement: ast.stmt) -> str:
    return ast.unparse(statement).splitlines()[0]
