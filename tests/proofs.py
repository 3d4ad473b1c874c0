"""`make prove` runs a proof again where something changed that it depends on.

A slow test says what that is, files and folders from the repository's root:

    @pytest.mark.proves("csrc/cpu", "tests/ops/test_fuzz.py")

Its own file counts, and what kernels include or import of csrc/ and triton_kernels/, and tests of
tests/, bench/ and pgolf/ops/testing.py. tests/proved.json holds a hash of this for each proof, and
the versions of torch and of what compiles. With `--prove changed` a proof is left out where both
are those of the stamp, with `--prove all` none is. Both write what they have proved, one by one,
and forget what failed. Without the option, as in a bare `pytest -m slow`, everything runs and
nothing is written.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from bench import aot_cuda
from pgolf.errors import PgolfError
from pgolf.files import atomic_write

from .simt.emulator import Missing, compiler_version

ROOT = Path(__file__).resolve().parents[1]
STAMP = "tests/proved.json"
SIDES = {"csrc": "kernels", "triton_kernels": "kernels", "tests": "harness", "bench": "harness"}
RULE = "pgolf/ops/testing.py"  # what a harness judges by, though it is a part of the package
TO_PROVE = "to prove"  # name of a test's hash among its properties


def versions() -> dict[str, str]:
    """What decides, beside files, whether a proof would come out the same."""
    known = {"nvcc": aot_cuda.versions, "c++": compiler_version}
    for package in ("torch", "triton"):
        known[package] = functools.partial(importlib.metadata.version, package)
    for name, ask in known.items():
        try:
            known[name] = ask()
        except (PgolfError, Missing, importlib.metadata.PackageNotFoundError):
            known[name] = "none"
    return known


class Sources:
    """Files of a checkout and what they include or import; each is read once."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._hash = functools.cache(lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        self._named = functools.cache(lambda path: list(self._followed(path)))

    def state(self, names: Iterable[str]) -> str:
        """A hash of the files and folders of these names, and of all that they lead to."""
        lines = [f"{p.relative_to(self.root)} {self._hash(p)}\n" for p in self.files(names)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def files(self, names: Iterable[str]) -> list[Path]:
        """All of them, sorted.

        Raises:
            pytest.UsageError: there is no such file or folder.
        """
        reached, todo = set(), []
        for name in names:
            inside = [self.root / name, *(self.root / name).rglob("*")]
            files = [p.resolve() for p in inside if p.is_file() and p.suffix != ".pyc"]
            if not files:
                raise pytest.UsageError(f"a proof depends on {name}, which is not there")
            todo += files
        while todo:
            path = todo.pop()
            if path not in reached:
                reached.add(path)
                todo += self._named(path)
        return sorted(reached)

    def _followed(self, path: Path) -> Iterator[Path]:
        for named in _imports(path, self.root) if path.suffix == ".py" else self._includes(path):
            named = named.resolve()
            # A harness imports all kernels; which of them a proof is of, its mark says.
            if named.is_file() and self._side(named) and self._side(named) == self._side(path):
                yield named

    def _side(self, path: Path) -> str:
        if not path.is_relative_to(self.root):
            return ""
        named = path.relative_to(self.root)
        return "harness" if named.as_posix() == RULE else SIDES.get(named.parts[0], "")

    def _includes(self, path: Path) -> Iterator[Path]:
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            for name in re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8")):
                yield from (path.parent / name, self.root / "csrc" / name)


def _imports(path: Path, root: Path) -> Iterator[Path]:
    """Where the modules would be that a file imports."""
    for level, module in _imported(path.read_bytes()):
        yield (path.parents[level - 1] if level else root) / f"{module.replace('.', '/')}.py"


@functools.cache
def _imported(source: bytes) -> list[tuple[int, str]]:
    """(leading dots, name) of all that could be a module."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
            modules += [(node.level, name) for name in (*names, node.module) if name]
    return modules


class Proofs:
    """The plugin behind `--prove`.

    Args:
        writes: to the stamp, at each proof, so that a run that fails or is ended later keeps it. Of
            xdist that is the controller; workers leave tests out.
    """

    def __init__(
        self,
        mode: str,
        root: Path = ROOT,
        versions: Callable[[], dict[str, str]] = versions,
        writes: bool = True,
    ):
        self.sources, self.file, self.versions = Sources(root), root / STAMP, versions()
        self.writes = writes
        stamp = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.leaves_out = mode == "changed"
        valid = stamp.get("versions") == self.versions
        self.proved: dict[str, str] = stamp["proofs"] if valid else {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            names = [name for mark in item.iter_markers("proves") for name in mark.args]
            if not names:
                continue
            own = item.path.resolve().relative_to(self.sources.root)
            state = self.sources.state([*names, str(own)])
            item.user_properties.append((TO_PROVE, state))
            if self.leaves_out and self.proved.get(item.nodeid) == state:
                item.add_marker(pytest.mark.skip(reason=f"unchanged since {STAMP}"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        state = dict(report.user_properties).get(TO_PROVE)
        if not self.writes or not state or not (report.failed or report.when == "call"):
            return
        if report.passed:
            self.proved[report.nodeid] = state
        else:
            self.proved.pop(report.nodeid, None)
        stamp = {"versions": self.versions, "proofs": self.proved}
        atomic_write(self.file, json.dumps(stamp, indent=1, sort_keys=True) + "\n")
