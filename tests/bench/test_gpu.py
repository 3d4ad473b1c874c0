"""`python -m bench gpu`: without a GPU, a network, and packages that may be missing."""

import ast
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_kernels, gpu_parts, losses, peers
from bench.outcomes import Outcomes
from bench.parts import ROOT, Part
from pgolf.errors import DataError
from pgolf.ops.choose import parse
from pgolf.ops.operator import OPERATORS, Implementation

# What a machine with torch for GPUs may well not have.
MISSING = ("zstandard", "brotli", "python_minifier", "ruff", "huggingface_hub", "wordfreq",
           "safetensors", "pyarrow")  # fmt: skip
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main([]) == 0
    out = capsys.readouterr().out
    assert out == "torch sees no GPU here: nothing to run; --rehearse tries the commands out\n"
    assert list(tmp_path.iterdir()) == []


def test_the_summary_comes_last_and_is_kept_as_it_grows(tmp_path, capsys) -> None:
    grown = []

    def commands(seconds: float) -> list:
        file = tmp_path / "summary.json"
        grown.append(len(json.loads(file.read_text())["parts"]) if file.exists() else 0)
        return [(sys.executable, "-S", "-c", "raise SystemExit(len(__import__('sys').argv) - 1)")]

    def failing(seconds: float) -> list:
        return [(*commands(seconds)[0], "one")]

    chosen = [Part("a", 1, commands, lambda: ["a line"]), Part("b", 1, failing)]
    assert gpu.measure(chosen, 60, tmp_path) == 1
    assert grown == [0, 1]
    table = capsys.readouterr().out.split("summary, of ")[1].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["a", "a", "b", "NOT"]
    assert table[2] == "    a line" and table[-1] == "NOT GOOD: b"
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept["torch"] == torch.__version__
    assert [(p["name"], p["verdict"]) for p in kept["parts"]] == [
        ("a", "passed"), ("b", "FAILED, code 1")
    ]  # fmt: skip
    assert gpu.measure(chosen[:1], 60, tmp_path) == 0
    assert capsys.readouterr().out.endswith("all passed\n")


def test_a_part_that_is_run_alone_leaves_what_the_others_have(tmp_path, capsys) -> None:
    def chosen(*names: str) -> list[Part]:
        return [Part(name, 1, lambda _: []) for name in names]

    assert gpu.measure(chosen("step", "ops"), 60, tmp_path) == 0
    files = {name: tmp_path / f"{name}.jsonl" for name in ("step", "ops", "ops-fp32", "train")}
    for file in files.values():
        file.write_text("{}\n")
    assert gpu.measure(chosen("ops"), 60, tmp_path) == 0
    assert {name for name, file in files.items() if file.exists()} == {"step", "train"}
    file = tmp_path / "summary.json"
    assert [part["name"] for part in json.loads(file.read_text())["parts"]] == ["step", "ops"]
    assert capsys.readouterr().out.count("== step") == 1
    kept = json.loads(file.read_text()) | {"torch": "another"}
    file.write_text(json.dumps(kept))
    gpu.measure(chosen("ops"), 60, tmp_path)
    assert [part["name"] for part in json.loads(file.read_text())["parts"]] == ["ops"]
    file.write_text("[1")
    with pytest.raises(DataError, match=r"summary.json is no summary of `bench gpu`: move it"):
        gpu.measure(chosen("ops"), 60, tmp_path)


def without_packages(folder: Path) -> dict[str, str]:
    """The environment of processes in which those packages cannot be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n"
    (folder / "sitecustomize.py").write_text(block)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


# What a machine with torch for GPUs has, and modules whose matter is another package.
THERE = {"torch", "triton", "numpy", "sentencepiece", "pgolf", "bench"}
PACKING = {"pgolf/codecs/zstd.py": "zstandard", "pgolf/codecs/brotli.py": "brotli"}


def imported_at_once(file: Path) -> set[str]:
    """Packages that a module imports when it is imported, unless it has a word for their lack."""
    packages = set()
    todo = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            packages.add(node.module.partition(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.Try, ast.With)):
            todo += list(ast.iter_child_nodes(node))
    return packages - {*sys.stdlib_module_names, *THERE}


def test_modules_import_other_packages_where_they_use_them() -> None:
    files = [f for folder in ("pgolf", "bench") for f in (ROOT / folder).rglob("*.py")]
    imported = {str(file.relative_to(ROOT)): imported_at_once(file) for file in files}
    imported.pop("bench/outcomes.py")  # of pytest
    assert {name: packages for name, packages in imported.items() if packages} == {
        name: {package} for name, package in PACKING.items()
    }


WITHOUT = """
import sys
from bench import gpu
from pgolf.codecs import codec
from pgolf.errors import ConfigError
from pgolf.submission.script import minified
for call in (lambda: codec("zstd"), lambda: codec("brotli"), lambda: minified("a = 1", "a")):
    try:
        call()
    except ConfigError as e:
        print(e)
