"""`pgolf` with a fault on one rank, for tests: `injected.py FAULT RANK train ...` under torchrun.

The fault is patched in here, so the package knows nothing of it.
"""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pgolf.cli import main

STEP = 10


def at_step(fail: Callable[[], None]) -> None:
    """Do something when step 10 begins."""
    from pgolf.training.trainer import Trainer

    step = Trainer.step

    def failing(self, *args, **kwargs):
        if self.clock.step == STEP - 1:
            fail()
        return step(self, *args, **kwargs)

    Trainer.step = failing


def raise_a_bug() -> None:
    raise RuntimeError("the injected bug")


def hang() -> None:
    """For good, where a signal's handler does not come."""
    pthreads, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    for _ in range(2):
        pthreads.pthread_mutex_lock(mutex)


def while_packing(fail: Callable[[], None]) -> None:
    """Do something when training is over and matrices are quantised."""
    from pgolf.training import export

    export.calibrate = lambda *args: fail()


def no_device() -> None:
    """This rank fails before there is a group."""
    from pgolf import ranks
    from pgolf.errors import ConfigError

    def failing(*args):
        raise ConfigError("local rank 1 has no GPU")

    ranks.pick_device = failing


def other_shards(change: Callable[[Path], None]) -> None:
    """Let data= name a copy of the folder that differs by `change`."""
    (index, word), *_ = [(i, w) for i, w in enumerate(sys.argv) if w.startswith("data=")]
    folder = Path(word.removeprefix("data="))
    copy = folder.with_name(f"{folder.name}-other")
    shutil.copytree(folder, copy)
    change(copy)
    sys.argv[index] = f"data={copy}"


def shorten(folder: Path) -> None:
    """Leave a tenth of the first training shard."""
    from pgolf.data.shards import open_shard, write_shard

    (shard, *_) = sorted(folder.glob("*_train_*.bin"))
    tokens = open_shard(shard, None)
    write_shard(shard, tokens[: tokens.size // 10].copy())


def spoil(folder: Path) -> None:
    """Tokens of another vocabulary, first read at step 6 to 10."""
    from pgolf.data.shards import open_shard, write_shard

    (shard, *_) = sorted(folder.glob("*_train_*.bin"))
    tokens = open_shard(shard, None).copy()
    tokens[1200:] = 60_000
    write_shard(shard, tokens)


FAULTS = {
    "bug": lambda: at_step(raise_a_bug),
    "hangs": lambda: at_step(hang),
    "exit": lambda: at_step(lambda: os._exit(0)),
    "packing": lambda: while_packing(raise_a_bug),
    "killed": lambda: while_packing(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "shorter": lambda: other_shards(shorten),
    "foreign": lambda: other_shards(spoil),
    "missing": lambda: other_shards(lambda folder: max(folder.glob("*_train_*.bin")).unlink()),
    "device": no_device,
    "config": lambda: sys.argv.append("matrix_lr=0.01"),
    "option": lambda: sys.argv.append("lauers=3"),
}

if __name__ == "__main__":
    fault, rank = sys.argv[1:3]
    del sys.argv[1:3]
    if os.environ["RANK"] == rank:
        FAULTS[fault]()
    sys.exit(main())
