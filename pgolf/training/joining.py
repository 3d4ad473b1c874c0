"""Joining the other ranks of a run, or one line that says why that cannot be."""

import os
import signal

import torch
import torch.distributed as dist

from pgolf.errors import TrainingError
from pgolf.ranks import Ranks
from pgolf.stop import handled
from pgolf.training.failure_report import tell_torchrun


def join(device: str) -> Ranks:
    """`Ranks.start`.

    Raises:
        ConfigError: there is no such device.
        TrainingError: there is no group of all ranks; names why and what to do, to torchrun too.
    """
    try:
        return Ranks.start(device)
    except (RuntimeError, ValueError) as e:  # torch has no class for most of these
        error = TrainingError(_why_no_group(e))
        # One line a machine says what its ranks have in common.
        error.quiet = not dist.is_nccl_available() and os.environ.get("LOCAL_RANK", "0") != "0"
        tell_torchrun(error)
        raise error from e


def exchange_once(ranks: Ranks) -> None:
    """Let GPUs exchange a number: before, NCCL has not looked for the others.

    Raises:
        TrainingError: it fails; says why in NCCL's words.
    """
    if ranks.world == 1 or ranks.device.type != "cuda":
        return
    # Nothing that Python could handle reaches the wait for a rank that fails here.
    with handled(signal.SIG_DFL):
        try:
            ranks.all_reduce(torch.zeros(1, device=ranks.device))
            torch.cuda.synchronize()
        except RuntimeError as e:
            raise TrainingError(
                f"NCCL cannot connect the GPUs of {ranks.world} ranks: {_last_line(e)}: start one "
                "rank a GPU, all with the same driver; NCCL_DEBUG=INFO says more"
            ) from e


def _why_no_group(error: Exception) -> str:
    """What keeps ranks from meeting, and the remedy."""
    text = str(error)
    where = "MASTER_ADDR={}, MASTER_PORT={}".format(
        *(os.environ.get(name, "(not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
    )
    if "EADDRINUSE" in text:
        return (
            f"MASTER_PORT={os.environ['MASTER_PORT']} is in use, perhaps by another run: choose "
            "another port, or `torchrun --standalone`, which finds a free one"
        )
    if "NCCL built in" in text:
        return (
            f"torch {torch.__version__} has no NCCL, by which GPUs exchange gradients: install a "
            "build of torch that has it, or train on one GPU without torchrun"
        )
    return (
        f"the {os.environ['WORLD_SIZE']} ranks of the run do not meet at {where}: "
        f"{_last_line(error)}: start them with torchrun, all with the same address and port"
    )


def _last_line(error: Exception) -> str:
    """Where torch and NCCL say what it was, after what it was in."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")
