"""A rank that fails reports why before it ends, so that the others can name it and its reason.

The report goes into the store that torchrun keeps, and into the table that torchrun prints at the
end.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pgolf.errors import LostRank, PgolfError, StorageError
from pgolf.files import atomic_write
from pgolf.ranks import END, Ranks, named
from pgolf.roll_call import RollCall
from pgolf.stop import handled
from pgolf.training.interrupt import resume_command
from pgolf.training.run_folder import RunFolder


@contextmanager
def report_failure(ranks: Ranks, recipe: str) -> Iterator[list[RunFolder]]:
    """The whole of a run, after which its ranks part; the first one that fails tells the others.

    Yields:
        Where the run puts its folder once it has one: who was lost then says how to go on.

    Raises:
        LostRank: another rank failed before this one did, and this one could not go on for that
            reason, or was asked to end; or it fails in the same way.
    """
    folders: list[RunFolder] = []
    try:
        with ranks.patient(0, phase="start"):
            yield folders
    except BaseException as e:
        # torchrun asks all to end as soon as one has, and they are about to.
        with handled(lambda *_: None):
            error = _agreed(ranks, e) if ranks.roll_call else e
            lost = isinstance(error, LostRank)
            if lost and folders and folders[0].checkpoints():
                command = resume_command(recipe, folders[0].path)
                error.args = (f"{error}; go on with `{command}`",)
            with suppress(StorageError):
                tell_torchrun(error)
            _part(ranks, lost)
        if error is e:
            raise
        raise error from None
    else:
        ranks.stop()


def _part(ranks: Ranks, lost: bool) -> None:
    """Leave the group. A GPU may wait for the others in vain: not forever, as `Ranks.lost` sees."""
    own_limit = ranks.roll_call is not None and not lost
    if own_limit:
        signal.alarm(END)
    ranks.stop()
    if own_limit:
        signal.alarm(0)


def describe(error: BaseException) -> str:
    """An error as its rank prints it; of a bug, its class and the first line."""
    if isinstance(error, PgolfError | KeyboardInterrupt) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _agreed(ranks: Ranks, error: BaseException) -> BaseException:
    """What this rank ends with, after what it and the others have reported."""
    call = ranks.roll_call
    # By torchrun, perhaps, because another rank has ended.
    asked = any(isinstance(e, KeyboardInterrupt) for e in (error, error.__cause__))
    if asked and (call.first_failure() or call.missing()[1]):
        error = ranks.lost()
    if isinstance(error, LostRank):
        _report(call, error.ranks, str(error), "")
    if isinstance(error, LostRank) or getattr(error, "quiet", False):  # another one says it
        return error
    why = describe(error)
    what = f"{named([ranks.rank])} {'ended' if asked else 'failed'} at {call.place}: {why}"
    first, _, reason = _report(call, [ranks.rank], what, why)
    if first == [ranks.rank] or reason != why:
        return error
    same = error if isinstance(error, PgolfError) else ranks.lost()
    same.quiet = True
    return same


def _report(
    call: RollCall, ranks: list[int], message: str, why: str
) -> tuple[list[int], str, str]:
    """Report this failure unless one is there; returns the first, as `first_failure` does."""
    mine = [list(ranks), message, why]
    with suppress(RuntimeError):  # the store has gone, with torchrun
        mine = json.loads(call.store.compare_set("end", "", json.dumps(mine)))
    return mine


def tell_torchrun(error: BaseException) -> None:
    """Name the reason in torchrun's table, in the format of torch's ErrorHandler.

    The root cause is there what has the earliest whole second, so ranks that end because of another
    one come one later. Python prints a bug's traceback: it is not in the table once more.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        late = isinstance(error, LostRank) or getattr(error, "quiet", False)
        when = {"timestamp": str(int(time.time()) + late)}
        atomic_write(file, json.dumps({"message": {"message": describe(error), "extraInfo": when}}))
