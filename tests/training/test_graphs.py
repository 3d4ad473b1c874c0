"""Replayed steps, with a tape of calls in place of a CUDA graph: see tape.py."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from pgolf.errors import ConfigError, StaleWeights
from pgolf.ops.operator import OPERATORS
from pgolf.optim import fused
from pgolf.optim.exchange import Exchange
from pgolf.ranks import Ranks
from pgolf.training import graphs, run

from .tape import Capture
from .test_trainer import SEQ_LEN, build, unasked
from .tiny import replaced

CPP = dict.fromkeys(fused.OPERATORS, "cpu")
WORDS = (
    "max_seconds=0", "max_steps=10", "ns_dtype=fp32", "val_every=0", "checkpoint_every=0",
    "table_dtype=fp32", "layers=2", "dim=32", "heads=2", "kv_heads=1",
)  # fmt: skip

needs_cpp = pytest.mark.skipif(
    bool(OPERATORS["param_update"].implementations["cpu"].missing()), reason="no C++ kernels"
)


class Batches:
    """Endless tokens, by their place."""

    position = 0

    def next_batch(self, local_tokens, numbers):
        self.carried = torch.tensor(numbers)
        draw = torch.Generator().manual_seed(self.position)
        self.position += 1
        tokens = torch.randint(0, 400, (2, local_tokens // SEQ_LEN, SEQ_LEN), generator=draw)
        return tokens[0], tokens[1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.fixture
def taped(monkeypatch):
    """Captures go to tapes, on any device."""
    monkeypatch.setattr(graphs, "Capture", Capture)
    monkeypatch.setattr(graphs, "obstacle", lambda trainer: "")
    Capture.made.clear()
    Capture.resets.clear()
    Capture.closed.clear()


def made(monkeypatch, *words: str):
    trainer, folder, _ = build(monkeypatch, *replaced(list(WORDS), words), ops=CPP)
    trainer.loader = Batches()
    return trainer, folder


@contextmanager
def replaying(trainer):
    with graphs.captures(trainer) as capturing, capturing:
        yield


def trained(monkeypatch, *words: str, replayed: bool, change=lambda trainer: None):
    """What a run logs, and everything it ends with."""
    trainer, folder = made(monkeypatch, *words)
    change(trainer)
    with replaying(trainer) if replayed else nullcontext():
        trainer.train(unasked())
    state = trainer.state_dict()
    return [m for m in folder.lines if m["kind"] == "train"], {
        **state["model"], **state["optimizers"]["momentum"], **trainer.averager.export()[0],
        **{f"{n} v": t for n, t in state["optimizers"]["exp_avg_sq"].items()},
    }  # fmt: skip


def same(one, other) -> None:
    (lines, state), (others, expected) = one, other
    for key in ("loss", "grad_norm", "lr_scale"):
        assert [m[key] for m in lines] == [m[key] for m in others], key
    assert state.keys() == expected.keys()
    for name, t in state.items():
        assert torch.equal(t, expected[name]), name


@needs_cpp
@pytest.mark.parametrize(
    "words",
    [
        (),  # two passes a step, late QAT from 0.7 and EMA from 0.5 on
        ("micro_tokens=256", "averaging=ema_then_swa", "swa_start=0.6"),
        ("qat_clip_mask=true", "micro_tokens=64"),
        ("schedule=iterations", "qat_start_lr=0.6", "warmdown_iters=15"),
    ],
)
def test_a_replayed_run_is_the_eager_one(monkeypatch, taped, capsys, words):
    """To the bit: rates, the average's start and late QAT are not what they were when captured."""
    eager = trained(monkeypatch, *words, replayed=False)
    replayed = trained(monkeypatch, *words, replayed=True)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "graphs" in line)
    assert said.startswith(f"graphs: {3 + ('micro_tokens=256' not in words)} in ")
    same(replayed, eager)


@needs_cpp
def test_a_replayed_step_of_weights_that_were_changed_is_an_error(monkeypatch, taped):
    trainer, _ = made(monkeypatch)
    with replaying(trainer):
        trainer.step(0.5, 0.9)
        trainer.model.load_state_dict(trainer.model.state_dict())
        with pytest.raises(StaleWeights, match="was changed"):
            trainer.step(0.5, 0.9)
        trainer.exchange.publish()
        trainer.step(0.5, 0.9)


@needs_cpp
def test_graphs_end_before_the_group_in_the_order_of_their_use(monkeypatch, taped):
    trainer, _ = made(monkeypatch)

    def stop(*args):
        assert trainer.step.__func__ is graphs.Graphs.step
        raise KeyError("stop")

    monkeypatch.setattr(trainer, "_collect", stop)
    with pytest.raises(KeyError, match="stop"), replaying(trainer):
        trainer.train(unasked())
    assert Capture.resets == Capture.made[::-1] and len(Capture.closed) == 1
    assert trainer.step.__name__ == "slow_step"
    assert trainer.exchange.publish.__func__ is Exchange.publish


@needs_cpp
def test_the_stream_goes_back_if_there_is_no_training(monkeypatch, taped):
    """What `train` warms up is in this block."""
    trainer, folder = made(monkeypatch)
    closed = []

    def warm_up():
        closed.append(len(Capture.closed))
        raise KeyError("no memory")

    monkeypatch.setattr(trainer, "warm_up", warm_up)
    monkeypatch.setattr(folder, "open", lambda *args: None, raising=False)
    monkeypatch.setattr(folder, "discard", lambda: None, raising=False)
    monkeypatch.setattr(run, "build", lambda *args: trainer)
    with pytest.raises(KeyError, match="no memory"):
        run.train(trainer.session, "")
    assert closed == [0] and len(Capture.closed) == 1


