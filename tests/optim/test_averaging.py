"""EMA and SWA against float64 sums, and what is exported."""

import pytest
import torch

from pgolf.config import Config, ModelConfig, with_overrides
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.optim.averaging import Averager
from pgolf.optim.schedule import Clock, Schedule

STEPS = 40


def model() -> GPT:
    net = GPT(
        ModelConfig(vocab_size=8, layers=1, dim=16, heads=2, kv_heads=1, mlp_hidden=8, rope_dims=4),
        max_length=4,
    )
    init_weights(net, 0)
    return net


def move(net: GPT, step: int) -> None:
    """Weights after a step: any numbers that all differ and are exact in bf16."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.fill_((step * 7 + i) % 32)


def value(step: int, index: int) -> float:
    return float((step * 7 + index) % 32)


def run(net: GPT, averager: Averager, first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        move(net, step + 1)
        averager.update(Clock(step=step), Clock(step=step + 1))


def averager(net: GPT, **overrides: object) -> Averager:
    config = with_overrides(Config(), {"max_steps": STEPS, **overrides})
    return Averager(net, Schedule(config))


def constant(weights: dict[str, torch.Tensor]) -> list[float]:
    """The value of each tensor, which must be the same in all its elements."""
    for w in weights.values():
        assert (w == w.flatten()[0]).all()
    return [w.flatten()[0].item() for w in weights.values()]


def test_ema_from_its_start() -> None:
    net = model()
    a = averager(net, averaging="ema", ema_start=0.25, ema_horizon=0.1)
    run(net, a)
    weights, words = a.export()
    assert words == "EMA"
    decay = torch.tensor(-1 / STEPS / 0.1, dtype=torch.float64).exp().item()
    for i, (average, p) in enumerate(zip(constant(weights), net.parameters(), strict=True)):
        expected = value(10, i)
        for step in range(11, STEPS + 1):
            expected = decay * expected + (1 - decay) * value(step, i)
        rel = 1e-2 if p.dtype is torch.bfloat16 else 1e-5
        assert average == pytest.approx(expected, rel=rel)


def test_published_ema_counts_the_initial_weights() -> None:
    net = model()
    start = net.smear.gate.detach().clone().fill_(100.0)
    with torch.no_grad():
        net.smear.gate.copy_(start)
    a = averager(net, averaging="ema", schedule="iterations", ema_decay=0.9)
    run(net, a, last=3)
    i = list(dict(net.named_parameters())).index("smear.gate")
    expected = 100.0
    for step in (1, 2, 3):
        expected = 0.9 * expected + 0.1 * value(step, i)
    assert a.export()[0]["smear.gate"][0].item() == pytest.approx(expected, rel=1e-6)


def test_swa_is_the_mean_of_its_snapshots() -> None:
    net = model()
    a = averager(net, averaging="swa", swa_start=0.5, swa_every=0.1)
    run(net, a)
    weights, words = a.export()
    steps = [20, 24, 28, 32, 36, 40]
    assert a.snapshots == len(steps) and words == "SWA of 6 snapshots"
    for i, (average, p) in enumerate(zip(constant(weights), net.parameters(), strict=True)):
        expected = sum(value(s, i) for s in steps) / len(steps)
        rel = 1e-2 if p.dtype is torch.bfloat16 else 1e-5
        assert average == pytest.approx(expected, rel=rel)


def test_published_order_swa_over_ema() -> None:
    """PR 531's script: the EMA is loaded, then overwritten if there are two snapshots."""
    settings = dict(averaging="ema_then_swa", schedule="iterations", warmdown_iters=STEPS)
    net = model()
    a = averager(net, swa_start_lr=0.5, swa_every_iters=10, **settings)
    run(net, a)
    assert a.export()[1] == "SWA of 2 snapshots"  # after steps 30 and 40
    net = model()
    a = averager(net, swa_start_lr=0.1, swa_every_iters=10, **settings)
    run(net, a)
    weights, words = a.export()
    assert a.snapshots == 1 and words == "EMA"
    assert torch.equal(weights["smear.gate"], a.ema["smear.gate"])


def test_without_averaging_the_last_weights_are_exported() -> None:
    for overrides in (
        {"averaging": "none"},
        {"averaging": "ema", "ema_start": 1.0},
        {"averaging": "swa", "swa_start": 1.0},
    ):
        net = model()
        a = averager(net, **overrides)
        run(net, a, last=STEPS - 1)
        weights, words = a.export()
        assert words == "last weights"
        for name, p in net.named_parameters():
            assert torch.equal(weights[name], p)
            assert weights[name].data_ptr() != p.data_ptr(), "a copy: training may go on"


def test_sums_are_fp32_and_the_export_has_the_parameters_dtypes() -> None:
    net = model()
    a = averager(net, averaging="ema_then_swa", swa_start=0.5, swa_every=0.1, ema_start=0)
    run(net, a)
    assert {t.dtype for t in (*a.ema.values(), *a.swa.values())} == {torch.float32}
    weights, _ = a.export()
    assert {n: w.dtype for n, w in weights.items()} == {
        n: p.dtype for n, p in net.named_parameters()
    }
    assert weights["tok_emb.weight"].dtype is torch.bfloat16
    assert not any(w.requires_grad for w in weights.values())


def test_bf16_tables_average_beyond_bf16() -> None:
    """1 and 1 + 2^-7 alternate: their mean has no bf16, but the sum must know it."""
    net = model()
    a = averager(net, averaging="swa", swa_start=0, swa_every=0.025)
    for step in range(STEPS):
        with torch.no_grad():
            net.tok_emb.weight.fill_(1 + (step % 2) * 2.0**-7)
        a.update(Clock(step=step), Clock(step=step + 1))
    assert a.snapshots == STEPS
    torch.testing.assert_close(
        a.swa["tok_emb.weight"], torch.full_like(a.swa["tok_emb.weight"], 1 + 2.0**-8)
    )


@pytest.mark.parametrize("kind", ["ema", "swa", "ema_then_swa", "none"])
def test_state_round_trips(kind: str) -> None:
    settings = dict(averaging=kind, swa_start=0.2, swa_every=0.1, ema_start=0.1)
    net = model()
    whole = averager(net, **settings)
    run(net, whole)
    expected, words = whole.export()

    net = model()
    first = averager(net, **settings)
    run(net, first, last=17)
    state = first.state_dict()
    resumed = averager(net, **settings)
    resumed.load_state_dict(state)
    run(net, resumed, first=17)
    weights, said = resumed.export()
    assert said == words
    assert all(torch.equal(weights[n], expected[n]) for n in expected)


def test_averaging_leaves_the_model_alone() -> None:
    net = model()
    a = averager(net, averaging="ema_then_swa", ema_start=0, swa_start=0)
    run(net, a)
    for i, p in enumerate(net.parameters()):
        assert (p == value(STEPS, i)).all() and p.requires_grad
