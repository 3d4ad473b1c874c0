"""A copy of the checkout, and the build in it: with real compilers or with a stand-in."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHOOSERS = (
    "PGOLF_BUILD", "PGOLF_CUDART", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "NVCC_CCBIN"
)  # fmt: skip

# Answers --version; when it compiles, leaves an object and a depfile without dependencies.
FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "fake release 1.0" && exit
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && object=$2
    [ "$1" = -MF ] && depfile=$2
    shift
done
: > "$object"
[ -z "${depfile:-}" ] || echo "$object:" > "$depfile"
"""


def copy_checkout(folder: Path) -> Path:
    """What the build needs, with a space in the path and nothing that was built."""
    root = folder / "a checkout"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("csrc", "pgolf", "triton_kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignore)
    return root


def run(command: list, root: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in `root` without the choices that this process inherited."""
    base = {k: v for k, v in os.environ.items() if k not in CHOOSERS}
    return subprocess.run(
        [str(part) for part in command], cwd=root, env=base | env, capture_output=True, text=True
    )


def build(root: Path, **env: str) -> str:
    """build_ext into the copy; its output."""
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refusal(root: Path, **env: str) -> str:
    """What a build that has to fail says."""
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root, **env)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def compiled(output: str) -> set[str]:
    """The objects that ninja made, by name."""
    words = (line.split() for line in output.splitlines() if line.startswith("["))
    return {Path(line[-1]).name for line in words}


def python(code: str, path: Path, cwd: Path) -> str:
    """The output of `code` in a new interpreter which finds packages in `path`."""
    result = run([sys.executable, "-W", "error", "-c", code], cwd, PYTHONPATH=str(path))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def load_setup():
    spec = importlib.util.spec_from_file_location("pgolf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
