"""`python -m pgolf.scoring JOB` scores a job, JSON, and prints one JSON object as the last line."""

import dataclasses
import json
import sys

from pgolf.errors import PgolfError
from pgolf.scoring.job import ScoreJob


def main() -> int:
    """Read the job, print the score or the error."""
    try:
        answer = dataclasses.asdict(ScoreJob(**json.loads(sys.argv[1])).run())
    except PgolfError as e:
        answer = {"error": str(e), "kind": type(e).__name__}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
