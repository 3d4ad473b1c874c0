"""Modules without what a script never runs."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

_IS_REFERENCE = "impl == 'reference'"  # what an operator asks before it goes on to its kernels
# A script's run ends where it began: it keeps no state, and is given none. Methods by module.
_OF_STATES = {
    "pgolf.optim.averaging": ("state_dict", "load_state_dict"),
    "pgolf.optim.groups": ("state_dict", "load_state_dict"),
    "pgolf.optim.muon": ("__getstate__",),
    "pgolf.training.trainer": ("state_dict", "load_state_dict"),
}
_REASON = "a script has no kernels in C++ and CUDA"
# Conditions that never hold in a script: it goes on with no run, and traces none.
_NEVER = ("config.run.resume", "config.run.profile", "self.profile")


def without_parts(source: str, name: str) -> str:
    """A module without the parts that a script never uses.

    These are the `--help` texts of settings, and `pgolf train`, which `pgolf.submission.entry`
    replaces; what goes on with a run that was stopped; of operators what is in the compiled half,
    which no script has, their least work, and checks of what they are given, which here the model
    gives them. Samples stay for operators with Triton kernels only, which `pgolf.ops.compile`
    compiles first.
    """
    if name.startswith("pgolf.triton_kernels"):  # whose annotations Triton reads
        return source
    tree = ast.parse(source)
    gone, operators = {"cost"}, name.startswith("pgolf.ops.")
    if name == "pgolf.training.run":
        gone |= {"run", "resume"}
    if operators:
        gone |= {"_check"} | (set() if "in_triton(" in source else {"samples"})
    for node in ast.walk(tree):
        called = _called(node)
        if called == "opt":
            node.args[1] = ast.Constant("")
        elif called == "in_extension":
            gone.add(ast.unparse(node.args[1]))
        elif called == "Operator":
            compiled_first = "in_triton(" in ast.unparse(node)
            for keyword in node.keywords:
                asked = compiled_first and keyword.arg in ("call", "samples")
                if keyword.arg in ("cost", "call", "reference", "samples") and not asked:
                    keyword.value = ast.Constant(None)
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in gone]
    tree = _Uninterrupted(_OF_STATES.get(name, ())).visit(tree)
    if operators:
        alone = "in_extension(" in source and "in_triton(" not in source
        for change in (_Uncompiled(), _Unchecked(), *([_OnlyReference()] if alone else [])):
            tree = change.visit(tree)
    tree = _Unannotated().visit(tree)
    return ast.unparse(tree)


def _called(node: ast.AST) -> str:
    """The name of the function that an expression or a statement calls, or ''."""
    node = node.value if isinstance(node, ast.Expr) else node
    return getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""


class _Uninterrupted(ast.NodeTransformer):
    """Takes out methods, checkpoints, and what is done only where a run goes on or is traced."""

    def __init__(self, methods: Collection[str]):
        self.methods = methods

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = [n for n in node.body if getattr(n, "name", "") not in self.methods]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if node.name == "checkpoint":
            node.body = [ast.Pass()]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return (node.orelse or ast.Pass()) if ast.unparse(node.test) in _NEVER else node

    visit_IfExp = visit_If


class _Uncompiled(ast.NodeTransformer):
    """Takes out implementations in the compiled half; where `auto` prefers them, says why not."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return ast.Dict([], []) if _called(node) == "in_extension" else node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        self.generic_visit(node)
        pairs = zip(node.keys, node.values, strict=True)
        left = {key: value for key, value in pairs if _called(value) != "in_cpp"}
        for key, value in left.items():
            if ast.unparse(value).startswith(("[('cpu', ", "[('cuda', ")):
                left[key] = ast.parse(f"[('reference', {_REASON!r})]", mode="eval").body
        return ast.Dict([*left], [*left.values()])


class _Unchecked(ast.NodeTransformer):
    """Takes out statements that only check: calls of functions whose names say so, ValueErrors."""

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return ast.Pass() if re.match("_?check(_|$)", _called(node)) else node

    def visit_If(self, node: ast.If) -> ast.stmt:
        self.generic_visit(node)
        binds = any(isinstance(n, ast.NamedExpr) for n in ast.walk(node.test))
        return node if binds or not all(map(_checks, [*node.body, *node.orelse])) else ast.Pass()

    def visit_For(self, node: ast.For) -> ast.stmt:
        self.generic_visit(node)
        return ast.Pass() if all(isinstance(n, ast.Pass) for n in node.body) else node


def _checks(node: ast.stmt) -> bool:
    raises = isinstance(node, ast.Raise) and "ValueError(" in ast.unparse(node)
    return raises or isinstance(node, ast.Pass)


