"""What did nothing in a run is named, and nothing else."""

import pytest
import torch

from pgolf.config import Config, ModelConfig
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.training.audit import Audit
from pgolf.training.idle import idle_parameters, untrained
from pgolf.training.trainer import Clock

from .test_trainer import build

SMALL = ("seed=0", "layers=2", "ve_layers=last:1", "max_seconds=0", "max_steps=100")
ITERATIONS = (*SMALL, "schedule=iterations")


@pytest.fixture
def audited(monkeypatch):
    """What is found in a run that moved its weights at random, after `change(trainer)`."""

    def call(*words, change=lambda trainer: None):
        trainer, _, _ = build(monkeypatch, *words)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        trainer.clock = Clock(step=100)
        trainer.averager.ema = {n: 0.5 * p for n, p in trainer.model.named_parameters()}
        trainer.qat.turn_on()
        change(trainer)
        audit = Audit(trainer)
        return audit.warnings(trainer.take_export())

    return call


@pytest.mark.parametrize("words", [SMALL, (*ITERATIONS, "momentum_warmup_iters=90")])
def test_nothing_is_found_where_all_came(audited, words):
    assert audited(*words) == []


def no_ema(trainer):
    trainer.averager.ema = {}


def ema_of_the_last_step(trainer):
    trainer.averager.ema = {n: p.clone() for n, p in trainer.model.named_parameters()}


def one_snapshot(trainer):
    trainer.averager.snapshots = 1


def no_xsa(trainer):
    trainer.model.blocks[1].attn.exclusive = False


def grids_of_nothing(trainer):
    """As they would be if the weights did not go through them."""
    trainer.qat.switch.zero_()


@pytest.mark.parametrize(
    ("words", "change", "line"),
    [
        (SMALL, lambda t: t.qat.turn_off(),
         "late QAT (qat_start=0.7) never came on in 100 steps: lower it, or train for longer"),
        (ITERATIONS + ("momentum_warmup_iters=0",), lambda t: t.qat.turn_off(),
         "late QAT (qat_start_lr=0.15) never came on in 100 steps: raise it, or train for longer"),
        (SMALL, grids_of_nothing,
         "late QAT (qat_start=0.7) changes nothing in 12 of 12 matrices: fewer bits"),
        ((*SMALL, "small_numel=9999999"), None,
         "late QAT (qat_start=0.7) has no matrix: lower small_numel or bits, or set qat_start=1"),
        (SMALL, no_ema,
         "averaging=ema: the EMA never began in 100 steps (ema_start=0.5), last weights exported: "
         "begin earlier, or train for longer"),
        (SMALL, ema_of_the_last_step,
         "averaging=ema: the EMA is just the last weights: begin earlier"),
        ((*SMALL, "averaging=ema_then_swa"), one_snapshot,
         "averaging=ema_then_swa: SWA took 1 snapshots in 100 steps (swa_start=0.8, "
         "swa_every=0.01), EMA exported: begin earlier, or train for longer"),
        (ITERATIONS, None,
         "momentum=0.99 only came to 0.925 in 100 steps (momentum_warmup_iters=1500): lower that, "
         "or train for longer"),
        (SMALL, no_xsa, "xsa_layers=all: no XSA in layers 1"),
    ],
)  # fmt: skip
def test_what_never_came_is_named(audited, words, change, line):
    assert audited(*words, change=change or (lambda trainer: None)) == [line]


def test_parameters_that_never_took_a_gradient(audited):
    """Weight decay moved them, or nothing: the setting that they belong to is named."""
    initial = GPT(ModelConfig(layers=2, dim=64, heads=4, mlp_hidden=32, bigram_buckets=64,
                              ve_layers="1", backout=True, vocab_size=64))  # fmt: skip
    init_weights(initial, 0)
    initial = {n: p.detach() for n, p in initial.named_parameters()}
    config = Config(model=ModelConfig(bigram_buckets=64, ve_layers="1", backout=True))
    moved = {n: p + 0.1 * torch.randn(p.shape) for n, p in initial.items()}
    assert idle_parameters(config, initial, moved, 1000) == []
    for name, factor in {"skip_weights": 0.9, "smear.gate": 0.5, "blocks.1.resid_mix": 0.9,
                         "bigram.embed.weight": 1, "bigram.scale": 1, "backout": 1,
                         "blocks.0.attn.q_gain": 1,
                         "blocks.0.mlp.fc.weight": 0.97}.items():  # fmt: skip
        moved[name] = initial[name] * factor
    lines = idle_parameters(config, initial, moved, 1000)
    count = len(initial)
    longer = ": train for longer"
    assert sorted(lines) == sorted([
        f"2 of {count} parameters never took a gradient (blocks.0.attn.q_gain, "
        f"blocks.0.mlp.fc.weight){longer}",
        f"resid_mix=identity: a parameter never took a gradient (blocks.1.resid_mix){longer}, or "
        "save the bytes by resid_mix=off",
        f"smear=plain: a parameter never took a gradient (smear.gate){longer}, or save the bytes "
        "by smear=off",
        f"unet_skips=True: a parameter never took a gradient (skip_weights){longer}, or save the "
        "bytes by unet_skips=false",
        f"backout=True: a parameter never took a gradient (backout){longer}, or save the bytes by "
        "backout=false",
        f"bigram_buckets=64: 2 of {count} parameters never took a gradient (bigram.scale, "
        f"bigram.embed.weight){longer}, or save the bytes by bigram_buckets=0",
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decay_alone_is_told_from_a_gradient(dtype):
    """As the optimiser rounds it, over a run; one step of a small gradient is enough."""
    initial = torch.randn(64, 32).mul(0.005).to(dtype)
    weight = initial.clone()
    for _ in range(1000):
        weight.mul_(1 - 0.035 * 0.04)
    assert untrained(initial, weight, 0.24)
    assert not untrained(initial, weight + 0.001 * torch.randn(64, 32).sign().to(dtype), 0.24)
    assert not untrained(torch.zeros(3), torch.tensor([0.0, 1e-6, 0.0]), 0.24)
    assert untrained(torch.zeros(3), torch.zeros(3), 0.24)
    assert not untrained(torch.tensor(0.2), torch.tensor(0.19), 0.24), "which decay may have done"


def test_one_step_of_alike_gradients_is_no_decay():
    gains = torch.full((8,), 1.5)
    least = 1 - 0.025 * 0.04
    assert untrained(gains, gains * least, least)
    assert not untrained(gains, gains - 0.025, least) and not untrained(gains, gains + 0.025, least)
