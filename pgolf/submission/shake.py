"""Tree shaking: the definitions of the package that an entry point can reach, and no others.

The unit is a top-level statement, or a method of a class. Reachability is by name, and errs on the
side of keeping:

- A name in a live unit, in whatever scope, makes live what binds it in its module; an import leads
  on to the module that it names.
- A method is live with its class if its name occurs as an attribute, or as a string, in any live
  unit, if it is a dunder, or if it overrides a method of a class from outside of the package.
- A module that is imported by a computed name, import_module(f"pgolf.codecs.{name}"), is live if
  its last name occurs as a string in a live unit; what it defines is treated like methods.
- A statement that acts (a call, a registration) is live with its module, or, if it acts on a name
  of its module as `_forward.register_autograd(...)` does, with that name.

Not seen: names that are put together at run time, `globals()`, star imports (an error).
"""

import ast
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from pgolf.submission.specialise import last_name

PACKAGE = "pgolf"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(eq=False)
class Unit:
    """A statement that is kept or left out as a whole, apart from the methods of a class."""

    module: "Module"
    node: ast.stmt
    names: set[str]  # what it binds in its module
    acts: bool = False
    subject: str = ""  # the name that it acts on
    owner: "Unit | None" = None  # the class of a method
    live: bool = False


@dataclass(eq=False)
class Module:
    """The units of a module, in order."""

    name: str
    units: list[Unit] = field(default_factory=list)
    methods: list[Unit] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)  # its names of modules of the package
    live: bool = False
    computed: bool = False  # imported by a computed name

    def binding(self, name: str) -> list[Unit]:
        return [u for u in self.units if name in u.names]


def bound(node: ast.AST) -> set[str]:
    """Names that a statement binds in the scope that it stands in."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    if isinstance(node, IMPORTS):
        return {a.asname or a.name.partition(".")[0] for a in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    return set().union(*map(bound, ast.iter_child_nodes(node)))


def _root(node: ast.expr) -> str:
    """'a' of a, a.b, a[b], a.b(c)."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_ours(module: str) -> bool:
    """Whether a module belongs to the package."""
    return module.partition(".")[0] == PACKAGE


def target_of(node: ast.ImportFrom) -> str:
    """The module that names are imported from.

    Raises:
        ValueError: a relative or a star import.
    """
    if node.level or any(a.name == "*" for a in node.names):
        raise ValueError(f"from {'.' * node.level}{node.module} import: name what is imported")
    return node.module


