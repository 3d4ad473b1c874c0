"""What is read of files, folders and pipes: one table of kinds, and a look at the content."""

import gzip
import io
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pgolf.data import inputs, records
from pgolf.data.inputs import bare_name, find_inputs
from pgolf.data.readers import TextSource
from pgolf.errors import ConfigError, DataError

RECORDS = [{"id": 0, "text": "one\ntwo", "content": "x"}, {"id": 1, "text": "three é"}]
TEXTS = [r["text"] for r in RECORDS]


def texts(*paths, field=None) -> list[str]:
    return [document.text for document in TextSource(paths, field)]


def lines(values) -> str:
    return "\n".join(json.dumps(v) for v in values)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.TXT", "plain", ["plain"]),
        ("a.Markdown", "plain", ["plain"]),
        ("a.JSONL", lines(RECORDS), TEXTS),
        ("a.ndjson", lines(RECORDS), TEXTS),
        ("a.json", lines(RECORDS), TEXTS),
        ("a.json", json.dumps(RECORDS), TEXTS),
        ("a.json", json.dumps(RECORDS, indent=2) + "\n", TEXTS),
        ("a.jsonl", json.dumps(RECORDS), TEXTS),
        ("a.json", json.dumps(RECORDS[0], indent=2), TEXTS[:1]),
        ("a.json", json.dumps(TEXTS), TEXTS),
        ("a.json", " [ ] ", []),
        ("export", lines(RECORDS), TEXTS),
        ("export.dump", json.dumps(RECORDS, indent=1), TEXTS),
        ("export", "[1] A note. {", ["[1] A note. {"]),
        ("main.py", "print({})", ["print({})"]),
        # what its name says is text is text
        ("a.txt", lines(RECORDS), [lines(RECORDS)]),
    ],
)
def test_kinds_by_name_in_any_case_and_by_content(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert texts(tmp_path / name) == expected
    # compressed: with the suffix, and by content alone
    for zipped in (f"z{name}.gz", name):
        (tmp_path / zipped).write_bytes(gzip.compress(content.encode()))
        assert texts(tmp_path / zipped) == expected
        assert TextSource([tmp_path / zipped]).size >= len(content.encode())


def test_the_field_of_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "c1", "text": "t"}\n{"content": "c2"}')
    assert texts(tmp_path, field="content") == ["c1", "c2"]
    with pytest.raises(DataError, match=r'jsonl:2: .*string "text", found keys .*--field'):
        texts(tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="--field content is for JSON and Parquet"):
        TextSource([tmp_path], "content")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a", "b"', "a.json:1: not JSON .*expected ',' or ']'"),
        ('["a",\n "b"\n "c"]', "a.json:3: not JSON .*expected ',' or ']'"),
        ('["a",\n {"text": "b", }]', "a.json:2: not JSON"),
        ('["a"]\n["b"]', "a.json:2: not JSON .*behind the array's end"),
        ('["a",\n "b', "a.json:2: not JSON .*Unterminated"),
        ('["a",\n\n 5]', 'a.json:3: .*string "text", found int'),
        ('["a", "\\ud800"]', "half a surrogate pair"),
    ],
)
def test_bad_arrays_name_file_and_line(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_where_blocks_end_does_not_matter(tmp_path, monkeypatch, block):
    """Within characters, escapes, literals and values longer than a block."""
    monkeypatch.setattr(inputs, "_BLOCK", block)
    texts = ['\U0001f44d é \\ud83d " \n', "long " * 300, "", "end"]
    values = [{"n": [None, True, -1.5e-7], "text": text} for text in texts]
    for ascii_only in (True, False):
        content = json.dumps(values, ensure_ascii=ascii_only)
        (tmp_path / "a.json").write_text(content)
        (tmp_path / "b.jsonl").write_text(
            "\n".join(json.dumps(v, ensure_ascii=ascii_only) for v in values)
        )
        documents = list(TextSource([tmp_path]))
        assert [d.text for d in documents] == [t for t in texts if t] * 2
        assert [d.where.rpartition(":")[2] for d in documents] == ["1"] * 3 + ["1", "2", "4"]


def test_of_a_folder_what_is_left_out_is_counted(tmp_path):
    names = ("b.txt", "a/z.MD", "a/b/c.jsonl.gz", "x.py", "a/y.PY", "a/Makefile", "n.rst", ".h.txt",
             ".git/a.txt", ".git/b.txt")  # fmt: skip
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    os.symlink("nowhere", tmp_path / "in" / "link.txt")
    source = TextSource([tmp_path / "in"])
    read = [os.path.relpath(i.name, tmp_path / "in") for i in source.inputs]
    assert read == ["a/b/c.jsonl.gz", "a/z.MD", "b.txt"]
    assert source.skipped == {
        str(tmp_path / "in"): {
            ".py": 2, ".rst": 1, "without a suffix": 1, "hidden": 2, "broken links or devices": 1,
        }
    }  # fmt: skip
    # a hidden one that is named is read
    assert texts(tmp_path / "in" / ".git") == [json.dumps({"text": n}) for n in names[-2:]]


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nothing.txt does not exist"):
        find_inputs([tmp_path / "nothing.txt"])
    with pytest.raises(DataError, match=r"no .txt, .*\.parquet files in .*, there is nothing"):
        find_inputs([tmp_path])
    (tmp_path / "a.py").touch(), (tmp_path / "b.py").touch(), (tmp_path / ".c").touch()
    with pytest.raises(DataError, match="there are 2 .py, 1 hidden: name the files"):
        find_inputs([tmp_path])


def test_a_damaged_gzip_file(tmp_path):
    whole = gzip.compress(os.urandom(3000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[:-700])
    with pytest.raises(DataError, match="a.txt.gz: damaged gzip file"):
        texts(tmp_path)


def pipe(monkeypatch, content: bytes, tty: bool = False) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: tty)
    monkeypatch.setattr(sys, "stdin", stdin)


def test_the_standard_input(tmp_path, monkeypatch):
    """Read once and given again and again, whatever its kind."""
    for content in (lines(RECORDS).encode(), gzip.compress(json.dumps(RECORDS).encode())):
        pipe(monkeypatch, content)
        source = TextSource(["-"])
        first = list(source)
        assert [d.text for d in first] == TEXTS and first == list(source)
        assert first[1].where.startswith("standard input:")
    pipe(monkeypatch, b"", tty=True)
    with pytest.raises(DataError, match="terminal: pipe it in"):
        TextSource(["-"])


def test_a_named_pipe(tmp_path):
    read, write = os.pipe()
    os.write(write, b"through a pipe")
    os.close(write)
    try:
        assert texts(f"/dev/fd/{read}") == ["through a pipe"]
    finally:
        os.close(read)


def test_names_of_corpora():
    names = ["-", "a/My notes.jsonl.gz", "x.TXT.GZ", "book.txt", "dir.d/sub"]
    assert [bare_name(n) for n in names] == ["stdin", "My notes", "x", "book", "sub"]


def test_without_pyarrow_the_way_to_get_it_is_named(tmp_path, monkeypatch):
    """Before any text is read."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'pgolf\[parquet\]'"):
        TextSource([tmp_path])
    (tmp_path / "a.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match="a.parquet is not a Parquet file"):
        TextSource([tmp_path])


def test_rows_of_parquet_with_a_stand_in(tmp_path, monkeypatch):
    """What is asked of pyarrow, and what is made of its answers."""

    class ParquetFile:
        schema_arrow = SimpleNamespace(names=["id", "text"])

        def __init__(self, file):
            if b"damaged" in file.read():
                raise ValueError("bad footer")

        def iter_batches(self, batch_size, columns):
            assert batch_size > 0
            for batch in (["one", ""], ["two", None]):
                yield SimpleNamespace(
                    column=lambda i, batch=batch: SimpleNamespace(to_pylist=lambda: batch)
                )

    parquet = ModuleType("pyarrow.parquet")
    parquet.ParquetFile = ParquetFile
    monkeypatch.setattr(records, "import_parquet", lambda: parquet)
    monkeypatch.setattr("pgolf.data.readers.import_parquet", lambda: parquet)
    (tmp_path / "download").write_bytes(b"PAR1....PAR1")
    rows = iter(TextSource([tmp_path / "download"]))
    assert [next(rows).text, next(rows).where.rpartition("/")[2]] == ["one", "download:row 3"]
    with pytest.raises(DataError, match='download:row 4: .*string "text", found NoneType there'):
        next(rows)
    with pytest.raises(DataError, match=r"no column 'content', there are \['id', 'text'\]"):
        texts(tmp_path / "download", field="content")
    (tmp_path / "download").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(DataError, match="download cannot be read as Parquet .bad footer"):
        texts(tmp_path / "download")


def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"id": [0, 1], "text": TEXTS, "content": ["x", None]})
    parquet.write_table(table, tmp_path / "a.PARQUET")
    assert texts(tmp_path) == TEXTS
    with pytest.raises(DataError, match="row 2: .*found NoneType there"):
        texts(tmp_path, field="content")
    with pytest.raises(DataError, match="no column 'body', there are"):
        texts(tmp_path, field="body")
    raw = (tmp_path / "a.PARQUET").read_bytes()
    (tmp_path / "a.PARQUET").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        texts(tmp_path)
