"""Progress with an ETA on standard error: one moving line on a terminal, else a line at times."""

import io
import sys
import time


def print_anything() -> None:
    """Print what the terminal has no characters for as escapes, instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def format_seconds(seconds: float) -> str:
    """12 -> '12s', 75 -> '1m15s', 3700 -> '1h01m'."""
    s = int(round(seconds))
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Progress:
    """Shows `done / total` with a rate-based ETA; use it as a context manager.

    Args:
        label: what is going on, such as 'tokenising'.
        total: how much there is to do, in `unit`.
        unit: shown behind the counts, such as 'documents'.
        enabled: False shows nothing (ranks other than 0).
        every: seconds between two lines where standard error is not a terminal.
    """

    def __init__(
        self, label: str, total: int, unit: str = "", enabled: bool = True, every: float = 10.0
    ):
        self.label, self.total, self.unit = label, max(int(total), 1), unit
        self.enabled = enabled
        self.tty = sys.stderr.isatty()
        self.every = 0.2 if self.tty else every
        self.done = self.last_shown = 0
        self.start = self.shown = time.monotonic()
        self.note = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def update(self, amount: int = 1, note: str = "") -> None:
        """Add `amount` to what is done; `note` is shown at the end of the line."""
        self.done += amount
        self.note = note
        now = time.monotonic()
        if self.enabled and now - self.shown >= self.every:
            self.shown = now
            self._show(now)

    def _show(self, now: float, end: str = "") -> None:
        self.last_shown = self.done
        elapsed = now - self.start
        eta = elapsed / self.done * max(self.total - self.done, 0) if self.done else 0.0
        line = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}".rstrip()
        line += f", {format_seconds(elapsed)} gone, {format_seconds(eta)} left"
        line += f"  {self.note}" if self.note else ""
        print(
            f"\r\x1b[2K{line}" if self.tty else line,
            end=end if self.tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """End the moving line; on other outputs, a last line if the work took a while."""
        now = time.monotonic()
        not_shown = now - self.start >= self.every and self.last_shown < self.done
        if self.enabled and (self.tty or not_shown):
            self._show(now, end="\n")
        self.enabled = False
