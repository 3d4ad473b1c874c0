"""Bits per byte: how many bytes of text a scored token stands for, by the contest's rule.

n = number of (previous, target) pairs, V = table size = max(tokenizer's, model's vocabulary).

    bytes(target) = base[target] + (leading[target] and not boundary[previous])

- control, unknown and unused ids: base 0, and a boundary (so BOS costs loss but has no bytes);
- a byte-fallback id: base 1;
- every other piece: `leading` if it starts with U+2581 (SentencePiece's space), base = the UTF-8
  length of what follows.

For a tokenizer that keeps its text as it is, the bytes of a document equal the bytes of the
original text, with two exceptions that lie in the rule: a leading space of a document (after BOS)
counts 0, and a literal U+2581, which SentencePiece cannot tell from a space, counts 1, not 3.
A tokenizer that normalises (the contest's own: nmt_nfkc, line breaks and runs of spaces become one
space) is scored on the bytes of the NORMALISED text; that is the contest's rule, so it is allowed,
and `changed_by` says what it changes. BPB is only comparable for one text and one normalisation.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np

from pgolf.errors import DataError

SPACE = "\u2581"

# Of the first tokens of a text, how many are tokenised again, which share of the neighbouring pairs
# must come back, and how many pairs may be missing besides.
_CHECKED, _REPRODUCED, _AT_THE_ENDS = 8192, 0.99, 8

_PROBES = {
    "line breaks": "a\nb\r\nc",
    "tabs": "a\tb",
    "runs of spaces": "a  b",
    "spaces at the ends": " a ",
    "compatibility characters": "\ufb01 \uff21",
    "combining accents": "e\u0301",
    "control and zero-width characters": "a\x01b\u200bc\u2060d",
    "capital letters": "Aa",
}


def refuse_if_lossy(sp: Any) -> None:
    """Refuse a SentencePiece model whose bytes per token cannot be counted.

    Raises:
        DataError: it has no full byte fallback (characters outside of its vocabulary become
            <unk>, which stands for 0 bytes), no piece for a lone space, or pieces with a space
            inside (which the rule counts as 3 bytes).
    """
    ids = range(sp.get_piece_size())
    fallback = {sp.id_to_piece(i) for i in ids if sp.is_byte(i)}
    missing = 256 - len(fallback & {f"<0x{b:02X}>" for b in range(256)})
    if missing:
        raise DataError(
            f"the tokenizer lacks {missing} of the 256 byte-fallback pieces: a character outside "
            "of its vocabulary becomes <unk> and its bytes are lost, so BPB would be wrong; "
            "use a model trained with byte_fallback (`pgolf data prepare` trains one)"
        )
    if sp.is_unknown(sp.piece_to_id(SPACE)):
        raise DataError(
            "the tokenizer has no piece for a lone space (U+2581): a space would be counted as the "
            "3 bytes of that character, so BPB would be wrong; train it with U+2581 among its "
            "required characters (`pgolf data prepare` does)"
        )
    inside = [sp.id_to_piece(i) for i in ids if SPACE in sp.id_to_piece(i)[1:]]
    if inside:
        raise DataError(
            f"the tokenizer has {len(inside)} pieces with a space inside, such as {inside[0]!r}: "
            "the contest's rule would count 3 bytes for that space, so BPB would be wrong; "
            "use a model trained with split_by_whitespace"
        )


def pairs_lost(sp: Any, tokens: np.ndarray) -> tuple[int, int]:
    """Of the pairs of neighbouring pieces in a text, how many are lost when it is tokenised again.

    Args:
        sp: a SentencePieceProcessor.
        tokens: ids of its pieces (N,), as they follow one another in shards.

    Returns:
        the lost pairs and all pairs, both up to N - 1.
    """
    documents: list[list[int]] = [[]]
    for i in np.asarray(tokens).tolist():
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            documents.append([])
        else:
            documents[-1].append(i)
    documents = [ids for ids in documents if ids]
    stored, again = (
        Counter(pair for ids in lists for pair in pairwise(ids))
        for lists in (documents, sp.encode(sp.decode(documents)))
    )
    return (stored - again).total(), stored.total()


def refuse_if_foreign(sp: Any, tokens: np.ndarray, tokenizer: Any, shards: Any) -> None:
    """Refuse a SentencePiece model that did not make these tokens; their first 8192 are looked at.

    The right model gives all pairs of pieces back. A wrong one of the same size reads another text
    in them, which it tokenises otherwise: at most 97.2 % came back in all that was measured.

    Args:
        sp, tokens: as for `pairs_lost`.
        tokenizer, shards: the files that they come from, for the message.

    Raises:
        DataError: fewer than 99 % of the pairs come back.
    """
    lost, total = pairs_lost(sp, tokens[:_CHECKED])
    # what the ends cut, in the middle of a word or character, need not come back
    if lost > (1 - _REPRODUCED) * total + _AT_THE_ENDS:
        raise DataError(
            f"the tokenizer {tokenizer} did not make the tokens in {shards}: it gives back "
            f"{1 - lost / total:.1%} of the pairs of pieces at their beginning, expected "
            f"{_REPRODUCED:.0%} or more, so BPB would be wrong; name the one that made them with "
            "tokenizer=FILE (--tokenizer FILE)"
        )


def changed_by(sp: Any) -> list[str]:
    """Names of what the tokenizer changes in a text; empty if it keeps the text."""
    return [name for name, text in _PROBES.items() if sp.decode(sp.encode(text)) != text]


class ByteTable:
    """The bytes of each token for one tokenizer.

    Args:
        sp: a SentencePieceProcessor.
        vocab_size: the model's vocabulary; ids beyond the tokenizer's count as control ids.

    Raises:
        DataError: the tokenizer loses bytes, see `refuse_if_lossy`.
    """

    def __init__(self, sp: Any, vocab_size: int):
        refuse_if_lossy(sp)
        size = max(sp.get_piece_size(), vocab_size)
        self.base = np.zeros(size, np.int64)  # (V,)
        self.leading = np.zeros(size, bool)  # (V,)
        self.boundary = np.ones(size, bool)  # (V,)
        for i in range(sp.get_piece_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            self.boundary[i] = False
            piece = sp.id_to_piece(i)
            self.leading[i] = not sp.is_byte(i) and piece.startswith(SPACE)
            self.base[i] = 1 if sp.is_byte(i) else len(piece.removeprefix(SPACE).encode())

    def count(self, prev_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Bytes of each target, int64 of the ids' shape (n,)."""
        return self.base[target_ids] + (self.leading[target_ids] & ~self.boundary[prev_ids])


def bits_per_byte(nll_sum: float, byte_count: int) -> float:
    """Sum of the targets' negative log-likelihoods (nats, float64) over the bytes they stand for.

    Raises:
        DataError: there are no bytes to divide by.
    """
    if byte_count <= 0:
        raise DataError(f"{byte_count} bytes scored: bits per byte needs at least one byte of text")
    return float(nll_sum) / math.log(2.0) / int(byte_count)
