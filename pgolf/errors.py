"""Errors that the user can fix: one message each, which names the value and the remedy.

The command line prints them as one line and exits with `exit_code`; anything else is a bug and
keeps its traceback.
"""

from collections.abc import Sequence


class PgolfError(Exception):
    """Base of every error that pgolf raises on purpose."""

    exit_code = 2
    quiet = False  # whether another process prints it


class ConfigError(PgolfError):
    """An unknown recipe or key, or a value out of range."""


class DataError(PgolfError):
    """Missing, damaged or mixed-up shards, tokenizers and corpora."""


class ArtifactError(PgolfError):
    """A file that is not a valid artifact; the message says what is wrong with it."""


class BudgetError(PgolfError):
    """Code and model together are larger than the recipe's limit.

    Attributes:
        excess: bytes over it with what comes nearest.
    """

    def __init__(self, message: str, excess: int = 0):
        super().__init__(message)
        self.excess = excess


class TrainingError(PgolfError):
    """Training cannot go on, for example because the loss is not finite."""


class LostRank(TrainingError):
    """A process of the run is gone or stands still, and the others end.

    Args:
        quiet: whether another one of the remaining processes prints this.
        ranks: those that are gone, as far as is known.
    """

    exit_code = 3

    def __init__(self, message: str, quiet: bool = False, ranks: Sequence[int] = ()):
        super().__init__(message)
        self.quiet, self.ranks = quiet, ranks


class StaleWeights(PgolfError):
    """A pass would read weights that were made of parameters as they no longer are."""


class StorageError(PgolfError):
    """A file could not be written: no space, no permission, a folder in the way."""


class InUseError(StorageError):
    """Another process is writing there."""
