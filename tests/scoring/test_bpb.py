"""Byte accounting against the bytes of the ORIGINAL text, as exact integers.

The text: source files of the standard library (line breaks, indentation, punctuation) and a list of
awkward strings; hypothesis adds any unicode. Where the contest's tokenizers are at hand they are
checked too, against the text that they normalise to.
"""

import argparse
import difflib
import inspect
import io
import math
import textwrap

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data.shards import open_shard
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer
from pgolf.errors import DataError
from pgolf.scoring.bpb import ByteTable, bits_per_byte, changed_by, refuse_if_lossy

DOCUMENTS = [inspect.getsource(m) for m in (argparse, difflib, textwrap, inspect)]
AWKWARD = [
    "naïve café, Ærøskøbing, Füße", "日本語のテキスト。", "\U0001f469\u200d\U0001f467 \U0001f44d",
    "e\u0301\u0308 \u200b\u2060x", "a\x00b\x01c\x7f", "\t\tx\r\n\r\ny\n", "many   spaces    here ",
    "<s> </s> <unk> <0x41> \u2047", "\ufeffmark", "\ufffd\uffff\U0010ffff", "\u2585 \u2047", "\n",
    "1234567890 3.14e-7",
]  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def sp(tmp_path_factory) -> sentencepiece.SentencePieceProcessor:
    return train_tokenizer(DOCUMENTS, tmp_path_factory.mktemp("tokenizer") / "t.model", 512)


@pytest.fixture(scope="module")
def table(sp) -> ByteTable:
    return ByteTable(sp, 512)


def document_bytes(table: ByteTable, sp, text: str) -> int:
    """Bytes that the rule gives a document, BOS in front."""
    ids = np.array(sp.encode(text, add_bos=True))
    return int(table.count(ids[:-1], ids[1:]).sum())


