"""What the ranks of a run have to have in common before the first tensor is trained on.

Each may lie on another machine, with other versions, settings or shards. Different ones would train
on, each in its own way, or stand still in a collective that the others do not come to.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from pgolf.errors import PgolfError, TrainingError
from pgolf.ranks import Ranks, named
from pgolf.training.failure_report import describe, report_failure
from pgolf.training.joining import join

T = TypeVar("T")
SHOWN = 4  # differences


def alike(
    ranks: Ranks,
    work: Callable[[], T],
    facts: Callable[[T], Mapping[str, str]],
    remedy: str = "start all ranks with the same software, settings and data",
) -> T:
    """Do something on every rank; none goes on unless all could, and with the same facts.

    Args:
        work: takes part in collectives only before it does what may fail on one rank alone.
        facts: of its result: what is compared -> what this rank has, for people.
        remedy: what to do where they differ.

    Raises:
        PgolfError: what `work` raised, on the first rank where it did; others end in silence. Or a
            TrainingError that names what differs, which rank 0 says.
    """
    if ranks.world == 1:
        return work()
    result, mine, failure = None, {}, None
    try:
        result = work()
        mine = dict(facts(result))
    except Exception as e:
        failure = e
    every = gathered(ranks, (mine, failure and describe(failure)))
    reasons = {rank: why for rank, (_, why) in enumerate(every) if why is not None}
    if reasons:
        raise _failure(ranks.rank, failure, reasons)
    if differing := differences([facts for facts, _ in every]):
        listed = "; ".join(differing[:SHOWN])
        if len(differing) > SHOWN:
            listed += f"; and {len(differing) - SHOWN} more"
        error = TrainingError(f"{listed}: {remedy}")
        error.quiet = not ranks.first
        raise error
    return result


def fail_together(error: PgolfError, device: str) -> None:
    """Tell the other ranks of a run that this one cannot begin it, for what `alike` raises then.

    Args:
        device: what the setting of that name says, which may be wrong itself.
    """

    def fail() -> None:
        raise error

    ranks = join("cpu" if device == "cpu" else "auto")
    with report_failure(ranks, ""):
        alike(ranks, fail, lambda nothing: {})


def gathered(ranks: Ranks, mine: T) -> list[T]:
    """What each rank has, in the order of ranks; it is pickled."""
    every = [mine] * ranks.world
    dist.all_gather_object(every, mine, ranks.control)
    return every


def _failure(rank: int, mine: Exception | None, reasons: Mapping[int, str]) -> Exception:
    """What a rank raises after `reasons`, which ranks have failed for: the first of them speaks."""
    first = min(reasons)
    if rank != first:
        error = mine if isinstance(mine, PgolfError) else TrainingError(
            f"{named([first])} failed: {reasons[first]}"
        )  # fmt: skip
        error.quiet = True
        return error
    others = {why: r for r, why in sorted(reasons.items(), reverse=True) if why != reasons[first]}
    if others and isinstance(mine, PgolfError):
        more = "; ".join(f"{named([r])}: {why}" for why, r in reversed(others.items()))
        mine.args = (f"{mine}; {more}", *mine.args[1:])
    return mine


def differences(every: Sequence[Mapping[str, str]]) -> list[str]:
    """What ranks do not have in common, as 'rank 1 has torch 2.9.1, rank 0 torch 2.11.0'."""
    lines = []
    for name in dict.fromkeys(name for facts in every for name in facts):
        having: dict[str, list[int]] = {}
        for rank, facts in enumerate(every):
            having.setdefault(facts.get(name, f"no {name}"), []).append(rank)
        (usual, _), *others = having.items()  # rank 0's first
        if others:
            who = [f"{named(r)} {'has' if len(r) == 1 else 'have'} {what}" for what, r in others]
            lines.append(f"{', '.join(who)}, rank 0 {usual}")
    return lines
