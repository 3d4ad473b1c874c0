"""The model against the written specification: loss and every gradient, and causality.

`spec_model` shares no code with the model. Weights are random, not initial ones: at init many
branches are zero and would hide anything.
"""

import pytest
import torch

from pgolf.config import ModelConfig
from pgolf.model import GPT
from pgolf.model.embeddings import ValueEmbedding
from pgolf.ops.qk_rope import qk_rope

from . import spec_model
from .published import PUBLISHED, small

BATCH, TIME = 2, 7

SWITCHES = {
    "backout": dict(backout=True),
    "phase": dict(resid_mix="phase"),
    "resid_mix_off": dict(resid_mix="off"),
    "smear_off": dict(smear="off"),
    "smear_bos_masked": dict(smear="bos_masked", bos_id=3),
    "documents": dict(documents=True, bos_id=3),
    "untied": dict(tied_embedding=False),
    "no_qk_norm": dict(qk_norm=False),
    "no_softcap": dict(softcap=0.0),
    "tight_softcap": dict(softcap=2.0),
    "rope_none": dict(rope_dims=0),
    "rope_half": dict(rope_dims=2),
    "rope_full": dict(rope_dims=4),
    "rope_base": dict(rope_base=30.0),
    "xsa_none": dict(xsa_layers="none"),
    "xsa_some": dict(xsa_layers="0,3-4"),
    "no_values": dict(ve_layers="none"),
    "values_elsewhere": dict(ve_layers="0,2,4"),
    "bigram_full_width": dict(bigram_dim=16),
    "no_layer_scale": dict(layer_scale=False),
    "no_skips": dict(unet_skips=False),
    "relu2": dict(activation="relu2"),
    "slope": dict(leaky_slope=0.1),
    "eps": dict(norm_eps=0.3),
    "even_layers": dict(layers=6, ve_layers="4,5"),
    "one_layer": dict(layers=1, ve_layers="0"),
    "mha": dict(kv_heads=4),
    "mqa": dict(kv_heads=1),
}
CASES = {name: small(config) for name, config in PUBLISHED.items()} | {
    name: small(PUBLISHED["pr1473"], **{"layers": 5, "ve_layers": "3,4"} | changes)
    for name, changes in SWITCHES.items()
}


def randomised(config: ModelConfig, dtype: torch.dtype) -> GPT:
    """A model whose every parameter matters."""
    model = GPT(config, compute_dtype=dtype, max_length=TIME).to(dtype)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if p.dim() < 2 or name in ("skip_weights",) or name.endswith("resid_mix"):
                noise = 0.7 + 0.4 * noise
            elif "emb" not in name:
                noise = noise / p.shape[1] ** 0.5
            p.copy_(noise)
    return model