sys.exit(gpu.main(["--rehearse", "--parts", "attention", "--out", sys.argv[1]]))
"""


@NO_GPU
def test_it_runs_without_packages_that_may_be_missing(tmp_path) -> None:
    """A part starts, runs and ends; what needs a package names it."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(out)],
        env=without_packages(tmp_path), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    for name in ("zstandard", "brotli", "python-minifier"):
        assert f"pip install {name}" in done.stdout
    assert done.stdout.endswith("all passed\n")
    (line,) = map(json.loads, (out / "attention.jsonl").read_text().splitlines())
    assert line["operator"] == "attention" and line["provider"] == "eager"
    assert "fa3        not here" in (out / "attention.log").read_text()
    assert json.loads((out / "summary.json").read_text())["parts"][0]["verdict"] == "passed"


@NO_GPU
@pytest.mark.slow
def test_all_of_it_runs_without_packages_that_may_be_missing(tmp_path) -> None:
    """Every part: on this CPU, with a tiny model, CUDA kernels in the emulator."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--rehearse", "--seconds", "1500", "--out", out],
        env=without_packages(tmp_path), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    kept = {p["name"]: p for p in json.loads((out / "summary.json").read_text())["parts"]}
    bad = [name for name, part in kept.items() if not part["good"]]
    emulated = bool(os.environ.get("PGOLF_CUDA_MODULE"))
    assert bad == ["memcheck"] * (not emulated), done.stdout
    assert "pip install python-minifier" in (out / "train.log").read_text()
    assert kept["train"]["says"][-1] == "not packed: pip install python-minifier"
    assert [line["step"] for line in map(json.loads, (out / "train.jsonl").open())] == [1, 2, 3]
    outcomes = [json.loads(line)["outcome"] for line in (out / "tests.jsonl").open()]
    assert len(outcomes) > 100 and set(outcomes) == {"skipped"}
    assert len(kept["step"]["says"]) == 2 and kept["ops"]["says"]


@pytest.fixture
def record(monkeypatch, tmp_path) -> dict[str, Part]:
    """The parts as a machine with a GPU has them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    place = gpu_parts.Place(tmp_path, tmp_path, gpu_parts.RECORD)
    return {part.name: part for part in gpu_parts.all_parts(place)}


def test_parts_have_their_order_and_every_one_its_share(record) -> None:
    assert tuple(record) == gpu_parts.NAMES
    for name, part in record.items():
        for command in part.commands(100.0):
            assert command[0] == sys.executable or name.endswith("check")
            module = command[command.index("-m") + 1] if "-m" in command else "setup.py"
            assert module.partition(".")[0] in ("bench", "pgolf", "pytest", "torch", "setup")
        assert 0 < part.share < 200 and isinstance(part.says(), list)
        assert part.needed == (name in ("data", "build"))
    total = sum(part.share for part in record.values())
    assert gpu_parts.TEST_SECONDS < 540 * record["tests"].share / total / 2
    build = record["build"]
    assert build.env["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    for tool in ("memcheck", "synccheck", "racecheck"):
        assert record[tool].env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        (command,) = record[tool].commands(1.0)
        assert command[command.index("--tool") + 1] == tool
        assert ("--impl", "cuda") == command[-4:-2] or tool != "racecheck"


def test_each_operator_is_timed_at_the_record_s_sizes() -> None:
    timed = (*gpu_parts.OPERATORS, *gpu_parts.FP32_OPERATORS)
    assert sorted(timed) == sorted(OPERATORS.keys() - {"attention"}) and len(timed) > 12
    on_gpu = {n for n, i in OPERATORS["attention"].implementations.items() if i.device == "cuda"}
    assert set(gpu_parts.ATTENTION) == on_gpu
    for operator in OPERATORS.values():
        labels = [
            s.label
            for s in [s for s in operator.samples() if s.bench] + peers.samples(operator)
            if any(word in s.label for word in gpu_parts.SAMPLES)
        ]
        assert labels, operator.name
        assert not [label for label in labels if "4096" in label or "8192" in label]
    chosen = [parse(text) for text in gpu_parts.CHOICES]
    assert {c.get("attention", "auto") for c in chosen} == {"auto"}, "what differs is ours"
    assert all(c.keys() | {"attention"} == OPERATORS.keys() for c in chosen)
    plain, auto = (set(c.values()) for c in chosen[:2])
    assert plain == {"reference", "auto"} and auto == {"auto"}


def words_of(command: tuple, option: str) -> list[str]:
    """What follows an option of a command."""
    after = command[command.index(option) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), after))


