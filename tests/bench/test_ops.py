"""`python -m bench ops` on a toy operator: what is timed, what is refused, what is written."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, ops, peers, plot, providers, restart, schema, timing
from pgolf.ops.operator import OPERATORS, Implementation, Operator, Sample, Work
from pgolf.report import plots

CPU = torch.device("cpu")


def cube(x: Tensor, factor: float = 1.0) -> Tensor:
    return factor * x @ (x.T @ x)


def toy(kernel: Callable[..., Tensor] = cube, rows: tuple[int, ...] = (8, 16)) -> Operator:
    """An operator whose C++ kernel is any function."""

    def build(columns: int) -> Callable:
        def arguments(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(columns)
            return (torch.randn(columns, 33, generator=g).to(device, dtype),), {"factor": 0.5}

        return arguments

    def cost(x: Tensor, factor: float) -> tuple[Work, Work]:
        size = x.numel() * x.element_size()
        return Work(0, size, size), Work(6 * x.numel() * x.size(1), 2 * size, size)

    return Operator(
        name="toy",
        call=lambda x, factor, impl: kernel(x, factor),
        reference=cube,
        implementations={
            "cpu": Implementation("cpu", (torch.float32,), {}, lambda: ""),
            "triton": Implementation("cuda", (torch.float32,), {}, lambda: "no GPU at all"),
        },
        preferred={},
        samples=lambda: [Sample(f"{n} rows", build(n), bench=True) for n in rows]
        + [Sample("a small one", build(2))],
        cost=cost,
        differentiable=("x",),
    )


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a toy into the registry, and leave the process's malloc alone."""
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: True)
    return lambda *args, **kwargs: monkeypatch.setitem(OPERATORS, "toy", toy(*args, **kwargs))


def run(*arguments: str) -> int:
    return ops.main(["--op", "toy", "--device", "cpu", "--rounds", "3", *arguments])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


# --- correctness (of results, see tests/ops/test_testing.py) --------------------------------------


def test_a_wrong_provider_is_not_timed(register, tmp_path, capsys) -> None:
    register(lambda x, factor: cube(x, factor) * 1.001)
    assert run("--providers", "eager", "cpu", "--json", str(tmp_path / "f")) == 1
    assert "cpu        WRONG, not timed: output" in capsys.readouterr().out
    assert {line["provider"] for line in lines_of(tmp_path / "f")} == {"eager"}


def test_a_provider_with_a_wrong_gradient_is_not_timed(register, capsys) -> None:
    register(lambda x, factor: cube(x.detach(), factor) + (x - x.detach()))
    assert run("--providers", "eager", "cpu") == 1
    assert "cpu        WRONG, not timed: gradient of x" in capsys.readouterr().out


def test_a_provider_that_fails_does_not_end_the_run(register, capsys) -> None:
    def broken(x: Tensor, factor: float) -> Tensor:
        raise MemoryError("no room\nat all")

    register(broken)
    assert run("--providers", "eager", "cpu", "--mode", "forward") == 1
    out = capsys.readouterr().out
    assert "WRONG, not timed: MemoryError: no room\n" in out
    assert out.count("    eager") == 2  # both sizes


def test_where_the_gpu_is_unusable_a_new_process_continues(
    register, monkeypatch, tmp_path, capsys
) -> None:
    """Without the provider that has done it, and with what was measured before."""

    class Replaced(BaseException):
        pass

    def broken(x: Tensor, factor: float) -> Tensor:
        if x.size(0) == 16:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return cube(x, factor)

    def replaced(program: str, argv: list[str]) -> None:
        command[:] = argv
        raise Replaced

    command: list[str] = []
    register(broken, rows=(8, 16, 24))
    monkeypatch.setattr(restart, "unusable", lambda device: True)
    monkeypatch.setattr(restart.os, "execv", replaced)
    options = ["--providers", "eager", "cpu", "--mode", "forward"]
    with pytest.raises(Replaced):
        run(*options, "--json", str(tmp_path / "f"))
    assert command[1:4] == ["-m", "bench", "ops"]
    assert command[-2:] == ["--failed", "toy 16 rows fp32 cpu"]
    capsys.readouterr()
    assert ops.main(command[4:]) == 1 and "toy, 8 rows" not in capsys.readouterr().out
    assert [(line["sample"], line["provider"]) for line in lines_of(tmp_path / "f")] == [
        ("8 rows", "eager"), ("8 rows", "cpu"), ("16 rows", "eager"), ("24 rows", "eager"),
        ("24 rows", "cpu"),
    ]  # fmt: skip


