"""Parts of a long measurement, one after another within a time limit, each with a share and a log.

A part may take its share of the remaining time, so one that ends early leaves more to those after
it. When its time is over, all processes that it started are ended; what it has written stays.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pgolf.files import storage_errors

ROOT = Path(__file__).resolve().parents[1]
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
LEAST = 2.0  # seconds with which no part is begun

Command = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Commands that belong together.

    Attributes:
        share: of the time.
        commands: run one after another in the seconds that it is given, even if earlier ones fail.
        says: lines for the summary, from what the commands have written.
        env: additions to the environment.
        missing: why it cannot run; '' if it can.
        endless: it runs as long as it may, so being cut off is no fault.
        needed: others depend on it, so it may take all the remaining time.
        until: of its time, when each command is ended at the latest, the last ones at its end; it
            is no fault to be ended before the part's end: what follows judges what is there.
        unjudged: so many commands, the first ones, may fail: those after them judge.
    """

    name: str
    share: float
    commands: Callable[[float], Sequence[Command]]
    says: Callable[[], list[str]] = list
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    endless: bool = False
    needed: bool = False
    until: Sequence[float] = ()
    unjudged: int = 0


def results(out: Path, name: str) -> list[Path]:
    """The files of JSON lines that a part has written: NAME.jsonl and NAME-*.jsonl."""
    files = [*out.glob(f"{name}.jsonl"), *out.glob(f"{name}-*.jsonl")]
    return sorted(files, key=lambda file: file.stem)


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    verdict: str
    good: bool
    seconds: float
    says: list[str]


def run(
    parts: Sequence[Part],
    seconds: float,
    out: Path,
    after: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run all parts, whatever happens to those before; their logs are `out`/NAME.log.

    Args:
        after: called with the outcomes so far, after each part and after an interrupted one, too.

    Raises:
        KeyboardInterrupt: after all that runs was ended.
    """
    end, outcomes = time.monotonic() + seconds, []
    for i, part in enumerate(parts):
        left = end - time.monotonic()
        may = left if part.needed else left * part.share / sum(p.share for p in parts[i:])
        began = time.monotonic()
        try:
            print(f"== {part.name}: up to {may:.0f} s, {out / part.name}.log", flush=True)
            verdict, good = _run(part, may, out)
        except KeyboardInterrupt:
            outcomes.append(_outcome(part, "interrupted", False, began))
            after(outcomes)
            raise
        outcomes.append(_outcome(part, verdict, good, began))
        print(f"   {verdict} after {outcomes[-1].seconds:.0f} s", flush=True)
        after(outcomes)
    return outcomes


def _outcome(part: Part, verdict: str, good: bool, began: float) -> Outcome:
    try:
        lines = part.says()
    except Exception as e:  # of a file that was cut off: the other parts matter more
        lines = [f"its results cannot be read: {type(e).__name__}: {e}"]
    return Outcome(part.name, verdict, good, time.monotonic() - began, lines)


def _run(part: Part, seconds: float, out: Path) -> tuple[str, bool]:
    """(verdict, whether it is good)."""
    if part.missing:
        return f"left out: {part.missing}", False
    if seconds < LEAST:
        return "no time was left", False
    began, failed = time.monotonic(), []
    with storage_errors(out), open(out / f"{part.name}.log", "wb") as log:
        for i, command in enumerate(part.commands(seconds)):
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            until = part.until[i] if i < len(part.until) else 1.0
            left = began + until * seconds - time.monotonic()
            code = _in_time(command, left, log.fileno(), part.env)
            if code is None and until == 1.0:
                return f"cut off after {seconds:.0f} s", part.endless and not failed
            if code is None:
                log.write(f"ended after {until:.0%} of the time\n".encode())
            elif code and i >= part.unjudged:
                failed.append(code)
    return (f"FAILED, code {failed[0]}", False) if failed else ("passed", True)


def _in_time(
    command: Command, seconds: float, log: int, env: Mapping[str, str]
) -> int | None:
    """The exit code of a command, None if its time was over; nothing of it is left running."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log,
        stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)  # also if it has ended by itself: what it has started may run on


def _end(process: subprocess.Popen) -> None:
    """SIGTERM to all that a process has started, SIGKILL to what is left after a while."""
    started = _descendants(process.pid)  # before their parents go; torchrun's have other groups
    for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for pid, born in started.items():
            if _birth(pid) == born:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: state, parent, ...; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def _birth(pid: int) -> str | None:
    """When a process began, which tells it from a later one of its number."""
    status = _stat(pid)
    return status[19] if status else None


def _descendants(pid: int) -> dict[int, str]:
    """Processes that one has started, and those these have: number -> when they began."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if status := _stat(int(folder.name)):
            children.setdefault(int(status[1]), []).append(int(folder.name))
    todo, births = [pid], {}
    while todo:
        for child in children.get(todo.pop(), []):
            if born := _birth(child):
                births[child] = born
                todo.append(child)
    return births
