"""`python -m bench matrix`: what runs with the versions of torch and triton that pgolf is for."""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pgolf import extension
from pgolf.cli.doctor import TESTED
from pgolf.errors import PgolfError
from pgolf.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "matrix.json"
# What each step is a test of.
SOURCES = {
    "model": ("pgolf", "csrc"),
    "operators": ("pgolf", "triton_kernels", "csrc", "tests/ops"),
    "aot": (
        "triton_kernels", "bench/aot_cases.py", "bench/aot_checks.py", "bench/aot_compile.py",
        "bench/candidates.py",
    ),
    "training": ("pgolf", "csrc"),
}  # fmt: skip
WIDTH = ("layers=2", "dim=64", "heads=4", "kv_heads=2", "mlp_hidden=96", "seq_len=64")

DESCRIPTION = """\
With each torch and triton that `pgolf doctor` calls tested, in its own environment: compile an
11-layer pr1473, narrow, with ops=auto in one graph and compare it with eager; run the tests of the
operators; compile every Triton kernel for sm_90 (bench aot); train, pack and score a small model.
Needs no GPU, but the extension in this checkout, which does not depend on torch's version. Missing
environments are made by pip: 5 GB each, with PGOLF_TORCH=cpu 1 GB.
"""
EPILOG = """\
Exit code: 0 all passed, 1 something failed, 2 a bad argument or no environment.

examples:
  python -m bench matrix                   everything, written to bench/results/matrix.json
  python -m bench matrix --changed         only what has not passed with these sources
  python -m bench matrix --torch 2.9.1     one of them; those of others stay in the file
"""

Entry = dict[str, Any]


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench matrix", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--torch", nargs="+", choices=TESTED, default=list(TESTED), metavar="VERSION",
        help=f"only these ({' '.join(TESTED)})")
    add("--step", nargs="+", choices=STEPS, default=list(STEPS), metavar="NAME",
        help=f"only these ({' '.join(STEPS)})")
    add("--changed", action="store_true",
        help="leave out what the file says has passed with these sources and versions")
    add("--venvs", type=Path, default=ROOT / "build" / "matrix", metavar="FOLDER",
        help="where the environments are, torch-VERSION each (build/matrix)")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="the file of results")
    args = parser.parse_args(argv)  # fmt: skip
    try:
        if missing := extension.why_missing():  # without it there would be little to test
            raise PgolfError(missing)
        results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        for version in args.torch:
            python = environment(version, args.venvs)
            old = results.get(version, {})
            for entry in tested(version, python, args.step, old, args.changed):
                results[version] = entry
                ordered = {v: results[v] for v in TESTED if v in results}
                atomic_write(args.json, json.dumps(ordered, indent=1) + "\n")
    except PgolfError as e:
        print(f"python -m bench matrix: {e}", file=sys.stderr)
        return e.exit_code
    print(table(results))
    failed = [v for v in args.torch if not all(s["passed"] for s in results[v]["steps"].values())]
    return 1 if failed else 0


def environment(version: str, folder: Path) -> str:
    """The interpreter of the environment with that torch, which is made if it is not ready.

    Raises:
        PgolfError: pip failed.
    """
    venv = (folder / f"torch-{version}").absolute()
    python, ready = venv / "bin" / "python", venv / "ready"
    if not ready.exists():
        torch = f"torch=={version}"
        cpu = ["--index-url", "https://download.pytorch.org/whl/cpu"]
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(venv)],
            [*pip, torch, *(cpu if os.environ.get("PGOLF_TORCH") == "cpu" else [])],
            # triton by name: torch's builds without CUDA do not bring it.
            [*pip, torch, f"triton=={TESTED[version]}", *requirements()],
        ):
            done = subprocess.run(command, cwd=ROOT)
            if done.returncode:
                raise PgolfError(f"{' '.join(command)} failed with code {done.returncode}")
        ready.touch()
    return str(python)


def requirements() -> list[str]:
    """What pgolf needs for its demo and tests. Not pgolf: pip would build over this checkout."""
    markers = ("", 'extra == "demo"', 'extra == "test"')
    parts = (line.partition(";") for line in metadata.requires("pgolf"))
    return [package.strip() for package, _, marker in parts if marker.strip() in markers]


