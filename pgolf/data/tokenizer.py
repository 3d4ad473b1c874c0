"""SentencePiece tokenizers: load one, or train a BPE that keeps every byte of its text.

The trained kind: byte fallback for all 256 bytes, no normalisation, no dummy prefix, spaces kept,
digits apart, ids pad/bos/eos/unk = 0/1/2/3 like the contest's. A line break is a character like any
other: a piece if it is frequent, else the byte <0x0A>.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from pgolf.errors import ConfigError, DataError
from pgolf.files import atomic_write
from pgolf.scoring.bpb import SPACE

TRAIN_BYTES = 10_000_000
MIN_VOCAB, MAX_VOCAB = 300, 65536

_FIXED_PIECES = 4 + 256
# Characters beyond this share of the text are spelt in bytes. Measured on 4.6 MB of English
# encyclopedia text with 1,024 pieces: 0.999 gives 2.520 bytes a token, 0.9995 2.508, 1.0 1.962.
_COVERAGE = 0.999
# SentencePiece packs positions in a word into 16 bits and drops long sentences, so it gets chunks.
_CHUNK = 2048
# The trainer's own stand-in for a rare character: a sentence that holds it would be skipped.
_TRAINER_UNKNOWN = "\u2585"
# Not a character to the trainer: it ends a word, so nothing is merged across it.
_GAP = "\0"


def load_tokenizer(path: Path | str) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model.

    Raises:
        DataError: the file is missing, or is not a SentencePiece model.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise DataError(
            f"cannot read tokenizer {path} ({e.strerror}); give a SentencePiece .model file, "
            "or let `pgolf data prepare` train one"
        ) from e
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(content)
    except RuntimeError as e:
        raise DataError(
            f"{path} ({len(content)} bytes) is not a SentencePiece model; give a .model file "
            "made by SentencePiece, or let `pgolf data prepare` train one"
        ) from e
    return sp


def train_tokenizer(
    texts: Iterable[str],
    path: Path | str,
    vocab_size: int = 1024,
    max_bytes: int = TRAIN_BYTES,
) -> sentencepiece.SentencePieceProcessor:
    """Train a BPE on `texts` and write it to `path`; the same texts give the same file.

    Args:
        texts: documents; the first `max_bytes` bytes (UTF-8) of them are used.
        path: where the .model file goes.
        vocab_size: number of pieces, of which 260 are control and byte pieces.
        max_bytes: more text hardly changes a small vocabulary.

    Raises:
        ConfigError: a vocabulary size that cannot be.
        DataError: too little text for so many pieces.
        StorageError: the model could not be written.
    """
    check_vocab_size(vocab_size)
    chunks = list(_chunks(texts, max_bytes))
    characters = _frequent(chunks, vocab_size)
    if not characters:
        raise DataError("no text to train a tokenizer on: every training document is empty")
    rare = re.compile(f"[^{re.escape(''.join(characters))}]")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(rare.sub(_GAP, chunk) for chunk in chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            # the byte accounting needs a piece for a lone space even if the text has none
            required_chars=SPACE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=4 * _CHUNK,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        limit = re.search(r"<= (\d+)", str(e))
        if "too high" not in str(e) or not limit:
            raise
        most = int(limit[1])
        remedy = f"at most {most}" if most >= MIN_VOCAB else "more text"
        raise DataError(
            f"{sum(map(len, chunks))} characters of training text are too few for a vocabulary of "
            f"{vocab_size} pieces, they give {most}: use {remedy}"
        ) from e
    atomic_write(path, model.getvalue())
    return load_tokenizer(path)


def check_vocab_size(vocab_size: int) -> None:
    """Raise ConfigError for a vocabulary size that no tokenizer of ours can have."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise ConfigError(f"vocabulary size {vocab_size} is not in {MIN_VOCAB}..{MAX_VOCAB}")


def _chunks(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The texts in pieces of at most _CHUNK characters, `max_bytes` in all."""
    left = max_bytes
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK]
            yield chunk
            left -= len(chunk.encode())
            if left <= 0:
                return


def _frequent(chunks: list[str], vocab_size: int) -> list[str]:
    """The characters worth a piece: the most frequent ones, at most half of the free pieces."""
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk)
    for reserved in (_GAP, _TRAINER_UNKNOWN):
        del counts[reserved]
    most = (vocab_size - _FIXED_PIECES) // 2
    chosen, total, covered = [], counts.total(), 0
    # ties by code point, so that the choice does not depend on the order of the texts
    for char, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]:
        if covered >= _COVERAGE * total:
            break
        chosen.append(char)
        covered += n
    return chosen
