"""`python -m bench bundle`: what it calls, what it leaves, and what a checkout takes of it."""

import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import bundle

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands, each of which a stand-in takes that writes what the real one would."""
    seen: list[list[str]] = []

    def run(command: list[str], **how) -> SimpleNamespace:
        seen.append(command)
        for option, file in (("--target", "zstandard.py"), ("--build-lib", "pgolf/_C.so")):
            if option in command:
                path = Path(command[command.index(option) + 1]) / file
                path.parent.mkdir(parents=True)
                path.write_text("made")
        code = 1 if "no-such" in " ".join(command) else 0
        return SimpleNamespace(returncode=code, stdout="3.12\n")

    monkeypatch.setattr(bundle.subprocess, "run", run)
    monkeypatch.setattr(bundle, "BUNDLE", tmp_path / "bundle")
    return seen


def test_it_has_the_libraries_and_the_extension(calls, tmp_path, capsys) -> None:
    assert bundle.main(["--python", "python3.12", "--arch", "10.0a"]) == 0
    made = tmp_path / "bundle"
    files = [str(f.relative_to(made)) for f in made.rglob("*") if f.is_file()]
    assert sorted(files) == ["pgolf/_C.so", "site/zstandard.py"]
    asked, install, venv, tools, build = calls
    assert asked[0] == venv[0] == "python3.12" and "--no-deps" in install
    assert install[install.index("--python-version") + 1] == "3.12"
    assert set(bundle.LIBRARIES) < set(install) and set(bundle.BUILD_TOOLS) < set(tools)
    assert build[:3] == ["env", "PGOLF_BUILD=cuda", "TORCH_CUDA_ARCH_LIST=10.0a"]
    assert "for Python 3.12\n" in capsys.readouterr().out
    calls.clear()
    assert bundle.main(["--no-extension"]) == 0 and len(calls) == 2
    assert [f.name for f in made.iterdir()] == ["site"]


def test_what_fails_leaves_the_older_one(calls, tmp_path, capsys) -> None:
    bundle.main(["--no-extension"])
    assert bundle.main(["--python", "no-such-python"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m bench bundle: --python no-such-python: ")
    assert err.endswith("ended with 1: name an interpreter that is here\n")
    assert (tmp_path / "bundle" / "site" / "zstandard.py").read_text() == "made"


def test_the_libraries_are_those_that_pgolf_asks_for() -> None:
    project = (bundle.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in bundle.LIBRARIES:
        assert f'"{name}"' in project


def test_a_checkout_takes_the_extension_if_it_has_none(tmp_path) -> None:
    package, made = tmp_path / "pgolf", tmp_path / "bundle"
    (made / "pgolf").mkdir(parents=True)
    package.mkdir()
    (made / "pgolf" / "_C.of-another-python.so").write_bytes(b"another's")
    bundle.adopt(made, package)
    assert list(package.iterdir()) == []
    (made / "pgolf" / f"_C{SUFFIX}").write_bytes(b"ours")
    bundle.adopt(made, package)
    bundle.adopt(tmp_path / "none", package)
    assert (package / f"_C{SUFFIX}").read_bytes() == b"ours"
    (made / "pgolf" / f"_C{SUFFIX}").write_bytes(b"older")
    bundle.adopt(made, package)
    assert (package / f"_C{SUFFIX}").read_bytes() == b"ours"
