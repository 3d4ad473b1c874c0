"""All families of instructions; importing them fills the table."""

from . import asynchronous, collective, convert, floating, integer, memory_access, moves, tensor
from .table import prepare

FAMILIES = (asynchronous, collective, convert, floating, integer, memory_access, moves, tensor)

__all__ = ["FAMILIES", "prepare"]
