"""One self-contained script for a submission: modules of the package, minified and packed.

The contest counts all code in train_gpt.py, and a library must not smuggle code past that count; so
a script holds every line of pgolf that it runs. Libraries from outside stay imports.
"""

import ast
import bz2
import functools
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from pgolf import extras
from pgolf.codecs import CODECS, body_codec
from pgolf.config import Config, to_dict, with_overrides
from pgolf.submission import unused
from pgolf.submission.source_cache import cached
from pgolf.submission.unused import without_parts, without_unnamed

PACKAGE = "pgolf"
INSIDE = Path(__file__).with_name("inside")
# Modules whose place another one takes in a script.
REPLACED = {
    "pgolf.artifact.foreign": "foreign.py",
    "pgolf.extension": "extension.py",
    "pgolf.data.corpus": "corpus.py",
    "pgolf.ops.derivatives": "derivatives.py",
    "pgolf.ops.inputs": "inputs.py",
    "pgolf.ops.opaque": "opaque.py",
    "pgolf.ops.product": "product.py",
    "pgolf.optim.fused": "fused.py",
    "pgolf.submission.script": "script.py",
    "pgolf.training.compiling": "compiling.py",
    "pgolf.training.estimate": "estimate.py",
    "pgolf.training.graphs": "graphs.py",
    "pgolf.training.handshake": "handshake.py",
    "pgolf.training.phases": "phases.py",
    "pgolf.training.run_folder": "run_folder.py",
}
# What a script is made of: modules, and packages with all that is directly in them. A name that a
# bundled module imports from a module which is not bundled is None there.
SCORING = (
    "pgolf.artifact.container", "pgolf.artifact.foreign", "pgolf.artifact.header",
    "pgolf.artifact.layout", "pgolf.artifact.load", "pgolf.config", "pgolf.data.contest",
    "pgolf.data.shards", "pgolf.data.tokenizer", "pgolf.device", "pgolf.errors",
    "pgolf.extension", "pgolf.fields", "pgolf.files", "pgolf.model.embeddings",
    "pgolf.model.gpt", "pgolf.model.layers", "pgolf.model.matrices", "pgolf.ops.*",
    "pgolf.progress",
    "pgolf.quant.dequantize", "pgolf.quant.step_grid", "pgolf.ranks", "pgolf.roles",
    "pgolf.roll_call", "pgolf.scoring.*", "pgolf.settings", "pgolf.stop",
    "pgolf.submission.entry", "pgolf.submission.script",
)  # fmt: skip
TRAINING = (
    *SCORING, "pgolf.artifact.pack", "pgolf.artifact.sizes", "pgolf.codecs.rans",
    "pgolf.codecs.rans_encode", "pgolf.codecs.weight_model", "pgolf.data.corpus",
    "pgolf.data.loader", "pgolf.data.manifest", "pgolf.data.order", "pgolf.model.decode",
    "pgolf.model.frozen", "pgolf.model.init", "pgolf.optim.*", "pgolf.quant.*",
    "pgolf.training.added_loss", "pgolf.training.compiling", "pgolf.training.estimate",
    "pgolf.training.export", "pgolf.training.graphs", "pgolf.training.handshake",
    "pgolf.training.interrupt", "pgolf.training.late_qat", "pgolf.training.pace",
    "pgolf.training.passes", "pgolf.training.phases", "pgolf.training.run",
    "pgolf.training.run_folder", "pgolf.training.session",
    "pgolf.training.step_log", "pgolf.training.trainer", "pgolf.triton_kernels.*",
)  # fmt: skip
# What a script never runs: operators with kernels in the compiled half only, what `auto` takes
# nowhere, and tests of any.
LEFT_OUT = {
    "pgolf.ops.changes", "pgolf.ops.embed_smear_kernels", "pgolf.ops.grad_norm",
    "pgolf.ops.joined_norm", "pgolf.ops.linear_mix", "pgolf.ops.linear_qk_rope",
    "pgolf.ops.linear_residual", "pgolf.ops.muon_momentum", "pgolf.ops.norm_mlp",
    "pgolf.ops.param_update", "pgolf.ops.part_sums", "pgolf.ops.qk_rope_kernels",
    "pgolf.ops.residual_norm_kernels", "pgolf.ops.scaled_copies", "pgolf.ops.stacked",
    "pgolf.ops.testing", "pgolf.ops.timed", "pgolf.ops.token_sums", "pgolf.ops.xsa_linear",
    "pgolf.triton_kernels.linear_qk_rope", "pgolf.triton_kernels.linear_residual",
    "pgolf.triton_kernels.norm_mlp", "pgolf.triton_kernels.xsa_linear",
}  # fmt: skip

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
        imported = {line for source in self.sources.values() for line in _imported(source)}
        return sorted(imported - {PACKAGE, *sys.stdlib_module_names})


def build_script(config: Config) -> Script:
    """The script of a run: the same bytes for the same settings and the same versions of libraries.

    Only settings that are about the model and its training count, not where the run reads and
    writes. The codecs are those that `config.artifact.codec` allows.
    """
    return _build(_settings(config), config.artifact.codec, TRAINING)


