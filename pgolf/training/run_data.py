"""Which data a run was trained on, and where it is now: by its hash, not by its place.

data.json in the run folder names corpus, its sha256 and that of the tokenizer. Folders get moved,
so the shards may be at another place than the one in config.json; they have to be the same ones.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pgolf.config import DataConfig
from pgolf.data.manifest import TOKENIZER, Dataset
from pgolf.data.tokenizer import load_tokenizer
from pgolf.errors import ConfigError, DataError
from pgolf.files import atomic_write, sha256_of

FILE = "data.json"


@dataclass(frozen=True)
class Identity:
    """What makes two folders of shards the same data; the names are those of result.json.

    Attributes:
        val_sha256: of the validation shards, '' where a run states none.
    """

    corpus: str
    corpus_sha256: str
    tokenizer_sha256: str
    val_sha256: str = ""

    @classmethod
    def of(cls, dataset: Dataset) -> "Identity":
        """That of shards which are at hand."""
        return cls(
            dataset.corpus, dataset.sha256, dataset.tokenizer_sha256, dataset.val_sha256
        )

    @classmethod
    def read(cls, run: Path) -> "Identity | None":
        """What a run folder states: its data.json, or the result.json of an older one; else None.

        Raises:
            ConfigError: the file is damaged.
        """
        for file in (run / FILE, run / "result.json"):
            try:
                values = json.loads(file.read_bytes())
                stated = (values[key] for key in ("corpus", "corpus_sha256", "tokenizer_sha256"))
                return cls(*map(str, stated), str(values.get("val_sha256", "")))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as e:
                if file.name != FILE:  # not what result.json is for
                    continue
                raise ConfigError(
                    f"{file} cannot be read ({e!r}): restore it, or train again"
                ) from e
        return None

    def matches(self, other: "Identity") -> bool:
        """Whether both are of the same data, whatever they are called.

        Where no manifest states the text, the hash of the corpus is that of its validation shards.
        """
        bare = any(x.corpus_sha256 == x.val_sha256 for x in (self, other))
        return self.tokenizer_sha256 == other.tokenizer_sha256 and (
            self.corpus_sha256 == other.corpus_sha256
            or (bare and self.val_sha256 == other.val_sha256)
        )

    def differences(self, other: "Identity") -> str:
        """What `other` has in place of what this one has."""
        return "; ".join(
            f"{name} {getattr(other, name)[:12]}... for {getattr(self, name)[:12]}..."
            for name in ("corpus_sha256", "tokenizer_sha256")
            if getattr(other, name) != getattr(self, name)
        )

    def write(self, run: Path) -> None:
        """Into a run folder."""
        atomic_write(run / FILE, json.dumps(asdict(self), indent=2) + "\n")


def places(run: Path, recorded: str) -> Iterator[Path]:
    """Where the folder of shards `recorded` in config.json of `run` may be, likely places first.

    Where it was; else, if it was moved with the run, as far from one of the folders around the run
    as before: the end of its path, below them.
    """
    yield Path(recorded)
    names = Path(recorded).parts[1:] if Path(recorded).is_absolute() else Path(recorded).parts
    for around in run.resolve().parents:
        for first in range(max(1, len(names) - 1)):  # one name alone may be anything's
            yield around.joinpath(*names[first:])


def find_dataset(
    run: Path, recorded: DataConfig, data: str | Path = "", tokenizer: str | Path = ""
) -> Dataset:
    """The shards and the tokenizer that a run was trained on, under the corpus id it gave them.

    Args:
        recorded: where they were, from config.json.
        data: where they are now, if the user says so.
        tokenizer: likewise.

    Raises:
        DataError: they are not found, or what is found is other data.
    """
    stated, others = Identity.read(run), {}
    for place in (Path(data),) if data else places(run, recorded.data):
        known = data or place == Path(recorded.data)
        if place.resolve() in others:
            continue
        # Nothing but a hash can say that another place is right.
        if not place.is_dir() or not (known or (stated and any(place.glob("*_val_*.bin")))):
            continue
        dataset = Dataset.open(place, tokenizer or _tokenizer(run, recorded, stated))
        here = Identity.of(dataset)
        if stated is None:
            return dataset
        if here.matches(stated):
            return replace(dataset, corpus=stated.corpus)
        others[place.resolve()] = f"{place} holds other data ({stated.differences(here)})"
    problem = "; ".join(others.values()) or f"there is no folder {data or recorded.data}"
    raise DataError(
        f"the shards that {run} was trained on are not found: {problem}; name the folder that "
        "holds them with data=FOLDER"
    )


def _tokenizer(run: Path, recorded: DataConfig, stated: Identity | None) -> Path | None:
    """The run's tokenizer: where it was, or the run's own copy, which is as good; else None."""
    for file in (Path(recorded.tokenizer), run / TOKENIZER):
        if file.is_file() and (stated is None or sha256_of(file) == stated.tokenizer_sha256):
            return file
    return None


def without_shards(run: Path) -> Dataset | None:
    """What a run folder alone tells of its data, for what reads no text; None if it tells less."""
    stated, file = Identity.read(run), run / TOKENIZER
    if stated is None or not file.is_file() or sha256_of(file) != stated.tokenizer_sha256:
        return None
    pieces = load_tokenizer(file).get_piece_size()
    return Dataset(run, stated.corpus, [], [], file, stated.tokenizer_sha256, pieces, None)
