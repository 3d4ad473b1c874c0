"""One self-contained script for a submission: the package's own sources, shaken, minified, packed.

The contest counts all code in train_gpt.py, and a library must not smuggle code past that count; so
a script holds every line of pgolf that it runs. Libraries from outside stay imports.
"""

import ast
import bz2
import functools
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import python_minifier

from pgolf.codecs import CODECS, body_codec
from pgolf.config import Config, to_dict, with_overrides
from pgolf.submission.rename import shorten
from pgolf.submission.shake import PACKAGE, Shaker
from pgolf.submission.specialise import COMPILED, KERNELS, specialise

INSIDE = Path(__file__).with_name("inside")
# Modules whose place another one takes in a script.
REPLACED = {
    "pgolf.artifact.foreign": "foreign.py",
    "pgolf.extension": "extension.py",
    "pgolf.data.corpus": "corpus.py",
    "pgolf.optim.fused": "fused.py",
    "pgolf.submission.script": "script.py",
}
ENTRY = "pgolf.submission.entry"
# What the two uses of a script start from.
SCORING, TRAINING = ("configure", "score_file"), ("main",)

# bzip2 is in Python itself, and 1.6 % smaller than raw lzma here; brotli would take 1 % less
# again, for one more library to install.
_BEFORE = b"#coding:latin1\nimport bz2\nparts=bz2.decompress("
_AFTER = b'.encode("latin1")).decode().split("\\0")\nexec(parts[0])\n'


@dataclass(frozen=True)
class Script:
    """A script.

    Attributes:
        data: the file's bytes.
        sources: module name -> minified source.
    """

    data: bytes
    sources: dict[str, str]

    @property
    def libraries(self) -> list[str]:
        """Modules from outside that it imports, by their first name, but for Python's own."""
        found = {line for source in self.sources.values() for line in _imported(source)}
        return sorted(found - {PACKAGE, *sys.stdlib_module_names})


def build_script(config: Config) -> Script:
    """The script of a run: the same bytes for the same settings and the same versions of libraries.

    Only settings that are about the model and its training count, not where the run reads and
    writes. The codecs are those that `config.artifact.codec` allows.
    """
    return _build(_settings(config), config.artifact.codec, TRAINING, COMPILED)


def script_parts(config: Config) -> dict[str, int]:
    """Bytes of a run's script by what they are for.

    `scoring` is a script that can only score, without kernels for training; `training` is what the
    whole takes beyond it. `decoder` is the part of `scoring` that reads the allowed codecs.
    """
    codec = config.artifact.codec
    settings = _settings(config)
    total = len(build_script(config).data)
    scoring = len(_build(settings, codec, SCORING, KERNELS).data)
    without = len(_build(settings, "", SCORING, KERNELS).data)
    return {"scoring": scoring, "training": total - scoring, "decoder": scoring - without}


def _settings(config: Config) -> str:
    """What differs from the defaults, as text; sections stay."""

    def difference(values: dict, defaults: dict) -> dict:
        return {
            key: difference(value, defaults[key]) if isinstance(value, dict) else value
            for key, value in values.items()
            if isinstance(value, dict) or value != defaults[key] or key in ("recipe", "seed_exact")
        }

    # Where and how this machine ran is no part of a submission.
    here = {"data": "", "tokenizer": "", "out": "", "resume": False, "device": "auto"}
    values = to_dict(with_overrides(config, here))
    return repr(difference(values, to_dict(Config())))


@functools.cache
def _build(settings: str, codec: str, roots: tuple[str, ...], without: frozenset[str]) -> Script:
    wanted = CODECS if codec == "auto" else (codec, body_codec(codec))
    others = [name for name in CODECS if name not in wanted]

    def parse(module: str) -> ast.Module:
        inside = REPLACED.get(module)
        file = INSIDE / inside if inside else Path(find_spec(module).origin)
        return specialise(module, file, without)

    shaker = Shaker(parse, absent=[f"pgolf.codecs.{name}" for name in others])
    for root in roots:
        trees = shaker.reach(ENTRY, root)
    shorten(trees, {*shaker.looked_up, *roots})
    sources = {name: minified(ast.unparse(tree), name) for name, tree in sorted(trees.items())}
    loader = minified((INSIDE / "loader.py").read_text(encoding="utf-8"), "loader")
    parts = [f"settings={settings}\n{loader}"]
    for name, source in sources.items():
        parts += [name, source]
    return Script(packed("\0".join(parts).encode()), sources)


@functools.cache
def minified(source: str, name: str) -> str:
    """A module without comments, blanks and long names of locals.

    Names that anything outside of a function sees stay: globals, attributes, parameters. A long
    parameter gets a short local beside it, but not in Triton kernels, where the copy of a constant
    is no constant.
    """
    parameters = {n.arg for n in ast.walk(ast.parse(source)) if isinstance(n, ast.arg)}
    return python_minifier.minify(
        source,
        name,
        preserve_locals=sorted(parameters) if "triton" in name else None,
        rename_globals=False,
        hoist_literals=False,
        remove_annotations=False,
    )


def packed(text: bytes) -> bytes:
    """A Python file that unpacks `text` into `parts`, split at NUL, and runs the first of them."""
    return _BEFORE + literal(bz2.compress(text)) + _AFTER


def literal(data: bytes) -> bytes:
    """Source of a string literal, in latin-1, that has these bytes as its characters.

    Raw but for what Python's reader would change or end the literal at: 1.2 % longer than `data`.
    """

    def escaped(match: re.Match) -> bytes:
        if match[0] == b"\0":  # "\0" and a digit would be one character
            return b"\\000" if data[match.end() : match.end() + 1].isdigit() else b"\\0"
        return b"\\r" if match[0] == b"\r" else b"\\" + match[0]

    body = re.sub(rb'[\\\r\0]|"(?="|\Z)', escaped, data)
    return b'"""' + body + b'"""'


def _imported(source: str) -> Iterable[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]
