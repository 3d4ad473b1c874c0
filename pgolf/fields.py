"""Documented dataclass fields with limits, and values for them from text or JSON."""

from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any

from pgolf.errors import ConfigError

SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
SCALES = {"k": 10**3, "m": 10**6, "g": 10**9}  # 100k and 2M, in capitals or not


def opt(default: Any, doc: str, **limits: Any) -> Any:
    """A documented field; limits are `ge`, `gt`, `le`, `choices`, `renamed` (old choice -> new)."""
    return field(default=default, metadata={"doc": doc, **limits})


def parse_value(key: str, spec: Field, value: Any) -> Any:
    """The value of a field, from text or of its own type, within its limits.

    Raises:
        ConfigError: it is neither, or out of its limits.
    """
    kind = spec.type
    try:
        if isinstance(value, str):
            parsed = _from_text(kind, value)
        elif type(value) is kind or (kind is float and type(value) is int):
            parsed = kind(value)
        else:
            raise TypeError
    except (ValueError, KeyError, TypeError, OverflowError):
        example = ", such as 4, 1e5, 100k or 2M" if kind is int else ""
        raise ConfigError(f"{key}={value}: expected {kind.__name__}{example}") from None
    check_limits(key, spec.metadata, parsed)
    return parsed


def _from_text(kind: type, text: str) -> Any:
    if kind is bool:
        return SWITCH[text.lower()]
    scale = SCALES.get(text[-1:].lower(), 1) if kind is int else 1
    if scale > 1 or (kind is int and "e" in text.lower()):  # 100k, 1e6
        number = float(text[:-1] if scale > 1 else text) * scale
        if abs(number - round(number)) > 1e-9 * abs(number):  # 1.001k is 1001, whatever float says
            raise ValueError
        return round(number)
    return kind(text)


def check_limits(key: str, limits: Mapping[str, Any], value: Any) -> None:
    """Raise ConfigError unless `value` is within the field's limits."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ConfigError(f"{key}={value}: must be finite")
    if value in limits.get("renamed", ()):
        raise ConfigError(f"{key}={value} is now called {key}={limits['renamed'][value]}")
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(
            f"{key}={value}: must be one of {', '.join(map(repr, limits['choices']))}"
        )
    if "ge" in limits and value < limits["ge"]:
        raise ConfigError(f"{key}={value}: must be at least {limits['ge']}")
    if "gt" in limits and value <= limits["gt"]:
        raise ConfigError(f"{key}={value}: must be greater than {limits['gt']}")
    if "le" in limits and value > limits["le"]:
        raise ConfigError(f"{key}={value}: must be at most {limits['le']}")


def section_from_dict(cls: type, values: Any) -> Any:
    """Rebuild one section from plain values, refusing unknown names, types and limits."""
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__}: expected an object, found {type(values).__name__}")
    known = {f.name: f for f in fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{cls.__name__}: unknown key {name!r}")
    return cls(**{name: parse_value(name, known[name], v) for name, v in values.items()})