def batch(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(6)
    ids = torch.randint(config.vocab_size, (BATCH, TIME + 1), generator=g)
    ids[0, 3] = config.bos_id  # a document start inside a row
    return ids[:, :-1], ids[:, 1:]


def gradients(loss: torch.Tensor, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_follow_the_specification(name: str) -> None:
    config = CASES[name]
    ids, targets = batch(config)
    model = randomised(config, torch.float64)
    params = dict(model.named_parameters())
    expected = spec_model.loss(params, config, ids, targets)
    expected_grads = gradients(expected, params)

    loss = model(ids, targets)
    # not 1e-12: rope tables and capped logits are fp32 even in an fp64 model
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for key, grad in gradients(loss, params).items():
        scale = expected_grads[key].abs().max().item()
        assert scale > 1e-7, f"{key} does not matter: the comparison is empty"
        error = (grad - expected_grads[key]).abs().max().item()
        assert error <= 1e-4 * scale, f"{key}: {error} of {scale}"

    single = randomised(config, torch.float32)
    assert single(ids, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    for key, grad in gradients(single(ids, targets), dict(single.named_parameters())).items():
        torch.testing.assert_close(
            grad.double(),
            expected_grads[key],
            rtol=1e-3,
            atol=2e-4 * expected_grads[key].abs().max().item(),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_more_tokens_than_rows_of_the_side_tables(dtype: torch.dtype) -> None:
    """Training multiplies tables then, not tokens; passes without a gradient never do."""
    config = CASES["pr1473"]
    g = torch.Generator().manual_seed(7)
    count = 2 + max(config.vocab_size, config.bigram_buckets) // TIME
    ids, targets = torch.randint(config.vocab_size, (2, count, TIME), generator=g)
    params = dict(randomised(config, torch.float64).named_parameters())
    expected = gradients(spec_model.loss(params, config, ids, targets), params)

    model, multiplied = randomised(config, dtype), []
    for side in (model.bigram, model.ve_shared):
        side.proj.register_forward_hook(lambda _, args, out: multiplied.append(args[0].dim()))
    actual = gradients(model(ids, targets), dict(model.named_parameters()))
    assert sorted(multiplied) == [2, 2]
    with torch.no_grad():
        model(ids, targets)
    assert sorted(multiplied) == [2, 2, 3, 3]
    for name in (n for n in params if n.startswith(("bigram.", "ve_shared."))):
        error = (actual[name] - expected[name]).norm() / expected[name].norm()
        assert error < {torch.float64: 1e-6, torch.float32: 1e-4}[dtype], name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_many_tokens_of_one_row_add_up_in_fp32(impl: str) -> None:
    """Added up in bf16, a sum of 30,000 numbers stands still at a small part of them."""
    side = ValueEmbedding(3, 8, 4, torch.float32)
    for p in side.parameters():
        torch.nn.init.ones_(p)
    ids, scales = torch.zeros(1, 30_000, dtype=torch.int64), [torch.ones(()), torch.tensor(2.0)]
    qkv, table = torch.zeros(1, 30_000, 12).bfloat16(), torch.empty(30_000, 0)
    gain, total = torch.ones(1), 0
    for rows, by_id, _ in side(ids, torch.bfloat16, scales):
        total += qk_rope(
            qkv, table, table, gain, 1, 1, value=rows, value_ids=by_id, impl=impl
        )[2].sum()
    total.backward()
    assert side.embed.weight.grad[0].tolist() == [pytest.approx(3 * 120_000, rel=0.01)] * 8
    assert side.scale.grad.item() == pytest.approx(3 * 30_000 * 4 * 8, rel=0.01)


@pytest.mark.parametrize("name", [*PUBLISHED, "smear_bos_masked", "backout"])
def test_a_later_token_changes_no_earlier_loss(name: str) -> None:
    config = CASES[name]
    ids, targets = batch(config)
    model = randomised(config, torch.float64)
    with torch.no_grad():
        before = model(ids, targets, last=TIME)
        for t in range(TIME):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 5) % config.vocab_size
            after = model(changed, targets, last=TIME)
            assert torch.equal(after[1], before[1]), "rows of a batch must not see each other"
            assert torch.equal(after[0, :t], before[0, :t])
            assert (after[0, t:] != before[0, t:]).all(), "and every later one sees the change"


def test_smear_and_bigram_look_back_one_position_only() -> None:
    config = small(PUBLISHED["pr1473"])
    ids, _ = batch(config)
    model = randomised(config, torch.float64)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % config.vocab_size
    with torch.no_grad():
        touched = (model.embed(ids) != model.embed(changed)).any(-1)
    # the token itself and its bigram change 2 and 3; smearing carries 3 to 4
    assert touched.tolist() == [[t in (2, 3, 4) for t in range(TIME)], [False] * TIME]


def test_masked_smear_stops_at_a_document_start() -> None:
    config = small(PUBLISHED["pr1473"], smear="bos_masked", bos_id=3, bigram_buckets=0)
    ids, _ = batch(config)
    assert ids[0, 3] == config.bos_id
    model = randomised(config, torch.float64)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % config.vocab_size
    with torch.no_grad():
        touched = (model.embed(ids) != model.embed(changed)).any(-1)
    assert touched[0].tolist() == [t == 2 for t in range(TIME)]


def test_last_gives_the_losses_of_the_last_positions() -> None:
    config = small(PUBLISHED["pr478"])
    ids, targets = batch(config)
    model = randomised(config, torch.float64)
    with torch.no_grad():
        every = model(ids, targets, last=TIME)
        assert every.shape == (BATCH, TIME)
        assert model(ids, targets).item() == pytest.approx(every.mean().item(), rel=1e-6)
        torch.testing.assert_close(model(ids, targets, last=3), every[:, -3:])
        logits = model.logits(model.features(ids))
        expected = -torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(every, expected)
        reference = spec_model.logits(dict(model.named_parameters()), config, ids)
        torch.testing.assert_close(logits.double(), reference, rtol=1e-5, atol=1e-5)


def test_a_shorter_sequence_sees_the_same_positions() -> None:
    config = small(PUBLISHED["pr1473"])
    ids, targets = batch(config)
    model = randomised(config, torch.float64)
    with torch.no_grad():
        whole = model(ids, targets, last=TIME)
        start = model(ids[:, :4], targets[:, :4], last=4)
    torch.testing.assert_close(start, whole[:, :4], rtol=1e-6, atol=1e-6)
