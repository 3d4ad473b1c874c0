"""Who says what when ranks fail; their store is in this process, and no group is there."""

import itertools
import json
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from pgolf import ranks as module
from pgolf import roll_call
from pgolf.cli import main
from pgolf.errors import DataError, LostRank
from pgolf.ranks import Ranks
from pgolf.roll_call import RollCall
from pgolf.stop import Stopped
from pgolf.training.failure_report import report_failure
from pgolf.training.interrupt import Interrupted

WORLD = 3
GLOO = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.fixture
def end(monkeypatch, tmp_path):
    """Let a rank end in step 10 by an error: (what it raises, what it tells torchrun)."""
    monkeypatch.setattr(roll_call, "_runs", itertools.repeat(0))
    monkeypatch.setattr(roll_call, "INTERVAL", 0.01)
    monkeypatch.setattr(roll_call, "ANSWER", 0.2)
    monkeypatch.setattr(module.dist, "set_timeout", lambda *_: None, raising=False)
    monkeypatch.setattr(module.dist.distributed_c10d, "_set_pg_timeout", lambda *_: None)
    monkeypatch.setattr(signal, "alarm", lambda seconds: 0)
    store, alive = HashStore(), {}
    for rank in range(WORLD):
        alive[rank] = Ranks(
            rank, WORLD, torch.device("cpu"), None, RollCall(store, rank, WORLD)
        )

    def ended(rank, error, cause=None, folder=None):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        with pytest.raises(BaseException) as raised, report_failure(alive[rank], "demo") as folders:
            if folder is not None:
                folders.append(folder)
            with alive[rank].patient(10, phase="validation" if rank == 2 else ""):
                raise error from cause
        return raised.value, json.loads(file.read_text())["message"]

    ended.die = lambda rank: alive[rank].roll_call._stop()
    ended.calls = [ranks.roll_call for ranks in alive.values()]
    yield ended
    for ranks in alive.values():
        ranks.roll_call._stop()


def test_the_others_name_the_rank_and_its_message(end):
    bug = RuntimeError("boom")
    raised, told = end(1, bug)
    assert raised is bug and told["message"] == "RuntimeError: boom"
    for rank in (0, 2):
        lost, late = end(rank, RuntimeError(GLOO))
        assert isinstance(lost, LostRank) and lost.exit_code == 3
        assert str(lost) == late["message"] == "rank 1 failed at step 10: RuntimeError: boom"
        assert lost.quiet == (rank == 2) and lost.__suppress_context__
        # torchrun calls the earliest the root cause
        when = (int(m["extraInfo"]["timestamp"]) for m in (told, late))
        assert next(when) < next(when)


def test_the_lowest_rank_that_is_left_speaks_and_names_the_phase(end):
    end(2, DataError("a bad shard"))
    assert not end(0, RuntimeError(GLOO))[0].quiet
    lost, _ = end(1, RuntimeError(GLOO))
    assert str(lost) == "rank 2 failed at step 10 (validation): a bad shard" and lost.quiet


def test_the_same_error_on_all_ranks_is_said_once(end):
    errors = [end(rank, DataError("the same"))[0] for rank in range(WORLD)]
    assert [e.quiet for e in errors] == [False, True, True]
    assert all(type(e) is DataError for e in errors)


def test_the_same_bug_on_all_ranks_has_one_traceback(end):
    first, *others = (end(rank, ValueError("the same"))[0] for rank in range(WORLD))
    assert type(first) is ValueError
    assert all(isinstance(e, LostRank) and e.quiet for e in others)


def test_a_long_message_is_told_by_its_first_line(end):
    end(1, RuntimeError("CUDA error: bad\nFor debugging consider\n..."))
    lost, told = end(0, RuntimeError(GLOO))
    assert str(lost) == "rank 1 failed at step 10: RuntimeError: CUDA error: bad"
    assert told["message"] == str(lost)


def test_another_error_is_said_too(end):
    end(1, ValueError("one"))
    assert str(end(0, ValueError("two"))[0]) == "two"


def test_what_all_ranks_were_told_is_left_to_the_one_that_says_it(end):
    quiet = DataError("all have it")
    quiet.quiet = True
    assert end(1, quiet)[0] is quiet
    loud = DataError("all have it")
    assert end(0, loud)[0] is loud and not loud.quiet


def test_a_rank_that_torchrun_ends_names_the_one_that_failed(end):
    end(1, RuntimeError("boom"))
    lost, _ = end(0, Stopped(signal.SIGTERM))
    assert str(lost) == "rank 1 failed at step 10: RuntimeError: boom"
    interrupted = Interrupted("stopped after training")
    assert isinstance(end(2, interrupted, Stopped(signal.SIGTERM))[0], LostRank)


def test_a_rank_that_torchrun_ends_names_the_one_that_is_gone(end):
    end.die(1)
    lost, _ = end(0, Stopped(signal.SIGTERM))
    assert str(lost) == "step 10: rank 1 ended without a word: killed?"
    other, _ = end(2, RuntimeError(GLOO))
    assert str(other) == str(lost) and other.quiet and not lost.quiet


def test_a_rank_that_lives_and_does_not_come_is_named(end):
    end.calls[2].store.set("asks/2", "")  # it has waited for as long as rank 0
    lost, _ = end(0, RuntimeError("gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms"))
    assert str(lost) == "step 10: rank 1 kept the others waiting for 1800 s"


def test_a_rank_that_is_stopped_says_so(end):
    stopped, told = end(1, Stopped(signal.SIGTERM))
    assert isinstance(stopped, Stopped) and told["message"] == "stopped by SIGTERM"
    lost, _ = end(0, RuntimeError(GLOO))
    assert str(lost) == "rank 1 ended at step 10: stopped by SIGTERM"


def test_leaving_by_exit_is_named(end):
    assert isinstance(end(1, SystemExit(0))[0], SystemExit)
    assert str(end(0, RuntimeError(GLOO))[0]) == "rank 1 failed at step 10: SystemExit: 0"


def test_who_lost_one_says_how_to_go_on(end):
    folder = SimpleNamespace(path="runs/x", checkpoints=lambda: ["step-0000005"])
    error, _ = end(1, DataError("bad"), folder=folder)
    assert str(error) == "bad"
    lost, told = end(0, RuntimeError(GLOO), folder=folder)
    assert str(lost).endswith("step 10: bad; go on with `pgolf train demo out=runs/x resume=true`")
    assert told["message"] == str(lost)


def test_a_run_of_one_process_keeps_its_error(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    alone = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="^boom$"), report_failure(alone, "demo"):
        raise RuntimeError("boom")
    with report_failure(alone, "demo"):
        pass


@pytest.mark.parametrize("asked", [False, True])
def test_who_lost_one_says_it_even_if_torchrun_ends_it_meanwhile(monkeypatch, capsys, asked):
    def lose(argv):
        try:
            raise LostRank("rank 1 is gone")
        finally:
            if asked:
                raise Stopped(signal.SIGTERM)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("pgolf.cli.train.main", lose)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit) as left:
        main(["train"])
    assert left.value.code == 3
    assert capsys.readouterr().err == "pgolf (rank 0): error: rank 1 is gone\n"
