"""The suite itself: a bare `pytest` finds every test file, and builds nothing to list them."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_file_is_collected(pytestconfig):
    """pytest skips folders called build, dist or venv unless it is told otherwise."""
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "test_*.py" in pytestconfig.getini("python_files")
    files = [p.relative_to(ROOT) for p in (ROOT / "tests").rglob("test_*.py")]
    folders = {part for file in files for part in file.parts[:-1]}
    assert {"tests", "build"} <= folders
    skipped = pytestconfig.getini("norecursedirs")
    assert not [f for f in folders for pattern in skipped if fnmatch.fnmatch(f, pattern)]


@pytest.mark.parametrize("collectonly", [True, False])
def test_a_list_of_the_tests_builds_nothing(pytestconfig, monkeypatch, collectonly):
    """The emulator takes minutes in a fresh clone."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    built = []
    monkeypatch.setattr(conftest, "emulated_module", lambda build: built.append(build) or "it")
    monkeypatch.setattr(conftest, "GPU", False)
    monkeypatch.delenv("PGOLF_CUDA_MODULE", raising=False)
    option = SimpleNamespace(collectonly=collectonly, prove=None)
    config = SimpleNamespace(option=option, stash=pytest.Stash())
    conftest.pytest_configure(config)
    assert built == [not collectonly]
    assert conftest.pytest_report_header(config) == "emulated: Triton and CUDA"
