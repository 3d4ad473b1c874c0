"""The ledger of a run: what each of its phases took, and which limit that counts against."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pgolf.config import Config
from pgolf.recipes.recipe import CONTEST_SCORING_S

OTHER = "other"  # starting, logging, comparing, reporting
PHASES = (
    "compile", "warm_up", "training", "validation", "checkpoints", "calibration", "quantisation",
    "packing", "live_scoring", "scoring", OTHER,
)  # fmt: skip


class Phases:
    """The seconds of a run by phase: `with phases("validation"): ...`.

    A second counts once, for the innermost phase that is open; those outside of any are `OTHER`.

    Attributes:
        seconds: by phase, until one was last opened or closed; those of the parts of a run that
            was resumed are together.
        cache: whether what was compiled was found compiled, "warm" or "cold"; None: not looked at.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.cache: str | None = None
        self._open = [OTHER]
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        now, name = time.perf_counter(), self._open[-1]
        self.add({name: now - self._since})
        self._since = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count more seconds, by phase: those of an earlier part of the run."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more

    def ledger(
        self, train_seconds: float, limits: Mapping[str, tuple[str, float]]
    ) -> dict[str, dict[str, Any]]:
        """What result.json has: a row for each of `PHASES` and `total`, which is their sum.

        Args:
            train_seconds: of the training clock; what training took beyond is `OTHER`.
            limits: of `limits`.
        """
        self._count()
        spent = dict.fromkeys(PHASES, 0.0) | self.seconds
        spent[OTHER] += max(spent["training"] - train_seconds, 0.0)
        spent["training"] = train_seconds
        spent["total"] = sum(spent.values())
        rows = {}
        for name, seconds in spent.items():
            limit, most = limits.get(name, (None, None))
            on = name == "training" or limit == "reserve_s"
            rows[name] = {
                "seconds": seconds, "on_clock": on, "limit": limit, "limit_seconds": most
            }  # fmt: skip
        rows["compile"]["cache"] = self.cache
        return rows


def limits(config: Config, contest: bool) -> dict[str, tuple[str, float]]:
    """Phase -> the limit that its seconds count against, by name and in seconds.

    Calibration and quantisation share theirs.
    """
    s, limit = config.schedule, {}
    if s.max_seconds:
        name = "max_seconds - reserve_s" if s.reserve_s else "max_seconds"
        limit["training"] = name, s.max_seconds - s.reserve_s
    if s.reserve_s:
        limit |= dict.fromkeys(("calibration", "quantisation"), ("reserve_s", s.reserve_s))
    if contest:
        limit["scoring"] = "evaluation", CONTEST_SCORING_S
    return limit
