"""A plugin of pytest: each test's outcome as a JSON line, written as it ends.

    pytest -p bench.outcomes --outcomes FILE

A run that is cut off leaves what it had.
"""

import json
from pathlib import Path

import pytest

from pgolf.files import atomic_write


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write outcomes as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--outcomes")
    if file and not hasattr(config, "workerinput"):  # xdist: the first process hears of all tests
        config.pluginmanager.register(Outcomes(file))


class Outcomes:
    """Writes them."""

    def __init__(self, file: Path):
        self.file, self.lines = file, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        message = "" if report.outcome == "passed" else str(report.longrepr)
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration,
                "said": message[-2000:]}  # fmt: skip
        self.lines.append(json.dumps(line) + "\n")
        atomic_write(self.file, "".join(self.lines))