def test_a_case_that_fails_does_not_end_the_run(register, monkeypatch, tmp_path, capsys) -> None:
    def timed(case: cases.Case, *others: Any) -> list[schema.Timing]:
        if case.sample.label == "8 rows":
            raise MemoryError("no room")
        return original(case, *others)

    register()
    original = ops._timed
    monkeypatch.setattr(ops, "_timed", timed)
    arguments = ["--providers", "eager", "--mode", "forward", "--json", str(tmp_path / "f")]
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert "  FAILED: toy 8 rows fp32; why stands above\n" in captured.out
    assert "MemoryError: no room" in captured.err
    assert [line["sample"] for line in lines_of(tmp_path / "f")] == ["16 rows"]


@pytest.mark.parametrize("operator", list(OPERATORS.values()), ids=list(OPERATORS))
def test_real_operators_fit_the_frame(operator: Operator) -> None:
    """Arguments, leaves and the check, on the first small sample; C++ where it is built."""
    case = cases.build(operator, operator.samples()[0], CPU, "fp32")
    given = inspect.signature(operator.reference).bind(*case.args, **case.kwargs).arguments
    assert len(case.leaves) == sum(given.get(n) is not None for n in operator.differentiable)
    if "cpu" in operator.implementations and not operator.implementations["cpu"].missing():
        assert case.call.problem(providers.find("cpu", case)) == ""


def test_each_mode_runs_what_it_says() -> None:
    ran: list[str] = []

    def kernel(x: Tensor, factor: float) -> Tensor:
        ran.append("forward")
        x = x.clone()
        x.register_hook(lambda grad: ran.append("backward"))
        return cube(x, factor)

    case = cases.build(toy(), toy().samples()[0], CPU, "fp32")
    _, gradient = case.call.run(cube)
    expected = {
        "forward": ([], ["forward"]),
        "backward": (["forward"], ["backward"]),
        "both": ([], ["forward", "backward"]),
    }
    for mode, (off_the_clock, on_the_clock) in expected.items():
        assert case.has(mode)
        ran.clear()
        run, prepare = case.entry(kernel, mode)
        state = prepare()
        assert ran == off_the_clock
        ran.clear()
        result = run(state)
        assert ran == on_the_clock
        if mode != "forward":
            torch.testing.assert_close(result[0], gradient)


# --- the command ----------------------------------------------------------------------------------


