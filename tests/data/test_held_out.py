"""Documents that are held out: found wherever they lie in training shards, and looked for once."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece

from pgolf.cli import main
from pgolf.data import held_out
from pgolf.data.held_out import LEAST, check_held_out, documents, found_in, records
from pgolf.data.manifest import Dataset
from pgolf.data.prepare import prepare
from pgolf.data.readers import TextSource
from pgolf.data.shards import open_shard, write_shard
from pgolf.errors import DataError

RANDOM = np.random.default_rng(0)


def document(size: int) -> np.ndarray:
    """(size,) tokens, led by BOS."""
    return np.concatenate([[1], RANDOM.integers(3, 400, size - 1)]).astype(np.uint16)


def shards(folder, name: str, tokens: np.ndarray, *cuts: int) -> list:
    """Tokens as shards, cut at these positions."""
    paths = []
    for i, piece in enumerate(np.split(tokens, cuts)):
        paths.append(folder / f"x_{name}_{i:06d}.bin")
        write_shard(paths[-1], piece)
    return paths


@pytest.fixture
def val(tmp_path):
    """Validation documents, and their shards, one of whose borders is inside of a document."""
    texts = [document(n) for n in (LEAST, 40, 70_000, 300, 25, 40)]
    return texts, shards(tmp_path, "val", np.concatenate(texts), 50)


def places(documents) -> list[tuple[str, int, int]]:
    return [(place.shard.name, place.position, place.size) for place in documents]


def test_documents_run_on_into_the_next_shards(tmp_path, val):
    texts, paths = val
    whole = [np.concatenate(place.parts) for place in documents(paths)]
    assert sorted(map(len, whole)) == sorted(map(len, texts))
    assert {t.tobytes() for t in whole} == {t.tobytes() for t in texts}
    # what comes before the first BOS is the end of a document, which is not there
    rest = shards(tmp_path, "rest", np.concatenate([texts[3][1:], texts[4]]), 10)
    assert places(documents(rest)) == [("x_rest_000001.bin", 289, 25)]


@pytest.mark.parametrize("cuts", [(), (30,), (99,), (100,), (101,), (102,), (110, 120), (400,)])
@pytest.mark.parametrize("which", range(6))
def test_a_held_out_document_is_found(tmp_path, val, cuts, which):
    """At the beginning, middle and end, with borders of shards before, in and behind it."""
    texts, paths = val
    front, middle, back = document(100), texts[which], document(50)
    for order in ((middle, front, back), (front, middle, back), (front, back, middle)):
        tokens = np.concatenate(order)
        at = sum(map(len, order[: [t is middle for t in order].index(True)]))
        train = shards(tmp_path, "train", tokens, *[c for c in cuts if c < tokens.size])
        begins = max([c for c in cuts if c <= at], default=0)
        ((_, position, size),) = places(found_in(train, records(paths)))
        assert (position, size) == (at - begins, middle.size)
    front[LEAST] ^= 1  # and others are not
    assert not places(found_in(shards(tmp_path, "train", np.concatenate([front, back])), b""))


def test_what_differs_in_a_token_or_is_short_is_another(tmp_path, val):
    texts, paths = val
    for at in (1, 4, 39):
        other = texts[1].copy()
        other[at] += 1
        train = shards(tmp_path, "train", np.concatenate([other, texts[1][:-1], document(20)]))
        assert not places(found_in(train, records(paths)))
    short = document(LEAST - 1)
    paths = shards(tmp_path, "val", np.concatenate([short, short, document(20)]))
    train = shards(tmp_path, "train", np.concatenate([short, document(20), short]))
    assert not places(found_in(train, records(paths)))


# --- in a folder ----------------------------------------------------------------------------------


def leak(folder) -> int:
    """Put a held-out document into the last training shard; its position."""
    (first,) = list(folder.glob("x_val_000000.bin"))
    place = next(documents([first]))
    last = sorted(folder.glob("x_train_*.bin"))[-1]
    tokens, leaked = np.array(open_shard(last, None)), np.concatenate(place.parts)
    at = int(np.flatnonzero(tokens == 1)[0])
    write_shard(last, np.concatenate([tokens[:at], leaked, tokens[at:]])[: tokens.size])
    return at


def test_prepared_shards_hold_none_and_are_looked_at_once(ours, monkeypatch):
    stated = json.loads((ours / "manifest.json").read_text())["held_out"]
    data = (ours / stated["file"]).read_bytes()
    assert data == records(sorted(ours.glob("x_val_*.bin")))
    assert len(data) == 24 * stated["documents"] > 0
    assert check_held_out(Dataset.open(ours)) == ""
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "documents", None)
        assert check_held_out(Dataset.open(ours)) == ""
    at = leak(ours)
    with pytest.raises(DataError, match=rf"x_train_00000\d.bin: .* at position {at} .*held_out="):
        check_held_out(Dataset.open(ours))
    assert "trained on: 1, of" in check_held_out(Dataset.open(ours), allow=True)
    (ours / held_out.RESULT).write_text("{")  # as if nothing had been looked at
    with pytest.raises(DataError, match=f"at position {at}"):
        check_held_out(Dataset.open(ours))


def test_verify_says_so_and_looks_again(ours, tmp_path, capsys):
    contest = tmp_path / "contest"  # shards without a manifest: hashed here
    contest.mkdir()
    for path in (*ours.glob("x_*.bin"), ours / "tokenizer.model"):
        shutil.copy(path, contest)
    assert main(["data", "verify", str(contest)]) == 0
    assert "no training shard holds a document that is held out" in capsys.readouterr().out
    at = leak(contest)
    assert main(["data", "verify", str(contest)]) == 2
    assert f"at position {at} is one of x_val_* too" in capsys.readouterr().err
    assert main(["data", "verify", str(ours)]) == 0
    (ours / held_out.FILE).write_bytes(b"x" * 24)
    assert main(["data", "verify", str(ours)]) == 2
    assert "val_documents.bin is not that of the validation shards" in capsys.readouterr().err
    (ours / held_out.FILE).unlink()
    with pytest.raises(DataError, match="cannot read .*val_documents.bin.*prepare the folder ag"):
        check_held_out(Dataset.open(ours), again=True)


def test_a_folder_where_nothing_can_be_written(ours, monkeypatch):
    def refused(*_):
        raise held_out.StorageError("no permission")

    monkeypatch.setattr(held_out, "atomic_write", refused)
    assert check_held_out(Dataset.open(ours)) == ""
    assert not (ours / held_out.RESULT).exists()


def test_a_folder_that_was_looked_at_is_prepared_again(ours, documents, tmp_path):
    check_held_out(Dataset.open(ours))
    (tmp_path / "t.txt").write_text("".join(documents))
    prepare(TextSource([tmp_path / "t.txt"]), ours, "x", vocab_size=400)


def test_texts_that_the_tokenizer_makes_alike_are_not_split(tmp_path):
    """Documents that differ in capitals alone, under a tokenizer that has none."""
    texts = [" ".join(f"word{i}{j}" for j in range(20)) for i in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "low"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc_cf",
        add_dummy_prefix=False, remove_extra_whitespaces=False, hard_vocab_limit=False,
        required_chars="\u2581", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in (*texts, *(t.upper() for t in texts)))
    )
    with pytest.raises(DataError, match="two documents that begin with 'word.* is held out"):
        prepare(TextSource([tmp_path / "t.jsonl"]), tmp_path / "d", "x",
                tokenizer=tmp_path / "low.model", val_fraction=0.3)  # fmt: skip
    assert not (tmp_path / "d").exists()
