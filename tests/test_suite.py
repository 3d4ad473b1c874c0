"""The suite itself: every test file is found by a bare `pytest`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_file_is_collected():
    """pytest skips folders called build, dist or venv unless it is told otherwise."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stdout
    found = {line.split("::")[0] for line in listed.stdout.splitlines() if "::" in line}
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
    assert files == found
