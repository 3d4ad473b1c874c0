"""Who computes an operator: torch eagerly, torch.compile, our kernels, public peers."""

from collections.abc import Callable, Sequence

import torch

from bench.cases import Case, Function
from bench.peers import PEERS, Peer
from pgolf.device import DTYPES
from pgolf.errors import PgolfError
from pgolf.ops.choose import choose
from pgolf.ops.operator import OPERATORS, Operator
from pgolf.ops.testing import kernel

EAGER, COMPILED = "eager", "compiled"
KERNELS = ("cpu", "triton", "cuda", *OPERATORS["attention"].implementations)


class Unavailable(Exception):
    """A provider cannot compute this case on this machine; the message says why."""


def known() -> list[str]:
    """Every provider's name, in the order of tables."""
    return [EAGER, COMPILED, *KERNELS, *(peer.name for peer in PEERS)]


def expand(requested: Sequence[str]) -> list[str]:
    """Names of providers; 'peers' stands for all public ones, nothing for all of all.

    Raises:
        PgolfError: an unknown name.
    """
    names = known()
    selected: list[str] = []
    for choice in requested or names:
        expanded = [peer.name for peer in PEERS] if choice == "peers" else [choice]
        if expanded[0] not in names:
            raise PgolfError(
                f"no provider is named {choice!r}; there are {', '.join(names)}, and peers for the "
                "public ones"
            )
        selected += expanded
    return [name for name in names if name in selected]


def applies(name: str, operator: Operator) -> bool:
    """Whether a provider has this operator at all."""
    if name in (EAGER, COMPILED):
        return True
    peer = _peer(name)
    return peer.operator == operator.name if peer else name in operator.implementations


def find(name: str, case: Case) -> Function:
    """The provider's function, to be called with the arguments of `case`.

    Raises:
        Unavailable: it cannot run here, or not with these arguments.
    """
    operator = case.operator
    if name == EAGER:
        return operator.reference
    if name == COMPILED:
        torch._dynamo.reset()  # each case is compiled anew, without a count against a limit
        return torch.compile(operator.reference, dynamic=False, fullgraph=True)
    peer = _peer(name)
    return _peer_function(peer, case) if peer else _kernel(name, case)


def _peer(name: str) -> Peer | None:
    return next((peer for peer in PEERS if peer.name == name), None)


def _peer_function(peer: Peer, case: Case) -> Function:
    reason = peer.missing() or peer.unfit(*case.args, **case.kwargs)
    if reason:
        raise Unavailable(reason)
    return peer.function(*case.args, **case.kwargs)


def _kernel(name: str, case: Case) -> Callable:
    device, dtype = case.device.type, DTYPES[case.dtype]
    if case.operator.implementations[name].device != device:
        raise Unavailable(f"runs on {case.operator.implementations[name].device}, not on {device}")
    try:
        choose(case.operator.name, name, device, dtype)
    except (ValueError, RuntimeError) as e:
        raise Unavailable(str(e)) from None
    return kernel(case.operator, name)
