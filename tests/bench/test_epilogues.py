"""`python -m bench tune --epilogues` with a timer of known times, and `auto` after it."""

import dataclasses
import json

import pytest
import torch

from pgolf.errors import PgolfError, StorageError
from pgolf.ops.launch import interpreting
from pgolf.ops.operator import OPERATORS, Sample

pytest.importorskip("triton")
if not interpreting():
    pytest.skip("Triton kernels are not interpreted here", allow_module_level=True)

from bench import epilogues, tune
from pgolf.ops import choose as choose_module  # noqa: E402
from pgolf.ops import launch, timed  # noqa: E402
from pgolf.ops.choose import choose  # noqa: E402
from pgolf.triton_kernels.launch import intercepted  # noqa: E402

from ..triton.interpreter import repair  # noqa: E402

repair()
CPU, GPU = torch.device("cpu"), "a toy GPU"
(XSA_LINEAR,) = (e for e in epilogues.EPILOGUES if e.operator == "xsa_linear")


def small(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    g = torch.Generator().manual_seed(0)
    shapes = (1, 3, 4, 64), (1, 3, 2, 64), (16, 256)
    return tuple(torch.randn(shape, generator=g).to(device, dtype) for shape in shapes), {}


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A table of its own, xsa_linear with one small size, and a machine that has the toy GPU."""
    operator = dataclasses.replace(
        OPERATORS["xsa_linear"], samples=lambda: [Sample(XSA_LINEAR.sample, small, bench=True)]
    )
    monkeypatch.setitem(OPERATORS, "xsa_linear", operator)
    monkeypatch.setattr(timed, "TIMED", tmp_path / "timed.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.setattr(launch, "no_triton", lambda: "")
    choose.cache_clear()
    yield timed.TIMED
    choose.cache_clear()


def taking(epilogue: float, steps: float, seen: list | None = None):
    """A timer of these milliseconds, which notes what each of both starts."""

    def timer(functions) -> dict[str, float]:
        for name, function in functions.items():
            started = []
            with intercepted(lambda one, s=started: (s.append(one.kernel.__name__), one())):
                function()
                function()  # again and again
            if seen is not None:
                seen.append((name, started))
        return {"epilogue": epilogue, "steps": steps}

    return timer


def auto(device: str = "cuda") -> tuple[str, str]:
    return choose("xsa_linear", "auto", device, torch.bfloat16)


@pytest.mark.parametrize(
    ("fused", "impl"),
    [(0.25, "triton"), (0.29, "triton"), (0.299, "reference"), (0.4, "reference")],
)
def test_what_is_faster_by_two_percent_is_what_auto_takes(
    table, fused: float, impl: str, capsys
) -> None:
    assert auto().impl == "reference" and "no GPU has timed" in auto().reason
    verdict = epilogues.decide(XSA_LINEAR, CPU, GPU, taking(fused, 0.3))
    assert verdict.impl == impl
    said = capsys.readouterr().out
    assert f"backward {fused:.4g} ms with the epilogue, 0.3 ms in two steps" in said
    assert "600 TFLOP/s and 2.7 TB/s it breaks even at 217 TFLOP/s" in said
    epilogues.write(GPU, {"xsa_linear": verdict})
    assert auto() == tuple(verdict) and "a toy GPU, 2" in auto().reason
    assert auto("cpu") == choose_module.Choice("reference", "`xsa`, then torch's matmul")


def test_both_are_timed_as_they_run(monkeypatch) -> None:
    """The two steps with XSA's own kernel, which `auto` takes on a GPU."""
    seen: list = []
    steps = {"impl": "reference", "xsa_impl": "triton"}
    one = dataclasses.replace(XSA_LINEAR, steps=steps)
    epilogues.decide(one, CPU, GPU, taking(1.0, 1.0, seen))
    assert seen == [
        ("epilogue", ["xsa_linear_dgrad_tma"] * 2), ("steps", ["xsa_backward_kernel"] * 2)
    ]  # fmt: skip


def test_a_wrong_epilogue_is_not_taken_however_fast(monkeypatch, capsys) -> None:
    from pgolf.triton_kernels import xsa_linear

    right = xsa_linear.dgrad

    def wrong(*arguments):
        dy, dv = right(*arguments)
        return dy, -dv

    implementation = dataclasses.replace(
        OPERATORS["xsa_linear"].implementations["triton"], functions={"dgrad": wrong}
    )
    operator = dataclasses.replace(
        OPERATORS["xsa_linear"], implementations={"triton": implementation}
    )
    monkeypatch.setitem(OPERATORS, "xsa_linear", operator)
    verdict = epilogues.decide(XSA_LINEAR, CPU, GPU, taking(0.1, 1.0))
    assert verdict.impl == "reference"
    assert verdict.reason.startswith("triton is wrong on a toy GPU: gradient of v: ")


def test_other_gpus_and_operators_stay_in_the_table(table) -> None:
    other = {"another GPU": {"xsa_linear": ["triton", "it is"]}, GPU: {"later": ["triton", "so"]}}
    table.write_text(json.dumps(other))
    assert auto().impl == "reference"
    choose.cache_clear()
    epilogues.write(GPU, {"xsa_linear": epilogues.Verdict("triton", "faster")})
    found = json.loads(table.read_text())
    assert found["another GPU"] == other["another GPU"]
    assert found[GPU] == {"later": ["triton", "so"], "xsa_linear": ["triton", "faster"]}
    assert auto() == ("triton", "faster")


def test_what_is_asked_for_wins_and_what_cannot_run_is_passed_over(table, monkeypatch) -> None:
    epilogues.write(GPU, {"xsa_linear": epilogues.Verdict("triton", "faster")})
    assert choose("xsa_linear", "reference", "cuda", torch.bfloat16) == ("reference", "as asked")
    assert choose("xsa_linear", "auto", "cuda", torch.float64).impl == "reference"
    monkeypatch.setenv(choose_module.VARIABLE, "xsa_linear=reference")
    choose.cache_clear()
    assert auto().impl == "reference"


def test_a_dry_run_writes_nothing(table, monkeypatch) -> None:
    monkeypatch.setattr(epilogues, "gpu_timer", lambda device: taking(0.1, 1.0))
    monkeypatch.setattr(epilogues, "decide", lambda *_: epilogues.Verdict("triton", "faster"))
    assert epilogues.run([], CPU, dry_run=True) == 0 and not table.exists()
    assert epilogues.run(["xsa_linear"], CPU, dry_run=False) == 0
    assert json.loads(table.read_text()) == {GPU: {"xsa_linear": ["triton", "faster"]}}


def test_a_table_that_cannot_be_written_is_one_line(table, monkeypatch) -> None:
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pgolf.files.os.replace", full)
    with pytest.raises(StorageError, match="no space left"):
        epilogues.write(GPU, {"xsa_linear": epilogues.Verdict("triton", "faster")})
    assert not table.exists()


def test_the_command_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = []
    monkeypatch.setattr(epilogues, "run", lambda *of: asked.append(of) or 0)
    assert tune.main(["--epilogues", "--dry-run"]) == 0
    assert asked == [([], torch.device("cuda", 0), True)]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--epilogues"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main([])
    assert "name an operator, or --epilogues" in capsys.readouterr().err
    with pytest.raises(PgolfError, match="no epilogue of xsa; there are xsa_linear"):
        epilogues.run(["xsa"], CPU, True)


@pytest.mark.parametrize("option", [["--dtype", "fp32"], ["--sample", "8192"], ["--json", "x"]])
def test_options_that_would_do_nothing_are_refused(option: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--epilogues", *option])
    assert "no --dtype, --sample, --json" in capsys.readouterr().err
