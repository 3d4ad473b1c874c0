"""A compiled run: nothing is compiled with the clock on, but for what validation needs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgolf.errors import TrainingError
from pgolf.training import trainer as module
from pgolf.training.compiling import compiled_once

from .test_graphs import Batches
from .test_trainer import build, unasked

# Late QAT from 0.7 and EMA from 0.5 on, SWA after it, two passes a step.
WORDS = (
    "compile=on", "max_seconds=0", "max_steps=10", "val_every=3", "checkpoint_every=0", "layers=2",
    "dim=32", "heads=2", "kv_heads=1", "documents=true", "averaging=ema_then_swa", "swa_start=0.8",
)  # fmt: skip


@pytest.fixture
def backend():
    """A backend that is quick, and whether each graph that it made takes gradients."""
    graphs = []

    def made(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    torch.compiler.reset()
    yield SimpleNamespace(
        graphs=graphs,
        compile=lambda f, *args: torch.compile(f, fullgraph=True, dynamic=False, backend=made),
    )
    torch.compiler.reset()


def test_a_run_trains_on_what_the_warm_up_compiled(monkeypatch, backend):
    """And validates: whole batches, a smaller one, a shorter window."""
    monkeypatch.setattr(module, "compile_graph", backend.compile)
    trainer, folder, _ = build(monkeypatch, *WORDS)
    trainer.loader = Batches()
    trainer.val = np.random.default_rng(0).integers(2, 400, 32 * 41 + 6)
    trainer.table = SimpleNamespace(count=lambda previous, ids: np.ones_like(ids))
    monkeypatch.setattr(trainer, "validate", type(trainer).validate.__get__(trainer))
    trainer.warm_up()
    assert backend.graphs == [True]
    with compiled_once(trainer):
        trainer.train(unasked())
    assert trainer.clock.step == 10 and len([m for m in folder.lines if m["kind"] == "val"]) == 4
    assert trainer.qat.on and len(backend.graphs) >= 3 and not any(backend.graphs[1:])
    assert trainer.passes.__func__ is type(trainer).passes


@pytest.fixture
def passes(backend):
    """Of a trainer at its fifth step, which has compiled one of (4, 8) and validated."""

    def model(ids, targets, last=0):
        return (weight * ids).sum() - targets[-last:].sum()

    weight = torch.ones(8, requires_grad=True)
    forward = backend.compile(model)
    trainer = SimpleNamespace(compiled=True, clock=SimpleNamespace(step=4), passes=forward)
    forward(torch.ones(4, 8), torch.ones(4, 8))
    with torch.no_grad():
        forward(torch.ones(3, 8), torch.ones(3, 8), last=1)
        forward(torch.ones(5, 8), torch.ones(5, 8), last=1)
    assert backend.graphs == [True, False, False]
    return trainer


@pytest.mark.parametrize(
    "ids, what",
    [
        (torch.ones(3, 8), "size mismatch at index 0. expected 4, actual 3"),
        (torch.ones(8, 4).t(), "stride mismatch at index 0. expected 8, actual 1"),
        (torch.ones(4, 8).double(), "dtype mismatch. expected Float, actual Double"),
    ],
)
def test_a_pass_that_would_be_compiled_anew_is_an_error(backend, passes, ids, what):
    forward = passes.passes
    with pytest.raises(TrainingError) as raised, compiled_once(passes):
        passes.passes(torch.ones(4, 8), torch.ones(4, 8))
        passes.passes(ids, torch.ones(4, 8))
    assert str(raised.value) == (
        f"step 5 would have to be compiled anew, with the clock on: tensor 'ids' {what}. Training "
        "has to run what the warm-up compiled: keep that as it was, or train with compile=off"
    )
    assert len(backend.graphs) == 3
    forward(ids, torch.ones(4, 8))  # what follows may compile
    assert len(backend.graphs) == 4


def test_other_errors_of_a_pass_stay_what_they_are(passes):
    def fails():
        raise RuntimeError("no memory")

    passes.passes = fails
    with pytest.raises(RuntimeError, match="^no memory$"), compiled_once(passes):
        passes.passes()


def test_what_is_not_compiled_is_left_alone():
    trainer = SimpleNamespace(compiled=False)
    with compiled_once(trainer):
        assert not hasattr(trainer, "passes")
