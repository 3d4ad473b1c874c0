"""Initial weights and parameter counts of the four published systems."""

import dataclasses
import functools
import math

import pytest
import torch

from pgolf import recipes
from pgolf.config import ModelConfig
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.settings import resolve_layers

from .published import PARAMETERS, PUBLISHED


def build(config: ModelConfig, seed: int = 1, length: int = 2048) -> GPT:
    model = GPT(config, max_length=length)
    init_weights(model, seed)
    return model


@functools.cache
def published_model(name: str) -> GPT:
    """A published system at full size; tests only read it."""
    return build(PUBLISHED[name], length=64)


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert count(PUBLISHED[name]) == PARAMETERS[name]


def test_the_published_backout_is_one_parameter_more() -> None:
    assert count(dataclasses.replace(PUBLISHED["pr478"], backout=True)) == 26_993_757


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_describe_the_same_models(name: str) -> None:
    """The settings of `published.py` were written from the publications, not from the recipes."""

    def resolved(config: ModelConfig) -> ModelConfig:
        layers = {
            key: ",".join(map(str, resolve_layers(key, getattr(config, key), config.layers)))
            for key in ("xsa_layers", "ve_layers")
        }
        return dataclasses.replace(config, **layers)

    assert resolved(recipes.get(name).config().model) == resolved(PUBLISHED[name])


def orthogonal_gain(weight: torch.Tensor) -> float:
    """The common singular value of a (semi-)orthogonal matrix; fails if there is none."""
    w = weight.double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    gain = gram.diagonal().mean().sqrt().item()
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)).double(), rtol=0, atol=1e-5)
    return gain


@pytest.fixture
def pr478() -> GPT:
    return published_model("pr478")


def test_tables(pr478: GPT) -> None:
    assert pr478.tok_emb.weight.dtype is torch.bfloat16
    table = pr478.tok_emb.weight.double()
    assert table.std().item() == pytest.approx(0.005, rel=0.01)
    assert abs(table.mean().item()) < 5 * 0.005 / math.sqrt(table.numel())
    values = pr478.ve_shared.embed.weight
    assert values.dtype is torch.bfloat16
    assert values.double().std().item() == pytest.approx(0.01, rel=0.02)
    assert pr478.bigram.embed.weight.dtype is torch.bfloat16
    assert not pr478.bigram.embed.weight.any()


def test_matrices(pr478: GPT) -> None:
    for block in pr478.blocks:
        for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
            assert orthogonal_gain(matrix.weight) == pytest.approx(1.0, abs=1e-5)
        assert not block.attn.proj.weight.any() and not block.mlp.proj.weight.any()
    first, second = pr478.blocks[0].attn, pr478.blocks[1].attn
    assert not torch.equal(first.c_q.weight, second.c_q.weight)
    assert not torch.equal(first.c_k.weight, first.c_v.weight)


def test_side_projections_are_scaled_in_the_unbanked_scripts_only(pr478: GPT) -> None:
    for side in (pr478.bigram.proj, pr478.ve_shared.proj):
        assert orthogonal_gain(side.weight) == pytest.approx(1 / math.sqrt(22), abs=1e-5)
    banked = published_model("pr1473")
    for side in (banked.bigram.proj, banked.ve_shared.proj):
        assert orthogonal_gain(side.weight) == pytest.approx(1.0, abs=1e-5)


def test_scalars(pr478: GPT) -> None:
    assert pr478.bigram.scale.item() == pytest.approx(0.05)
    assert pr478.ve_shared.scale.item() == pytest.approx(0.1)
    assert [s.item() for s in pr478.ve_layer_scales] == [1.0, 1.0]
    assert pr478.skip_weights.shape == (5, 512) and (pr478.skip_weights == 1).all()
    assert not pr478.smear.gate.any()
    for block in pr478.blocks:
        assert (block.attn_scale == 1).all() and (block.mlp_scale == 1).all()
        assert (block.attn.q_gain == 1.5).all()
    for name, p in pr478.named_parameters():
        assert p.dtype == (torch.bfloat16 if "emb" in name else torch.float32), name
        assert p.isfinite().all(), name


