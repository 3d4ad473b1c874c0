"""Tree shaking and specialising, on small modules."""

import ast
import re
import textwrap

import pytest

from pgolf.ops.registry import OPERATORS
from pgolf.optim import fused
from pgolf.submission import shake
from pgolf.submission.rename import shorten
from pgolf.submission.shake import Shaker
from pgolf.submission.specialise import COMPILED, specialise


@pytest.fixture
def reach(monkeypatch):
    """The live source of modules, by name, from the name `main` in pgolf.a."""

    def call(**modules: str) -> dict[str, str]:
        sources = {"pgolf": ""} | {f"pgolf.{n}": textwrap.dedent(s) for n, s in modules.items()}
        monkeypatch.setattr(shake, "is_module", sources.__contains__)
        trees = Shaker(lambda name: ast.parse(sources[name])).reach("pgolf.a", "main")
        return {name: ast.unparse(tree) for name, tree in trees.items()}

    return call


def test_keeps_what_is_reached_through_imports(reach):
    found = reach(
        a="""
        from pgolf.b import used, unused
        from pgolf import c
        def main(): return used() + c.two
        def other(): return unused()
        """,
        b="""
        ONE, NEVER = 1, 2
        LEFT = 3
        def used(): return ONE
        def unused(): return LEFT
        """,
        c="two = 2\nthree = 3",
    )
    assert "unused" not in found["pgolf.a"] and "other" not in found["pgolf.a"]
    assert "ONE" in found["pgolf.b"] and "LEFT" not in found["pgolf.b"]
    assert found["pgolf.c"] == "two = 2"


def test_keeps_statements_that_act_with_what_they_act_on(reach):
    found = reach(
        a="""
        from pgolf.b import table, register
        @register
        def main(): return table
        @main.fake
        def _(): return helper
        def helper(): pass
        def lone(): pass
        lone.mark = 1
        OPERATOR = register(main)
        """,
        b="""
        table = []
        def register(x): table.append(x)
        table.append(0)
        """,
    )
    a = found["pgolf.a"]
    assert "def _()" in a and "def helper" in a and "OPERATOR" in a and "lone" not in a
    assert "table.append(0)" in found["pgolf.b"]


def test_drops_methods_that_nothing_names(reach):
    a = reach(
        a="""
        import json
        class Base:
            def called(self): return self.inner()
            def inner(self): return LIVE
            def never(self): return DEAD
            def by_string(self): pass
        class Encoder(json.JSONEncoder):
            def default(self, o): pass
            def extra(self): pass
        LIVE, = 1,
        DEAD = 2
        def main(): return Base().called(), Encoder(), getattr(Base, 'by_string')
        """
    )["pgolf.a"]
    assert "def inner" in a and "def by_string" in a and "def default" in a
    assert "never" not in a and "DEAD" not in a and "extra" not in a


def test_refuses_what_it_cannot_follow(reach):
    with pytest.raises(ValueError, match="name what is imported"):
        reach(a="from pgolf.b import *\ndef main(): pass", b="")
    with pytest.raises(ValueError, match="pgolf.b.gone is asked for"):
        reach(a="from pgolf.b import gone\ndef main(): gone()", b="")


def test_short_names_go_everywhere_or_nowhere():
    trees = {
        "pgolf.a": ast.parse(
            "from pgolf.b import compute, handler as other, looked_up\n"
            "from pgolf import b\n"
            "def method_or_function(): return b.compute(), looked_up\n"
            "class Thing:\n"
            "    def run(self, shadowed): return self.compute(handler=1)\n"
        ),
        "pgolf.b": ast.parse(
            "def compute(): return shadowed\n"
            "shadowed = looked_up = handler = 1\n"
            "def setter():\n    global handler\n    handler = compute() + 1\n"
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shake, "is_module", {"pgolf", *trees}.__contains__)
        shorten(trees, {"looked_up"})
    a, b = (ast.unparse(tree) for tree in trees.values())
    short = re.search(r"import (\w+), handler as other, looked_up", a)[1]
    assert short != "compute" and f"b.{short}()" in a and f"def {short}():" in b
    assert "def run(self, shadowed)" in a and "self.compute(handler=1)" in a
    assert f"handler = {short}() + 1" in b and "shadowed = looked_up = handler = 1" in b
    assert "setter" not in b and "Thing" not in a


def test_a_name_that_is_only_bound_keeps_nothing(reach):
    a = reach(
        a="""
        def opaque(): pass
        @opaque.fake
        def _(): pass
        mode = 0
        def main():
            global mode
            for _ in (): mode = 1
        """
    )["pgolf.a"]
    assert "opaque" not in a and "mode = 0" in a


@pytest.fixture
def special(tmp_path):
    def call(source: str, module: str = "pgolf.a") -> str:
        file = tmp_path / "a.py"
        file.write_text(textwrap.dedent(source))
        return ast.unparse(specialise(module, file, COMPILED))

    return call


def test_keeps_the_annotations_that_are_read(special):
    text = special(
        """
        def plain(x: int) -> "Gone": ...
        @torch.library.custom_op("a::b", mutates_args=())
        def opaque(x: Tensor) -> Tensor: ...
        @triton.jit
        def kernel(x, SIZE: tl.constexpr): ...
        @dataclass
        class Settings:
            size: float = opt(1.0, "gone", ge=0)
            other: Mapping[str, int] = None
        """
    )
    assert "opaque(x: Tensor) -> Tensor" in text and "SIZE: tl.constexpr" in text
    assert "size: float = opt(1.0, '', ge=0)" in text
    assert "Gone" not in text and "gone" not in text and "Mapping" not in text


def test_operators_do_not_check_their_callers(special):
    source = """
        def f(x, y):
            if x < 0: raise ValueError("negative")
            for t in y:
                if t: raise ValueError("true")
            if y is None: raise ConfigError("a user's")
            elif x > 9: raise ValueError("too large")
            if x == 9: raise ValueError(f"{impl} takes 8")
            return x
    """
    short = special(source, "pgolf.ops.f")
    assert "ConfigError" in short and "for" not in short and "too large" not in short
    assert short.count("ValueError") == 1, "what an implementation cannot do is refused"
    assert special(source).count("ValueError") == 4


def test_no_operator_of_the_fused_step_has_kernels_in_triton():
    """Otherwise the script would have to take pgolf.optim.fused along."""
    assert not [n for n in fused.OPERATORS if "triton" in OPERATORS[n].implementations]


OPERATOR = """
    def f(x, impl):
        if impl == "reference" or x.ok:
            return plain(x)
        return opaque(x)
    OPERATOR = register(Operator(
        name="f", call=f, samples=samples, implementations={"cpu": in_cpp("f")%s}
    ))
"""


def test_an_operator_without_implementations_is_its_reference(special):
    bare = special(OPERATOR % "")
    assert "opaque" not in bare and "samples" not in bare and "in_cpp" not in bare
    assert "return plain(x)" in bare
    other = special(OPERATOR % ', "triton": in_triton("f")')
    assert "opaque" in other and "in_cpp" not in other and "in_triton" in other
