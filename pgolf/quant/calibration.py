"""The text that Hessians are computed on: parts of the training shards, or the model's own text.

Self-generated text needs no data at all (PR 1019): N sequences with a first token drawn uniformly
from the tokenizer's pieces, the others from the model at temperature 0.8.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import Config
from pgolf.data.shards import open_shard, read_header
from pgolf.errors import DataError
from pgolf.model import GPT
from pgolf.model.decode import generate
from pgolf.model.frozen import frozen_copy
from pgolf.ranks import ALONE, Ranks

BATCH = 64  # sequences that are generated together
CHECKED = 8  # for so many calibration sequences, one more is held out, to judge by


def calibration_tokens(
    config: Config,
    model: GPT,
    shards: Sequence[Path],
    pieces: int,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sequences for `hessians.collect`, as `config.quant.calibration` says, on every rank.

    Args:
        model: with the weights that will be quantised, for calibration=self.
        shards: of training text, for calibration=train.
        pieces: size of the tokenizer, for calibration=self.
        ranks: share the work; the tokens do not depend on their number.
        progress: whether to show how long generation takes.

    Returns:
        (calibration_sequences, seq_len + 1) int64 on the CPU, and an eighth as many (at least one)
        that are held out and lie between those. In shards with less text they overlap.

    Raises:
        DataError: the shards are damaged, or hold less than one sequence.
    """
    quant, length = config.quant, config.data.seq_len
    checks = -(-quant.calibration_sequences // CHECKED)
    count = quant.calibration_sequences + checks
    if quant.calibration == "train":
        tokens = spread_tokens(shards, count, length + 1, config.model.vocab_size)
    else:
        tokens = generated_tokens(
            model, count, length, pieces, quant.calibration_temperature, config.run.seed, ranks,
            progress,
        )  # fmt: skip
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[[(2 * i + 1) * count // (2 * checks) for i in range(checks)]] = True
    return tokens[~held_out], tokens[held_out]


def spread_tokens(shards: Sequence[Path], count: int, span: int, vocab_size: int) -> Tensor:
    """Pieces of `span` tokens at equal distances over all shards: (count, span) int64.

    They overlap where the shards hold less than all of them.

    Raises:
        DataError: no shards, or damaged ones, a token that the vocabulary does not have, or less
            than `span` tokens in all.
    """
    ends = np.cumsum([read_header(path) for path in shards])
    total = int(ends[-1]) if len(ends) else 0
    if total < span:
        raise DataError(
            f"the training shards hold {total} tokens, calibration needs {span} in a row: prepare "
            "more text, use a shorter sequence, or calibration=self"
        )
    out = np.empty((count, span), np.int64)
    for i, row in enumerate(out):
        at, filled = (2 * i + 1) * (total - span + 1) // (2 * count), 0
        while filled < span:  # a piece may run on into the next shards
            index = int(np.searchsorted(ends, at, side="right"))
            # Only what is used is checked: reading whole shards would take longer than all else.
            shard = open_shard(shards[index], None)
            start = at - (int(ends[index]) - shard.size)
            piece = shard[start : start + span - filled]
            row[filled : filled + piece.size] = piece
            at, filled = at + piece.size, filled + piece.size
    if int(out.max()) >= vocab_size:
        raise DataError(
            f"the training shards hold token {out.max()}, expected less than the vocabulary size "
            f"{vocab_size}: use the tokenizer that lies with them"
        )
    return torch.from_numpy(out)


def generated_tokens(
    model: GPT,
    count: int,
    length: int,
    pieces: int,
    temperature: float,
    seed: int,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> Tensor:
    """Sequences by the model itself, (count, length + 1) int64 on the CPU.

    Sequence i is drawn with random numbers of its own, so it is the same in any batch and on any
    number of ranks, unless a number falls within the rounding of a matmul of a token's border.
    """
    model, device = frozen_copy(model, ops=model.ops), model.rope_cos.device
    own = ranks.part(count)
    tokens = torch.zeros((count, length + 1), dtype=torch.int64, device=device)
    for start in range(own.start, own.stop, BATCH):
        rows = range(start, min(start + BATCH, own.stop))
        chances = np.stack([_chances(seed, row, length + 1) for row in rows])
        chances = torch.from_numpy(chances).to(device)
        tokens[rows.start : rows.stop] = generate(
            model, (chances[:, :1] * pieces).long(), length, length, pieces, temperature,
            chances[:, 1:],
            f"generating {rows.start}-{rows.stop} of {own.start}-{own.stop}" if progress else "",
        )  # fmt: skip
    if ranks.world > 1:
        dist.all_reduce(tokens)  # every row is zero on all ranks but one
    return tokens.cpu()


def _chances(seed: int, sequence: int, count: int) -> np.ndarray:
    """`count` numbers of a sequence's own, uniform in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=[seed, sequence])).random(count)
