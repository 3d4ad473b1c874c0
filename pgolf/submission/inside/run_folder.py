"""In place of pgolf.training.run_folder: no script goes on with a run."""

import json
from contextlib import contextmanager, suppress
from pathlib import Path

from pgolf.files import storage_errors


class RunFolder:
    """runs/RECIPE-seedN, or with the first number behind it that is free."""

    def __init__(self, path, writes=True):
        self.path, self.writes = path, writes
        self.artifact = path / "artifact"

    @classmethod
    @contextmanager
    def choose(cls, config):
        """Make it."""
        base = path = Path(f"runs/{config.recipe}-seed{config.run.seed}")
        number = 1
        with storage_errors(path):
            base.parent.mkdir(parents=True, exist_ok=True)
            while path.exists():
                number += 1
                path = base.with_name(f"{base.name}-{number}")
            path.mkdir()
        try:
            yield path
        finally:
            with suppress(OSError):  # a run that did not begin leaves it empty
                path.rmdir()

    def log(self, **line):
        """Append one to metrics.jsonl."""
        if self.writes:
            with suppress(OSError), open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def checkpoints(self):
        """There are none."""
        return []

    def nothing(self, *ignored):
        """What a package's run does about checkpoints, and after a failure."""

    open = discard = check = save = nothing
