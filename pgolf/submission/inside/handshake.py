"""In place of pgolf.training.handshake: the ranks of a script all run the same file."""


def alike(ranks, work, facts, remedy=""):
    """What `work` returns."""
    return work()
