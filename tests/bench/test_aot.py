"""The ahead-of-time gate: on the kernels as they are, and on figures that are made wrong here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, aot_cuda
from bench.aot_checks import REQUIRED_CUDA, cuda_limits, differences, hard_limits, unreached
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
def test_every_kernel_passes_the_gate(tmp_path: Path) -> None:
    file = tmp_path / "aot.json"
    # Kernels that tests interpret are compiled here all the same.
    result = run_gate("--compiler", "triton", "--json", str(file), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["failures"] == []
    kernels = json.loads((ROOT / "triton_kernels" / "configs.json").read_text())
    assert {row["kernel"] for row in found["rows"].values()} == set(kernels)
    mlp = found["rows"]["leaky_relu2_up_tma: bf16"]
    tile = [mlp["config"][name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    assert tile == [128, 256, 64]
    assert mlp["instructions"]["HGMMA"] and mlp["instructions"]["UTMALDG"]
    assert mlp["local"] == 0


@needs_triton
def test_a_changed_table_fails_the_gate_until_it_is_updated(tmp_path: Path) -> None:
    table = tmp_path / "aot.json"
    one = ("--kernel", "newton_schulz_norms", "--table", str(table))
    result = run_gate(*one)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not in aot.json: only the fixed limits" in result.stdout
    assert not table.exists()
    assert run_gate(*one, "--update").returncode == 0

    written = table.read_text()
    figures = json.loads(written)
    (rows,) = figures.values()
    name = min(rows)
    measured = rows[name]["registers"]
    rows[name]["registers"] = measured + 2
    table.write_text(json.dumps(figures))
    result = run_gate(*one)
    assert result.returncode == 1
    assert " compared with aot.json" in result.stdout
    assert f"FAILED {name}: registers was {measured + 2}, is {measured}" in result.stdout
    assert run_gate(*one, "--update").returncode == 0
    assert table.read_text() == written


@needs_triton
@needs_nvcc
def test_a_cuda_kernel_passes_the_gate(tmp_path: Path) -> None:
    file = tmp_path / "aot.json"
    result = run_gate("--kernel", "grad_norm_chunks", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["versions"] == aot_cuda.versions()
    names = [f"grad_norm_chunks: grad_norm.cu {arch}" for arch in ("sm_80", "sm_90a")]
    assert list(found["rows"]) == names
    for row in found["rows"].values():
        assert 16 <= row["registers"] <= 64 and row["instructions"]["LDG"]


@needs_triton
@needs_nvcc
@pytest.mark.slow
@pytest.mark.proves("csrc", "bench/aot.py", "bench/results/aot.json")
def test_every_cuda_kernel_passes_the_gate(tmp_path: Path) -> None:
    file = tmp_path / "aot.json"
    result = run_gate("--compiler", "nvcc", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(file.read_text())["rows"].values()
    for arch in aot_cuda.ARCHS:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == aot_cuda.kernels()


def test_every_cuda_kernel_says_what_it_is_built_around() -> None:
    assert aot_cuda.kernels() == set(REQUIRED_CUDA)


@needs_triton
def test_an_unknown_kernel_is_named_with_those_there_are() -> None:
    result = run_gate("--kernel", "nothing")
    assert result.returncode == 2
    assert "no kernel is named 'nothing'; there are" in result.stderr
    assert "xsa_forward_kernel" in result.stderr


def test_without_triton_one_line_says_so(monkeypatch, capsys) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "triton" else found(n))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m bench aot: triton is not installed: pip install triton")
    assert len(said.splitlines()) == 1


def row(kernel: str = "leaky_relu2_up_tma", **changed: object) -> dict:
    good = {
        "kernel": kernel, "dtype": "bf16", "config": {"BLOCK_M": 128, "num_warps": 8},
        "registers": 173, "shared": 217112, "stack": 0, "local": 0,
        "instructions": {"all": 2008, "HGMMA": 4, "UTMALDG": 6, "UTMASTG": 1}, "ptx": {},
    }  # fmt: skip
    return good | changed


def test_a_kernel_within_the_limits() -> None:
    assert hard_limits("up", row()) == []
    assert hard_limits("up", row(shared=232448)) == []
    assert hard_limits("up", row(dtype="fp32", instructions={"all": 1})) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"local": 8}, "up: spills: 0 local loads and stores, 8 bytes a thread"),
        (
            {"instructions": row()["instructions"] | {"LDL": 2, "STL": 3}},
            "up: spills: 5 local loads and stores, 0 bytes a thread",
        ),
        ({"shared": 232449}, "up: 232449 bytes of shared memory, a block has 232448"),
        ({"instructions": {"UTMALDG": 6, "UTMASTG": 1}}, "up: no HGMMA in the SASS"),
        ({"instructions": {"HGMMA": 4, "UTMASTG": 1}}, "up: no UTMALDG in the SASS"),
        ({"kernel": "new"}, "up: REQUIRED in bench/aot_checks.py does not name this kernel"),
    ],
)
def test_what_fails_whatever_the_versions(changed: dict, message: str) -> None:
    assert hard_limits("up", row(**changed)) == [message]


def test_the_quantiser_divides_correctly_rounded() -> None:
    vectors = {"LDG.128": 1, "STG.128": 1}
    good = row("fake_quant_forward_kernel", instructions=vectors, ptx={"div.rn.f32": 8})
    assert hard_limits("q", good) == []
    bad = row("fake_quant_forward_kernel", instructions=vectors, ptx={"div.full.f32": 8})
    assert hard_limits("q", bad) == ["q: no div.rn.f32 in the PTX", "q: div.full.f32 in the PTX"]


def test_scalar_loads_in_a_row_kernel_fail() -> None:
    scalar = row("xsa_forward_kernel", instructions={"LDG": 6, "STG": 4})
    assert hard_limits("x", scalar) == ["x: no LDG.128 in the SASS", "x: no STG.128 in the SASS"]


def cuda_row(kernel: str, arguments: list[str], **changed: object) -> dict:
    good = {
        "kernel": kernel, "arguments": arguments, "registers": 40, "shared": 0, "stack": 0,
        "local": 0, "instructions": {"all": 90, "LDG.128": 2, "STG.128": 1}, "ptx": {},
    }  # fmt: skip
    return good | changed


def test_instances_of_a_cuda_kernel_are_scalar_or_move_16_bytes() -> None:
    narrow = {"instructions": {"all": 90, "LDG": 2, "STG": 1}}
    vectors, scalar = ["float", "4", "16", "1"], ["float", "1", "32", "2"]
    assert cuda_limits("x", cuda_row("xsa_forward_rows", vectors)) == []
    assert cuda_limits("x", cuda_row("xsa_forward_rows", scalar, **narrow)) == []
    assert cuda_limits("x", cuda_row("xsa_forward_rows", vectors, **narrow)) == [
        "x: no LDG.128 in the SASS", "x: no STG.128 in the SASS",
    ]  # fmt: skip
    assert cuda_limits("x", cuda_row("xsa_forward_rows", scalar, local=8)) == [
        "x: spills: 0 local loads and stores, 8 bytes a thread"
    ]
    assert cuda_limits("x", cuda_row("new", [])) == [
        "x: REQUIRED_CUDA in bench/aot_checks.py does not name this kernel"
    ]


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


def test_a_configuration_that_nothing_reaches_fails() -> None:
    known = {"a": 2, "b": 1}
    assert unreached([("a", 0), ("a", 1), ("b", 0)], known) == []
    assert unreached([("a", 1), ("b", 0)], known) == [
        "a: row 0 of configs.json is reached by no case of bench/aot_cases.py"
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"registers": 188}, "up: registers was 173, is 188"),
        ({"shared": 1024}, "up: shared was 217112, is 1024"),
        ({"stack": 16}, "up: stack was 0, is 16"),
        ({"config": {"BLOCK_M": 64, "num_warps": 8}}, "up: config BLOCK_M was 128, is 64"),
        ({"ptx": {"div.rn.f32": 2}}, "up: ptx div.rn.f32 was 0, is 2"),
        (
            {"instructions": {"all": 2008, "HGMMA": 4, "UTMALDG": 6}},
            "up: instructions UTMASTG was 1, is 0",
        ),
    ],
)
def test_every_changed_figure_is_named(changed: dict, message: str) -> None:
    assert differences({"up": row(**changed)}, {"up": row()}) == [message]


def test_rows_that_come_and_go_are_named() -> None:
    assert differences({"up": row()}, {"up": row()}) == []
    assert differences({"new": row()}, {"old": row()}) == [
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
    from bench.sass import count_ptx, count_sass

    assert count_sass(SASS) == {
        "all": 7, "HGMMA": 1, "UTMALDG": 1, "LDG": 3, "LDG.128": 2, "STL": 1,
    }  # fmt: skip
    assert count_ptx(PTX) == {"div.full.f32": 1, "div.rn.f32": 1, "wgmma.mma_async": 1}


@needs_triton
@pytest.mark.slow
@pytest.mark.proves("triton_kernels", "bench/aot.py", "bench/results/aot.json")
def test_the_gate_passes_with_the_contests_triton(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--target", str(tmp_path / "packages"), f"triton=={CONTEST_TRITON}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    file = tmp_path / "aot.json"
    packages = str(tmp_path / "packages")
    result = run_gate("--compiler", "triton", "--json", str(file), PYTHONPATH=packages)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["versions"].startswith(f"triton {CONTEST_TRITON}, ptxas ")
    assert "compared with aot.json" in result.stdout