def tested(
    version: str, python: str, requested: list[str], old: Entry, changed: bool = False
) -> Iterator[Entry]:
    """The entry of a version in the file after each requested step: its result, old ones of others.

    Args:
        changed: leave out steps that have passed with the sources and versions as they are.
    """
    code = (
        "import json, platform, numpy, torch, triton; print(json.dumps({'torch': torch.__version__,"
        "'triton': triton.__version__, 'python': platform.python_version(), "
        "'numpy': numpy.__version__}))"
    )
    versions = json.loads(_run([python, "-c", code]).stdout)
    if versions["torch"].split("+")[0] != version:
        raise PgolfError(f"{python} has torch {versions['torch']}, not {version}: remove its venv")
    steps = dict(old.get("steps", {}))
    for name in requested:
        hashes, started = sources(name), time.perf_counter()
        known = steps.get(name, {}) if versions == old.get("versions") else {}
        if changed and known.get("passed") and known["sources"] == hashes:
            print(f"torch {version}: {name} has passed", flush=True)
            continue
        print(f"torch {version}: {name} ...", flush=True)
        done = STEPS[name](python)
        passed = done.returncode == 0
        if not passed:
            print(f"FAILED\n{done.stdout[-6000:]}{done.stderr[-3000:]}")
        steps[name] = {
            "passed": passed,
            "seconds": round(time.perf_counter() - started),
            "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "said": last_line(done.stdout),
            "sources": hashes,
        }
        yield {"versions": versions, "steps": {n: steps[n] for n in STEPS if n in steps}}


def last_line(text: str) -> str:
    """The last line of an output, without what is about this machine."""
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"\s+in [\d.]+s( \([\d:]+\))?", "", lines[-1].strip("= ")) if lines else ""


def sources(step: str) -> dict[str, str]:
    """sha256 of what a step tests, by file or folder."""
    digests = {}
    for name in SOURCES[step]:
        digest = hashlib.sha256()
        for file in sorted([ROOT / name, *(ROOT / name).rglob("*")]):
            if file.is_file() and file.suffix in (".py", ".json", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(file.read_bytes())
        digests[name] = digest.hexdigest()[:16]
    return digests


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def _model(python: str) -> subprocess.CompletedProcess:
    return _run([python, "-m", "bench.matrix_model"])


def _operators(python: str) -> subprocess.CompletedProcess:
    return _run(
        [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-p",
         "no:cacheprovider", "-m", "not slow and not gpu", "tests/ops"],
    )  # fmt: skip


def _aot(python: str) -> subprocess.CompletedProcess:
    return _run([python, "-m", "bench", "aot", "--compiler", "triton"])


def _training(python: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ("train", "demo", *WIDTH, "max_tokens=2e5", "quick=true", f"out={out}")
        done = _run([python, "-m", "pgolf", *command])
        if not done.returncode:
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
            done.stdout += f"{result['val_bpb']:.4f} bits per byte after {result['steps']} steps\n"
        return done


STEPS: Mapping[str, Callable[[str], subprocess.CompletedProcess]] = {
    "model": _model,
    "operators": _operators,
    "aot": _aot,
    "training": _training,
}


def table(results: Mapping[str, Entry]) -> str:
    """The results as README.md has them: a row for each version."""
    rows = [
        "| torch | triton | 11 layers, one graph | operator tests | `bench aot` | training | on |",
        "|---|---|---|---|---|---|---|",
    ]
    for version, entry in results.items():
        steps = entry["steps"]
        dates = {s["date"] for s in steps.values()}
        cells = [_cell(name, steps.get(name)) for name in STEPS]
        triton = entry["versions"]["triton"]
        rows.append(f"| {version} | {triton} | {' | '.join(cells)} | {max(dates, default='')} |")
    return "\n".join(rows)


def _cell(name: str, step: Entry | None) -> str:
    """The result of a step as a short text."""
    if step is None:
        return "not run"
    if not step["passed"]:
        return "FAILED"
    if name == "model":
        seconds = json.loads(step["said"])
        return f"{sum(v for k, v in seconds.items() if k.endswith('_s')):.0f} s"
    if name == "operators":
        return re.search(r"\d+ passed", step["said"])[0]
    return "passed"
