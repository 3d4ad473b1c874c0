"""Readers lose nothing and name file and line where they cannot read."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.data.readers import LONG, SHORT, TextSource
from pgolf.errors import DataError


def texts(*paths) -> list[str]:
    return [document.text for document in TextSource(paths)]


def test_a_small_file_is_one_document(tmp_path):
    content = "Title\r\n\r\n\r\nText \n\n" * 100
    (tmp_path / "a.txt").write_bytes(content.encode())
    source = TextSource([tmp_path / "a.txt"])
    assert [tuple(d) for d in source] == [(content, f"{tmp_path / 'a.txt'}:1")]
    assert [tuple(d) for d in source] == [(content, f"{tmp_path / 'a.txt'}:1")], "again the same"
    assert source.size == len(content.encode())


def test_a_long_file_is_cut_after_blank_lines(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 150 + "\n\n" for i in range(60)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    documents = list(TextSource([tmp_path / "book.txt"]))
    assert "".join(d.text for d in documents) == "".join(paragraphs)
    assert len(documents) > 5
    for document in documents[:-1]:
        assert document.text.endswith("\n\n") and SHORT <= len(document.text) < SHORT + 800
    lines = (tmp_path / "book.txt").read_text().split("\n")
    for document in documents:
        number = int(document.where.rpartition(":")[2])
        assert document.text.startswith(lines[number - 1])


@pytest.mark.parametrize("text", ["x" * 100_000, "no line ends " * 9000, "short\n" * 20_000])
def test_a_long_file_without_paragraphs_is_cut_all_the_same(tmp_path, text):
    (tmp_path / "book.txt").write_text(text)
    documents = texts(tmp_path / "book.txt")
    assert "".join(documents) == text
    assert max(map(len, documents)) < LONG + SHORT
    if " " in text:
        assert all(d.endswith(" ") for d in documents), "words stay whole"
    if "\n" in text:
        assert all(d.endswith("\n") for d in documents), "lines stay whole"


@given(st.text(st.sampled_from("ab \n\r\u2028é\0"), max_size=300).map(lambda t: t * 200))
def test_no_byte_is_lost_or_added(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    assert "".join(texts(path)) == text


def test_json_lines(tmp_path):
    records = ["one\ntwo", " x " * 30_000, "", "\U0001f44d \u2028 é"]
    lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    documents = list(TextSource([tmp_path / "a.jsonl"]))
    assert [d.text for d in documents] == [records[0], records[1], records[3]]
    assert [d.where.rpartition(":")[2] for d in documents] == ["1", "3", "7"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", 'string "text", found list'),
        ('{"content": "x", "a": 1}', r"string \"text\", found keys \['a', 'content'\]"),
        ('{"text": null}', "found NoneType there"),
        (r'{"text": "a\ud800b"}', r"half a surrogate pair in the text \('\\ud800'\)"),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{message}"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_names_file_and_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "good"}\n' * 2 + "{'text': 'é'}".encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name}:3: not UTF-8 text \(byte 0xe9\).*iconv"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
def test_a_byte_order_mark_is_left_out(tmp_path, name):
    """At the beginning of the file alone; a mark within the text stays."""
    text = "one \ufeff two"
    raw = (text if ".txt" in name else json.dumps({"text": text}, ensure_ascii=False)).encode()
    raw = b"\xef\xbb\xbf" + raw
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert texts(tmp_path / name) == [text]


@pytest.mark.parametrize(("name", "line"), [("a.txt", "many words " * 1_000_000), ("a.json", None)])
def test_a_file_of_one_line_is_never_held_as_a_whole(tmp_path, name, line):
    """11 MB in one line; a block of the file and a few of its copies are in memory."""
    documents = ["many words " * 500] * 2_000
    (tmp_path / name).write_text(line or json.dumps(documents))
    tracemalloc.start()
    count = sum(len(document.text) for document in TextSource([tmp_path / name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 11_000_000
    assert peak < 7_000_000
