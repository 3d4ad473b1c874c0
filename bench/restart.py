"""Continues in a new process when an error has made the GPU unusable for this one.

An illegal access or a trap in a kernel stays with the CUDA context: every later call of the process
fails with it. So the process is replaced by one that leaves out what failed and what --json already
has.
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
        help="continue a run that has written --json: leave out what is there, and this, which "
        "failed (a process that cannot use the GPU any more gives it to the one that replaces it)",
    )  # fmt: skip


def unusable(device: torch.device) -> bool:
    """Whether nothing more can run on a device in this process; asked after an error."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:  # of many classes, by torch's version
        return True
    return False


def rerun(command: str, argv: Sequence[str], failed: Sequence[str], *more: str) -> NoReturn:
    """Replace this process by another one of `python -m bench COMMAND`.

    Args:
        argv: what this one was called with.
        failed: what failed here and before, by the names that --failed takes.
        more: arguments that come last.
    """
    named = [word for name in failed if name not in argv for word in ("--failed", name)]
    print("this process cannot use the GPU any more: a new one continues", flush=True)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench", command, *argv, *named, *more])
