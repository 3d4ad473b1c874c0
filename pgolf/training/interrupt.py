"""A run that is asked to end: finish the step, keep what there is, say how to go on."""

import shlex
import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from pgolf.errors import PgolfError
from pgolf.stop import handled


class Interrupted(PgolfError):
    """The run was stopped from outside; `exit_code` names the signal, as a shell does."""

    def __init__(self, message: str, exit_code: int = 128 + signal.SIGINT):
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


class Interrupt:
    """While active, the first SIGINT or of `stop.SIGNALS` asks for a stop.

    A second SIGINT stops at once.
    """

    def __init__(self, folder: Path, recipe: str):
        self.folder, self.recipe = folder, recipe
        self.number = 0

    def __enter__(self) -> "Interrupt":
        self.stack = ExitStack()
        self.stack.enter_context(handled(self._request, signal.SIGINT))
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def error(self, step: int) -> Interrupted:
        """What to raise once the state is on disk."""
        return Interrupted(
            f"stopped after step {step}; go on with `{resume_command(self.recipe, self.folder)}`",
            128 + (self.number or signal.SIGINT),
        )


def resume_command(recipe: str, folder: Path) -> str:
    """What goes on with a run."""
    return f"pgolf train {recipe} {shlex.quote(f'out={folder}')} resume=true"