def test_lines_tables_and_plot(register, tmp_path, capsys) -> None:
    register()
    file, picture = tmp_path / "f.jsonl", tmp_path / "toy.png"
    threads = torch.get_num_threads()
    try:
        arguments = ["--providers", "eager", "compiled", "cpu", "triton", "--sample", "8 rows"]
        assert run(*arguments, "--threads", "1", "--json", str(file), "--plot", str(picture)) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "toy, 8 rows, fp32" in out and "16 rows" not in out and "a small one" not in out
    assert "triton     not here: runs on cuda, not on cpu" in out
    lines = lines_of(file)
    assert [(line["mode"], line["provider"]) for line in lines] == [
        (mode, provider)
        for mode in ("forward", "backward", "both")
        for provider in ("eager", "compiled", "cpu")
    ]
    names = [f.name for f in dataclasses.fields(schema.Timing)]
    size = 8 * 33 * 4
    for line in lines:
        assert list(line) == names
        schema.Timing(**line)
        assert line["operator"] == "toy" and line["sample"] == "8 rows" and line["dtype"] == "fp32"
        assert line["shapes"] == [[8, 33]] and line["threads"] == 1 and line["rounds"] == 3
        assert 0 < line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["bytes"] == line["copy_bytes"]
        assert line["bytes"] == {"forward": 2, "backward": 3, "both": 5}[line["mode"]] * size
        assert (line["matmul_gflops"] is None) == (line["mode"] == "forward") == (not line["flops"])
        assert bool(line["matmul_shapes"]) == bool(line["flops"]) and line["host_ms"] is None
        assert line["floor_ms"] == pytest.approx(
            max(
                line["bytes"] / line["copy_gbs"] / 1e6,
                line["flops"] / line["matmul_gflops"] / 1e6 if line["flops"] else 0.0,
            )
        )
        assert line["percent_of_floor"] == pytest.approx(100 * line["floor_ms"] / line["median_ms"])
        assert line["torch"] == torch.__version__ and line["command"].startswith("python -m bench")
        assert line["cold"] is False and line["malloc"] == "kept"
    shown = [text.split() for text in out.splitlines() if text.startswith("    cpu")]
    compiled = {line["mode"]: line for line in lines if line["provider"] == "compiled"}
    for line, cells in zip([x for x in lines if x["provider"] == "cpu"], shown, strict=True):
        assert float(cells[1]) == pytest.approx(line["median_ms"], rel=1e-3)
        ratio = line["median_ms"] / compiled[line["mode"]]["median_ms"]
        assert float(cells[4]) == pytest.approx(ratio, abs=0.006)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.stat().st_size > 5000
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_cold_flushes_before_each_call(register, monkeypatch, tmp_path) -> None:
    register(rows=(8,))
    flushed: list[int] = []
    monkeypatch.setattr(timing, "flusher", lambda device: lambda: flushed.append(1))
    arguments = ["--providers", "eager", "--mode", "forward", "--json", str(tmp_path / "f")]
    assert run(*arguments) == 0 and not flushed
    assert run(*arguments, "--cold") == 0
    assert len(flushed) == (timing.WARM_UP + 3) * 2  # the provider and the copy
    assert [line["cold"] for line in lines_of(tmp_path / "f")] == [True]


def test_large_samples_are_left_out_on_a_cpu(register, capsys) -> None:
    register(rows=(8, 10_000_000))  # the second would take 1.3 GB
    assert run("--providers", "eager", "--mode", "forward") == 0
    out = capsys.readouterr().out
    assert "toy 10000000 rows fp32 left out: 6.6 GB of traffic; --all measures it" in out
    assert "toy, 8 rows, fp32" in out and "toy, 10000000 rows" not in out


def test_a_table_that_takes_too_long_says_so(register, capsys) -> None:
    register(rows=(8,))
    assert run("--providers", "eager", "--mode", "forward", "--seconds", "0") == 0
    assert "forward: left out: 3 rounds take more than --seconds 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "toys"], "no operator is named 'toys'; there are "),
        (["--providers", "tpu"], "no provider is named 'tpu'; there are eager, compiled, cpu"),
        (["--plot", "1.png", "--op", "xsa", "toy"], "--plot 1.png is one file for 2 operators"),
        (["--sample", "nothing like it"], "no sample is left"),
        (["--json", "ops.py/x", "--op", "toy", "--providers", "eager"], "ops.py/x: File exists"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(
    arguments, message, register, capsys, tmp_path, monkeypatch
) -> None:
    register(rows=(8,))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ops.py").write_text("")
    assert ops.main(arguments) == 2
    err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("timing:")]
    assert len(err) == 1 and message in err[0] and err[0].startswith("python -m bench ops: ")


def test_rounds_and_threads_are_at_least_one(capsys) -> None:
    for arguments in (["--rounds", "0"], ["--threads", "-1"]):
        with pytest.raises(SystemExit) as stop:
            ops.main(arguments)
        assert stop.value.code == 2 and "is not 1 or more" in capsys.readouterr().err