def test_operators_are_timed_in_the_record_s_dtypes(record) -> None:
    commands = record["ops"].commands(1.0)
    assert [words_of(command, "--dtype") for command in commands] == [["bf16"], ["fp32"]]
    assert words_of(commands[1], "--op") == [
        "param_update", "muon_momentum", "grad_norm", "part_sums", "weight_cast", "fake_quant"
    ]  # fmt: skip
    files = [Path(*words_of(command, "--json")) for command in commands]
    assert [file.name for file in files] == ["ops.jsonl", "ops-fp32.jsonl"]
    for file in files:
        line = {"operator": file.stem, "sample": "s", "mode": "forward", "provider": "cuda",
                "median_ms": 1.0, "percent_of_floor": 50.0}  # fmt: skip
        file.write_text(json.dumps(line) + "\n")
    assert record["ops"].says() == [
        "ops s forward: cuda 1 ms 50%", "ops-fp32 s forward: cuda 1 ms 50%"
    ]  # fmt: skip


def test_each_operator_is_tuned_at_the_record_s_sizes_in_its_own_time(record) -> None:
    part = record["tune"]
    commands = part.commands(1.0)
    assert [command[4] for command in commands] == list(gpu_parts.TUNED)
    assert len({*words_of(commands[0], "--json"), *words_of(commands[1], "--json")}) == 2
    assert part.endless and part.until == [0.5, 1.0]
    for command in commands:
        assert words_of(command, "--sample") == list(gpu_parts.SAMPLES)


@pytest.mark.parametrize("there", [True, False])
def test_losses_are_the_verdict_where_nothing_can_be_packed(there, record, monkeypatch) -> None:
    original = gpu_parts.importlib.util.find_spec
    find_spec = lambda name: there if name == "python_minifier" else original(name)  # noqa: E731
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: find_spec(name) or None)
    place = gpu_parts.Place(Path("out"), Path("scratch"), gpu_parts.RECORD)
    part = gpu_parts._train(place)
    commands = part.commands(1.0)
    assert [words_of(command, "-m")[0] for command in commands[:2]] == ["torch.distributed.run"] * 2
    assert commands[2][1:3] == ("-m", "bench.losses") and len(commands) == (6 if there else 3)
    assert words_of(commands[2], "--steps") == ["20"]
    assert part.until == (0.45, 0.9) and part.unjudged == (0 if there else 2)
    assert part.says() == ([] if there else ["not packed: pip install python-minifier"])


def test_a_profile_without_kernels_can_be_told() -> None:
    phase = {"host_ms": 1.0, "gpu_ms": 2.0}
    line = {
        "ops": "auto", "median_ms": 2.0, "first_ms": 3.0, "peak_bytes": None, "loss": None,
        "phases": {name: phase for name in ("forward", "backward", "optimizer")},
        "profile": {"step_us": 0.0, "idle_us": 0.0},
    }  # fmt: skip
    assert gpu_parts._step_line(line) == (
        "auto: 2.0 ms, 1.500x (forward 2.0, backward 2.0, optimizer 2.0, host 3.0); "
        "ITS LOSS IS NOT FINITE"
    )
    line |= {"profile": {"step_us": 10.0, "idle_us": 1.0}, "loss": 7.0}
    assert gpu_parts._step_line(line).endswith("host 3.0, idle 10 %)")


def test_tests_for_a_gpu_are_named_by_their_files() -> None:
    marked = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8").replace('"pytest.mark.gpu"', "")
    ]
    assert sorted(marked) == sorted(gpu_parts.TESTS)


def test_outcomes_are_written_as_tests_end(tmp_path) -> None:
    file = tmp_path / "outcomes.jsonl"
    written = Outcomes(file)
    for when, outcome, output in (
        ("setup", "passed", None), ("call", "passed", None), ("teardown", "passed", None),
        ("call", "failed", "wrong\n" * 1000), ("setup", "skipped", ("a.py", 1, "no GPU")),
    ):  # fmt: skip
        written.pytest_runtest_logreport(
            SimpleNamespace(when=when, outcome=outcome, longrepr=output, nodeid="t", duration=0.5)
        )
        lines = [json.loads(line) for line in file.open()] if file.exists() else []
    assert [line["outcome"] for line in lines] == ["passed", "failed", "skipped"]
    assert lines[0]["said"] == "" and len(lines[1]["said"]) == 2000


