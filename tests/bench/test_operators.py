"""The README's table of operators is the registry's."""

from pathlib import Path

import pytest

from bench import operators
from pgolf.ops.operator import OPERATORS

README = Path(__file__).resolve().parents[2] / "README.md"


def test_readme_has_the_present_table():
    text = README.read_text(encoding="utf-8")
    assert operators.with_table(text) == text, "python -m bench operators --write README.md"


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_says_what_it_computes(name):
    operator = OPERATORS[name]
    assert operators.summary(operator) and operators.shapes(operator)
    assert operators.row(operator).replace("\\|", "").count("|") == len(operators.COLUMNS) + 1


def test_a_document_without_marks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    assert operators.main(["--write", str(page)]) == 2
    assert "lacks the lines" in capsys.readouterr().err and page.read_text() == "nothing"
    page.write_text(f"before\n{operators.BEGIN}old{operators.END}after\n")
    assert operators.main(["--write", str(page)]) == 0
    assert page.read_text().startswith(f"before\n{operators.BEGIN}\n| operator |")
    assert page.read_text().endswith(f"|\n\n{operators.END}after\n")
