"""Which process of a run is missing: each says, when it is asked, that it lives and where it is.

When a collective breaks, those that wait in it learn that someone is gone, at different times and
not who. A thread in every process answers instead, over the store that torchrun keeps. One that
fails and can still say so puts that down there first.
"""

import atexit
import itertools
import json
import threading
import time

from torch.distributed import PrefixStore, Store

INTERVAL = 0.5  # seconds between looks whether somebody asks
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
                    self.store.set(f"here/{self.rank}", str(self.step))
                    return
        except RuntimeError:  # the store has gone, with torchrun
            pass

    def _stop(self) -> None:
        self._over.set()
        self._thread.join(ANSWER)

    def missing(self) -> tuple[list[int], bool]:
        """(ranks that do not answer, or that are behind those that wait for them; gone)."""
        end = time.monotonic() + ANSWER
        here: dict[int, int] = {}
        try:
            self.store.set("call", "")
            while len(here) < self.world and time.monotonic() < end:
                time.sleep(INTERVAL / 5)
                for rank in range(self.world):
                    if rank not in here and self.store.check([f"here/{rank}"]):
                        here[rank] = int(self.store.get(f"here/{rank}"))
        except RuntimeError:
            return [], False
        silent = [rank for rank in range(self.world) if rank not in here]
        behind = [r for r, step in here.items() if step < max(here.values())]
        return silent or sorted(behind), bool(silent)

    def first_words(self) -> tuple[list[int], str, str] | None:
        """What was put down first, as (ranks that ended, what became of them, why); None: nothing.

        `pgolf.training.last_words` does that.
        """
        try:
            return json.loads(self.store.get("end")) if self.store.check(["end"]) else None
        except RuntimeError:
            return None
