"""`python -m bench bundle`: what it calls, what it leaves, and what a checkout takes of it."""

import os
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import bundle, gpu, gpu_parts
from pgolf import extension

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands, each of which a stand-in takes that writes what the real one would."""
    seen: list[list[str]] = []

    def run(command: list[str], **options) -> SimpleNamespace:
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
    assert sorted(files) == ["pgolf/_C.so", "site/zstandard.py", "sources.sha256"]
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


def test_a_checkout_takes_an_extension_that_is_of_its_sources(tmp_path, capsys) -> None:
    made, module = tmp_path / "bundle", tmp_path / "pgolf" / f"_C{SUFFIX}"
    for name in ("setup.py", "csrc/cuda/a.cu", "pgolf/a.py", "bundle/pgolf/_C.other.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (made / bundle.SOURCES).write_text(bundle.sources(tmp_path))
    assert bundle.adopt(tmp_path / "none", tmp_path) is bundle.adopt(made, tmp_path) is None
    assert [f.name for f in module.parent.iterdir()] == ["a.py"], "that is of another Python"
    (made / "pgolf" / module.name).write_bytes(b"ours")
    for there in (None, b"older", b"ours"):
        if there:
            module.write_bytes(there)
        os.utime(tmp_path / "csrc" / "cuda" / "a.cu")  # as a copy of the checkout does
        assert bundle.adopt(made, tmp_path) is True and module.read_bytes() == b"ours"
    assert capsys.readouterr().out.count(f"{module} is from {made}\n") == 2
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("changed")
    assert bundle.adopt(made, tmp_path) is False, "it was adopted before"
    module.write_bytes(b"compiled here")
    assert bundle.adopt(made, tmp_path) is None and module.read_bytes() == b"compiled here"
    assert capsys.readouterr().out.count("is of other sources: run `python -m bench bundle`") == 2


@pytest.mark.parametrize("written", ["before", "after"])
def test_times_decide_on_what_is_not_adopted_alone(monkeypatch, tmp_path, written) -> None:
    module = tmp_path / "_C.so"
    module.touch()
    os.utime(module, (0, 0 if written == "before" else 2**33))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(extension, "cuda", lambda: SimpleNamespace(__file__=str(module)))
    monkeypatch.setattr(extension, "no_code_for", lambda *arguments: "")
    compiled = {
        adopted: bool(gpu_parts._build(
            gpu_parts.Place(tmp_path, tmp_path, gpu_parts.RECORD, adopted)
        ).commands(1.0))
        for adopted in (True, False, None)
    }  # fmt: skip
    assert compiled == {True: False, False: True, None: written == "before"}


def test_a_rehearsal_leaves_the_extension_that_is_there(monkeypatch, tmp_path) -> None:
    adopted: list[Path] = []
    monkeypatch.setattr(gpu, "adopt", adopted.append)
    monkeypatch.setattr(gpu, "measure", lambda chosen, seconds, out: len(adopted))
    monkeypatch.setattr(gpu.gpu_parts, "all_parts", lambda place: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.os, "environ", {**os.environ})
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert gpu.main(["--out", str(tmp_path)]) == 1 and adopted == [bundle.BUNDLE]
