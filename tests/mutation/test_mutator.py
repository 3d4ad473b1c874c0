"""The mutator and its runner on functions of our own; the kernels' turn is test_kernels.py."""

import ast
import os
import time

import pytest

from . import runner
from .mutator import Mutant, mutants, shuffled
from .runner import judge, run, run_original

SOURCE = '''
LIMIT = 8


def area(width, height, scale=2):
    """Of a rectangle."""
    if width < LIMIT and not height == 0:
        width = width - 1
    result = scale * min(width, height)
    result += 1.5
    note(result, 3, loud=True)
    return result


def other(a):
    return a + 1
'''


def changes(source: str, *functions: str, **named) -> list[str]:
    return [m.change for m in mutants("module", source, functions, **named)]


def body(*lines: str) -> list[str]:
    """Changes of a function f(a, b) with these lines."""
    return changes("def f(a, b):\n" + "".join(f"    {line}\n" for line in lines), "f")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("return a - b", ["a + b", "a", "b - a"]),
        ("return a * b", ["a + b", "a"]),
        ("return a // b", ["a % b", "a * b", "a", "b // a"]),
        ("return a < b", ["a <= b", "a >= b"]),
        ("return a is not None", ["a is None"]),
        ("return a and b", ["a or b"]),
        ("return not a", ["a"]),
        ("return 3", ["4"]),
        ("return 1", ["2", "0"]),
        ("return 0.5", ["1.0"]),
        ("return 0.0", ["1.0"]),
        ("return True", ["False"]),
        ("return a if b else 'x'", ["a if not b else 'x'"]),
        ("return t.max(a, b)", ["t.min(a, b)"]),
        ("return where(a, b)", ["where(b, a)"]),
        ("return load(a, mask=b)", ["load(a)"]),
        ("return a[:, None]", ["a[None, :]"]),
        ("return (a, b)", ["(b, a)"]),
        ("return f(a, a)", []),
        ("return a.b", []),
        ("return 'text'", []),
    ],
)
def test_changes_of_an_expression(line: str, wanted: list[str]) -> None:
    assert body(line) == [f"{line} => return {new}" for new in wanted]


def test_statements_are_dropped_where_their_names_stay_known() -> None:
    assert body("store(a)") == ["store(a) => pass"]
    assert body("a += b") == ["a += b => pass", "a += b => a -= b"]
    assert body("a = b") == ["a = b => pass"]
    assert body("c = b") == []
    assert body("c = b", "c = a") == ["c = a => pass"]


def test_all_changes_of_one_function_and_none_elsewhere() -> None:
    found = mutants("shapes", SOURCE, ["area"])
    assert len(found) == len({m.name for m in found}) == 24
    for mutant in found:
        original, changed = ast.parse(SOURCE), ast.parse(mutant.source)
        different = [
            old.name if isinstance(old, ast.FunctionDef) else old
            for old, new in zip(original.body, changed.body, strict=True)
            if ast.dump(old) != ast.dump(new)
        ]
        assert different == ["area"]
        assert changed.body[1].args.defaults[0].value == 2
        assert ast.get_docstring(changed.body[1]) == "Of a rectangle."
    assert found[7].name == "shapes.area: width = width - 1 => pass"
    assert found[7].line == 8


def test_equal_changes_in_two_places_have_two_names() -> None:
    assert body("return a + b", "return a + b")[2:] == [
        "return a + b => return a - b (again)", "return a + b => return a (again)",
    ]  # fmt: skip


def test_what_is_skipped_is_left_alone_with_all_below_it() -> None:
    def notes(node: ast.AST) -> bool:
        return isinstance(node, ast.Expr)

    assert not any("note" in change for change in changes(SOURCE, "area", skip=notes))


def test_an_unknown_function_is_an_error() -> None:
    with pytest.raises(ValueError, match="no functions volume"):
        mutants("module", SOURCE, ["volume"])


def test_the_order_is_fixed_and_hardly_moves_with_the_source() -> None:
    found = mutants("module", SOURCE, ["area", "other"])
    order = shuffled(found, seed=1)
    assert order == shuffled(reversed(found), seed=1) != shuffled(found, seed=2)
    assert order != found and set(order) == set(found)
    edited = shuffled(mutants("module", SOURCE.replace("1.5", "2.5"), ["area", "other"]), seed=1)
    same = {m.name for m in order} & {m.name for m in edited}
    kept = [[m.name for m in some if m.name in same] for some in (order, edited)]
    assert kept[0] == kept[1] and len(kept[0]) > 15


def mutant_named(name: str) -> Mutant:
    return Mutant("module", "f", name, 1, "")


def test_the_runner_tells_what_became_of_each_mutant(monkeypatch) -> None:
    state = {}

    def prepare(mutant: Mutant) -> None:
        state["name"] = mutant.change
        if mutant.change == "does not load":
            raise SyntaxError("what is this?")

    def check() -> None:
        match state.get("name"):
            case "wrong":
                raise AssertionError("1 is not 2\nmore")
            case "does not end":
                while True:
                    pass
            case "waits":
                time.sleep(600)
            case "crashes":
                os._exit(3)

    names = ["wrong", "survives", "does not end", "crashes", "does not load"]
    outcomes = {
        outcome.mutant.change: outcome
        for outcome in run(map(mutant_named, names), prepare, [lambda: None, check], limit=1.0)
    }
    assert {name: outcome.why for name, outcome in outcomes.items()} == {
        "wrong": "AssertionError: 1 is not 2",
        "survives": "",
        "does not end": "no end after 1 s",
        "crashes": "the process died with code 3",
        "does not load": "SyntaxError: what is this?",
    }
    monkeypatch.setattr(runner, "STUCK", 1.0)
    (waited,) = run([mutant_named("waits")], prepare, [check], limit=2.0)
    assert waited.why == "no work in 1 s"
    assert state == {}  # nothing happened in this process
    assert run_original([check], limit=1.0).why == ""
    assert run_original([lambda: 1 / 0], limit=1.0).why == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("results", "listed", "complaints"),
    [
        ({"a": "AssertionError: 1", "b": "no end after 1 s"}, {}, []),
        ({"a": "AssertionError: 1", "b": ""}, {}, ["survived, and is not listed: b"]),
        ({"a": "AssertionError: 1", "b": ""}, {"b": "the same thing"}, []),
        ({"a": "AssertionError: 1"}, {"a": "x"}, ["listed as a survivor, but caught: a"]),
        ({"a": "AssertionError: 1"}, {"a": "by chance: x"}, []),
        ({"a": "AssertionError: 1"}, {"not run": "x"}, []),
        ({"a": "1", "b": "", "c": ""}, {"b": "x", "c": "x"}, ["1 of 3 caught, fewer than 50%"]),
    ],
)
def test_what_is_said_about_results(results: dict, listed: dict, complaints: list) -> None:
    assert judge(results, listed, share=0.5) == complaints
