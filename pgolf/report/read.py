"""Reads a run folder for the report: config.json, metrics.jsonl and result.json.

What is missing or not finite in a file becomes None here, once, so that the charts and tables only
meet finite numbers and None.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.errors import DataError


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder; metrics are split by their kind, in the order of the file."""

    config: dict[str, Any]
    result: dict[str, Any]
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    events: list[dict[str, Any]]


def number(value: Any) -> float | None:
    """A finite number as float; None for anything else (null, NaN, text, a bool).

    From 1e300 on a number counts as not finite: the difference of two might not be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer beyond the range of float
        return None
    return value if abs(value) < 1e300 else None


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The JSON objects in `value` if it is a list, else none."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """One JSON object. NaN and Infinity, which Python's writer emits by default, become None."""
    try:
        value = json.loads(raw.decode(), parse_constant=lambda word: None)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} is damaged ({e}): train again, or restore the file") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is damaged: expected an object, found {type(value).__name__}")
    return value


def _read(run: Path, name: str) -> bytes:
    try:
        return (run / name).read_bytes()
    except FileNotFoundError:
        remedy = "give the folder of a finished run" if run.is_dir() else "there is no such folder"
        raise DataError(f"{run} holds no {name}: {remedy}") from None
    except OSError as e:
        raise DataError(f"cannot read {run / name}: {e.strerror}") from e


def read_run(run: Path) -> RunFiles:
    """Read and check the three files of a run.

    Raises:
        DataError: a file is missing or damaged; the message names the file and the line.
    """
    config, result = (
        _parse_object(_read(run, name), str(run / name)) for name in ("config.json", "result.json")
    )
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "event": []}
    for line, raw in enumerate(_read(run, "metrics.jsonl").split(b"\n"), start=1):
        if raw.strip():
            entry = _parse_object(raw, f"{run / 'metrics.jsonl'} line {line}")
            # A kind that a later version writes is not ours to show.
            kinds.get(str(entry.get("kind")), []).append(entry)
    return RunFiles(config, result, kinds["train"], kinds["val"], kinds["event"])
