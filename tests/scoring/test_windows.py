"""Every target is scored once, with the context that is promised, and sums add up.

N = targets, L = window length.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.config import Config, with_overrides
from pgolf.errors import DataError
from pgolf.model import GPT
from pgolf.ranks import Ranks
from pgolf.scoring.windows import Sums, evaluate, windows


def counts(targets: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each target is scored, and the context it is scored with."""
    size, starts, scored = windows(targets, length, stride)
    times, context = np.zeros(targets, int), np.zeros(targets, int)
    for start, n in zip(starts, scored, strict=True):
        assert 0 <= start and start + size <= targets
        for offset in range(size - n, size):
            times[start + offset] += 1
            context[start + offset] = offset + 1
    return times, context


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 400), st.integers(1, 64), st.data())
def test_every_target_is_scored_once_with_full_context(targets, length, data):
    stride = data.draw(st.integers(1, length))
    times, context = counts(targets, length, stride)
    assert (times == 1).all()
    first = min(length, targets)
    assert (context[:first] == np.arange(1, first + 1)).all()
    assert (context[first:] >= length - stride + 1).all()


def test_contest_windows():
    """At the contest's validation size: 969,057 windows, none beyond the end."""
    size, starts, scored = windows(62_021_632, 2048, 64)
    assert size == 2048 and len(starts) == 969_057
    assert starts[-1] + 2048 == 62_021_632
    assert scored[0] == 2048 and (scored[1:] == 64).all()


def test_last_window_is_anchored_at_the_end():
    size, starts, scored = windows(10, 4, 3)
    assert size == 4 and starts.tolist() == [0, 3, 6] and scored.tolist() == [4, 3, 3]
    size, starts, scored = windows(12, 4, 3)
    assert starts.tolist() == [0, 3, 6, 8] and scored.tolist() == [4, 3, 3, 2]


@pytest.mark.parametrize(("targets", "length", "stride"), [(0, 4, 1), (8, 4, 5), (8, 4, 0)])
def test_impossible_windows(targets, length, stride):
    with pytest.raises(DataError, match="stride"):
        windows(targets, length, stride)


class CountingTable:
    """One byte a target."""

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        return np.ones_like(target)


class Remembering(torch.nn.Module):
    """The loss of target i is i; the stream is 0, 1, 2, ..., so a target is its own index + 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def most_documents(self, time):
        return 0

    def forward(self, ids, targets, last):
        assert (targets == ids + 1).all()
        self.seen += targets[:, -last:].flatten().tolist()
        return targets[:, -last:].double() - 1


@pytest.mark.parametrize(
    ("n", "length", "stride"), [(200, 16, 5), (64, 64, 64), (30, 64, 8), (97, 8, 8)]
)
@pytest.mark.parametrize("world", [1, 3])
def test_sums_over_batches_and_ranks(n, length, stride, world):
    model = Remembering()
    total = Sums()
    for rank in range(world):
        ranks = Ranks(rank, world, torch.device("cpu"))
        part = evaluate(model, np.arange(n + 1), CountingTable(), length, stride, 50, ranks)
        total = Sums(total.nll + part.nll, total.targets + part.targets, total.bytes + part.bytes)
    assert sorted(model.seen) == list(range(1, n + 1))
    assert total.nll == n * (n - 1) / 2 and total.targets == total.bytes == n


def test_against_one_window_at_a_time():
    """A real model: batched windows give what a plain loop over targets gives."""
    torch.manual_seed(0)
    config = with_overrides(
        Config(),
        dict(
            vocab_size=32,
            layers=2,
            dim=16,
            heads=2,
            kv_heads=1,
            mlp_hidden=32,
            rope_dims=4,
            table_dtype="fp32",
        ),
    ).model
    model = GPT(config, max_length=12)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    tokens = np.random.default_rng(0).integers(0, 32, 42)
    length, stride = 12, 5
    expected = 0.0
    _, context = counts(41, length, stride)
    with torch.no_grad():
        for i in range(41):
            ids = torch.tensor(tokens[i + 1 - context[i] : i + 1])[None]
            loss = model(ids, torch.tensor(tokens[i + 2 - context[i] : i + 2])[None], last=1)
            expected += loss.item()
    sums = evaluate(model, tokens, CountingTable(), length, stride, 36)
    assert sums.nll == pytest.approx(expected, rel=1e-5)