def test_losses_of_two_runs_stand_side_by_side(tmp_path, capsys) -> None:
    def run(name: str, *values: float) -> Path:
        lines = [{"kind": "train", "step": i, "loss": x} for i, x in enumerate(values, 1)]
        text = "".join(json.dumps(x) + "\n" for x in [*lines, {"kind": "event", "step": 1}])
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    first, near, far = run("a", 7.0, 6.0), run("b", 7.01, 6.02, 5.5), run("c", 7.0, 6.5)
    json_to = ["--json", str(tmp_path / "f.jsonl")]
    assert losses.main([str(first), str(near), *json_to]) == 0
    assert (tmp_path / "f.jsonl").read_text() == (
        '{"step": 1, "losses": [7.0, 7.01]}\n{"step": 2, "losses": [6.0, 6.02]}\n'
    )
    assert losses.main([str(first), str(near), *json_to, "--steps", "2"]) == 0
    assert losses.main([str(first), str(near), *json_to, "--steps", "3"]) == 1
    assert "WRONG: 2 steps of both runs, not 3" in capsys.readouterr().out
    assert losses.main([str(first), str(far), *json_to]) == 1
    assert "WRONG: more than 2% apart at steps [2]" in capsys.readouterr().out
    assert losses.main([str(first), str(tmp_path / "none"), *json_to]) == 2
    assert "the folder of a run that has begun?" in capsys.readouterr().err


def test_every_kernel_is_launched(monkeypatch, tmp_path) -> None:
    """Each that is here; without a GPU as if there were one, with arguments alone."""
    ran, texts = [], []
    monkeypatch.setattr(gpu_kernels.Call, "run", lambda call, function: ran.append(function))
    monkeypatch.setattr(gpu_kernels, "atomic_write", lambda file, text: texts.append(text))
    monkeypatch.setattr(Implementation, "runs_on", lambda self, device: True)
    ours = {
        (operator.call, impl): implementation.missing()
        for operator in OPERATORS.values()
        for impl, implementation in operator.implementations.items()
        if implementation.device == "cuda" and not implementation.package
    }
    calls, wrong = gpu_kernels.run_all("cpu", file=tmp_path / "f")
    assert calls == len(ran) == len(texts)
    here = {key for key, missing in ours.items() if not missing}
    assert {(f.func, f.keywords["impl"]) for f in ran} == here
    assert len(wrong) == len(ours) - len(here)
    lines = [json.loads(line) for line in "".join(texts[-1:]).splitlines()]
    assert len(lines) == len(ran)
    assert all(set(line) == {"operator", "impl", "sample", "dtype"} for line in lines)


def test_a_kernel_that_is_missing_or_fails_leaves_the_others_to_run(monkeypatch, capsys) -> None:
    """The sanitizers see those that are here; what is not is told, and the exit code is 1."""
    names = ("xsa", "fake_quant", "grad_norm")
    for name in names:
        known = OPERATORS[name]
        kernels = {
            impl: dataclasses.replace(each, missing=lambda: "")
            for impl, each in known.implementations.items()
        }
        if name == "xsa":
            kernels["cuda"] = dataclasses.replace(kernels["cuda"], missing=lambda: "not built")
        monkeypatch.setitem(OPERATORS, name, dataclasses.replace(known, implementations=kernels))
    called = {OPERATORS[name].call: name for name in names}
    ran: list[tuple[str, str]] = []

    def run(call, function) -> None:
        ran.append((called[function.func], function.keywords["impl"]))
        if ran[-1] == ("fake_quant", "triton"):
            raise RuntimeError("does not compile")

    monkeypatch.setattr(gpu_kernels.Call, "run", run)
    monkeypatch.setattr(Implementation, "runs_on", lambda self, device: self.device == "cuda")
    assert gpu_kernels.main(["--device", "cpu", "--op", *names]) == 1
    assert set(ran) == {
        ("xsa", "triton"), ("fake_quant", "cuda"), ("fake_quant", "triton"), ("grad_norm", "cuda")
    }  # fmt: skip
    captured = capsys.readouterr()
    assert "WRONG: xsa=cuda: not built\n" in captured.out
    assert "RuntimeError: does not compile" in captured.err
    assert gpu_kernels.main(["--device", "cpu", "--op", "grad_norm"]) == 0
    ran.clear()
    calls, wrong = gpu_kernels.run_all("cpu", ["fake_quant", "xsa"], ["cuda"])
    assert set(ran) == {("fake_quant", "cuda")} and calls == len(ran) and len(wrong) == 1
    ran.clear()
    monkeypatch.setattr(gpu_kernels.restart, "unusable", lambda device: True)
    assert gpu_kernels.main(["--device", "cpu", "--op", "fake_quant", "--impl", "triton"]) == 1
    assert len(ran) == 1 and "no more was run" in capsys.readouterr().out
