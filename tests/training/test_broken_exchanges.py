"""Short runs of three ranks, an exchange of which fails on one: all end, and one says why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.training.run_folder import RunFolder

from .test_faulty_disk import WORDS
from .tiny import ONE_THREAD, ROOT, TINY, replaced

pytestmark = pytest.mark.slow

WORLD = 3


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> list[tuple[Path, dict]]:
    """(folder, how it ended) of each run; the first was whole."""
    folder = tmp_path_factory.mktemp("exchanges")
    words = replaced(replaced(TINY, WORDS), ("batch_tokens=96", "micro_tokens=32"))
    command = [sys.executable, str(Path(__file__).with_name("broken_exchanges.py")), str(WORLD)]
    subprocess.run(
        [*command, str(folder), "train", "demo", f"data={shards}", *words],
        check=True, env=ONE_THREAD | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    numbers = sorted(int(p.name) for p in folder.iterdir() if p.is_dir())
    runs = json.loads((folder / "runs.json").read_text())
    return [(folder / str(n), run) for n, run in zip(numbers, runs, strict=True)]


def test_the_whole_run_has_exchanges_of_every_kind(runs):
    _, whole = runs[0]
    assert whole["codes"] == [0] * WORLD
    kinds = {"all_gather_object", "broadcast_object_list", "broadcast", "all_reduce", "all_gather"}
    assert {name for name, _ in whole["made"]} == kinds | {"_REDUCE_SCATTER", "_ALL_GATHER"}


def test_every_rank_ends_and_one_names_who_failed_where_and_why(runs):
    places = set()
    for folder, run in runs[1:]:
        number = int(folder.name)
        faulty = number % WORLD
        place = run["made"][-1][1]
        why = f"RuntimeError: exchange {number} is broken"
        others = [r for r in range(WORLD) if r != faulty]
        assert run["codes"][faulty] == 1 and run["said"][faulty].endswith(f"bug: {why}\n"), run
        assert [run["codes"][r] for r in others] == [3] * len(others), run
        lines = [x for r in others for x in run["said"][r].splitlines() if x.startswith("pgolf")]
        told = f"pgolf (rank {others[0]}): error: rank {faulty} failed at {place}: {why}"
        assert [line.partition("; go on")[0] for line in lines] == [told]
        assert not any("Traceback" in said for said in run["said"])
        places.add(re.sub(r"\d+", "N", place))
        checkpoints = RunFolder(folder / "run", writes=False).checkpoints()
        if checkpoints:
            _, loaded = RunFolder(folder / "run", writes=False).load("cpu")
            assert loaded == checkpoints[-1] and "resume=true" in lines[0]
    assert places >= {"step N (start)", "step N", "step N (checkpoint)", "step N (validation)"}
