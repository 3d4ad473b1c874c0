"""Recipes and keys as text, for `pgolf recipes`."""

import textwrap

from pgolf.config import known_keys
from pgolf.recipes import RECIPES, get

SOURCES = (
    "Sources: C the submission's code, L its log, R its README, S its announcement, I inferred, "
    "P pgolf's choice, - default."
)


def list_recipes() -> str:
    """Every recipe on a line."""
    lines = [f"{name:<8} {recipe.title}" for name, recipe in RECIPES.items()]
    return "\n".join([*lines, "", "`pgolf recipes NAME` shows every value with its source."])


def show_recipe(name: str) -> str:
    """One recipe: every value with its source, corrections, and what as_published changes."""
    r = get(name)
    config, sources = r.config(), {v.key: v for v in r.values}
    lines = [f"{r.name}: {r.title}", *([r.source] if r.source else []), ""]
    section = ""
    for key, (owner, spec) in known_keys().items():
        if owner != section:
            section = owner
            lines.append(f"[{section}]")
        value = getattr(getattr(config, owner), spec.name)
        given = sources.get(key)
        letter, note = (given.source, given.note) if given else ("-", "")
        lines.append(f"  {key:<22} {value!s:<12} {letter}  {note}".rstrip())
    if r.corrections:
        lines += ["", "Corrected, and why:"]
        lines += [
            textwrap.fill(c, 98, initial_indent="- ", subsequent_indent="  ") for c in r.corrections
        ]
    if r.as_published:
        lines += ["", "as_published=true puts back:"]
        lines += [f"  {v.key}={v.value}  {v.source}  {v.note}".rstrip() for v in r.as_published]
        lines += ["and nothing else: corrections that this does not undo stay."]
    return "\n".join([*lines, "", SOURCES])


def list_keys() -> str:
    """Every key with its default, limits and meaning."""
    lines, section = [], ""
    for key, (owner, spec) in known_keys().items():
        if owner != section:
            section = owner
            lines.append(f"[{section}]")
        choices = spec.metadata.get("choices")
        default = spec.default if spec.default != "" else "''"
        what = spec.metadata["doc"] + (f" ({', '.join(choices)})" if choices else "")
        lines.append(f"  {key:<22} {default!s:<12} {what}")
    lines += ["for several keys, see pgolf train --help: quick=true, as_published=true"]
    return "\n".join(lines)
