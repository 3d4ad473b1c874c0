"""`python -m bench gpu`: what it does without a GPU, and its steps with stand-ins for them."""

import sys

import pytest
import torch

from bench import gpu, gpu_kernels

OK, FAILS, SLEEPS = (
    (sys.executable, "-c", code)
    for code in ("pass", "raise SystemExit(3)", "import time; time.sleep(60)")
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "torch sees no GPU here: nothing to run\n"
    assert list(tmp_path.iterdir()) == []


def test_a_step_passes_fails_or_takes_too_long(capsys) -> None:
    assert gpu.passes("a", 30, OK)
    assert not gpu.passes("b", 30, FAILS)
    assert not gpu.passes("c", 0.2, SLEEPS)
    assert not gpu.passes("d", 1, ())
    said = capsys.readouterr().out
    assert "b: code 3 after" in said and "c: not done after 0.2 s" in said
    assert "no compute-sanitizer on PATH" in said


def test_all_steps_run_and_times_are_joined(monkeypatch, tmp_path, capsys) -> None:
    taken = []

    def passes(name, seconds, command) -> bool:
        taken.append(seconds)
        if "--json" in command:
            with open(command[-1], "w") as file:
                file.write(f"{name}\n")
        return name != "racecheck"

    monkeypatch.setattr(gpu, "passes", passes)
    assert gpu.run(tmp_path / "h100.jsonl") == 1
    assert (tmp_path / "h100.jsonl").read_text() == "ops\nstep\n"
    assert [p.name for p in tmp_path.iterdir()] == ["h100.jsonl"]
    assert sum(taken) < 600 and len(taken) == 5
    assert capsys.readouterr().out.endswith("FAILED: racecheck\n")


@pytest.mark.skipif(
    any(impl.missing() for op in gpu_kernels.OPERATORS.values()
        for impl in op.implementations.values() if not impl.package),
    reason="not every implementation is here",
)
def test_every_kernel_is_launched(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(gpu_kernels.Call, "run", lambda call, function: ran.append(function))
    gpu_kernels.run_all("cpu")
    assert {(f.func, f.keywords["impl"]) for f in ran} == {
        (operator.call, impl)
        for operator in gpu_kernels.OPERATORS.values()
        for impl, implementation in operator.implementations.items()
        if implementation.device == "cuda" and not implementation.package
    }
