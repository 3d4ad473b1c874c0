"""Prepared folders: every byte accounted for, the split by hash, the manifest, refusals."""

import hashlib
import json
import random

import numpy as np
import pytest

from pgolf.data import encode
from pgolf.data import prepare as prepare_module
from pgolf.data.encode import Encoder, SplitStats
from pgolf.data.manifest import Dataset
from pgolf.data.prepare import prepare
from pgolf.data.readers import Document, TextSource
from pgolf.data.shards import BOS_ID, open_shard
from pgolf.data.tokenizer import load_tokenizer
from pgolf.errors import ConfigError, DataError
from pgolf.scoring.bpb import ByteTable


class Texts:
    """A source in memory."""

    def __init__(self, texts):
        self.texts = list(texts)
        self.size = sum(len(t.encode()) for t in self.texts)

    def __iter__(self):
        return (Document(text, f"text {i}") for i, text in enumerate(self.texts))


@pytest.fixture(scope="session")
def paragraphs(documents) -> list[str]:
    """Some 190 different documents, a few of them awkward."""
    paragraphs = [p for text in documents for p in text.split("\n\n    def ") if len(p) > 20]
    extra = [
        " leads",
        "\u2581 odd \u2581",
        "naïve 👍🏽\r\n\t",
        "\n",
        " ",
        "a  b\0c",
        "日本語",
        "e\u0301",
    ]
    return sorted(set(paragraphs)) + extra


def decoded(dataset: Dataset, split: str) -> list[str]:
    """The documents that lie in a split's shards, read as one stream."""
    shards = dataset.train_shards if split == "train" else dataset.val_shards
    tokens = np.concatenate([open_shard(p, dataset.vocab_size) for p in shards]).astype(int)
    assert tokens[0] == BOS_ID
    sp = load_tokenizer(dataset.tokenizer_path)
    return [sp.decode(d.tolist()) for d in np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])]


def in_val(text: str, fraction: float) -> bool:
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return key < fraction * 2**64


