"""Elements of HTML and SVG as strings that are safe by construction.

Only `Markup` is passed on as it stands; every other child and every attribute value is escaped, so
a name from a file cannot become an element. The result is well-formed XML apart from HTML's void
elements.
"""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = ("meta", "br")
# Characters that XML forbids, and halves of surrogate pairs, which UTF-8 cannot encode.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Text that is markup already."""


def printable(value: Any) -> str:
    """`value` as text that an element can hold."""
    return _FORBIDDEN.sub("\ufffd", str(value))


def _escaped(value: Any) -> str:
    return escape(printable(value))


def join(parts: Iterable[Any]) -> Markup:
    """The parts one after another, escaped where they are not markup."""
    return Markup("".join(p if isinstance(p, Markup) else _escaped(p) for p in parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """`<name attributes>children</name>`.

    A trailing underscore of an attribute's name is dropped (class_), the others become hyphens
    (stroke_width). Attributes that are None are left out; floats are rounded to 0.01.
    """
    pairs = []
    for key, value in attributes.items():
        if value is not None:
            value = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            pairs.append(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"')
    opening = f"<{name}{''.join(pairs)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(children)}</{name}>")
