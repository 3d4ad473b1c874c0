"""One run's settings, processes, data and folder: what everything about it is given."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pgolf.config import Config, from_dict, with_overrides
from pgolf.data.corpus import ensure_default_dataset
from pgolf.data.manifest import Dataset
from pgolf.errors import ConfigError, DataError, StorageError
from pgolf.ranks import Ranks
from pgolf.training.phases import Phases
from pgolf.training.run_data import find_dataset
from pgolf.training.run_folder import RunFolder, read_config

DEFAULT_DATA = Path("data")


class Script(Protocol):
    """A run's code as one file, whose bytes count with the model's.

    Attributes:
        data: the file.
        sources: module name -> its source in the file.
    """

    data: bytes
    sources: Mapping[str, str]


BuildScript = Callable[[Config], Script]


@dataclass(frozen=True)
class Session:
    """A run, as one of its processes sees it."""

    config: Config
    ranks: Ranks
    dataset: Dataset
    folder: RunFolder
    phases: Phases = field(default_factory=Phases)

    def say(self, text: str) -> None:
        """Print a line, on the first rank alone."""
        if self.ranks.first:
            print(text, flush=True)


def open_session(
    config: Config,
    ranks: Ranks,
    folder: RunFolder,
    any_vocabulary: bool = False,
    phases: Phases | None = None,
) -> Session:
    """Find the data and fit the settings to them.

    Args:
        folder: from `claimed_folder`.
        any_vocabulary: nobody asked for a vocab_size: the model takes the data's.
        phases: what the run has counted already.

    Raises:
        DataError: shards or tokenizer are missing, damaged or mixed up.
        ConfigError: the vocabulary is too small.
    """
    dataset = (
        data_again(config, folder.path) if config.run.resume else open_data(config, ranks)
    )
    config = with_dataset(fit_vocabulary(config, dataset, any_vocabulary), dataset)
    return Session(config, ranks, dataset, folder, phases or Phases())


@contextmanager
def claimed_folder(config: Config, ranks: Ranks) -> Iterator[RunFolder]:
    """The run folder that rank 0 chose, on every rank; no other run gets it meanwhile."""
    with ExitStack() as stack:
        mine = ranks.on_first(lambda: stack.enter_context(RunFolder.choose(config)))
        yield RunFolder(ranks.broadcast_object(mine), writes=ranks.first)


def open_data(config: Config, ranks: Ranks) -> Dataset:
    """The run's shards; the embedded corpus is prepared by rank 0 if it is the one wanted.

    Raises:
        DataError: shards or tokenizer are missing, damaged or mixed up.
    """
    if config.data.data:
        dataset = Dataset.open(config.data.data, config.data.tokenizer or None)
    else:
        try:
            ranks.on_first(lambda: ensure_default_dataset(DEFAULT_DATA))
        except StorageError as e:  # out= does not help
            raise DataError(
                f"{e}. The embedded corpus is prepared in {DEFAULT_DATA.resolve()}: go to another "
                "folder, or name shards that are prepared with data=FOLDER"
            ) from e
        dataset = ensure_default_dataset(DEFAULT_DATA)
    return dataset


def data_again(config: Config, folder: Path) -> Dataset:
    """The shards of a run that goes on, wherever they are now.

    Raises:
        DataError: they are not found, or others are named.
    """
    recorded, given = from_dict(read_config(folder)).data, config.data
    moved = given.data if given.data != recorded.data else ""
    other = given.tokenizer if given.tokenizer != recorded.tokenizer else ""
    return find_dataset(folder, recorded, moved, other)


def fit_vocabulary(config: Config, dataset: Dataset, follows: bool) -> Config:
    """The settings with a token table that the tokenizer fits.

    Args:
        follows: as many rows as the tokenizer has pieces; else those that were asked for.

    Raises:
        ConfigError: fewer were asked for.
    """
    if follows:
        return with_overrides(config, {"vocab_size": dataset.vocab_size})
    if dataset.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {dataset.folder} has {dataset.vocab_size} pieces, the model "
            f"{config.model.vocab_size}: use vocab_size={dataset.vocab_size}"
        )
    return config


def with_dataset(config: Config, dataset: Dataset) -> Config:
    """The settings as config.json has them, where `pgolf eval` and `pgolf pack` read the places."""
    return with_overrides(
        config,
        {
            "data": str(dataset.folder.resolve()),
            "tokenizer": str(dataset.tokenizer_path.resolve()),
        },
    )
