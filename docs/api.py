"""`make docs`: a page for every module, from its docstrings, into build/api."""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import pgolf

OUT = Path("build/api")
# All of pgolf but what is no Python, no interface, or cannot be imported everywhere.
EVERYTHING = ("pgolf", "!pgolf._C", "!pgolf.__main__", "!pgolf.triton_kernels")


def build(out: Path, specs: Sequence[str]) -> None:
    """Write the pages of some modules, each with all that is below it.

    Raises:
        SystemExit: pdoc is not installed; the message says how to.
    """
    try:
        from pdoc import pdoc
    except ImportError:
        raise SystemExit("make docs needs pdoc: .venv/bin/python -m pip install pdoc") from None
    pdoc(*specs, output_directory=out)


def main() -> None:
    """Write the pages of everything, and say where they begin."""
    for module in [pgolf, *(importlib.import_module(name) for name in packages())]:
        # pdoc takes __all__ for the list of a package's modules as well; ours names functions.
        vars(module).pop("__all__", None)
    build(OUT, EVERYTHING)
    print(OUT / "index.html")


def packages() -> list[str]:
    """The packages below pgolf."""
    found = pkgutil.iter_modules(pgolf.__path__, "pgolf.")
    return [m.name for m in found if m.ispkg and f"!{m.name}" not in EVERYTHING]


if __name__ == "__main__":
    main()
