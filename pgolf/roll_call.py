"""Which process of a run is missing: each answers, when asked, that it is alive.

When a collective breaks, the processes that wait in it learn at different times that one is gone,
but not which. So a thread in every process answers over the store that torchrun keeps. A process
that fails writes the reason there first, if it can.
"""

import atexit
import itertools
import json
import threading
import time

from torch.distributed import PrefixStore, Store

INTERVAL = 0.5  # seconds between checks for a call
ANSWER = 4.0  # seconds in which a process that lives has answered
_runs = itertools.count()  # of this process: the store outlives each


class RollCall:
    """Answers for this process as long as it lives.

    Args:
        store: that all processes of the run share.

    Attributes:
        step, phase: what this process works on.
    """

    def __init__(self, store: Store, rank: int, world: int):
        # A connection of its own: the other one may be in use when everything stands still.
        self.store = PrefixStore(f"pgolf/{next(_runs)}", store.clone())
        self.rank, self.world, self.step, self.phase = rank, world, 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        # A thread that still asks the store when Python ends would abort the process.
        atexit.register(self._stop)

    @property
    def place(self) -> str:
        """Where this process is, for people."""
        return f"step {self.step}" + f" ({self.phase})" * bool(self.phase)

    def _answer(self) -> None:
        try:
            while not self._over.wait(INTERVAL):
                if self.store.check(["call"]):
                    self.store.set(f"here/{self.rank}", "")
                    return
        except RuntimeError:  # the store has gone, with torchrun
            pass

    def _stop(self) -> None:
        self._over.set()
        self._thread.join(ANSWER)

    def missing(self) -> tuple[list[int], bool]:
        """(ranks that do not answer, or that those who ask wait for; gone)."""
        end, every = time.monotonic() + ANSWER, range(self.world)
        silent = idle = list(every)
        try:
            self.store.set(f"asks/{self.rank}", "")
            self.store.set("call", "")
            # All that wait ask at about the same time: who does not keeps them waiting.
            while (silent or len(idle) > 1) and time.monotonic() < end:
                time.sleep(INTERVAL / 5)
                silent, idle = (
                    [r for r in every if not self.store.check([f"{what}/{r}"])]
                    for what in ("here", "asks")
                )
        except RuntimeError:
            return [], False
        return silent or idle, bool(silent)

    def first_failure(self) -> tuple[list[int], str, str] | None:
        """The first report, as (ranks that ended, what became of them, why); None: there is none.

        `pgolf.training.failure_report` makes them.
        """
        try:
            return json.loads(self.store.get("end")) if self.store.check(["end"]) else None
        except RuntimeError:
            return None
