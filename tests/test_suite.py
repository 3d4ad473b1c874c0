"""The suite itself: every test file is found by a bare `pytest`."""

import fnmatch
from pathlib import Path

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