def train_raw(texts: list[str], **options) -> sentencepiece.SentencePieceProcessor:
    """A model with options that `train_tokenizer` would not give it."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=400,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("text", DOCUMENTS + AWKWARD)
def test_bytes_are_those_of_the_original_text(sp, table, text):
    assert document_bytes(table, sp, text) == len(text.encode())
    assert sp.decode(sp.encode(text)) == text


@given(text=ANY_TEXT)
@settings(max_examples=500)
def test_bytes_of_any_text_with_the_two_named_exceptions(sp, table, text):
    free = text.startswith((" ", "\u2581"))
    expected = len(text.encode()) - 2 * text.count("\u2581") - free
    assert document_bytes(table, sp, text) == expected
    assert sp.decode(sp.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize(
    ("text", "lost"),
    [(" leading", 1), ("   three", 1), ("a\u2581b", 2), ("\u2581a", 3), (" \u2581", 3), (" ", 1)],
)
def test_the_two_exceptions_of_the_rule(sp, table, text, lost):
    assert document_bytes(table, sp, text) == len(text.encode()) - lost


def test_the_table_is_the_rule(sp):
    table = ByteTable(sp, 600)
    byte, space_word = sp.piece_to_id("<0xE2>"), sp.piece_to_id("▁the")
    assert not sp.is_unknown(space_word)
    for control in (0, 1, 2, 3, 512, 599):
        assert (table.base[control], table.leading[control], table.boundary[control]) == (0, 0, 1)
    assert (table.base[byte], table.leading[byte], table.boundary[byte]) == (1, 0, 0)
    assert (table.base[space_word], table.leading[space_word]) == (3, 1)
    assert not table.boundary[space_word]
    # the space counts after a piece, after a byte, not after BOS or an id beyond the tokenizer
    previous = np.array([space_word, byte, 1, 599], np.uint16)
    counted = table.count(previous, np.full(4, space_word, np.uint16))
    assert counted.tolist() == [4, 4, 3, 3]
    assert counted.dtype == np.int64
    # a model may have fewer ids than the tokenizer
    assert ByteTable(sp, 100).base[space_word] == 3
    # BOS as a target has no bytes
    assert table.count(np.array([space_word]), np.array([1])).tolist() == [0]


def test_a_stream_counts_like_its_documents(sp, table):
    """Documents one after another: BOS between them keeps them apart."""
    stream = np.concatenate([sp.encode(text, add_bos=True) for text in DOCUMENTS + AWKWARD])
    total = int(table.count(stream[:-1], stream[1:]).sum())
    assert total == sum(len(text.encode()) for text in DOCUMENTS + AWKWARD)


def test_bits_per_byte():
    assert bits_per_byte(math.log(2.0) * 24, 12) == pytest.approx(2.0, abs=1e-15)
    # the contest's form: mean loss / ln 2 times tokens per byte
    assert bits_per_byte(1.5 * 1000, 2436) == pytest.approx(1.5 / math.log(2) * 1000 / 2436)
    with pytest.raises(DataError, match="0 bytes scored"):
        bits_per_byte(1.0, 0)


def test_no_byte_fallback_is_refused():
    model = train_raw(DOCUMENTS, byte_fallback=False)
    for refuse in (refuse_if_lossy, lambda m: ByteTable(m, 400)):
        with pytest.raises(DataError, match="lacks 256 of the 256 byte-fallback pieces.*<unk>"):
            refuse(model)


def test_no_piece_for_a_space_is_refused():
    model = train_raw([text.replace(" ", "") for text in DOCUMENTS], byte_fallback=True,
                      normalization_rule_name="identity", add_dummy_prefix=False,
                      character_coverage=0.99)  # fmt: skip
    assert "<0xE2>" in model.encode("a b", out_type=str)
    with pytest.raises(DataError, match="no piece for a lone space"):
        refuse_if_lossy(model)


def test_spaces_inside_pieces_are_refused():
    model = train_raw([*DOCUMENTS, "of the\n" * 2000], byte_fallback=True,
                      split_by_whitespace=False, character_coverage=0.99)  # fmt: skip
    with pytest.raises(DataError, match="pieces with a space inside"):
        refuse_if_lossy(model)


def test_changed_by_names_what_normalisation_changes(sp):
    assert changed_by(sp) == []
    model = train_raw(DOCUMENTS, byte_fallback=True, normalization_rule_name="nmt_nfkc_cf",
                      character_coverage=0.99)  # fmt: skip
    refuse_if_lossy(model)
    changed = changed_by(model)
    assert "line breaks" in changed and "compatibility characters" in changed
    assert "capital letters" in changed


@pytest.mark.parametrize("name", ["fineweb_1024_bpe.model", "fineweb_8192_bpe.model"])
def test_contest_tokenizers_count_their_normalised_text(shared_data, name):
    sp = load_tokenizer(shared_data / "tokenizers" / name)
    table = ByteTable(sp, sp.get_piece_size())
    assert "line breaks" in changed_by(sp) and "capital letters" not in changed_by(sp)
    lines = (shared_data / "fineweb_edu_1MB" / "text.txt").read_text().split("\n")
    for text in DOCUMENTS + AWKWARD + lines:
        assert document_bytes(table, sp, text) == len(sp.decode(sp.encode(text)).encode())
        # one line with single spaces is given back as it is, so these are the ORIGINAL bytes
        if text.isascii() and text.isprintable() and text == " ".join(text.split()):
            assert document_bytes(table, sp, text) == len(text.encode())


def test_contest_shards_count_the_bytes_of_their_text(shared_data):
    sp = load_tokenizer(shared_data / "tokenizers" / "fineweb_1024_bpe.model")
    table = ByteTable(sp, 1024)
    total = 0
    for split, tokens in (("train", 369_579), ("val", 41_066)):
        shard = open_shard(shared_data / "fineweb_edu_1MB" / f"fineweb_{split}_000000.bin", 1024)
        assert shard.size == tokens
        ids = np.asarray(shard, np.int64)
        documents = np.split(ids, np.flatnonzero(ids == 1))
        text = [sp.decode(document.tolist()) for document in documents]
        counted = int(table.count(ids[:-1], ids[1:]).sum()) + int(table.base[ids[0]])
        assert counted == sum(len(t.encode()) for t in text)
        total += counted
    # the original text has 30 bytes more: what the contest's normalisation takes away
    original = (shared_data / "fineweb_edu_1MB" / "text.txt").read_text()
    assert total == len(sp.decode(sp.encode(original)).encode()) == len(original.encode()) - 30


def test_look_alike_without_byte_fallback_is_refused(shared_data):
    with pytest.raises(DataError, match="byte-fallback"):
        refuse_if_lossy(load_tokenizer(shared_data / "negative" / "no_byte_fallback_1024.model"))
