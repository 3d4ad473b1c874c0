"""The README's scripts run; the first one's changed lines compute what stood there before."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def script(section: str) -> str:
    """The first script below a heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2]
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


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
    code = script("Use the kernels in your own model")
    assert code.count("# was: ") == 3
    assert not re.search(r"\b(xsa|newton_schulz|leaky_relu2_mlp)\(", before(code))
    ours, theirs = losses(code, tmp_path), losses(before(code), tmp_path)
    assert len(ours) == 20 and ours[-1] < 0.5 * ours[0]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= 2e-4 * (step + 1), (step, a, b)


def test_any_module_is_packed(tmp_path: Path, monkeypatch, capsys) -> None:
    """GPTQ of what the matrices read beats the clip search, as the README says."""
    monkeypatch.chdir(tmp_path)
    code, off = script("Quantise and pack your own model"), []
    for form in (code, code.replace('"*=6"', '"*=6", quantizer="lite"')):
        exec(form, {})
        size, percent = re.search(r"(\d+) bytes, .* ([\d.]+) %", capsys.readouterr().out).groups()
        assert int(size) == (tmp_path / "mine.pgolf").stat().st_size
        off.append(float(percent))
    assert off[0] < off[1] < 3
