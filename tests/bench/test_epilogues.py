"""`python -m bench tune --epilogues` with a timer of known times, and `auto` after it."""

import dataclasses
import importlib
import inspect
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
from pgolf.model.gpt import operator_sizes  # noqa: E402
from pgolf.ops import choose as choose_module  # noqa: E402
from pgolf.ops import launch, timed  # noqa: E402
from pgolf.ops.choose import choose  # noqa: E402
from pgolf.ops.factored import Factored  # noqa: E402
from pgolf.triton_kernels.launch import intercepted  # noqa: E402

from ..model.published import PUBLISHED  # noqa: E402
from ..triton.interpreter import repair  # noqa: E402

repair()
CPU, GPU = torch.device("cpu"), "a toy GPU"
XSA_LINEAR, LINEAR_RESIDUAL, LINEAR_MIX, LINEAR_QK_ROPE, NORM_MLP = epilogues.EPILOGUES
SMALL = {
    "xsa_linear": (((1, 3, 4, 64), (1, 3, 2, 64), (16, 256)), {}),
    "linear_residual": (((3, 16), (32, 16), (3, 32)), {"factored": True}),
    "linear_mix": (((3, 16), (32, 16), (3, 32)), {"factored": True}),
    "linear_qk_rope": (
        ((1, 3, 16), (384, 16), (3, 8), (3, 8), (2,)),
        {"heads": 2, "kv_heads": 2, "eps": 1e-6},
    ),
    "norm_mlp": (((3, 32), (24, 32), (32, 24)), {}),
}


def small(name: str) -> Sample:
    """In the place of the size that is timed."""
    shapes, options = SMALL[name]

    def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        g = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]
        if name == "linear_qk_rope":
            angles, _, gain = (t.float() for t in tensors[2:])
            tensors[2:] = angles.cos(), angles.sin(), gain
        return tuple(tensors), options

    return Sample("98304 tokens", build, bench=True)


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A table of its own, operators with one small size, and a machine that has the toy GPU."""
    for name in SMALL:
        operator = dataclasses.replace(OPERATORS[name], samples=lambda n=name: [small(n)])
        monkeypatch.setitem(OPERATORS, name, operator)
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


def auto(
    device: str = "cuda", epilogue: epilogues.Epilogue = XSA_LINEAR, **others: int
) -> tuple[str, str]:
    sizes = tuple((epilogue.sizes | others).items())
    return choose(epilogue.operator, "auto", device, torch.bfloat16, sizes=sizes)


def row(impl: str, reason: str) -> timed.Row:
    return timed.Row(impl, reason, XSA_LINEAR.sizes)


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
    assert auto() == verdict[:2] and "a toy GPU, 2" in auto().reason
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


def test_a_forward_pass_is_timed_as_a_model_takes_it(monkeypatch, capsys) -> None:
    """With h left as two factors, beside the matmul and the norm's kernel by `auto`."""
    seen: list = []
    multiplied: list = []
    monkeypatch.setattr(Factored, "product", lambda h: multiplied.append(h) or h.y)
    monkeypatch.setattr(epilogues, "_problem", lambda *_: "")
    verdict = epilogues.decide(LINEAR_RESIDUAL, CPU, GPU, taking(0.1, 0.2, seen))
    assert seen == [("epilogue", ["linear_residual_tma"] * 2), ("steps", [])] and not multiplied
    said = capsys.readouterr().out
    assert "linear_residual: forward 0.1 ms with the epilogue, 0.2 ms in two steps" in said
    assert "it breaks even at 258 TFLOP/s" in said
    epilogues.write(GPU, {"linear_residual": verdict})
    assert auto(epilogue=LINEAR_RESIDUAL).impl == "triton" and auto().impl == "reference"


def test_the_mlp_with_its_norm_is_timed_backward(capsys) -> None:
    seen: list = []
    verdict = epilogues.decide(NORM_MLP, CPU, GPU, taking(0.1, 0.2, seen))
    assert seen == [
        ("epilogue", ["leaky_relu2_dgrad_tma", "norm_mlp_dgrad_tma"] * 2), ("steps", [])
    ]  # fmt: skip
    assert "it breaks even at 378 TFLOP/s" in capsys.readouterr().out
    epilogues.write(GPU, {"norm_mlp": verdict})
    assert auto(epilogue=NORM_MLP).impl == "triton"
    assert auto(epilogue=NORM_MLP, hidden=1408).impl == "reference"


def test_the_projection_to_queries_and_keys_is_timed_forward(capsys) -> None:
    """Whatever it is by on a CPU; its verdict is for those heads alone."""
    seen: list = []
    verdict = epilogues.decide(LINEAR_QK_ROPE, CPU, GPU, taking(0.1, 0.2, seen))
    assert seen == [("epilogue", ["linear_qk_rope_tma"] * 2), ("steps", [])]
    assert "it breaks even at 319 TFLOP/s" in capsys.readouterr().out
    epilogues.write(GPU, {"linear_qk_rope": verdict})
    assert auto(epilogue=LINEAR_QK_ROPE).impl == "triton"
    assert auto(epilogue=LINEAR_QK_ROPE, pairs=32).impl == "reference"


