"""Ctrl-C: finish the step, keep what there is, say how to go on."""

import shlex
import signal
from pathlib import Path
from types import FrameType

from pgolf.errors import PgolfError


class Interrupted(PgolfError):
    """The run was stopped by the user."""

    exit_code = 130


class Interrupt:
    """While active, the first SIGINT or SIGTERM asks for a stop; a second SIGINT stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, folder: Path, recipe: str):
        self.folder, self.recipe = folder, recipe
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self.previous = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def error(self, step: int) -> Interrupted:
        """What to raise once the state is on disk."""
        return Interrupted(
            f"stopped after step {step}; go on with `{resume_command(self.recipe, self.folder)}`"
        )


def resume_command(recipe: str, folder: Path) -> str:
    """What goes on with a run."""
    return f"pgolf train {recipe} {shlex.quote(f'out={folder}')} resume=true"
