"""The counting device against counts known by hand, its errors, and the committed table."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import count
from bench.counting import build, extension, launches
from bench.counting.worker import Request, run
from pgolf.data.loader import CARRIED
from pgolf.extension import CUDA_VARIABLE
from pgolf.ops.multi_tensor import PR1473_MATRICES

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(count.__file__).parent / "results" / "count-pr1473.json"

PHASES = ("forward", "backward", "optimizer")

needs_device = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "there is one")

# N sequences of T tokens, L layers of width D with H query and G value heads, MLP width F.
N, T, L, D, H, G, F, V = 2, 128, 2, 64, 4, 2, 192, 256
KV = D // H * G
TINY = Request(
    overrides={
        "layers": L, "dim": D, "heads": H, "kv_heads": G, "mlp_hidden": F, "vocab_size": V,
        "rope_dims": 8, "bigram_buckets": 0, "ve_layers": "none", "small_numel": 0,
    },
    sequences=N, tokens=T, qat=True, compiled=False,
)  # fmt: skip
TOKENS, BF16, FP32 = N * T, 2, 4


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("counting")
    return build.environment(build.build(), scratch)


@pytest.fixture(scope="module")
def reference(environment):
    return run(TINY, environment)


@pytest.fixture(scope="module")
def counted(environment, tmp_path_factory):
    """As `run` counts, but in a fork of one process: imports are most of the time of each."""
    server = Path(__file__).with_name("counting_server.py")
    file = tmp_path_factory.mktemp("counted") / "answer.json"
    with subprocess.Popen(
        [sys.executable, str(server)], env={**environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip

        def call(request):
            process.stdin.write(json.dumps({"asked": asdict(request), "file": str(file)}) + "\n")
            assert process.stdout.readline() == "0\n", "what the fork said is on stderr"
            return json.loads(file.read_text())

        yield call


@pytest.fixture(scope="module")
def ours(counted):
    steps = ("xsa_linear", "linear_residual", "linear_mix", "linear_qk_rope", "norm_mlp")
    return counted(replace(TINY, ops=",".join(["triton", *(f"{n}=reference" for n in steps)])))


@needs_device
def test_products_of_a_tiny_model(reference):
    assert reference["device"] == "pgolf counting device (H100)"
    part = reference["phases"]["forward"]
    assert part["gemms"] == {
        f"TN {D + 2 * KV}x{TOKENS}x{D}": L,  # q, k, v
        f"TN {D}x{TOKENS}x{D}": L,  # out
        f"TN {F}x{TOKENS}x{D}": L,
        f"TN {D}x{TOKENS}x{F}": L,
        f"TN {V}x{TOKENS}x{D}": 1,
    }
    sides = [(D + 2 * KV, D), (D, D), (F, D), (D, F)]
    moved = L * sum(TOKENS * (a + b) + a * b for a, b in sides) + TOKENS * (V + D) + V * D
    assert part["bytes"]["gemm"] == BF16 * moved
    assert part["launches"]["gemm"] == 4 * L + 1
    backward = reference["phases"]["backward"]["launches"]
    assert backward["gemm"] == 2 * (4 * L + 1)  # of the input and of the weight


@needs_device
def test_attention_is_one_call_a_layer(reference):
    q, kv, lse = TOKENS * D * BF16, TOKENS * KV * BF16, TOKENS * H * FP32
    for phase, moved in (
        ("forward", q + 2 * kv + q + lse),
        ("backward", 2 * q + 2 * kv + q + lse + q + 2 * kv),
    ):
        part = reference["phases"][phase]
        assert part["launches"]["attention"] == L
        assert part["bytes"]["attention"] == L * moved


@needs_device
def test_a_turn_of_the_loop(counted):
    """No wait but for an earlier step, no new memory, one copy of 16 bits a token and of rates."""
    asked = replace(TINY, turn=True, world=8, qat=False, ops="triton")
    turn = counted(asked)["phases"]["turn"]
    assert turn["waits"] == {} and turn["waits_for_an_earlier_step"] == 1
    assert turn["allocations"] == turn["pinned_allocations"] == 0
    assert turn["copies_to_device"] == turn["copies_to_host"] == 1
    assert turn["bytes_to_device"] == 2 * (TOKENS + asked.sequences) + FP32 * CARRIED
    once = dict.fromkeys(("reduce_scatter", "all_reduce", "all_gather"), 1)
    assert turn["control"] == 1 and turn["collectives"] == once
    assert turn["launches_forward"] > 4 * L and turn["launches_backward"] > 8 * L
    assert all(milliseconds > 0 for milliseconds in turn["host_ms"].values())
    named = turn["kernels_rest"]
    assert sum(named.values()) == turn["launches_rest"] and not any("_ZN" in name for name in named)


@needs_device
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_turn_of_graphs(environment, compiled):
    """Three launches of the host for all; what they start is what the eager step does."""
    if missing := extension.missing():
        pytest.skip(missing)
    asked = replace(TINY, turn=True, world=8, qat=False, ops="auto", graphs=True, compiled=compiled)
    kernels = {CUDA_VARIABLE: str(extension.build())}
    turn, eager = (
        run(request, {**environment, **kernels})["phases"]["turn"]
        for request in (asked, replace(asked, graphs=False))
    )
    assert turn["graphs"] == 3 and turn["addresses_compared"] > 300
    of_eager = sum(eager[f"launches_{part}"] for part in ("forward", "backward", "rest"))
    copies = 2  # of the tokens and of the rates, to where graphs find them
    assert turn["launches_rest"] == of_eager + copies
    assert turn["launches_forward"] == turn["launches_backward"] == 0
    others = ("waits", "allocations", "pinned_allocations", "copies_to_device", "copies_to_host",
              "collectives", "collective_bytes", "control")  # fmt: skip
    assert {k: turn[k] for k in others} == {k: eager[k] for k in others}


@needs_device
def test_the_reference_has_no_kernel_of_ours(reference):
    for part in reference["phases"].values():
        assert part["launches"]["ours"] == part["launches"]["inductor"] == 0
        assert part["kernels"] == {}
        assert part["launches"]["total"] == sum(part["launches"][k] for k in launches.KINDS)


@needs_device
def test_launches_inside_our_operators(reference, ours):
    """Bytes as on paper: inputs and outputs of each launch, once."""
    y, v = TOKENS * D * BF16, TOKENS * KV * BF16
    hidden, bits, weights = TOKENS * F * BF16, TOKENS * F // 8, F * D * BF16
    operators = {k: v for p in ours["phases"].values() for k, v in p["operators"].items()}
    assert operators["pgolf::xsa"] == {"calls": L, "launches": L, "bytes": L * (2 * y + v)}
    assert operators["pgolf::xsa_backward"] == {
        "calls": L, "launches": L, "bytes": L * (3 * y + 2 * v),
    }  # fmt: skip
    sides = [(D, D)] * 2 + [(KV, D)] * 2 + [(F, D), (D, F)]
    # A weight in fp32 and out in bf16; clip factors; one switch a launch; the bits of attention and
    # those of the MLP. They are published after the update, and no pass has any of it.
    quantised = 2 * FP32 + L * (
        FP32 + sum((FP32 + BF16) * rows * columns + FP32 * rows for rows, columns in sides)
    )
    assert operators["pgolf::fake_quant"] == {"calls": 1, "launches": L, "bytes": quantised}
    forward = ours["phases"]["forward"]
    assert forward["launches"]["ours"] == 2 * L
    up = L * (y + weights + hidden + bits)
    assert forward["bytes"]["ours"] == L * (2 * y + v) + up
    # The up-projection left cuBLAS, and so did the gradient of the down-projection's input.
    for phase, operations in (("forward", "TN"), ("backward", "NN")):
        shape = f"{operations} {F}x{TOKENS}x{D}"
        assert shape in reference["phases"][phase]["gemms"]
        assert shape not in ours["phases"][phase]["gemms"]
    for phase in PHASES[:2]:
        assert (
            ours["phases"][phase]["launches"]["total"]
            < reference["phases"][phase]["launches"]["total"]
        )
    assert count.total_of(ours, "bytes") < count.total_of(reference, "bytes")


@needs_device
def test_a_decoded_token_of_a_tiny_model(counted):
    """Products, attention, and the bytes of weights and caches, as on paper."""
    result = counted(replace(TINY, qat=False, decode=True))
    step = result["phases"]["step"]
    assert step["gemms"] == {
        f"TN {D + 2 * KV}x{N}x{D}": L,  # q, k, v
        f"TN {D}x{N}x{D}": L,  # out
        f"TN {F}x{N}x{D}": L,
        f"TN {D}x{N}x{F}": L,
        f"TN {V}x{N}x{D}": 1,
    }
    caches = 2 * L * TOKENS * KV * BF16
    mask, row = T * BF16, N * D * BF16
    assert step["launches"]["attention"] == L
    assert step["bytes"]["attention"] == caches + L * (2 * row + mask)
    matrices = L * ((D + 2 * KV) * D + D * D + 2 * F * D) + V * D
    vectors = D + L * (H + 2 * D + 2 * D) + L // 2 * D  # gate; gains, scales, mix; skips
    assert step["least_bytes"] == {"weights": BF16 * matrices + FP32 * vectors, "caches": caches}
    pick = result["phases"]["pick"]["launches"]
    assert pick["total"] == pick["aten"] <= 8
    assert step["launches"]["memcpy"] <= 1, "nothing goes to the host"


@needs_device
def test_a_process_that_fails_says_so(environment):
    with pytest.raises(launches.CountingError, match="no operator 'xsb'"):
        run(replace(TINY, ops="xsb=triton"), environment)


@needs_device
def test_another_device_is_refused():
    from bench.counting.client import Device

    with pytest.raises(RuntimeError, match="not started with the counting device"):
        Device(Path("unused"))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-cc")
    assert "needs a C compiler" in build.missing()
    assert "CC=no-such-cc" in build.missing()
    assert count.main([]) == 2


def test_without_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "_compiler", lambda: "cc")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "cublas_api.h, cublasLt.h are in none of" in build.missing()
    assert "set CUDA_HOME" in build.missing()


@pytest.mark.parametrize("version, built", [(None, "no CUDA"), ("12.8", "CUDA 12.8")])
def test_with_another_torch(monkeypatch, version, built):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(build, "_compiler", lambda: "cc")
    assert f"is built for {built}: install a CUDA 13 build" in build.missing()


@needs_device
def test_a_device_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-include", "no-such-header.h"))
    with pytest.raises(build.Unavailable, match="does not compile:\n.*no-such-header"):
        build.build(tmp_path)
    assert not list(tmp_path.glob("counting-*"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--micro", "48"], "--micro 48: it is sequences x tokens"),
        (["--micro", "0x16"], "--micro 0x16: it is sequences x tokens"),
        (["nothing"], "unknown recipe 'nothing'"),
        (["pr1473", "layerz=3"], "layerz"),
        (["--ops", "auto+graphs"], "--ops auto+graphs: graphs are of the training loop"),
        (["--ops", "attention=fa4"], "--ops attention=fa4: attention counts as one call a pass"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    assert count.main(argv) == 2
    assert message in capsys.readouterr().err


KERNEL = {"kind": "kernel", "api": "runtime", "name": "some_kernel"}
CALL = {"kind": "aten_call", "name": "add", "bytes": 12, "kernels": 1}
OURS = {"kind": "kernel", "api": "driver", "name": "xsa_forward_kernel"}
LAUNCH = {"kind": "launch", "name": "xsa_forward_kernel", "bytes": 24}


def test_every_launch_has_bytes():
    part = launches.summarise([KERNEL, CALL, OURS, LAUNCH], 100, 7)
    assert part["launches"]["total"] == 2
    assert part["bytes"]["total"] == 136
    for events in ([KERNEL, CALL, KERNEL], [OURS], [LAUNCH], [OURS, {**LAUNCH, "name": "other"}]):
        with pytest.raises(launches.CountingError):
            launches.summarise(events, 0, 0)


def test_copies_on_the_device_read_and_write():
    events = [{"kind": f"memcpy_{where}", "bytes": 10} for where in ("on_device", "to_host")]
    assert launches.summarise(events, 0, 0)["bytes"]["memcpy"] == 30


def test_table_keeps_other_versions(tmp_path):
    part = launches.summarise([KERNEL, CALL], 0, 1)
    phases = dict.fromkeys(PHASES, part)
    result = {"device": "d", "versions": {"torch": "1"}, "phases": phases}
    path = tmp_path / "counts.json"
    count.write(path, {"reference": result}, TINY, "command")
    newer = {**result, "versions": {"torch": "2"}}
    count.write(path, {"reference": newer}, replace(TINY, ops="triton"), "command")
    table = json.loads(path.read_text())
    assert list(table["versions"]) == ["torch 1", "torch 2"]
    with pytest.raises(count.ConfigError, match="holds counts of"):
        count.write(path, {"reference": newer}, replace(TINY, tokens=64), "command")


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text", ["reference", "auto+qat", "xsa=cuda+eager", "auto+graphs", "auto+graphs+qat+eager"]
)
def test_settings_have_one_name(text):
    request = count.setting(replace(TINY, turn=True), text)
    assert count.name_of(request) == text
    assert request.graphs == ("+graphs" in text)
    assert (request.qat, request.compiled) == ("+qat" in text, "+eager" not in text)


def test_committed_table_of_a_decoded_token():
    table = json.loads((TABLE.parent / "count-decode-pr1473.json").read_text(encoding="utf-8"))
    counted = Request(**table["counted"])
    assert (counted.recipe, counted.sequences, counted.tokens, counted.decode) == (
        "pr1473", 64, 2048, True,
    )  # fmt: skip
    for settings in table["versions"].values():
        launches = {name: s["step"]["launches"]["total"] for name, s in settings.items()}
        assert launches["auto+eager"] < launches["reference+eager"] / 3
        assert max(launches["auto"], launches["reference"]) < launches["auto+eager"]
        for s in settings.values():
            # 11 layers, 4 key/value heads of 64, in bf16
            assert s["step"]["least_bytes"]["caches"] == 2 * 11 * 64 * 2048 * 4 * 64 * 2
            assert s["step"]["launches"]["attention"] == 11


def totals(setting, what):
    return sum(setting[phase][what]["total"] for phase in PHASES)


def test_committed_table_shows_less_work_with_ours(table):
    assert table["counted"]["recipe"] == "pr1473"
    assert (table["counted"]["sequences"], table["counted"]["tokens"]) == (48, 2048)
    for settings in table["versions"].values():
        before = totals(settings["reference+qat"], "launches")
        assert totals(settings["reference,fake_quant=triton+qat"], "launches") < before
        for name in ("triton", "auto"):
            for what in ("launches", "bytes"):
                assert totals(settings[name], what) < totals(settings["reference"], what), name
        for what in ("launches", "bytes"):
            ours = settings["triton"]["optimizer"][what]["total"]
            assert ours < settings["reference"]["optimizer"][what]["total"]


def test_committed_table_shows_a_short_optimiser_step(table):
    for settings in table["versions"].values():
        step = settings["auto"]["optimizer"]
        products = step["kernels"]["newton_schulz_product"]
        assert products == 15
        assert step["launches"]["total"] - products <= 7
        # Of an element a gradient (4 bytes at most), the momentum twice and a direction.
        elements = sum(rows * columns for rows, columns in PR1473_MATRICES)
        assert step["operators"]["pgolf::muon_momentum"]["bytes"] <= 14.01 * elements


@needs_device
@pytest.mark.slow
def test_committed_table_is_what_is_counted(table):
    """With the versions of the table to the last byte; with others only that ours is less."""
    base = Request(**table["counted"])
    ours = ("triton", *([] if extension.missing() else ["auto"]))
    names = ("reference", *ours)
    results = count.count(count.setting(base, name) for name in names)
    version = count.version_of(results["reference"])
    if version in table["versions"]:
        for name, result in results.items():
            known = table["versions"][version][name]
            for phase in PHASES:
                assert result["phases"][phase] == known[phase], (name, phase)
    for name in ours:
        for what in ("launches", "bytes"):
            assert count.total_of(results[name], what) < count.total_of(results["reference"], what)
