"""Short runs of several ranks, in each of which another exchange between them fails on one.

    broken_exchanges.py WORLD FOLDER train ...    runs N in FOLDER/N, writes FOLDER/runs.json

Ranks are forks of this process, which has loaded all that they need and, as torchrun does, keeps
their store. The first run is whole; then exchange N fails on rank N modulo WORLD, each N that is
the first of its kind in a step, warm-up, validation or checkpoint. For each run: its exchanges and
the place of each, and of each rank its exit code and what it said.
"""

import json
import os
import re
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch.distributed as dist

from pgolf import ranks as module
from pgolf import roll_call
from pgolf.cli import main, train  # noqa: F401 (so that forks need not load it)
from pgolf.submission import script  # noqa: F401
from pgolf.training import run

SECONDS = 60  # until a run that has not ended is killed
EXCHANGES = [
    *((dist, name) for name in ("all_gather", "all_reduce", "broadcast")),
    *((dist, name) for name in ("all_gather_object", "broadcast_object_list")),
    *((module, name) for name in ("_REDUCE_SCATTER", "_ALL_GATHER")),
]


class Exchanges:
    """Counts them, and lets one fail: its number, or 0 for none."""

    def __init__(self, fails: int):
        self.made, self.fails, self._inside = [], fails, False
        for place, name in EXCHANGES:
            setattr(place, name, self._seen(name, getattr(place, name)))
        self.calls = []
        made = roll_call.RollCall.__init__

        def make(call, *args):
            made(call, *args)
            self.calls.append(call)

        roll_call.RollCall.__init__ = make

    def _seen(self, name, call):
        def exchange(*args, **kwargs):
            if self._inside:  # those of objects consist of others
                return call(*args, **kwargs)
            self.made.append((name, self.calls[-1].place))
            if len(self.made) == self.fails:
                raise RuntimeError(f"exchange {self.fails} is broken")
            self._inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False

        return exchange


def rank_of(folder: Path, rank: int, fails: int, words: list[str]) -> None:
    """What a fork does: `pgolf` with these words, and files that say how that went."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    exchanges, leave = Exchanges(fails), os._exit

    def noted(code):
        (folder / f"rank-{rank}.json").write_text(json.dumps(exchanges.made))
        leave(code)

    os._exit = noted
    try:
        code = main([*words, f"out={folder / 'run'}"])
    except BaseException as e:  # a bug's traceback is one line here
        print(f"bug: {type(e).__name__}: {e}")
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    noted(code)


def case(folder: Path, world: int, fails: int, words: list[str]) -> dict:
    """One run: {made, codes, said}; a code of -9 is of a rank that had not ended."""
    folder.mkdir()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update({
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    })  # fmt: skip
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            rank_of(folder, rank, fails if rank == fails % world else 0, words)
        pids.append(pid)
    codes, end = {}, time.monotonic() + SECONDS
    while len(codes) < world:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    made = []
    with suppress(OSError):  # it was killed
        made = json.loads((folder / f"rank-{fails % world}.json").read_text())
    return {
        "made": made,
        "codes": [codes[r] for r in range(world)],
        "said": [(folder / f"rank-{r}.log").read_text() for r in range(world)],
    }


if __name__ == "__main__":
    world, folder, *words = sys.argv[1:]
    world, folder = int(world), Path(folder)
    run.finish = lambda *_: {}
    run.frozen_objects = nullcontext
    runs = [case(folder / "0", world, 0, words)]
    seen = set()
    for number, (name, place) in enumerate(runs[0]["made"], 1):
        kind = name, re.sub(r"\d+", "", place)
        if kind not in seen:
            seen.add(kind)
            runs.append(case(folder / str(number), world, number, words))
    (folder / "runs.json").write_text(json.dumps(runs))