class _OnlyReference(ast.NodeTransformer):
    """Makes an operator its reference: all else that it has is in the compiled half."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        if any(_decorates(d, "opaque", "register_fake") for d in node.decorator_list):
            return None
        for at, statement in enumerate(node.body):
            if isinstance(statement, ast.If) and ast.unparse(statement.test) == _IS_REFERENCE:
                node.body[at:] = statement.body
                break
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
        self.generic_visit(node)
        return None if _called(node.value) in ("resolve", "_resolved") else node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if _called(node) == "Operator":
            node.keywords = [k for k in node.keywords if k.arg != "obstacle"]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if _called(node) in ("register_gradient", "register_no_gradient") else node


def _decorates(decorator: ast.expr, *names: str) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).endswith(names)


class _Unannotated(ast.NodeTransformer):
    """Takes annotations off functions but opaque operators, whose schema they are."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if not any(_decorates(d, "opaque") for d in node.decorator_list):
            a, node.returns = node.args, None
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
                if argument:
                    argument.annotation = None
        return node


class Names:
    """What the modules of a script name, of their own and of each other.

    A variable names one of its own module, and one that is imported by that name; an attribute and
    a string, which `getattr` takes, any.
    """

    def __init__(self, trees: Mapping[str, ast.Module]):
        self.trees = trees
        self.counts = {(m, n): _counts(n) for m, tree in trees.items() for n in tree.body}
        self.within: dict[str, Counter[str]] = {module: Counter() for module in trees}
        for (module, _), named in self.counts.items():
            self.within[module].update(named)
        self.everywhere: Counter[str] = sum(self.within.values(), Counter())
        self.takers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for taker, tree in trees.items():
            for node in ast.walk(tree):
                for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                    self.takers[node.module, alias.name].append(taker)

    def elsewhere(self, module: str) -> set[str]:
        """All words in strings, all attributes, and the variables of the other modules."""
        everywhere, own = self.everywhere.items(), self.within[module]
        return {text.lstrip("'") for text, n in everywhere if n > own[text] or n and text[0] == "'"}

    def drop(self, module: str, node: ast.stmt) -> None:
        """Take a statement out, and what it names."""
        self.trees[module].body.remove(node)
        self.within[module].subtract(self.counts[module, node])
        self.everywhere.subtract(self.counts[module, node])

    def unnamed(self, module: str) -> list[ast.stmt]:
        """Functions, classes and constants that nothing names but they themselves."""
        found = []
        for node in self.trees[module].body:
            name, own = _defined(node), self.counts[module, node]
            used = self.within[module][name] - own[name]
            used += self.everywhere[f"'{name}"] - own[f"'{name}"]
            if name and not used and not self.imported(module, name):
                found.append(node)
        return found

    def imported(self, module: str, name: str) -> bool:
        """Whether a module that imports it names it, perhaps from a package that did."""
        takers = self.takers.get((module, name), ())
        return any(self.within[m][name] or self.imported(m, name) for m in takers)


def without_unnamed(sources: Mapping[str, str]) -> dict[str, tuple[str, set[str]]]:
    """Modules without what they define or import and nothing names; and what others name of each.

    Of a method nothing is known.
    """
    trees = {name: ast.parse(text) for name, text in sources.items()}
    names = Names(trees)
    while found := [(module, node) for module in trees for node in names.unnamed(module)]:
        for module, node in found:
            names.drop(module, node)
    shared = {m: {n for of, n in names.takers if of == m} for m in trees}
    packages = {name.rpartition(".")[0] for name in trees}
    for module, tree in trees.items():
        if module in packages:  # it imports others for what that does
            continue
        kept = {n for n in names.within[module] if names.within[module][n]} | shared[module]
        for node in [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]:
            node.names = [
                a for a in node.names
                if (a.asname or a.name).partition(".")[0] in kept or a.name in sources
            ]
            # One that registers something is imported for that.
            if not node.names and "register(" in sources.get(getattr(node, "module", ""), ""):
                tree.body[tree.body.index(node)] = ast.Import([ast.alias(node.module)])
        tree.body = [n for n in tree.body if getattr(n, "names", True)]
    asked = {name: shared[name] | names.elsewhere(name) for name in trees}
    return {name: (ast.unparse(tree), asked[name]) for name, tree in trees.items()}


def _defined(node: ast.stmt) -> str:
    """The name that a statement defines, if that is all it does: a call may register."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        harmless = {"dataclass", "dataclass(frozen=True)", "contextmanager", "functools.cache"}
        only = {ast.unparse(d) for d in node.decorator_list} <= harmless
        return node.name if only and not node.name.startswith("__") else ""
    if isinstance(node, ast.Assign) and not any(isinstance(n, ast.Call) for n in ast.walk(node)):
        return getattr(node.targets[0], "id", "") if len(node.targets) == 1 else ""
    return ""


def _counts(statement: ast.stmt) -> Counter[str]:
    """How often one of a module names what. Attributes and strings have a quote before the name.

    A plain import does not count.
    """
    counts: Counter[str] = Counter()
    for node in ast.walk(statement):
        if isinstance(node, ast.ImportFrom):
            counts.update(f"'{a.name}" for a in node.names if a.asname or node is not statement)
        elif isinstance(node, ast.Name):
            counts[node.id] += 1
        elif isinstance(node, ast.Attribute):
            counts[f"'{node.attr}"] += 1
        elif isinstance(node, ast.Constant) and str(node.value).isidentifier():
            counts[f"'{node.value}"] += 1
    return counts
