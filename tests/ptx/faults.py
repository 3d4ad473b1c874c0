"""What can be wrong with a kernel that is run, each a class of its own."""


class Fault(Exception):
    """The kernel did something that has no defined result on a GPU."""


class OutOfBounds(Fault):
    """An access outside of every allocation, or outside of its shared array."""


class Misaligned(Fault):
    """An address that is no multiple of what is accessed there."""


class Race(Fault):
    """Two warps, or two blocks, on one byte, one of them writing, with no barrier between."""


class Divergence(Fault):
    """A barrier or a collective instruction that some of its threads do not reach."""


class Pending(Fault):
    """What an asynchronous instruction works on was touched before it was waited for."""


class NoEnd(Fault):
    """More instructions than the limit."""


class Unsupported(Exception):
    """PTX that the interpreter does not know. It says nothing about the kernel."""


class Missing(Exception):
    """Something that a check needs is not on this machine."""
