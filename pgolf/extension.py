"""The compiled half of the package, pgolf._C, if it is there; nothing else imports it.

A missing extension is no error: every operator has a reference. One that is there and does not load
is announced, because otherwise a slow run would be the only sign.
"""

import functools
import importlib
import warnings
from pathlib import Path
from types import ModuleType

_NAME = "pgolf._C"
_REMEDY = "rebuild with `pip install -v .` (PGOLF_BUILD=cpu or cuda makes a failure an error)"


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    """(the module, '') or (None, the reason)."""
    try:
        return importlib.import_module(_NAME), ""
    except ImportError as e:
        folder = Path(__file__).parent
        files = sorted(p.name for p in folder.glob("_C.*.so"))
        if not files:
            return None, f"{_NAME} was not built in {folder}: {_REMEDY}"
        if isinstance(e, ModuleNotFoundError) and e.name == _NAME:
            why = f"{_NAME} is built for another Python ({', '.join(files)}): {_REMEDY}"
        else:
            why = f"{_NAME} is there and does not load: {e}; {_REMEDY}"
        warnings.warn(f"{why}; pgolf goes on with the slower reference forms", stacklevel=3)
        return None, why


def load() -> ModuleType | None:
    """The module pgolf._C, or None; decided once in a process."""
    return _attempt()[0]


def why_missing() -> str:
    """Why `load()` is None, with the remedy; empty if it is not."""
    return _attempt()[1]