def script_parts(config: Config) -> dict[str, int]:
    """Bytes of a run's script by what they are for.

    `scoring` is a script that can only score, without kernels for training; `training` is what the
    whole takes beyond it. `decoder` is the part of `scoring` that reads the allowed codecs.
    """
    codec = config.artifact.codec
    settings = _settings(config)
    total = len(build_script(config).data)
    scoring = len(_build(settings, codec, SCORING).data)
    without = len(_build(settings, "", SCORING).data)
    return {"scoring": scoring, "training": total - scoring, "decoder": scoring - without}


def _settings(config: Config) -> str:
    """What differs from the defaults, as text; sections stay."""

    whole = ("recipe", "as_published")  # what `from_dict` wants in any case

    def difference(values: dict, defaults: dict) -> dict:
        return {
            key: difference(value, defaults[key]) if isinstance(value, dict) else value
            for key, value in values.items()
            if isinstance(value, dict) or key in whole or value != defaults[key]
        }

    # Where and how this machine ran is no part of a submission.
    here = {"data": "", "tokenizer": "", "out": "", "resume": False, "device": "auto",
            "profile": "", "log": "", "checkpoint_every": 0, "graphs": "auto",
            "compile_cache": "auto"}  # fmt: skip
    # A script knows no operator that it leaves out, and has no compiled half.
    chosen = [c for c in config.run.ops.split(",")
              if f"{PACKAGE}.ops.{c.partition('=')[0].strip()}" not in LEFT_OUT
              and c.rpartition("=")[2].strip() not in ("cpu", "cuda")]  # fmt: skip
    here["ops"] = ",".join(chosen) or "auto"
    values = to_dict(with_overrides(config, here))
    return repr(difference(values, to_dict(Config())))


@functools.cache
def _build(settings: str, codec: str, modules: tuple[str, ...]) -> Script:
    originals = {name: _source(name) for name in _named(modules, codec)}
    originals["loader"] = (INSIDE / "loader.py").read_text(encoding="utf-8")
    sources = cached(_key(originals), lambda: _smallest(originals))
    loader = sources.pop("loader")
    files = {}
    if "pgolf.triton_kernels" in sources:
        table = find_spec("pgolf.triton_kernels.launch").origin
        kernels = json.loads(Path(table).with_name("configs.json").read_text(encoding="utf-8"))
        used = {  # reasons are for readers of the package
            kernel: [row | {"reason": ""} for row in rows]
            for kernel, rows in kernels.items()
            if any(kernel in text for text in sources.values())
        }
        files["configs.json"] = json.dumps(used, separators=(",", ":"))
    parts = [f"settings={settings}\n{loader}"]
    for name, text in (sources | files).items():
        parts += [name, text]
    return Script(packed("\0".join(parts).encode()), sources)


def _key(originals: dict[str, str]) -> str:
    """A hash of what the smallest form of modules depends on: they, this one, what it calls."""
    extras.python_minifier()  # or the error that says how to install it
    versions = sys.version, version("python-minifier")
    rules = [Path(file).read_text(encoding="utf-8") for file in (__file__, unused.__file__)]
    decides = json.dumps((versions, rules, originals))
    return hashlib.sha256(decides.encode()).hexdigest()


def _smallest(originals: dict[str, str]) -> dict[str, str]:
    """All of them minified, without what no other names."""
    parts = {name: without_parts(text, name) for name, text in originals.items()}
    left = without_unnamed(parts).items()
    return {name: minified(text, name, asked) for name, (text, asked) in left}


def _named(modules: Iterable[str], codec: str) -> list[str]:
    """The modules of a list, the packages around them, and the modules of the codecs in use.

    A package's own command, `__main__`, is none of its modules: a script has one command.
    """
    codec_names = CODECS if codec == "auto" else (codec, body_codec(codec))
    codecs = [f"pgolf.codecs.{c}" for c in codec_names if c in CODECS]
    codecs += ["pgolf.codecs.weight_model"] * ("rans" in codec_names)
    names = set()
    for name in (*modules, *codecs):
        package, star, _ = name.partition(".*")
        names.add(package)
        if star:
            places = find_spec(package).submodule_search_locations
            inside = {m.name for m in iter_modules(places)} - {"__main__"}
            names |= {f"{package}.{name}" for name in inside}
    names -= LEFT_OUT
    for name in list(names):
        parts = name.split(".")
        names |= {".".join(parts[:n]) for n in range(1, len(parts))}
    return sorted(names)


def _source(module: str) -> str:
    inside = REPLACED.get(module)
    file = INSIDE / inside if inside else Path(find_spec(module).origin)
    return file.read_text(encoding="utf-8")


def minified(source: str, name: str, asked: Collection[str] = ()) -> str:
    """A module without comments, docstrings, blanks and long names.

    Attributes and parameters keep theirs, and globals that are `asked` for from outside. In Triton
    kernels so do globals, and parameters inside, too: the copy of a constant is no constant. There,
    and in opaque operators, whose schema they are, annotations are read.
    """
    triton = name.startswith("pgolf.triton_kernels")
    parameters = {n.arg for n in ast.walk(ast.parse(source)) if isinstance(n, ast.arg)}
    return extras.python_minifier().minify(
        source,
        name,
        preserve_locals=sorted(parameters) if triton else None,
        rename_globals=not triton,
        preserve_globals=sorted(asked),
        hoist_literals=False,
        remove_literal_statements=True,
        remove_annotations=not (triton or name.startswith("pgolf.ops")),
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


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]