def test_a_plot_can_be_read(tmp_path: Path, monkeypatch) -> None:
    """Labelled ticks, though the times are within a decade, and a value at each point."""
    drawn = []
    monkeypatch.setattr(plot, "new", lambda *size: drawn.append(plots.new(*size)) or drawn[0])
    common = {f.name: None for f in dataclasses.fields(schema.Timing)}
    common |= {"operator": "toy", "sample": "8 rows", "dtype": "fp32", "mode": "both",
               "device": "a CPU", "threads": 1, "floor_ms": 4.0}
    for low, high, ticks in ((4.5, 8.25, 3), (0.013, 2.5, 6)):
        drawn.clear()
        plot.draw([
            schema.Timing(**common | {"provider": provider, "median_ms": ms, "p20_ms": ms * 0.9,
                                      "p80_ms": ms * 1.1})
            for provider, ms in (("eager", high), ("cpu", low))], tmp_path / "toy.png")
        panel, = drawn[0].axes
        bottom, top = panel.get_ylim()
        labels = [t.get_text() for t in panel.get_yticklabels()
                 if bottom <= t.get_position()[1] <= top]
        assert len(labels) >= ticks and all(float(text) for text in labels)
        assert {f"{low:.3g}", f"{high:.3g}"} <= {t.get_text() for t in panel.texts}
        assert [t.get_text() for t in panel.get_legend().texts] == ["floor", "eager", "cpu"]


def test_plots_go_into_a_folder_or_a_file(tmp_path: Path) -> None:
    assert plot.files(None, ["a"]) == {}
    assert plot.files(tmp_path, ["a", "b"]) == {"a": tmp_path / "a.png", "b": tmp_path / "b.png"}
    assert plot.files(tmp_path / "x.png", ["a"]) == {"a": tmp_path / "x.png"}


# --- peers ----------------------------------------------------------------------------------------


def test_peers_are_named_with_what_installs_them(monkeypatch) -> None:
    assert providers.expand(["peers"]) == [peer.name for peer in peers.PEERS]
    assert providers.expand([]) == providers.known()
    assert providers.expand(["cpu", "eager"]) == ["eager", "cpu"]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    extra = next(line for line in project.splitlines() if line.startswith("peers ="))
    for peer in peers.PEERS:
        assert peer.missing() == f"not installed: pip install {peer.package}"
        assert peer.package == "torch" or f'"{peer.package}"' in extra
        assert peer.operator in OPERATORS
        assert peers.samples(OPERATORS[peer.operator]) == []


def test_a_peer_is_compared_only_on_its_own_function(monkeypatch) -> None:
    liger = next(peer for peer in peers.PEERS if peer.name == "liger")
    operator = OPERATORS["leaky_relu2_mlp"]
    plain = next(s for s in operator.samples() if s.label == "2x7 24-40")
    case = cases.build(operator, plain, CPU, "fp32")
    monkeypatch.setattr(peers.Peer, "missing", lambda self: "")
    with pytest.raises(providers.Unavailable, match="only relu"):
        providers.find("liger", case)
    derived = peers._derived(plain, *liger.variant)
    assert derived.label == "2x7 24-40 relu2" and derived.bench
    args, kwargs = derived.build(CPU, torch.float32)
    assert args[3] == 0.0 and liger.unfit(*args, **kwargs) == ""
    samples = peers.samples(operator)
    assert [s.label for s in samples] == ["4096 512-1536 relu2", "98304 512-1536 relu2"]
    bank = dict(coefficients=((1.0, 1.0, 1.0),), dtype=torch.bfloat16)
    assert peers._newton_schulz_unfit(None, **bank) == ""
    assert peers._newton_schulz_unfit(None, **bank, row_norm=True)
    assert peers._newton_schulz_unfit(None, **{**bank, "dtype": torch.float32})
