"""Who optimises what, in each published system; the AdamW side against a float64 loop; clipping."""

import copy
import math

import pytest
import torch

from pgolf import device
from pgolf.config import ModelConfig, OptimConfig
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.ops.grad_norm import grad_norm
from pgolf.optim.groups import Optimizers, kind_of, local_limit

SMALL = dict(vocab_size=16, dim=16, heads=2, kv_heads=1, mlp_hidden=24, ve_dim=6, rope_dims=4)
BLOCK_MATRICES = [
    "attn.c_q.weight",
    "attn.c_k.weight",
    "attn.c_v.weight",
    "attn.proj.weight",
    "mlp.fc.weight",
    "mlp.proj.weight",
]
BLOCK_SCALARS = ["attn_scale", "mlp_scale", "resid_mix", "attn.q_gain"]
SIDE = {"bigram.proj.weight", "ve_shared.proj.weight"}


def model(**changes: object) -> GPT:
    settings = dict(layers=3, bigram_buckets=8, bigram_dim=6, ve_layers="1,2") | SMALL | changes
    net = GPT(ModelConfig(**settings), max_length=8)
    init_weights(net, 0)
    return net


def expected_groups(banked: bool) -> dict[str, set[str]]:
    """Written out, for the model above."""
    groups = {
        "matrix": {f"blocks.{i}.{n}" for i in range(3) for n in BLOCK_MATRICES},
        "embed": {"tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"},
        "scalar": {f"blocks.{i}.{n}" for i in range(3) for n in BLOCK_SCALARS}
        | {"skip_weights", "smear.gate", "bigram.scale", "ve_shared.scale"}
        | {"ve_layer_scales.0", "ve_layer_scales.1"},
    }
    groups["scalar" if banked else "matrix"] |= SIDE
    return groups


@pytest.mark.parametrize(("side", "banked"), [("muon", False), ("adamw", True)])
def test_membership(side: str, banked: bool) -> None:
    net = model()
    optimisers = Optimizers(net, OptimConfig(side_proj_optimizer=side))
    names = {id(p): n for n, p in net.named_parameters()}

    def members(groups: list[dict]) -> set[str]:
        return {names[id(p)] for group in groups for p in group["params"]}

    expected = expected_groups(banked)
    assert members(optimisers.muon.param_groups) == expected["matrix"]
    embed, scalar = optimisers.adamw.param_groups
    assert members([embed]) == expected["embed"]
    assert members([scalar]) == expected["scalar"]
    assert set(names.values()) == set().union(*expected.values()), "none is left out"


@pytest.mark.parametrize(
    ("recipe", "side"),
    [("pr478", "muon"), ("pr531", "muon"), ("pr543", "muon"), ("pr1473", "adamw")],
)
def test_side_projections_of_the_seeds(recipe: str, side: str) -> None:
    from pgolf import recipes

    assert recipes.get(recipe).config().optim.side_proj_optimizer == side


def test_optional_parameters_have_a_group() -> None:
    net = model(backout=True, tied_embedding=False)
    kinds = {n: kind_of(n) for n, _ in net.named_parameters()}
    assert kinds["backout"] == "scalar" and kinds["lm_head.weight"] == "embed"


def test_learning_rates_and_decays() -> None:
    config = OptimConfig(
        matrix_lr=0.1, embed_lr=0.2, scalar_lr=0.3, matrix_wd=0.4, embed_wd=0.5, scalar_wd=0.6
    )
    optimisers = Optimizers(model(), config)
    zeros = {p: torch.zeros_like(p) for p in optimisers.params}
    optimisers.step(zeros, torch.zeros(()), 0.5, 0.9)
    (muon,), (embed, scalar) = optimisers.muon.param_groups, optimisers.adamw.param_groups
    assert [g["lr"] for g in (muon, embed, scalar)] == pytest.approx([0.05, 0.1, 0.15])
    assert [g["weight_decay"] for g in (muon, embed, scalar)] == [0.4, 0.5, 0.6]
    assert muon["momentum"] == 0.9 and embed["betas"] == (0.9, 0.95) and embed["eps"] == 1e-8
    # from the base again, not from the last step's
    optimisers.step(zeros, torch.zeros(()), 1.0, 0.9)
    assert muon["lr"] == pytest.approx(0.1)


