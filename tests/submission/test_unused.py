"""What is left out of a script's modules, on modules of our own."""

import ast

import pytest

from pgolf.submission.unused import without_parts, without_unnamed

OPERATOR = """
from pgolf.ops.kernels import forward, launchers
def reference(x: Tensor) -> Tensor:
    return x
def _check(x): ...
def obstacle(impl, size): return ""
def op(x: Tensor, impl: str = "auto") -> Tensor:
    _check(x)
    for t in (x, x):
        check_alike("op", t)
    if x.dim() != 2:
        raise ValueError("op: x has to be a matrix")
    impl = resolve("op", impl, x, size=x.size(1))
    if impl == "reference":
        return reference(x)
    return _forward(x, impl)
@opaque("pgolf::op", mutates_args=())
def _forward(x: Tensor, impl: str) -> Tensor:
    return forward(x)
@_forward.register_fake
def _(x, impl): return x.new_empty(x.shape)
register_gradient("op", _forward, _gradient, _setup)
def samples(): return []
def cost(x): return 1
OPERATOR = register(Operator(
    name="op", call=op, reference=reference, differentiable=("x",), samples=samples, cost=cost,
    implementations=in_extension(("op",), launchers), obstacle=obstacle,
    preferred={"cpu": [("cpu", "fast")], "cuda": [("cuda", "fast")]},
))
"""


def same(found: str, wanted: str) -> bool:
    return ast.dump(ast.parse(found)) == ast.dump(ast.parse(wanted))


def test_an_operator_of_the_compiled_half_is_its_reference() -> None:
    found = without_parts(OPERATOR, "pgolf.ops.op")
    assert same(
        found,
        """
from pgolf.ops.kernels import forward, launchers
def reference(x):
    return x
def obstacle(impl, size): return ""
def op(x, impl="auto"):
    pass
    pass
    pass
    return reference(x)
OPERATOR = register(Operator(
    name="op", call=None, reference=None, differentiable=("x",), samples=None, cost=None,
    implementations={},
    preferred={
        "cpu": [("reference", "a script has no kernels in C++ and CUDA")],
        "cuda": [("reference", "a script has no kernels in C++ and CUDA")],
    },
))
""",
    )


def test_of_an_operator_in_triton_its_kernels_stay() -> None:
    implementations = 'implementations={**in_extension(("op",), launchers), "triton": in_triton()}'
    source = OPERATOR.replace('implementations=in_extension(("op",), launchers)', implementations)
    found = without_parts(source.replace('("cpu", "fast")', '("torch", "")'), "pgolf.ops.op")
    assert "def _forward(x: Tensor, impl: str) -> Tensor:" in found and "def samples" in found
    assert "'triton': in_triton()" in found and "in_extension" not in found
    assert "('torch', '')" in found and "resolve(" in found and "_check" not in found


def test_nothing_goes_on_with_a_run() -> None:
    source = """
class Trainer:
    def state_dict(self): return {}
    def checkpoint(self): self.folder.save(self.state_dict())
    def train(self):
        if config.run.resume:
            resume()
        else:
            begin()
        if self.profile:
            self.profile.close()
"""
    found = without_parts(source, "pgolf.training.trainer")
    assert same(
        found,
        """
class Trainer:
    def checkpoint(self): pass
    def train(self):
        begin()
        pass
""",
    )


@pytest.mark.parametrize(
    ("taker", "stays"),
    [
        ("from pgolf.a import f\nprint(f)", True),
        ("from pgolf import a\nprint(a.f)", True),
        ("print(getattr(a, 'f'))", True),
        ("from pgolf.a import f", False),  # and no more than that
        ("f = 1\nprint(f)", False),  # one of its own
        ("print('not f')", False),
    ],
)
def test_what_nothing_names_goes(taker: str, stays: bool) -> None:
    source = "import math\nK = 2\ndef g(): return math.pi * K\ndef f(n=3): return f(n) + g()\nf_(1)"
    left = without_unnamed({"pgolf.a": source, "pgolf.b": taker})
    assert same(left["pgolf.a"][0], source if stays else "f_(1)")
    if stays:
        assert "f" in left["pgolf.a"][1]


def test_what_a_call_may_register_stays() -> None:
    source = "@register\ndef f(): pass\nx = register(1)\n"
    assert same(without_unnamed({"pgolf.a": source})["pgolf.a"][0], source)


def test_modules_that_register_are_still_imported() -> None:
    sources = {"pgolf.a": "from pgolf.b import C, B\n", "pgolf.b": "B = register(1)\nC = 1"}
    left = without_unnamed(sources)
    assert same(left["pgolf.a"][0], "import pgolf.b\n") and "C" not in left["pgolf.b"][0]


def test_what_a_package_hands_on_stays_where_it_is_named() -> None:
    sources = {
        "pgolf.p": "from pgolf.p.a import f, g\n", "pgolf.p.a": "def f(): pass\ndef g(): pass",
        "pgolf.b": "from pgolf.p import f\nf()",
    }  # fmt: skip
    assert same(without_unnamed(sources)["pgolf.p.a"][0], "def f(): pass")


def test_of_two_names_for_one_thing_both_stay() -> None:
    sources = {"pgolf.a": "a = b = 1\n", "pgolf.b": "from pgolf.a import b\nprint(b)"}
    assert same(without_unnamed(sources)["pgolf.a"][0], sources["pgolf.a"])
