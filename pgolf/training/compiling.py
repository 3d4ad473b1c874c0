"""What a run does about torch.compile: nothing is compiled once its steps are on the clock."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pgolf.errors import TrainingError
from pgolf.training.compile_cache import kept_code
from pgolf.training.trainer import Trainer

STANCE = "fail_on_recompile"
# "- 1/0: what differs" of graph 0 of function 1; the first is the warm-up's.
_REASON = re.compile(r"- (?:\[?\d+/)(\d+)\]?: (.+)")


def warm_up(trainer: Trainer) -> None:
    """`Trainer.warm_up`, with the code that an earlier run has compiled."""
    with trainer.session.phases("warm_up"), kept_code(trainer):
        trainer.warm_up()


@contextmanager
def compiled_once(trainer: Trainer) -> Iterator[None]:
    """A block in which a training pass runs what the warm-up compiled.

    To compile it anew takes as long as the warm-up did, with the clock on. Validation, which has
    other shapes, may compile: that is off the clock.

    Raises:
        TrainingError: a pass would have to be compiled anew; says what changed.
    """
    if not trainer.compiled:
        yield
        return
    passes = trainer.passes

    def guarded(*args: Any, **named: Any) -> torch.Tensor:
        try:
            with torch.compiler.set_stance(STANCE):
                return passes(*args, **named)
        except RuntimeError as e:
            if STANCE not in str(e):
                raise
            raise TrainingError(
                f"step {trainer.clock.step + 1} would have to be compiled anew, with the clock on: "
                f"{_changed(str(e))}. Training has to run what the warm-up compiled: keep that as "
                "it was, or train with compile=off"
            ) from None

    trainer.passes = guarded
    try:
        yield
    finally:
        trainer.passes = passes


def _changed(message: str) -> str:
    """What torch says about the graph that the warm-up made: the first guard that failed."""
    reasons = sorted((int(n), why.strip()) for n, why in _REASON.findall(message))
    return reasons[0][1] if reasons else "torch gives no reason"
