"""The ahead-of-time gate: on the kernels as they are, and on figures that are made wrong here."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, aot_cuda
from bench.aot_checks import REQUIRED, crowded, differences, failures, unreached
from bench.sass import Function, count
from pgolf.cli.doctor import TESTED
from pgolf.errors import PgolfError

ROOT = Path(__file__).resolve().parents[2]
CONTEST_TRITON = "3.5.1"  # what the contest's machines have, with torch 2.9.1


def no_nvcc() -> str:
    try:
        aot_cuda.nvcc()
    except PgolfError as e:
        return str(e)
    return ""


needs_nvcc = pytest.mark.skipif(bool(no_nvcc()), reason=no_nvcc() or "there is one")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_gate(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", "aot", *arguments],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True,
    )  # fmt: skip


@needs_triton
@pytest.mark.slow
@pytest.mark.proves("triton_kernels", "bench/aot.py", "bench/results/aot.json")
def test_every_triton_kernel_passes_the_gate() -> None:
    result = run_gate("--compiler", "triton")
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads((ROOT / "triton_kernels" / "configs.json").read_text())
    assert set(re.findall(r"^(\w+): (?:bf16|fp32) ", result.stdout, re.M)) == set(kernels)


@needs_triton
@pytest.mark.slow
def test_a_triton_kernel_passes_the_gate(tmp_path: Path) -> None:
    """Though it is interpreted in this process."""
    table = tmp_path / "aot.json"
    one = ("--kernel", "leaky_relu2_up_tma", "--table", str(table), "--update")
    result = run_gate(*one, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    ((versions, rows),) = json.loads(table.read_text()).items()
    assert rows["leaky_relu2_up_tma: bf16"].items() >= {"HGMMA": 4, "spills": 0}.items()
    recorded = json.loads(aot.TABLE.read_text()).get(versions, rows)
    assert list(differences(rows, {name: recorded[name] for name in rows})) == []


UP = {
    "registers": 173, "shared": 217112, "spills": 0, "HGMMA": 4, "UTMALDG": 6, "UTMASTG": 1,
}  # fmt: skip


@needs_triton
def test_a_changed_table_fails_the_gate_until_it_is_updated(tmp_path, monkeypatch, capsys) -> None:
    table = tmp_path / "aot.json"
    rows = {"up: bf16": UP, "up: bf16 #2": UP, "other<1>: a.cu": UP}
    kept: list[str] = []
    monkeypatch.setattr(
        aot, "_compiled",
        lambda only, _: [("v 1", {n: r for n, r in rows.items() if aot._is_of(n, only)}, [*kept])],
    )  # fmt: skip
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def gate(*arguments: str) -> tuple[int, str]:
        return aot.main(["--table", str(table), *arguments]), capsys.readouterr().out

    code, output = gate()
    assert code == 0 and "3 compiled, 0 failures; v 1 not in aot.json: only the fixed" in output
    assert not table.exists()
    assert gate("--update")[1].endswith("v 1 written to aot.json\n")
    written = table.read_text()
    assert json.loads(written) == {"v 1": rows} and len(written.splitlines()) == len(rows) + 4
    assert gate()[1].endswith("v 1 compared with aot.json\n")

    rows["up: bf16"] = UP | {"registers": 175}
    code, output = gate()
    assert code == 1 and "FAILED up: bf16: registers was 173, is 175\n" in output
    assert gate("--kernel", "other")[0] == 0
    del rows["up: bf16 #2"], rows["other<1>: a.cu"]
    assert gate("--kernel", "up", "--update")[0] == 0
    assert json.loads(table.read_text()) == {"v 1": rows | {"other<1>: a.cu": UP}}
    kept.append("up: bf16: spills: 5 local loads and stores")
    before = table.read_text()
    assert gate("--update")[0] == 1 and table.read_text() == before


@needs_triton
@needs_nvcc
@pytest.mark.slow
def test_a_cuda_kernel_passes_the_gate(tmp_path: Path) -> None:
    table = tmp_path / "aot.json"
    result = run_gate("--kernel", "grad_norm_chunks", "--table", str(table), "--update")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(table.read_text())[aot_cuda.versions()]
    names = [f"grad_norm_chunks: grad_norm.cu {arch}" for arch in ("sm_80", "sm_90a")]
    assert list(rows) == names
    for row in rows.values():
        assert 16 <= row["registers"] <= 64 and row["shared"] == 96 and row["LDG.128"]


@needs_triton
@needs_nvcc
@pytest.mark.slow
@pytest.mark.proves("csrc", "bench/aot.py", "bench/results/aot.json")
def test_every_cuda_kernel_passes_the_gate() -> None:
    result = run_gate("--compiler", "nvcc")
    assert result.returncode == 0, result.stdout + result.stderr
    compiled = re.findall(r"^(\w+).*: \w+\.cu (\w+) ", result.stdout, re.M)
    assert set(compiled) == {(k, arch) for k in aot_cuda.kernels() for arch in aot_cuda.ARCHS}


def test_kernels_that_say_what_they_are_built_around_are_there() -> None:
    of_triton = json.loads((ROOT / "triton_kernels" / "configs.json").read_text()).keys()
    assert of_triton | aot_cuda.kernels() >= REQUIRED.keys()


@needs_triton
def test_an_unknown_kernel_is_named_with_those_there_are(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--kernel", "nothing"]) == 2
    output = capsys.readouterr().err
    assert "no kernel is named 'nothing'; there are" in output and "xsa_forward_kernel" in output


def test_without_triton_one_line_says_so(monkeypatch, capsys) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "triton" else real(n))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    output = capsys.readouterr().err
    assert output.startswith("python -m bench aot: triton is not installed: pip install triton")
    assert len(output.splitlines()) == 1


def wrong(kernel: str, wide: bool = True, **figures: int) -> list[str]:
    return failures("x", kernel, wide, {"registers": 9, "shared": 0, "spills": 0} | figures)


def test_a_kernel_within_the_limits() -> None:
    assert wrong("leaky_relu2_up_tma", **UP) == []
    assert wrong("leaky_relu2_up_tma", **UP | {"shared": 232448}) == []
    assert wrong("leaky_relu2_up_tma", wide=False, HGMMA=0) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spills": 5}, "x: spills: 5 local loads and stores"),
        ({"shared": 232449}, "x: 232449 bytes of shared memory, a block has 232448"),
        ({"HGMMA": 0}, "x: no HGMMA"),
        ({"UTMALDG": 0}, "x: no UTMALDG"),
    ],
)
def test_what_fails_whatever_the_versions(changed: dict, message: str) -> None:
    assert wrong("leaky_relu2_up_tma", **UP | changed) == [message]


def test_of_a_new_kernel_spills_and_memory_are_checked() -> None:
    assert failures("x", "new", True, {"spills": 0, "shared": 0}) == []
    assert failures("x", "new", True, {"spills": 2, "shared": 2**18}) == [
        "x: spills: 2 local loads and stores",
        "x: 262144 bytes of shared memory, a block has 232448",
    ]


def test_the_quantiser_divides_correctly_rounded() -> None:
    good = {"LDG.128": 1, "STG.128": 1, "div.rn.f32": 8, "div.full.f32": 0}
    assert wrong("fake_quant_forward_kernel", **good) == []
    bad = good | {"div.rn.f32": 0, "div.full.f32": 8}
    assert wrong("fake_quant_forward_kernel", **bad) == ["x: no div.rn.f32", "x: div.full.f32"]


def test_one_of_two_instructions_is_enough() -> None:
    good = dict.fromkeys(REQUIRED["weight_cast_rows"].opcodes(), 0) | {"div.rn.f32": 1}
    assert wrong("weight_cast_rows", **good) == ["x: no LDG.128 or STG.128"]
    assert wrong("weight_cast_rows", wide=False, **good) == []
    assert wrong("weight_cast_rows", **good | {"STG.128": 1}) == []


@needs_triton
def test_instances_of_a_cuda_kernel_are_scalar_or_move_16_bytes(monkeypatch) -> None:
    narrow = Function(registers=9, shared=0, code="")
    instances = [("xsa_forward_rows", ["float", n, "16", "1"], narrow) for n in ("1", "4")]
    monkeypatch.setattr(aot_cuda, "compile_source", lambda source, arch: instances)
    rows, problems = aot_cuda.compile_all("xsa_forward_rows", lambda *_: None, ["sm_80"])
    name = "xsa_forward_rows<float, 4, 16, 1>: xsa.cu sm_80"
    assert name in rows and len(rows) == 2
    assert problems == [f"{name}: no LDG.128", f"{name}: no STG.128"]


def test_without_nvcc_one_line_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(aot_cuda.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(PgolfError, match=r"no nvcc .* pip install -e '.\[nvcc\]'"):
        aot_cuda.nvcc()
    # As pip lays it out, with the compilers that it needs itself.
    for name in ("nvidia/cu13/bin/nvcc", "g++", "c++filt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert aot_cuda.nvcc() == str(tmp_path / "nvidia/cu13/bin/nvcc")


@pytest.mark.parametrize(
    ("figures", "complaints"),
    [
        ({"registers": 121, "shared": 115712}, []),  # registers are given out by 8 a thread
        ({"registers": 129, "shared": 115713}, [
            "x: 2 blocks an SM need 233474 bytes of shared memory, it has 233472",
            "x: 2 blocks an SM need 69632 registers, it has 65536",
        ]),
    ],
)  # fmt: skip
def test_blocks_that_are_meant_to_share_an_sm_fit(figures: dict, complaints: list[str]) -> None:
    assert crowded("x", UP | figures, warps=8, blocks=2) == complaints


def test_a_configuration_that_nothing_reaches_fails() -> None:
    known = {"a": 2, "b": 1}
    assert unreached([("a", 0), ("a", 1), ("b", 0)], known) == []
    assert unreached([("a", 1), ("b", 0)], known) == [
        "a: row 0 of configs.json is reached by no case of bench/aot_cases.py"
    ]


def test_every_changed_figure_is_named() -> None:
    changed = UP | {"registers": 188, "UTMASTG": 0}
    assert list(differences({"up": changed}, {"up": UP})) == [
        "up: UTMASTG was 1, is 0", "up: registers was 173, is 188",
    ]  # fmt: skip


COUNTED = UP | {
    "instructions": 100, "per_16_bytes": 20.0, "loads_in_flight": 8, "barriers": 2, "warps": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({"instructions": 105, "per_16_bytes": 21.0}, []),
        ({"instructions": 50, "per_16_bytes": 10.0, "barriers": 0, "loads_in_flight": 9}, []),
        ({"instructions": 106}, ["instructions was 100, is 106"]),
        ({"per_16_bytes": 21.1}, ["per_16_bytes was 20.0, is 21.1"]),
        ({"barriers": 3, "warps": 64}, ["barriers was 2, is 3"]),
        ({"loads_in_flight": 7}, ["loads_in_flight was 8, is 7"]),
        ({"warps": 32}, ["warps was 40, is 32"]),
    ],
)
def test_executed_instructions_may_be_fewer_or_5_percent_more(
    changed: dict, messages: list[str]
) -> None:
    reported = list(differences({"up": COUNTED | changed}, {"up": COUNTED}))
    assert reported == [f"up: {message}" for message in messages]


@needs_triton
@needs_nvcc
def test_executed_instructions_of_one_kernel_are_compared(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    table = tmp_path / "aot.json"
    only = ["--only", "grad_norm", "--table", str(table)]
    versions = aot_cuda.versions()
    table.write_text(json.dumps({"nvcc 1.0": {}}))
    assert aot.main(only) == 0
    assert f"{versions} not in aot.json: nothing was compared\n" in capsys.readouterr().out
    rows, _ = aot_cuda.executed("grad_norm")
    (name,) = rows
    assert name == "grad_norm_chunks: grad_norm.cu sm_90a"
    table.write_text(json.dumps({versions: rows}))
    assert aot.main(only) == 0
    out = capsys.readouterr().out
    assert re.search(r"^grad_norm_chunks +\d+ -> \d+ ", out, re.M) and "nothing" not in out
    rows[name]["instructions"] //= 2
    table.write_text(json.dumps({versions: rows}))
    assert aot.main(only) == 1
    assert "FAILED grad_norm_chunks: instructions was" in capsys.readouterr().out
    table.write_text(json.dumps({versions: {}}))
    assert aot.main(only) == 1
    assert "FAILED grad_norm_chunks: not in the table\n" in capsys.readouterr().out
    assert aot.main(["--only", "nothing"]) == 2
    assert "begins with 'nothing'; there are qk_rope_forward" in capsys.readouterr().err


def test_rows_that_come_and_go_are_named() -> None:
    assert list(differences({"up": UP}, {"up": UP})) == []
    assert list(differences({"new": UP}, {"old": UP})) == [
        "new: not in the table", "old: in the table, but not compiled any more",
    ]  # fmt: skip


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @P1  LDG.E.EL.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0040*/             @UP0  UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0060*/                   STL [R1], R4 ;
"""
PTX = """
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	div.full.f32 	%f1, %f2, %f3;
	@!%p2 div.rn.f32 %f1, %f2, %f3;
	// div.rn.f32 in a comment
	wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
"""


