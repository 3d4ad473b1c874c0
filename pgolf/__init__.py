"""pgolf: kernels, recipes and an artifact format for the best small language model per byte.

Importing this package is cheap: torch is only imported by the submodules that need it.
"""

__version__ = "0.2.0"