def test_phase_of_pr478_rises_from_0_182_to_0_818(pr478: GPT) -> None:
    for i, block in enumerate(pr478.blocks):
        keep = 1 / (1 + math.exp(-3 * (i / 10 - 0.5)))
        torch.testing.assert_close(block.resid_mix[0], torch.full((512,), keep))
        torch.testing.assert_close(block.resid_mix[1], torch.full((512,), 1 - keep))
    assert pr478.blocks[0].resid_mix[0, 0].item() == pytest.approx(0.182, abs=5e-4)
    assert pr478.blocks[10].resid_mix[0, 0].item() == pytest.approx(0.818, abs=5e-4)


def test_the_other_systems_start_from_the_identity_mix() -> None:
    for block in published_model("pr531").blocks:
        assert (block.resid_mix[0] == 1).all() and (block.resid_mix[1] == 0).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_first_loss_is_that_of_a_uniform_guess(name: str) -> None:
    model = published_model(name)
    ids = torch.randint(1024, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:]).item()
        embedded = model.embed(ids).square().mean(-1).sqrt()
    # norm_eps 1e-6 leaves the embedding of std 0.005 its unit RMS: the log's first line says 6.93
    assert loss == pytest.approx(math.log(1024), abs=0.02)
    smeared = 1 / math.sqrt(2)  # half of two independent tokens of RMS 1
    assert embedded[:, 1:].mean().item() == pytest.approx(smeared, rel=0.05)


def test_untied_output_starts_at_zero() -> None:
    config = ModelConfig(layers=2, dim=32, heads=2, kv_heads=1, mlp_hidden=32, tied_embedding=False)
    model = build(config, length=8)
    ids = torch.randint(1024, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(1024), rel=1e-6)


def test_weights_follow_the_seed() -> None:
    config = ModelConfig(
        layers=2, dim=32, heads=2, kv_heads=1, mlp_hidden=32, bigram_buckets=8, ve_layers="1"
    )
    first, again, other = (dict(build(config, s, 8).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    drawn = [n for n in first if not torch.equal(first[n], other[n])]
    assert "tok_emb.weight" in drawn and "blocks.1.mlp.fc.weight" in drawn
    assert "bigram.proj.weight" in drawn and "ve_shared.embed.weight" in drawn


def test_drawing_weights_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, mlp_hidden=16), length=8)
    assert torch.equal(torch.rand(4), expected)


def test_the_artifact_stores_parameters_and_no_buffers() -> None:
    model = build(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, mlp_hidden=16), length=8)
    for module in model.modules():
        if hasattr(module, "prepare_qat"):
            module.prepare_qat(6, torch.zeros(()))
    assert set(model.export_state()) == {n for n, _ in model.named_parameters()}
    assert not any(t.requires_grad for t in model.export_state().values())


def test_checkpoints_of_the_public_scripts_load() -> None:
    """Names and shapes of the scripts' parameters; their value scales are vectors of one."""
    shapes = {
        "tok_emb.weight": (1024, 512),
        "bigram.embed.weight": (2048, 128),
        "bigram.proj.weight": (512, 128),
        "bigram.scale": (),
        "smear.gate": (512,),
        "skip_weights": (5, 512),
        "ve_shared.embed.weight": (1024, 128),
        "ve_shared.proj.weight": (256, 128),
        "ve_shared.scale": (),
        "ve_layer_scales.0": (1,),
        "ve_layer_scales.1": (1,),
    }
    for i in range(11):
        shapes |= {
            f"blocks.{i}.attn.c_q.weight": (512, 512),
            f"blocks.{i}.attn.c_k.weight": (256, 512),
            f"blocks.{i}.attn.c_v.weight": (256, 512),
            f"blocks.{i}.attn.proj.weight": (512, 512),
            f"blocks.{i}.attn.q_gain": (8,),
            f"blocks.{i}.mlp.fc.weight": (1536, 512),
            f"blocks.{i}.mlp.proj.weight": (512, 1536),
            f"blocks.{i}.attn_scale": (512,),
            f"blocks.{i}.mlp_scale": (512,),
            f"blocks.{i}.resid_mix": (2, 512),
        }
    model = GPT(PUBLISHED["pr478"], max_length=8)
    model.load_state_dict({n: torch.full(s, 0.25) for n, s in shapes.items()}, strict=True)
    assert all((p == 0.25).all() for p in model.parameters())
