"""Real text for the data tests: source files of the standard library, one document each."""

import argparse
import difflib
import inspect
import shutil
import textwrap

import pytest

from pgolf.data.prepare import prepare
from pgolf.data.readers import TextSource


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Real text with line breaks and indentation, about 250 kB."""
    return [inspect.getsource(m) for m in (argparse, difflib, textwrap, inspect)]


@pytest.fixture(scope="session")
def prepared(documents, tmp_path_factory):
    """A folder of shards of it, which nobody changes."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "t.txt").write_text("".join(documents))
    prepare(TextSource([folder / "t.txt"]), folder / "d", "x", vocab_size=400,
            val_fraction=0.3, shard_tokens=40_000)  # fmt: skip
    return folder / "d"


@pytest.fixture
def ours(prepared, tmp_path):
    """A prepared folder to damage."""
    return shutil.copytree(prepared, tmp_path / "d")
