"""Calibration text: where it lies in the shards, and that the model's own is reproducible."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pgolf import recipes
from pgolf.config import with_overrides
from pgolf.data.shards import write_shard
from pgolf.errors import DataError
from pgolf.model import GPT
from pgolf.quant import calibration
from pgolf.quant.calibration import calibration_tokens, generated_tokens, spread_tokens
from pgolf.ranks import Ranks

from ..model.published import PUBLISHED, small
from ..model.test_gpt_spec import randomised

TIME = 8
SIZES = (40, 3, 57)


@pytest.fixture
def shards(tmp_path):
    """Shards whose tokens are their positions in the whole text."""
    paths, start = [], 0
    for i, size in enumerate(SIZES):
        paths.append(tmp_path / f"text_train_{i:06d}.bin")
        write_shard(paths[-1], np.arange(start, start + size))
        start += size
    return paths


@pytest.mark.parametrize(("count", "span"), [(1, 5), (4, 10), (10, 9), (7, 60), (2, 100)])
def test_pieces_are_spread_evenly_over_all_shards(shards, count: int, span: int) -> None:
    pieces = spread_tokens(shards, count, span, 100)
    assert pieces.dtype == torch.int64 and pieces.shape == (count, span)
    starts = pieces[:, 0].tolist()
    total = sum(SIZES) - span + 1
    for i, (start, row) in enumerate(zip(starts, pieces.tolist(), strict=True)):
        assert row == list(range(start, start + span)), "one stretch, over shard borders too"
        assert i * total // count <= start < (i + 1) * total / count
    assert starts[0] + starts[-1] == pytest.approx(total - 1, abs=1), "in the middle of each part"


def test_damaged_or_short_shards(shards, tmp_path) -> None:
    with pytest.raises(DataError, match="hold 100 tokens, calibration needs 101 in a row"):
        spread_tokens(shards, 1, 101, 100)
    with pytest.raises(DataError, match="hold 0 tokens"):
        spread_tokens([], 1, 5, 100)
    with pytest.raises(DataError, match="token 89, expected less than the vocabulary size 80"):
        spread_tokens(shards, 4, 20, 80)
    shards[2].write_bytes(b"short")
    with pytest.raises(DataError, match="5 bytes"):
        spread_tokens(shards, 4, 20, 100)


def language_model() -> GPT:
    made = randomised(small(PUBLISHED["pr1473"]), torch.float64)
    model = GPT(made.config, torch.float64, max_length=TIME).double()
    model.load_state_dict(made.state_dict())
    return model


def own(**changes) -> torch.Tensor:
    settings = dict(count=7, length=TIME, pieces=20, temperature=0.8, seed=5, progress=False)
    return generated_tokens(language_model(), **{**settings, **changes})


def test_own_text_is_the_same_in_any_batch_and_on_any_ranks(monkeypatch) -> None:
    alone = own()
    assert alone.dtype == torch.int64 and alone.shape == (7, TIME + 1)
    assert 0 <= alone.min() and alone.max() < 20
    assert len({tuple(row) for row in alone.tolist()}) == 7
    assert torch.equal(own(count=3), alone[:3])
    assert not torch.equal(own(seed=6), alone)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "BATCH", 2)
        assert torch.equal(own(), alone)

    parts: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda t: parts.append(t.clone()))
    for rank in range(3):
        own(ranks=Ranks(rank, 3, torch.device("cpu")))
    assert torch.equal(sum(parts), alone)


def test_own_text_follows_the_model() -> None:
    """At a low temperature the text is the greedy one; at a high one it is uniform."""
    model, cold = language_model(), own(temperature=1e-6)
    with torch.no_grad():
        best = model.logits(model.features(cold[:, :-1]))[..., :20].argmax(-1)
    assert torch.equal(cold[:, 1:], best)
    first = own(count=400, length=1)[:, 0]
    assert len(first.unique()) == 20, "the first token is any piece"
    hot = own(count=400, length=1, temperature=100.0)[:, 1]
    assert torch.bincount(hot, minlength=20).min() > 4


def test_the_settings_choose(shards) -> None:
    config = with_overrides(
        recipes.get("demo").config({}),
        {"seq_len": 8, "stride": 8, "vocab_size": 100, "calibration_sequences": 4},
    )
    tokens, held_out = calibration_tokens(config, None, shards, 90, progress=False)
    spread = spread_tokens(shards, 5, 9, 100)
    assert torch.equal(tokens, spread[[0, 1, 3, 4]]) and torch.equal(held_out, spread[[2]])

    changed = {"calibration": "self", "calibration_temperature": 0.5, "seed": 3}
    config = with_overrides(config, changed)
    tokens, held_out = calibration_tokens(config, language_model(), [], 20, progress=False)
    generated = own(count=5, temperature=0.5, seed=3)
    assert torch.equal(tokens, generated[[0, 1, 3, 4]]) and torch.equal(held_out, generated[[2]])


@pytest.mark.parametrize(("asked", "held"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_an_eighth_is_held_out_and_lies_between(shards, asked: int, held: int) -> None:
    config = with_overrides(
        recipes.get("demo").config({}),
        {"seq_len": 8, "stride": 8, "vocab_size": 100, "calibration_sequences": asked},
    )
    tokens, held_out = calibration_tokens(config, None, shards, 90, progress=False)
    assert (len(tokens), len(held_out)) == (asked, held)
    starts = sorted([*tokens[:, 0].tolist(), *held_out[:, 0].tolist()])
    assert starts == spread_tokens(shards, asked + held, 9, 100)[:, 0].tolist()
