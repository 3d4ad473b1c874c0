"""`python -m pgolf.report RUN` writes the page of a finished run again."""

import argparse
import sys
from pathlib import Path

from pgolf.errors import PgolfError
from pgolf.report.html import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pgolf.report", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    try:
        print(write_report(parser.parse_args().run))
    except PgolfError as e:
        sys.exit(f"error: {e}")
