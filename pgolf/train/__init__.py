"""Training: ranks, run folder, checkpoints, the loop, and what follows it up to the score.

Parallel forms for record scale (sharded optimiser, overlapped collectives, fault handling) join
`ranks.py` and `pgolf.optim`; the loop in `trainer.py` only asks them.

The module is also a function, `pgolf.train("demo", layers=2)`: a package and a function of `pgolf`
cannot share the name otherwise, as every import of the package would replace the function.
"""

import os
import sys
from types import ModuleType
from typing import Any


class _Training(ModuleType):
    def __call__(self, recipe: str, /, **settings: Any) -> dict[str, Any] | None:
        """Train a recipe, pack and score it, as the command `pgolf train` does, with its output.

            result = pgolf.train("demo", layers=2, max_tokens=2e5, out="runs/two")

        Args:
            recipe: name of a recipe; `pgolf recipes` lists them.
            settings: what to change, as on the command line; values may be text, numbers, paths.

        Returns:
            What result.json holds: val_bpb, bytes_total and more; with torchrun None on ranks but
            the first.

        Raises:
            PgolfError: what the command would end with.
        """
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as pgolf.cli does, and why
        from pgolf.train.start import start

        return start(recipe, {key: _plain(value) for key, value in settings.items()})


def _plain(value: Any) -> Any:
    """A setting as the configuration takes it: a path as text, a whole 2e6 as an integer."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


sys.modules[__name__].__class__ = _Training
