"""A run that is asked to end: finish the step, keep what there is, say how to go on."""

import os
import shlex
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from pgolf.errors import PgolfError
from pgolf.stop import SIGNALS, handled

GRACE = 10.0  # seconds
# Ranks that torchrun started do not outlive it.
ORPHANS_END = "TORCHELASTIC_RUN_ID" in os.environ
PARENT = os.getppid()


class Interrupted(PgolfError):
    """The run was stopped from outside; `exit_code` names the signal, as a shell does."""

    def __init__(self, message: str, exit_code: int = 128 + signal.SIGINT):
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


class Interrupt:
    """While active, the first SIGINT or of `stop.SIGNALS` asks for a stop.

    A second SIGINT stops at once. A process that takes no notice within `GRACE` seconds, because
    it waits for others somewhere that Python's handlers do not reach, is ended; one whose torchrun
    is gone is asked to stop as by SIGTERM.
    """

    def __init__(self, folder: Path, recipe: str):
        self.folder, self.recipe = folder, recipe
        self._number = 0
        self._noticed = threading.Event()

    def __enter__(self) -> "Interrupt":
        self._stack = ExitStack()
        if threading.current_thread() is threading.main_thread():  # no other one may
            read, write = os.pipe()
            os.set_blocking(write, False)
            # Python writes there when the signal comes, not when its handler can run.
            before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            self._stack.callback(lambda: (signal.set_wakeup_fd(before), os.close(write)))
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        self._stack.enter_context(handled(self._request, signal.SIGINT))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def number(self) -> int:
        """The signal that asks for a stop; 0 if none has come."""
        if ORPHANS_END and os.getppid() != PARENT:
            return self._number or signal.SIGTERM
        return self._number

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        self._noticed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _watch(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb", 0) as signals:
            while came := signals.read(1):  # nothing once the other end is closed
                if came[0] in (signal.SIGINT, *SIGNALS):  # others have handlers too
                    break
            if came and not self._noticed.wait(GRACE):
                name = signal.Signals(came[0]).name
                os.write(2, f"pgolf: {name}: ended in the middle of a step\n".encode())
                os._exit(128 + came[0])

    def error(self, step: int, number: int, kept: bool) -> Interrupted:
        """What to raise for a signal that came to any rank; `kept`: the state is on disk."""
        again = f"; go on with `{resume_command(self.recipe, self.folder)}`" * kept
        return Interrupted(f"stopped after step {step}{again}", 128 + number)


def resume_command(recipe: str, folder: Path) -> str:
    """What goes on with a run."""
    return f"pgolf train {recipe} {shlex.quote(f'out={folder}')} resume=true"
