"""A recipe: values with their sources, what was corrected, and the published behaviour.

Source letters: C read in the submission's code, L its training log, R its README or PR text,
S the description it was announced with, I inferred (the note says why), P pgolf's own choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgolf.config import Config, with_overrides
from pgolf.errors import ConfigError

CONTEST_BYTES = 16_000_000
CONTEST_SCORING_S = 600.0  # for the decoded artifact, beside the 600 s of training


@dataclass(frozen=True)
class Value:
    """One setting: key, value, source letter, and a note where the letter is not enough."""

    key: str
    value: Any
    source: str
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named configuration.

    Attributes:
        name: as typed on the command line.
        title: one line.
        source: where the system is published; '' for our own.
        values: every setting that the recipe decides.
        corrections: what differs from the publication, each with the reason.
        as_published: what `as_published=true` changes back, as far as it is known.
        contest: whether the budget of 16,000,000 bytes is a rule for it.
    """

    name: str
    title: str
    source: str
    values: tuple[Value, ...]
    corrections: tuple[str, ...] = ()
    as_published: tuple[Value, ...] = ()
    contest: bool = True

    def config(
        self, overrides: Mapping[str, Any] | None = None, as_published: bool = False
    ) -> Config:
        """The configuration, with `overrides` on top.

        Raises:
            ConfigError: an override is unknown, out of range, does not fit, or lifts the contest's
                limit; or as_published for a recipe without a published form.
        """
        chosen = {v.key: v.value for v in self.values}
        if as_published and not self.as_published:
            raise ConfigError(f"as_published=true: {self.name} has no published form")
        if as_published:
            chosen.update({v.key: v.value for v in self.as_published})
        base = with_overrides(Config(recipe=self.name, as_published=as_published), chosen)
        # In a second step: `model.layers` may replace what the recipe calls `layers`.
        config = with_overrides(base, overrides or {})
        self.check_limit(config)
        return config

    def check_limit(self, config: Config) -> None:
        """Raise ConfigError if a contest recipe's limit was lifted."""
        if self.contest and not 0 < config.artifact.budget_bytes <= CONTEST_BYTES:
            raise ConfigError(
                f"budget_bytes={config.artifact.budget_bytes}: {self.name} is a contest recipe, "
                f"its limit is at most {CONTEST_BYTES:,} bytes"
            )
