"""Runs checks against mutants, each in a process of its own that may hang or crash."""

import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from .mutator import Mutant

# A fork shares what the parent has imported: a mutant costs its checks, not an import of torch.
_fork = multiprocessing.get_context("fork")
# Seconds without any work until a process counts as stuck: some mutants spoil the heap, locks in it
# included. Limits are CPU time apart from that, since other work on the machine is nobody's fault.
STUCK = 30.0


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; `why` is empty if no check noticed it."""

    mutant: Mutant | None  # None: the original
    why: str
    seconds: float  # of CPU time, 0 where it did not come to an end


@dataclass
class _Running:
    mutant: Mutant | None
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    limit: float
    ticks: list[str] = field(default_factory=list)  # of CPU time, when it was last seen to work
    seen: float = field(default_factory=time.monotonic)

    def stuck(self) -> bool:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        ticks = stat.rpartition(")")[2].split()[11:13]  # in user and kernel mode
        if ticks != self.ticks:
            self.ticks, self.seen = ticks, time.monotonic()
        return time.monotonic() - self.seen > STUCK


def run(
    mutants: Iterable[Mutant],
    prepare: Callable[[Mutant], object],
    checks: Sequence[Callable[[], None]],
    limit: float,
    processes: int = 2,
) -> Iterator[Outcome]:
    """Outcomes in the order in which they are known.

    In a process of its own for each mutant: `prepare(mutant)` puts it in place, then the checks
    run until one raises. A mutant that takes more than `limit` seconds of CPU time is noticed.
    """
    waiting = iter(mutants)
    running: list[_Running] = []
    try:
        while True:
            while len(running) < processes and (mutant := next(waiting, None)) is not None:
                running.append(_start(mutant, lambda m=mutant: prepare(m), checks, limit))
            if not running:
                return
            wait([r.pipe for r in running], timeout=1.0)
            for r in list(running):
                outcome = _outcome(r)
                if outcome is not None:
                    running.remove(r)
                    yield outcome
    finally:
        for r in running:
            _end(r)


def run_original(checks: Sequence[Callable[[], None]], limit: float) -> Outcome:
    """The same checks with nothing changed: they have to pass."""
    running = _start(None, lambda: None, checks, limit)
    while (outcome := _outcome(running)) is None:
        wait([running.pipe], timeout=1.0)
    return outcome


BY_CHANCE = "by chance"


def judge(results: Mapping[str, str], listed: Mapping[str, str], share: float) -> list[str]:
    """What is wrong with the results; one line each.

    Args:
        results: what noticed each mutant, empty where nothing did.
        listed: the survivors that are known, each with its reason. One that starts with BY_CHANCE
            may be caught: where memory ends behind a tensor, a read outside of it ends the process.
        share: of the mutants that has to be noticed.
    """
    survivors = [name for name, why in results.items() if not why]
    complaints = [f"survived, and is not listed: {n}" for n in survivors if n not in listed]
    sure = [n for n, reason in listed.items() if not reason.startswith(BY_CHANCE)]
    complaints += [f"listed as a survivor, but caught: {n}" for n in sure if results.get(n)]
    caught = len(results) - len(survivors)
    if caught < share * len(results):
        complaints.append(f"{caught} of {len(results)} caught, fewer than {share:.0%}")
    return complaints


def _start(
    mutant: Mutant | None,
    prepare: Callable[[], object],
    checks: Sequence[Callable[[], None]],
    limit: float,
) -> _Running:
    ours, theirs = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_child, args=(theirs, prepare, checks, limit), daemon=True)
    process.start()
    theirs.close()
    return _Running(mutant, process, ours, limit)


def _child(
    pipe: Connection,
    prepare: Callable[[], object],
    checks: Sequence[Callable[[], None]],
    limit: float,
) -> None:
    seconds = math.ceil(limit)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    os.dup2(quiet, sys.stderr.fileno())
    why = ""
    try:
        prepare()
        for check in checks:
            check()
    except BaseException as e:  # whatever the mutant made of it
        text = str(e).strip().splitlines() or [""]
        why = f"{type(e).__name__}: {text[0]}"
    pipe.send((why, time.process_time()))


def _outcome(running: _Running) -> Outcome | None:
    """None while it is still at work within its limit."""
    seconds = 0.0
    if running.pipe.poll():
        try:
            why, seconds = running.pipe.recv()
        except EOFError:
            running.process.join()
            code = running.process.exitcode
            why = f"the process died with code {code}"
            if code == -signal.SIGXCPU:
                why = f"no end after {math.ceil(running.limit)} s"
    elif running.stuck():
        why = f"no work in {STUCK:.0f} s"
    else:
        return None
    _end(running)
    return Outcome(running.mutant, why, seconds)


def _end(running: _Running) -> None:
    running.process.kill()
    running.process.join()
    running.pipe.close()
