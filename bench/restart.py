"""Going on in a new process, when an error has spoilt the GPU for this one.

An illegal access or a trap in a kernel stays with the CUDA context: whatever the process calls
later fails with it. So the process is replaced by one that leaves out what failed and what --json
has of the others.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch


def add_option(add: argparse._ActionsContainer) -> None:
    """--failed, which the new process is given."""
    add.add_argument(
        "--failed", action="append", default=[], metavar="NAME",
        help="go on with a run that has written --json: leave out what is there, and this, which "
        "failed (given by a process to the one that replaces it when the GPU is spoilt for it)",
    )  # fmt: skip


def spoilt(device: torch.device) -> bool:
    """Whether nothing more can run on a device in this process; asked after an error."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:  # of many classes, by torch's version
        return True
    return False


def go_on(command: str, argv: Sequence[str], failed: Sequence[str], *more: str) -> NoReturn:
    """Replace this process by another one of `python -m bench COMMAND`.

    Args:
        argv: what this one was called with.
        failed: what failed here and before, by the names that --failed takes.
        more: words that come last.
    """
    named = [word for name in failed if name not in argv for word in ("--failed", name)]
    print("the GPU is spoilt for this process: a new one goes on", flush=True)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench", command, *argv, *named, *more])