@pytest.mark.parametrize("epilogue", epilogues.EPILOGUES, ids=lambda e: e.operator)
def test_sizes_are_those_of_the_sample(epilogue: epilogues.Epilogue, monkeypatch) -> None:
    """As the operator itself finds them: on others `auto` takes the reference, and says why."""
    monkeypatch.undo()
    operator = OPERATORS[epilogue.operator]
    sample = next(s for s in operator.samples() if s.label == epilogue.sample)
    args, named = sample.build(torch.device("meta"), torch.bfloat16)
    asked = {}

    def resolve(name: str, *_, **sizes: int) -> str:
        asked.setdefault(name, sizes)
        return "reference"

    # (The package's attribute of that name is the function.)
    module = importlib.import_module(inspect.unwrap(operator.call).__module__)
    monkeypatch.setattr(module, "resolve", resolve)
    operator.call(*args, **named, **epilogue.steps)
    assert asked[operator.name] == epilogue.sizes


def test_other_sizes_were_not_timed(table) -> None:
    epilogues.write(GPU, {"xsa_linear": row("triton", "faster")})
    assert auto().impl == "triton"
    for other in ({"size": 128}, {"share": 1}, {"heads": 4}, {"width": 768}):
        choice = auto(**other)
        assert choice.impl == "reference"
        assert choice.reason.startswith("this GPU has timed heads 8, share 2, size 64, width 512, ")
        (changed,) = (f"{name} {size}" for name, size in other.items())
        assert changed in choice.reason.partition(", not ")[2]
    unsized = choose("xsa_linear", "auto", "cuda", torch.bfloat16)
    assert unsized.impl == "triton" and unsized.reason.startswith("at heads 8, share 2, size 64, ")


def test_a_model_of_other_sizes_takes_the_reference(table) -> None:
    """By the sizes of its configuration, as a run asks for its operators."""
    epilogues.write(GPU, {e.operator: timed.Row("triton", "so", e.sizes) for e in (
        XSA_LINEAR, LINEAR_RESIDUAL)})  # fmt: skip
    bf16 = torch.bfloat16
    for changes, impl in (({}, "triton"), ({"dim": 768}, "reference"), ({"heads": 4}, None)):
        config = dataclasses.replace(PUBLISHED["pr1473"], **changes)
        found = choose_module.choose_all(
            "", "cuda", bf16, False, operator_sizes(config, bf16, bf16), list(SMALL)
        )
        assert found["linear_residual"].impl == (impl or "triton")
        assert found["xsa_linear"].impl == (impl or "reference")


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
    one, two = ({"impl": "triton", "reason": r, "sizes": {"width": 512}} for r in ("it is", "so"))
    other = {"another GPU": {"xsa_linear": one}, GPU: {"later": two}}
    table.write_text(json.dumps(other))
    assert auto().impl == "reference"
    choose.cache_clear()
    epilogues.write(GPU, {"xsa_linear": row("triton", "faster")})
    written = json.loads(table.read_text())
    assert written["another GPU"] == other["another GPU"]
    assert written[GPU] == {"later": two, "xsa_linear": row("triton", "faster")._asdict()}
    assert auto() == ("triton", "faster")


def test_what_is_asked_for_wins_and_what_cannot_run_is_passed_over(table, monkeypatch) -> None:
    epilogues.write(GPU, {"xsa_linear": row("triton", "faster")})
    assert choose("xsa_linear", "reference", "cuda", torch.bfloat16) == ("reference", "as asked")
    assert choose("xsa_linear", "auto", "cuda", torch.float64).impl == "reference"
    monkeypatch.setenv(choose_module.VARIABLE, "xsa_linear=reference")
    choose.cache_clear()
    assert auto().impl == "reference"


def test_a_dry_run_writes_nothing(table, monkeypatch) -> None:
    monkeypatch.setattr(epilogues, "gpu_timer", lambda device: taking(0.1, 1.0))
    monkeypatch.setattr(epilogues, "decide", lambda *_: row("triton", "faster"))
    assert epilogues.run([], CPU, dry_run=True) == 0 and not table.exists()
    assert epilogues.run(["xsa_linear"], CPU, dry_run=False) == 0
    assert json.loads(table.read_text()) == {GPU: {"xsa_linear": row("triton", "faster")._asdict()}}


def test_a_table_that_cannot_be_written_is_one_line(table, monkeypatch) -> None:
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pgolf.files.os.replace", full)
    with pytest.raises(StorageError, match="no space left"):
        epilogues.write(GPU, {"xsa_linear": row("triton", "faster")})
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
    with pytest.raises(PgolfError, match="no epilogue of xsa; there are xsa_linear, linear_r"):
        epilogues.run(["xsa"], CPU, True)


@pytest.mark.parametrize("option", [["--dtype", "fp32"], ["--sample", "8192"], ["--json", "x"]])
def test_options_that_would_do_nothing_are_refused(option: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--epilogues", *option])
    assert "no --dtype, --sample, --json" in capsys.readouterr().err
