"""What storing a model adds to its loss, against the model's own loss of both weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgolf import recipes
from pgolf.config import with_overrides
from pgolf.data.shards import write_shard
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.quant.dequantize import dequantize
from pgolf.quant.quantize import quantize
from pgolf.training import added_loss as module
from pgolf.training.added_loss import added_loss

SETTINGS = {
    "vocab_size": 60, "layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "mlp_hidden": 48,
    "rope_dims": 8, "bigram_buckets": 16, "bigram_dim": 8, "ve_dim": 8, "ve_layers": "1",
    "seq_len": 8, "stride": 8, "small_numel": 0, "attn_bits": "4", "mlp_bits": "4",
    "quantizer": "lite", "eval_tokens": 24,
}  # fmt: skip


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A model, its stored form, settings, and data of which 10 sequences of 25 are scored."""
    monkeypatch.setattr(module, "TOKENS", 83)
    config = with_overrides(recipes.get("demo").config({}), SETTINGS)
    torch.manual_seed(0)
    model = GPT(config.model, max_length=8)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    tokens = np.random.default_rng(0).integers(0, 60, 205)
    write_shard(tmp_path / "text_val_000000.bin", tokens)
    stored = quantize(model.export_state(), config.quant, False)
    return model, stored, config, SimpleNamespace(folder=tmp_path), torch.from_numpy(tokens)


@torch.no_grad()
def test_both_losses_are_the_models(case) -> None:
    model, stored, config, dataset, tokens = case
    kept = {n: t.clone() for n, t in model.export_state().items()}
    added = added_loss(model, stored, config, dataset)
    assert all(torch.equal(t, kept[n]) for n, t in model.export_state().items())

    starts = [8 * ((2 * i + 1) * 25 // 20) for i in range(10)]
    rows = torch.stack([tokens[s : s + 9] for s in starts])

    def losses() -> torch.Tensor:
        return torch.stack([model(row[None, :-1], row[None, 1:]) for row in rows]).double()

    before = losses()
    for name, p in model.named_parameters():
        p.copy_(dequantize(stored.tensors[name]))
    after = losses()
    assert added.before == pytest.approx(before.mean().item(), abs=1e-5)
    assert added.after == pytest.approx(after.mean().item(), abs=1e-5)
    assert added.error == pytest.approx((after - before).std().item() / 10**0.5, abs=1e-5)
    assert abs(added.after - added.before) > 1e-3, "4 bits must show for this to test"
    assert (added.tokens, added.expected) == (80, None)
    assert "80 held-out tokens" in added.line() and "expected" not in added.line()


def test_one_sequence_has_no_standard_error(case, monkeypatch) -> None:
    model, stored, config, dataset, _ = case
    monkeypatch.setattr(module, "TOKENS", 1)
    added = added_loss(model, stored, config, dataset)
    assert (added.tokens, added.error) == (8, None) and "±" not in added.line()
