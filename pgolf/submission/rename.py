"""Short names for what the package's modules define, the same in every module.

A name is changed where it is sure to mean a top-level definition: it is bound nowhere else, in no
function, class or module, is no module's name, and does not occur as a string, by which it could be
looked up. Attributes and keywords keep their names, so methods, fields and parameters do.
"""

import ast
import builtins
import itertools
import keyword
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from pgolf.submission.shake import FUNCTIONS, IMPORTS, aliases_of, bound, is_ours


def shorten(trees: Mapping[str, ast.Module], fixed: Iterable[str]) -> None:
    """Rename in place.

    Args:
        trees: module name -> its statements, of all modules that know each other.
        fixed: names that stay.
    """
    top = [(statement, tree) for tree in trees.values() for statement in tree.body]
    defined = {n for s, _ in top if not isinstance(s, IMPORTS) for n in bound(s)}
    parts = {part for name in trees for part in name.split(".")}
    inner = {n for s, _ in top for n in _bound_inside(s)}
    chosen = {n for n in defined - parts - inner - set(fixed) if not n.startswith("__")}
    uses = Counter(n for tree in trees.values() for n in _identifiers(tree))
    fresh = _short_names({*uses, *keyword.kwlist, *dir(builtins)})
    order = sorted(chosen, key=lambda n: (-uses[n], n))
    names = {n: short for n, short in zip(order, fresh, strict=False) if len(short) < len(n)}
    for tree in trees.values():
        imports = [n for n in ast.walk(tree) if isinstance(n, IMPORTS)]
        _Renamer(names, aliases_of(imports)).visit(tree)


def _bound_inside(statement: ast.stmt) -> Iterator[str]:
    """Names that anything but a definition at the top of a module binds."""
    for node in ast.walk(statement):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, IMPORTS):
            ours = isinstance(node, ast.ImportFrom) and is_ours(node.module)
            yield from (a.asname or a.name for a in node.names if a.asname or not ours)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)) or _comprehends(node):
            for child in ast.iter_child_nodes(node):
                for inside in ast.walk(child):
                    if isinstance(inside, ast.Name) and isinstance(inside.ctx, ast.Store):
                        yield inside.id
                    elif isinstance(inside, (*FUNCTIONS, ast.ClassDef)):
                        yield inside.name


def _comprehends(node: ast.AST) -> bool:
    return isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)


def _identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from filter(None, (node.name, node.asname))
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def _short_names(taken: set[str]) -> Iterator[str]:
    """A, B, ... AA, AB, ...: capitals, because locals get small letters."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_uppercase, repeat=length):
            if (name := "".join(letters)) not in taken:
                yield name


class _Renamer(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str], aliases: Mapping[str, str]):
        self.names, self.aliases = names, aliases

    def visit_Module(self, node: ast.Module) -> ast.Module:
        for statement in node.body:
            if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                statement.name = self.names.get(statement.name, statement.name)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if is_ours(node.module):
            for alias in node.names:
                alias.name = self.names.get(alias.name, alias.name)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        if isinstance(node.value, ast.Name) and node.value.id in self.aliases:
            node.attr = self.names.get(node.attr, node.attr)
        return self.generic_visit(node)
