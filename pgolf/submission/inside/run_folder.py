"""In place of pgolf.training.run_folder: no script goes on with a run."""

import json
from contextlib import contextmanager, suppress
from pathlib import Path

read_config = None


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
        while True:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                path = base.with_name(f"{base.name}-{number}")
        yield path

    def log(self, **line):
        """Append one to metrics.jsonl."""
        if self.writes:
            with suppress(OSError), open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def checkpoints(self):
        """There are none."""
        return []

    def nothing(self, *ignored):
        """What is done about checkpoints and settings."""

    open = discard = check = save = nothing
