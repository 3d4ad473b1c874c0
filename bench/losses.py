"""The losses of two runs side by side, step by step.

    python -m bench.losses RUN OTHER --json FILE    (exit code 1: they differ by more than 2 %)

With --steps N both have to have the losses of N steps.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf.errors import DataError, PgolfError
from pgolf.files import atomic_write

SAME = 0.02  # relative, at each step: of two runs that differ in their kernels alone


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss, of a run folder.

    Raises:
        DataError: it has none.
    """
    file = run / "metrics.jsonl"
    try:
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise DataError(f"{file}: {e}: is {run} the folder of a run that has begun?") from e
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def compare(runs: Sequence[Path], file: Path) -> list[dict[str, Any]]:
    """The steps that two runs have logged, each with its two losses; `file` gets them as well.

    Raises:
        DataError: a run has no losses.
        StorageError: `file` cannot be written.
    """
    first, second = map(losses, runs)
    lines = [
        {"step": step, "losses": [first[step], second[step]]}
        for step in sorted(first.keys() & second.keys())
    ]
    atomic_write(file, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def main(argv: list[str]) -> int:
    """Compare the steps that both runs logged; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.losses", description=__doc__)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="at least (1)")
    args = parser.parse_args(argv)
    try:
        both = compare(args.runs, args.json)
    except PgolfError as e:
        print(f"python -m bench.losses: {e}", file=sys.stderr)
        return e.exit_code
    apart = [x["step"] for x in both if not abs(x["losses"][1] / x["losses"][0] - 1) <= SAME]
    for line in both:
        print(f"step {line['step']}: {line['losses'][0]:.5f} {line['losses'][1]:.5f}")
    print(f"WRONG: more than {SAME:.0%} apart at steps {apart}" if apart else "alike")
    if len(both) < args.steps:
        print(f"WRONG: {len(both)} steps of both runs, not {args.steps}")
    return 1 if apart or len(both) < args.steps else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
