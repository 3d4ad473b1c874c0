"""Numbers as people read them; None (missing, or not finite in the file) reads as n/a."""

from typing import Any

from pgolf.report.read import mapping, number

MISSING = "n/a"
# Bits per byte are only comparable on one text; both forms of the report say so.
NOT_COMPARABLE = (
    "Bits per byte depend on the text: scores on different corpora cannot be compared."
)

# Names of the groups of tensors, and of the artifact's other bytes, for readers.
GROUPS = {
    "attn": "attention",
    "mlp": "MLP",
    "tok": "token table",
    "bigram": "bigram",
    "ve": "value embedding",
    "scalars": "scalars and vectors",
    "meta": "header",
}


def decimal(value: Any, places: int) -> str:
    """1234.5678, 2 -> '1,234.57'; scientific from 1e15 on, where the digits would be noise."""
    x = number(value)
    if x is None:
        return MISSING
    return f"{x:,.{places}f}" if abs(x) < 1e15 else f"{x:.3e}"


def percent(value: Any, places: int, sign: bool = False) -> str:
    """0.0123, 1 -> '1.2 %'."""
    x = number(value)
    if x is None:
        return MISSING
    return f"{'+' if sign and x >= 0 else ''}{decimal(100 * x, places)} %"


def si(value: Any) -> str:
    """737280 -> '737 k'; three digits, for captions and tiles."""
    x = number(value)
    if x is None:
        return MISSING
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,500 would round to '1000 k', so the next unit begins there.
        if abs(x) >= 0.9995 * scale:
            scaled = x / scale
            places = max(0, 3 - len(str(int(abs(scaled)))))
            return f"{scaled:,.{places}f} {unit}"
    return f"{x:,.0f}"


def stored_as(tensor: dict[str, Any]) -> str:
    """The type of a tensor in the artifact, such as int6 or float16."""
    kind = tensor.get("kind")
    return f"int{tensor.get('bits')}" if kind == "int" else str(kind)


def quantisation_cost(result: dict[str, Any]) -> float | None:
    """Share by which the decoded score is above the live one, or None where one is missing."""
    decoded, live = number(result.get("val_bpb")), number(result.get("val_bpb_live"))
    return None if decoded is None or not live else decoded / live - 1


def artifact_parts(result: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, bytes) of every tensor group, which add up to the artifact, and of the code."""
    groups = mapping(result.get("bytes_by_group"))
    sizes = [(GROUPS.get(name, name), number(size)) for name, size in groups.items()]
    sizes.append(("code", number(result.get("bytes_code"))))
    return [(name, size) for name, size in sizes if size is not None and size >= 0]
