"""`python -m bench tune` in the interpreter, with a timer whose optimum is known."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pgolf.errors import PgolfError, StorageError
from pgolf.ops.launch import interpreting
from pgolf.ops.operator import OPERATORS, Sample

pytest.importorskip("triton")
if not interpreting():
    pytest.skip("Triton kernels are not interpreted here", allow_module_level=True)

from bench import candidates, gpu_parts, tune  # noqa: E402
from pgolf.ops.testing import Call  # noqa: E402
from pgolf.triton_kernels import launch as launches  # noqa: E402
from pgolf.triton_kernels.launch import Launch  # noqa: E402

CPU = torch.device("cpu")
KERNEL, ROW = "xsa_forward_kernel", 2  # fp32 at d = 64


def small(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    """So few pairs that the interpreter runs a program or two for every configuration."""
    g = torch.Generator().manual_seed(0)
    sizes = (1, 3, 4, 64), (1, 3, 2, 64)
    return tuple(torch.randn(*size, generator=g).to(device, dtype) for size in sizes), {}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A copy of configs.json that may be written, and xsa with one small size."""
    copy = tmp_path / "configs.json"
    copy.write_bytes(launches.TABLE.read_bytes())
    monkeypatch.setattr(launches, "TABLE", copy)
    launches.configs.cache_clear()
    operator = dataclasses.replace(
        OPERATORS["xsa"], samples=lambda: [Sample("small", small, bench=True)]
    )
    monkeypatch.setitem(OPERATORS, "xsa", operator)
    yield copy
    launches.configs.cache_clear()


def best_at(pairs: int, warps: int) -> Callable[[Launch], float]:
    """A timer that knows which configuration is fastest."""

    def milliseconds(launch: Launch) -> float:
        size, config = launch.config.blocks["BLOCK_PAIRS"], launch.config
        return 1 + abs(math.log2(size / pairs)) + abs(math.log2(config.num_warps / warps))

    return milliseconds


def go(timer: Callable[[Launch], float], dry_run: bool = False, log: tune.Log | None = None) -> int:
    return tune.tune(["xsa"], ["fp32"], CPU, "a toy GPU", timer, dry_run, log)


def test_the_walk_ends_at_the_fastest_and_writes_only_its_rows(table, capsys) -> None:
    before = json.loads(table.read_text())
    assert go(best_at(pairs=4, warps=8)) == 0
    after = json.loads(table.read_text())
    assert table.read_text() == tune.formatted(after)
    changed = {(k, i) for k in before for i, row in enumerate(before[k]) if row != after[k][i]}
    assert changed == {(KERNEL, ROW), ("xsa_backward_kernel", 2)}
    assert list(after) == list(before)
    row, old = after[KERNEL][ROW], before[KERNEL][ROW]
    assert row["blocks"] == {"BLOCK_PAIRS": 4} and row["num_warps"] == 8
    assert row["num_stages"] == old["num_stages"] and row["when"] == old["when"]
    assert row["reason"].startswith("tuned on a toy GPU, 2") and "before 4 with" in row["reason"]
    assert launches.pick(KERNEL, block_bytes=256).blocks == {"BLOCK_PAIRS": 4}
    assert [p.name for p in table.parent.iterdir()] == ["configs.json"]
    assert f"{KERNEL}[2] BLOCK_PAIRS 4, 8 warps, 1 stages: tuned" in capsys.readouterr().out


def test_later_rows_are_tuned_with_the_best_of_earlier_ones(table) -> None:
    checked = tune._checked("xsa", OPERATORS["xsa"].samples()[0], CPU, "fp32")
    with tune.own_table() as own:
        for one in tune.walk_all(own, [checked], best_at(pairs=8, warps=4)):
            assert own[one.kernel][one.row] is one.after
    assert own[KERNEL][ROW].blocks == {"BLOCK_PAIRS": 8}
    assert launches.configs()[KERNEL][ROW].blocks == {"BLOCK_PAIRS": 16}  # the file's again


@pytest.mark.parametrize("gain", [0.0, 0.01])
def test_what_is_hardly_faster_is_not_written(table, gain, capsys) -> None:
    before = table.read_bytes()
    assert go(lambda launch: 1.0 - gain * (launch.config.num_warps == 8)) == 0
    assert table.read_bytes() == before
    assert "nothing is faster: configs.json is as it was" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(table, capsys) -> None:
    before = table.read_bytes()
    assert go(best_at(pairs=8, warps=4), dry_run=True) == 0
    assert table.read_bytes() == before
    assert "[2] BLOCK_PAIRS 8, 4 warps, 1 stages: tuned" in capsys.readouterr().out


