"""What `python -m bench tune --epilogues` found on GPUs, which `auto` tries before its own order.

The table is beside this file: name of a GPU -> operator -> what is to run, why, and the sizes that
it was timed for. At others the reference runs, as it does where nothing was timed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from pgolf.errors import ConfigError

TIMED = Path(__file__).with_name("timed.json")
Sizes = Mapping[str, int]  # by name, as the operator's `obstacle` takes them


class Row(NamedTuple):
    """What is to run for tensors of these sizes, and why."""

    impl: str
    reason: str
    sizes: Sizes


def table() -> dict[str, dict[str, Row]]:
    """All of it; empty if there is none.

    Raises:
        ConfigError: the file holds something else.
    """
    if not TIMED.is_file():
        return {}
    try:
        rows = json.loads(TIMED.read_bytes())
        return {gpu: {n: _row(v) for n, v in of_gpu.items()} for gpu, of_gpu in rows.items()}
    except (ValueError, AttributeError, TypeError) as e:
        raise ConfigError(
            f"{TIMED} is damaged: delete it, and run `python -m bench tune --epilogues` again"
        ) from e


def _row(value: object) -> Row:
    row = Row(**value)
    wanted = isinstance(row.sizes, dict) and all(isinstance(n, int) for n in row.sizes.values())
    if not (isinstance(row.impl, str) and isinstance(row.reason, str) and wanted):
        raise TypeError(f"{value} is no implementation, reason and sizes")
    return row


def timed(operator: str, dtype: torch.dtype, sizes: Sizes) -> tuple[str, str] | None:
    """(implementation, reason) of an operator on this GPU; None if it was not timed in that dtype.

    Args:
        sizes: at hand; {} if there are none yet: then what was timed is said with its sizes.

    Raises:
        ConfigError: as `table`.
    """
    rows = table() if dtype == torch.bfloat16 else {}  # in which it is timed
    if not rows or not torch.cuda.is_available():
        return None
    row = rows.get(torch.cuda.get_device_name(), {}).get(operator)
    if row is None or sizes == row.sizes:
        return row and row[:2]
    if not sizes:
        return row.impl, f"at {_words(row.sizes)}: {row.reason}; at others the reference"
    return "reference", f"this GPU has timed {_words(row.sizes)}, not {_words(sizes)}"


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sorted(sizes.items()))
