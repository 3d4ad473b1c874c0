"""In place of pgolf.data.corpus: a script embeds no text, its shards are named to it."""

from pathlib import Path

from pgolf.data.manifest import Dataset
from pgolf.errors import DataError


def ensure_default_dataset(root: Path) -> Dataset:
    """There is none.

    Raises:
        DataError: always.
    """
    raise DataError("no shards are named: set DATA_PATH to a folder of them")