@functools.cache
def is_module(name: str) -> bool:
    """Whether there is a module of that name."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def aliases_of(nodes: Iterable[ast.stmt]) -> dict[str, str]:
    """The names that imports give to modules of the package."""
    found = {}
    for node in nodes:
        for a in node.names:
            if isinstance(node, ast.Import):
                target = a.name if a.asname else a.name.partition(".")[0]
            else:
                target = f"{node.module}.{a.name}"
            if is_ours(target) and is_module(target):
                found[a.asname or a.name.partition(".")[0]] = target
    return found


class Shaker:
    """Finds what is reachable.

    Args:
        parse: module name -> syntax tree, whose statements are used up.
        absent: modules that a computed import shall not find.
    """

    def __init__(self, parse: Callable[[str], ast.Module], absent: Iterable[str] = ()):
        self.parse, self.absent = parse, set(absent)
        self.modules: dict[str, Module] = {}
        self.words: set[str] = set()  # attributes and strings of live units
        self.strings: set[str] = set()
        self.computed: set[str] = set()  # packages of which modules are imported by computed names

    def reach(self, module: str, name: str) -> dict[str, ast.Module]:
        """The live modules by name, each with its live statements."""
        self._want(module, name)
        before = None
        while before != (before := self._size()):
            self._by_word()
        return {m.name: _live_tree(m) for m in self.modules.values() if m.live}

    @property
    def looked_up(self) -> set[str]:
        """Names by which something may be looked up at run time: they have to stay."""
        open_to_words = [u for m in self.modules.values() if m.computed for u in m.units]
        return self.strings.union(*(u.names for u in open_to_words))

    def _size(self) -> tuple[int, int]:
        units = [u for m in self.modules.values() for u in (*m.units, *m.methods)]
        return len(self.words), sum(u.live for u in units) + len(self.computed)

    # --- modules --------------------------------------------------------------------------------


    def _module(self, name: str) -> Module:
        """The module, live: what acts in it and in the packages around it is live too."""
        if name not in self.modules:
            if not is_module(name):
                raise ValueError(f"{name} is asked for, and no module defines it")
            self.modules[name] = self._split(name)
        module = self.modules[name]
        if not module.live:
            module.live = True
            if "." in name:
                self._module(name.rpartition(".")[0])
            for unit in module.units:
                if unit.acts and not unit.subject:
                    self._revive(unit)
        return module

    def _split(self, name: str) -> Module:
        module = Module(name)
        for node in self.parse(name).body:
            if isinstance(node, ast.Import):
                parts = [ast.Import([a]) for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = [ast.ImportFrom(target_of(node), [a], 0) for a in node.names]
            else:
                parts = [node]
            module.units += [Unit(module, part, bound(part)) for part in parts]
        module.aliases = aliases_of(u.node for u in module.units if isinstance(u.node, IMPORTS))
        self._judge(module)
        for unit in module.units:
            if isinstance(unit.node, ast.ClassDef):
                methods = [n for n in unit.node.body if isinstance(n, FUNCTIONS)]
                module.methods += [Unit(module, n, {n.name}, owner=unit) for n in methods]
        return module

    def _judge(self, module: Module) -> None:
        """Which statements act, and on what."""
        functions = {n for u in module.units if isinstance(u.node, FUNCTIONS) for n in u.names}
        own, ours = set(functions), set(functions)
        for unit in module.units:
            if not isinstance(unit.node, IMPORTS):
                own |= unit.names
            elif isinstance(unit.node, ast.ImportFrom) and is_ours(unit.node.module):
                ours |= unit.names
        for unit in module.units:
            node = unit.node
            if isinstance(node, FUNCTIONS):
                roots = [_root(d) for d in node.decorator_list if not isinstance(d, ast.Name)]
                unit.subject = next((r for r in roots if r in own), "")
                unit.acts = bool(unit.subject)
            elif isinstance(node, ast.Expr):
                root = _root(node.value)
                unit.acts, unit.subject = True, root if root in own else ""
            elif isinstance(node, ast.Assign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                inside = [_root(t) for t in targets if not isinstance(t, ast.Name | ast.Tuple)]
                calls = {_root(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
                unit.subject = inside[0] if inside else ""
                unit.acts = bool(inside or calls & ours)
            elif not isinstance(node, (*IMPORTS, ast.ClassDef)):
                unit.acts = any(isinstance(n, ast.Raise | ast.Expr) for n in ast.walk(node))

    # --- reachability ---------------------------------------------------------------------------

    def _want(self, module: str, name: str) -> None:
        """Make live what `module.name` is."""
        found = self._module(module)
        for unit in found.binding(name):
            self._revive(unit)
        if not found.binding(name) and not name.startswith("__"):
            self._module(f"{module}.{name}")

    def _revive(self, unit: Unit) -> None:
        if unit.live:
            return
        unit.live = True
        self._module(unit.module.name)
        for other in unit.module.units:
            if other.acts and other.subject in unit.names:
                self._revive(other)
        _Reader(self, unit).read()

    def _by_word(self) -> None:
        """What is reached by an attribute or a string rather than by a name in scope."""
        for package in list(self.computed):
            for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
                name = f"{package}.{info.name}"
                if info.name in self.strings and name not in self.absent:
                    self._module(name).computed = True
        for module in list(self.modules.values()):
            if module.computed:
                for unit in module.units:
                    if self.words & unit.names and not isinstance(unit.node, IMPORTS):
                        self._revive(unit)
            for unit in module.methods:
                if unit.owner.live and not unit.live and self._is_called(unit):
                    self._revive(unit)

    def _is_called(self, method: Unit) -> bool:
        name = method.node.name
        if name in self.words or (name.startswith("__") and name.endswith("__")):
            return True
        return any(hasattr(c, name) for c in self._outside(method.module, method.owner.node))

    def _outside(self, module: Module, node: ast.ClassDef) -> list[Any]:
        """Classes from outside of the package that a class derives from."""
        found = []
        for base in node.bases:
            for unit in module.binding(_root(base)):
                if isinstance(unit.node, ast.ClassDef):
                    found += self._outside(module, unit.node)
                elif isinstance(unit.node, IMPORTS):
                    found += self._imported(unit.node, base)
        return found

    def _imported(self, node: ast.Import | ast.ImportFrom, base: ast.expr) -> list[Any]:
        alias, path = node.names[0], ast.unparse(base).split(".")[1:]
        if isinstance(node, ast.ImportFrom) and is_ours(node.module):
            other = self.modules[node.module]
            units = [u for u in other.binding(alias.name) if isinstance(u.node, ast.ClassDef)]
            return [c for u in units for c in self._outside(other, u.node)]
        if isinstance(node, ast.ImportFrom):
            thing = importlib.import_module(node.module)
            path.insert(0, alias.name)
        else:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            thing = importlib.import_module(name)
        for part in path:
            thing = _attribute(thing, part)
        return [thing]


def _attribute(thing: Any, name: str) -> Any:
    if isinstance(thing, ModuleType) and not hasattr(thing, name):
        return importlib.import_module(f"{thing.__name__}.{name}")
    return getattr(thing, name)


class _Reader(ast.NodeVisitor):
    """Follows the names in a unit that has become live."""

    def __init__(self, shaker: Shaker, unit: Unit):
        self.shaker, self.unit = shaker, unit
        inner = [n for n in ast.walk(unit.node) if isinstance(n, IMPORTS)]
        self.aliases = unit.module.aliases | aliases_of(inner)

    def read(self) -> None:
        node = self.unit.node
        if isinstance(node, ast.ClassDef):
            methods = [m.node for m in self.unit.module.methods if m.owner is self.unit]
            rest = [*node.decorator_list, *node.bases, *node.keywords]
            for part in rest + [s for s in node.body if s not in methods]:
                self.visit(part)
        else:
            self.visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if is_ours(alias.name):
                self.shaker._module(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if is_ours(target_of(node)):
            for alias in node.names:
                self.shaker._want(node.module, alias.name)

    def visit_Global(self, node: ast.Global) -> None:
        for unit in [u for name in node.names for u in self.unit.module.binding(name)]:
            self.shaker._revive(unit)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            return
        for unit in self.unit.module.binding(node.id):
            self.shaker._revive(unit)
        if node.id in self.aliases:  # a module as a value: anything of it may be used
            module = self.shaker._module(self.aliases[node.id])
            for unit in module.units:
                self.shaker._revive(unit)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.shaker.words.add(node.attr)
        module = self._module_of(node.value)
        if module is None:
            self.visit(node.value)
        else:
            for unit in self.unit.module.binding(_root(node)):
                self.shaker._revive(unit)
            self.shaker._want(module, node.attr)

    def _module_of(self, node: ast.expr) -> str | None:
        """The module of the package that an expression stands for."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute) and (parent := self._module_of(node.value)):
            name = f"{parent}.{node.attr}"
            return name if is_module(name) else None
        return None

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.isidentifier():
            self.shaker.words.add(node.value)
            self.shaker.strings.add(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg:  # f(**{name: ...}) and f(name=...) are read by name where f takes **kwargs
            self.shaker.words.add(node.arg)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if last_name(node.func) == "import_module" and isinstance(node.args[0], ast.JoinedStr):
            start = node.args[0].values[0]
            if isinstance(start, ast.Constant) and start.value.startswith(f"{PACKAGE}."):
                self.shaker.computed.add(start.value.rstrip("."))
        self.generic_visit(node)


def _live_tree(module: Module) -> ast.Module:
    """The live statements of a module, classes without their dead methods."""
    dead = {m.node for m in module.methods if not m.live}
    body = []
    for unit in module.units:
        if unit.live:
            if isinstance(unit.node, ast.ClassDef):
                unit.node.body = [n for n in unit.node.body if n not in dead] or [ast.Pass()]
            body.append(unit.node)
    return ast.fix_missing_locations(ast.Module(body, []))
