"""The Makefile and the set-up script, with stand-ins for Python: nothing is installed here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Logs its arguments, and what is to be built; pytest's exit code is chosen by the test.
FAKE_VENV_PYTHON = """#!/bin/sh
echo "$@" >> python.log
case "$*" in
    *pytest*) exit ${PYTEST_CODE:-0} ;;
    *"import torch"*) exit 1 ;;
    *build_ext* | *"-m pip"*) echo "${PGOLF_BUILD:-}" >> build.log ;;
esac
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """The build's own files, with an environment that is set up already."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    program(tmp_path / ".venv" / "bin" / "python", FAKE_VENV_PYTHON)
    (tmp_path / ".venv" / "ready").touch()
    return tmp_path


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    # These tests run under make themselves: a nested make would say where it is.
    outer = (
        "CXX", "PROVE", "PYTHON", "PGOLF_BUILD", "PGOLF_TORCH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"
    )  # fmt: skip
    base = {k: v for k, v in os.environ.items() if k not in outer}
    return subprocess.run(command, cwd=cwd, env=base | env, capture_output=True, text=True)


def log(checkout: Path) -> list[str]:
    return (checkout / "python.log").read_text().splitlines()


BUILD = "setup.py -q build_ext --inplace"
QUICK = "-m pytest -n auto --dist worksteal -m not slow and not gpu"
PROOFS = "-m pytest -n auto --dist loadfile -m slow --prove changed"


def test_ci_runs_both_from_any_folder(checkout, tmp_path_factory):
    result = run([str(checkout / ".ci" / "run")], tmp_path_factory.mktemp("elsewhere"))
    assert result.returncode == 0, result.stderr
    assert log(checkout) == [BUILD, "-m ruff check .", QUICK, BUILD, PROOFS]


def test_demo(checkout):
    assert run(["make", "demo"], checkout).returncode == 0
    assert log(checkout) == [BUILD, "-m pgolf train demo"]


def test_docs(checkout):
    assert run(["make", "docs"], checkout).returncode == 0
    assert log(checkout) == [BUILD, "docs/api.py"]


def test_gpu(checkout):
    """Nothing is set up where the interpreter that is named has torch."""
    without = str(checkout / ".venv" / "bin" / "python")
    assert run(["make", "gpu"], checkout, PYTHON=without).returncode == 0
    assert log(checkout) == ["-c import torch", BUILD, "-m bench gpu"]
    (checkout / ".venv" / "ready").unlink()
    program(checkout / "own" / "python", '#!/bin/sh\necho "own $@" >> python.log\n')
    assert run(["make", "gpu", "PYTHON=own/python"], checkout).returncode == 0
    assert log(checkout)[3:] == ["own -c import torch", "own -m bench gpu"]


def test_matrix(checkout):
    assert run(["make", "matrix"], checkout).returncode == 0
    assert log(checkout) == [BUILD, "-m bench matrix --changed"]


def test_no_slow_test_is_said_and_no_failure(checkout):
    result = run(["make", "prove"], checkout, PYTEST_CODE="5")
    assert (result.returncode, result.stdout) == (0, "no test is marked slow\n")
    assert run(["make", "prove"], checkout, PYTEST_CODE="1").returncode != 0
    assert run(["make", "prove"], checkout, PROVE="all").returncode == 0
    assert log(checkout)[-1] == PROOFS.replace("changed", "all")
    assert run(["make", "test"], checkout, PYTEST_CODE="5").returncode != 0


def test_set_up_runs_again_when_the_dependencies_change(checkout):
    ready = checkout / ".venv" / "ready"
    os.utime(ready, (0, 0))
    assert run(["make", "demo"], checkout).returncode == 0
    assert log(checkout)[:2] == [
        "-c import pip",
        "-m pip install --disable-pip-version-check -e .[demo,data,docs,test]",
    ]
    assert ready.stat().st_mtime > 0


    assert built(checkout) == ["none", expected_build()], "pip, which is silent, compiles nothing"


def test_torch_for_cpus(checkout):
    setup = ["/bin/sh", ".ci/setup"]
    assert run(setup, checkout, PGOLF_TORCH="cpu").returncode == 0
    installs = [line for line in log(checkout) if "pip install" in line]
    assert installs == [
        "-m pip install --disable-pip-version-check torch>=2.9 "
        "--index-url https://download.pytorch.org/whl/cpu",
        "-m pip install --disable-pip-version-check -e .[demo,data,docs,test]",
    ]
    python = checkout / ".venv" / "bin" / "python"
    program(python, "#!/bin/sh\n")  # one that has torch's CUDA build
    result = run(setup, checkout, PGOLF_TORCH="cpu")
    assert (result.returncode, result.stderr) == (
        1, "pgolf: .venv has torch's CUDA build: remove .venv for PGOLF_TORCH=cpu\n"
    )  # fmt: skip
    result = run(setup, checkout, PGOLF_TORCH="rocm")
    assert result.returncode == 1 and "PGOLF_TORCH=rocm is unknown" in result.stderr


def built(checkout: Path) -> list[str]:
    """PGOLF_BUILD of every call that compiles or could."""
    return (checkout / "build.log").read_text().splitlines()


def expected_build() -> str:
    return "auto" if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") else "cpu"


def test_cuda_is_compiled_where_there_is_a_gpu(checkout, tmp_path):
    """Or where it is asked for: `make gpu` does."""
    assert run(["make", "demo"], checkout).returncode == 0
    with_gpu = str(tmp_path / "bin") + ":" + os.environ["PATH"]
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: Some GPU (UUID: 1)'\n")
    assert run(["make", "test"], checkout, PATH=with_gpu).returncode == 0
    assert run(["make", "prove"], checkout, PGOLF_BUILD="none").returncode == 0
    without = str(checkout / ".venv" / "bin" / "python")
    assert run(["make", "gpu"], checkout, PYTHON=without).returncode == 0
    assert built(checkout) == [expected_build(), "auto", "none", "cuda"]


def test_everything_that_is_missing_is_named(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to("/bin/sh")
    setup = ["/bin/sh", ".ci/setup"]
    path = str(tmp_path / "bin")
    result = run(setup, checkout, PATH=path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "pgolf: python3 is missing: apt-get install python3",
        "pgolf: a C++ compiler is missing: apt-get install g++",
    ]
    # A Debian without python3-venv and python3-dev.
    bare = '#!/bin/sh\ncase "$*" in *ensurepip* | *Python.h*) exit 1 ;; esac\n'
    program(tmp_path / "bin" / "python3", bare)
    result = run(setup, checkout, PATH=path, CXX="/nonexistent -O2")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "pgolf: python's module venv or ensurepip is missing: apt-get install python3-venv",
        "pgolf: Python.h is missing: apt-get install python3-dev",
        "pgolf: the C++ compiler CXX=/nonexistent -O2 is missing: apt-get install g++",
    ]
    old = '#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit\nexit 1\n'
    program(tmp_path / "bin" / "python3", old)
    program(tmp_path / "bin" / "g++", "#!/bin/sh\n")
    result = run(setup, checkout, PATH=path)
    assert result.returncode == 1
    assert result.stderr == (
        "pgolf: Python 3.9.2 is too old: set PYTHON to a python of 3.10 or newer\n"
    )
    assert not (checkout / "python.log").exists()
