"""What the documents name is there: modules, functions, a diff that applies, pages that build."""

import ast
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .test_layers import LAYERS, ROOT, imports

DOCS = ROOT / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def defined(file: Path) -> set[str]:
    """Functions and classes of a module, methods as `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


def test_the_walks_name_what_there_is():
    named = re.findall(r"((?:`[\w.]+`(?:,| and)?\s+)+)\(([\w/]+\.py)\)", text("architecture.md"))
    assert len(named) > 30
    for names, file in named:
        assert set(re.findall(r"`([\w.]+)`", names)) <= defined(ROOT / "pgolf" / file), file


def test_the_picture_has_the_imports_that_there_are():
    """Each arrow is an import, and each import of a package follows from the arrows."""
    arrows = set(re.findall(r"^ +(\w+).*? --> (\w+)", text("architecture.md"), re.MULTILINE))
    drawn = {name for arrow in arrows for name in arrow}
    assert {f"pgolf.{name}" for name in drawn} <= {name for line in LAYERS for name in line}
    real = set()
    for name in drawn:
        place = ROOT / "pgolf" / name
        for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            # What the bottom of scoring holds may be imported from everywhere.
            targets = {m for m in imports(file) if not m.startswith("pgolf.scoring.bpb")}
            real |= {(name, m.split(".")[1]) for m in targets if m.count(".")}
    real = {(a, b) for a, b in real if b in drawn and a != b}
    assert arrows <= real
    reached = set(arrows)
    while more := {(a, d) for a, b in reached for c, d in reached if b == c} - reached:
        reached |= more
    assert real <= reached


def test_the_tutorial_s_diff_applies(tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git on PATH, which applies the diff")
    diff = re.search(r"```diff\n(.*?)```", text("tutorial.md"), re.DOTALL)[1]
    for name in re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = ["git", "apply", "-"]
    done = subprocess.run(command, input=diff, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"^\+\+\+ b/(.*\.py)$", diff, re.MULTILINE):
        compile((tmp_path / name).read_text(encoding="utf-8"), name, "exec")


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md")]:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_of_the_interface(tmp_path):
    """What `make docs` does, for two modules."""
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install 'pgolf[docs]'")
    spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert {"pgolf.ops", "pgolf.quant", "pgolf.training"} <= set(api.packages())
    api.build(tmp_path, ["pgolf.errors", "pgolf.fields"])
    assert "PgolfError" in (tmp_path / "pgolf" / "errors.html").read_text(encoding="utf-8")
    assert "A documented field" in (tmp_path / "pgolf" / "fields.html").read_text(encoding="utf-8")
