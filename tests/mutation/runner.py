"""Runs checks against mutants, each in a process of its own that may hang or crash."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from .mutator import Mutant

# A fork shares what the parent has imported: a mutant costs its checks, not an import of torch.
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; `why` is empty if no check noticed it."""

    mutant: Mutant | None  # None: the original
    why: str
    seconds: float

    @property
    def caught(self) -> bool:
        return bool(self.why)


@dataclass
class _Running:
    mutant: Mutant | None
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    start: float = field(default_factory=time.monotonic)


def run(
    mutants: Iterable[Mutant],
    prepare: Callable[[Mutant], object],
    checks: Sequence[Callable[[], None]],
    limit: float,
    processes: int = 2,
) -> Iterator[Outcome]:
    """Outcomes in the order in which they are known.

    In a process of its own for each mutant: `prepare(mutant)` puts it in place, then the checks
    run until one raises. A mutant that takes more than `limit` seconds counts as caught.
    """
    waiting = iter(mutants)
    running: list[_Running] = []
    try:
        while True:
            while len(running) < processes and (mutant := next(waiting, None)) is not None:
                running.append(_start(mutant, lambda m=mutant: prepare(m), checks))
            if not running:
                return
            now = time.monotonic()
            patience = max(0.0, min(r.start for r in running) + limit - now)
            wait([r.pipe for r in running], timeout=patience)
            for r in list(running):
                outcome = _outcome(r, limit)
                if outcome is not None:
                    running.remove(r)
                    yield outcome
    finally:
        for r in running:
            _end(r)


def run_original(checks: Sequence[Callable[[], None]], limit: float) -> Outcome:
    """The same checks with nothing changed: they have to pass."""
    running = _start(None, lambda: None, checks)
    wait([running.pipe], timeout=limit)
    return _outcome(running, 0.0)


def _start(
    mutant: Mutant | None, prepare: Callable[[], object], checks: Sequence[Callable[[], None]]
) -> _Running:
    ours, theirs = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_child, args=(theirs, prepare, checks), daemon=True)
    process.start()
    theirs.close()
    return _Running(mutant, process, ours)


def _child(
    pipe: Connection, prepare: Callable[[], object], checks: Sequence[Callable[[], None]]
) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    os.dup2(quiet, sys.stderr.fileno())
    try:
        prepare()
        for check in checks:
            check()
    except BaseException as e:  # whatever the mutant made of it
        text = str(e).strip().splitlines() or [""]
        pipe.send(f"{type(e).__name__}: {text[0]}")
    else:
        pipe.send("")


def _outcome(running: _Running, limit: float) -> Outcome | None:
    """None while it is still at work within its limit."""
    seconds = time.monotonic() - running.start
    if running.pipe.poll():
        try:
            why = running.pipe.recv()
        except EOFError:
            running.process.join()
            why = f"the process died with code {running.process.exitcode}"
    elif seconds >= limit:
        why = f"no end after {limit:.0f} s"
    else:
        return None
    _end(running)
    return Outcome(running.mutant, why, seconds)


def _end(running: _Running) -> None:
    running.process.kill()
    running.process.join()
    running.pipe.close()