def test_instructions_are_counted_with_their_modifiers() -> None:
    wanted = {
        "HGMMA": 1, "UTMALDG": 1, "LDG": 3, "LDG.128": 2, "STL": 1, "LDL": 0,
        "div.full.f32": 1, "div.rn.f32": 1, "wgmma.mma_async": 1,
    }  # fmt: skip
    assert count(SASS + PTX, wanted) == wanted


def test_the_table_has_the_same_rows_of_each_triton_that_is_tested() -> None:
    rows = {
        versions.split(",")[0]: set(table)
        for versions, table in json.loads(aot.TABLE.read_text(encoding="utf-8")).items()
        if versions.startswith("triton ")
    }
    assert rows.keys() == {f"triton {version}" for version in TESTED.values()}
    assert len(set(map(frozenset, rows.values()))) == 1


@needs_triton
@pytest.mark.slow
@pytest.mark.proves("triton_kernels", "bench/aot.py", "bench/results/aot.json")
def test_the_gate_passes_with_the_contests_triton(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--target", str(tmp_path / "packages"), f"triton=={CONTEST_TRITON}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    result = run_gate("--compiler", "triton", PYTHONPATH=str(tmp_path / "packages"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"triton {CONTEST_TRITON}, ptxas \S+ compared with aot.json", result.stdout)
