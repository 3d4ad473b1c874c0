"""The loader against the rule written out over one array in memory."""

import numpy as np
import pytest

from pgolf.data.loader import SequentialLoader
from pgolf.data.shards import find_shards, write_shard
from pgolf.errors import ConfigError, DataError

SIZES = (37, 5, 64, 1)
TOTAL = sum(SIZES)


@pytest.fixture
def paths(tmp_path):
    for i, end in enumerate(np.cumsum(SIZES)):
        write_shard(tmp_path / f"t_train_{i:06d}.bin", np.arange(end - SIZES[i], end))
    return find_shards(tmp_path, "train")


class NaiveStream:
    """The shards end to end and over again; each micro-step takes `count` tokens in a row."""

    def __init__(self):
        self.left: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self.left) < count:
            self.left += range(TOTAL)
        taken, self.left = self.left[:count], self.left[count:]
        return taken


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize(("local", "seq"), [(8, 4), (12, 12), (40, 8), (120, 8)])
def test_against_the_rule(paths, world, local, seq):
    """Steps within a shard, across borders, around the end, and longer than all shards together."""
    loaders = [SequentialLoader(paths, rank, world, TOTAL) for rank in range(world)]
    stream = NaiveStream()
    for _ in range(12):
        taken = np.array(stream.take(world * (local + 1))).reshape(world, local + 1)
        for loader, mine in zip(loaders, taken, strict=True):
            x, y = loader.next_batch(local, seq)
            assert x.shape == y.shape == (local // seq, seq)
            assert str(x.dtype) == str(y.dtype) == "torch.int64" and x.device.type == "cpu"
            assert x.flatten().tolist() == mine[:-1].tolist()
            assert y.flatten().tolist() == mine[1:].tolist()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_and_accumulation_see_the_same_tokens(paths, world):
    """One step of `world` ranks is `world` micro-steps of one rank."""
    ranks = [SequentialLoader(paths, rank, world, TOTAL) for rank in range(world)]
    alone = SequentialLoader(paths, 0, 1, TOTAL)
    for _ in range(5):
        for loader in ranks:
            x, y = loader.next_batch(16, 8)
            x1, y1 = alone.next_batch(16, 8)
            assert x.equal(x1) and y.equal(y1)
    assert ranks[0].state_dict() == ranks[-1].state_dict() == alone.state_dict()


def test_resume_goes_on_where_it_stopped_in_any_world(paths):
    loader = SequentialLoader(paths, 0, 1, TOTAL)
    for _ in range(7):
        loader.next_batch(24, 8)
    state = loader.state_dict()
    expected = [loader.next_batch(24, 8) for _ in range(4)]
    for world in (1, 2, 4):
        ranks = [SequentialLoader(paths, rank, world, TOTAL) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        for i, (x, y) in enumerate(expected):
            x1, y1 = ranks[i % world].next_batch(24, 8)
            assert x.equal(x1) and y.equal(y1)


def test_resume_with_other_shards_is_refused(paths):
    state = SequentialLoader(paths, 0, 1, TOTAL).state_dict()
    with pytest.raises(DataError, match=f"{TOTAL} tokens, the shards here hold {TOTAL - 1}"):
        SequentialLoader(paths[:-1], 0, 1, TOTAL).load_state_dict(state)


def test_batches_are_independent_copies(paths):
    loader = SequentialLoader(paths, 0, 1, TOTAL)
    x, _ = loader.next_batch(8, 8)
    x.zero_()
    loader.load_state_dict({"position": 0, "total": TOTAL})
    assert loader.next_batch(8, 8)[0].tolist() == [list(range(8))]


def test_bad_arguments(paths):
    with pytest.raises(ConfigError, match="10 tokens .* sequence length 4"):
        SequentialLoader(paths, 0, 1, TOTAL).next_batch(10, 4)
    with pytest.raises(ConfigError, match="rank 2"):
        SequentialLoader(paths, 2, 2, TOTAL)
    with pytest.raises(DataError, match="no training shards"):
        SequentialLoader([], 0, 1, TOTAL)


def test_bad_shards(paths):
    with pytest.raises(DataError, match="token 41 at position 4, .* size 41"):
        SequentialLoader(paths, 0, 1, 41).next_batch(40, 8)
    short = paths[2].read_bytes()[:-2]
    paths[2].unlink()  # a new file: the loader above may still be reading the old one
    paths[2].write_bytes(short)
    with pytest.raises(DataError, match="t_train_000002.bin: 1150 bytes, expected 1152"):
        SequentialLoader(paths, 0, 1, TOTAL)
