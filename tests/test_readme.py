"""The README's script runs, and its changed lines compute what stood there before."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def script() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def before(code: str) -> str:
    """The script with every `new  # was: old` put back."""
    return re.sub(r"^( *)\S.*?  # was: (.*)$", r"\1\2", code, flags=re.M)


def losses(code: str, folder: Path) -> list[float]:
    (folder / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines()]


def test_three_changed_lines(tmp_path: Path) -> None:
    code = script()
    assert code.count("# was: ") == 3
    assert not re.search(r"\b(xsa|newton_schulz|leaky_relu2_mlp)\(", before(code))
    ours, theirs = losses(code, tmp_path), losses(before(code), tmp_path)
    assert len(ours) == 20 and ours[-1] < 0.5 * ours[0]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= 2e-4 * (step + 1), (step, a, b)
