"""Shards for the recipes' vocabulary of 1024."""

from pathlib import Path

import pytest

from pgolf.data.prepare import prepare
from pgolf.data.readers import TextSource

from ..training.inside import no_plots, pgolf, scoring_here  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def source_shards(tmp_path_factory) -> Path:
    """The package's own source as text: there is always enough of it for 1,024 pieces."""
    folder = tmp_path_factory.mktemp("data") / "source"
    text = tmp_path_factory.mktemp("text")
    for i, file in enumerate(sorted((ROOT / "pgolf").rglob("*.py"))):
        (text / f"{i}.txt").write_bytes(file.read_bytes())
    prepare(TextSource([text]), folder, "source", vocab_size=1024)
    return folder
