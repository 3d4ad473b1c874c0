"""pgolf: kernels, recipes and an artifact format for the best small language model per byte.

    result = pgolf.train("demo", layers=2)       # what the command `pgolf train` does
    model, meta = pgolf.load_model("runs/mine")  # a decoded artifact as a torch module

Importing this package is cheap: torch is only imported by the submodules that need it.
"""

from importlib import import_module

__version__ = "0.2.0"
__all__ = ["__version__", "load_model", "train"]


def __getattr__(name: str) -> object:
    if name in ("load_model", "train"):
        return getattr(import_module("pgolf.api"), name)
    raise AttributeError(f"module 'pgolf' has no attribute {name!r}")
