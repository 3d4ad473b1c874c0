"""The rows of metrics.jsonl in TensorBoard and Trackio as well (log=tensorboard,trackio)."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pgolf import extras
from pgolf.config import Config, to_dict
from pgolf.errors import ConfigError
from pgolf.ranks import Ranks
from pgolf.training.run_folder import RunFolder


class TensorBoard:
    """Event files in the run folder's `tensorboard`; a run that goes on hides what it had after."""

    library = staticmethod(extras.tensorboard)

    def __init__(self, config: Config, folder: RunFolder, step: int):
        place = str(folder.path / "tensorboard")
        self.writer = self.library().SummaryWriter(place, purge_step=step)

    def write(self, numbers: Mapping[str, float], step: int, text: str) -> None:
        for tag, number in numbers.items():
            self.writer.add_scalar(tag, number, step)
        if text:
            self.writer.add_text("event", text, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run of the project pgolf, called as the run folder is."""

    library = staticmethod(extras.trackio)

    def __init__(self, config: Config, folder: RunFolder, step: int):
        resume = "allow" if config.run.resume else "never"
        self.run = self.library().init(
            project="pgolf", name=folder.path.name, config=to_dict(config), resume=resume
        )

    def write(self, numbers: Mapping[str, float], step: int, text: str) -> None:
        self.run.log({**numbers, "event": text} if text else dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "trackio": Trackio}


class Mirror:
    """Gives rows to a writer, which it opens with the first one; an error of it ends the mirror.

    Args:
        make: a writer, of the step of the first row.
    """

    def __init__(self, name: str, make: Callable[[int], TensorBoard | Trackio]):
        self.name, self._make = name, make
        self._writer: TensorBoard | Trackio | None = None
        self._failed = False

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: its numbers under KIND/KEY, and its text."""
        step, kind = row["step"], row["kind"]
        left = {k: v for k, v in row.items() if k != "step" and not isinstance(v, str)}

        def give() -> None:
            self._writer = self._writer or self._make(step)
            numbers = {} if kind == "event" else {f"{kind}/{k}": v for k, v in left.items()}
            self._writer.write(numbers, step, row.get("text", ""))

        self._guarded(give)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._guarded(self._writer.close)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as e:  # of another package, its disk or its network: no reason to stop
            self._failed = True
            print(f"warning: log={self.name}: {e}; training goes on without", file=sys.stderr)


@contextmanager
def mirrored(config: Config, ranks: Ranks, folder: RunFolder) -> Iterator[None]:
    """A block in which the rows of a run folder go to what log= names too, on the first rank.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    names = config.run.log.split(",") if config.run.log else []

    def check() -> None:
        for name in names:
            if name not in WRITERS:
                known = ", ".join(WRITERS)
                raise ConfigError(f"log={config.run.log}: {name!r} is not one of {known}")
            WRITERS[name].library()

    ranks.on_first(check)  # now, not when there are rows: a run must not find out late

    def maker(name: str) -> Callable[[int], TensorBoard | Trackio]:
        return lambda step: WRITERS[name](config, folder, step)

    folder.mirrors = [Mirror(name, maker(name)) for name in names]
    try:
        yield
    finally:
        for mirror in folder.mirrors:
            mirror.close()
