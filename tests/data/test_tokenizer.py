"""The trained tokenizer gives every byte back, is the same each time, and fails in words."""

import pytest

from pgolf.data.tokenizer import load_tokenizer, train_tokenizer
from pgolf.errors import ConfigError, DataError
from pgolf.scoring.bpb import changed_by, refuse_if_lossy


def pieces(sp) -> list[str]:
    return [sp.id_to_piece(i) for i in range(260, sp.get_piece_size())]


def test_special_ids_and_byte_pieces_are_the_contest_s(documents, tmp_path, shared_data):
    sp = train_tokenizer(documents, tmp_path / "t.model", 1024)
    contest = load_tokenizer(shared_data / "tokenizers" / "fineweb_1024_bpe.model")
    assert sp.get_piece_size() == contest.get_piece_size() == 1024
    for i in range(260):
        assert sp.id_to_piece(i) == contest.id_to_piece(i)
        assert sp.is_control(i) == contest.is_control(i)
        assert sp.is_byte(i) == contest.is_byte(i)


def test_round_trip_and_special_ids(documents, tmp_path):
    sp = train_tokenizer(documents, tmp_path / "t.model", 512)
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert sp.decode(sp.encode(documents)) == documents
    assert "\n" in pieces(sp), "line breaks reach the trainer"
    refuse_if_lossy(sp)
    assert changed_by(sp) == []


def test_digits_stay_apart(documents, tmp_path):
    texts = [text.replace("self", "2026") for text in documents]
    sp = train_tokenizer(texts, tmp_path / "t.model", 512)
    assert "2" in pieces(sp)
    assert [p for p in pieces(sp) if len(p) > 1 and any(c.isdigit() for c in p)] == []


def test_the_trainer_s_reserved_character_spoils_nothing(tmp_path):
    """SentencePiece alone would leave out every line that holds U+2585."""
    text = ("hello there\u2585\u2585\u2585 " + "".join(chr(c) for c in range(0x21, 0x100))) * 100
    sp = train_tokenizer([text], tmp_path / "t.model", 320)
    assert "hello" in pieces(sp)
    assert sp.decode(sp.encode(text)) == text


def test_same_text_same_file(documents, tmp_path):
    for name in ("a", "b"):
        train_tokenizer(iter(documents), tmp_path / name, 512)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_text_without_spaces_or_with_rare_characters_only_in_bytes(tmp_path):
    """A lone space stays one piece; thousands of characters do not fill the vocabulary."""
    text = "".join(chr(0x4E00 + i * i % 3000) for i in range(30_000)) + "\u2585\0 "
    sp = train_tokenizer([text], tmp_path / "t.model", 400)
    refuse_if_lossy(sp)
    assert sp.decode(sp.encode(text + "a b")) == text + "a b"
    assert sum(len(p) == 1 for p in pieces(sp)) <= 71
    assert any(len(p) > 1 for p in pieces(sp)), "room for merges is left"


def test_long_documents_and_words_are_used(tmp_path):
    """SentencePiece alone would drop a line of more than 4,192 bytes and stop at 65,536 symbols."""
    text = "hellothere" * 10_000 + "".join(chr(c) for c in range(0x21, 0x250)) * 3
    assert "hellothere" in pieces(train_tokenizer([text], tmp_path / "t.model", 320))


def test_only_the_first_bytes_are_used(documents, tmp_path):
    few = train_tokenizer(documents, tmp_path / "a", 300, max_bytes=20_000)
    assert pieces(few) == pieces(train_tokenizer([documents[0][: 2048 * 10]], tmp_path / "b", 300))


@pytest.mark.parametrize("size", [0, 299, 65537])
def test_impossible_vocabulary_sizes(documents, tmp_path, size):
    with pytest.raises(ConfigError, match=f"{size} is not in 300..65536"):
        train_tokenizer(documents, tmp_path / "t.model", size)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text"),
        (["", ""], "no text"),
        (["hello world"], "11 characters .* too few .* 1024 pieces.*use more text"),
        (["how much wood would a woodchuck chuck if he could " * 9], "use at most 3"),
    ],
)
def test_too_little_text(tmp_path, texts, message):
    with pytest.raises(DataError, match=message):
        train_tokenizer(texts, tmp_path / "t.model", 1024)
    assert not list(tmp_path.iterdir())


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="cannot read tokenizer .*nothing.*pgolf data prepare"):
        load_tokenizer(tmp_path / "nothing.model")
    for content in (b"", b"\x00" * 100, b"# Title\n\nno model\n" * 20):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(DataError, match=rf"\({len(content)} bytes\) is not a SentencePiece"):
            load_tokenizer(tmp_path / "t.model")
    with pytest.raises(DataError, match="Is a directory"):
        load_tokenizer(tmp_path)