@needs_cpp
def test_a_run_goes_on_from_a_checkpoint(monkeypatch, taped):
    """The tensors of a state that was loaded are those that are captured."""
    whole = trained(monkeypatch, replayed=False)
    first, _ = made(monkeypatch)
    stop = SimpleNamespace(number=0, error=lambda step, number, kept: KeyError(step))
    monkeypatch.setattr(first, "checkpoint", lambda: setattr(first, "kept", first.clock.step))
    collect = first._collect

    def collected(pace, interrupt):
        stop.number = 2 * (first.clock.step == 6)
        return collect(pace, interrupt)

    monkeypatch.setattr(first, "_collect", collected)
    with pytest.raises(KeyError, match="6"), replaying(first):
        first.train(stop)
    second, folder = made(monkeypatch)
    second.load_state_dict(first.state_dict())
    with replaying(second):
        second.train(unasked())
    lines = [m for m in folder.lines if m["kind"] == "train"]
    assert [m["loss"] for m in lines] == [m["loss"] for m in whole[0][6:]]


def moved(trainer) -> None:
    """A fault: rates come at another address each time."""
    optimiser, kept = trainer.optimizers.fused, []
    numbers, update = optimiser.numbers, optimiser.update

    def noted(average_rate):
        kept.append(torch.tensor(numbers(average_rate)))
        return kept[-1].tolist()

    def updated(grads, norm, scalars, averages=()):
        update(grads, norm, kept[-1].view(scalars.shape), averages)

    optimiser.numbers, optimiser.update = noted, updated


def waits(trainer) -> None:
    """A fault: the host reads the norm."""
    reduce = trainer.exchange.reduce

    def reduced():
        grads, norm = reduce()
        assert norm.item() > 0
        return grads, norm

    trainer.exchange.reduce = reduced


@needs_cpp
@pytest.mark.parametrize(
    "fault, said",
    [
        (moved, "graphs: off, in a replayed step "),
        (waits, "graphs: off, the capture failed: operation not permitted when stream is captur"),
    ],
)
def test_a_fault_switches_graphs_off(monkeypatch, taped, capsys, fault, said):
    """In one line, and training goes on as if nothing had been."""
    eager = trained(monkeypatch, "max_steps=3", replayed=False)
    capsys.readouterr()
    tried = trained(monkeypatch, "max_steps=3", replayed=True, change=fault)
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "graphs" in text)
    assert line.startswith(said)
    same(tried, eager)
    assert all(tape.calls is None for tape in Capture.made) or fault is waits


@needs_cpp
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_rank_that_has_none_has_company(monkeypatch, taped, capsys, at):
    """What one finds, at a capture or after all, all do."""
    asked = []

    def first_reason(ranks, why):
        asked.append(why)
        return "rank 5: no room" if len(asked) == at + 1 else ""

    trainer, _ = made(monkeypatch)
    monkeypatch.setattr(graphs, "_first_reason", first_reason)
    with replaying(trainer):
        assert trainer.step.__name__ == "slow_step"
    assert asked == [""] * (at + 1)
    assert "graphs: off, rank 5: no room" in capsys.readouterr().out


def test_the_first_rank_with_a_reason_is_named(monkeypatch):
    ranks = Ranks(0, 3, torch.device("cpu"))
    for said, wanted in ((["", "", ""], ""), (["", "no room", "why"], "rank 1: no room")):
        monkeypatch.setattr(graphs, "gathered", lambda ranks, mine, said=said: said)
        assert graphs._first_reason(ranks, "") == wanted


@needs_cpp
def test_zeros_that_graphs_read_outlive_larger_ones(monkeypatch, taped):
    trainer, _ = made(monkeypatch)
    with replaying(trainer):
        exchange, held = trainer.exchange, trainer.step.__self__.zeros
        before = dict(exchange.zeros)
        exchange._zeros(1 << 20, torch.float32)
        assert all(held[dtype] is zeros for dtype, zeros in before.items())


def test_noise_of_eager_steps_is_allowed_for():
    trial = graphs.Trial.__new__(graphs.Trial)
    trial.before = {"w": torch.zeros(4)}
    first, second = {"w": torch.ones(4)}, {"w": torch.full((4,), 1.001)}
    assert trial.verdict([first, second], {"w": torch.full((4,), 0.997)}) == ""
    assert "w differs" in trial.verdict([first, second], {"w": torch.full((4,), 0.995)})
    assert "w differs" in trial.verdict([first, first], {"w": torch.full((4,), 1.0000001)})
    assert "w differs" in trial.verdict([first, second], {"w": torch.full((4,), torch.nan)})
    assert "w differs" in trial.verdict([first, {"w": -first["w"]}], {"w": torch.zeros(4)})


@needs_cpp
def test_a_cpu_has_no_graphs(monkeypatch):
    trainer, _ = made(monkeypatch, "graphs=true")
    with pytest.raises(ConfigError, match="graphs=true: graphs need CUDA, and this runs on cpu"):
        graphs.replays(trainer)
    trainer, _ = made(monkeypatch)
    with replaying(trainer):
        assert trainer.step.__name__ == "slow_step"


def test_torchs_optimisers_have_no_graphs():
    cuda = Ranks(0, 1, torch.device("cuda"))
    trainer = SimpleNamespace(ranks=cuda, ops={"xsa": "triton"})
    assert "kernels for the optimisers' step" in graphs.obstacle(trainer)
    trainer.ops["param_update"] = "cuda"
    assert graphs.obstacle(trainer) == ""
