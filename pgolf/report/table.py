"""The result of a run as one plain-text table for the console, at most 80 columns wide.

Names come from files, so characters that a terminal would act on are replaced; all else is ASCII,
which every terminal can show.
"""

import textwrap
from typing import Any

from pgolf.progress import format_seconds
from pgolf.report.format import (
    MISSING,
    NOT_COMPARABLE,
    artifact_parts,
    decimal,
    percent,
    quantisation_cost,
)
from pgolf.report.read import mapping, number

WIDTH = 64
_LABEL, _VALUE = 32, 16


def _plain(text: Any, width: int) -> str:
    """Text that moves no cursor, cut to `width` columns."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text))
    return clean if len(clean) <= width else clean[: width - 3] + "..."


def _row(label: str, value: str, note: str = "") -> str:
    row = f"  {_plain(label, _LABEL - 2):<{_LABEL - 2}}{value:>{_VALUE}}"
    return f"{row}{note:>{WIDTH - len(row)}}".rstrip()


def _score_rows(result: dict[str, Any]) -> list[str]:
    decoded, live = number(result.get("val_bpb")), result.get("val_bpb_live")
    rows = [
        _row("decoded artifact", decimal(decoded, 4)),
        _row("live weights", decimal(live, 4)),
        _row("lost in quantisation", percent(quantisation_cost(result), 2, sign=True)),
    ]
    for name, baseline in mapping(result.get("baselines")).items():
        bpb = number(mapping(baseline).get("bpb"))
        ratio = f"x {bpb / decoded:.2f}" if bpb and decoded else ""
        rows.append(_row(f"{name}, same bytes", decimal(bpb, 4), ratio))
    return rows


def _size_rows(result: dict[str, Any]) -> list[str]:
    total, budget = number(result.get("bytes_total")), number(result.get("budget_bytes"))

    def share(size: float) -> str:
        return percent(size / total, 1) if total else ""

    rows = [_row(name, decimal(size, 0), share(size)) for name, size in artifact_parts(result)]
    rows.append(_row("total", decimal(total, 0), share(total) if total is not None else ""))
    if not budget:
        return [*rows, _row("budget", "none")]
    rows.append(_row("budget", decimal(budget, 0)))
    if total is None:
        return rows
    left = budget - total
    label = "headroom" if left >= 0 else "OVER THE BUDGET BY"
    return [*rows, _row(label, decimal(abs(left), 0), percent(abs(left) / budget, 1))]


def _run_rows(result: dict[str, Any]) -> list[str]:
    seconds = number(result.get("train_seconds"))
    return [
        _row("parameters", decimal(result.get("parameters"), 0)),
        _row("steps", decimal(result.get("steps"), 0)),
        _row("tokens", decimal(result.get("tokens"), 0)),
        _row("training time", MISSING if seconds is None else format_seconds(seconds)),
        _row("ms/step", decimal(result.get("ms_per_step"), 1)),
        _row("tokens/s", decimal(result.get("tokens_per_second"), 0)),
    ]


def _phase_rows(result: dict[str, Any]) -> list[str]:
    """What each phase took, where that is known, and the limit that it counts against."""
    rows = []
    for name, row in mapping(result.get("phases")).items():
        row = mapping(row)
        seconds, limit = number(row.get("seconds")), number(row.get("limit_seconds"))
        if not seconds:
            continue
        note = "on the clock" if row.get("on_clock") else ""
        if limit is not None:
            note = f"of {decimal(limit, 0)} s"
        rows.append(_row(name.replace("_", " "), f"{decimal(seconds, 1)} s", note))
    rule = "-" * WIDTH
    return ["time, and what limits it", *rows, rule] if rows else []


def result_table(result: dict[str, Any]) -> str:
    """The table that ends a run.

    Args:
        result: the contents of result.json; what is missing or not finite shows as n/a.

    Returns:
        Lines of at most 80 columns, ending with a newline.
    """
    rule = "-" * WIDTH
    recipe, seed, corpus = (
        MISSING if result.get(key) is None else result[key] for key in ("recipe", "seed", "corpus")
    )
    size, targets, stride, context = (
        decimal(result.get(key), 0) for key in ("val_bytes", "val_targets", "stride", "seq_len")
    )
    scope = f"{size} held-out bytes, {targets} tokens, stride {stride}, context {context}."
    lines = [
        _plain(f"{recipe}, seed {seed}, on {corpus}", WIDTH),
        rule,
        "bits per byte (lower is better)",
        *_score_rows(result),
        rule,
        "bytes",
        *_size_rows(result),
        rule,
        "training",
        *_run_rows(result),
        rule,
        *_phase_rows(result),
        *textwrap.wrap(f"Scored: {scope} {NOT_COMPARABLE}", WIDTH),
    ]
    return "\n".join(lines) + "\n"
