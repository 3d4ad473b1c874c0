"""In place of pgolf.extension: a script has no compiled half."""


def load() -> None:
    """There is none."""


def why_missing() -> str:
    """Why `load()` is None."""
    return "the script of a submission has no kernels in C++ and CUDA"


cuda = load


def emulates_cuda() -> bool:
    """Nothing does."""
    return False
