"""What ranks compare before they train; threads stand for processes."""

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pgolf.api import start
from pgolf.config import to_dict, with_overrides
from pgolf.errors import DataError, PgolfError, TrainingError
from pgolf.ranks import Ranks
from pgolf.recipes import get
from pgolf.training import facts, handshake
from pgolf.training.handshake import SHOWN, alike, differences
from pgolf.training.run import resume
from pgolf.training.run_folder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture
def together(monkeypatch):
    """What becomes of `alike` on ranks with these pieces of work, whose results are the facts."""

    def run(*works, call=lambda ranks, work: alike(ranks, work, dict)):
        sent, outcomes = [None] * len(works), [None] * len(works)
        barrier = threading.Barrier(len(works), timeout=20)

        def gathered(ranks, mine):
            sent[ranks.rank] = mine
            barrier.wait()
            return list(sent)

        def rank(number):
            try:
                outcomes[number] = call(Ranks(number, len(works), CPU), works[number])
            except Exception as e:
                outcomes[number] = e

        monkeypatch.setattr(handshake, "gathered", gathered)
        threads = [threading.Thread(target=rank, args=(n,)) for n in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return run


def failing(error: Exception):
    def work():
        raise error

    return work


def test_ranks_with_the_same_facts_go_on(together):
    same = {"torch": "torch 2.9.1"}
    assert together(lambda: same, lambda: dict(same), lambda: dict(same)) == [same] * 3


def test_one_rank_alone_compares_nothing():
    assert alike(Ranks(0, 1, CPU), lambda: 5, None) == 5


def test_a_difference_ends_every_rank_in_one_line(together):
    def having(version):
        return lambda: {"torch": f"torch {version}", "x": "x"}

    errors = together(having("2.11.0"), having("2.9.1"), having("2.11.0"))
    for error in errors:
        assert isinstance(error, TrainingError)
        assert "rank 1 has torch 2.9.1, rank 0 torch 2.11.0: start all ranks" in str(error)
    assert [e.quiet for e in errors] == [False, True, True]


def test_differences_name_ranks_and_values():
    base = {"a": "a=1", "words_train_0.bin": "words_train_0.bin of 10 bytes"}
    assert differences([base, base]) == []
    assert differences([base, {"a": "a=2"}, {"a": "a=2"}, base | {"a": "a=3"}]) == [
        "ranks 1, 2 have a=2, rank 3 has a=3, rank 0 a=1",
        "ranks 1, 2 have no words_train_0.bin, rank 0 words_train_0.bin of 10 bytes",
    ]


def test_many_differences_are_counted(together):
    count = SHOWN + 2
    error, _ = together(
        lambda: {f"k{n}": "0" for n in range(count)}, lambda: {f"k{n}": "1" for n in range(count)}
    )
    assert str(error).count("rank 1 has 1") == SHOWN and "; and 2 more: " in str(error)


def test_the_rank_that_fails_speaks(together):
    mine = DataError("no shards in /here")
    outcomes = together(dict, failing(mine), dict)
    assert outcomes[1] is mine and not mine.quiet
    for other in (outcomes[0], outcomes[2]):
        assert isinstance(other, PgolfError) and other.quiet
        assert str(other) == "rank 1 failed: no shards in /here"


def test_the_first_of_several_that_fail_speaks_for_all(together):
    outcomes = together(
        dict, failing(DataError("a")), failing(DataError("a")), failing(DataError("b"))
    )
    assert [e.quiet for e in outcomes] == [True, False, True, True]
    assert str(outcomes[1]) == "a; rank 3: b"


def test_a_bug_keeps_its_class_where_it_is(together):
    bug = ValueError("x")
    outcomes = together(failing(ValueError("x")), failing(bug))
    assert type(outcomes[0]) is ValueError
    assert outcomes[1].quiet and str(outcomes[1]) == "rank 0 failed: ValueError: x"


def test_settings_are_compared_but_for_those_that_may_differ():
    config = get("demo").config({"data": "/a", "out": "/b"}, False)
    own = {"data": "/c", "tokenizer": "/t", "out": "/d", "device": "cpu", "patience": 9}
    one, other = facts.software(config), facts.software(with_overrides(config, own))
    assert one == other
    assert differences([one, facts.software(with_overrides(config, {"seed": 7}))]) == [
        "rank 1 has seed=7, rank 0 seed=1337"
    ]
    (line,) = differences([one, facts.software(with_overrides(config, {"data": ""}))])
    assert line == "rank 1 has the embedded corpus, rank 0 data=FOLDER"
    assert one["torch"] == f"torch {torch.__version__}" and "sha256" in one["pgolf"]


def test_every_setting_that_may_differ_is_one():
    assert facts.OWN_KEYS <= facts.flat(facts.to_dict(get("demo").config({}, False))).keys()


def test_hardware_names_implementations():
    one = facts.hardware(CPU, torch.float32, {"xsa": "cpu"})
    other = facts.hardware(CPU, torch.bfloat16, {"xsa": "reference"})
    assert differences([one, other]) == [
        "rank 1 has compute_dtype=bf16, rank 0 compute_dtype=fp32",
        "rank 1 has xsa=reference, rank 0 xsa=cpu",
    ]


@pytest.mark.parametrize(
    "settings, device",
    [
        ({}, "auto"),
        ({"device": "cpu"}, "cpu"),
        ({"run.device": "cpu"}, "cpu"),
        ({"resume": "true", "out": "run"}, "cpu"),
        ({"run.resume": True, "out": "run", "device": "cuda"}, "cuda"),
        ({"resume": "maybe", "out": "run"}, "auto"),
        ({"resume": "true", "out": "none"}, "auto"),
    ],
)
def test_a_rank_that_cannot_begin_joins_on_the_device_of_the_run(
    settings, device, monkeypatch, tmp_path
):
    """Wherever it is named; with another one its group would not be the others'."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    Path("run").mkdir()
    config = to_dict(with_overrides(get("demo").config({}, False), {"device": "cpu"}))
    Path("run/config.json").write_text(json.dumps(config))
    joined = []
    monkeypatch.setattr(handshake, "fail_together", lambda error, device: joined.append(device))
    with pytest.raises(PgolfError, match="matrix_lauers"):
        start("demo", {**settings, "matrix_lauers": 3})
    assert joined == [device]


def test_ranks_go_on_from_the_same_checkpoint(together, tmp_path):
    folders = [RunFolder(tmp_path / name) for name in "ab"]
    for folder, step in zip(folders, (5, 6), strict=True):
        folder.save(step, {})

    def going_on(ranks, folder):
        resume(SimpleNamespace(session=SimpleNamespace(ranks=ranks)), folder)

    error, quiet = together(*folders, call=going_on)
    assert re.search(
        "rank 1 has the checkpoint step-0000006 of sha256 .*, rank 0 the checkpoint step-0000005 .*"
        f"let all ranks see the same {folders[0].path}, or copy checkpoints/ of rank 0's",
        str(error),
    )
    assert quiet.quiet and not error.quiet
