"""In place of pgolf.artifact.foreign: a script does not tell kinds of files apart."""


def explain(data: bytes) -> str:
    """No more than that it is not known."""
    return "unknown"
