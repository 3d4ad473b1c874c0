"""A folder of shards with the tokenizer that made them, checked against its manifest.

Two layouts are known:
- ours (`pgolf data prepare`): NAME_{train,val}_%06d.bin, tokenizer.model and manifest.json in one
  folder, with the size and sha256 of everything;
- the contest's: ROOT/datasets/fineweb10B_sp1024/ and ROOT/tokenizers/fineweb_1024_bpe.model, and
  perhaps ROOT/manifest.json, which states the number of shards.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from pgolf.data.contest import MANIFEST, ContestLayout, read_json
from pgolf.data.shards import BOS_ID, find_shards, open_shard, read_header
from pgolf.data.tokenizer import load_tokenizer
from pgolf.errors import DataError
from pgolf.files import sha256_of
from pgolf.scoring.bpb import refuse_if_foreign, refuse_if_lossy

KIND, VERSION = "pgolf-dataset", 1
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Dataset:
    """Shards and their tokenizer; `open` makes one.

    Attributes:
        folder: where the shards lie.
        corpus: id of the text; bits per byte are only comparable for the same id and sha256.
        train_shards, val_shards: in reading order.
        tokenizer_path, tokenizer_sha256: the SentencePiece model.
        vocab_size: its number of pieces.
        manifest: our manifest.json, None for the contest's layout.
    """

    folder: Path
    corpus: str
    train_shards: list[Path]
    val_shards: list[Path]
    tokenizer_path: Path
    tokenizer_sha256: str
    vocab_size: int
    manifest: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path | str, tokenizer: Path | str | None = None) -> "Dataset":
        """Open a folder of shards after checking what can be checked quickly.

        Checked: the shards are the manifest's, by name and number of tokens; the tokenizer is the
        one that made them, by sha256 where it is stated, and by what it makes of their text; it
        keeps all bytes; the validation shards are whole, by sha256 where it is stated, and their
        tokens lie in its vocabulary.

        Args:
            folder: the shards, in one of the two layouts.
            tokenizer: a SentencePiece model instead of the one beside the shards.

        Raises:
            DataError: something is missing, damaged or does not belong together.
        """
        folder = Path(folder)
        shards = {split: find_shards(folder, split) for split in SPLITS}
        ours = read_manifest(folder)
        if ours:
            _check_shards(folder, shards, ours)
            # the text that a score stands for, and small enough to be read each time
            _check_sha256(folder, ours, "val")
            path = Path(tokenizer or folder / TOKENIZER)
        else:
            layout = ContestLayout.around(folder)
            layout.check_counts(folder, {split: len(paths) for split, paths in shards.items()})
            for shard in shards["train"] + shards["val"]:
                read_header(shard)
            path = Path(tokenizer or layout.tokenizer_of(folder))
        sp = load_tokenizer(path)
        check_tokenizer(sp, path)
        sha256 = sha256_of(path)
        if ours and sha256 != ours["tokenizer_sha256"]:
            raise DataError(
                f"tokenizer {path} has sha256 {sha256[:12]}..., the shards in {folder} were made "
                f"with {ours['tokenizer_sha256'][:12]}...: use {folder / TOKENIZER} as it was made"
            )
        for shard in shards["val"]:
            refuse_if_foreign(sp, open_shard(shard, sp.get_piece_size()), path, folder)
        return cls(
            folder=folder,
            corpus=ours["corpus"] if ours else folder.resolve().name,
            train_shards=shards["train"],
            val_shards=shards["val"],
            tokenizer_path=path,
            tokenizer_sha256=sha256,
            vocab_size=sp.get_piece_size(),
            manifest=ours,
        )

    @cached_property
    def sha256(self) -> str:
        """Of the corpus text as the manifest states it, else of the validation shards' bytes."""
        return self.manifest["text_sha256"] if self.manifest else self.val_sha256

    @cached_property
    def val_sha256(self) -> str:
        """Of the validation shards' bytes, which any layout has."""
        digest = hashlib.sha256()
        for shard in self.val_shards:
            digest.update(bytes.fromhex(sha256_of(shard)))
        return digest.hexdigest()

    def verify(self) -> None:
        """Read every shard: made by the tokenizer, and sha256 as the manifest states it.

        Raises:
            DataError: the first shard that is not what it should be.
        """
        sp = load_tokenizer(self.tokenizer_path)
        for shard in self.train_shards + self.val_shards:
            tokens = open_shard(shard, self.vocab_size)
            refuse_if_foreign(sp, tokens, self.tokenizer_path, shard)
        for split in SPLITS if self.manifest else ():
            _check_sha256(self.folder, self.manifest, split)


def _check_sha256(folder: Path, manifest: dict[str, Any], split: str) -> None:
    for entry in manifest["splits"][split]["shards"]:
        actual = sha256_of(folder / entry["file"])
        if actual != entry["sha256"]:
            raise DataError(
                f"{folder / entry['file']}: sha256 {actual[:12]}..., the manifest states "
                f"{entry['sha256'][:12]}...: the shard was changed, prepare the folder again"
            )


def check_tokenizer(sp: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    """Refuse a tokenizer that loses bytes or whose ids do not fit the shards' format.

    Raises:
        DataError: with the reason.
    """
    try:
        refuse_if_lossy(sp)
    except DataError as e:
        raise DataError(f"{path}: {e}") from e
    if sp.get_piece_size() > 65536:
        raise DataError(f"{path}: {sp.get_piece_size()} pieces, a shard's uint16 holds 65536")
    if sp.bos_id() != BOS_ID:
        raise DataError(
            f"{path}: BOS has id {sp.bos_id()}, expected {BOS_ID}, which marks documents in "
            "shards; train the tokenizer with bos_id=1"
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Our manifest of a folder, or None where it has none of ours.

    Raises:
        DataError: the file is damaged or of another version.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest is None or manifest.get("kind") != KIND:
        return None
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path}: manifest version {manifest.get('version')!r}, expected {VERSION}; "
            "delete the folder and prepare it again"
        )
    try:
        for key in ("corpus", "text_sha256", "tokenizer_sha256"):
            _expect(manifest[key], str)
        for split in SPLITS:
            for entry in manifest["splits"][split]["shards"]:
                _expect(entry["file"], str), _expect(entry["sha256"], str)
                _expect(entry["tokens"], int)
    except (KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e!r}): delete the folder and prepare it again") from e
    return manifest


def _expect(value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not a {kind.__name__}")


def _check_shards(folder: Path, shards: dict[str, list[Path]], manifest: dict[str, Any]) -> None:
    """The folder's shards against our manifest: names and numbers of tokens."""
    for split in SPLITS:
        stated = {s["file"]: s["tokens"] for s in manifest["splits"][split]["shards"]}
        present = {p.name: p for p in shards[split]}
        for problem, names in (
            ("is missing", stated.keys() - present.keys()),
            ("is not in the manifest", present.keys() - stated.keys()),
        ):
            if names:
                raise DataError(
                    f"{folder / min(names)} {problem} ({len(stated)} {split} shards stated, "
                    f"{len(present)} found): prepare the folder again"
                )
        for name, path in present.items():
            tokens = read_header(path)
            if tokens != stated[name]:
                raise DataError(
                    f"{path}: {tokens} tokens, the manifest states {stated[name]}: the shard "
                    "belongs to another data set, prepare the folder again"
                )
