"""An import only ever points down, and cheap imports stay cheap."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Top first; what stands on one line may import each other and whatever stands below.
LAYERS = [
    ["pgolf.cli", "pgolf.__main__"],
    ["pgolf.api"],
    ["pgolf.submission"],
    ["pgolf.training"],
    ["pgolf.recipes", "pgolf.report"],
    ["pgolf.scoring"],
    ["pgolf.artifact"],
    ["pgolf.optim", "pgolf.quant"],
    ["pgolf.model"],
    ["pgolf.ops", "pgolf.codecs", "pgolf.data"],
    ["pgolf.scoring.bpb", "pgolf.ranks"],
    ["pgolf.device", "pgolf.options"],
    ["pgolf.config"],
    ["pgolf.settings"],
    ["pgolf.fields", "pgolf.progress", "pgolf.roles"],
    ["pgolf.extras", "pgolf.files", "pgolf.extension", "pgolf.triton_kernels"],
    ["pgolf.child", "pgolf.stop", "pgolf.roll_call"],
    ["pgolf.errors"],
    ["pgolf"],
]


def picture() -> str:
    """The layers for people: each in a line, in short names, the top first."""
    lines = (", ".join(name.removeprefix("pgolf.") for name in names) for names in LAYERS)
    return "\n".join(lines)


def layer(module: str) -> int:
    """Index of the most specific entry that `module` lies in."""
    fits = [
        (len(name), i)
        for i, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(fits)[1]


def imports(file: Path) -> set[str]:
    """Modules of pgolf that a file imports, at any depth of its code."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{a.name}" for a in node.names}
            is_package = node.module == "pgolf"
            modules |= inside if is_package else {node.module}
    return {m for m in modules if m == "pgolf" or m.startswith("pgolf.")}


def test_imports_point_down():
    upward = []
    for file in (ROOT / "pgolf").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for target in imports(file):
            if layer(target) < layer(module):
                upward.append(f"{module} imports {target}")
    assert not upward


def test_contributing_shows_the_layers():
    """`python tests/test_layers.py` prints what stands there."""
    assert f"```\n{picture()}\n```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_module_has_a_layer():
    """A new module is placed on purpose: nothing falls to the bottom entry 'pgolf' by accident."""
    for file in (ROOT / "pgolf").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        assert module == "pgolf" or layer(module) < len(LAYERS) - 1, module


def test_import_and_help_load_no_torch():
    code = (
        "import sys, pgolf, pgolf.cli\n"
        "try: pgolf.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "import pgolf.report.html\n"  # a run imports it when it starts
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torchrun" in done.stdout


def test_commands_load_no_compiler():
    """torch._dynamo takes as long to import as all the rest."""
    code = (
        "import sys, pgolf.training.run, pgolf.scoring.job\n"
        "assert not {'torch._dynamo', 'sympy', 'triton'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    print(picture())
