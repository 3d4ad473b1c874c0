"""The contest's data layout, here and on its server, and what its manifest states.

ROOT/manifest.json, ROOT/datasets/fineweb10B_<variant>/fineweb_{train,val}_%06d.bin and
ROOT/tokenizers/*.model. The manifest has `datasets[].{name, tokenizer_name, stats.files_train,
stats.files_val}` and `tokenizers[].{name, model_path}`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.errors import DataError

MANIFEST = "manifest.json"
DATASET_PREFIX = "fineweb10B_"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no such file.

    Raises:
        DataError: the file is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path} cannot be read as JSON ({e}): prepare or fetch it again") from e
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object: prepare or fetch it again")
    return content


@dataclass(frozen=True)
class ContestLayout:
    """A root folder in the contest's layout and its manifest ({} where there is none)."""

    root: Path
    manifest: dict[str, Any]

    @classmethod
    def at(cls, root: Path) -> "ContestLayout":
        """The layout below `root`."""
        return cls(root, read_json(root / MANIFEST) or {})

    @classmethod
    def around(cls, folder: Path) -> "ContestLayout":
        """The layout that a folder of shards lies in: its root is two levels up."""
        return cls.at(folder.resolve().parent.parent)

    def _entries(self, table: str) -> dict[str, dict[str, Any]]:
        """The entries of a list of the manifest, by name."""
        try:
            return {entry["name"]: entry for entry in self.manifest.get(table, [])}
        except (KeyError, TypeError) as e:
            raise DataError(
                f"{self.root / MANIFEST}: {table!r} is no list of entries with a name; "
                "delete the file and fetch it again"
            ) from e

    def variants(self) -> list[str]:
        """The variants that the manifest lists, such as `sp1024`."""
        names = [n for n in self._entries("datasets") if n.startswith(DATASET_PREFIX)]
        return sorted(n.removeprefix(DATASET_PREFIX) for n in names)

    def shard_count(self, dataset: str, split: str) -> int | None:
        """How many shards the manifest states for a data set and split, None if it does not.

        Raises:
            DataError: what it states is no count.
        """
        stats = self._entries("datasets").get(dataset, {}).get("stats", {})
        count = stats.get(f"files_{split}") if isinstance(stats, dict) else None
        if count is not None and (not isinstance(count, int) or count < 0):
            raise DataError(f"{self.root / MANIFEST}: {count!r} {split} shards of {dataset}")
        return count

    def check_counts(self, folder: Path, counts: dict[str, int]) -> None:
        """Compare the number of shards found in `folder`, by split, with the manifest.

        A prefix of the training shards is a valid choice, a part of the validation text is not.

        Raises:
            DataError: too many shards, or missing validation shards.
        """
        for split, count in counts.items():
            stated = self.shard_count(folder.resolve().name, split)
            if stated is not None and (count > stated or (split == "val" and count < stated)):
                raise DataError(
                    f"{folder}: {count} {split} shards, {self.root / MANIFEST} states {stated}; "
                    "get them again with `pgolf data fetch`"
                )

    def tokenizer_name(self, dataset: str) -> str | None:
        """File name of a data set's SentencePiece model, by the manifest, else by the custom.

        None for a variant that has no such model (bytes).
        """
        tokenizer = self._entries("datasets").get(dataset, {}).get("tokenizer_name", "")
        model = self._entries("tokenizers").get(tokenizer, {}).get("model_path")
        if isinstance(model, str):
            # the name alone: what a manifest says must not lead out of the folder
            return Path(model).name
        size = re.search(r"_sp(\d+)$", dataset)
        return f"fineweb_{size[1]}_bpe.model" if size else None

    def tokenizer_of(self, folder: Path) -> Path:
        """The tokenizer of a folder of shards.

        Raises:
            DataError: there is none where it should be.
        """
        name = self.tokenizer_name(folder.resolve().name)
        candidates = [folder / "tokenizer.model"]
        if name:
            candidates.append(self.root / "tokenizers" / name)
        for path in candidates:
            if path.is_file():
                return path
        raise DataError(
            f"no tokenizer for the shards in {folder}, looked for "
            f"{' and '.join(str(c) for c in candidates)}: name one with tokenizer=FILE "
            "(--tokenizer FILE)"
        )
