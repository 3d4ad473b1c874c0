"""`python -m bench operators`: the operators as the table of README.md.

All its text comes from the registry and from the docstring of the operator's module, which opens
with the formula and has a sentence "Shapes: ...". (A submission's script has no docstrings, so they
cost it no bytes.)
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pgolf.device import DTYPES, dtype_name
from pgolf.errors import ConfigError, PgolfError
from pgolf.files import atomic_write
from pgolf.ops.operator import OPERATORS, Operator

COLUMNS = ("operator", "shapes", "CPU", "Triton", "CUDA", "`auto` takes, and why")
PLACES = {"cpu": "CPU", "cpu compiled": "CPU under torch.compile", "cuda": "GPU"}
BEGIN, END = "<!-- python -m bench operators --write README.md -->\n", "<!-- end -->\n"


def docstring(operator: Operator) -> str:
    """Of the operator's module."""
    return sys.modules[operator.call.__module__].__doc__ or ""


def summary(operator: Operator) -> str:
    """First line of what the public function says it does; '' where it says nothing."""
    return (operator.call.__doc__ or "").strip().partition("\n")[0]


def formula(operator: Operator) -> str:
    """First line of the formula, without the remark at its end; '' where the module has none."""
    line = re.search(r"^    (\S.*)$", docstring(operator), re.MULTILINE)
    if line is None:
        return ""
    text = re.sub(r" {3,}\(.*$", "", line[1])
    return re.sub(r" +", " ", re.sub(r"(?<![,;:]) {3,}", ";  ", text)).rstrip(" ;,")


def shapes(operator: Operator) -> str:
    """What follows "Shapes:", up to the end of the sentence; '' where the module says nothing."""
    match = re.search(r"^Shapes: (.*?)\.(?:\s|$)", docstring(operator), re.MULTILINE | re.DOTALL)
    return " ".join(match[1].split()) if match else ""


def dtypes(operator: Operator, name: str) -> str:
    """Dtypes of an implementation; '-' where the operator has none of that name."""
    implementation = operator.implementations.get(name)
    names = {dtype: dtype_name(dtype) for dtype in DTYPES.values()}
    return "-" if implementation is None else " ".join(
        names.get(d, str(d).removeprefix("torch.").replace("float", "fp"))
        for d in implementation.dtypes
    )


def choices(operator: Operator) -> str:
    """What `auto` takes on each kind of device, the first that can run, and why."""
    return "; ".join(
        f"{PLACES[device]} {', else '.join(f'`{impl}`: {why}' for impl, why in order)}"
        for device, order in operator.preferred.items()
        if order
    )


def code(text: str) -> str:
    """A code span of any text, within a table; '' of none."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text else ""


def row(operator: Operator) -> str:
    """One operator as a line of the table."""
    first = f"**`{operator.name}`** {summary(operator)} {code(formula(operator))}".strip()
    kernels = (dtypes(operator, name) for name in ("cpu", "triton", "cuda"))
    cells = (first, shapes(operator), *kernels, choices(operator))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def table() -> str:
    """The operators in the order of their names, as Markdown."""
    head = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    return head + "".join(row(OPERATORS[name]) for name in sorted(OPERATORS))


def with_table(text: str) -> str:
    """A document with the present table between its marks.

    Raises:
        ConfigError: the document has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the document lacks the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + "\n" + table() + "\n" + end + after


def main(argv: Sequence[str]) -> int:
    """Print the table, or write it into a document."""
    parser = argparse.ArgumentParser(
        prog="python -m bench operators",
        description="The operators: formula, shapes, implementations, and what auto takes.",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace its table")
    args = parser.parse_args(argv)
    if not args.write:
        print(table(), end="")
        return 0
    try:
        atomic_write(args.write, with_table(args.write.read_text(encoding="utf-8")))
    except (PgolfError, OSError) as e:
        print(f"python -m bench operators: {e}", file=sys.stderr)
        return 2
    return 0