def test_every_byte_comes_back_and_is_counted(paragraphs, tmp_path):
    dataset = prepare(Texts(paragraphs), tmp_path / "d", "mine", vocab_size=512, license="CC0",
                      val_fraction=0.3, shard_tokens=20_000)  # fmt: skip
    table = ByteTable(load_tokenizer(dataset.tokenizer_path), 512)
    assert dataset.corpus == "mine" and dataset.vocab_size == 512
    assert len(dataset.train_shards) > 2
    for split, shards in (("train", dataset.train_shards), ("val", dataset.val_shards)):
        expected = [p for p in paragraphs if in_val(p, 0.3) == (split == "val")]
        texts = decoded(dataset, split)
        assert sorted(texts) == sorted(p.replace("\u2581", " ") for p in expected)
        stated = dataset.manifest["splits"][split]
        tokens = np.concatenate([open_shard(p, 512) for p in shards])
        assert stated["tokens"] == tokens.size == sum(s["tokens"] for s in stated["shards"])
        assert stated["documents"] == len(expected)
        assert stated["bytes"] == sum(len(p.encode()) for p in expected)
        assert stated["bytes_scored"] == table.count(tokens[:-1], tokens[1:]).sum()
        # the two named exceptions are all that is between them
        assert stated["leading_spaces"] == sum(p[0] in " \u2581" for p in expected)
        assert stated["literal_u2581"] == sum(p.count("\u2581") for p in expected)
        lost = stated["leading_spaces"] + 2 * stated["literal_u2581"]
        assert stated["bytes"] - stated["bytes_scored"] == lost
        assert stated["documents_changed"] == 0
        for path, entry in zip(shards, stated["shards"], strict=True):
            assert path.name == entry["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert all(open_shard(p, 512).size == 20_000 for p in dataset.train_shards[:-1])
    text = "".join(paragraphs).encode()
    assert dataset.sha256 == hashlib.sha256(text).hexdigest()
    assert dataset.manifest["license"] == "CC0"
    assert dataset.manifest["tokenizer_changes"] == []
    dataset.verify()


def test_split_and_order_depend_on_the_text_alone(paragraphs, tmp_path):
    """Another order of reading gives the same documents in the same order."""
    prepared = prepare(Texts(paragraphs), tmp_path / "a", "x", vocab_size=400, val_fraction=0.2)
    shuffled = paragraphs[:]
    random.Random(1).shuffle(shuffled)
    other = prepare(Texts(shuffled), tmp_path / "b", "x", vocab_size=400, val_fraction=0.2)
    for split in ("train", "val"):
        assert decoded(prepared, split) == decoded(other, split)
    first = [p.replace("\u2581", " ") for p in paragraphs if not in_val(p, 0.2)]
    assert decoded(prepared, "train") != first, "shuffled"


def test_the_same_text_gives_the_same_bytes(paragraphs, tmp_path):
    for name in ("a", "b"):
        prepare(Texts(paragraphs), tmp_path / name, "x", vocab_size=400)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    shards = ["x_train_000000.bin", "x_val_000000.bin"]
    assert files == ["manifest.json", "tokenizer.model", "val_documents.bin", *shards]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_tokenizer_sees_training_documents_only(paragraphs, tmp_path, monkeypatch):
    seen = []
    train = prepare_module.train_tokenizer

    def spy(texts, *args, **options):
        seen.extend(texts)
        return train(seen, *args, **options)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    prepare(Texts(paragraphs), tmp_path / "a", "x", vocab_size=400, val_fraction=0.5)
    assert seen == [p for p in paragraphs if not in_val(p, 0.5)]
    seen.clear()
    monkeypatch.setattr(prepare_module, "TRAIN_BYTES", 40_000)
    prepare(Texts(paragraphs), tmp_path / "b", "x", vocab_size=400, val_fraction=0.5)
    assert 40_000 <= sum(len(t.encode()) for t in seen) < 41_000, "a sample of a large corpus"
    assert len(seen) == sum(not in_val(p, 0.5) for p in paragraphs)


def test_one_text_file_has_the_sha256_of_the_file(documents, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(documents))
    dataset = prepare(TextSource([book]), tmp_path / "d", "book", vocab_size=400)
    assert dataset.sha256 == hashlib.sha256(book.read_bytes()).hexdigest()


def test_a_normalising_tokenizer_is_used_and_its_losses_are_stated(
    paragraphs, tmp_path, shared_data
):
    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    sp = load_tokenizer(model)
    dataset = prepare(Texts(paragraphs), tmp_path / "d", "x", tokenizer=model)
    assert dataset.tokenizer_path.read_bytes() == model.read_bytes()
    assert "line breaks" in dataset.manifest["tokenizer_changes"]
    for split in ("train", "val"):
        texts = [p for p in paragraphs if in_val(p, 0.1) == (split == "val")]
        stated = dataset.manifest["splits"][split]
        kept = [sp.decode(sp.encode(p)) for p in texts]
        assert stated["bytes"] == sum(len(p.encode()) for p in texts)
        assert stated["bytes_scored"] == sum(len(k.encode()) for k in kept) < stated["bytes"]
        changed = sum(k != p.replace("\u2581", " ") for k, p in zip(kept, texts, strict=True))
        assert stated["documents_changed"] == changed > 0


def test_a_tokenizer_that_loses_bytes_is_refused(paragraphs, tmp_path, shared_data):
    model = shared_data / "negative" / "no_byte_fallback_1024.model"
    with pytest.raises(DataError, match="no_byte_fallback_1024.model: .*byte-fallback"):
        prepare(Texts(paragraphs), tmp_path / "d", "x", tokenizer=model)
    assert not list(tmp_path.iterdir())


class FaultyTokenizer:
    """Passes on a tokenizer, but decodes something else."""

    def __init__(self, sp, spoil):
        self.sp, self.spoil = sp, spoil

    def __getattr__(self, name):
        return getattr(self.sp, name)

    def decode(self, ids):
        return [self.spoil(text) for text in self.sp.decode(ids)]


@pytest.mark.parametrize(
    ("spoil", "may_change", "message"),
    [
        (lambda t: t.replace("bad", "BAD"), False, "text 1: decoding its tokens does not give"),
        (lambda t: t.replace("bad", "worse"), True, "text 1: its tokens count for 8 bytes, .* 10"),
    ],
)
def test_a_document_that_does_not_add_up_is_named(paragraphs, tmp_path, spoil, may_change, message):
    folder = prepare(Texts(paragraphs), tmp_path / "d", "x", vocab_size=400).folder
    sp = FaultyTokenizer(load_tokenizer(folder / "tokenizer.model"), spoil)
    batch = [Document("good", "text 0"), Document("bad text", "text 1")]
    with pytest.raises(DataError, match=message):
        Encoder(sp, may_change).encode(batch, SplitStats())


def test_written_shards_are_counted_again(paragraphs, tmp_path, monkeypatch):
    """What lies on disk is compared with what was encoded, not the copy in memory."""
    write = encode.write_shard

    def write_one_token_wrong(path, tokens):
        write(path, np.where(np.arange(tokens.size) == 5, BOS_ID, tokens))

    monkeypatch.setattr(encode, "write_shard", write_one_token_wrong)
    with pytest.raises(DataError, match="the train shards hold .* bytes, expected"):
        prepare(Texts(paragraphs), tmp_path / "d", "x", vocab_size=400)
    assert not list(tmp_path.iterdir())


def test_text_that_changes_meanwhile_is_refused(paragraphs, tmp_path):
    class Growing(Texts):
        def __iter__(self):
            self.texts.append("one more " * len(self.texts))
            return super().__iter__()

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(Growing(paragraphs), tmp_path / "d", "x", vocab_size=400)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "the text is empty"),
        (["one document"], "one document, of 12 bytes, .* held out: give more text .* 16,384"),
        (["the same"] * 62, "all 62 documents are equal"),
        (["two", "five"], r"none of 2 documents \(7 bytes\) fell to val .* --val-fraction"),
        ([f"text {i}" for i in range(40)], "too few for a vocabulary of 1024 pieces"),
    ],
)
def test_too_little_text(tmp_path, texts, message):
    with pytest.raises(DataError, match=message):
        prepare(Texts(texts), tmp_path / "d", "x", val_fraction=0.3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "a/b"}, "'a/b': use letters"),
        ({"corpus": ".."}, "'..': use letters"),
        ({"val_fraction": 0.0}, "0.0 is not between"),
        ({"val_fraction": 1.0}, "1.0 is not between"),
        ({"shard_tokens": 0}, "0 tokens a shard"),
        ({"vocab_size": 100}, "vocabulary size 100"),
    ],
)
def test_values_out_of_range(paragraphs, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(Texts(paragraphs), tmp_path / "d", **{"corpus": "x", **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [10, 256, 100_000])
def test_a_vocabulary_that_cannot_be_is_refused_before_the_text_is_read(tmp_path, vocab_size):
    class Unread(Texts):
        def __iter__(self):
            raise AssertionError("read")

    with pytest.raises(ConfigError, match=f"vocabulary size {vocab_size} is not in 300..65536"):
        prepare(Unread(["x"]), tmp_path / "d", "x", vocab_size=vocab_size)


def test_another_corpus_is_not_replaced_unasked(paragraphs, tmp_path, capsys):
    """Neither one of another name, which is refused unread, nor another text under that name."""
    out = tmp_path / "d"
    prepare(Texts(paragraphs), out, "one", vocab_size=400)
    assert "replaced" not in capsys.readouterr().err
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for name, texts, what in (
        ("two", Texts(paragraphs), "corpus one"),
        ("one", Texts(paragraphs[::2]), "another text"),
    ):
        with pytest.raises(ConfigError, match=f"d holds {what} .*--force"):
            prepare(texts, out, name, vocab_size=400)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    prepare(Texts(paragraphs), out, "one", vocab_size=300)
    assert "d: replaced corpus one" in capsys.readouterr().err
    prepare(Texts(paragraphs[::2]), out, "two", vocab_size=400, replace="prepared")
    assert "d: replaced corpus one" in capsys.readouterr().err


def test_only_a_prepared_folder_is_replaced(paragraphs, tmp_path):
    out = tmp_path / "d"
    out.mkdir()
    prepare(Texts(paragraphs), out, "one", vocab_size=400)
    dataset = prepare(Texts(paragraphs[::2]), out, "two", vocab_size=400, replace="prepared")
    assert [p.name for p in dataset.val_shards] == ["two_val_000000.bin"]
    before = (out / "manifest.json").read_bytes()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"d is not a folder .* \(notes.txt\)"):
        prepare(Texts(paragraphs), out, "three", vocab_size=400)
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match="choose another place"):
        prepare(Texts(paragraphs), out / "notes.txt", "three", replace="prepared")
    assert json.loads(before)["corpus"] == "two"
