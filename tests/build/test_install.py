"""pip's own path, in its isolated build environment: needs the package index, and takes a while."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = (
    "import pgolf, pgolf._C as c, pgolf.triton_kernels as t;"
    "print(c.build_info()['reason'], t.__name__, pgolf.__file__, sep='|')"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of a source distribution, unpacked: so this tests what MANIFEST.in names, too."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder]
    subprocess.run([str(c) for c in command], cwd=ROOT, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_pip_install(source, tmp_path, monkeypatch, editable):
    monkeypatch.setenv("PGOLF_BUILD", "cpu")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    flags = ["--no-deps", "-v", *["-e"] * editable, str(source)]
    install = [python, "-m", "pip", "install", *flags]
    result = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    assert "pgolf: built pgolf._C for CPU only: PGOLF_BUILD=cpu" in result.stdout
    reason, name, file = subprocess.check_output([python, "-c", CHECK], text=True).split("|")
    assert (reason, name) == ("PGOLF_BUILD=cpu", "pgolf.triton_kernels")
    assert Path(file).is_relative_to(source if editable else tmp_path / "venv")
    bare = subprocess.run([python, "-c", "import triton_kernels"], capture_output=True)
    assert b"ModuleNotFoundError" in bare.stderr
    assert (tmp_path / "venv" / "bin" / "pgolf").exists()
