"""What `python -m bench tune --epilogues` found on GPUs, which `auto` tries before its own order.

The table is beside this file: name of a GPU -> operator -> [implementation, reason].
"""

import json
from pathlib import Path

import torch

from pgolf.errors import ConfigError

TIMED = Path(__file__).with_name("timed.json")
Row = tuple[str, str]


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
    impl, reason = value if isinstance(value, list) else ()
    if not (isinstance(impl, str) and isinstance(reason, str)):
        raise TypeError(f"{value} is no (implementation, reason)")
    return impl, reason


def timed(operator: str, dtype: torch.dtype) -> Row | None:
    """(implementation, reason) of an operator on this GPU; None if it was not timed in that dtype.

    Raises:
        ConfigError: as `table`.
    """
    rows = table() if dtype == torch.bfloat16 else {}  # in which it is timed
    if not rows or not torch.cuda.is_available():
        return None
    return rows.get(torch.cuda.get_device_name(), {}).get(operator)