def test_wrong_and_failing_configurations_are_passed_over(table, monkeypatch, capsys) -> None:
    """8 warps give wrong results and blocks of 8 fail, though both are said to be fast.

    What was tried is written, they as well, in the order of the walk.
    """
    judge = Call.problem

    def problem(*of) -> str:
        rows = launches.configs()["xsa_forward_kernel"]
        return judge(*of) or "too many warps" * (rows[ROW].num_warps == 8)

    def timer(launch: Launch) -> float:
        if launch.config.blocks["BLOCK_PAIRS"] == 8 and "dz" not in launch.arguments:
            raise RuntimeError("out of resources")
        return best_at(pairs=8, warps=8)(launch)

    monkeypatch.setattr(Call, "problem", problem)
    file = table.parent / "tried.jsonl"
    assert go(timer, log=tune.Log(file, CPU, "command")) == 0
    tried = [line for line in map(json.loads, file.open()) if line["kernel"] == KERNEL]
    assert [(line["row"], line["num_warps"]) for line in tried[:1]] == [(ROW, 4)]
    assert tried[0]["ms"] == 3.0 and tried[0]["blocks"] == {"BLOCK_PAIRS": 16}
    assert all(line["ms"] is None for line in tried if line["num_warps"] == 8)
    row = json.loads(table.read_text())[KERNEL][ROW]
    assert row["num_warps"] == 4 and row["blocks"] == {"BLOCK_PAIRS": 16}
    out = capsys.readouterr().out
    assert "RuntimeError: out of resources" in out and "wrong: too many warps" in out


def test_a_row_that_is_wrong_itself_is_an_error(table, monkeypatch) -> None:
    monkeypatch.setattr(Call, "problem", lambda *of: of[0].run(of[1]) and "all of it")
    with pytest.raises(PgolfError, match=r"xsa_\w+_kernel\[2\] itself is wrong"):
        go(best_at(4, 8))
    assert launches.configs()[KERNEL][ROW].blocks == {"BLOCK_PAIRS": 16}


def test_a_write_that_fails_leaves_the_table(table, monkeypatch) -> None:
    before = table.read_bytes()

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pgolf.files.os.replace", full)
    with pytest.raises(StorageError, match="no space left"):
        go(best_at(8, 4))
    assert table.read_bytes() == before
    assert [p.name for p in table.parent.iterdir()] == ["configs.json"]


def test_candidates_are_tried_though_the_way_to_them_is_slower(table, monkeypatch) -> None:
    far = candidates.Candidate({"BLOCK_PAIRS": 2}, num_warps=1, num_stages=1)  # it is 16, with 4
    monkeypatch.setitem(candidates.CANDIDATES, KERNEL, [far])

    def timer(launch: Launch) -> float:
        config = launch.config
        return 2.0 - (config.blocks["BLOCK_PAIRS"] == 2 and config.num_warps == 1)

    assert go(timer) == 0
    row = json.loads(table.read_text())[KERNEL][ROW]
    assert row["blocks"] == {"BLOCK_PAIRS": 2} and row["num_warps"] == 1
    assert "before 2 with BLOCK_PAIRS 16, 4 warps" in row["reason"]


def test_neighbours_are_one_step_away() -> None:
    config = launches.Config("", {"A": 1, "SWITCH": True}, num_warps=16, num_stages=1)
    neighbours = [(n.blocks, n.num_warps, n.num_stages) for n in tune.neighbours(config)]
    same = {"A": 1, "SWITCH": True}
    assert neighbours == [({"A": 2, "SWITCH": True}, 16, 1), (same, 8, 1), (same, 16, 2)]


def test_the_committed_table_is_as_tune_would_write_it() -> None:
    text = launches.TABLE.read_text(encoding="utf-8")
    assert tune.formatted(json.loads(text)) == text


def test_operators_without_triton_kernels_are_one_line(table) -> None:
    for name in ("grad_norm", "no such"):
        with pytest.raises(PgolfError, match=f"no Triton kernel for '{name}'; there are "):
            tune.tune([name], ["fp32"], CPU, "", best_at(4, 8))


def test_without_a_gpu_nothing_is_written(table, monkeypatch, capsys) -> None:
    before = table.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["xsa"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert table.read_bytes() == before


def test_only_sizes_that_are_asked_for_are_tuned(table) -> None:
    labels = {
        name: [sample.label for sample in tune._samples(name, gpu_parts.SAMPLES)]
        for name in gpu_parts.TUNED
    }
    assert labels == {
        "leaky_relu2_mlp": ["98304 512-1536"], "newton_schulz": ["qo bank", "kv bank", "up bank"]
    }  # fmt: skip
    with pytest.raises(PgolfError, match=r"--sample none: no size of xsa; there are small$"):
        tune.tune(["xsa"], ["fp32"], CPU, "", best_at(4, 8), label_parts=["none"])