def gradients(
    optimisers: Optimizers, step: int, size: float = 1.0
) -> tuple[dict[torch.nn.Parameter, torch.Tensor], torch.Tensor]:
    """Random ones, and their norm."""
    g = torch.Generator().manual_seed(step)
    grads = {
        p: (torch.randn(p.shape, generator=g) * size).to(p.dtype) for p in optimisers.params
    }
    return grads, grad_norm(list(grads.values()), "reference")[0]


def test_adamw_follows_the_formula() -> None:
    net = model(table_dtype="fp32")
    config = OptimConfig(grad_clip=0.0, scalar_lr=0.01, scalar_wd=0.1)
    optimisers = Optimizers(net, config)
    p = net.blocks[1].resid_mix
    w, m, v = p.detach().double(), 0.0, 0.0
    for step in (1, 2, 3):
        grads, norm = gradients(optimisers, step)
        g = grads[p].double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 0.01 * 0.1)
        w = w - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimisers.step(grads, norm, 1.0, 0.9)
        assert p.grad is None, "gradients are dropped"
    torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "size"), [(0.3, 1.0), (0.3, 1e-5), (0.0, 1.0)])
def test_the_global_norm_is_clipped(limit: float, size: float) -> None:
    """Seen through a plain stand-in for both optimisers: what do they get, and divide by?"""
    optimisers = Optimizers(model(table_dtype="fp32"), OptimConfig(grad_clip=limit))
    seen = {}

    def look() -> None:
        assert optimisers.muon.grad_scale is getattr(optimisers.adamw, "grad_scale", None)
        scale = optimisers.muon.grad_scale if limit else 1.0
        seen.update({i: p.grad / scale for i, p in enumerate(optimisers.params)})

    optimisers.muon.step = look
    optimisers.adamw.step = lambda: None
    grads, norm = gradients(optimisers, 1, size)
    given = [grads[p].clone() for p in optimisers.params]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in given))
    optimisers.step(grads, norm, 1.0, 0.9)
    factor = min(1.0, limit / exact) if limit else 1.0
    for i, g in enumerate(given):
        torch.testing.assert_close(seen[i], g * factor, rtol=1e-4, atol=1e-9)


def test_tables_in_bf16_keep_bf16_moments() -> None:
    net = model()
    optimisers = Optimizers(net, OptimConfig())
    before = net.tok_emb.weight.detach().clone()
    optimisers.step(*gradients(optimisers, 1), 1.0, 0.9)
    assert net.tok_emb.weight.dtype is torch.bfloat16
    assert not torch.equal(net.tok_emb.weight, before)
    for table in (net.tok_emb, net.bigram.embed, net.ve_shared.embed):
        state = optimisers.adamw.state[table.weight]
        assert state["exp_avg"].dtype is torch.bfloat16
        assert state["exp_avg_sq"].dtype is torch.bfloat16
    assert optimisers.adamw.state[net.skip_weights]["exp_avg"].dtype is torch.float32


def test_state_round_trips() -> None:
    nets = model(), model()
    first, second = (Optimizers(n, OptimConfig()) for n in nets)
    first.step(*gradients(first, 1), 0.7, 0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    nets[1].load_state_dict(nets[0].state_dict())
    for step in (2, 3):
        for optimisers in (first, second):
            optimisers.step(*gradients(optimisers, step), 0.5, 0.95)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)
    kept = second.adamw.state[nets[1].tok_emb.weight]["exp_avg"]
    assert kept.dtype is torch.bfloat16, "also after a load"


@pytest.mark.parametrize(
    ("asked", "flags", "expected"),
    [
        ("auto", {"avx2"}, torch.float32),
        ("auto", {"avx512_bf16"}, torch.bfloat16),
        ("bf16", {"avx2"}, torch.bfloat16),
    ],
)
def test_newton_schulz_is_in_bf16_where_the_hardware_has_it(monkeypatch, asked, flags, expected):
    monkeypatch.setattr(device, "cpu_flags", lambda: flags)
    assert Optimizers(model(), OptimConfig(ns_dtype=asked)).muon.ns_dtype == expected


def test_what_each_rank_clipped_is_not_clipped_again() -> None:
    config = OptimConfig(grad_clip=0.5, clip_scope="local")
    limits = [Optimizers(model(), config, world=world).config.grad_clip for world in (1, 2)]
    assert limits == [0.5, 0.0], "one rank's own gradients are all there are"
    assert [local_limit(config, 1), local_limit(config, 2)] == [0.0, 0.5]
    assert local_limit(OptimConfig(grad_clip=0.5), 2) == 0.0
